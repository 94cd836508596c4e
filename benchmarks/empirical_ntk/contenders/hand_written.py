"""The layer-wise kernel of one kind of network, written out: what generality costs, and how far a machine goes.

Every layer must be `nn.Linear` or `nn.ReLU`, and the examples must not meet. Nothing is checked.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.empirical_ntk.problem import Problem

ROWS = 250
"""Of a strip of a triangle."""


def linear_relu(problem: Problem, device: str) -> Callable[[], np.ndarray]:
    """Θ = Σ_l (A_l A_lᵀ + 1) ∘ (G_l G_lᵀ) for a stack of linear layers with ReLU between them."""
    model, x = problem.torch(device)
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    add, finish = (_add_paired, _finish_paired) if problem.task.reduce == "trace" else (_add_all, _finish_all)

    @torch.no_grad()
    def work() -> np.ndarray:
        inputs, masks = [x], []
        for layer in layers[:-1]:
            before = torch.addmm(layer.bias, inputs[-1], layer.weight.T)
            masks.append((before > 0).to(x.dtype))
            inputs.append(before.relu_())
        o, n = len(layers[-1].weight), len(x)
        kernel = x.new_zeros((n, n) if problem.task.reduce == "trace" else (o, n, o, n))
        last = inputs[-1] @ inputs[-1].T + 1
        if kernel.ndim == 2:
            kernel += o * last
        else:
            for unit in range(o):
                kernel[unit, :, unit] += last
        derivatives = layers[-1].weight[:, None, :] * masks[-1]
        for number in range(len(layers) - 2, -1, -1):
            add(kernel, inputs[number] @ inputs[number].T + 1, derivatives)
            if number:
                derivatives = (derivatives.flatten(0, 1) @ layers[number].weight).view(o, n, -1).mul_(masks[number - 1])
        return finish(kernel, o).cpu().numpy()

    return work


def _add_all(kernel: Tensor, inputs: Tensor, derivatives: Tensor) -> None:
    o, n, _ = derivatives.shape
    for unit in range(o):
        products = derivatives[unit] @ derivatives[: unit + 1].flatten(0, 1).T
        kernel[unit, :, : unit + 1].addcmul_(products.view(n, unit + 1, n), inputs[:, None])


def _add_paired(kernel: Tensor, inputs: Tensor, derivatives: Tensor) -> None:
    products = torch.zeros_like(kernel)
    for start in range(0, len(kernel), ROWS):
        rows, columns = slice(start, start + ROWS), slice(0, min(start + ROWS, len(kernel)))
        for unit in derivatives:
            products[rows, columns].addmm_(unit[rows], unit[columns].T)
    kernel.addcmul_(products, inputs)


def _finish_all(kernel: Tensor, o: int) -> Tensor:
    n = kernel.shape[1]
    return _mirrored(kernel.view(o * n, o * n)).view(o, n, o, n).permute(1, 3, 0, 2)


def _finish_paired(kernel: Tensor, o: int) -> Tensor:
    return _mirrored(kernel).div_(o)


def _mirrored(matrix: Tensor) -> Tensor:
    for start in range(0, len(matrix), ROWS):
        rows = slice(start, min(start + ROWS, len(matrix)))
        corner = matrix[rows, rows].tril()
        matrix[rows, rows] = corner + corner.tril(-1).T
        matrix[: rows.start, rows] = matrix[rows, : rows.start].T
    return matrix
