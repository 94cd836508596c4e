"""Dual activations: what an infinitely wide layer does to a pair of Gaussian pre-activations."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from ntk.analytic import closed_forms as forms
from ntk.analytic import smooth
from ntk.analytic.messages import require_choice
from ntk.analytic.precision import Array

_Pair = Callable[[Array, Array, Array], Array]
_NEXT_STEP = "Take one of these, or write its three expectations beside those of ntk.analytic.closed_forms."
_ROUNDING = 1e-12


@dataclass(frozen=True, eq=False)
class DualActivation:
    """The Gaussian expectations of one activation φ (docs/mathematics.md §2).

    (u, v) is a centred Gaussian pair with variances ``q1``, ``q2`` and correlation ``rho``. All methods broadcast their
    arguments and return float64 of the broadcast shape.

    Attributes:
        name: Name of the activation.
        homogeneous: Whether φ(az) = aφ(z) for a > 0, so that variances only scale.
    """

    name: str
    homogeneous: bool
    _value: _Pair = field(repr=False)
    _derivative: _Pair = field(repr=False)
    _covariance: _Pair = field(repr=False)
    _mean: Callable[[Array], Array] = field(repr=False)

    def value(self, rho: ArrayLike, q1: ArrayLike = 1.0, q2: ArrayLike = 1.0) -> Array:
        """Return E[φ(u)φ(v)].

        Args:
            rho: Correlation, in [−1, 1].
            q1: Variance of u, non-negative.
            q2: Variance of v, non-negative.

        Returns:
            The expectation, of the broadcast shape.

        Raises:
            ValueError: If a correlation or a variance is out of range or not finite.
        """
        return np.asarray(self._value(_correlation(rho), _variance("q1", q1), _variance("q2", q2)))[()]

    def derivative(self, rho: ArrayLike, q1: ArrayLike = 1.0, q2: ArrayLike = 1.0) -> Array:
        """Return E[φ'(u)φ'(v)], which is also the derivative of the value in the covariance of u and v (Price).

        Args:
            rho: Correlation, in [−1, 1].
            q1: Variance of u, non-negative.
            q2: Variance of v, non-negative.

        Returns:
            The expectation, of the broadcast shape.

        Raises:
            ValueError: If a correlation or a variance is out of range or not finite.
        """
        return np.asarray(self._derivative(_correlation(rho), _variance("q1", q1), _variance("q2", q2)))[()]

    def covariance(self, rho: ArrayLike, q1: ArrayLike = 1.0, q2: ArrayLike = 1.0) -> Array:
        """Return E[φ(u)φ(v)] − E[φ(u)]E[φ(v)], what weight mean leaves (docs/mathematics.md §4.1).

        Accurate relative to its own size at small ``rho`` for the activations in closed form.

        Args:
            rho: Correlation, in [−1, 1].
            q1: Variance of u, non-negative.
            q2: Variance of v, non-negative.

        Returns:
            The covariance, of the broadcast shape.

        Raises:
            ValueError: If a correlation or a variance is out of range or not finite.
        """
        return np.asarray(self._covariance(_correlation(rho), _variance("q1", q1), _variance("q2", q2)))[()]

    def mean(self, q: ArrayLike = 1.0) -> Array:
        """Return E[φ(u)] at variance ``q``, of the shape of ``q``."""
        return np.asarray(self._mean(_variance("q", q)))[()]

    @property
    def second_moment(self) -> float:
        """E[φ(u)²] at unit variance."""
        return float(self.value(1.0))

    @property
    def variance(self) -> float:
        """E[φ(u)²] − E[φ(u)]² at unit variance."""
        return float(self.covariance(1.0))

    @property
    def derivative_second_moment(self) -> float:
        """E[φ'(u)²] at unit variance."""
        return float(self.derivative(1.0))


def _correlation(rho: ArrayLike) -> Array:
    """Return correlations, trimmed where rounding left them outside [−1, 1].

    Raises:
        ValueError: If one is further outside, or not a number.
    """
    values = np.asarray(rho, dtype=np.float64)
    if not np.all(np.abs(values) <= 1 + _ROUNDING):
        worst = values.flat[np.argmax(np.where(np.isnan(values), np.inf, np.abs(values)))]
        raise ValueError(
            f"rho: must be a correlation in [-1, 1]; received {worst}. Divide the covariance by the root of "
            "the product of the two variances, and pass these as q1 and q2."
        )
    return np.clip(values, -1.0, 1.0)


def _variance(parameter: str, q: ArrayLike) -> Array:
    """Return variances as an array.

    Raises:
        ValueError: If one is negative or not finite.
    """
    values = np.asarray(q, dtype=np.float64)
    if not np.all(np.isfinite(values) & (values >= 0)):
        worst = values.flat[np.argmin(np.where(np.isfinite(values), values, -np.inf))]
        raise ValueError(
            f"{parameter}: must be a finite, non-negative variance; received {worst}. Pass the diagonal of the "
            "Gram matrix."
        )
    return values


_LINEAR = (forms.linear_value, forms.linear_derivative, forms.linear_value, forms.zero_mean)
_ACTIVATIONS: dict[str, DualActivation] = {
    dual.name: dual
    for dual in (
        DualActivation("relu", True, forms.relu_value, forms.relu_derivative, forms.relu_covariance, forms.relu_mean),
        DualActivation("abs", True, forms.abs_value, forms.abs_derivative, forms.abs_covariance, forms.abs_mean),
        DualActivation("erf", False, forms.erf_value, forms.erf_derivative, forms.erf_value, forms.zero_mean),
        DualActivation("gelu", False, forms.gelu_value, forms.gelu_derivative, forms.gelu_covariance, forms.gelu_mean),
        DualActivation("tanh", False, smooth.tanh_value, smooth.tanh_derivative, smooth.tanh_value, forms.zero_mean),
        DualActivation("linear", True, *_LINEAR),
        DualActivation("identity", True, *_LINEAR),
    )
}


def dual_activation(name: str) -> DualActivation:
    """Return the dual activation of that name.

    Args:
        name: "relu", "abs", "erf", "gelu" (the exact one, with erf), "tanh", "linear" or "identity".

    Returns:
        The frozen object holding the Gaussian expectations of the activation (docs/mathematics.md §2).

    Raises:
        ValueError: If there is no activation of that name.
    """
    return _ACTIVATIONS[require_choice("activation", name, _ACTIVATIONS, _NEXT_STEP)]
