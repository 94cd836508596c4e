"""Outputs in the course of training, as the kernel predicts them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ntk.analytic.precision import Array, read_only
from ntk.display import figure_svg, html_figure

if TYPE_CHECKING:
    import xarray

_DRAWN_DECADES = 1e-4
_MARKED_POINTS = 30


@dataclass(frozen=True, eq=False, repr=False)
class Trajectory:
    """Outputs at given times of training, and what is left of each eigenmode of the error.

    The axes n and C are missing where one time or targets [m] were given.

    Attributes:
        grid: Times under gradient flow, numbers of steps under gradient descent, [] or [n].
        learning_rate: Step size η, or None under gradient flow.
        train: Outputs on the training points [n, m, C].
        test: Outputs on the test points [n, t, C]; None without test points.
        mode_residuals: ⟨u_k, f − y⟩, modes in the order of descending eigenvalues [n, m, C].
        loss: ½ Σ (f − y)² over examples and outputs, or that over m if the dynamics are averaged, [] or [n].
    """

    grid: Array
    learning_rate: float | None
    train: Array
    test: Array | None
    mode_residuals: Array
    loss: Array

    def __post_init__(self) -> None:
        """Make every array a read-only float64 copy."""
        for name in ("grid", "train", "test", "mode_residuals", "loss"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, read_only(getattr(self, name)))

    @property
    def unit(self) -> str:
        """What the grid counts: "time" or "step"."""
        return "time" if self.learning_rate is None else "step"

    def summary(self) -> str:
        """Kind of training, range and losses in one line."""
        method = "gradient flow" if self.learning_rate is None else f"gradient descent at {self.learning_rate:.6g}"
        grid, loss = np.atleast_1d(self.grid), np.atleast_1d(self.loss)
        return f"{method}, {self.unit} {grid[0]:g} to {grid[-1]:g}; loss {loss[0]:.6g} to {loss[-1]:.6g}"

    def to_dataset(self) -> "xarray.Dataset":
        """The outputs, residuals and losses as an xarray dataset."""
        import xarray

        along = [self.unit] * self.grid.ndim
        behind = ["output"] * (self.mode_residuals.ndim - self.grid.ndim - 1)
        variables = {
            "train": ([*along, "example", *behind], self.train),
            "mode_residuals": ([*along, "mode", *behind], self.mode_residuals),
            "loss": (along, self.loss),
        }
        if self.test is not None:
            variables["test"] = ([*along, "test_example", *behind], self.test)
        attributes = {} if self.learning_rate is None else {"learning_rate": self.learning_rate}
        return xarray.Dataset(variables, coords={self.unit: (along, self.grid)}, attrs=attributes)

    def draw(self, modes: int, caption: str) -> str:
        """Draw what is left of the leading modes, root mean square over outputs, on a logarithmic axis.

        Args:
            modes: How many modes to draw.
            caption: Plain text below the drawing.

        Returns:
            An HTML figure.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5.4, 3.0), layout="constrained")
        axes = figure.subplots()
        grid = np.atleast_1d(self.grid)
        left = np.sqrt((self.mode_residuals.reshape(len(grid), self.train.shape[self.grid.ndim], -1) ** 2).mean(-1))
        shown = left[:, :modes]
        lowest = _DRAWN_DECADES * shown.max()
        seen = shown > lowest
        style = ".-" if len(grid) <= _MARKED_POINTS else "-"
        for index, curve in enumerate(shown.T):
            below = "" if seen[:, index].any() or not lowest else " (below)"
            axes.plot(grid, np.where(curve > 0, curve, np.nan), style, markersize=4, label=f"mode {index + 1}{below}")
        if lowest > 0:
            axes.set_yscale("log")
            axes.set_ylim(bottom=shown[seen].min() / 2, top=2 * shown.max())
        axes.set(xlabel=self.unit, ylabel="|⟨u, f − y⟩|")
        figure.legend(loc="outside right upper", frameon=False)
        return html_figure(figure_svg(figure), caption)

    def __repr__(self) -> str:
        """Kind of training, range and losses."""
        return f"Trajectory({self.summary()})"

    def _repr_html_(self) -> str:
        """Drawing of the leading modes."""
        return self.draw(5, self.summary())
