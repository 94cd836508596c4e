"""Variance maps: how the variance of a pre-activation changes from one layer to the next."""

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import elementwise

from ntk.analytic.activations import DualActivation, dual_activation
from ntk.analytic.norms import layer_moment, require_free_norm, require_norm, require_variance, stable_weight_variance
from ntk.analytic.precision import Array

SMALLEST, LARGEST = 1e-12, 1e12
"""Variances below and above these count as vanished and as grown without bound."""

_GRID: Array = np.logspace(-12, 12, 1 + 24 * 48)  # has a node at 1
_UNIT = _GRID.size // 2
_EPS = float(np.finfo(np.float64).eps)
MARGINAL = 1e-12  # a slope this near one is one: rounding of a closed form
_PROBE = 1e-3  # relative distance at which a marginal fixed point is tried


def moment(dual: DualActivation, norm: str, q: Array) -> Array:
    """Return S(q), what one layer makes of the variance q per unit of weight variance, of the shape of ``q``."""
    return np.asarray(layer_moment(dual, norm, np.ones_like(q), q, q))


def moment_slope(dual: DualActivation, norm: str, q: Array) -> Array:
    """Return dS/dq, of the shape of ``q``: E[φ'²] + E[φφ''], less E[φ]E[φ''] under a centring norm.

    By homogeneity S(1) where φ is homogeneous (docs/mathematics.md §3.4).
    """
    one, zero = np.ones_like(q), np.zeros_like(q)
    if dual.homogeneous:
        return np.asarray(moment(dual, norm, one))
    slope = dual.derivative(one, q, q) + dual.curvature(one, q, q)
    return np.asarray(slope if norm == "none" else slope - dual.curvature(zero, q, q))


@lru_cache(maxsize=16)
def _moments_on_grid(dual: DualActivation, norm: str) -> Array:
    """Return S at the variances among which fixed points are sought."""
    return moment(dual, norm, _GRID)


def settled_variance(dual: DualActivation, norm: str, sigma_w2: Array, sigma_b2: Array) -> Array:
    """Return where the variances go that start at one: the next fixed point in the direction of the first step.

    Args:
        dual: The activation.
        norm: "none" or "weight_mean".
        sigma_w2: Weight variances.
        sigma_b2: Bias variances, of the same shape.

    Returns:
        Variances of that shape; 1 where a layer leaves unit variance as it is, 0 where it shrinks below
        :data:`SMALLEST`, infinity where it grows beyond :data:`LARGEST`.
    """
    if dual.homogeneous:
        return _settled_homogeneous(float(moment(dual, norm, np.ones(()))), sigma_w2, sigma_b2)
    gain = sigma_w2[..., None] * _moments_on_grid(dual, norm) + sigma_b2[..., None] - _GRID
    growing = gain[..., _UNIT] > 0
    reversed_above = gain[..., _UNIT:] <= 0
    reversed_below = gain[..., _UNIT::-1] >= 0
    above, below = reversed_above.argmax(axis=-1), reversed_below.argmax(axis=-1)
    found = np.where(growing, reversed_above.any(axis=-1), reversed_below.any(axis=-1))
    end = np.where(growing, _UNIT + above, _UNIT - below)
    preserved = np.abs(gain[..., _UNIT]) <= 4 * _EPS
    result = np.where(preserved, 1.0, np.where(growing, np.inf, 0.0))
    sought = found & ~preserved
    start = np.where(growing, end - 1, end + 1)[sought]
    ends = _GRID[np.minimum(start, end[sought])], _GRID[np.maximum(start, end[sought])]
    arguments = (sigma_w2[sought], sigma_b2[sought])
    result[sought] = elementwise.find_root(lambda q, w, b: w * moment(dual, norm, q) + b - q, ends, args=arguments).x
    return result


def _settled_homogeneous(unit_moment: float, sigma_w2: Array, sigma_b2: Array) -> Array:
    """Return the same for a homogeneous activation, whose variance map is linear."""
    growth = sigma_w2 * unit_moment
    preserved = np.abs(growth - 1) <= 4 * _EPS
    below = (growth < 1) & ~preserved
    settled = np.where(below, sigma_b2 / np.where(below, 1 - growth, 1.0), np.inf)
    return np.where(preserved & (sigma_b2 == 0), 1.0, settled)


@dataclass(frozen=True)
class VarianceFixedPoint:
    """A variance that a layer leaves as it is.

    Attributes:
        variance: The fixed variance q*.
        slope: Derivative of the variance map at q*.
        stable: Whether variances on either side are drawn to it.
    """

    variance: float
    slope: float
    stable: bool


