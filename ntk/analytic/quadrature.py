"""Nodes for the one-dimensional integrals over s in which the finite-batch BatchNorm kernels are written.

The integrands are δ(s) = Π(1 + 2sλ_a)^(−1/2), over the d non-zero eigenvalues of the centred batch Gram, times rational
functions of s (docs/mathematics.md §5.1).
"""

from functools import lru_cache

import numpy as np
from scipy.special import roots_jacobi

from ntk.analytic.precision import Array

_JACOBI_NODES = 32
_JACOBI_LARGEST_RATIO = 30.0  # the worst batch, B = 4, errs by 4e−13 at ratio 50
_JACOBI_LARGEST_RANK = 1000  # beyond, the weights overflow
_TRAPEZOID_STEP = 0.25
_NEGLIGIBLE = 40.0  # e^−40 = 4e−18 of the peak
_BLOCK = 64  # the number of nodes is rounded up to it, so that few shapes are compiled


@lru_cache(maxsize=32)
def _jacobi(exponent: float) -> tuple[Array, Array]:
    """Return nodes w in (0, 1) and logarithms of the weights of ∫ w^exponent f(w) dw."""
    nodes, weights = roots_jacobi(_JACOBI_NODES, 0.0, exponent)
    return (1 + nodes) / 2, np.log(weights) - (exponent + 1) * np.log(2.0)


def laplace_rule(eigenvalues: Array, *, beyond_batch: bool = False, growth: int = 0) -> tuple[Array, Array]:
    """Return nodes s and weights, δ(s) included, so that ∫₀^∞ δ(s) f(s) ds ≈ Σ weight·f(s).

    Gauss–Jacobi in w = 1/(1 + 2sλ₀), λ₀ the mean eigenvalue, where the eigenvalues are comparable (exact where they are
    equal); the trapezoid rule in ln s, which no spread of eigenvalues disturbs, elsewhere and for points beyond the
    batch, where f contains √w.

    Args:
        eigenvalues: The positive eigenvalues [d] of the centred batch Gram.
        beyond_batch: Whether there are points outside the batch that defines the statistics.
        growth: Power of s with which f may grow, 0 or 1.

    Returns:
        Nodes [k] and weights [k], in units of one over an eigenvalue.
    """
    comparable = eigenvalues.max() <= _JACOBI_LARGEST_RATIO * eigenvalues.min()
    if comparable and not beyond_batch and eigenvalues.size <= _JACOBI_LARGEST_RANK:
        return _gauss_jacobi(eigenvalues)
    return _trapezoid(eigenvalues, growth)


def _log_determinant(s: Array, eigenvalues: Array) -> Array:
    """Return ln δ(s) at each node."""
    return -0.5 * np.log1p(2 * s[:, None] * eigenvalues).sum(axis=1)


def _gauss_jacobi(eigenvalues: Array) -> tuple[Array, Array]:
    """Gauss–Jacobi rule: the Jacobian terms, ds included, end as w^((d − 4)/2) at s = ∞ (docs/mathematics.md §5.1)."""
    exponent = (eigenvalues.size - 4) / 2
    w, log_weights = _jacobi(exponent)
    mean = eigenvalues.mean()
    s = (1 / w - 1) / (2 * mean)
    log_density = _log_determinant(s, eigenvalues) - (exponent + 2) * np.log(w) - np.log(2 * mean)
    return s, np.exp(log_weights + log_density)


def _trapezoid(eigenvalues: Array, growth: int) -> tuple[Array, Array]:
    """Trapezoid rule in r = ln s, cut where the integrand is below e^−40 of its peak."""
    decay = eigenvalues.size / 2 - 1 - growth
    lowest = -np.log(2 * eigenvalues.sum()) - _NEGLIGIBLE
    highest = -np.log(2 * eigenvalues.min()) + _NEGLIGIBLE / decay
    r = np.arange(lowest, highest + _TRAPEZOID_STEP, _TRAPEZOID_STEP)
    s = np.exp(r)
    log_weights = _log_determinant(s, eigenvalues) + r + np.log(_TRAPEZOID_STEP)
    # Judged with the growth that f may have, measured in units of the mean eigenvalue.
    size = log_weights + growth * np.log1p(2 * s * eigenvalues.mean())
    keep = size > size.max() - _NEGLIGIBLE
    s, weights = s[keep], np.exp(log_weights[keep])
    padding = -s.size % _BLOCK
    return np.pad(s, (0, padding), mode="edge"), np.pad(weights, (0, padding))
