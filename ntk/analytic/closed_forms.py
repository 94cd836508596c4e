"""Activations whose Gaussian expectations have a closed form.

Throughout, (u, v) is a centred Gaussian pair with variances ``q1``, ``q2`` and correlation ``rho``; arguments are
NumPy or JAX arrays, possibly traced, that broadcast; nothing is checked here. The covariance E[φ(u)φ(v)] −
E[φ(u)]E[φ(v)] is written without the difference, which would lose all relative precision at small ``rho``, where
weight-mean networks live, and 1 − ρ² is never formed by subtracting a square.

Source: Cho and Saul (2009) for ReLU, Williams (1998) for erf; all forms are in docs/mathematics.md §2.2. Angles are
always formed with arctan2, exact at ``rho = 1`` (§1.3 there).
"""

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import scipy.special
from jax.scipy import special as jax_special
from numpy.polynomial import Polynomial as Series

PI = math.pi

AnyArray = Any
"""A NumPy array of float64, or a JAX array of any floating-point type."""


class Forms(Protocol):
    """An activation φ and its Gaussian expectations, over NumPy and JAX arrays alike."""

    def function(self, z: AnyArray) -> AnyArray:
        """Return φ(z), entry by entry."""

    def value(self, rho: AnyArray, q1: AnyArray, q2: AnyArray) -> AnyArray:
        """Return E[φ(u)φ(v)]."""

    def derivative(self, rho: AnyArray, q1: AnyArray, q2: AnyArray) -> AnyArray:
        """Return E[φ'(u)φ'(v)]."""

    def covariance(self, rho: AnyArray, q1: AnyArray, q2: AnyArray) -> AnyArray:
        """Return E[φ(u)φ(v)] − E[φ(u)]E[φ(v)]."""

    def curvature(self, rho: AnyArray, q1: AnyArray, q2: AnyArray) -> AnyArray:
        """Return E[φ''(u)φ(v)], a kink being a point mass of φ''."""

    def mean(self, q: AnyArray) -> AnyArray:
        """Return E[φ(u)] at variance q."""


def namespace(array: AnyArray) -> ModuleType:
    """Return the module, ``numpy`` or ``jax.numpy``, whose functions the array calls for."""
    return array.__array_namespace__() if hasattr(array, "__array_namespace__") else np


def special(array: AnyArray) -> ModuleType:
    """Return the special functions that go with the array."""
    return scipy.special if namespace(array) is np else jax_special


def _sine(rho: AnyArray) -> AnyArray:
    """√(1 − ρ²), accurate near both ends; its JAX gradient is zero, not NaN, where ρ is 1 or −1.

    There √(1−ρ²) + ρ arcsin ρ, the only form in which it enters a value, then has its true gradient arcsin ρ.
    """
    xp = namespace(rho)
    square = (1.0 - rho) * (1.0 + rho)
    inside = square > 0
    return xp.where(inside, xp.sqrt(xp.where(inside, square, 1.0)), 0.0)


@dataclass(frozen=True)
class Homogeneous:
    """φ(z) = z for z > 0 and az for z < 0: ReLU (a = 0), leaky ReLU, |z| (a = −1), the identity (a = 1).

    It is pz + m|z| with p = (1+a)/2 and m = (1−a)/2, and the expectations of z|z'| vanish.

    Attributes:
        negative_slope: The slope a.
    """

    negative_slope: float

    @property
    def _odd(self) -> float:
        """p², the weight of the identity."""
        return ((1 + self.negative_slope) / 2) ** 2

    @property
    def _even(self) -> float:
        """m², the weight of the absolute value."""
        return ((1 - self.negative_slope) / 2) ** 2

    def _turn(self, rho: AnyArray) -> AnyArray:
        """(2/π) arcsin ρ, exactly 1 at ρ = 1."""
        return namespace(rho).arctan2(rho, _sine(rho)) / (PI / 2)

    def function(self, z: AnyArray) -> AnyArray:
        """Return z on the right of zero, az on its left."""
        return namespace(z).where(z > 0, z, self.negative_slope * z)

    def value(self, rho: AnyArray, q1: AnyArray, q2: AnyArray) -> AnyArray:
        """√(q1 q2) {p²ρ + m²(2/π)[√(1−ρ²) + ρ arcsin ρ]}."""
        absolute = (2 / PI) * _sine(rho) + rho * self._turn(rho)
        return namespace(rho).sqrt(q1 * q2) * (self._odd * rho + self._even * absolute)

    def derivative(self, rho: AnyArray, q1: AnyArray, q2: AnyArray) -> AnyArray:
        """p² + m²(2/π) arcsin ρ, whatever the variances."""
        return namespace(rho).ones_like(q1 * q2) * (self._odd + self._even * self._turn(rho))

    def covariance(self, rho: AnyArray, q1: AnyArray, q2: AnyArray) -> AnyArray:
        """The value with √(1−ρ²) − 1 = −ρ²/(1+√(1−ρ²)) for √(1−ρ²)."""
        absolute = rho * self._turn(rho) - (2 / PI) * rho**2 / (1.0 + _sine(rho))
        return namespace(rho).sqrt(q1 * q2) * (self._odd * rho + self._even * absolute)

    def curvature(self, rho: AnyArray, q1: AnyArray, q2: AnyArray) -> AnyArray:
        """(2m²/π) √(q2/q1) √(1−ρ²), from φ'' = 2mδ; for positive q1."""
        return (2 / PI) * self._even * namespace(rho).sqrt(q2 / q1) * _sine(rho)

    def mean(self, q: AnyArray) -> AnyArray:
        """(1 − a)/2 times √(2q/π)."""
        return (1 - self.negative_slope) / 2 * namespace(q).sqrt(2 * q / PI)


