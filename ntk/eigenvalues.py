"""From a kernel to its eigenvalues: of a matrix all at once, of an operator both ends."""

from typing import Any

import numpy as np
import scipy.linalg
from scipy.sparse.linalg import LinearOperator

from ntk.errors import AsymmetricKernelError, MemoryBudgetError, NonFiniteKernelError
from ntk.lanczos import ends
from ntk.memory import parse_memory
from ntk.operator import NtkOperator
from ntk.results import KernelResult
from ntk.spectrum import Spectrum, float_dtype, precision_floor, rounding_errors

BASIS_BYTES = 2**29
"""Memory that a basis may take when max_memory leaves it open (chosen, not tuned)."""

Count = int | tuple[int, int] | None
"""How many of the largest eigenvalues; or of the largest and of the smallest; None for all."""


def spectrum(
    kernel: Any,
    *,
    k: Count = None,
    tolerance: float = 1e-6,
    max_memory: int | str | None = None,
    exact: LinearOperator | None = None,
) -> Spectrum:
    """Eigenvalues of a kernel, in float64 whatever its dtype.

    A matrix is decomposed. Of an operator, `k` eigenpairs are found by the Lanczos process with full
    reorthogonalization, each with the residual of a product of its own, multiple eigenvalues included; with k=None it
    is multiplied out first, at the cost of `size` products and size² numbers.

    Args:
        kernel: A `KernelResult` of one batch, flattened to [n*o, n*o] for reduce="none"; a symmetric array [n, n]; or a
            `LinearOperator`, such as `ntk.NtkOperator`, that is symmetric and positive semi-definite.
        k: How many of the largest eigenvalues to compute, or (largest, smallest); None computes all, which the
            effective rank needs. Condition numbers need both ends: k=(1, 1).
        tolerance: Of an operator: residual over eigenvalue at which an eigenpair counts as found. The error of the
            eigenvalue is no larger, and of the order of the square where it stands alone.
        max_memory: Of an operator: bytes that the basis may take, beyond which the process is restarted from what it
            has found. None allows half a GiB, and 64 vectors at least.
        exact: Of a float32 operator: the same kernel as a float64 one. Eigenvectors are found by the former, and each
            value and its residual by one product of the latter: error bars without the floor of float32, at its price.

    Returns:
        The spectrum.

    Raises:
        AsymmetricKernelError: The kernel is no square symmetric matrix (to sqrt(eps) of its largest entry).
        NonFiniteKernelError: An entry is NaN or infinite.
        MemoryBudgetError: max_memory holds no basis that can be restarted.
        ValueError: k is not between 1 and the size, tolerance not between 0 and 1, or exact not the same kernel.
    """
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance must be between 0 and 1, a residual over its eigenvalue; got {tolerance}.")
    if isinstance(kernel, LinearOperator):
        return _of_operator(kernel, k, tolerance, parse_memory(max_memory), exact)
    if isinstance(kernel, KernelResult):
        if not kernel.symmetric:
            raise AsymmetricKernelError(
                f"a spectrum needs a kernel of one batch with itself; got a cross kernel of shape {kernel.shape}. "
                "Compute it with x2=None."
            )
        return _of_matrix(kernel.flatten(), k, kernel.describe(), computed_in=kernel.computed_in)
    return _of_matrix(np.asarray(kernel), k, "array")


def _of_matrix(
    matrix: np.ndarray, k: Count, source: str, products: int | None = None, computed_in: np.dtype | None = None
) -> Spectrum:
    dtype = float_dtype(matrix.dtype)
    matrix = np.asarray(matrix, dtype=np.float64)
    _check_symmetric(matrix, dtype)
    size = len(matrix)
    largest, smallest = _counts(k, size)
    subset = None if k is None or smallest else (size - largest, size - 1)
    eigenvalues = scipy.linalg.eigh((matrix + matrix.T) / 2, eigvals_only=True, subset_by_index=subset)
    precision = float(np.abs(eigenvalues).max()), size, dtype, computed_in
    error = precision_floor(*precision)
    positive = eigenvalues[eigenvalues > error][:1]
    end = (float(positive[0]), float(rounding_errors(positive, *precision)[0])) if smallest and len(positive) else None
    null = int((np.abs(eigenvalues) <= error).sum()) if smallest else None
    if smallest:
        eigenvalues = np.concatenate([eigenvalues[:smallest], eigenvalues[size - largest :]])
    return Spectrum(
        eigenvalues,
        size,
        "dense",
        error,
        dtype,
        source,
        smallest,
        positive=end,
        null_dimension=null,
        products=products,
        computed_in=computed_in,
    )


