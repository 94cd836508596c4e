"""Dual activations: what an infinitely wide layer does to a pair of Gaussian pre-activations."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from ntk.analytic.closed_forms import AnyArray, Erf, Forms, Gelu, Homogeneous, Polynomial, Sine
from ntk.analytic.messages import require_choice
from ntk.analytic.precision import Array
from ntk.analytic.smooth import SILU, TANH

_NEXT_STEP = (
    "Take one of these, or leaky_relu(negative_slope), sine(frequency) or polynomial(coefficients), or write a class "
    "with the expectations of ntk.analytic.closed_forms.Forms and pass DualActivation(name, forms)."
)
_ROUNDING = 1e-12


@dataclass(frozen=True)
class DualActivation:
    """The Gaussian expectations of one activation φ (docs/mathematics.md §2).

    (u, v) is a centred Gaussian pair with variances ``q1``, ``q2`` and correlation ``rho``. All methods check and
    broadcast their arguments and return NumPy float64 of the broadcast shape.

    Attributes:
        name: Name of the activation, its parameter included.
        forms: The same expectations unchecked, over NumPy or JAX arrays that may be traced:
            ``forms.value(rho, q1, q2)`` and so on.
        asymptote: What φ(az)/a tends to as a → ∞, if it is homogeneous; None where it is zero or grows.
    """

    name: str
    forms: Forms = field(repr=False)
    asymptote: Homogeneous | None = field(default=None, repr=False)

    @property
    def function(self) -> Callable[[AnyArray], AnyArray]:
        """φ itself, entry by entry, of a NumPy or a JAX array."""
        return self.forms.function

    @property
    def negative_slope(self) -> float | None:
        """The slope a for which φ(z) = z right of zero and az left of it; None if φ has not that form."""
        return self.forms.negative_slope if isinstance(self.forms, Homogeneous) else None

    @property
    def homogeneous(self) -> bool:
        """Whether φ(az) = aφ(z) for a > 0, so that variances only scale."""
        return self.negative_slope is not None

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
        return np.asarray(self.forms.value(_correlation(rho), _variance("q1", q1), _variance("q2", q2)))[()]

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
        return np.asarray(self.forms.derivative(_correlation(rho), _variance("q1", q1), _variance("q2", q2)))[()]

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
        return np.asarray(self.forms.covariance(_correlation(rho), _variance("q1", q1), _variance("q2", q2)))[()]

    def curvature(self, rho: ArrayLike, q1: ArrayLike = 1.0, q2: ArrayLike = 1.0) -> Array:
        """Return E[φ''(u)φ(v)], where a kink is a point mass of φ''; it enters the slope of the variance map.

        Args:
            rho: Correlation, in [−1, 1].
            q1: Variance of u, non-negative; positive for a kinked activation.
            q2: Variance of v, non-negative.

        Returns:
            The expectation, of the broadcast shape.

        Raises:
            ValueError: If a correlation or a variance is out of range or not finite.
        """
        return np.asarray(self.forms.curvature(_correlation(rho), _variance("q1", q1), _variance("q2", q2)))[()]

    def mean(self, q: ArrayLike = 1.0) -> Array:
        """Return E[φ(u)] at variance ``q``, of the shape of ``q``."""
        return np.asarray(self.forms.mean(_variance("q", q)))[()]

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


def _number(parameter: str, value: float, meaning: str) -> float:
    """Return a parameter of an activation as a float.

    Raises:
        ValueError: If it is not a finite number.
    """
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{parameter}: must be a finite number; received {value!r}. It is {meaning}.")
    return number


def _homogeneous(name: str, negative_slope: float) -> DualActivation:
    """Return the activation of slopes one and ``negative_slope``, which is its own asymptote."""
    forms = Homogeneous(negative_slope)
    return DualActivation(name, forms, forms)


def leaky_relu(negative_slope: float) -> DualActivation:
    """Return φ(z) = z for z > 0 and az for z < 0.

    Args:
        negative_slope: The slope a, any finite number: 0 for ReLU, −1 for the absolute value, 1 for the identity.

    Returns:
        Its dual activation, in closed form.

    Raises:
        ValueError: If the slope is not finite.
    """
    slope = _number("negative_slope", negative_slope, "the slope of the activation left of zero; take 0.01 or 0.2")
    return _homogeneous(f"leaky_relu({slope})", slope)


def sine(frequency: float = 1.0) -> DualActivation:
    """Return φ(z) = sin ωz.

    Args:
        frequency: The factor ω, finite and not zero.

    Returns:
        Its dual activation, in closed form.

    Raises:
        ValueError: If the frequency is zero or not finite.
    """
    omega = _number("frequency", frequency, "the factor ω of sin ωz; take 1, or the 30 of SIREN")
    if omega == 0:
        raise ValueError(
            "frequency: must not be zero, as the activation would be; received 0. It is the factor ω of sin ωz; take 1."
        )
    return DualActivation("sine" if omega == 1 else f"sine({omega})", Sine(omega))


def polynomial(coefficients: Iterable[float]) -> DualActivation:
    """Return φ(z) = Σ c_j z^j.

    Args:
        coefficients: c_0, c_1, …, the constant first; one beyond it must not be zero.

    Returns:
        Its dual activation, exact at every degree.

    Raises:
        ValueError: If a coefficient is not finite, or the polynomial is constant.
    """
    given = [_number("coefficients", c, "one of c_0, c_1, … of Σ c_j z^j, the constant first") for c in coefficients]
    while given and given[-1] == 0:
        given.pop()
    if len(given) < 2:
        raise ValueError(
            f"coefficients: must hold a non-zero c_j with j of at least 1, as a constant passes nothing on; received "
            f"{tuple(given)} after dropping trailing zeros. Put the constant first: (0, 1) is the identity."
        )
    return DualActivation(f"polynomial({', '.join(map(str, given))})", Polynomial(tuple(given)))


_ACTIVATIONS: dict[str, DualActivation] = {
    "relu": _homogeneous("relu", 0.0),
    "abs": _homogeneous("abs", -1.0),
    "linear": _homogeneous("linear", 1.0),
    "identity": _homogeneous("identity", 1.0),
    "leaky_relu": leaky_relu(0.01),
    "erf": DualActivation("erf", Erf()),
    "gelu": DualActivation("gelu", Gelu(), Homogeneous(0.0)),
    "tanh": DualActivation("tanh", TANH),
    "silu": DualActivation("silu", SILU, Homogeneous(0.0)),
    "sine": sine(),
}


def dual_activation(name: "str | DualActivation") -> DualActivation:
    """Return the dual activation of that name.

    Args:
        name: "relu", "leaky_relu" (of slope 0.01, PyTorch's default), "abs", "linear" or "identity", "erf", "gelu" (the
            exact one, with erf), "silu", "tanh" or "sine"; or a dual activation, such as ``leaky_relu(0.2)``, which is
            returned as it is.

    Returns:
        The frozen object holding the Gaussian expectations of the activation (docs/mathematics.md §2).

    Raises:
        ValueError: If there is no activation of that name.
    """
    if isinstance(name, DualActivation):
        return name
    return _ACTIVATIONS[require_choice("activation", name, _ACTIVATIONS, _NEXT_STEP)]
