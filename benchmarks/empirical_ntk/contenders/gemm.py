"""The rate at which the machine multiplies matrices, which no contraction exceeds."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.empirical_ntk.problem import Problem
from benchmarks.empirical_ntk.tasks import PRODUCT_SIZE


def product(problem: Problem, device: str) -> Callable[[], None]:
    """One product of two square matrices."""
    a, b = (
        torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, dtype=getattr(torch, problem.task.dtype), device=device)
        for _ in range(2)
    )
    out = torch.empty_like(a)

    def work() -> None:
        torch.mm(a, b, out=out)
        if device != "cpu":
            torch.cuda.synchronize()

    return work
