"""The picture of a decision: where the measured interval lies against what the claim predicts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from diagnostics.plots.style import INK, PALETTE, canvas, scale, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from diagnostics.claims.claim import Prediction
    from diagnostics.statistics import Estimate


def interval_figure(
    prediction: Prediction, measured: Estimate, control: Estimate | None = None, theory: float = math.nan
) -> Figure:
    """Draws the measured interval, the control's and the value of theory over the predicted region.

    The axis is logarithmic when all numbers are positive and span more than a factor of 50.

    Args:
        prediction: What the claim predicts: the shaded region.
        measured: The measured statistic.
        control: The statistic of the negative control.
        theory: The statistic in theory; NaN draws nothing.
    """
    rows = [("measured", measured, PALETTE[0])] + ([] if control is None else [("control", control, PALETTE[1])])
    ends = [end for _, estimate, _ in rows for end in (*estimate.interval, estimate.value)]
    seen = [v for v in (*ends, prediction.low, prediction.high, theory) if math.isfinite(v)] or [0.0]
    logarithmic = min(seen) > 0 and max(seen) / min(seen) > 50
    low, high = _limits(min(seen), max(seen), logarithmic=logarithmic)
    with styled():
        figure, axes = canvas(0.62 + 0.24 * len(rows))
        if logarithmic:
            axes.set_xlim(low, high)
            scale(axes, "x", "log")
        axes.set_xlim(low, high)
        _region(axes, prediction, low, high)
        if math.isfinite(theory):
            axes.axvline(theory, color=INK, linewidth=1.0, linestyle=(0, (2, 2)), label="theory")
        for position, (_, estimate, colour) in enumerate(rows):
            start, end = estimate.interval
            if math.isfinite(start) and math.isfinite(end):
                axes.plot([start, end], [position, position], color=colour, linewidth=2.4, solid_capstyle="round")
            axes.plot([estimate.value], [position], color=colour, marker="o", markersize=5.5, linestyle="none")
        axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.spines["left"].set_visible(False)
        axes.spines["bottom"].set_alpha(0.55)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside upper right", ncols=len(labels), handlelength=1.6, borderaxespad=0.1
        )
    return figure


def _region(axes: Axes, prediction: Prediction, low: float, high: float) -> None:
    """Shades the predicted region; a point is a line."""
    if prediction.low == prediction.high:
        axes.axvline(prediction.low, color=PALETTE[3], linewidth=2.2, alpha=0.8, label="claim")
    else:
        axes.axvspan(
            max(prediction.low, low),
            min(prediction.high, high),
            color=PALETTE[3],
            alpha=0.28,
            linewidth=0,
            label="claim",
        )


def _limits(low: float, high: float, *, logarithmic: bool) -> tuple[float, float]:
    """The range of the axis: what is seen and a margin, room for an open end included."""
    if logarithmic:
        margin = (high / low) ** 0.12
        return low / margin, high * margin
    margin = 0.12 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin
