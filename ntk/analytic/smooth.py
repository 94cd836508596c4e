"""Dual activation of tanh, by quadrature over the Gaussian pair.

The rule is the trapezoid rule of constant step on the real line. For a function that is analytic in the strip
|Im z| < a, its error is about exp(−2πa/h): with a = π/(2√q) for tanh of a Gaussian of variance q, a step of 0.24/√q is
at the float64 floor with some seventy nodes. Gauss–Hermite (theory.md §1.4) errs by exp(−a√(2n)) and would need four
times as many in each dimension. Neither has any business with a kinked activation, so only tanh is here.
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


def _pair_expectation(function: Callable[[Array], Array], rho: Array, q1: Array, q2: Array) -> Array:
    """Return E[f(u)f(v)] for each triple of the broadcast arguments."""
    rho, q1, q2 = np.broadcast_arrays(rho, q1, q2)
    largest = float(max(np.max(q1, initial=0.0), np.max(q2, initial=0.0)))
    nodes, weights = _rule(max(1, int(np.ceil(largest))))
    result = np.empty(rho.size)
    step = max(1, _CHUNK // nodes.size**2)
    flat = [np.ravel(item) for item in (rho, q1, q2)]
    for start in range(0, rho.size, step):
        r, s1, s2 = (item[start : start + step, None] for item in flat)
        first = function(np.sqrt(s1) * nodes)  # [chunk, nodes]
        mixed = r[..., None] * nodes[:, None] + np.sqrt((1 - r) * (1 + r))[..., None] * nodes
        second = function(np.sqrt(s2)[..., None] * mixed) @ weights  # [chunk, nodes]
        result[start : start + step] = (first * second) @ weights
    return result.reshape(rho.shape)


def tanh_value(rho: Array, q1: Array, q2: Array) -> Array:
    """E[tanh(u) tanh(v)]."""
    return _pair_expectation(np.tanh, rho, q1, q2)


def tanh_derivative(rho: Array, q1: Array, q2: Array) -> Array:
    """E[sech²(u) sech²(v)]."""
    return _pair_expectation(lambda z: 1.0 - np.tanh(z) ** 2, rho, q1, q2)
