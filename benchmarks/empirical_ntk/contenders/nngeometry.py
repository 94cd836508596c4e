"""nngeometry, whose Gram matrix is also computed layer by layer."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from nngeometry.gram import GramMatrix
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.empirical_ntk.problem import Problem
from benchmarks.empirical_ntk.tasks import OUTPUTS


def gram_matrix(problem: Problem, device: str) -> Callable[[], np.ndarray]:
    """`GramMatrix` in its dense representation, the whole batch at once; for the trace, one output at a time."""
    model, x = problem.torch(device)
    loader = DataLoader(TensorDataset(x), batch_size=len(x))

    def gram(outputs: slice) -> torch.Tensor:
        """[outputs, n, outputs, n], which the library calls (output, example, output, example)."""
        return GramMatrix(model=model, loader=loader, function=lambda batch: model(batch)[:, outputs]).to_torch()

    if problem.task.reduce == "trace":
        return lambda: sum(gram(slice(a, a + 1))[0, :, 0] for a in range(OUTPUTS)).numpy() / OUTPUTS
    return lambda: gram(slice(None)).permute(1, 3, 0, 2).numpy()
