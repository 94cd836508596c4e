"""torch.func, by the two recipes of PyTorch's tutorial "Neural Tangent Kernels", and on the whole batch.

Favours to the recipes: the Jacobian of x1 = x2 is taken once, and where it does not fit, each pair of blocks once.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, jvp, vjp, vmap

from benchmarks.empirical_ntk.contenders.blocks import block_size, budget, in_blocks
from benchmarks.empirical_ntk.networks import forget_running_statistics
from benchmarks.empirical_ntk.problem import Problem
from benchmarks.empirical_ntk.tasks import OUTPUTS

Weights = dict[str, Tensor]


def jacobian_contraction(problem: Problem, device: str) -> Callable[[], np.ndarray]:
    """Per-example Jacobians, contracted parameter by parameter."""
    model, x = problem.torch(device)
    weights, single = _single(model)
    item, n, reduce = x.element_size(), len(x), problem.task.reduce
    size = block_size(n, lambda b: b * OUTPUTS * problem.parameters * item, _limit(device))

    def block(i: int, j: int) -> np.ndarray:
        first = _jacobian(single, weights, x[i : i + size])
        second = first if i == j else _jacobian(single, weights, x[j : j + size])
        return _contract(first, second, reduce).cpu().numpy()

    return lambda: in_blocks(block, n, size)


def ntk_vector_products(problem: Problem, device: str) -> Callable[[], np.ndarray]:
    """A vector-Jacobian and a Jacobian-vector product for each output of each pair of examples."""
    model, x = problem.torch(device)
    weights, single = _single(model)
    item, n, p, a = x.element_size(), len(x), problem.parameters, problem.activations
    size = block_size(n, lambda b: b * OUTPUTS * item * (p + 3 * b * a), _limit(device))

    def pair(one: Tensor, other: Tensor) -> Tensor:
        output, pull = vjp(lambda w: single(w, one), weights)
        basis = torch.eye(output.numel(), dtype=output.dtype, device=output.device)
        return vmap(lambda v: jvp(lambda w: single(w, other), (weights,), pull(v))[1])(basis)

    def block(i: int, j: int) -> np.ndarray:
        values = vmap(vmap(pair, (None, 0)), (0, None))(x[i : i + size], x[j : j + size])
        if problem.task.reduce == "trace":
            values = torch.einsum("ijaa->ij", values) / OUTPUTS
        return values.detach().cpu().numpy()

    return lambda: in_blocks(block, n, size)


def whole_batch(problem: Problem, device: str) -> Callable[[], np.ndarray]:
    """The Jacobian of the whole batch, as batch statistics demand, contracted."""
    model, x = problem.torch(device)
    forget_running_statistics(model)  # a transform may not write a buffer that it captured
    weights = {name: value.detach() for name, value in model.named_parameters()}

    def work() -> np.ndarray:
        jacobian = jacrev(lambda w: functional_call(model, w, (x,)))(weights)
        rows = [part.flatten(2) for part in jacobian.values()]
        return _contract(rows, rows, problem.task.reduce).cpu().numpy()

    return work


def eigenvalues(problem: Problem, device: str) -> Callable[[], np.ndarray]:
    """Ends of the spectrum of the contracted Jacobians; no error is stated."""
    kernel = jacobian_contraction(problem, device)

    def work() -> np.ndarray:
        values = torch.linalg.eigvalsh(torch.from_numpy(kernel()).to(device)).cpu().numpy()
        return np.array([values[-1], values[0], 0.0, 0.0])

    return work


def _single(model: nn.Module) -> tuple[Weights, Callable[[Weights, Tensor], Tensor]]:
    """The weights, and the network on one example as a function of them."""
    weights = {name: value.detach() for name, value in model.named_parameters()}
    return weights, lambda w, example: functional_call(model, w, (example.unsqueeze(0),)).squeeze(0)


def _jacobian(single: Callable[[Weights, Tensor], Tensor], weights: Weights, x: Tensor) -> list[Tensor]:
    """[n, 10, parameter] of each parameter."""
    return [part.flatten(2) for part in vmap(jacrev(single), (None, 0))(weights, x).values()]


def _contract(first: list[Tensor], second: list[Tensor], reduce: str) -> Tensor:
    """Sum over parameters of the products of rows: [n1, n2, 10, 10], or the mean over outputs of the diagonal."""
    if reduce == "trace":
        return sum(torch.einsum("iap,jap->ij", one, other) for one, other in zip(first, second, strict=True)) / OUTPUTS
    return sum(torch.einsum("iap,jbp->ijab", one, other) for one, other in zip(first, second, strict=True))


def _limit(device: str) -> float:
    return budget() if device == "cpu" else torch.cuda.mem_get_info()[1] / 2
