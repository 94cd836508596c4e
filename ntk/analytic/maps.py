"""Correlation maps: how the correlation of two pre-activations changes from one layer to the next."""

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq

from ntk.analytic.activations import DualActivation, dual_activation
from ntk.analytic.norms import layer_moment, require_norm, require_variance, stable_weight_variance
from ntk.analytic.precision import Array

_MARGINAL = 1e-12  # a slope this near one is one: rounding of a closed form, with room for a quadrature
_PROBE = 1e-4  # distance at which a marginal fixed point is tried
_ONE: Array = np.ones(())


@dataclass(frozen=True)
class FixedPoint:
    """A correlation that a layer leaves as it is.

    Attributes:
        correlation: The fixed correlation c*, in [−1, 1].
        slope: Derivative of the correlation map at c*.
        stable: Whether nearby correlations in [−1, 1] are drawn to it.
    """

    correlation: float
    slope: float
    stable: bool


@dataclass(frozen=True)
class CorrelationMap:
    """The correlation map T of one layer, at the variance q* that the layer preserves.

    See docs/mathematics.md §1.2, and §4.2 for weight mean.

    Attributes:
        norm: Normalization.
        activation: Name of the activation.
        sigma_w2: Weight variance.
        sigma_b2: Bias variance.
        variance: Pre-activation variance q* at which the map is taken.
        variance_growth: Factor by which one layer multiplies the variance; one, except for a homogeneous activation
            without biases at another than the stable weight variance, whose correlations do not depend on the variance.
    """

    norm: str
    activation: str
    sigma_w2: float
    sigma_b2: float
    variance: float
    variance_growth: float
    _dual: DualActivation = field(repr=False, compare=False)

    def __call__(self, rho: ArrayLike) -> Array:
        """Return T(ρ), of the shape of ``rho``."""
        return self._covariance(np.asarray(rho, dtype=np.float64)) / self._variance_out

    def derivative(self, rho: ArrayLike) -> Array:
        """Return dT/dρ, of the shape of ``rho``.

        At a preserved variance this is χ_c = σw² E[φ'φ'], the factor of the NTK recursion.
        """
        return self.sigma_w2 * self._dual.derivative(rho, self.variance, self.variance) / self.variance_growth

    def _covariance(self, rho: Array) -> Array:
        """Return the covariance after one layer, of the shape of ``rho``."""
        q = np.asarray(self.variance)
        return self.sigma_w2 * layer_moment(self._dual, self.norm, rho, q, q) + self.sigma_b2

    @cached_property
    def _variance_out(self) -> Array:
        """The variance after one layer, by the same roundings as the covariance: T(1) is exactly one."""
        return self._covariance(_ONE)

    @property
    def chi_1(self) -> float:
        """χ1 = σw² E[φ'²]: growth of the gradient's second moment per layer (docs/mathematics.md §1.2)."""
        return float(self.sigma_w2 * self._dual.derivative(1.0, self.variance, self.variance))

    def fixed_points(self) -> tuple[FixedPoint, ...]:
        """Return all fixed points of the map in [−1, 1], in ascending order.

        Returns:
            The fixed points; c* = 1 is always among them.

        Raises:
            ValueError: If the map is the identity, for which every correlation is fixed.
        """
        grid = np.linspace(-1.0, 1.0, 2001)
        gap = np.asarray(self(grid) - grid)
        tolerance = 64 * np.finfo(np.float64).eps
        if np.all(np.abs(gap) <= tolerance):
            raise ValueError(
                f"fixed_points: requires a map other than the identity; with activation={self.activation!r}, "
                f"sigma_w2={self.sigma_w2}, sigma_b2={self.sigma_b2} every correlation is fixed. Add a bias variance "
                "or take a non-linear activation."
            )
        roots = {float(grid[i]) for i in np.flatnonzero(np.abs(gap) <= tolerance)} | {1.0}
        for i in np.flatnonzero(gap[:-1] * gap[1:] < 0):
            ends = float(grid[i]), float(grid[i + 1])
            if not roots.intersection(ends):
                roots.add(float(brentq(lambda c: float(self(c)) - c, *ends, xtol=1e-15, rtol=1e-14)))
        return tuple(self._fixed_point(root) for root in sorted(roots))

    def _fixed_point(self, correlation: float) -> FixedPoint:
        """Classify a root by its slope, or by trial where the slope is one."""
        slope = float(self.derivative(correlation))
        if abs(abs(slope) - 1) > _MARGINAL:
            return FixedPoint(correlation, slope, abs(slope) < 1)
        trials = [c for c in (correlation - _PROBE, correlation + _PROBE) if -1 <= c <= 1]
        nearer = [abs(float(self(c)) - correlation) < abs(c - correlation) for c in trials]
        return FixedPoint(correlation, slope, all(nearer))

    @property
    def correlation_depth(self) -> float:
        """ξ_c = −1/ln|T'(c*)| in layers, at the stable fixed point; infinite where the approach is a power law."""
        slopes = [abs(point.slope) for point in self.fixed_points() if point.stable]
        slope = max(slopes, default=1.0)
        if slope == 0:
            return 0.0
        return math.inf if slope >= 1 - _MARGINAL else -1 / math.log(slope)

    @property
    def gradient_depth(self) -> float:
        """ξ_∇ = 1/|ln χ1| in layers; infinite at criticality."""
        return math.inf if abs(self.chi_1 - 1) <= _MARGINAL else 1 / abs(math.log(self.chi_1))


