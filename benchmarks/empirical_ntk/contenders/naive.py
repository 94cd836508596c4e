"""What anyone writes first: the gradient of one output of one example after the other, and their products."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.empirical_ntk.problem import Problem


def loop(problem: Problem, device: str) -> Callable[[], np.ndarray]:
    """torch.autograd.grad in a loop over the outputs of the whole batch."""
    model, x = problem.torch(device)
    return lambda: _kernel(model, x, problem.task.reduce).cpu().numpy()


def _kernel(model: nn.Module, x: Tensor, reduce: str) -> Tensor:
    output = model(x)
    n, o = output.shape
    if reduce == "trace":  # one output at a time: all rows together would not fit
        return sum(_gram(model, output[:, a]) for a in range(o)) / o
    return _gram(model, output.flatten()).reshape(n, o, n, o).transpose(1, 2)


def _gram(model: nn.Module, entries: Tensor) -> Tensor:
    """Inner products [k, k] of the gradients of [k] numbers."""
    parameters = list(model.parameters())
    rows = torch.empty(len(entries), sum(p.numel() for p in parameters), device=entries.device, dtype=entries.dtype)
    for row, entry in zip(rows, entries, strict=True):
        torch.cat([g.flatten() for g in torch.autograd.grad(entry, parameters, retain_graph=True)], out=row)
    return rows @ rows.T
