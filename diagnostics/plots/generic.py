"""What a measurement shows of itself: a drawing chosen by its axes, or its number in words."""

from __future__ import annotations

import hashlib
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from diagnostics.measurement import Measurement
from diagnostics.plots.figures import Bars, Curve, quantity
from diagnostics.plots.series import is_numeric
from diagnostics.plots.style import canvas, dress, short, styled
from diagnostics.plots.svg import to_svg
from diagnostics.statistics import STANDARD_ERRORS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_SERIES = 6
"""As many as the palette tells apart."""


def measurement_figure(measurement: Measurement) -> Figure | None:
    """A drawing chosen by the axes of the measurement; None for a single number.

    A numeric axis gives curves, an axis of names bars, a short second axis the series, two long numeric axes a map.
    Axes beyond these are held at their first coordinate (:func:`measurement_html` says so).
    """
    if not measurement.axes:
        return None
    x, other = _chosen(measurement)
    held = measurement.select(**_held(measurement, x, other))
    if other is not None and len(held.axes[other]) > MOST_SERIES:
        return _map(held, x, other)
    if is_numeric(held.axes[x]) and len(held.axes[x]) > 1:
        return Curve(x, other, yscale=_scale(held))(held)
    return Bars(x, other, scale=_scale(held))(held)


def measurement_html(measurement: Measurement, *, name: str = "") -> str:
    """A fragment of HTML: the drawing where there is one, and a line with quantity, unit and number of replications.

    Args:
        measurement: The measurement.
        name: What tells its drawing from the others of the page; taken from its values when empty.
    """
    what, probe = escape(quantity(measurement)), escape(measurement.probe)
    line = f"<strong>{what}</strong> · probe <code>{probe}</code> · n = {measurement.n}"
    if not measurement.axes:
        error = measurement.standard_error
        half = "" if error is None else f" ± {STANDARD_ERRORS * float(error):.2g} (four standard errors)"
        return f'<div style="max-width: 36em">{line}: {float(measurement.estimate):.6g}{half}</div>'
    fixed = _held(measurement, *_chosen(measurement))
    if fixed:
        line += " · drawn at " + escape(", ".join(f"{axis} = {short(value)}" for axis, value in fixed.items()))
    elif measurement.standard_error is not None:
        line += " · whiskers: four standard errors"
    figure = measurement_figure(measurement)
    drawing = (
        ""
        if figure is None
        else to_svg(figure, name=name or f"measurement-{_fingerprint(measurement)}", title=measurement.quantity)
    )
    return f'<div style="max-width: 36em">{drawing}<div>{line}</div></div>'


def _chosen(measurement: Measurement) -> tuple[str, str | None]:
    """The axis to draw along (the longest numeric one, else the longest), and the one that gives the series."""
    axes = measurement.axes
    numeric = [name for name, values in axes.items() if is_numeric(values) and len(values) > 1]
    x = max(numeric or axes, key=lambda name: len(axes[name]))
    others = [name for name in axes if name != x]
    short_ones = [name for name in others if len(axes[name]) <= MOST_SERIES]
    return x, max(short_ones or others, key=lambda name: len(axes[name])) if others else None


def _held(measurement: Measurement, x: str, other: str | None) -> dict[str, object]:
    return {name: values[0] for name, values in measurement.axes.items() if name not in (x, other)}


def _scale(measurement: Measurement) -> str:
    """Logarithmic where values of one sign, told from zero by their intervals, span a factor of a hundred."""
    error = measurement.standard_error
    lower = measurement.estimate if error is None else measurement.estimate - STANDARD_ERRORS * error
    finite = measurement.estimate[np.isfinite(lower)]
    positive = finite.size and np.nanmin(lower[np.isfinite(lower)]) > 0
    return "log" if positive and finite.max() / finite.min() > 100 else "linear"


def _map(measurement: Measurement, x: str, y: str) -> Figure:
    """The estimates as a map of colours."""
    values = measurement.estimate if list(measurement.axes) == [y, x] else measurement.estimate.T
    with styled():
        figure, axes = canvas(4.0)
        image = axes.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest")
        for axis, name in ((axes.xaxis, x), (axes.yaxis, y)):
            coordinates = measurement.axes[name]
            ticks = np.unique(np.linspace(0, len(coordinates) - 1, min(len(coordinates), 7)).astype(int))
            axis.set_ticks(ticks.tolist(), [short(coordinates[i]) for i in ticks])
        bar = figure.colorbar(image, ax=axes, shrink=0.9)
        bar.outline.set_visible(False)
        dress(axes, xlabel=x, ylabel=f"{quantity(measurement)}, by {y}")
        axes.grid(visible=False)
    return figure


def _fingerprint(measurement: Measurement) -> str:
    """Eight characters that tell this measurement from others, so that two drawings can share a page."""
    digest = hashlib.sha256(measurement.estimate.tobytes())
    digest.update(repr((measurement.probe, measurement.quantity, measurement.axes, measurement.seeds)).encode())
    return digest.hexdigest()[:8]
