"""Gram matrices of docs/mathematics.md §9.1, and the two comparisons on which the tests of analytic kernels rest."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
EPS = float(np.finfo(np.float64).eps)


def constant_half(n: int = 10) -> Array:
    """const-0.5: unit variance, every correlation one half."""
    return 0.5 * np.eye(n) + 0.5


def circle(n: int = 10) -> Array:
    """circle: points on a circle; centred rank 2."""
    angle = 2 * np.pi * np.arange(n) / n
    return np.cos(angle[:, None] - angle)


def autoregressive(n: int = 8) -> Array:
    """AR(1), the documented batch: 0.9^|i−j|."""
    index = np.arange(n)
    return 0.9 ** np.abs(index[:, None] - index)


def condition_number(kernel: Array) -> float:
    values = np.linalg.eigvalsh(kernel)
    return float(values[-1] / values[0])


def random_covariance(n: int, seed: int, spread: float = 1.0) -> Array:
    """A generic full-rank covariance with unequal variances."""
    factor = np.random.default_rng(seed).standard_normal((n, n + 3))
    scale = np.linspace(1, 1 + spread, n)
    return (factor @ factor.T) * np.outer(scale, scale) / n


def printed(value: float, text: str, roundings: float = 4) -> None:
    """Hold a value against one printed in decimals.

    The tolerance is half a unit of the last printed digit, plus as many roundings of the computed value as given.
    """
    mantissa, _, exponent = text.lower().partition("e")
    decimals = len(mantissa.partition(".")[2]) - int(exponent or 0)
    tolerance = 0.5 * 10.0**-decimals + roundings * EPS * abs(value)
    assert abs(value - float(text)) <= tolerance * (1 + 1e-9), f"{value!r} is not {text} to its printed digits"


def standard_scores(samples: Array, expected: Array) -> Array:
    """Return how many standard errors the mean over the first axis lies from what is expected."""
    error = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
    return (samples.mean(axis=0) - expected) / error