@dataclass(frozen=True)
class VarianceMap:
    """The variance map q ↦ σw² S(q) + σb² of one layer (docs/mathematics.md §3.4).

    S is E[φ²] for "none", the variance of φ for "weight_mean"; under "batch_norm" the pre-activation that the
    activation sees has variance one, whatever q.

    Attributes:
        norm: Normalization.
        activation: Name of the activation.
        sigma_w2: Weight variance.
        sigma_b2: Bias variance.
    """

    norm: str
    activation: str
    sigma_w2: float
    sigma_b2: float
    _dual: DualActivation = field(repr=False, compare=False)

    def __call__(self, q: ArrayLike) -> Array:
        """Return the variance after one layer, of the shape of ``q``."""
        values = np.asarray(q, dtype=np.float64)
        if self.norm == "batch_norm":
            return np.ones_like(values)[()]
        return self.sigma_w2 * moment(self._dual, self.norm, values) + self.sigma_b2

    def derivative(self, q: ArrayLike) -> Array:
        """Return the derivative of the map, of the shape of ``q``."""
        values = np.asarray(q, dtype=np.float64)
        if self.norm == "batch_norm":
            return np.zeros_like(values)[()]
        return self.sigma_w2 * moment_slope(self._dual, self.norm, values)

    @property
    def fixed_point(self) -> float:
        """The fixed point q* to which unit variance is drawn; 0 if it shrinks, infinity if it grows without bound.

        That is the next one in the direction of the first step, as every map but some of polynomials increases.
        """
        if self.norm == "batch_norm":
            return 1.0
        return float(settled_variance(self._dual, self.norm, np.array([self.sigma_w2]), np.array([self.sigma_b2]))[0])

    def fixed_points(self) -> tuple[VarianceFixedPoint, ...]:
        """Return all fixed points in [1e−12, 1e12], and zero where it is one, in ascending order.

        The map less the identity is monotone between its extrema, which the explicit derivative locates, so that no
        pair of roots is missed between two nodes of a grid, nor a double one.

        Returns:
            The fixed points; none if the variance always grows.

        Raises:
            ValueError: If the map is the identity, for which every variance is fixed.
        """
        if self.norm == "batch_norm":
            return (VarianceFixedPoint(1.0, 0.0, stable=True),)
        roots = self._homogeneous_roots() if self._dual.homogeneous else self._roots()
        return tuple(self._fixed_point(root) for root in roots)

    def _homogeneous_roots(self) -> list[float]:
        """Return the fixed points of a linear map.

        Raises:
            ValueError: If it is the identity.
        """
        settled = self.fixed_point
        if self.sigma_b2 == 0 and 0 < settled < np.inf:
            raise ValueError(
                f"fixed_points: requires a map other than the identity; with activation={self.activation!r}, "
                f"norm={self.norm!r}, sigma_w2={self.sigma_w2}, sigma_b2=0 every variance is preserved. Take another "
                "sigma_w2, or fixed_point, which starts from unit variance."
            )
        if self.sigma_b2 == 0:
            return [0.0]
        return [settled] if np.isfinite(settled) else []

    def _roots(self) -> list[float]:
        """Return the fixed points of the map of an activation that is not homogeneous."""
        excess = np.asarray(self.derivative(_GRID)) - 1
        turning = np.flatnonzero(excess[:-1] * excess[1:] < 0)
        slope = lambda q: np.asarray(self.derivative(q)) - 1
        extrema = elementwise.find_root(slope, (_GRID[turning], _GRID[turning + 1])).x if turning.size else np.empty(0)
        nodes = np.sort(np.concatenate([_GRID, extrema]))
        gain = np.asarray(self(nodes)) - nodes
        gain[np.abs(gain) <= 8 * _EPS * nodes] = 0.0
        crossed = np.flatnonzero(gain[:-1] * gain[1:] < 0)
        ends = nodes[crossed], nodes[crossed + 1]
        crossings = elementwise.find_root(lambda q: np.asarray(self(q)) - q, ends).x if crossed.size else np.empty(0)
        at_zero = [0.0] if self(0.0) == 0 else []
        return at_zero + sorted(map(float, [*nodes[gain == 0], *crossings]))

    def _fixed_point(self, variance: float) -> VarianceFixedPoint:
        """Classify a root by its slope, or by trial where the slope is one."""
        slope = float(self.derivative(variance))
        if abs(abs(slope) - 1) > MARGINAL:
            return VarianceFixedPoint(variance, slope, abs(slope) < 1)
        trials = [variance * (1 - _PROBE), variance * (1 + _PROBE)] if variance else [_PROBE]
        nearer = [abs(float(self(q)) - variance) < abs(q - variance) for q in trials]
        return VarianceFixedPoint(variance, slope, all(nearer))


def variance_map(
    norm: str = "none",
    activation: str | DualActivation = "relu",
    sigma_w2: float | None = None,
    sigma_b2: float = 0.0,
) -> VarianceMap:
    """Return the variance map of one infinitely wide layer.

    Args:
        norm: "none", "weight_mean" or "batch_norm".
        activation: Name of the activation, see :func:`ntk.analytic.dual_activation`; or a dual activation.
        sigma_w2: Weight variance (weights N(0, σw²/fan_in)); None for the one that keeps unit variance.
        sigma_b2: Bias variance.

    Returns:
        The map.

    Raises:
        ValueError: If a name is unknown, a variance is out of range, or a variance is given under batch norm, which
            cancels it.
    """
    require_norm(norm)
    dual = dual_activation(activation)
    bias = require_variance("sigma_b2", sigma_b2, positive=False)
    require_free_norm(norm, sigma_w2, bias)
    if sigma_w2 is None:
        weight = stable_weight_variance(dual, norm, bias)
    else:
        weight = require_variance("sigma_w2", sigma_w2, positive=True)
    return VarianceMap(norm, dual.name, weight, bias, dual)