def _of_operator(
    operator: LinearOperator, k: Count, tolerance: float, max_memory: int | None, exact: LinearOperator | None
) -> Spectrum:
    """Eigenvalues of an operator."""
    size = operator.shape[0]
    source = operator.describe() if isinstance(operator, NtkOperator) else "operator"
    dtype = float_dtype(operator.dtype)
    _check_operator(operator, exact)
    counts = _counts(k, size)
    if k is None or sum(counts) >= size:
        best = operator if exact is None else exact
        return _of_matrix((best @ np.eye(size)).astype(float_dtype(best.dtype)), None, source, size)
    _check_symmetric_products(operator, dtype)
    found = ends(
        lambda v: operator @ v.astype(dtype),
        size,
        counts,
        float(np.finfo(dtype).eps),
        tolerance,
        _capacity(size, sum(counts), max_memory),
        None if exact is None else lambda v: exact @ v,
    )
    if exact is not None:
        dtype = np.dtype(np.float64)
    error = precision_floor(float(np.abs(found.values).max()), size, dtype)
    positive, null = found.positive if counts[1] else None, found.nullity
    if exact is not None:
        null = None  # what float32 takes for zero need not be
        if (found.values > np.maximum(found.residuals, error)).all() and counts[1]:
            positive = float(found.values[-1]), float(found.residuals[-1])
    return Spectrum(
        found.values,
        size,
        "lanczos",
        error,
        dtype,
        source,
        counts[1],
        found.vectors,
        found.residuals,
        positive,
        null,
        found.products + 2,
    )


def _check_operator(operator: LinearOperator, exact: LinearOperator | None) -> None:
    """See that an operator may be a kernel.

    Raises:
        AsymmetricKernelError: It is not square.
        ValueError: `exact` is no float64 operator of its size.
    """
    size = operator.shape[0]
    if size == 0 or operator.shape != (size, size):
        raise AsymmetricKernelError(f"a spectrum needs a square operator [n, n]; got shape {operator.shape}.")
    if exact is not None and (exact.shape != operator.shape or float_dtype(exact.dtype) != np.float64):
        raise ValueError(
            f"exact must be the same kernel in float64, of shape {operator.shape}; got {exact.dtype} of shape "
            f"{exact.shape}. Pass NtkOperator(..., dtype=torch.float64)."
        )


def _check_symmetric_products(operator: LinearOperator, dtype: np.dtype) -> None:
    """See that an operator is symmetric on two random vectors, at the price of two products.

    Raises:
        AsymmetricKernelError: It is not.
    """
    u, v = np.random.default_rng(0).standard_normal((2, operator.shape[0])).astype(dtype)
    image, scale = operator @ v, float(np.linalg.norm(u))
    asymmetry = abs(float(u @ image) - float((operator @ u) @ v))
    if asymmetry > np.sqrt(np.finfo(dtype).eps) * scale * float(np.linalg.norm(image)):
        raise AsymmetricKernelError(
            f"a spectrum needs a symmetric operator; u·Av and Au·v differ by {asymmetry:.3g} for random u, v. Pass a "
            "kernel of one batch with itself."
        )


def _capacity(size: int, count: int, max_memory: int | None) -> int:
    """How many vectors a basis may hold; as much again is taken while it grows or is restarted.

    Raises:
        MemoryBudgetError: They are too few to restart from.
    """
    least, vector_bytes = 4 * count + 12, 2 * 8 * size
    if max_memory is None:
        return max(64, least, BASIS_BYTES // vector_bytes)
    if max_memory < least * vector_bytes:
        raise MemoryBudgetError(
            f"max_memory must hold {least} vectors, of which a basis for {count} eigenvalues is restarted; got "
            f"{max_memory} bytes. max_memory={least * vector_bytes} would do."
        )
    return max_memory // vector_bytes


def _counts(k: Count, size: int) -> tuple[int, int]:
    """How many of the largest and of the smallest eigenvalues are meant.

    Raises:
        ValueError: They are not between 1 and the size.
    """
    if k is None:
        return size, 0
    largest, smallest = k if isinstance(k, tuple) else (k, 0)
    if min(largest, smallest) < 0 or largest < 1 or largest + smallest > size:
        raise ValueError(
            f"k must be between 1 and the size {size} of the kernel, or (largest, smallest) with at least one of the "
            f"largest, or None for all; got {k}."
        )
    return largest, smallest


def _check_symmetric(matrix: np.ndarray, dtype: np.dtype) -> None:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.shape[0] == 0:
        raise AsymmetricKernelError(
            f"a spectrum needs a square matrix [n, n]; got shape {matrix.shape}. Flatten [n, n, o, o] values with "
            "KernelResult.flatten()."
        )
    if not np.isfinite(matrix).all():
        raise NonFiniteKernelError(
            f"a spectrum needs finite values; {int((~np.isfinite(matrix)).sum())} of {matrix.size} are NaN or inf. "
            "Find the input or activation that overflows."
        )
    deviation, scale = float(np.abs(matrix - matrix.T).max()), float(np.abs(matrix).max())
    if deviation > float(np.sqrt(np.finfo(dtype).eps)) * scale:
        raise AsymmetricKernelError(
            f"a spectrum needs a symmetric matrix; entries differ from their transpose by up to {deviation:.3g}, with "
            f"entries up to {scale:.3g}. Pass a kernel of one batch with itself."
        )
