"""What the kernels of batch norm require of a batch, and of what stands behind it."""

from ntk.analytic.activations import DualActivation
from ntk.analytic.batch_norm import batch_geometry
from ntk.analytic.messages import require_integer
from ntk.analytic.precision import Array
from ntk.errors import BatchTooSmallError, CentredRankError

SMALLEST_BATCH = 4
"""Smallest batch whose BatchNorm gradient has a finite second moment, the B − 3 of docs/mathematics.md §5.4."""

_BATCH_REASON = (
    "The second moment of a BatchNorm gradient contains E[1/r²] over B − 1 directions, and diverges for B <= 3 (its "
    "growth per layer is 3.084060948 at B = 4, 1.788189977 at B = 8, 1.466942207 for B → ∞). Use a batch of 4 or more."
)
_POPULATION_REASON = "A population has a variance from two points on. Pass more inputs."


def require_batch_size(parameter: str, value: object) -> int:
    """Return a batch size that BatchNorm kernels admit.

    Args:
        parameter: Name of the parameter, as the caller knows it.
        value: What was received.

    Returns:
        The batch size as an int.

    Raises:
        BatchTooSmallError: If it is not an integer above 3.
    """
    return require_integer(parameter, value, SMALLEST_BATCH, _BATCH_REASON, BatchTooSmallError)


def require_batch(
    gram: Array, relative: float, n_statistics: int | None, statistics: str, *, population: bool = False
) -> int:
    """Return the number of rows that define the batch statistics.

    Args:
        gram: Covariance of the pre-activations [n, n].
        relative: Rounding of its entries, relative to the largest.
        n_statistics: Number of leading rows asked for; None for all.
        statistics: What the NTK differentiates.
        population: Whether the rows stand for an infinitely large batch.

    Returns:
        The number of rows.

    Raises:
        BatchTooSmallError: If they are too few.
        CentredRankError: If their rank is too low for the kernel to exist.
        ValueError: If they are too many.
    """
    n = gram.shape[0]
    parameter, rows = ("gram (number of rows)", n) if n_statistics is None else ("n_statistics", n_statistics)
    if population:
        size = require_integer(parameter, rows, 2, _POPULATION_REASON)
    else:
        size = require_batch_size(parameter, rows)
    if size > n:
        raise ValueError(
            f"n_statistics: must be at most the number of rows, {n}; received {size}. The batch comes first in gram, "
            "the test points after it."
        )
    beyond = size < n and statistics == "differentiated"
    needed = 1 if population else 5 if beyond else 3
    rank = batch_geometry(gram, size, relative).eigenvalues.size
    if rank < needed:
        between = " between test points (B of 6 or more)" if beyond else ""
        raise CentredRankError(
            f"gram: must have a centred rank of at least {needed} over the batch under norm='batch_norm'; found {rank} "
            f"over {size} rows. The first layer's NTK{between} is infinite below it: points on a circle or 2-D inputs "
            "have a centred rank of 2. Use inputs of more dimensions, more examples"
            + (", or statistics='constant'." if beyond else ", or norm='weight_mean'.")
        )
    return size


def require_homogeneous(dual: DualActivation, sigma_b2: float) -> float:
    """Return the slope below zero of an activation that the BatchNorm kernels cover.

    Args:
        dual: The activation.
        sigma_b2: Bias variance.

    Returns:
        The slope.

    Raises:
        ValueError: If the activation is not homogeneous or there is a bias variance.
    """
    if dual.negative_slope is None:
        raise ValueError(
            "activation: must be 'relu', 'leaky_relu', 'abs' or 'linear' under norm='batch_norm', whose kernels rest "
            f"on homogeneity; received {dual.name!r}. Take 'relu', or measure the network with ntk.empirical_ntk."
        )
    if sigma_b2 != 0:
        raise ValueError(
            f"sigma_b2: must be 0 under norm='batch_norm', which subtracts every bias with the batch mean; received "
            f"{sigma_b2}. Leave it out."
        )
    return dual.negative_slope
