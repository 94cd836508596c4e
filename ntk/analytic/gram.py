"""Checks on the Gram matrix from which a kernel is propagated."""

import warnings

import numpy as np
from numpy.typing import ArrayLike

from ntk.analytic.precision import Array
from ntk.errors import CoincidentPointsWarning, GramError, PrecisionFloorWarning


def rounding(values: ArrayLike) -> float:
    """Return the relative rounding of the dtype of ``values``; that of float64 for whole numbers."""
    dtype = np.asarray(values).dtype
    return float(np.finfo(dtype if np.issubdtype(dtype, np.floating) else np.float64).eps)


def require_gram(gram: ArrayLike) -> Array:
    """Return the Gram matrix in float64, exactly symmetric.

    Tolerances are the rounding of the dtype received: a product of feature matrices of n rows errs by about n·eps of
    its largest entry. Eigenvalues that are negative within it are left as they are.

    Args:
        gram: K⁰ [n, n], the covariance of the first pre-activations (docs/mathematics.md §1.1).

    Returns:
        The matrix [n, n].

    Raises:
        GramError: If it is not a square, finite, symmetric, positive semi-definite matrix with a positive diagonal.
    """
    values = np.asarray(gram).astype(np.float64)
    if values.ndim != 2 or values.shape[0] != values.shape[1] or values.size == 0:
        raise GramError(
            f"gram: must be a square matrix [n, n]; received shape {values.shape}. For inputs x [n, d] "
            "pass x @ x.T / d."
        )
    if not np.all(np.isfinite(values)):
        count = int(np.sum(~np.isfinite(values)))
        raise GramError(
            f"gram: must be finite; {count} of its {values.size} entries are not. Look for NaN or "
            "overflow in the inputs."
        )
    tolerance = 8 * values.shape[0] * rounding(gram) * float(np.abs(values).max())
    asymmetry = float(np.abs(values - values.T).max())
    if asymmetry > tolerance:
        raise GramError(
            f"gram: must be symmetric; entries differ from their mirror images by up to {asymmetry:.3g} (rounding "
            f"explains {tolerance:.3g}). Pass the Gram matrix of one set of inputs, x @ x.T / d."
        )
    values = (values + values.T) / 2
    if values.diagonal().min() <= 0:
        row = int(values.diagonal().argmin())
        raise GramError(
            f"gram: must have a positive diagonal, as correlations divide by it; entry ({row}, {row}) is "
            f"{values[row, row]}. Remove the input that is zero, or pass a covariance."
        )
    lowest = float(np.linalg.eigvalsh(values)[0])
    if lowest < -tolerance:
        raise GramError(
            f"gram: must be positive semi-definite, being a covariance; its lowest eigenvalue is {lowest:.6g} "
            f"(rounding explains {-tolerance:.3g}). Pass x @ x.T / d, not a matrix of distances."
        )
    return values


def warn_of_gram(values: Array, relative: float) -> None:
    """Warn of a Gram matrix that is admissible and makes kernels whose condition number means nothing.

    Args:
        values: The Gram matrix in float64 [n, n].
        relative: Rounding of the dtype in which it came.
    """
    tolerance = 8 * values.shape[0] * relative
    _, rho = correlations(values)
    pairs = np.argwhere(np.triu(rho >= 1 - tolerance, 1))
    if pairs.size:
        first, second = (int(index) for index in pairs[0])
        warnings.warn(
            f"gram: should hold distinct inputs; {len(pairs)} pair(s) coincide up to rounding and scale, the first "
            f"({first}, {second}) with correlation {rho[first, second]:.17g}. Kernels are singular (κ = ∞), and off "
            "the diagonal at correlation 1 an angle is known to √ε only: 2e-9 per layer for ReLU. Remove duplicates.",
            CoincidentPointsWarning,
            stacklevel=3,
        )
    if relative <= np.finfo(np.float64).eps or pairs.size:
        return
    eigenvalues = np.linalg.eigvalsh(values)
    if eigenvalues[0] < tolerance * eigenvalues[-1]:
        warnings.warn(
            f"gram: has a condition number beyond what the dtype in which it came resolves, {1 / tolerance:.1g} for "
            f"{len(values)} rows: its smallest eigenvalue, {eigenvalues[0]:.3g}, is rounding, and so is what depends "
            "on it, the condition number of an NNGP kernel first. Compute the Gram matrix in float64.",
            PrecisionFloorWarning,
            stacklevel=3,
        )


def correlations(kernel: Array) -> tuple[Array, Array]:
    """Split a covariance matrix into variances and correlations.

    The diagonal of the correlations is exactly one: at c = 1 − 2⁻⁵³ the derivative kernel of ReLU would already err by
    2e−9 per layer (docs/mathematics.md §1.3).

    Args:
        kernel: Covariance matrix [n, n] with a positive diagonal.

    Returns:
        Variances [n] and correlations [n, n].
    """
    variance = kernel.diagonal().copy()
    rho = np.clip(kernel / np.sqrt(np.outer(variance, variance)), -1.0, 1.0)
    np.fill_diagonal(rho, 1.0)
    return variance, rho
