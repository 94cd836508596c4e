"""`ntk`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

import ntk
from benchmarks.empirical_ntk.problem import Problem


def kernel(problem: Problem, device: str) -> Callable[[], np.ndarray]:
    """`ntk.empirical_ntk` with its defaults, and the ends of its spectrum where these are asked for."""
    model, x = problem.torch(device)
    if problem.task.eigenvalues:
        return lambda: _ends(ntk.spectrum(ntk.empirical_ntk(model, x, reduce=problem.task.reduce), k=(1, 1)))
    return lambda: ntk.empirical_ntk(model, x, reduce=problem.task.reduce).values


def operator(problem: Problem, device: str) -> Callable[[], np.ndarray]:
    """Both ends of the spectrum of `ntk.NtkOperator`; the kernel is never formed."""
    model, x = problem.torch(device)
    return lambda: _ends(ntk.spectrum(ntk.NtkOperator(model, x, reduce=problem.task.reduce), k=(1, 1)))


def bounded(problem: Problem, device: str) -> Callable[[], np.ndarray]:
    """`ntk.empirical_ntk` within the memory of the task."""
    model, x = problem.torch(device)
    task = problem.task
    return lambda: ntk.empirical_ntk(model, x, reduce=task.reduce, max_memory=task.max_memory).values


def _ends(spectrum: ntk.Spectrum) -> np.ndarray:
    """Largest and smallest eigenvalue, and the error that is stated for each."""
    return np.concatenate([spectrum.eigenvalues[[0, -1]], spectrum.errors[[0, -1]]])
