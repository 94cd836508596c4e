"""Checks on tangent kernels and on the outputs that train under them."""

import numpy as np
from numpy.typing import ArrayLike

from ntk.analytic.gram import rounding
from ntk.analytic.kernels import AnalyticKernels
from ntk.analytic.precision import Array
from ntk.errors import AsymmetricKernelError, NonFiniteKernelError


def require_kernel(ntk: ArrayLike) -> Array:
    """Return a tangent kernel in float64, exactly symmetric.

    Args:
        ntk: Θ [m, m], or one per output [C, m, m].

    Returns:
        The same values, symmetrized.

    Raises:
        AsymmetricKernelError: If it is not square or not symmetric within the rounding of its dtype.
        NonFiniteKernelError: If a value is not finite.
        TypeError: If it is a pair of kernels.
        ValueError: If it is not positive semi-definite, or zero.
    """
    if isinstance(ntk, AnalyticKernels):
        raise TypeError("ntk: must be an array; received AnalyticKernels, which hold two kernels. Pass kernels.ntk.")
    values = np.asarray(ntk).astype(np.float64)
    if values.ndim not in (2, 3) or values.shape[-1] != values.shape[-2] or values.size == 0:
        raise AsymmetricKernelError(
            f"ntk: must be square, [m, m] or one per output [C, m, m]; received shape {values.shape}. For a kernel "
            "[m, m, C, C] pass kernel.flatten() and targets.ravel()."
        )
    if not np.all(np.isfinite(values)):
        raise NonFiniteKernelError(
            f"ntk: must be finite; {int(np.sum(~np.isfinite(values)))} of its {values.size} entries are not. Find the "
            "input or activation that overflows."
        )
    mirrored = np.swapaxes(values, -1, -2)
    tolerance = 8 * values.shape[-1] * rounding(ntk) * float(np.abs(values).max())
    asymmetry = float(np.abs(values - mirrored).max())
    if asymmetry > tolerance:
        raise AsymmetricKernelError(
            f"ntk: must be symmetric; entries differ from their mirror images by up to {asymmetry:.3g} (rounding "
            f"explains {tolerance:.3g}). Pass the kernel of the training points with themselves."
        )
    values = (values + mirrored) / 2
    spectrum = np.linalg.eigvalsh(values)
    if spectrum.min() < -tolerance or spectrum[..., -1].min() <= 0:
        raise ValueError(
            f"ntk: must be positive semi-definite and not zero; its eigenvalues lie between {spectrum.min():.6g} and "
            f"{spectrum.max():.6g} (rounding explains {-tolerance:.3g}). Pass Θ itself, neither centred differences of "
            "kernels nor distances."
        )
    return values


def require_outputs(parameter: str, values: ArrayLike, m: int) -> Array:
    """Return outputs as finite float64.

    Args:
        parameter: Name of the parameter, as the caller knows it.
        values: Outputs [m] or [m, C].
        m: Number of training points.

    Returns:
        The same values.

    Raises:
        ValueError: If there is not one row per training point, or a value is not finite.
    """
    outputs = np.asarray(values, dtype=np.float64)
    if outputs.ndim not in (1, 2) or len(outputs) != m or outputs.size == 0:
        raise ValueError(
            f"{parameter}: must be [m] or [m, C] with one row for each of the {m} rows of ntk; received shape "
            f"{outputs.shape}. Keep examples in the order of the kernel, outputs in columns."
        )
    return require_shape(parameter, outputs, outputs.shape)


def require_shape(parameter: str, values: ArrayLike, shape: tuple[int | str, ...]) -> Array:
    """Return values of a required shape as finite float64.

    Args:
        parameter: Name of the parameter, as the caller knows it.
        values: What was received.
        shape: The shape; a letter stands for a length that is free, and does not match a number.

    Returns:
        The same values.

    Raises:
        ValueError: If the shape is another, or a value is not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.shape != shape:
        expected = ", ".join(map(str, shape))
        raise ValueError(
            f"{parameter}: must have shape [{expected}] to fit ntk and targets; received shape {array.shape}. "
            "Rows are examples; a kernel between test and training points has the training points in its columns."
        )
    if not np.all(np.isfinite(array)):
        raise ValueError(f"{parameter}: must be finite; NaN or infinity was received. Look for overflow upstream.")
    return array


def by_output(values: Array) -> Array:
    """Bring outputs [m] or [m, C] into [C, m], one row per output.

    Args:
        values: Outputs, examples first.
    """
    return np.atleast_2d(values.T)
