"""Finite against infinite width: how the kernels of a family of networks approach an analytic one."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ntk.display import figure_svg, html_figure
from ntk.errors import ConventionError, NonFiniteKernelError
from ntk.results import KernelResult

if TYPE_CHECKING:
    import xarray

Measure = Callable[[int, int], np.ndarray | KernelResult]
"""(width, seed) to the kernel [n, n] of one network of the family."""


class Slope(NamedTuple):
    """Slope of a logarithm in the logarithm of the width.

    Attributes:
        value: The slope; NaN where it is not resolved.
        standard_error: Of the slope, from the scatter between seeds.
        intercept: The line's value at ln width = 0.
    """

    value: float
    standard_error: float
    intercept: float


_UNRESOLVED = Slope(float("nan"), float("nan"), float("nan"))


@dataclass(frozen=True, eq=False, repr=False)
class WidthStudy:
    """Kernels of networks of several widths and seeds beside the analytic kernel; it passes no verdict.

    Deviations are relative, in the Frobenius norm: ‖K̂ − K‖/‖K‖. All networks are independent, so that standard errors
    come from the scatter between seeds at each width. A single network fluctuates by O(width^−1/2), the mean over
    networks is off by O(width^−1) (docs/mathematics.md §4.4).

    Attributes:
        widths: [w], ascending.
        seeds: The s seeds, the same at each width.
        kernels: Measured [w, s, n, n], float64, read-only.
        analytic: Infinite-width kernel, or the caller's for each width, [w, n, n], float64, read-only.
        source: Convention of the measured kernels in one line.
    """

    widths: tuple[int, ...]
    seeds: tuple[int, ...]
    kernels: np.ndarray = field(repr=False)
    analytic: np.ndarray = field(repr=False)
    source: str = "array"

    def __post_init__(self) -> None:
        """Make the arrays read-only float64 copies."""
        for name in ("kernels", "analytic"):
            array = np.array(getattr(self, name), dtype=np.float64)
            array.setflags(write=False)
            object.__setattr__(self, name, array)

    @cached_property
    def deviation(self) -> np.ndarray:
        """Relative deviation of each network [w, s]."""
        return _norm(self.kernels - self.analytic[:, None]) / _norm(self.analytic)[:, None]

    @property
    def mean_deviation(self) -> np.ndarray:
        """Mean over seeds of the deviation of single networks [w]."""
        return self.deviation.mean(axis=1)

    @property
    def mean_deviation_standard_error(self) -> np.ndarray:
        """Standard error of that mean [w]."""
        return _standard_error(self.deviation)

    @property
    def deviation_of_mean(self) -> np.ndarray:
        """Relative deviation of the kernel averaged over seeds [w]."""
        return _norm(self.bias) / _norm(self.analytic)

    @cached_property
    def bias(self) -> np.ndarray:
        """Mean over seeds of K̂ − K, by entry [w, n, n]."""
        return self.kernels.mean(axis=1) - self.analytic

    @property
    def bias_standard_error(self) -> np.ndarray:
        """Standard error of that mean, by entry [w, n, n]."""
        return _standard_error(self.kernels)

    @property
    def slope(self) -> Slope:
        """Slope of the mean ln deviation of single networks; −1/2 if the analytic kernel is their limit.

        Least squares over the widths; the standard error carries the scatter between seeds through the fit, whatever
        the deviations from a straight line. NaN if a network has no deviation at all.
        """
        if not self.deviation.all():
            return _UNRESOLVED
        logarithm = np.log(self.deviation)
        return _fit(np.array(self.widths), logarithm.mean(axis=1), _standard_error(logarithm))

    @property
    def bias_slope(self) -> Slope:
        """Slope of ln of the bias; −1 if the analytic kernel is the limit.

        The bias is √(‖mean deviation‖² − Σ standard errors²)/‖K‖: the noise of the mean is taken off, without bias.
        Standard errors are the jackknife's over seeds, of which it takes three. NaN unless the bias is above its noise,
        whichever seed is left out, at two widths or more.
        """
        size = len(self.seeds)
        if size < 3:
            return _UNRESOLVED
        squared, left_out = self._squared_bias()
        resolved = (squared > 0) & (left_out > 0).all(axis=1)
        if resolved.sum() < 2:
            return _UNRESOLVED
        error = np.sqrt((size - 1) * (np.log(left_out[resolved]) / 2).var(axis=1))
        return _fit(np.array(self.widths)[resolved], np.log(squared[resolved]) / 2, error)

    def _squared_bias(self) -> tuple[np.ndarray, np.ndarray]:
        """Unbiased estimates of ‖E K̂ − K‖²/‖K‖² [w], and the same without each seed [w, s]; they can be negative."""
        size, scale = len(self.seeds), _norm(self.analytic) ** 2
        centred = self.kernels - self.kernels.mean(axis=1, keepdims=True)
        squares = (centred**2).sum(axis=1)
        squared = (_norm(self.bias) ** 2 - squares.sum(axis=(1, 2)) / (size * (size - 1))) / scale
        # Without a deviation d from the mean over s, the mean moves by −d/(s − 1), the squares by −d² s/(s − 1).
        means = self.bias[:, None] - centred / (size - 1)
        left = squares[:, None] - centred**2 * size / (size - 1)
        noise = left.sum(axis=(2, 3)) / ((size - 1) * (size - 2))
        return squared, (_norm(means) ** 2 - noise) / scale[:, None]

    def summary(self) -> str:
        """The figures in one line."""
        slope, bias = self.slope, self.bias_slope
        shown = "not resolved" if np.isnan(bias.value) else f"{bias.value:.3f} ± {bias.standard_error:.3f}"
        text = (
            f"widths {', '.join(map(str, self.widths))}, {len(self.seeds)} seeds; relative deviation of single "
            f"networks {self.mean_deviation[0]:.3g} to {self.mean_deviation[-1]:.3g}, slope {slope.value:.3f} ± "
            f"{slope.standard_error:.3f} (limit: −0.5); of their mean {self.deviation_of_mean[0]:.3g} to "
            f"{self.deviation_of_mean[-1]:.3g}, bias slope {shown} (limit: −1)"
        )
        return text.replace(" -", " −")

    def to_dataset(self) -> "xarray.Dataset":
        """Kernels and deviations as an xarray dataset, the convention in its attributes."""
        import xarray

        entry = ("example", "example_2")
        slope, bias = self.slope, self.bias_slope
        return xarray.Dataset(
            {
                "kernel": (("width", "seed", *entry), self.kernels),
                "analytic": (("width", *entry), self.analytic),
                "deviation": (("width", "seed"), self.deviation),
                "deviation_of_mean": ("width", self.deviation_of_mean),
                "bias": (("width", *entry), self.bias),
                "bias_standard_error": (("width", *entry), self.bias_standard_error),
            },
            coords={"width": list(self.widths), "seed": list(self.seeds)},
            attrs={
                "source": self.source,
                "slope": slope.value,
                "slope_standard_error": slope.standard_error,
                "bias_slope": bias.value,
                "bias_slope_standard_error": bias.standard_error,
            },
        )

    def __repr__(self) -> str:
        """The figures in one line."""
        return f"WidthStudy({self.summary()})"

    def _repr_html_(self) -> str:
        """Deviations against the width on logarithmic axes, with the figures and the convention."""
        return html_figure(_deviation_svg(self), f"{self.summary()}. {self.source}")


def width_study(
    measure: Measure,
    analytic: np.ndarray | Callable[[int], np.ndarray],
    *,
    widths: Sequence[int],
    seeds: Sequence[int],
    progress: bool = False,
) -> WidthStudy:
    """Measure the kernels of a family of networks and set them beside the analytic kernel.

    Args:
        measure: (width, seed) to the kernel of one network of the family, an array [n, n] or a `KernelResult` with
            reduced outputs, on the same n examples each time; networks must be independent.
        analytic: The infinite-width kernel [n, n]; or a function of the width that returns one, for a theory with
            corrections of finite width.
        widths: Two or more distinct widths, in any order.
        seeds: Two or more distinct seeds; every width is measured with each.
        progress: Report on the standard error stream.

    Returns:
        The kernels with their deviations.

    Raises:
        ValueError: widths or seeds are too few, or a kernel has the wrong shape.
        NonFiniteKernelError: A kernel is not finite.
        ConventionError: The measured kernels have several conventions, or outputs that are not reduced.
    """
    ordered = _distinct("widths", widths, minimum=1)
    chosen = _distinct("seeds", seeds, minimum=None)
    infinite = [_kernel(analytic(width) if callable(analytic) else analytic, "analytic", None) for width in ordered]
    shape = infinite[0].shape
    for kernel in infinite:
        _kernel(kernel, "analytic", shape)
        if not kernel.any():
            raise ValueError("analytic: must not be zero, as deviations are relative to it; pass the kernel itself.")
    measured = np.empty((len(ordered), len(chosen), *shape))
    sources: set[str] = set()
    for i, width in enumerate(ordered):
        for j, seed in enumerate(chosen):
            result = measure(width, seed)
            sources.add(result.describe() if isinstance(result, KernelResult) else "array")
            measured[i, j] = _kernel(result, f"measure({width}, {seed})", shape)
            if progress:
                _report(i * len(chosen) + j + 1, measured.shape[0] * measured.shape[1])
    if len(sources) > 1:
        raise ConventionError(
            f"measure: must return kernels of one convention; received {len(sources)}: {' / '.join(sorted(sources))}. "
            "Compute all of them in the same way."
        )
    return WidthStudy(ordered, chosen, measured, np.stack(infinite), sources.pop())


def _distinct(name: str, values: Sequence[int], *, minimum: int | None) -> tuple[int, ...]:
    """Return two or more distinct integers in ascending order.

    Raises:
        ValueError: They are fewer, not whole numbers, or too small.
    """
    given = list(values) if isinstance(values, Sequence | np.ndarray) and not isinstance(values, str) else []
    whole = all(hasattr(value, "__index__") and not isinstance(value, bool) for value in given)
    numbers = tuple(sorted({int(value) for value in given})) if whole else ()
    if len(numbers) < 2 or len(numbers) != len(given) or (minimum is not None and numbers[0] < minimum):
        kind = "integers" if minimum is None else f"integers of at least {minimum}"
        reason = "a slope needs two widths" if name == "widths" else "a standard error needs two networks of each width"
        raise ValueError(f"{name}: must be two or more distinct {kind}; received {values!r}: {reason}.")
    return numbers


def _kernel(value: np.ndarray | KernelResult, name: str, shape: tuple[int, ...] | None) -> np.ndarray:
    """Return a finite kernel [n, n] in float64.

    Raises:
        ConventionError: Its outputs are not reduced.
        TypeError: It is a pair of kernels.
        ValueError: It is not square, or not of the shape asked for.
        NonFiniteKernelError: It is not finite.
    """
    if isinstance(value, KernelResult) and value.reduce == "none":
        raise ConventionError(
            f"{name}: must be a kernel with reduced outputs, [n, n]; received reduce='none'. Take reduce='trace' or "
            "reduce='sum', or kernel.trace_mean()."
        )
    if hasattr(value, "nngp"):
        raise TypeError(f"{name}: must be one kernel; received {type(value).__name__}, which hold two. Pass its .ntk.")
    matrix = np.asarray(value, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or (shape is not None and matrix.shape != shape):
        wanted = "a square matrix [n, n]" if shape is None else f"of shape {shape}, that of the analytic kernel"
        raise ValueError(f"{name}: must be {wanted}; received shape {matrix.shape}. Use the same examples for both.")
    if not np.isfinite(matrix).all():
        raise NonFiniteKernelError(
            f"{name}: must be finite; {int((~np.isfinite(matrix)).sum())} of {matrix.size} entries are NaN or inf. "
            "Look for overflow at that width."
        )
    return matrix


def _report(done: int, total: int) -> None:
    sys.stderr.write(f"\rwidth study: {done} of {total} networks" + ("\n" if done == total else ""))
    sys.stderr.flush()


def _norm(matrices: np.ndarray) -> np.ndarray:
    return np.sqrt((matrices**2).sum(axis=(-2, -1)))


def _standard_error(samples: np.ndarray) -> np.ndarray:
    """Standard error of the mean over axis 1."""
    return samples.std(axis=1, ddof=1) / np.sqrt(samples.shape[1])


def _fit(widths: np.ndarray, values: np.ndarray, errors: np.ndarray) -> Slope:
    """Least-squares line of values [w] in ln width, with the standard error that independent errors [w] give it."""
    centred = np.log(widths) - np.log(widths).mean()
    weights = centred / (centred**2).sum()
    slope = float(weights @ values)
    error = float(np.sqrt((weights**2) @ errors**2))
    return Slope(slope, error, float(values.mean() - slope * np.log(widths).mean()))


def _deviation_svg(study: WidthStudy) -> str:
    """Draw the deviations, the fitted line and one of slope −1/2 through its middle."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    figure = Figure(figsize=(4.6, 4.0), layout="constrained")
    axes = figure.subplots()
    widths = np.array(study.widths, dtype=np.float64)
    slope = study.slope
    errors = study.mean_deviation_standard_error
    single = axes.errorbar(widths, study.mean_deviation, errors, fmt="o", capsize=2, label="single networks")
    fitted = np.exp(slope.intercept) * widths**slope.value
    figures = f"slope {slope.value:.2f} ± {slope.standard_error:.2f}".replace("-", "−")
    (line,) = axes.plot(widths, fitted, "-", color="C0", label=figures)
    (mean,) = axes.plot(widths, study.deviation_of_mean, "s", color="C1", fillstyle="none", label="their mean")
    middle = np.exp(np.log(widths).mean())
    reference = np.exp(slope.intercept) * middle**slope.value * (widths / middle) ** -0.5
    (half,) = axes.plot(widths, reference, "--", color="0.5", label="slope −0.50")
    axes.set(xscale="log", yscale="log", xlabel="width", ylabel="relative deviation")
    axes.set_xticks(widths, labels=[str(width) for width in study.widths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    figure.legend(handles=[single, mean, line, half], loc="outside lower center", ncols=2, frameon=False)
    return figure_svg(figure)
