"""Nodes for the integrals over s by which a negative power of the norm of a Gaussian vector re-weights it.

r^(−2a) = Γ(a)⁻¹ ∫₀^∞ s^(a−1) e^(−s r²) ds, and E[e^(−s r²) f] is δ(s) = Π(1 + 2sλ)^(−1/2), over the eigenvalues λ of
the covariance, times the expectation of f under another Gaussian (docs/mathematics.md §5.1). In ξ = s^a the integrand
is smooth at zero and, far out, a function of ln ξ: Gauss–Legendre in u, with ξ = ξ₀(e^(Lu) − 1), meets both.

Arrays are NumPy's, or JAX's and possibly traced: the number of nodes is fixed, their range is not.
"""

import math
from functools import lru_cache

import numpy as np

from ntk.analytic.closed_forms import AnyArray, namespace
from ntk.analytic.precision import Array

NODES = 96
"""Nodes where their number may not depend on the eigenvalues: err by 1e−12, but for those of a batch of rank 3 to 5
that spread by 1e4 or more (5e−9 at rank 3)."""

_LEAST_NODES = 28  # and one more for each factor e that s spans
_COUNTS = (32, 64, 96, 128, 192, 256)  # few, so that few shapes are compiled
_REFERENCE = 384
_TOLERANCE = 2e-12
_GRID = 256  # points among which the end of the integrand is sought
_MARGIN = 4.0  # cut where the integrand is below e^−4 of the rounding of its peak


@lru_cache(maxsize=16)
def _gauss_legendre(nodes: int) -> tuple[Array, Array]:
    """Return nodes in (0, 1) and weights of ∫₀¹ f(u) du."""
    points, weights = np.polynomial.legendre.leggauss(nodes)
    return (1 + points) / 2, weights / 2


def _log_density(s: AnyArray, eigenvalues: AnyArray) -> AnyArray:
    """Return ln δ(s) at each node [k]; eigenvalues of zero do not count."""
    return -0.5 * namespace(s).log1p(2 * s[:, None] * eigenvalues).sum(axis=1)


def _span(eigenvalues: AnyArray, order: float, growth: int) -> tuple[AnyArray, AnyArray]:
    """Return the scale s₀ = 1/(2 max λ), and ln(s/s₀) where the integrand ends.

    The end is sought on a grid in ln s, from one over the trace to where the slowest decay, beyond 1/min λ, has done.
    """
    xp = namespace(eigenvalues)
    positive = eigenvalues > 0
    largest = xp.where(positive.any(), eigenvalues.max(), 1.0)
    smallest = xp.where(positive, eigenvalues, largest).min()
    negligible = _MARGIN - math.log(xp.finfo(eigenvalues.dtype).eps)
    decay = xp.maximum(positive.sum() / 2 - order - growth, 0.5)
    start = xp.log(largest / xp.where(positive.any(), eigenvalues.sum(), 1.0))
    stop = xp.log(largest / smallest) + negligible / decay + 1
    r = start + xp.linspace(0.0, 1.0, _GRID, dtype=eigenvalues.dtype) * (stop - start)
    size = _log_density(xp.exp(r) / (2 * largest), eigenvalues) + (order + growth) * r
    last = _GRID - 1 - xp.argmax((size > size.max() - negligible)[::-1])
    return 1 / (2 * largest), r[xp.minimum(last + 1, _GRID - 1)]


def _moments(eigenvalues: Array, nodes: int, order: float, growth: int) -> Array:
    """Return integrals [2d + 1] of what kernels are made of: of 1, 2sλq and √q, where q = 1/(1 + 2sλ)."""
    s, weights = laplace_rule(eigenvalues, nodes, order=order, growth=growth)
    grown = 2 * s[:, None] * eigenvalues
    parts = np.concatenate([np.ones((nodes, 1)), grown / (1 + grown), 1 / np.sqrt(1 + grown)], axis=1)
    return (weights * grown.max(axis=1) ** growth) @ parts


def node_count(eigenvalues: Array, *, order: float = 1.0, growth: int = 0) -> int:
    """Return how many nodes :func:`laplace_rule` needs for an error of about 1e−12.

    Args:
        eigenvalues: Eigenvalues [d] of the covariance, zero where it is singular.
        order: The a of r^(−2a).
        growth: Power of s with which f may grow, 0 or 1.

    Returns:
        The smallest of a few numbers that resolves the span of s and integrates what kernels are made of as well as a
        much larger one does.
    """
    positive = eigenvalues[eigenvalues > 0]
    exact = _moments(positive, _REFERENCE, order, growth)
    least = _LEAST_NODES + float(_span(positive, order, growth)[1])
    for nodes in _COUNTS:
        error = np.abs(_moments(positive, nodes, order, growth) / exact - 1).max()
        if nodes >= least and error < _TOLERANCE:
            return nodes
    return _REFERENCE


def laplace_rule(
    eigenvalues: AnyArray, nodes: int = NODES, *, order: float = 1.0, growth: int = 0
) -> tuple[AnyArray, AnyArray]:
    """Return nodes s and weights, δ(s) included: Γ(a)⁻¹ ∫₀^∞ s^(a−1) δ(s) f(s) ds ≈ Σ weight·f(s).

    f is made of rational functions of s, their square roots and arc tangents, singular on the negative axis alone.

    Args:
        eigenvalues: Eigenvalues [d] of the covariance, zero where it is singular.
        nodes: Number of nodes.
        order: The a of r^(−2a), 1 or 1/2.
        growth: Power of s with which f may grow, 0 or 1.

    Returns:
        Nodes [nodes], in units of one over an eigenvalue, and weights [nodes].
    """
    xp = namespace(eigenvalues)
    scale, end = _span(eigenvalues, order, growth)
    length = xp.logaddexp(0.0 * end, order * end)  # L, of ξ/ξ₀ = (s/s₀)^a
    u, weights = (xp.asarray(part, dtype=eigenvalues.dtype) for part in _gauss_legendre(nodes))
    s = scale * xp.expm1(length * u) ** (1 / order)
    log_weights = _log_density(s, eigenvalues) + length * u + order * xp.log(scale)
    return s, weights * length / math.gamma(order + 1) * xp.exp(log_weights)
