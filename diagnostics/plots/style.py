"""How figures look: one palette, one ink, one type size, and no global state touched."""

from __future__ import annotations

import itertools
import math
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"
"""Colour of text and axes. :func:`diagnostics.plots.to_svg` turns it into ``currentColor``; in a PNG it is black."""

PALETTE = ("#1d73c9", "#e07306", "#d61f50", "#30a66b", "#8638fa", "#d56dab")
"""Colours of data: contrast of at least 3 on white and on near-black, told apart under the three colour blindnesses."""

MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("--", ":", "-.", (0, (6, 1.5, 1, 1.5, 1, 1.5)))
WIDTH = 4.7
"""Width of a figure in inches: with 9-point type it reads both on a phone and scaled up on a desktop."""

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def styled() -> AbstractContextManager[None]:
    """The settings under which figures are made and saved; they end with the context."""
    from matplotlib import rc_context

    return rc_context(
        {
            "font.family": ["DejaVu Sans"],
            "font.size": 9.0,
            "axes.titlesize": 9.0,
            "axes.labelsize": 9.0,
            "xtick.labelsize": 8.5,
            "ytick.labelsize": 8.5,
            "legend.fontsize": 8.5,
            "text.color": INK,
            "axes.edgecolor": INK,
            "axes.labelcolor": INK,
            "axes.titlecolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "axes.linewidth": 0.6,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.axisbelow": True,
            "xtick.major.width": 0.6,
            "ytick.major.width": 0.6,
            "xtick.minor.width": 0.4,
            "ytick.minor.width": 0.4,
            "axes.unicode_minus": True,
            "figure.facecolor": "white",
            "axes.facecolor": "none",
            "legend.frameon": False,
            "lines.linewidth": 1.4,
            "svg.fonttype": "none",
        }
    )


def canvas(height: float) -> tuple[Figure, Axes]:
    """An empty figure of the house width with one axes; call it under :func:`styled`.

    Args:
        height: Height in inches.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def short(value: object) -> str:
    """A coordinate as a label: numbers without trailing zeros, anything else as it prints."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:g}"


def power(value: float) -> str:
    """A tick of a logarithmic axis: plain between 0.01 and 10,000, a power of ten otherwise."""
    exponent = math.floor(math.log10(value) + 1e-9)
    mantissa = value / 10.0**exponent
    if -2 <= exponent <= 3:
        return f"{value:g}"
    ten = f"10{str(exponent).translate(_SUPERSCRIPTS)}"
    return ten if abs(mantissa - 1) < 1e-6 else f"{mantissa:g}·{ten}"


def scale(axes: Axes, direction: Literal["x", "y"], kind: str, coordinates: tuple[float, ...] = ()) -> None:
    """Sets the scale of a direction, with ticks in plain characters (no mathematical typesetting).

    Args:
        axes: The axes.
        direction: "x" or "y".
        kind: "linear" or "log".
        coordinates: Positions worth a tick of their own on a logarithmic scale, when they are few.

    Raises:
        ValueError: If the scale is unknown.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

    if kind not in ("linear", "log"):
        raise ValueError(f"scale must be 'linear' or 'log', got {kind!r}")
    if kind == "linear":
        return
    axis = axes.xaxis if direction == "x" else axes.yaxis
    (axes.set_xscale if direction == "x" else axes.set_yscale)("log", nonpositive="clip")
    axis.set_major_formatter(FuncFormatter(lambda value, _: power(value) if value > 0 else ""))
    axis.set_minor_formatter(NullFormatter())
    logs = sorted(math.log10(c) for c in coordinates if c > 0)
    if 2 <= len(logs) <= 7 and min(b - a for a, b in itertools.pairwise(logs)) > 0.12 * (logs[-1] - logs[0]):
        axis.set_major_locator(FixedLocator([10.0**value for value in logs]))
        axis.set_minor_locator(NullLocator())
        return
    low, high = sorted(axis.get_view_interval())
    decades = math.log10(high / low) if low > 0 else 0.0
    axis.set_major_locator(LogLocator(subs=(1.0,) if decades > 2 else (1.0, 2.0, 5.0), numticks=7))


def dress(axes: Axes, *, xlabel: str, ylabel: str, grid: str = "y") -> None:
    """Puts the quantity above the axes, the abscissa below, and a faint grid behind.

    Args:
        axes: The axes.
        xlabel: Label of the abscissa.
        ylabel: What is drawn, written horizontally above the axes.
        grid: Direction of the grid lines: "x", "y" or "both".
    """
    axes.set_xlabel(xlabel)
    axes.set_title(ylabel, loc="left", pad=9)
    axes.grid(axis="both" if grid == "both" else ("x" if grid == "x" else "y"), color=INK, alpha=0.13, linewidth=0.6)
    for spine in axes.spines.values():
        spine.set_alpha(0.55)


def legend(figure: Figure, axes: Axes) -> None:
    """Writes the legend below the axes, points before lines, in as many columns as fit; none without labels."""
    from matplotlib.lines import Line2D

    entries = sorted(
        zip(*axes.get_legend_handles_labels(), strict=True), key=lambda entry: isinstance(entry[0], Line2D)
    )
    if not entries:
        return
    handles, labels = zip(*entries, strict=True)
    one_row = sum(len(label) + 6 for label in labels) <= 66
    columns = len(labels) if one_row else max(1, min(len(labels), 60 // (max(map(len, labels)) + 7)))
    figure.legend(
        handles, labels, loc="outside lower left", ncols=columns, handlelength=1.9, columnspacing=1.4, borderaxespad=0.2
    )


def whole(axes: Axes, coordinates: tuple[float, ...]) -> None:
    """Puts ticks on whole numbers where the abscissa counts something."""
    from matplotlib.ticker import MaxNLocator

    if all(float(c).is_integer() for c in coordinates):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], nbins=8))
