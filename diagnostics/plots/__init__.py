"""Figures of measurements: makers for the pictures of claims, and what a measurement shows of itself in a notebook."""

from diagnostics.plots.figures import Bars, Curve, spectrum_plot
from diagnostics.plots.generic import measurement_figure, measurement_html
from diagnostics.plots.interval import interval_figure
from diagnostics.plots.svg import to_png, to_svg

__all__ = [
    "Bars",
    "Curve",
    "interval_figure",
    "measurement_figure",
    "measurement_html",
    "spectrum_plot",
    "to_png",
    "to_svg",
]
