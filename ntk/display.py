"""Drawings of kernels and spectra, as SVG text, and tables.

Matplotlib is imported when something is drawn, never before, and only its object interface is used: no backend is
chosen and no global figure is made.
"""

import html
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def kernel_svg(matrix: np.ndarray) -> str:
    """Heat map of a kernel matrix.

    Args:
        matrix: [rows, columns]

    Returns:
        An `<svg>` element.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4.0, 3.4), layout="constrained")
    axes = figure.subplots()
    low, high = float(np.nanmin(matrix)), float(np.nanmax(matrix))
    bound = max(abs(low), abs(high))
    limits = (-bound, bound, "RdBu_r") if low < 0 else (0.0, bound, "viridis")
    image = axes.imshow(matrix, vmin=limits[0], vmax=limits[1], cmap=limits[2], interpolation="nearest")
    axes.set(xlabel="column", ylabel="row")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    figure.colorbar(image, ax=axes)
    return figure_svg(figure)


NEAR = 1e3
"""A spectrum that stays this many times above its precision floor is drawn without it."""


def spectrum_svg(eigenvalues: np.ndarray, floor: float) -> str:
    """Eigenvalues against their rank, on a logarithmic axis; the precision floor is drawn where they come near it.

    Args:
        eigenvalues: [k], descending.
        floor: Absolute error of an eigenvalue.

    Returns:
        An `<svg>` element.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4.0, 3.0), layout="constrained")
    axes = figure.subplots()
    rank = np.arange(1, len(eigenvalues) + 1)
    positive = eigenvalues > 0
    axes.plot(rank[positive], eigenvalues[positive], "o", markersize=3, label="eigenvalue")
    if (~positive).any() and floor > 0:
        axes.plot(rank[~positive], np.full((~positive).sum(), floor), "v", markersize=4, label="not positive")
    if floor > 0 and eigenvalues.min() < NEAR * floor:
        axes.axhline(floor, color="0.5", linestyle="--", linewidth=1, label="precision floor")
    if positive.any():
        axes.set_yscale("log")
    axes.set(xlabel="rank", ylabel="eigenvalue")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(axes.get_lines()) > 1:
        axes.legend(frameon=False)
    return figure_svg(figure)


def html_figure(svg: str, caption: str) -> str:
    """An SVG drawing over its caption, as HTML.

    Args:
        svg: An `<svg>` element.
        caption: Plain text.
    """
    return f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"


def figure_svg(figure: "Figure") -> str:
    """A figure as SVG text, the same bytes for the same drawing.

    Args:
        figure: A matplotlib figure.

    Returns:
        An `<svg>` element.
    """
    from matplotlib import rc_context

    text = io.StringIO()
    # A fixed salt makes the same drawing the same bytes.
    with rc_context({"svg.hashsalt": "ntk", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def html_table(rows: Sequence[Sequence[str]], caption: str, names: int) -> str:
    """A table of figures for Jupyter.

    Args:
        rows: The header, then the body.
        caption: Plain text, escaped here as the cells are.
        names: Columns that hold no figures, to be set to the left.
    """
    header, *body = (_html_row(cells, "th" if number == 0 else "td", names) for number, cells in enumerate(rows))
    return (
        f"<table><caption>{html.escape(caption)}</caption><thead>{header}</thead><tbody>{''.join(body)}</tbody></table>"
    )


def _html_row(cells: Sequence[str], tag: str, names: int) -> str:
    row = (
        f'<{tag} style="text-align: {"left" if column < names else "right"}">{html.escape(cell)}</{tag}>'
        for column, cell in enumerate(cells)
    )
    return f"<tr>{''.join(row)}</tr>"
