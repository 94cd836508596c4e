"""Dual activation of tanh, by quadrature over the Gaussian pair.

The rule is the trapezoid rule of constant step on the real line. For a function that is analytic in the strip
|Im z| < a, its error is about exp(−2πa/h): with a = π/(2√q) for tanh of a Gaussian of variance q, a step of 0.24/√q is
at the float64 floor with some seventy nodes. Gauss–Hermite errs by exp(−a√(2n)) and would need four times as many in
each dimension. Neither has any business with a kinked activation, so only tanh is here.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from ntk.analytic.precision import Array

_STEP = 0.24  # exp(−π²/0.24) = 1e−18 at unit variance
_REACH = 8.7  # the Gaussian weight is 4e−17 of its peak there
_CHUNK = 2_000_000  # evaluations held at a time: 16 MB an array


@lru_cache(maxsize=64)
def _rule(scale: int) -> tuple[Array, Array]:
    """Return nodes and weights [nodes] of the expectation over a standard Gaussian, with step 0.24/√scale."""
    count = int(np.ceil(_REACH * np.sqrt(scale) / _STEP))
    nodes = np.linspace(-_REACH, _REACH, 2 * count + 1)
    weights = np.exp(-(nodes**2) / 2)
    return nodes, weights / weights.sum()


def _scale(q1: Array, q2: Array) -> int:
    """Return the variance, rounded up, for which the step must be fine enough."""
    return max(1, int(np.ceil(max(q1.max(), q2.max()))))


def _pair_expectation(function: Callable[[Array], Array], rho: Array, q1: Array, q2: Array) -> Array:
    """Return E[f(u)f(v)] for each triple of the broadcast arguments: one dimension suffices where ρ is 1 or −1."""
    rho, q1, q2 = np.broadcast_arrays(rho, q1, q2)
    result = np.empty(rho.shape)
    for chosen, rule in ((np.abs(rho) == 1, _on_a_line), (np.abs(rho) < 1, _in_the_plane)):
        if np.any(chosen):
            result[chosen] = rule(function, rho[chosen], q1[chosen], q2[chosen])
    return result


def _on_a_line(function: Callable[[Array], Array], rho: Array, q1: Array, q2: Array) -> Array:
    """Return E[f(√q1 x)f(ρ√q2 x)] for ρ = ±1 and one-dimensional arguments [k]."""
    nodes, weights = _rule(_scale(q1, q2))
    integrand = function(np.sqrt(q1)[:, None] * nodes) * function((rho * np.sqrt(q2))[:, None] * nodes)
    return integrand @ weights


def _in_the_plane(function: Callable[[Array], Array], rho: Array, q1: Array, q2: Array) -> Array:
    """Return E[f(u)f(v)] for one-dimensional arguments [k], in chunks."""
    nodes, weights = _rule(_scale(q1, q2))
    result = np.empty(rho.size)
    step = max(1, _CHUNK // nodes.size**2)
    for start in range(0, rho.size, step):
        r, s1, s2 = (item[start : start + step, None] for item in (rho, q1, q2))
        first = function(np.sqrt(s1) * nodes)  # [chunk, nodes]
        mixed = r[..., None] * nodes[:, None] + np.sqrt((1 - r) * (1 + r))[..., None] * nodes
        second = function(np.sqrt(s2)[..., None] * mixed) @ weights  # [chunk, nodes]
        result[start : start + step] = (first * second) @ weights
    return result


def tanh_value(rho: Array, q1: Array, q2: Array) -> Array:
    """E[tanh(u) tanh(v)]."""
    return _pair_expectation(np.tanh, rho, q1, q2)


def tanh_derivative(rho: Array, q1: Array, q2: Array) -> Array:
    """E[sech²(u) sech²(v)]."""
    return _pair_expectation(lambda z: 1.0 - np.tanh(z) ** 2, rho, q1, q2)
