"""Eigenvalues of a kernel, and what they say."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any
from warnings import warn

import numpy as np
import scipy.linalg
from scipy.sparse.linalg import LinearOperator

from ntk.display import html_figure, spectrum_svg
from ntk.errors import (
    AsymmetricKernelError,
    MemoryBudgetError,
    NonFiniteKernelError,
    PartialSpectrumError,
    PrecisionFloorWarning,
)
from ntk.lanczos import ends
from ntk.operator import NtkOperator
from ntk.results import KernelResult

FLOAT32_CONDITION_LIMIT = 1e4
"""A float32 condition number above this is noise; other types scale it by the ratio of their eps."""


RESOLVED = 0.01
"""Residual over eigenvalue up to which the lower end of a range counts as resolved (chosen, not tuned)."""

BASIS_BYTES = 2**29
"""Memory that a basis may take when max_memory leaves it open (chosen, not tuned)."""

Count = int | tuple[int, int] | None
"""How many of the largest eigenvalues; or of the largest and of the smallest; None for all."""


def float_dtype(dtype: Any) -> np.dtype:
    """float32 for itself, float64 for all other types that a kernel may come in.

    Args:
        dtype: Of the kernel; None where an operator does not know.
    """
    return np.dtype(np.float32 if dtype is not None and np.dtype(dtype) == np.float32 else np.float64)


def condition_limit(dtype: np.dtype | type) -> float:
    """Largest condition number that values of this type can support.

    float32: 1e4. At that limit the smallest eigenvalue has a relative error of order 1e4 * eps = 0.12 %; the same error
    in float64 is reached at 5.4e12.

    Args:
        dtype: Floating-point type that the kernel was computed in.
    """
    return FLOAT32_CONDITION_LIMIT * float(np.finfo(np.float32).eps) / float(np.finfo(dtype).eps)


@dataclass(frozen=True, eq=False, repr=False)
class Spectrum:
    """Eigenvalues of a symmetric kernel.

    Attributes:
        eigenvalues: [k], descending, float64, read-only. Slightly negative ones stand as they came out.
        size: Number of eigenvalues that the kernel has; k < size for a partial spectrum.
        method: How they were obtained: "dense" or "lanczos".
        error_estimate: Absolute error of each eigenvalue, eps * λmax * size with the eps of `dtype` (Weyl's inequality
            with a rounding error of eps * λmax in each of `size` terms). It is also the floor below which a value is
            zero.
        dtype: Floating-point type that the kernel was computed in; the eigenvalues themselves are float64.
        source: Convention of the kernel in one line.
        smallest: How many of the eigenvalues of a partial spectrum are from the lower end.
        eigenvectors: [size, k], in the order of the eigenvalues, read-only, or None where they were not computed.
        residuals: [k], ‖Θ v − λ v‖ of each eigenpair: an eigenvalue lies within it. None for "dense".
        positive: Smallest eigenvalue found above `error_estimate`, with its residual; None where none was looked for.
        null_dimension: Dimension of the null space as an exhausted Krylov space gives it, or None.
        products: Vectors that the kernel was multiplied by, or None for "dense" from a matrix.
    """

    eigenvalues: np.ndarray
    size: int
    method: str
    error_estimate: float
    dtype: np.dtype
    source: str = "array"
    smallest: int = 0
    eigenvectors: np.ndarray | None = None
    residuals: np.ndarray | None = None
    positive: tuple[float, float] | None = None
    null_dimension: int | None = None
    products: int | None = None

    def __post_init__(self) -> None:
        """Make the arrays read-only copies in descending order of the eigenvalues."""
        values = np.array(self.eigenvalues, dtype=np.float64)
        order = np.argsort(values, kind="stable")[::-1]
        for name, array in (
            ("eigenvalues", values),
            ("eigenvectors", self.eigenvectors),
            ("residuals", self.residuals),
        ):
            if array is not None:
                sorted_ = np.array(array[..., order], dtype=np.float64)
                sorted_.setflags(write=False)
                object.__setattr__(self, name, sorted_)
        object.__setattr__(self, "dtype", np.dtype(self.dtype))

    @property
    def n_negative(self) -> int:
        """How many eigenvalues came out negative; within `error_estimate` they are zeros."""
        return int((self.eigenvalues < 0).sum())

    @property
    def complete(self) -> bool:
        """Whether all eigenvalues are there."""
        return len(self.eigenvalues) == self.size

    @property
    def errors(self) -> np.ndarray:
        """Bound [k] on the distance of each value from an eigenvalue: its residual, `error_estimate` at least."""
        residuals = np.zeros(len(self.eigenvalues)) if self.residuals is None else self.residuals
        return np.maximum(residuals, self.error_estimate)

    @property
    def nullity(self) -> int:
        """Dimension of the null space: eigenvalues within `error_estimate` of zero.

        A lower bound where `nullity_is_exact` is false: a partial spectrum counts what was computed.
        """
        counted = int((np.abs(self.eigenvalues) <= self.error_estimate).sum())
        return counted if self.null_dimension is None else self.null_dimension

    @property
    def nullity_is_exact(self) -> bool:
        """Whether the dimension of the null space is known."""
        lower = self.eigenvalues[len(self.eigenvalues) - self.smallest :] if self.smallest else np.empty(0)
        return self.complete or self.null_dimension is not None or bool((lower > self.error_estimate).any())

    @property
    def range_condition_number(self) -> float:
        """λmax over the smallest eigenvalue above `error_estimate`: the condition number off the null space.

        Raises:
            PartialSpectrumError: That eigenvalue was not computed, or did not converge.
        """
        end = self._range_end("range_condition_number")
        if end is None:
            return float("nan")
        value, residual = end
        if residual > RESOLVED * value:
            raise PartialSpectrumError(
                f"range_condition_number is not resolved: the smallest eigenvalue above the floor was found as "
                f"{value:.3g} ± {residual:.1g}, so that it is at least {self.eigenvalues[0] / (value + residual):.3g}. "
                "Compute the matrix with ntk.empirical_ntk, in float64."
            )
        return float(self.eigenvalues[0]) / value

    @cached_property
    def at_precision_floor(self) -> bool:
        """Whether the condition number exceeds what the dtype, or the convergence, supports, and so is noise."""
        smallest = self._lower_end("at_precision_floor")
        return not (smallest > self.errors[-1] and self._ratio() <= condition_limit(self.dtype))

    @property
    def condition_number(self) -> float:
        """λmax / λmin; infinite where λmin is not positive.

        Warns with `PrecisionFloorWarning` where the figure is at the floor of its precision; the kernel has a null
        space then, as far as its type can tell, and `range_condition_number` is the figure that means something.
        """
        self._lower_end("condition_number")
        if self.at_precision_floor:
            warn(
                f"the condition number {self._ratio():.3g} is at the floor of {self.dtype}: above "
                f"{condition_limit(self.dtype):.2g} it is noise. Compute the kernel with dtype=torch.float64, or read "
                "eigenvalues and range_condition_number instead.",
                PrecisionFloorWarning,
                stacklevel=2,
            )
        return self._ratio()

    @cached_property
    def effective_rank(self) -> float:
        """Exponential of the Shannon entropy of the normalized eigenvalues, between 1 and `size`.

        p_i = λ_i / Σλ, negative values counted as zero; erank = exp(-Σ p_i ln p_i). Source: O. Roy and M. Vetterli,
        "The effective rank: a measure of effective dimensionality", EUSIPCO 2007. A zero kernel has rank 0.
        """
        values = np.clip(self._complete("effective_rank"), 0.0, None)
        if values.sum() == 0:
            return 0.0
        weights = values[values > 0] / values.sum()
        return float(np.exp(-(weights * np.log(weights)).sum()))

    def _lower_end(self, figure: str) -> float:
        return float((self.eigenvalues if self.smallest else self._complete(figure))[-1])

    def _range_end(self, figure: str) -> tuple[float, float] | None:
        """Smallest eigenvalue above the floor, with its residual; None for a zero kernel."""
        self._lower_end(figure)
        above = self.eigenvalues > self.error_estimate
        if not self.complete:
            return self.positive
        return (float(self.eigenvalues[above][-1]), float(self.errors[above][-1])) if above.any() else None

    def _complete(self, figure: str) -> np.ndarray:
        if not self.complete:
            raise PartialSpectrumError(
                f"{figure} needs all {self.size} eigenvalues, and k={len(self.eigenvalues)} were computed; "
                "call spectrum(kernel) with k=None, or, for what needs the two ends only, with k=(1, 1)."
            )
        return self.eigenvalues

    def _ratio(self) -> float:
        largest, smallest = float(self.eigenvalues[0]), float(self.eigenvalues[-1])
        zero = 0.0 if self.residuals is None else self.errors[-1]
        return largest / smallest if smallest > zero else float("inf")

    def summary(self) -> str:
        """The figures in one line."""
        products = "" if self.products is None else f", {self.products} products"
        parts = [f"{len(self.eigenvalues)} of {self.size} eigenvalues ({self.method}{products})"]
        if self.complete or self.smallest:
            floor = ", at the precision floor" if self.at_precision_floor else ""
            parts.append(f"condition number {self._ratio():.6g}{floor}")
            if self.nullity:
                parts.append(self._range_summary())
        if self.complete:
            parts.append(f"effective rank {self.effective_rank:.4g}")
        parts.append(f"largest {self.eigenvalues[0]:.6g} ± {self.errors[0]:.1g}")
        if self.smallest:
            parts.append(f"smallest {self.eigenvalues[-1]:.6g} ± {self.errors[-1]:.1g}")
        if self.n_negative:
            parts.append(f"{self.n_negative} negative, smallest {self.eigenvalues[-1]:.3g}")
        return "; ".join(parts)

    def _range_summary(self) -> str:
        try:
            figure = f"condition number on the range {self.range_condition_number:.6g}"
        except PartialSpectrumError as error:
            figure = str(error).partition(", so that")[0]
        return f"null space of dimension {'' if self.nullity_is_exact else 'at least '}{self.nullity}, {figure}"

    def __repr__(self) -> str:
        """The figures in one line."""
        return f"Spectrum({self.summary()})"

    def _repr_html_(self) -> str:
        """Drawing of the eigenvalues, with the figures and the convention."""
        svg = spectrum_svg(self.eigenvalues, self.error_estimate)
        return html_figure(svg, f"{self.summary()}. {self.source}")


def spectrum(
    kernel: Any,
    *,
    k: Count = None,
    tolerance: float = 1e-6,
    max_memory: int | None = None,
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
        return _of_operator(kernel, k, tolerance, max_memory, exact)
    if isinstance(kernel, KernelResult):
        if not kernel.symmetric:
            raise AsymmetricKernelError(
                f"a spectrum needs a kernel of one batch with itself; got a cross kernel of shape {kernel.shape}. "
                "Compute it with x2=None."
            )
        return _of_matrix(kernel.flatten(), k, kernel.describe())
    return _of_matrix(np.asarray(kernel), k, "array")


def _of_matrix(matrix: np.ndarray, k: Count, source: str, products: int | None = None) -> Spectrum:
    dtype = float_dtype(matrix.dtype)
    matrix = np.asarray(matrix, dtype=np.float64)
    _check_symmetric(matrix, dtype)
    size = len(matrix)
    largest, smallest = _counts(k, size)
    subset = None if k is None or smallest else (size - largest, size - 1)
    eigenvalues = scipy.linalg.eigh((matrix + matrix.T) / 2, eigvals_only=True, subset_by_index=subset)
    error = float(np.finfo(dtype).eps * np.abs(eigenvalues).max() * size)
    positive = eigenvalues[eigenvalues > error]
    end = (float(positive[0]), error) if smallest and len(positive) else None
    null = int((np.abs(eigenvalues) <= error).sum()) if smallest else None
    if smallest:
        eigenvalues = np.concatenate([eigenvalues[:smallest], eigenvalues[size - largest :]])
    return Spectrum(
        eigenvalues, size, "dense", error, dtype, source, smallest, positive=end, null_dimension=null, products=products
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
    error = float(np.finfo(dtype).eps) * size * float(np.abs(found.values).max())
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
