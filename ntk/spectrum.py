"""Eigenvalues of a kernel, and what they say."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any
from warnings import warn

import numpy as np
import scipy.linalg

from ntk.display import html_figure, spectrum_svg
from ntk.errors import AsymmetricKernelError, NonFiniteKernelError, PartialSpectrumError, PrecisionFloorWarning
from ntk.results import KernelResult

FLOAT32_CONDITION_LIMIT = 1e4
"""A float32 condition number above this is noise; other types scale it by the ratio of their eps."""


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
        method: How they were obtained: "dense".
        error_estimate: Absolute error of each eigenvalue, eps * λmax * size with the eps of `dtype` (Weyl's inequality
            with a rounding error of eps * λmax in each of `size` terms). It is also the floor below which a value is
            zero.
        dtype: Floating-point type that the kernel was computed in; the eigenvalues themselves are float64.
        source: Convention of the kernel in one line.
    """

    eigenvalues: np.ndarray
    size: int
    method: str
    error_estimate: float
    dtype: np.dtype
    source: str = "array"

    def __post_init__(self) -> None:
        """Make the eigenvalues a read-only copy in descending order."""
        values = np.sort(np.array(self.eigenvalues, dtype=np.float64))[::-1].copy()
        values.setflags(write=False)
        object.__setattr__(self, "eigenvalues", values)
        object.__setattr__(self, "dtype", np.dtype(self.dtype))

    @property
    def n_negative(self) -> int:
        """How many eigenvalues came out negative; within `error_estimate` they are zeros."""
        return int((self.eigenvalues < 0).sum())

    @cached_property
    def at_precision_floor(self) -> bool:
        """Whether the condition number exceeds what the dtype supports, and so is noise."""
        smallest = self._complete("at_precision_floor")[-1]
        return not (smallest > self.error_estimate and self._ratio() <= condition_limit(self.dtype))

    @property
    def condition_number(self) -> float:
        """λmax / λmin; infinite where λmin is not positive.

        Warns with `PrecisionFloorWarning` where the figure is at the floor of its precision.
        """
        self._complete("condition_number")
        if self.at_precision_floor:
            warn(
                f"the condition number {self._ratio():.3g} is at the floor of {self.dtype}: above "
                f"{condition_limit(self.dtype):.2g} it is noise. Compute the kernel with dtype=torch.float64, or read "
                "eigenvalues instead.",
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

    def _complete(self, figure: str) -> np.ndarray:
        if len(self.eigenvalues) < self.size:
            raise PartialSpectrumError(
                f"{figure} needs all {self.size} eigenvalues, and k={len(self.eigenvalues)} were computed; "
                "call spectrum(kernel) with k=None."
            )
        return self.eigenvalues

    def _ratio(self) -> float:
        largest, smallest = float(self.eigenvalues[0]), float(self.eigenvalues[-1])
        return largest / smallest if smallest > 0 else float("inf")

    def summary(self) -> str:
        """The figures in one line."""
        parts = [f"{len(self.eigenvalues)} of {self.size} eigenvalues ({self.method})"]
        if len(self.eigenvalues) == self.size:
            floor = ", at the precision floor" if self.at_precision_floor else ""
            parts.append(f"condition number {self._ratio():.6g}{floor}")
            parts.append(f"effective rank {self.effective_rank:.4g}")
        parts.append(f"largest {self.eigenvalues[0]:.6g} ± {self.error_estimate:.1g}")
        if self.n_negative:
            parts.append(f"{self.n_negative} negative, smallest {self.eigenvalues[-1]:.3g}")
        return "; ".join(parts)

    def __repr__(self) -> str:
        """The figures in one line."""
        return f"Spectrum({self.summary()})"

    def _repr_html_(self) -> str:
        """Drawing of the eigenvalues, with the figures and the convention."""
        svg = spectrum_svg(self.eigenvalues, self.error_estimate)
        return html_figure(svg, f"{self.summary()}. {self.source}")


def spectrum(kernel: Any, *, k: int | None = None) -> Spectrum:
    """Eigenvalues of a kernel, in float64 whatever its dtype.

    Args:
        kernel: A `KernelResult` of one batch, flattened to [n*o, n*o] for reduce="none"; or a symmetric array [n, n].
        k: How many of the largest eigenvalues to compute; None computes all, which condition number and rank need.

    Returns:
        The spectrum.

    Raises:
        AsymmetricKernelError: The kernel is no square symmetric matrix (to sqrt(eps) of its largest entry).
        NonFiniteKernelError: An entry is NaN or infinite.
        ValueError: k is not between 1 and the size.
    """
    if isinstance(kernel, KernelResult):
        if not kernel.symmetric:
            raise AsymmetricKernelError(
                f"a spectrum needs a kernel of one batch with itself; got a cross kernel of shape {kernel.shape}. "
                "Compute it with x2=None."
            )
        matrix, source = kernel.flatten(), kernel.describe()
    else:
        matrix, source = np.asarray(kernel), "array"
    dtype = np.dtype(matrix.dtype) if matrix.dtype in (np.float32, np.float64) else np.dtype(np.float64)
    matrix = np.asarray(matrix, dtype=np.float64)
    _check_symmetric(matrix, dtype)
    size = len(matrix)
    if k is not None and not 1 <= k <= size:
        raise ValueError(f"k must be between 1 and the size {size} of the kernel, or None for all; got {k}.")
    subset = None if k is None else (size - k, size - 1)
    eigenvalues = scipy.linalg.eigh((matrix + matrix.T) / 2, eigvals_only=True, subset_by_index=subset)
    error = float(np.finfo(dtype).eps * np.abs(eigenvalues).max() * size)
    return Spectrum(eigenvalues, size, "dense", error, dtype, source)


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