def correlation_map(
    norm: str = "none",
    activation: str | DualActivation = "relu",
    sigma_w2: float | None = None,
    sigma_b2: float = 0.0,
) -> CorrelationMap:
    """Return the correlation map of one infinitely wide layer.

    For weight-mean ReLU at its stable weight variance T(ρ) = (φ̂(ρ) − φ̂(0))/(φ̂(1) − φ̂(0)), with χ1 = π/(π−1)
    (MimicNorm, Theorem 3; docs/mathematics.md §4.2). "batch_norm" is the limit of a large batch of equal norms and
    vanishing mean correlation (§5.5), where the map of weight mean at unit variance holds; a finite batch is the
    business of :func:`ntk.analytic.propagate`.

    Args:
        norm: "none", "weight_mean" or "batch_norm".
        activation: Name of the activation, see :func:`ntk.analytic.dual_activation`; or a dual activation.
        sigma_w2: Weight variance (weights N(0, σw²/fan_in)); None for the one that keeps unit variance.
        sigma_b2: Bias variance.

    Returns:
        The map, taken at the variance that the layer preserves.

    Raises:
        ValueError: If a name is unknown, a variance is out of range, the layer preserves no variance, or a variance is
            given under batch norm, which cancels it.
    """
    require_norm(norm)
    dual = dual_activation(activation)
    bias = require_variance("sigma_b2", sigma_b2, positive=False)
    if norm == "batch_norm" and (sigma_w2 is not None or bias != 0):
        raise ValueError(
            f"sigma_w2, sigma_b2: must be None and 0 under norm='batch_norm', which divides every weight scale and "
            f"subtracts every bias; received {sigma_w2!r} and {sigma_b2!r}. Leave both out."
        )
    if sigma_w2 is None:
        weight = stable_weight_variance(dual, norm, bias)
        return CorrelationMap(norm, dual.name, weight, bias, 1.0, 1.0, dual)
    weight = require_variance("sigma_w2", sigma_w2, positive=True)
    if dual.homogeneous and bias == 0:
        growth = weight * float(layer_moment(dual, norm, _ONE, _ONE, _ONE))
        return CorrelationMap(norm, dual.name, weight, bias, 1.0, growth, dual)
    return CorrelationMap(norm, dual.name, weight, bias, _preserved_variance(dual, norm, weight, bias), 1.0, dual)


def _preserved_variance(dual: DualActivation, norm: str, sigma_w2: float, sigma_b2: float) -> float:
    """Return the stable solution of q = σw² S(1, q, q) + σb².

    Args:
        dual: The activation.
        norm: "none" or "weight_mean".
        sigma_w2: Weight variance.
        sigma_b2: Bias variance.

    Returns:
        The variance q*.

    Raises:
        ValueError: If the variance grows without bound or shrinks to zero.
    """

    def gain(q: float) -> float:
        return sigma_w2 * float(layer_moment(dual, norm, _ONE, np.asarray(q), np.asarray(q))) + sigma_b2 - q

    grid = np.geomspace(1e-6, 1e4, 201)
    gains = np.array([gain(q) for q in grid])
    falling = np.flatnonzero((gains[:-1] > 0) & (gains[1:] <= 0))
    if falling.size == 0:
        fate = "shrinks to zero" if gains[-1] < 0 else "grows without bound"
        raise ValueError(
            f"sigma_w2, sigma_b2: must preserve some variance between 1e-6 and 1e4; with activation={dual.name!r}, "
            f"norm={norm!r}, sigma_w2={sigma_w2}, sigma_b2={sigma_b2} the variance {fate} with depth (for ReLU σw²/2 "
            "must be below 1 beside a bias). Take sigma_w2=None, or ntk.analytic.propagate, which needs no "
            "fixed variance."
        )
    index = int(falling[-1])
    return float(brentq(gain, grid[index], grid[index + 1], xtol=1e-15, rtol=1e-14))
