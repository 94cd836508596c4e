"""Finite against infinite width: docs/mathematics.md §4.4, on families of known slope and on PyTorch networks."""

import math
import xml.etree.ElementTree as ET
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest

import ntk
from ntk import WidthStudy, width_study
from ntk.analytic import dual_activation, propagate
from ntk.errors import ConventionError, NonFiniteKernelError
from ntk.results import KernelResult
from tests.ntk.networks import constant_correlation, dense

GRAM = 0.5 * np.eye(4) + 0.5
CHI_1 = math.pi / (math.pi - 1)


def synthetic(exponent: float, bias: float) -> Callable[[int, int], np.ndarray]:
    """Kernels K (1 + bias/width) + width^exponent · noise."""

    def measure(width: int, seed: int) -> np.ndarray:
        noise = np.random.default_rng([seed, width]).standard_normal((4, 4))
        return GRAM * (1 + bias / width) + float(width) ** exponent * (noise + noise.T)

    return measure


@pytest.mark.parametrize("exponent", [-0.5, -1.0])
def test_known_slope(exponent: float) -> None:
    study = width_study(synthetic(exponent, 0.0), GRAM, widths=(64, 16, 256, 1024), seeds=range(20))
    assert study.widths == (16, 64, 256, 1024)
    assert abs(study.slope.value - exponent) < 4 * study.slope.standard_error < 0.1
    assert abs(study.slope.value + 0.75) > 4 * study.slope.standard_error  # the control


def test_slope_is_that_of_a_line_through_the_means() -> None:
    study = width_study(synthetic(-0.5, 3.0), GRAM, widths=(8, 32, 256), seeds=range(5))
    line = np.polyfit(np.log(study.widths), np.log(study.deviation).mean(axis=1), 1)
    np.testing.assert_allclose([study.slope.value, study.slope.intercept], line, rtol=1e-12)
    draws = np.random.default_rng(0).choice(5, (4000, 3, 5))
    resampled = np.log(study.deviation)[np.arange(3)[:, None], draws].mean(axis=2)
    bootstrap = np.polyfit(np.log(study.widths), resampled.T, 1)[0].std() * math.sqrt(5 / 4)
    assert study.slope.standard_error == pytest.approx(bootstrap, rel=4 / math.sqrt(2 * 4000))


