"""Closed forms of a deep BatchNorm-ReLU network in train mode, and the growth of its gradient.

A batch whose Gram is q[(1−c)I + c11ᵀ] reaches the fixed point in one layer: after normalization the batch is uniform
on the sphere orthogonal to 1, of pairwise correlation −1/(B−1). Mean-field theory of Yang et al. (2019), arXiv
1902.08129; the closed forms are in docs/mathematics.md §5.4.
"""

import math
from dataclasses import dataclass

from scipy.special import gammaln

from ntk.analytic.activations import dual_activation
from ntk.analytic.batch_requirements import require_batch_size
from ntk.analytic.maps import correlation_map
from ntk.analytic.messages import require_choice
from ntk.analytic.norms import require_norm

_ACTIVATION_STEP = "Other activations are not homogeneous, and have no closed form under a finite batch: measure them."


@dataclass(frozen=True)
class BatchNormFixedPoint:
    """What a deep BatchNorm-ReLU network in train mode tends to (docs/mathematics.md §5.4, §9.4).

    Attributes:
        batch_size: B, or None for the limit of large batches.
        normalized_correlation: Correlation of two examples after the normalization, −1/(B−1).
        rectified_correlation: J, their correlation after ReLU.
        derivative_correlation: J', the normalized E[φ'φ'] of the pair.
        gradient_growth: λ_B, factor of the gradient's second moment per layer.
        ntk_condition_number: κ_∞, condition number of the same-batch NTK at large depth.
        nngp_condition_number: Condition number of the NNGP kernel.
        cross_batch_correlation: Correlation of two examples of different batches after ReLU.
    """

    batch_size: int | None
    normalized_correlation: float
    rectified_correlation: float
    derivative_correlation: float
    gradient_growth: float
    ntk_condition_number: float
    nngp_condition_number: float
    cross_batch_correlation: float


def batch_norm_fixed_point(batch_size: int | None = None) -> BatchNormFixedPoint:
    """Return the fixed point of BatchNorm-ReLU for a batch size.

    Args:
        batch_size: B, at least 4; None for the limit.

    Returns:
        The closed forms at this batch size.

    Raises:
        ValueError: If the batch size is 3 or less, or not an integer.
    """
    relu = dual_activation("relu")
    if batch_size is None:
        j, slope = 2 * float(relu.value(0.0)), 2 * float(relu.derivative(0.0))
        growth, kappa = 1 / (1 - j), 1 / (1 - j - slope)
        return BatchNormFixedPoint(None, 0.0, j, slope, growth, kappa, math.inf, j)
    b = require_batch_size("batch_size", batch_size)
    correlation = -1 / (b - 1)
    j, slope = 2 * float(relu.value(correlation)), 2 * float(relu.derivative(correlation))
    mean = 0.5 * math.sqrt((b - 1) / math.pi) * math.exp(gammaln((b - 1) / 2) - gammaln(b / 2))
    return BatchNormFixedPoint(
        batch_size=b,
        normalized_correlation=correlation,
        rectified_correlation=j,
        derivative_correlation=slope,
        gradient_growth=(b - 2 + j + slope) / ((b - 3) * (1 - j)),
        ntk_condition_number=(b - 2 + j + slope) / ((b - 2) - (b - 1) * (j + slope)),
        nngp_condition_number=(1 + (b - 1) * j) / (1 - j),
        cross_batch_correlation=2 * mean**2,
    )


def gradient_growth(norm: str, batch_size: int | None = None, activation: str = "relu") -> float:
    """Return the factor by which one layer multiplies the second moment of the gradient, at initialization.

    Plain and weight mean: χ1 at the stable weight variance, whatever the batch size (docs/mathematics.md §2.3).
    BatchNorm: λ_B for ReLU, (B−2)/(B−3) for a linear network, with the limits π/(π−1) and 1 for a large batch (§5.4).

    Args:
        norm: "none", "weight_mean" or "batch_norm".
        batch_size: B, at least 4, read under "batch_norm" only; None for the limit.
        activation: Name of the activation; "relu", "linear" or "identity" under "batch_norm".

    Returns:
        The growth per layer; one is criticality.

    Raises:
        ValueError: If a name is unknown, the activation has no closed form, or the batch size is 3 or less.
    """
    if require_norm(norm) != "batch_norm":
        return correlation_map(norm, activation).chi_1
    require_choice("activation", activation, ("relu", "linear", "identity"), _ACTIVATION_STEP)
    if activation == "relu":
        return batch_norm_fixed_point(batch_size).gradient_growth
    if batch_size is None:
        return 1.0
    b = require_batch_size("batch_size", batch_size)
    return (b - 2) / (b - 3)
