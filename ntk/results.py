"""A kernel that states its convention."""

from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field, replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from ntk.display import html_figure, kernel_svg
from ntk.errors import ConventionError

if TYPE_CHECKING:
    import xarray

CONVENTION = ("kind", "axes", "reduce", "parametrization", "multipliers", "projection", "mode", "statistics")
"""The fields in which two kernels must agree before they may be added or subtracted."""

REDUCTIONS = ("none", "trace", "sum")
"""Of an NTK over its outputs."""

AXES = {
    "none": ("example", "example", "output", "output"),
    "trace": ("example", "example"),
    "sum": ("example", "example"),
    "mean": ("example", "example"),
}
"""Axes that belong to each reduction; "mean" is the average over units of an NNGP kernel."""


@dataclass(frozen=True, eq=False, repr=False)
class KernelResult:
    """Values of a kernel together with everything that says what they mean.

    Attributes:
        values: [n1, n2, o, o] for reduce="none", else [n1, n2]; float32 or float64, read-only.
        kind: "ntk" or "nngp".
        axes: Names of the axes of `values`.
        reduce: "none"; "trace", the mean over outputs of the diagonal; "sum", the kernel of the summed output; "mean",
            the average over the units of a layer (NNGP).
        symmetric: Whether rows and columns are the same batch, so that `values` is a Gram matrix.
        parametrization: "standard", gradients by the stored weights, or "scaled", with a multiplier for each parameter.
        multipliers: (parameter name, multiplier) for each parameter under "scaled", else None.
        projection: Name of the projection applied to the Jacobian, or None.
        mode: "train", "eval", "mixed" or "no batch statistics".
        statistics: How batch statistics enter, such as "differentiated, one batch" or "running"; None without any.
        layer: Module that this is the kernel or the share of, or None for the network.
        standard_error: Of each value if they are a Monte-Carlo average, else None.
        seed: Of a Monte-Carlo average, else None.
        computed_in: Type of the derivatives that `values` are products of, where that is narrower; else None.
        by_jacobian: Parameters whose share was contracted from their Jacobian, or None if that was no choice.
        implementation: "structured", "jacobian_contraction" or "ntk_vector_products"; None where there was no choice.
        notes: What was done to the model beyond running it, such as taking torch.compile off.
        versions: Package -> version that computed it.
        verified: Whether `values` are known to be the Gram matrix that `symmetric` says they are, and need not be
            looked through. Not kept.

    Raises:
        ValueError: A field does not fit the others.
    """

    values: np.ndarray
    kind: str
    axes: tuple[str, ...]
    reduce: str
    symmetric: bool
    mode: str
    parametrization: str = "standard"
    multipliers: tuple[tuple[str, float], ...] | None = None
    projection: str | None = None
    statistics: str | None = None
    layer: str | None = None
    standard_error: np.ndarray | None = None
    seed: int | None = None
    computed_in: np.dtype | None = None
    by_jacobian: tuple[str, ...] | None = None
    implementation: str | None = None
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    verified: InitVar[bool] = False

    def __post_init__(self, verified: bool) -> None:
        """Check the fields against each other, and copy the arrays that could still be written to."""
        _one_of("kind", self.kind, ("ntk", "nngp"))
        _one_of("reduce", self.reduce, tuple(AXES))
        _one_of("parametrization", self.parametrization, ("standard", "scaled"))
        _one_of("mode", self.mode, ("train", "eval", "mixed", "no batch statistics"))
        object.__setattr__(self, "axes", tuple(self.axes))
        for name in ("values", "standard_error"):
            array = getattr(self, name)
            if array is not None and (not isinstance(array, np.ndarray) or array.flags.writeable):
                array = np.array(array, order="C")
                array.setflags(write=False)
                object.__setattr__(self, name, array)
        self._check_shape()
        if self.symmetric and not verified:
            self._check_symmetry()

    def _check_shape(self) -> None:
        shape = self.values.shape
        if self.values.dtype not in (np.float32, np.float64):
            raise ValueError(f"values must be float32 or float64, got {self.values.dtype}; convert them first.")
        if self.axes != AXES[self.reduce] or len(shape) != len(self.axes):
            raise ValueError(
                f"axes must be {AXES[self.reduce]} for reduce={self.reduce!r}, with one axis of values each; "
                f"got axes {self.axes} and shape {shape}. Transpose the values or name the reduction they have."
            )
        if len(shape) == 4 and shape[2] != shape[3]:
            raise ValueError(f"values must have two equal output axes, [n1, n2, o, o]; got shape {shape}.")
        if self.standard_error is not None and self.standard_error.shape != shape:
            raise ValueError(f"standard_error must have the shape {shape} of values, got {self.standard_error.shape}.")

    def _check_symmetry(self) -> None:
        tolerance = float(np.sqrt(np.finfo(self.values.dtype).eps)) * _largest(self.values)
        if self.shape[0] != self.shape[1] or _asymmetry(self.values) > tolerance:
            raise ValueError(
                f"symmetric=True needs values equal to their transpose over examples and outputs; shape {self.shape} "
                "is not. Pass symmetric=False for a cross kernel."
            )

    @property
    def dtype(self) -> np.dtype:
        """Floating-point type that the values were computed in."""
        return self.values.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the values."""
        return self.values.shape

    @property
    def convention(self) -> dict[str, Any]:
        """The fields in which two kernels must agree to be added."""
        fields = {name: getattr(self, name) for name in CONVENTION}
        return fields | {"layer": self.layer} if self.kind == "nngp" else fields

    def describe(self) -> str:
        """The convention in one line."""
        norm = self.mode if self.statistics is None else f"{self.mode} mode, statistics {self.statistics}"
        parts = [
            f"{self.kind.upper()}{'' if self.layer is None else f' of {self.layer}'} [{', '.join(self.axes)}]",
            f"reduce {self.reduce}",
            f"{self.parametrization} parametrization",
            f"projection {self.projection or 'none'}",
            norm,
            str(self.dtype) if self.computed_in is None else f"{self.dtype} from derivatives in {self.computed_in}",
            *self.notes,
        ]
        return "; ".join(parts)

    def trace_mean(self) -> "KernelResult":
        """The kernel as reduce="trace" gives it: the mean over outputs of the output-diagonal, [n1, n2].

        Raises:
            ConventionError: The outputs were reduced in another way already.
        """
        if self.reduce == "trace":
            return self
        if self.reduce != "none":
            raise ConventionError(
                f"trace_mean needs reduce='none' or 'trace', and got {self.reduce!r}: from the latter "
                "the diagonal over outputs cannot be recovered; compute it with reduce='trace'."
            )
        if self.standard_error is not None:
            raise ConventionError(
                "trace_mean of a Monte-Carlo kernel has no standard error without the covariance between outputs; "
                "average kernels computed with reduce='trace'."
            )
        values = np.einsum("ijkk->ij", self.values) / self.values.shape[2]
        return replace(self, values=values.astype(self.dtype), axes=AXES["trace"], reduce="trace")

    def flatten(self) -> np.ndarray:
        """The values as a matrix [n1*o, n2*o], example-major (row i*o + k); [n1, n2] if the outputs are reduced."""
        if self.reduce != "none":
            return self.values
        n1, n2, o, _ = self.values.shape
        return self.values.transpose(0, 2, 1, 3).reshape(n1 * o, n2 * o)

    def to_dataset(self) -> "xarray.Dataset":
        """The kernel as an xarray dataset, its convention in the attributes, ready for NetCDF or Zarr."""
        import xarray

        dims = ("example", "example_2", "output", "output_2")[: self.values.ndim]
        variables = {"kernel": (dims, self.values)}
        if self.standard_error is not None:
            variables["standard_error"] = (dims, self.standard_error)
        names = ("kind", "reduce", "mode", "parametrization", "projection", "statistics", "layer", "implementation")
        attributes: dict[str, Any] = {name: getattr(self, name) or "" for name in names}
        attributes["symmetric"] = int(self.symmetric)
        attributes["computed_in"] = str(self.computed_in or self.dtype)
        attributes["multipliers"] = "; ".join(f"{name}: {value!r}" for name, value in self.multipliers or ())
        attributes["notes"] = "; ".join(self.notes)
        attributes["versions"] = "; ".join(f"{name} {version}" for name, version in self.versions.items())
        if self.seed is not None:
            attributes["seed"] = self.seed
        return xarray.Dataset(variables, attrs=attributes)

    def _combine(self, other: object, sign: int) -> "KernelResult":
        if not isinstance(other, KernelResult):
            return NotImplemented
        mine, theirs = self.convention, other.convention
        differing = [name for name in mine if mine[name] != theirs.get(name)]
        if differing:
            raise ConventionError(
                f"kernels of two conventions do not add: {', '.join(differing)} differ. One is {self.describe()}. "
                f"The other is {other.describe()}. Recompute one of them in the convention of the other."
            )
        if self.standard_error is not None or other.standard_error is not None:
            raise ConventionError(
                "sums of Monte-Carlo kernels have no standard error without their covariance; combine the kernels of "
                "each seed, then average."
            )
        if self.shape != other.shape:
            raise ConventionError(f"kernels must have one shape to add; got {self.shape} and {other.shape}.")
        dtype = min(self.dtype, other.dtype, key=attrgetter("itemsize"))
        computed_in = self.computed_in or other.computed_in
        if sign < 0 and computed_in is not None:  # a difference is no Gram matrix: its errors are of the narrower type
            dtype = computed_in
        return replace(
            self,
            values=(self.values + sign * other.values).astype(dtype, copy=False),
            computed_in=None if dtype == computed_in else computed_in,
            symmetric=self.symmetric and other.symmetric,
            layer=self.layer if self.layer == other.layer else None,
            implementation=self.implementation if self.implementation == other.implementation else None,
        )

    def __add__(self, other: object) -> "KernelResult":
        """Sum of two kernels of one convention."""
        return self._combine(other, 1)

    def __sub__(self, other: object) -> "KernelResult":
        """Difference of two kernels of one convention."""
        return self._combine(other, -1)

    def __mul__(self, factor: object) -> "KernelResult":
        """The kernel times a number."""
        if not isinstance(factor, int | float | np.integer | np.floating):
            return NotImplemented
        error = None if self.standard_error is None else abs(float(factor)) * self.standard_error
        values, computed_in = self.values * float(factor), self.computed_in
        if factor < 0 and computed_in is not None:
            values, computed_in = values.astype(computed_in), None
        return replace(self, values=values, standard_error=error, computed_in=computed_in)

    __rmul__ = __mul__

    __array_priority__ = 1000.0
    """A NumPy number on the left hands the operation over, so that the convention is kept."""

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        """The plain values, for NumPy.

        Raises:
            ValueError: A view in another dtype was asked for.
        """
        if copy is False and dtype is not None and np.dtype(dtype) != self.dtype:
            raise ValueError(f"a view of {self.dtype} values as {np.dtype(dtype)} needs a copy; leave copy=None.")
        return np.array(self.values, dtype=dtype) if copy else np.asarray(self.values, dtype=dtype)

    def __repr__(self) -> str:
        """Shape and convention."""
        return f"KernelResult({'x'.join(map(str, self.shape))}; {self.describe()})"

    def _repr_html_(self) -> str:
        """Heat map of the matrix, with its convention."""
        return html_figure(kernel_svg(self.flatten()), f"{self.describe()}; shape {self.shape}")


def _largest(values: np.ndarray) -> float:
    """Largest absolute entry, without a temporary array."""
    return float(max(values.max(initial=0.0), -values.min(initial=0.0)))


def _asymmetry(values: np.ndarray) -> float:
    """Largest difference from the transpose over examples and outputs, with the memory of one pair of outputs."""
    if values.ndim == 2:
        values = values[:, :, None, None]
    outputs = range(values.shape[2])
    return max(
        (_largest(values[:, :, a, b] - values[:, :, b, a].T) for a in outputs for b in range(a + 1)), default=0.0
    )


def _one_of(name: str, value: str, admissible: tuple[str, ...]) -> None:
    if value not in admissible:
        raise ValueError(f"{name} must be one of {admissible}, got {value!r}.")
