"""Dual activations in closed form: expectations of an activation over a pair of centred Gaussians.

Throughout, (u, v) is a centred Gaussian pair with variances ``q1``, ``q2`` and correlation ``rho``; arguments broadcast
and nothing is checked here. Three expectations per activation: the value E[φ(u)φ(v)], the derivative E[φ'(u)φ'(v)], and
the covariance E[φ(u)φ(v)] − E[φ(u)]E[φ(v)]. The last is written without the difference, which would lose all relative
precision at small ``rho``, where weight-mean networks live.

Source: Cho and Saul (2009) for ReLU, Williams (1998) for erf; all forms are in docs/mathematics.md §2.2. The angle is
always formed with arctan2, exact at ``rho = 1`` (§1.3 there).
"""

import numpy as np

from ntk.analytic.precision import Array

PI = float(np.pi)


def _sine(rho: Array) -> Array:
    """√(1 − ρ²), in the form that is accurate near both ends."""
    return np.sqrt((1.0 - rho) * (1.0 + rho))


def _angle_from_orthogonal(rho: Array) -> Array:
    """Return arcsin ρ in radians, exactly π/2 at ρ = 1."""
    return np.arctan2(rho, _sine(rho))


def _excess(rho: Array) -> Array:
    """√(1 − ρ²) − 1, without cancellation at small ρ."""
    return -(rho**2) / (1.0 + _sine(rho))


def linear_value(rho: Array, q1: Array, q2: Array) -> Array:
    """E[uv]."""
    return np.sqrt(q1 * q2) * rho


def linear_derivative(rho: Array, q1: Array, q2: Array) -> Array:
    """Return one: the derivative of the identity is constant."""
    return np.ones(np.broadcast_shapes(np.shape(rho), np.shape(q1), np.shape(q2)))


def zero_mean(q: Array) -> Array:
    """Return zero: the mean of any odd activation."""
    return np.zeros(np.shape(q))


def relu_value(rho: Array, q1: Array, q2: Array) -> Array:
    """√(q1 q2) [√(1−ρ²) + (π − arccos ρ) ρ]/(2π)."""
    return np.sqrt(q1 * q2) * (_sine(rho) + (PI / 2 + _angle_from_orthogonal(rho)) * rho) / (2 * PI)


def relu_derivative(rho: Array, q1: Array, q2: Array) -> Array:
    """(π − arccos ρ)/(2π), whatever the variances."""
    return (PI / 2 + _angle_from_orthogonal(rho)) / (2 * PI) * linear_derivative(rho, q1, q2)


def relu_covariance(rho: Array, q1: Array, q2: Array) -> Array:
    """√(q1 q2) (φ̂(ρ) − 1/2π)."""
    return np.sqrt(q1 * q2) * (_excess(rho) + (PI / 2 + _angle_from_orthogonal(rho)) * rho) / (2 * PI)


def relu_mean(q: Array) -> Array:
    """√(q/2π)."""
    return np.sqrt(q / (2 * PI))


def abs_value(rho: Array, q1: Array, q2: Array) -> Array:
    """√(q1 q2) (2/π) [√(1−ρ²) + ρ arcsin ρ]."""
    return np.sqrt(q1 * q2) * (_sine(rho) + rho * _angle_from_orthogonal(rho)) * (2 / PI)


def abs_derivative(rho: Array, q1: Array, q2: Array) -> Array:
    """(2/π) arcsin ρ, whatever the variances."""
    return (2 / PI) * _angle_from_orthogonal(rho) * linear_derivative(rho, q1, q2)


def abs_covariance(rho: Array, q1: Array, q2: Array) -> Array:
    """√(q1 q2) (2/π) [√(1−ρ²) − 1 + ρ arcsin ρ]."""
    return np.sqrt(q1 * q2) * (_excess(rho) + rho * _angle_from_orthogonal(rho)) * (2 / PI)


def abs_mean(q: Array) -> Array:
    """√(2q/π)."""
    return np.sqrt(2 * q / PI)


def erf_value(rho: Array, q1: Array, q2: Array) -> Array:
    """(2/π) arcsin(2k/√((1+2q1)(1+2q2))), with k = ρ√(q1 q2)."""
    k = rho * np.sqrt(q1 * q2)
    return (2 / PI) * np.arcsin(2 * k / np.sqrt((1 + 2 * q1) * (1 + 2 * q2)))


def erf_derivative(rho: Array, q1: Array, q2: Array) -> Array:
    """(4/π)/√((1+2q1)(1+2q2) − 4k²), with k = ρ√(q1 q2)."""
    k = rho * np.sqrt(q1 * q2)
    return (4 / PI) / np.sqrt((1 + 2 * q1) * (1 + 2 * q2) - 4 * k**2)


def _gelu_terms(rho: Array, q1: Array, q2: Array) -> tuple[Array, Array, Array]:
    """Return k = ρ√(q1 q2), a = (1+q1)(1+q2) and Δ = a − k²."""
    k = rho * np.sqrt(q1 * q2)
    a = (1 + q1) * (1 + q2)
    return k, a, a - k**2


def gelu_covariance(rho: Array, q1: Array, q2: Array) -> Array:
    """The value of exact GELU less the product of means, q1 q2/(2π√a); 1/√Δ − 1/√a is formed without cancellation."""
    k, a, delta = _gelu_terms(rho, q1, q2)
    root_a, root_delta = np.sqrt(a), np.sqrt(delta)
    through_mean = q1 * q2 * k**2 / (root_a * (root_a + root_delta))
    through_slope = k**2 * (1 / (1 + q1) + 1 / (1 + q2) - 1)
    return k * (0.25 + np.arcsin(k / root_a) / (2 * PI)) + (through_mean + through_slope) / (2 * PI * root_delta)


def gelu_mean(q: Array) -> Array:
    """q/√(2π(1+q))."""
    return q / np.sqrt(2 * PI * (1 + q))


def gelu_value(rho: Array, q1: Array, q2: Array) -> Array:
    """k[1/4 + arcsin(k/√a)/2π] + [q1 q2 + k²(1/(1+q1) + 1/(1+q2) − 1)]/(2π√Δ)."""
    return gelu_covariance(rho, q1, q2) + gelu_mean(q1) * gelu_mean(q2)


def gelu_derivative(rho: Array, q1: Array, q2: Array) -> Array:
    """The derivative of :func:`gelu_value` with respect to k at fixed variances (Price's theorem)."""
    k, a, delta = _gelu_terms(rho, q1, q2)
    slope = 1 / (1 + q1) + 1 / (1 + q2) - 1
    quadratic = q1 * q2 + k**2 * slope
    smooth = k / np.sqrt(delta) + 2 * k * slope / np.sqrt(delta) + k * quadratic / delta**1.5
    return 0.25 + (np.arcsin(k / np.sqrt(a)) + smooth) / (2 * PI)
