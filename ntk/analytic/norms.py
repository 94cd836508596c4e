"""What the two weight-side networks do to a pair of inputs: "none" and "weight_mean" in the infinite-width limit.

One layer: K' = σw² S(c, q, q') + σb² with S the second moment E[φφ] ("none") or the covariance E[φφ] − EφEφ
("weight_mean"); docs/mathematics.md §3.1 and §4.1.
"""

import math

from ntk.analytic.activations import DualActivation, dual_activation
from ntk.analytic.closed_forms import Forms
from ntk.analytic.messages import require_choice
from ntk.analytic.precision import Array

NORMS = ("none", "weight_mean", "batch_norm")
"""The normalizations that the analytic kernels know."""

_NEXT_STEP = "Take 'none' for a plain network, 'weight_mean' for centred weights, 'batch_norm' for BatchNorm."


def require_norm(norm: str) -> str:
    """Return ``norm`` if it is one of :data:`NORMS`.

    Args:
        norm: Name of a normalization.

    Returns:
        The same name.

    Raises:
        ValueError: If it is none of them.
    """
    return require_choice("norm", norm, NORMS, _NEXT_STEP)


def require_variance(parameter: str, value: float, *, positive: bool) -> float:
    """Return a weight or bias variance as a float.

    Args:
        parameter: Name of the parameter, as the caller knows it.
        value: The variance.
        positive: Whether zero is excluded.

    Returns:
        The variance.

    Raises:
        ValueError: If it is not finite, or negative, or zero where zero is excluded.
    """
    number = float(value)
    if not math.isfinite(number) or number < 0 or (positive and number == 0):
        kind = "positive" if positive else "non-negative"
        raise ValueError(
            f"{parameter}: must be a finite, {kind} variance; received {value!r}. "
            "Pass a variance, not a standard deviation; sigma_w2=None takes the stable weight variance."
        )
    return number


def layer_moment(dual: DualActivation | Forms, norm: str, rho: Array, q1: Array, q2: Array) -> Array:
    """Return what a layer passes on per unit of weight variance.

    Args:
        dual: The activation, or its unchecked forms.
        norm: "none", or anything else for the centred moment.
        rho: Correlations of the pre-activations.
        q1: Variances of the first.
        q2: Variances of the second.

    Returns:
        E[φφ] for "none", the covariance of φ and φ for "weight_mean" and the population limit of "batch_norm".
    """
    return dual.value(rho, q1, q2) if norm == "none" else dual.covariance(rho, q1, q2)


def require_free_norm(norm: str, sigma_w2: object, sigma_b2: object) -> None:
    """Refuse variances under batch norm, which cancels them.

    Args:
        norm: Name of a normalization.
        sigma_w2: Weight variance, None if not given.
        sigma_b2: Bias variance, zero if not given.

    Raises:
        ValueError: If a variance is given under batch norm.
    """
    if norm == "batch_norm" and (sigma_w2 is not None or sigma_b2 != 0):
        raise ValueError(
            f"sigma_w2, sigma_b2: must be None and 0 under norm='batch_norm', which divides every weight scale and "
            f"subtracts every bias; received {sigma_w2!r} and {sigma_b2!r}. Leave both out."
        )


def stable_weight_variance(
    activation: str | DualActivation = "relu", norm: str = "none", sigma_b2: float = 0.0
) -> float:
    """Return the σw² that keeps unit variance: σw² S(1) + σb² = 1.

    For ReLU 2 ("none", He et al. 2015) and 2π/(π−1) = 2.93388441384852 ("weight_mean", MimicNorm Theorem 3);
    docs/mathematics.md §2.3 has the moments of the others.

    Args:
        activation: Name of the activation, or a dual activation such as ``leaky_relu(0.2)``.
        norm: "none", "weight_mean", or "batch_norm" for its population limit, equal to "weight_mean".
        sigma_b2: Variance of the biases, below one.

    Returns:
        The weight variance, where the weights are N(0, σw²/fan_in).

    Raises:
        ValueError: If a name is unknown, or the bias variance leaves nothing for the weights.
    """
    dual = dual_activation(activation)
    bias = require_variance("sigma_b2", sigma_b2, positive=False)
    if bias >= 1:
        raise ValueError(
            f"sigma_b2: must be below 1 for a weight variance that keeps unit variance to exist; received "
            f"{sigma_b2!r}. Lower it, or give sigma_w2 explicitly."
        )
    moment = dual.second_moment if require_norm(norm) == "none" else dual.variance
    return (1 - bias) / moment
