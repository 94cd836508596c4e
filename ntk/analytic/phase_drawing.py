"""The picture of a phase diagram."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

    from ntk.analytic.phases import PhaseDiagram

_ORDERED, _CHAOTIC = "#a6cee8", "#f5c27a"  # blue and orange: told apart by every kind of colour vision
_LINE = "#222222"
_TOUCHED = 0.01  # a cell of the grid is hatched from its first corner on: no strip is left beside the critical line
_NAMES = {"none": "plain", "weight_mean": "weight mean", "batch_norm": "batch norm, large batch"}


def draw_phases(diagram: "PhaseDiagram", axes: "Axes | None" = None) -> "Axes":
    """Draw a phase diagram.

    Args:
        diagram: What to draw.
        axes: Where; None for a figure of its own.

    Returns:
        The axes.
    """
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
