"""Phase diagrams: docs/mathematics.md §3.4 and §4.2."""

import re

import numpy as np
import pytest
from matplotlib.figure import Figure

from ntk.analytic import correlation_map, dual_activation
from ntk.analytic.activations import DualActivation, leaky_relu, polynomial
from ntk.analytic.phases import PHASES, PhaseDiagram, phase_diagram
from ntk.analytic.variance import variance_map
from tests.ntk.analytic.cases import EPS

WEIGHTS = np.array([0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5])
BIASES = np.array([0.0, 0.1, 0.5])


def phases_along(diagram: PhaseDiagram, row: int) -> list[str]:
    return [str(name) for name in diagram.phase[row]]


@pytest.mark.parametrize("norm", ["none", "weight_mean"])
def test_relu_is_critical_at_two(norm: str) -> None:
    diagram = phase_diagram(norm, "relu", WEIGHTS, BIASES)
    np.testing.assert_allclose(diagram.chi_1, np.broadcast_to(WEIGHTS / 2, (3, 7)), rtol=4 * EPS)
    for row in range(3):
        assert phases_along(diagram, row) == ["ordered"] * 3 + ["critical"] + ["chaotic"] * 3
    np.testing.assert_allclose(diagram.critical_line(), 2, rtol=1e-14)


def test_variance_of_relu() -> None:
    plain, centred = (phase_diagram(norm, "relu", WEIGHTS, BIASES).variance for norm in ("none", "weight_mean"))
    np.testing.assert_array_equal(plain[0], [0, 0, 0, 1, np.inf, np.inf, np.inf])
    np.testing.assert_allclose(plain[1, :3], 0.1 / (1 - WEIGHTS[:3] / 2), rtol=1e-13)
    assert np.all(np.isinf(plain[1, 3:]))
    # Weight mean has bounded variances up to 2.934: between 2 and that, it is chaotic all the same.
    expected = 0.1 / (1 - WEIGHTS[:5] * (0.5 - 0.5 / np.pi))
    np.testing.assert_allclose(centred[1, :5], expected, rtol=1e-13)
    assert np.all(np.isinf(centred[1, 5:]))


@pytest.mark.parametrize("norm", ["none", "weight_mean"])
def test_correlation_of_relu_without_bias_does_not_depend_on_the_weights(norm: str) -> None:
    diagram = phase_diagram(norm, "relu", WEIGHTS, BIASES)
    fixed, depth = (1.0, np.inf) if norm == "none" else (0.0, 3.22614907289631)
    np.testing.assert_array_equal(diagram.correlation[0], fixed)
    np.testing.assert_allclose(diagram.correlation_depth[0], depth, rtol=1e-13)
    # Growing variances drown a bias.
    np.testing.assert_array_equal(diagram.correlation[1, 5:], fixed)


def erf_line(sigma_b2: float) -> float:
    """Return the critical σw² of erf from q − σb² = √(1+4q) arcsin(2q/(1+2q))/2, by bisection; χ1 = 4σw²/π√(1+4q)."""
    low, high = 0.0, 100.0
    for _ in range(200):
        q = (low + high) / 2
        above = q - np.sqrt(1 + 4 * q) * np.arcsin(2 * q / (1 + 2 * q)) / 2 > sigma_b2
        low, high = (low, q) if above else (q, high)
    return float(np.pi / 4 * np.sqrt(1 + 4 * low))


def test_critical_line_of_erf() -> None:
    biases = np.linspace(0.0, 1.0, 9)
    line = phase_diagram("none", "erf", np.linspace(0.2, 4, 20), biases).critical_line()
    # Without a bias χ1 − 1 is of second order in σw² − π/4, and the line known to the root of its rounding.
    assert line[0] == pytest.approx(np.pi / 4, abs=1e-7)
    np.testing.assert_allclose(line[1:], [erf_line(b) for b in biases[1:]], rtol=1e-10)
    assert np.abs(line[1:] - [erf_line(1.01 * b) for b in biases[1:]]).max() > 1e-3


