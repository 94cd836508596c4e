"""Phase diagrams: where in the plane of weight and bias variance a deep network is ordered, critical or chaotic."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import elementwise

from ntk.analytic.activations import DualActivation, dual_activation
from ntk.analytic.closed_forms import Forms
from ntk.analytic.maps import correlation_map, depth_scale, settled_correlation
from ntk.analytic.norms import layer_moment, require_norm, require_variance
from ntk.analytic.precision import Array, read_only
from ntk.analytic.variance import LARGEST, settled_variance
from ntk.display import figure_svg, html_figure

if TYPE_CHECKING:
    import xarray
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

TOLERANCE = 1e-9
"""A point is called critical where χ1 is this near to one."""

PHASES = ("ordered", "critical", "chaotic")
"""The phases, in ascending order of χ1."""

_WEIGHTS: Array = np.linspace(0.06, 4.0, 60)
_BIASES: Array = np.linspace(0.0, 1.0, 41) ** 2  # equidistant deviations: critical lines are flat near zero

_ORDERED, _CHAOTIC = "#a6cee8", "#f5c27a"  # blue and orange: told apart by every kind of colour vision
_LINE = "#222222"
_TOUCHED = 0.01  # a cell of the grid is hatched from its first corner on: no strip is left beside the critical line
_NAMES = {"none": "plain", "weight_mean": "weight mean", "batch_norm": "batch norm, large batch"}


@dataclass(frozen=True, eq=False)
class PhaseDiagram:
    """What a deep network does over a grid of weight and bias variances (docs/mathematics.md §3.4).

    The phase is that of gradients: ordered where χ1 < 1, chaotic where χ1 > 1. All is taken at the variance q* to which
    unit variance is drawn. Where that is 0 or infinite, χ1 and c* are their limits: those of the asymptote of φ at
    infinity (ReLU for GELU and SiLU; for polynomials, which have none, their value at variance 1e12), those of the
    linear map φ'(0)z at zero, for which every correlation is fixed and c* is NaN. Homogeneous activations know no
    difference. Under "batch_norm" (the population limit) both variances cancel, and the diagram is uniform.

    Attributes:
        norm: Normalization.
        activation: Name of the activation.
        sigma_w2: Weight variances [n_w], ascending.
        sigma_b2: Bias variances [n_b], ascending.
        variance: q* [n_b, n_w]; 0 where it vanishes, infinite where it grows without bound.
        chi_1: χ1 = σw² E[φ'²] [n_b, n_w].
        correlation: Stable fixed point c* of the correlation map [n_b, n_w].
        correlation_depth: ξ_c = −1/ln T'(c*) in layers [n_b, n_w]; infinite where the approach is a power law.
        gradient_depth: ξ_∇ = 1/|ln χ1| in layers [n_b, n_w].
        phase: "ordered", "critical" or "chaotic" [n_b, n_w]; critical within 1e−9 of χ1 = 1.
    """

    norm: str
    activation: str
    sigma_w2: Array = field(repr=False)
    sigma_b2: Array = field(repr=False)
    variance: Array = field(repr=False)
    chi_1: Array = field(repr=False)
    correlation: Array = field(repr=False)
    correlation_depth: Array = field(repr=False)
    gradient_depth: Array = field(repr=False)
    phase: np.ndarray = field(repr=False)
    _dual: DualActivation = field(repr=False)

    def critical_line(self) -> Array:
        """Return the lowest σw² of the grid's range at which χ1 passes one, for each σb².

        Returns:
            Weight variances [n_b]; NaN where χ1 does not pass one, as under "batch_norm".
        """
        line = np.full(self.sigma_b2.shape, np.nan)
        if self.norm == "batch_norm":
            return line
        beyond = self.chi_1 - 1 > 0
        passes = beyond[:, :-1] != beyond[:, 1:]
        rows = np.flatnonzero(passes.any(axis=1))
        left = passes[rows].argmax(axis=1)

        def excess(sigma_w2: Array, sigma_b2: Array) -> Array:
            variance = settled_variance(self._dual, self.norm, sigma_w2, sigma_b2)
            return sigma_w2 * _slope_moment(self._dual, variance) - 1

        ends = self.sigma_w2[left], self.sigma_w2[left + 1]
        if rows.size:
            line[rows] = elementwise.find_root(excess, ends, args=(self.sigma_b2[rows],)).x
        return line

    def to_dataset(self) -> "xarray.Dataset":
        """The diagram as an xarray dataset over sigma_b2 and sigma_w2, its convention in the attributes."""
        import xarray

        names = ("variance", "chi_1", "correlation", "correlation_depth", "gradient_depth", "phase")
        variables: dict = {name: (("sigma_b2", "sigma_w2"), getattr(self, name)) for name in names}
        variables["critical_sigma_w2"] = ("sigma_b2", self.critical_line())
        coordinates = {"sigma_b2": self.sigma_b2, "sigma_w2": self.sigma_w2}
        convention = {"norm": self.norm, "activation": self.activation, "tolerance": TOLERANCE}
        return xarray.Dataset(variables, coordinates, convention)

    def plot(self, axes: "Axes | None" = None) -> "Axes":
        """Draw the phases, the critical line, and hatch where the variance has no positive, finite fixed point.

        Args:
            axes: Where to draw; None for a figure of its own.

        Returns:
            The axes.
        """
        return _draw(self, axes)

    def _repr_html_(self) -> str:
        """Picture of the diagram, with its convention."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5.2, 3.9), layout="constrained")
        self.plot(figure.subplots())
        uniform = " Both variances cancel under batch norm." if self.norm == "batch_norm" else ""
        return html_figure(figure_svg(figure), f"Phases of {self.activation}, norm {self.norm!r}, by χ1.{uniform}")


def _slope_moment(dual: DualActivation, variance: Array) -> Array:
    """Return E[φ'²] at the given variances, some of which may be infinite: there of the asymptote, if there is one."""
    one = np.ones_like(variance)
    moment = dual.derivative(one, *[np.minimum(variance, LARGEST)] * 2)
    if dual.asymptote is None:
        return moment
    return np.where(np.isinf(variance), dual.asymptote.derivative(one, one, one), moment)


def _correlation_and_slope(
    dual: DualActivation | Forms, norm: str, q: Array, sigma_w2: Array, sigma_b2: Array
) -> tuple[Array, Array]:
    """Return c* and T'(c*) [k] of layers at variances q [k]; every correlation is fixed if T is the identity."""
    one = np.ones_like(q)
    out = sigma_w2 * layer_moment(dual, norm, one, q, q) + sigma_b2
    affine = np.abs(dual.derivative(0 * q, q, q) - dual.derivative(one, q, q)) == 0
    fixed = settled_correlation(dual, norm, q, sigma_w2, sigma_b2)
    slope = sigma_w2 * dual.derivative(fixed, q, q) * q / out
    return np.where(affine & (sigma_b2 == 0), np.nan, fixed), slope


def _settle(dual: DualActivation, norm: str, variance: Array, sigma_w2: Array, sigma_b2: Array) -> tuple[Array, Array]:
    """Return c* and T'(c*) [k], in the limit of the variance where it is 0 or infinite."""
    correlation, slope = np.full_like(variance, np.nan), np.ones_like(variance)
    inner = (variance > 0) & np.isfinite(variance)
    outer = np.isinf(variance) | ((variance == 0) & dual.homogeneous)
    correlation[inner], slope[inner] = _correlation_and_slope(
        dual, norm, variance[inner], sigma_w2[inner], sigma_b2[inner]
    )
    scale = np.ones(int(outer.sum()))
    if dual.asymptote is not None:
        shape = _correlation_and_slope(dual.asymptote, norm, scale, scale, 0 * scale)
    else:
        shape = _correlation_and_slope(dual, norm, LARGEST * scale, sigma_w2[outer], sigma_b2[outer])
    correlation[outer], slope[outer] = shape
    return correlation, slope


def _require_grid(parameter: str, values: ArrayLike, *, positive: bool) -> Array:
    """Return a grid of variances.

    Raises:
        ValueError: If it is not a list of at least two ascending variances.
    """
    grid = np.atleast_1d(np.asarray(values, dtype=np.float64))
    if grid.ndim != 1 or grid.size < 2 or not np.all(np.diff(grid) > 0):
        raise ValueError(
            f"{parameter}: must be a list of at least two variances in ascending order; received shape "
            f"{np.shape(values)}, {values!r}. Pass np.linspace(low, high, 50), or take ntk.analytic.correlation_map "
            "for a single point."
        )
    for value in (grid[0], grid[-1]):
        require_variance(parameter, float(value), positive=positive)
    return read_only(grid)


def phase_diagram(
    norm: str = "none",
    activation: str | DualActivation = "relu",
    sigma_w2: ArrayLike | None = None,
    sigma_b2: ArrayLike | None = None,
) -> PhaseDiagram:
    """Return the phases of an infinitely deep and wide network over a grid of variances.

    The ordered and chaotic phases are those of Poole et al. (2016) and Schoenholz et al. (2017); for weight mean see
    docs/mathematics.md §4.2.

    Args:
        norm: "none", "weight_mean" or "batch_norm" (the population limit).
        activation: Name of the activation, see :func:`ntk.analytic.dual_activation`; or a dual activation.
        sigma_w2: Weight variances, positive and ascending; None for 60 up to 4.
        sigma_b2: Bias variances, ascending; None for 41 up to 1, denser near zero.

    Returns:
        The diagram.

    Raises:
        ValueError: If a name is unknown, or a grid is not ascending or out of range.
    """
    require_norm(norm)
    dual = dual_activation(activation)
    weights = _require_grid("sigma_w2", _WEIGHTS if sigma_w2 is None else sigma_w2, positive=True)
    biases = _require_grid("sigma_b2", _BIASES if sigma_b2 is None else sigma_b2, positive=False)
    shape = biases.size, weights.size
    if norm == "batch_norm":
        transfer = correlation_map(norm, dual)
        one = np.ones(shape)
        variance, weight, bias = one, transfer.sigma_w2 * one, 0 * one
    else:
        bias, weight = np.meshgrid(biases, weights, indexing="ij")
        variance = settled_variance(dual, norm, weight, bias)
    chi_1 = weight * _slope_moment(dual, variance)
    correlation, slope = _settle(dual, norm, *(item.ravel() for item in (variance, weight, bias)))
    order = np.where(np.abs(chi_1 - 1) <= TOLERANCE, 1, np.where(chi_1 < 1, 0, 2))
    phase = np.array(PHASES)[order]
    phase.flags.writeable = False
    return PhaseDiagram(
        norm=norm,
        activation=dual.name,
        sigma_w2=weights,
        sigma_b2=biases,
        variance=read_only(variance),
        chi_1=read_only(chi_1),
        correlation=read_only(correlation.reshape(shape)),
        correlation_depth=read_only(depth_scale(slope).reshape(shape)),
        gradient_depth=read_only(depth_scale(chi_1)),
        phase=phase,
        _dual=dual,
    )


def _draw(diagram: PhaseDiagram, axes: "Axes | None") -> "Axes":
    """Draw a phase diagram into axes, or into a figure of its own."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    if axes is None:
        axes = Figure(figsize=(5.2, 3.9), layout="constrained").subplots()
    x, y = diagram.sigma_w2, diagram.sigma_b2
    handles: list[Artist] = []
    sign = np.clip(diagram.chi_1 - 1, -1, 1)
    axes.contourf(x, y, sign, levels=[-2, 0, 2], colors=[_ORDERED, _CHAOTIC])
    for name, colour, there in (("ordered", _ORDERED, sign < 0), ("chaotic", _CHAOTIC, sign > 0)):
        if there.any():
            handles.append(Patch(facecolor=colour, label=f"{name}: {'χ₁ < 1' if name == 'ordered' else 'χ₁ > 1'}"))
    line = diagram.critical_line()
    if np.isfinite(line).any():
        handles += axes.plot(line, y, color=_LINE, linewidth=2, label="critical: χ₁ = 1")
    fates = {"///": ("variance grows without bound", np.inf), "\\\\\\\\\\\\": ("variance vanishes", 0.0)}
    for hatch, (name, fate) in fates.items():
        there = diagram.variance == fate
        if (there[:-1, :-1] & there[1:, :-1] & there[:-1, 1:] & there[1:, 1:]).any():
            axes.contourf(x, y, there, levels=[_TOUCHED, 1.5], colors="none", hatches=[hatch])
            handles.append(Patch(facecolor="none", edgecolor=_LINE, hatch=hatch, linewidth=0, label=name))
        elif there.any():  # a line, such as σb² = 0, has no area to hatch
            row, column = np.nonzero(there)
            handles += axes.plot(x[column], y[row], ".", color=_LINE, markersize=5, clip_on=False, label=name)
    axes.set(xlabel="weight variance σ$_w^2$", ylabel="bias variance σ$_b^2$", xlim=(x[0], x[-1]), ylim=(y[0], y[-1]))
    axes.set_title(f"{diagram.activation}, {_NAMES[diagram.norm]}", fontsize="medium")
    axes.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, fontsize="small", frameon=False
    )
    return axes
