"""Makers of the pictures of claims: frozen callables from (measurement, theory) to a figure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from diagnostics.measurement import Measurement
from diagnostics.plots.series import Series, numbers, series
from diagnostics.plots.style import (
    DASHES,
    INK,
    MARKERS,
    PALETTE,
    canvas,
    dress,
    legend,
    power,
    scale,
    short,
    styled,
    whole,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from diagnostics.claims.claim import Theory


REFERENCE_LINE: dict[str, Any] = {"color": INK, "alpha": 0.6, "linewidth": 0.9, "linestyle": (0, (4, 3))}
"""How a line of reference is drawn."""


@dataclass(frozen=True)
class Curve:
    """Points with intervals along a numeric axis, and the curves of theory over them.

    A curve of :attr:`Theory.curves` whose label names a series takes its colour; the others are drawn in ink. A value
    that is not finite is marked with a cross at the top edge.

    Attributes:
        x_axis: Axis of the measurement along which the points run.
        series_axis: Axis that tells the series apart; None for a single series.
        select: Coordinates at which the remaining axes are held.
        xlabel: Label of the abscissa; the axis name when empty.
        ylabel: What is drawn; the quantity and its unit when empty.
        xscale: "linear" or "log".
        yscale: "linear" or "log".
        reference: Height of a horizontal line of reference.
        reference_label: What it stands for.
    """

    x_axis: str
    series_axis: str | None = None
    select: Mapping[str, Any] = field(default_factory=dict)
    xlabel: str = ""
    ylabel: str = ""
    xscale: str = "linear"
    yscale: str = "linear"
    reference: float | None = None
    reference_label: str = ""

    def __call__(self, measurement: Measurement, theory: Theory | None = None) -> Figure:
        """Draws the measurement, with theory where it is given."""
        rows = series(measurement, self.x_axis, self.series_axis, self.select)
        x = numbers(measurement, self.x_axis)
        with styled():
            figure, axes = canvas(3.1)
            colours = _points(axes, x, rows)
            _curves(axes, {} if theory is None else theory.curves, rows, colours)
            if self.reference is not None:
                axes.axhline(self.reference, label=self.reference_label or None, **REFERENCE_LINE)
            if len(x) == 1:
                axes.set_xlim(*_around(float(x[0])))
            axes.margins(0.04, 0.07)
            whole(axes, tuple(x.tolist()))
            scale(axes, "x", self.xscale, tuple(x.tolist()))
            scale(axes, "y", self.yscale)
            _overflow(axes, x, rows, colours)
            dress(axes, xlabel=self.xlabel or self.x_axis, ylabel=self.ylabel or quantity(measurement))
            legend(figure, axes)
        return figure


@dataclass(frozen=True)
class Bars:
    """Horizontal bars along an axis of names, grouped by a second one, with the value at the end of each.

    A curve of :attr:`Theory.curves` gives (position on the axis, value) pairs, drawn as ticks across the bars.

    Attributes:
        axis: Axis of the measurement whose coordinates are named on the left.
        series_axis: Axis that tells the bars of a group apart; None for one bar per name.
        select: Coordinates at which the remaining axes are held.
        label: What the bars show; the quantity and its unit when empty.
        scale: "linear" or "log".
        reference: Position of a vertical line of reference.
        reference_label: What it stands for.
    """

    axis: str
    series_axis: str | None = None
    select: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
    scale: str = "linear"
    reference: float | None = None
    reference_label: str = ""

    def __call__(self, measurement: Measurement, theory: Theory | None = None) -> Figure:
        """Draws the measurement, with theory where it is given."""
        rows = series(measurement, self.axis, self.series_axis, self.select)
        names = [short(c) for c in measurement.axes[self.axis]]
        thickness = 0.78 / len(rows)
        with styled():
            figure, axes = canvas(max(1.5, 0.75 + 0.2 * len(names) * (len(rows) + 0.6) + 0.2 * len(rows)))
            positions = np.arange(len(names), dtype=np.float64)
            for index, row in enumerate(rows):
                offset = (index - (len(rows) - 1) / 2) * thickness
                _bars(axes, positions + offset, thickness * 0.9, row, PALETTE[index % len(PALETTE)])
            for label, (x, y) in ({} if theory is None else theory.curves).items():
                axes.plot(
                    y, x, linestyle="none", marker="|", markersize=13, markeredgewidth=1.6, color=INK, label=label
                )
            if self.reference is not None:
                axes.axvline(self.reference, label=self.reference_label or None, **REFERENCE_LINE)
            axes.set_yticks(positions, names)
            axes.tick_params(axis="y", length=0)
            axes.set_ylim(len(names) - 0.45, -0.55)
            axes.margins(x=0.14)
            scale(axes, "x", self.scale)
            dress(axes, xlabel="", ylabel=self.label or quantity(measurement), grid="x")
            axes.spines["left"].set_visible(False)
            legend(figure, axes)
        return figure


def spectrum_plot(
    axis: str, series_axis: str | None = None, select: Mapping[str, Any] | None = None, *, ylabel: str = "eigenvalue"
) -> Curve:
    """A maker of spectra: eigenvalues on a logarithmic scale against their rank.

    Args:
        axis: Axis of the measurement that counts the eigenvalues.
        series_axis: Axis that tells the spectra apart; None for one spectrum.
        select: Coordinates at which the remaining axes are held.
        ylabel: What the eigenvalues are of.
    """
    return Curve(axis, series_axis, select or {}, "rank", ylabel, "linear", "log")


def quantity(measurement: Measurement) -> str:
    """The measured quantity with its unit, as a figure says it."""
    return measurement.quantity if measurement.unit in ("1", "") else f"{measurement.quantity} ({measurement.unit})"


def _points(axes: Axes, x: np.ndarray, rows: list[Series]) -> list[str]:
    """Draws each series as points with intervals and gives the colours it used."""
    colours = [PALETTE[index % len(PALETTE)] for index in range(len(rows))]
    for index, (row, colour) in enumerate(zip(rows, colours, strict=True)):
        finite = np.isfinite(row.y)
        half = None if row.half is None else np.where(np.isfinite(row.half), row.half, 0.0)[finite]
        suffix = "" if half is None else " (±4 s.e.)"
        axes.errorbar(
            x[finite],
            row.y[finite],
            yerr=half,
            linestyle="none",
            marker=MARKERS[index % len(MARKERS)],
            markersize=4.6 if len(x) <= 30 else 3.0,
            color=colour,
            markeredgewidth=0,
            elinewidth=1.1,
            zorder=3,
            label=(row.label or "measured") + (suffix if len(rows) == 1 else ""),
        )
    return colours


def _curves(
    axes: Axes, curves: Mapping[str, tuple[np.ndarray, np.ndarray]], rows: list[Series], colours: list[str]
) -> None:
    """Draws the curves of theory: in the colour of the series they name, otherwise in ink with a dash of their own."""
    matched, plain = False, 0
    for label, (x, y) in curves.items():
        owner = next((index for index, row in enumerate(rows) if label in row.names), None)
        if owner is not None:
            axes.plot(x, y, color=colours[owner], linewidth=1.2, zorder=2)
            matched = True
        else:
            axes.plot(
                x,
                y,
                color=INK,
                linewidth=1.1,
                alpha=0.8,
                zorder=2,
                linestyle="-" if plain == 0 else DASHES[(plain - 1) % len(DASHES)],
                label=label,
            )
            plain += 1
    if matched:
        axes.plot([], [], color=INK, linewidth=1.2, label="line: theory")


def _overflow(axes: Axes, x: np.ndarray, rows: list[Series], colours: list[str]) -> None:
    """Marks the values that are not finite with a cross at the top edge."""
    label: str | None = "not finite"
    for row, colour in zip(rows, colours, strict=True):
        lost = ~np.isfinite(row.y)
        if lost.any():
            axes.plot(
                x[lost], np.full(int(lost.sum()), 0.985), transform=axes.get_xaxis_transform(), linestyle="none",
                marker="x", markersize=5, color=colour, clip_on=False, label=label,
            )  # fmt: skip
            label = None


def _bars(axes: Axes, positions: np.ndarray, thickness: float, row: Series, colour: str) -> None:
    """Draws one bar per name with its interval and its value."""
    values = np.where(np.isfinite(row.y), row.y, 0.0)
    axes.barh(
        positions,
        values,
        height=thickness,
        color=colour,
        xerr=row.half,
        ecolor=INK,
        error_kw={"elinewidth": 0.9},
        label=row.label or None,
    )
    halves = np.zeros_like(values) if row.half is None else row.half
    for position, value, half in zip(positions, row.y, halves, strict=True):
        text = _amount(float(value))
        end = value + np.copysign(half, value) if np.isfinite(value) else 0.0
        axes.annotate(
            text, (end, position), xytext=(4 if end >= 0 else -4, 0), textcoords="offset points", va="center",
            ha="left" if end >= 0 else "right", fontsize=8,
        )  # fmt: skip


def _amount(value: float) -> str:
    """A value at the end of its bar."""
    if not np.isfinite(value) or abs(value) < 1000:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) < 1e6 else power(float(f"{value:.2e}"))


def _around(value: float) -> tuple[float, float]:
    """Limits around a single abscissa."""
    return (value / 2, value * 2) if value > 0 else (value - 1, value + 1)