def test_critical_line_of_tanh() -> None:
    # Poole et al. (2016): on it σw² E[φ'²] = 1 at q = σw² E[φ²] + σb², both by Gauss–Legendre quadrature.
    nodes, weights = np.polynomial.legendre.leggauss(400)
    z, density = 12 * nodes, 12 * weights * np.exp(-72 * nodes**2) / np.sqrt(2 * np.pi)
    biases = np.array([0.0, 0.05, 0.3])
    diagram = phase_diagram("none", "tanh", np.linspace(0.5, 3, 11), biases)
    line = diagram.critical_line()
    assert line[0] == pytest.approx(1, abs=1e-7)
    for sigma_w2, sigma_b2 in zip(line[1:], biases[1:], strict=True):
        q = 1.0
        for _ in range(300):
            q = sigma_w2 * float(density @ np.tanh(np.sqrt(q) * z) ** 2) + sigma_b2
        assert sigma_w2 * float(density @ np.cosh(np.sqrt(q) * z) ** -4) == pytest.approx(1, abs=1e-9)
        assert sigma_w2 * float(density @ np.cosh(np.sqrt(2 * q) * z) ** -4) < 0.9
    assert np.all(np.diff(line) > 0)
    assert phases_along(diagram, 0)[:2] == ["ordered", "ordered"]
    assert diagram.phase[0, 2] == "critical"  # σw² = 1, φ'(0) = 1, and the variance vanishes
    assert diagram.chi_1[0, 2] == pytest.approx(1, rel=64 * EPS)


ACTIVATIONS = ["relu", "erf", "gelu", "tanh", "silu", leaky_relu(0.2), polynomial((0.0, 1.0, 0.2, -0.1))]