@dataclass(frozen=True)
class Erf:
    """φ = erf; with k = ρ√(q1 q2), a = (1+2q1)(1+2q2) and Δ = a − 4k²."""

    def _terms(self, rho: AnyArray, q1: AnyArray, q2: AnyArray) -> tuple[AnyArray, AnyArray]:
        """Return k and √Δ, the latter of a sum of positive terms."""
        root = namespace(rho).sqrt
        return rho * root(q1 * q2), root(1 + 2 * q1 + 2 * q2 + 4 * q1 * q2 * (1 - rho) * (1 + rho))

    def function(self, z: AnyArray) -> AnyArray:
        """The error function of z."""
        return special(z).erf(z)

    def value(self, rho: AnyArray, q1: AnyArray, q2: AnyArray) -> AnyArray:
        """(2/π) arcsin(2k/√a)."""
        k, root_delta = self._terms(rho, q1, q2)
        return (2 / PI) * namespace(rho).arctan2(2 * k, root_delta)

    def covariance(self, rho: AnyArray, q1: AnyArray, q2: AnyArray) -> AnyArray:
        """The value: the means vanish."""
        return self.value(rho, q1, q2)

    def derivative(self, rho: AnyArray, q1: AnyArray, q2: AnyArray) -> AnyArray:
        """(4/π)/√Δ."""
        return (4 / PI) / self._terms(rho, q1, q2)[1]

    def curvature(self, rho: AnyArray, q1: AnyArray, q2: AnyArray) -> AnyArray:
        """−(8/π) k/[(1+2q1)√Δ]."""
        k, root_delta = self._terms(rho, q1, q2)
        return -(8 / PI) * k / ((1 + 2 * q1) * root_delta)

    def mean(self, q: AnyArray) -> AnyArray:
        """Zero: erf is odd."""
        return namespace(q).zeros_like(q)


@dataclass(frozen=True)
class Gelu:
    """The exact GELU, φ(z) = z(1 + erf(z/√2))/2; with k = ρ√(q1 q2), a = (1+q1)(1+q2) and Δ = a − k².

    The textbook forms (docs/mathematics.md §2.2) are here rearranged into sums without cancellation.
    """

    def _terms(self, rho: AnyArray, q1: AnyArray, q2: AnyArray) -> tuple[AnyArray, AnyArray, AnyArray, AnyArray]:
        """Return k, a, q1 q2 (1−ρ²) and Δ."""
        free = q1 * q2 * (1 - rho) * (1 + rho)
        return rho * namespace(rho).sqrt(q1 * q2), (1 + q1) * (1 + q2), free, 1 + q1 + q2 + free

    def function(self, z: AnyArray) -> AnyArray:
        """Half of z(1 + erf(z/√2))."""
        return z * (1 + special(z).erf(z / math.sqrt(2))) / 2

    def value(self, rho: AnyArray, q1: AnyArray, q2: AnyArray) -> AnyArray:
        """k[1/4 + arcsin(k/√a)/2π] + q1 q2 (Δ + ρ²)/(2π a √Δ)."""
        xp, (k, a, _, delta) = namespace(rho), self._terms(rho, q1, q2)
        root = xp.sqrt(delta)
        return k * (0.25 + xp.arctan2(k, root) / (2 * PI)) + q1 * q2 * (delta + rho**2) / (2 * PI * a * root)

    def derivative(self, rho: AnyArray, q1: AnyArray, q2: AnyArray) -> AnyArray:
        """1/4 + {arcsin(k/√a) + (k/√Δ)[(2+q1+q2)/a + 1/Δ]}/2π."""
        xp, (k, a, _, delta) = namespace(rho), self._terms(rho, q1, q2)
        root = xp.sqrt(delta)
        return 0.25 + (xp.arctan2(k, root) + k / root * ((2 + q1 + q2) / a + 1 / delta)) / (2 * PI)

    def covariance(self, rho: AnyArray, q1: AnyArray, q2: AnyArray) -> AnyArray:
        """The value less q1 q2/(2π√a), with k²[1 − q1 q2 √Δ/(√a+√Δ)] for the difference of what they share."""
        xp, (k, a, _, delta) = namespace(rho), self._terms(rho, q1, q2)
        root = xp.sqrt(delta)
        shared = k**2 * (1 - q1 * q2 * root / (xp.sqrt(a) + root))
        return k * (0.25 + xp.arctan2(k, root) / (2 * PI)) + shared / (2 * PI * a * root)

    def curvature(self, rho: AnyArray, q1: AnyArray, q2: AnyArray) -> AnyArray:
        """[(q2+w)/(1+q1) + w/2 − k²/2Δ]/[π(1+q1)√Δ], with w = q1 q2 (1−ρ²): twice the value's derivative in q1."""
        k, _, free, delta = self._terms(rho, q1, q2)
        inner = (q2 + free) / (1 + q1) + free / 2 - k**2 / (2 * delta)
        return inner / (PI * (1 + q1) * namespace(rho).sqrt(delta))

    def mean(self, q: AnyArray) -> AnyArray:
        """q/√(2π(1+q))."""
        return q / namespace(q).sqrt(2 * PI * (1 + q))


