"""Eigenvalues of a kernel, and what they say."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any
from warnings import warn

import numpy as np

from ntk.display import html_figure, spectrum_svg
from ntk.errors import PartialSpectrumError, PrecisionFloorWarning

FLOAT32_CONDITION_LIMIT = 1e4
"""A float32 condition number above this is noise; other types scale it by the ratio of their eps."""


RESOLVED = 0.01
"""Residual over eigenvalue up to which the lower end of a range counts as resolved (chosen, not tuned)."""


def float_dtype(dtype: Any) -> np.dtype:
    """float32 for itself, float64 for all other types that a kernel may come in.

    Args:
        dtype: Of the kernel; None where an operator does not know.
    """
    return np.dtype(np.float32 if dtype is not None and np.dtype(dtype) == np.float32 else np.float64)


def condition_limit(dtype: np.dtype | type, computed_in: np.dtype | None = None) -> float:
    """Largest condition number that values of this type can support.

    float32: 1e4. At that limit the smallest eigenvalue has a relative error of order 1e4 * eps = 0.12 %; the same error
    in float64 is reached at 5.4e12, and in the Gram matrix of float32 derivatives, where it is 2 sqrt(κ) eps, at 2.5e7.

    Args:
        dtype: Floating-point type that the kernel was computed in.
        computed_in: Narrower one of the derivatives that it is the Gram matrix of, or None.
    """
    if computed_in is not None:
        return (condition_limit(computed_in) / 2) ** 2
    return FLOAT32_CONDITION_LIMIT * float(np.finfo(np.float32).eps) / float(np.finfo(dtype).eps)


def jacobian_error(largest: float, size: int, computed_in: np.dtype | None) -> float:
    """Spectral norm δ that rounding of the Jacobian may have: an eigenvalue λ is then good to 2 sqrt(λ) δ + δ².

    A rounding error of eps in each row, relative to the largest singular value, has δ <= eps * sqrt(size * λmax); the
    singular values move by δ at most (Weyl's inequality). What a deep network in its chaotic phase makes of rounded
    activations is not in it, nor in the errors of a float32 kernel: it computes another function, nearby.

    Args:
        largest: λmax of the kernel.
        size: Rows of the Jacobian.
        computed_in: Type of the Jacobian where the kernel is its Gram matrix in a wider one; None gives 0.
    """
    return 0.0 if computed_in is None else float(np.finfo(computed_in).eps * np.sqrt(size * max(largest, 0.0)))


def precision_floor(largest: float, size: int, dtype: np.dtype, computed_in: np.dtype | None = None) -> float:
    """What an eigenvalue must exceed to be told from zero.

    eps * λmax * size (Weyl's inequality with a rounding error of eps * λmax in each of `size` terms); of a rounded
    Jacobian the eigenvalue that equals its own error 2 sqrt(λ) δ + δ², where that is larger.

    Args:
        largest: Largest absolute eigenvalue.
        size: Of the kernel.
        dtype: Floating-point type that the kernel was computed in.
        computed_in: Narrower one of the derivatives, or None.
    """
    of_jacobian = ((1 + np.sqrt(2)) * jacobian_error(largest, size, computed_in)) ** 2
    return float(max(np.finfo(dtype).eps * largest * size, of_jacobian))


def rounding_errors(
    values: np.ndarray, largest: float, size: int, dtype: np.dtype, computed_in: np.dtype | None = None
) -> np.ndarray:
    """What rounding may have moved eigenvalues by, `precision_floor` at least.

    Args:
        values: [k], eigenvalues.
        largest: Largest absolute eigenvalue.
        size: Of the kernel.
        dtype: Floating-point type that the kernel was computed in.
        computed_in: Narrower one of the derivatives, or None.
    """
    moved = jacobian_error(largest, size, computed_in)
    of_jacobian = 2 * np.sqrt(np.clip(values, 0.0, None)) * moved + moved**2
    return np.maximum(precision_floor(largest, size, dtype, computed_in), of_jacobian)


@dataclass(frozen=True, eq=False, repr=False)
class Spectrum:
    """Eigenvalues of a symmetric kernel.

    Attributes:
        eigenvalues: [k], descending, float64, read-only. Slightly negative ones stand as they came out.
        size: Number of eigenvalues that the kernel has; k < size for a partial spectrum.
        method: How they were obtained: "dense" or "lanczos".
        error_estimate: Floor below which a value is zero, and no value has a smaller error: `precision_floor`.
        dtype: Floating-point type that the kernel was computed in; the eigenvalues themselves are float64.
        source: Convention of the kernel in one line.
        smallest: How many of the eigenvalues of a partial spectrum are from the lower end.
        eigenvectors: [size, k], in the order of the eigenvalues, read-only, or None where they were not computed.
        residuals: [k], ‖Θ v − λ v‖ of each eigenpair: an eigenvalue lies within it. None for "dense".
        positive: Smallest eigenvalue found above `error_estimate`, with its residual; None where none was looked for.
        null_dimension: Dimension of the null space as an exhausted Krylov space gives it, or None.
        products: Vectors that the kernel was multiplied by, or None for "dense" from a matrix.
        computed_in: Type of the derivatives that the kernel is the Gram matrix of, where it is narrower; else None.
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
    computed_in: np.dtype | None = None

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
        """Bound [k] on the distance of each value from an eigenvalue: its residual, `error_estimate` at least.

        Where derivatives were rounded before their Gram matrix was taken, `rounding_errors` at least.
        """
        residuals = np.zeros(len(self.eigenvalues)) if self.residuals is None else self.residuals
        known = np.maximum(residuals, self.error_estimate)
        if self.computed_in is None:
            return known
        largest = float(self.eigenvalues[0])
        return np.maximum(known, rounding_errors(self.eigenvalues, largest, self.size, self.dtype, self.computed_in))

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
        return not (smallest > self.errors[-1] and self._ratio() <= condition_limit(self.dtype, self.computed_in))

    @property
    def condition_number(self) -> float:
        """λmax / λmin; infinite where λmin is not positive.

        Warns with `PrecisionFloorWarning` where the figure is at the floor of its precision; the kernel has a null
        space then, as far as its type can tell, and `range_condition_number` is the figure that means something.
        """
        self._lower_end("condition_number")
        if self.at_precision_floor:
            warn(
                f"the condition number {self._ratio():.3g} is at the floor of {self._precision}: above "
                f"{condition_limit(self.dtype, self.computed_in):.2g} it is noise. Compute the kernel with "
                "dtype=torch.float64, or read eigenvalues and range_condition_number instead.",
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

    @property
    def _precision(self) -> str:
        return str(self.dtype) if self.computed_in is None else f"derivatives in {self.computed_in}"

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