@pytest.mark.parametrize("norm", ["none", "weight_mean"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: getattr(a, "name", a))
def test_each_point_is_that_of_the_single_maps(norm: str, activation: str | DualActivation) -> None:
    diagram = phase_diagram(norm, activation, WEIGHTS[:5], BIASES)
    settled = 0
    for i, sigma_b2 in enumerate(BIASES):
        for j, sigma_w2 in enumerate(WEIGHTS[:5]):
            assert diagram.variance[i, j] == variance_map(norm, activation, sigma_w2, sigma_b2).fixed_point
            if not 0 < diagram.variance[i, j] < np.inf:
                continue
            settled += 1
            single = correlation_map(norm, activation, sigma_w2, sigma_b2)
            assert diagram.chi_1[i, j] == pytest.approx(single.chi_1, rel=1e-14)
            (stable,) = (point for point in single.fixed_points() if point.stable)
            assert diagram.correlation[i, j] == pytest.approx(stable.correlation, abs=1e-13)
            assert diagram.correlation_depth[i, j] == pytest.approx(single.correlation_depth, rel=1e-10)
            assert diagram.gradient_depth[i, j] == pytest.approx(single.gradient_depth, rel=1e-10)
    assert settled >= 5


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_growing_variances_end_as_relu(activation: str) -> None:
    diagram = phase_diagram("none", activation, [2.5, 3.0], [0.0, 0.5])
    assert np.all(np.isinf(diagram.variance[1]))
    np.testing.assert_array_equal(diagram.chi_1[1], [1.25, 1.5])
    np.testing.assert_array_equal(diagram.correlation[1], [1, 1])
    # The limit is reached: χ1 of the layers themselves, at the variance 200 layers further on.
    variance, transfer = 1.0, variance_map("none", activation, 3.0, 0.5)
    for _ in range(200):
        variance = float(transfer(variance))
    assert 3 * dual_activation(activation).derivative(1.0, variance, variance) == pytest.approx(1.5, abs=1e-8)
    assert 3 * dual_activation(activation).derivative(1.0) != pytest.approx(1.5, abs=1e-2)


def test_vanishing_variances_end_as_the_linear_part() -> None:
    diagram = phase_diagram("none", "gelu", [0.5, 1.0], [0.0, 0.5])
    np.testing.assert_array_equal(diagram.variance[0], 0)
    np.testing.assert_allclose(diagram.chi_1[0], [0.125, 0.25], rtol=1e-14)  # φ'(0)² = 1/4
    assert np.all(np.isnan(diagram.correlation[0]))
    assert np.all(np.isinf(diagram.correlation_depth[0]))


def test_growing_polynomial_explodes() -> None:
    diagram = phase_diagram("none", polynomial((0, 1, 0, 1)), [1.0, 2.0], [0.0, 0.5])
    assert np.all(np.isinf(diagram.variance))
    assert diagram.chi_1.min() > 1e12


def test_linear_network_keeps_every_correlation() -> None:
    diagram = phase_diagram("none", "linear", [0.5, 1.0, 1.5], [0.0, 0.5])
    assert np.all(np.isnan(diagram.correlation[0]))
    assert diagram.correlation[1, 0] == 1
    np.testing.assert_array_equal(diagram.chi_1[0], [0.5, 1.0, 1.5])


def test_batch_norm_is_uniform() -> None:
    diagram = phase_diagram("batch_norm", "relu", WEIGHTS, BIASES)
    np.testing.assert_allclose(diagram.chi_1, np.pi / (np.pi - 1), rtol=4 * EPS)
    assert set(diagram.phase.ravel()) == {"chaotic"}
    assert np.all(np.isnan(diagram.critical_line()))
    assert "Both variances cancel" in diagram._repr_html_()


def test_dataset() -> None:
    diagram = phase_diagram("weight_mean", "relu", WEIGHTS, BIASES)
    dataset = diagram.to_dataset()
    assert dict(dataset.sizes) == {"sigma_b2": 3, "sigma_w2": 7}
    assert dataset.attrs == {"norm": "weight_mean", "activation": "relu", "tolerance": 1e-9}
    assert float(dataset.chi_1.sel(sigma_w2=2.5, sigma_b2=0.1)) == pytest.approx(1.25, rel=4 * EPS)
    np.testing.assert_array_equal(dataset.phase.values, diagram.phase)
    np.testing.assert_allclose(dataset.critical_sigma_w2, 2, rtol=1e-14)


def test_results_are_read_only() -> None:
    diagram = phase_diagram("none", "relu", WEIGHTS, BIASES)
    for name in ("sigma_w2", "sigma_b2", "variance", "chi_1", "correlation", "correlation_depth", "phase"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(diagram, name)[0] = 0


def test_picture() -> None:
    axes = Figure().subplots()
    diagram = phase_diagram("weight_mean", "relu", WEIGHTS, BIASES)
    assert diagram.plot(axes) is axes
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend[:3] == ["ordered: χ₁ < 1", "chaotic: χ₁ > 1", "critical: χ₁ = 1"]
    assert legend[3:] == ["variance grows without bound", "variance vanishes"]
    assert "σ$_w^2$" in axes.get_xlabel()
    markup = diagram._repr_html_()
    assert re.match(r"<figure><svg.*relu, norm &#x27;weight_mean&#x27;.*</figure>$", markup, re.DOTALL)
    assert len(markup) < 100_000
    alone = phase_diagram("batch_norm").plot()
    assert [text.get_text() for text in alone.get_legend().get_texts()] == ["chaotic: χ₁ > 1"]


def test_default_grids() -> None:
    diagram = phase_diagram("none", "erf")
    assert diagram.phase.shape == (41, 60)
    assert set(diagram.phase.ravel()) <= set(PHASES)
    assert {"ordered", "chaotic"} <= set(diagram.phase.ravel())


@pytest.mark.parametrize("grid", [[1.0], [2.0, 1.0], [[1.0, 2.0]], 1.5])
def test_grid_must_ascend(grid: object) -> None:
    with pytest.raises(ValueError, match=r"sigma_w2: must be a list of at least two variances in ascending order; rec"):
        phase_diagram("none", "relu", grid, [0.0, 1.0])


def test_grid_must_be_of_variances() -> None:
    with pytest.raises(ValueError, match=r"sigma_w2: must be a finite, positive variance; received 0\.0"):
        phase_diagram("none", "relu", [0.0, 1.0], [0.0, 1.0])
    with pytest.raises(ValueError, match=r"sigma_b2: must be a finite, non-negative variance; received -1\.0"):
        phase_diagram("none", "relu", [1.0, 2.0], [-1.0, 1.0])