@dataclass(frozen=True)
class Sine:
    """φ(z) = sin ωz.

    Attributes:
        frequency: The factor ω.
    """

    frequency: float

    def _terms(self, rho: AnyArray, q1: AnyArray, q2: AnyArray) -> tuple[AnyArray, AnyArray]:
        """Return ω²k and e^{−ω²(q1+q2)/2} cosh ω²k, with k = ρ√(q1 q2), by exponents that are never positive."""
        xp, square = namespace(rho), self.frequency**2
        k = square * rho * xp.sqrt(q1 * q2)
        half = square * (q1 + q2) / 2
        return k, (xp.exp(k - half) + xp.exp(-k - half)) / 2

    def function(self, z: AnyArray) -> AnyArray:
        """The sine of ωz."""
        return namespace(z).sin(self.frequency * z)

    def value(self, rho: AnyArray, q1: AnyArray, q2: AnyArray) -> AnyArray:
        """e^{−ω²(q1+q2)/2} sinh ω²k."""
        k, even = self._terms(rho, q1, q2)
        return even * namespace(rho).tanh(k)

    def covariance(self, rho: AnyArray, q1: AnyArray, q2: AnyArray) -> AnyArray:
        """The value: the means vanish."""
        return self.value(rho, q1, q2)

    def derivative(self, rho: AnyArray, q1: AnyArray, q2: AnyArray) -> AnyArray:
        """ω² e^{−ω²(q1+q2)/2} cosh ω²k."""
        return self.frequency**2 * self._terms(rho, q1, q2)[1]

    def curvature(self, rho: AnyArray, q1: AnyArray, q2: AnyArray) -> AnyArray:
        """−ω² times the value."""
        return -(self.frequency**2) * self.value(rho, q1, q2)

    def mean(self, q: AnyArray) -> AnyArray:
        """Zero: the sine is odd."""
        return namespace(q).zeros_like(q)


@dataclass(frozen=True)
class Polynomial:
    """φ(z) = Σ c_j z^j, by E[φ(u)φ(v)] = Σ_r E[φ⁽ʳ⁾(u)]E[φ⁽ʳ⁾(v)] k^r/r! with k = ρ√(q1 q2).

    Attributes:
        coefficients: c_0, c_1, …
    """

    coefficients: tuple[float, ...]

    def _derived(self, order: int) -> "Polynomial":
        """Return φ⁽ʳ⁾."""
        return Polynomial(tuple(float(c) for c in Series(self.coefficients).deriv(order).coef))

    def _pair(self, other: "Polynomial", rho: AnyArray, q1: AnyArray, q2: AnyArray, start: int = 0) -> AnyArray:
        """Return Σ_{r≥start} E[φ⁽ʳ⁾(u)]E[ψ⁽ʳ⁾(v)] k^r/r!, ψ being the other polynomial."""
        k = rho * namespace(rho).sqrt(q1 * q2)
        total = 0.0 * k
        for r in range(start, len(self.coefficients)):
            total = total + self._derived(r).mean(q1) * other._derived(r).mean(q2) * k**r / math.factorial(r)
        return total

    def function(self, z: AnyArray) -> AnyArray:
        """Σ c_j z^j."""
        total = 0.0 * z
        for coefficient in reversed(self.coefficients):
            total = total * z + coefficient
        return total

    def value(self, rho: AnyArray, q1: AnyArray, q2: AnyArray) -> AnyArray:
        """The whole sum."""
        return self._pair(self, rho, q1, q2)

    def derivative(self, rho: AnyArray, q1: AnyArray, q2: AnyArray) -> AnyArray:
        """The sum for φ'."""
        return self._derived(1).value(rho, q1, q2)

    def covariance(self, rho: AnyArray, q1: AnyArray, q2: AnyArray) -> AnyArray:
        """The sum without its first term."""
        return self._pair(self, rho, q1, q2, start=1)

    def curvature(self, rho: AnyArray, q1: AnyArray, q2: AnyArray) -> AnyArray:
        """The sum for φ'' and φ."""
        return self._derived(2)._pair(self, rho, q1, q2)

    def mean(self, q: AnyArray) -> AnyArray:
        """Σ c_{2i} (2i−1)!! q^i."""
        total = 0.0 * q
        for j in range(len(self.coefficients) - 1, -1, -1):
            if j % 2 == 0:
                total = total * q * (j + 1) + self.coefficients[j]
        return total
