"""Correlation maps: how the correlation of two pre-activations changes from one layer to the next."""

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import elementwise

from ntk.analytic.activations import DualActivation, dual_activation
from ntk.analytic.closed_forms import Forms
from ntk.analytic.norms import layer_moment, require_free_norm, require_norm, require_variance, stable_weight_variance
from ntk.analytic.precision import Array
from ntk.analytic.variance import MARGINAL, VarianceMap

_ROUNDING = 64 * float(np.finfo(np.float64).eps)
_ONE: Array = np.ones(())


def depth_scale(slope: ArrayLike) -> Array:
    """Return 1/|ln slope| in layers, of the shape of ``slope``; infinite where the slope is one, zero where it is 0."""
    values = np.asarray(slope, dtype=np.float64)
    with np.errstate(divide="ignore"):
        rate = np.abs(np.log(values))
        return np.where(np.abs(values - 1) <= MARGINAL, np.inf, 1 / rate)


def settled_correlation(dual: DualActivation | Forms, norm: str, q: Array, sigma_w2: Array, sigma_b2: Array) -> Array:
    """Return the stable fixed point of correlation maps, in [0, 1] (docs/mathematics.md §3.4).

    It is 1 if and only if T'(1) ≤ 1. Otherwise it is the one root of T(c) = c left of the point where T' = 1, where the
    convex T(c) − c is lowest; if that is within rounding of zero, so is the distance of the two from 1.

    Args:
        dual: The activation; not an affine one.
        norm: "none", or a norm that centres.
        q: Pre-activation variances at which the maps are taken [k].
        sigma_w2: Weight variances [k].
        sigma_b2: Bias variances [k].

    Returns:
        The correlations c* [k].
    """

    def gap(c: Array, q: Array, w: Array, b: Array, out: Array) -> Array:
        return (w * layer_moment(dual, norm, c, q, q) + b) / out - c

    def excess(c: Array, q: Array, w: Array, b: Array, out: Array) -> Array:
        return w * dual.derivative(c, q, q) * q / out - 1

    one = np.ones_like(q)
    layer = (q, sigma_w2, sigma_b2, sigma_w2 * layer_moment(dual, norm, one, q, q) + sigma_b2)
    unstable = excess(one, *layer) > MARGINAL
    if not unstable.any():
        return one
    chaotic = [item[unstable] for item in layer]
    ends = np.zeros_like(chaotic[0]), np.ones_like(chaotic[0])
    lowest = elementwise.find_root(excess, ends, args=tuple(chaotic)).x
    root = elementwise.find_root(gap, (ends[0], lowest), args=tuple(chaotic)).x
    settled = np.where(gap(lowest, *chaotic) < 0, root, lowest)
    correlation = one.copy()
    correlation[unstable] = np.where(gap(ends[0], *chaotic) == 0, 0.0, settled)
    return correlation


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

        There are no others than 1, at most one in [0, 1), and −1 beside 0 where the map is odd: T is a power series
        with coefficients that are not negative, hence convex on [0, 1] (docs/mathematics.md §3.4).

        Returns:
            The fixed points; c* = 1 is always among them.

        Raises:
            ValueError: If the map is the identity, for which every correlation is fixed.
        """
        ends = np.array([-1.0, 0.0, 0.5])
        gap = np.abs(self(ends) - ends)
        if np.all(gap <= _ROUNDING):
            raise ValueError(
                f"fixed_points: requires a map other than the identity; with activation={self.activation!r}, "
                f"sigma_w2={self.sigma_w2}, sigma_b2={self.sigma_b2} every correlation is fixed. Add a bias variance "
                "or take a non-linear activation."
            )
        settled = settled_correlation(self._dual, self.norm, *self._layer)[0]
        inner = [float(settled)] if settled < 1 else []
        roots = [-1.0] * bool(gap[0] <= _ROUNDING) + inner + [1.0]
        return tuple(self._fixed_point(root, stable=bool(root == settled)) for root in roots)

    @property
    def _layer(self) -> tuple[Array, Array, Array]:
        """The variance q* and the two variances of the layer, each [1]."""
        return np.array([self.variance]), np.array([self.sigma_w2]), np.array([self.sigma_b2])

    def _fixed_point(self, correlation: float, *, stable: bool) -> FixedPoint:
        """Return a root with its slope."""
        return FixedPoint(correlation, float(self.derivative(correlation)), stable)

    @property
    def correlation_depth(self) -> float:
        """ξ_c = −1/ln|T'(c*)| in layers, at the stable fixed point; infinite where the approach is a power law."""
        return float(depth_scale(next(point.slope for point in self.fixed_points() if point.stable)))

    @property
    def gradient_depth(self) -> float:
        """ξ_∇ = 1/|ln χ1| in layers; infinite at criticality."""
        return float(depth_scale(self.chi_1))


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
        The map, taken at the variance that the layer preserves: the one to which unit variance is drawn.

    Raises:
        ValueError: If a name is unknown, a variance is out of range, the layer preserves no variance, or a variance is
            given under batch norm, which cancels it.
    """
    require_norm(norm)
    dual = dual_activation(activation)
    bias = require_variance("sigma_b2", sigma_b2, positive=False)
    require_free_norm(norm, sigma_w2, bias)
    if sigma_w2 is None:
        weight = stable_weight_variance(dual, norm, bias)
        return CorrelationMap(norm, dual.name, weight, bias, 1.0, 1.0, dual)
    weight = require_variance("sigma_w2", sigma_w2, positive=True)
    if dual.homogeneous and bias == 0:
        growth = weight * float(layer_moment(dual, norm, _ONE, _ONE, _ONE))
        return CorrelationMap(norm, dual.name, weight, bias, 1.0, growth, dual)
    variance = VarianceMap(norm, dual.name, weight, bias, dual).fixed_point
    if variance in (0, math.inf):
        fate = "shrinks to zero" if variance == 0 else "grows without bound"
        raise ValueError(
            f"sigma_w2, sigma_b2: must preserve some variance between 1e-12 and 1e12; with activation={dual.name!r}, "
            f"norm={norm!r}, sigma_w2={weight}, sigma_b2={bias} unit variance {fate} with depth (for ReLU σw²/2 must "
            "be below 1 beside a bias). Take sigma_w2=None; or ntk.analytic.phase_diagram, which takes the limit; or "
            "ntk.analytic.propagate, which needs no fixed variance."
        )
    return CorrelationMap(norm, dual.name, weight, bias, variance, 1.0, dual)
