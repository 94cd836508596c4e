"""curvlinops, whose Jacobian and transposed Jacobian multiply to the kernel."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from curvlinops import JacobianLinearOperator

from benchmarks.empirical_ntk.contenders.blocks import budget
from benchmarks.empirical_ntk.networks import forget_running_statistics
from benchmarks.empirical_ntk.problem import Problem
from benchmarks.empirical_ntk.tasks import OUTPUTS


def composed_jacobians(problem: Problem, device: str) -> Callable[[], np.ndarray]:
    """J Jᵀ times the identity, some columns at a time; it refuses running statistics, and is spared them."""
    model, x = problem.torch(device)
    forget_running_statistics(model)
    n, size = len(x), len(x) * OUTPUTS
    column = x.element_size() * (problem.parameters + 3 * n * problem.activations)
    columns = max(1, min(size, int(budget() / 4 / column)))

    def work() -> np.ndarray:
        data = [(x, torch.zeros(n, OUTPUTS, dtype=x.dtype))]
        jacobian = JacobianLinearOperator(model, list(model.parameters()), data, check_deterministic=False)
        kernel = jacobian @ jacobian.adjoint()
        parts = [kernel @ part.T for part in torch.eye(size, dtype=x.dtype).split(columns)]
        values = torch.cat(parts, dim=1).detach().reshape(n, OUTPUTS, n, OUTPUTS)
        return values.transpose(1, 2).numpy()

    return work
