"""Figures: what they draw, and that they are deterministic, self-contained and readable on light and dark."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from diagnostics.claims.claim import Prediction, Theory
from diagnostics.measurement import Measurement
from diagnostics.plots import (
    Bars,
    Curve,
    interval_figure,
    measurement_figure,
    measurement_html,
    spectrum_plot,
    to_png,
    to_svg,
)
from diagnostics.plots.style import INK, PALETTE, power
from diagnostics.statistics import Estimate

DEPTHS = np.arange(1, 11)
SILENT = Theory(float("nan"), "nobody")


def correlation() -> Measurement:
    estimate = np.stack([0.7**DEPTHS, 1 - 0.5**DEPTHS])
    error = np.full(estimate.shape, 0.01)
    axes = {"method": ["mimicnorm", "plain"], "depth": DEPTHS}
    return Measurement("correlation", "correlation", "1", estimate, axes, 8, error, tuple(range(8)))


def memory() -> Measurement:
    axes = {"network": ["resnet18", "vgg11"], "method": ["batch_norm", "mimicnorm"]}
    return Measurement("memory", "activation memory", "MiB", np.array([[1200.0, 410.0], [620.0, 300.0]]), axes)


def texts(figure) -> list[str]:
    root = ElementTree.fromstring(to_svg(figure, name="x"))
    return ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]


def test_curve_draws_points_with_four_standard_errors():
    figure = Curve("depth", "method", xlabel="layers")(correlation(), SILENT)
    container = figure.axes[0].containers[0]
    segments = container.lines[2][0].get_segments()
    assert len(segments) == len(DEPTHS)
    np.testing.assert_allclose([s[:, 1].max() - s[:, 1].min() for s in segments], 8 * 0.01)
    np.testing.assert_allclose(container.lines[0].get_ydata(), 0.7**DEPTHS)
    assert {"layers", "correlation", "mimicnorm", "plain"} <= set(texts(figure))


def test_theory_takes_the_colour_of_the_series_it_names_and_ink_otherwise():
    curves = {"plain": (DEPTHS, 1 - 0.5**DEPTHS), "mean field": (DEPTHS, 0.6**DEPTHS)}
    figure = Curve("depth", "method")(correlation(), Theory(0.1, "theory", curves))
    colours = {
        tuple(line.get_ydata()): line.get_color() for line in figure.axes[0].lines if line.get_linestyle() != "None"
    }
    assert colours[tuple(1 - 0.5**DEPTHS)] == PALETTE[1]
    assert colours[tuple(0.6**DEPTHS)] == INK
    assert {"mean field", "line: theory"} <= set(texts(figure))


def test_numeric_series_are_matched_by_their_number():
    measurement = Measurement(
        "ntk", "eigenvalue", "1", np.array([[3.0, 1.0], [2.0, 0.5]]), {"depth": [5, 20], "rank": [1, 2]}
    )
    theory = Theory(
        1.0, "", {"5": (np.array([1, 2]), np.array([3.1, 1.1])), "depth 20": (np.array([1, 2]), np.array([2.1, 0.6]))}
    )
    figure = spectrum_plot("rank", "depth")(measurement, theory)
    lines = {line.get_ydata()[0]: line.get_color() for line in figure.axes[0].lines if len(line.get_ydata()) == 2}
    assert (lines[3.1], lines[2.1]) == PALETTE[:2]
    assert figure.axes[0].get_yscale() == "log"


def test_values_that_are_not_finite_are_marked_rather_than_lost():
    loss = Measurement("lr", "loss", "nat", np.array([2.0, 1.0, np.inf, np.nan]), {"lr": [0.01, 0.1, 1.0, 10.0]})
    figure = Curve("lr", xscale="log")(loss, SILENT)
    crosses = [line for line in figure.axes[0].lines if line.get_marker() == "x"]
    assert [list(line.get_xdata()) for line in crosses] == [[1.0, 10.0]]
    assert "not finite" in texts(figure)


def test_reference_line_is_drawn_and_named():
    figure = Curve("depth", "method", reference=1.0, reference_label="no change")(correlation(), SILENT)
    assert "no change" in texts(figure)


def test_axes_that_are_not_accounted_for_are_named():
    with pytest.raises(
        ValueError, match=r"must name each axis of the measurement once, \['method', 'depth'\]; got \['depth'\]"
    ):
        Curve("depth")(correlation(), SILENT)


def test_selected_coordinate_fixes_an_axis():
    figure = Curve("depth", None, {"method": "plain"})(correlation(), SILENT)
    np.testing.assert_allclose(figure.axes[0].containers[0].lines[0].get_ydata(), 1 - 0.5**DEPTHS)


def test_curve_along_names_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"must have numbers for coordinates, got 'network'.*use bars"):
        Curve("network", "method")(memory(), SILENT)


def test_unknown_scale_is_refused():
    with pytest.raises(ValueError, match="scale must be 'linear' or 'log', got 'cubic'"):
        Curve("depth", "method", yscale="cubic")(correlation(), SILENT)


def test_bars_have_one_bar_per_value_and_say_it():
    figure = Bars("network", "method", reference=500.0, reference_label="budget")(memory(), SILENT)
    assert sorted(patch.get_width() for patch in figure.axes[0].patches) == [300, 410, 620, 1200]
    assert {"resnet18", "vgg11", "1,200", "410", "activation memory (MiB)", "batch_norm", "budget"} <= set(
        texts(figure)
    )


@pytest.mark.parametrize(
    ("prediction", "measured"),
    [
        (Prediction.point(1.467, 0.01, "x"), Estimate(1.466, 0.001, 8)),
        (Prediction.at_least(100.0, "x"), Estimate(6e4, 1e3, 8)),
        (Prediction.at_most(1.0, "x"), Estimate(0.0, None, 1)),
        (Prediction(0.0, 1.0, "x"), Estimate(0.0, 0.0, 2)),
    ],
    ids=["point", "open-above", "open-below", "zero-width"],
)
def test_interval_figure_shows_every_number_it_is_given(prediction, measured):
    figure = interval_figure(prediction, measured, Estimate(4.0, 0.2, 8), theory=1.5)
    low, high = figure.axes[0].get_xlim()
    assert low < min(measured.interval) <= max(measured.interval) < high
    assert low < 1.5 < high
    assert {"measured", "control", "claim", "theory"} <= set(texts(figure))


def test_equal_figures_give_equal_files():
    make = Curve("depth", "method")
    first, second = (make(correlation(), SILENT) for _ in range(2))
    assert to_svg(first, name="a") == to_svg(second, name="a")
    assert to_png(first) == to_png(second)


def test_svg_is_self_contained_and_takes_the_ink_of_its_page():
    svg = to_svg(Curve("depth", "method")(correlation(), SILENT), name="a/b c", title="5 < 6 & more")
    root = ElementTree.fromstring(svg)
    assert root.get("role") == "img"
    assert root.find("{http://www.w3.org/2000/svg}title").text == "5 < 6 & more"
    assert root.get("viewBox")
    assert root.get("width") is None
    assert "currentColor" in svg
    assert INK not in svg
    assert "<style" not in svg
    assert "<metadata" not in svg
    assert set(re.findall(r'href="([^"#]*)', svg)) == {""}
    assert not re.search(r"#000000|fill: black|white", svg)


def test_identifiers_of_two_drawings_do_not_meet():
    figure = Curve("depth", "method")(correlation(), SILENT)
    both = [to_svg(figure, name=name) for name in ("one", "two")]
    identifiers = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in both]
    assert not identifiers[0] & identifiers[1]
    for svg, own in zip(both, identifiers, strict=True):
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg)) <= own


def test_png_is_a_png_on_white():
    assert to_png(Bars("network", "method")(memory(), SILENT)).startswith(b"\x89PNG\r\n")


def test_no_global_setting_of_matplotlib_changes():
    import matplotlib

    before = dict(matplotlib.rcParams)
    to_svg(Curve("depth", "method")(correlation(), SILENT), name="x")
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    ("measurement", "kind"),
    [
        (correlation(), "containers"),
        (memory(), "patches"),
        (Measurement("c", "matrix", "1", np.eye(12), {"i": range(12), "j": range(12)}), "images"),
        (Measurement("c", "range", "1", 10.0**DEPTHS, {"depth": DEPTHS}), "containers"),
    ],
    ids=["curves", "bars", "map", "powers"],
)
def test_generic_drawing_follows_the_axes(measurement, kind):
    figure = measurement_figure(measurement)
    assert len(getattr(figure.axes[0], kind)) > 0


@pytest.mark.parametrize(("error", "scale"), [(0.001, "log"), (0.01, "linear")])
def test_generic_scale_is_logarithmic_only_where_no_interval_reaches_zero(error, scale):
    measurement = Measurement(
        "p", "q", "1", 0.5**DEPTHS, {"depth": DEPTHS}, 4, np.full(len(DEPTHS), error / 16), (0, 1, 2, 3)
    )
    assert measurement_figure(measurement).axes[0].get_yscale() == scale


def test_measurement_without_axes_is_said_in_words():
    measurement = Measurement("p", "growth <per layer>", "1", 1.467, n=4, standard_error=0.001, seeds=(0, 1, 2, 3))
    html = measurement_html(measurement)
    assert "1.467 ± 0.004 (four standard errors)" in html
    assert "growth &lt;per layer&gt;" in html
    assert "n = 4" in html
    assert "<svg" not in html


def test_axes_that_are_held_are_said():
    measurement = Measurement("p", "q", "1", np.ones((2, 3, 4)), {"a": ["x", "y"], "b": [1, 2, 3], "c": [1, 2, 3, 4]})
    assert "drawn at a = x" in measurement_html(measurement)


def test_measurement_draws_itself_in_a_notebook():
    assert correlation()._repr_html_().count("<svg") == 1


@pytest.mark.parametrize(("value", "text"), [(0.01, "0.01"), (1000.0, "1000"), (1e4, "10⁴"), (2e-5, "2·10⁻⁵")])
def test_ticks_of_logarithmic_axes(value, text):
    assert power(value) == text


def _linear(colour: str) -> np.ndarray:
    channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def _contrast(one: str, other: str) -> float:
    dark, light = sorted(float(_linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (one, other))
    return (light + 0.05) / (dark + 0.05)


def _lab(linear: np.ndarray) -> np.ndarray:
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ np.clip(linear, 0, 1) / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


# Machado, Oliveira and Fernandes 2009, severity 1.
VISIONS = {
    "full": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("colour", PALETTE)
def test_colours_stand_out_on_white_and_on_near_black(colour):
    # 3 is what WCAG 2.2 asks of graphical objects (success criterion 1.4.11).
    assert _contrast(colour, "#ffffff") >= 3
    assert _contrast(colour, "#15181d") >= 3


@pytest.mark.parametrize("vision", VISIONS)
def test_colours_are_told_apart_by_every_vision(vision):
    seen = [_lab(np.array(VISIONS[vision]) @ _linear(colour)) for colour in PALETTE]
    # A difference of 2.3 is just noticeable side by side; points far apart need several times that.
    assert min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(seen, 2)) >= 4 * 2.3


def test_two_similar_colours_would_fail_the_test_of_visions():
    orange, gold = (_lab(np.array(VISIONS["deuteranopia"]) @ _linear(c)) for c in ("#d95f02", "#b08a00"))
    assert float(np.linalg.norm(orange - gold)) < 4 * 2.3