def test_figures_are_those_of_the_definition() -> None:
    study = width_study(synthetic(-0.5, 3.0), GRAM, widths=(8, 32), seeds=(5, 3, 9))
    assert study.seeds == (3, 5, 9)
    by_hand = np.array([[synthetic(-0.5, 3.0)(width, seed) for seed in (3, 5, 9)] for width in (8, 32)])
    np.testing.assert_array_equal(study.kernels, by_hand)
    single = [[np.linalg.norm(kernel - GRAM) / np.linalg.norm(GRAM) for kernel in row] for row in by_hand]
    np.testing.assert_allclose(study.deviation, single, rtol=1e-14)
    np.testing.assert_allclose(study.mean_deviation, np.mean(single, axis=1), rtol=1e-14)
    error = np.std(single, axis=1, ddof=1) / math.sqrt(3)
    np.testing.assert_allclose(study.mean_deviation_standard_error, error, rtol=1e-12)
    mean = by_hand.mean(axis=1)
    np.testing.assert_allclose(study.bias, mean - GRAM, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(
        study.deviation_of_mean, [np.linalg.norm(kernel - GRAM) / np.linalg.norm(GRAM) for kernel in mean], rtol=1e-14
    )
    entry = by_hand[1, :, 0, 2]
    assert study.bias_standard_error[1, 0, 2] == pytest.approx(entry.std(ddof=1) / math.sqrt(3), rel=1e-12)


def centred_relu(width: int, seed: int) -> np.ndarray:
    """Kernel K̂ [2, 2] of one weight-mean layer of `width` Gaussian units, σw = 1, at correlation 0.5."""
    x, y = np.random.default_rng([seed, width]).standard_normal((2, width))
    rows = np.maximum(np.stack([x, 0.5 * x + math.sqrt(0.75) * y]), 0)
    return np.cov(rows, bias=True)


@cache
def lemma_1() -> WidthStudy:
    return width_study(centred_relu, one_layer(np.inf), widths=(4, 8, 16, 32, 64), seeds=range(4000))


def one_layer(width: float) -> np.ndarray:
    relu = dual_activation("relu")
    return (1 - 1 / width) * relu.covariance(np.array([[1.0, 0.5], [0.5, 1.0]]))


def test_lemma_1() -> None:
    study = lemma_1()
    mean = study.kernels.mean(axis=1)
    for width, text in ((4, 0.10901), (16, 0.13626), (64, 0.14307)):
        index = study.widths.index(width)
        expected = one_layer(width)
        assert expected[0, 1] == pytest.approx(text, abs=0.5e-5)
        assert np.abs((mean[index] - expected) / study.bias_standard_error[index]).max() < 4
    without = np.abs((mean[0] - one_layer(np.inf)) / study.bias_standard_error[0])
    assert without.min() > 4  # the control: the factor (n − 1)/n is seen


def test_bias_falls_with_the_width_and_fluctuations_with_its_root() -> None:
    study = lemma_1()
    assert abs(study.bias_slope.value + 1) < 4 * study.bias_slope.standard_error < 0.4
    assert abs(study.bias_slope.value + 0.5) > 4 * study.bias_slope.standard_error  # the control
    index = slice(2, None)  # relative fluctuations are 1/√n only where they are small
    late = WidthStudy(study.widths[index], study.seeds, study.kernels[index], study.analytic[index])
    assert late.slope.value == pytest.approx(-0.5, abs=0.05)


def test_bias_slope_is_that_of_the_definition() -> None:
    study = width_study(synthetic(-0.5, 30.0), GRAM, widths=(8, 16, 64), seeds=range(12))

    def bias(kernels: np.ndarray) -> np.ndarray:
        noise = (kernels.var(axis=1, ddof=1) / kernels.shape[1]).sum(axis=(1, 2))
        return np.sqrt(np.linalg.norm(kernels.mean(axis=1) - GRAM, axis=(1, 2)) ** 2 - noise)

    line = lambda kernels: np.polyfit(np.log(study.widths), np.log(bias(kernels)), 1)[0]
    assert study.bias_slope.value == pytest.approx(line(study.kernels), rel=1e-12)
    left_out = np.array([np.log(bias(np.delete(study.kernels, i, axis=1))) for i in range(12)])
    by_width = np.sqrt(11 / 12 * ((left_out - left_out.mean(axis=0)) ** 2).sum(axis=0))
    centred = np.log(study.widths) - np.mean(np.log(study.widths))
    expected = math.sqrt(((centred / (centred**2).sum()) ** 2 * by_width**2).sum())
    assert study.bias_slope.standard_error == pytest.approx(expected, rel=1e-9)


def test_analytic_kernel_may_know_the_width() -> None:
    study = width_study(centred_relu, one_layer, widths=(4, 16, 64), seeds=range(400))
    np.testing.assert_array_equal(study.analytic[1], one_layer(16))
    assert np.abs(study.bias / study.bias_standard_error).max() < 4
    assert math.isnan(study.bias_slope.value)


def test_scatter_of_correlations() -> None:
    # Given a layer's input, its pre-activations are exactly Gaussian with the centred sample covariance (§4.1).
    n, chains, depth = 300, 4000, 20
    generator = np.random.default_rng(1)
    covariance = np.broadcast_to(np.eye(2), (chains, 2, 2))
    for _ in range(depth):
        h = np.linalg.cholesky(covariance) @ generator.standard_normal((chains, 2, n))
        a = np.maximum(h, 0)
        a -= a.mean(axis=2, keepdims=True)
        covariance = a @ a.swapaxes(1, 2) * (2 * CHI_1 / n)
    measured = (h[:, 0] * h[:, 1]).sum(axis=1) / np.sqrt((h**2).sum(axis=2).prod(axis=1))
    spread, error = measured.std(ddof=1), measured.std(ddof=1) / math.sqrt(2 * chains)
    t = CHI_1 / 2
    predicted = math.sqrt((1 + 1 / (1 - t**2)) / n)
    assert predicted == pytest.approx(0.1027, abs=0.5e-4)
    assert predicted == pytest.approx(math.sqrt(3.16441 / n), rel=1e-5)
    assert abs(spread - predicted) < 4 * error
    assert abs(spread - math.sqrt(2.16441 / n)) > 4 * error  # the control: without the units of the last layer


@cache
def network_study(norm: str) -> WidthStudy:
    """PyTorch networks of two ReLUs on const-0.5, each at 16 seeds fixed beforehand."""
    x = constant_correlation(4, 0.5)

    def measure(width: int, seed: int) -> KernelResult:
        net = dense(norm, 2, 4, width=width, seed=seed)
        return ntk.empirical_ntk(net.model, x, params=net.multipliers, projection=net.projection, reduce="sum")

    return width_study(measure, propagate(GRAM, 2, norm).ntk, widths=(64, 128, 256, 512), seeds=range(16))


@pytest.mark.parametrize("norm", ["none", "weight_mean"])
def test_networks_approach_their_kernel(norm: str) -> None:
    study = network_study(norm)
    assert abs(study.slope.value + 0.5) < 4 * study.slope.standard_error < 0.4
    assert "NTK" in study.source
    assert np.abs(study.bias[-1] / study.bias_standard_error[-1]).max() < 4
    other = propagate(GRAM, 2, "weight_mean" if norm == "none" else "none").ntk
    wrong = WidthStudy(study.widths, study.seeds, study.kernels, np.stack([other] * 4))
    assert abs(wrong.slope.value + 0.5) > 4 * wrong.slope.standard_error  # the control


def test_no_deviation_has_no_slope() -> None:
    study = width_study(lambda width, seed: GRAM, GRAM, widths=(8, 16), seeds=(0, 1, 2))
    assert math.isnan(study.slope.value)
    assert math.isnan(study.bias_slope.value)
    assert not study.deviation.any()


def test_two_seeds_have_no_jackknife() -> None:
    study = width_study(synthetic(-0.5, 1.0), GRAM, widths=(8, 16), seeds=(0, 1))
    assert math.isnan(study.bias_slope.value)
    assert "bias slope not resolved" in study.summary()
    assert study.slope.standard_error > 0


def test_result_is_frozen() -> None:
    study = width_study(synthetic(-0.5, 1.0), GRAM, widths=(8, 16), seeds=(0, 1))
    with pytest.raises(ValueError, match="read-only"):
        study.kernels[0] = 0
    with pytest.raises(AttributeError, match="cannot assign to field"):
        study.widths = (1, 2)
    assert repr(study).startswith("WidthStudy(widths 8, 16, 2 seeds")


def test_dataset() -> None:
    study = lemma_1()
    dataset = study.to_dataset()
    assert dataset["kernel"].sel(width=16, seed=7).values.tolist() == study.kernels[2, 7].tolist()
    assert dataset.attrs["slope"] == study.slope.value
    assert dataset.attrs["bias_slope"] == study.bias_slope.value
    assert dataset["deviation"].dims == ("width", "seed")


def test_it_draws_itself() -> None:
    study = network_study("none")
    drawn = study._repr_html_()
    svg = ET.fromstring(drawn[drawn.index("<svg") : drawn.index("</svg>") + 6])
    assert len(svg.findall(".//{http://www.w3.org/2000/svg}path")) > 3
    assert study.source in drawn
    assert drawn == study._repr_html_()


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    width_study(synthetic(-0.5, 1.0), GRAM, widths=(8, 16), seeds=(0, 1), progress=True)
    assert capsys.readouterr().err.endswith("\rwidth study: 4 of 4 networks\n")


def result(reduce: str, mode: str = "no batch statistics") -> KernelResult:
    values = GRAM[..., None, None] if reduce == "none" else GRAM
    axes = ("example", "example", "output", "output")[: values.ndim]
    return KernelResult(values, "ntk", axes, reduce, symmetric=True, mode=mode)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"widths": (8,)}, ValueError, r"widths: must be two or more distinct integers of at least 1; received \(8,\)"),
        ({"widths": (8, 8)}, ValueError, "widths: must be two or more distinct integers"),
        ({"widths": (0, 8)}, ValueError, "widths: must be two or more distinct integers of at least 1"),
        ({"widths": 8}, ValueError, "widths: must be two or more distinct.*received 8: a slope needs two widths"),
        ({"widths": (8, 16.5)}, ValueError, "widths: must be two or more distinct"),
        ({"seeds": (0,)}, ValueError, r"seeds: must be two or more distinct integers; received \(0,\): a standard"),
        ({"analytic": np.ones((2, 3))}, ValueError, r"analytic: must be a square matrix \[n, n\]; received shape"),
        ({"analytic": np.zeros((4, 4))}, ValueError, "analytic: must not be zero"),
        ({"analytic": lambda w: np.ones((w, w))}, ValueError, r"analytic: must be of shape \(8, 8\), that of the an"),
        ({"measure": lambda w, s: np.ones((3, 3))}, ValueError, r"measure\(8, 0\): must be of shape \(4, 4\)"),
        ({"measure": lambda w, s: GRAM * np.inf}, NonFiniteKernelError, r"measure\(8, 0\): must be finite; 16 of 16"),
        ({"measure": lambda w, s: result("none")}, ConventionError, r"reduced outputs.*reduce='none'.*trace_mean\(\)"),
        (
            {"measure": lambda w, s: result("sum" if s else "trace")},
            ConventionError,
            "measure: must return kernels of one convention; received 2",
        ),
    ],
)
def test_refusals(options: dict, error: type[ValueError], message: str) -> None:
    arguments = {"measure": synthetic(-0.5, 1.0), "analytic": GRAM, "widths": (8, 16), "seeds": (0, 1)} | options
    with pytest.raises(error, match=message):
        width_study(**arguments)
