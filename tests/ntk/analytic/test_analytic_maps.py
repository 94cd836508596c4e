"""Correlation maps: docs/mathematics.md §1.2, §3 and §4.2."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntk.analytic import correlation_map, dual_activation, propagate, stable_weight_variance
from ntk.analytic.activations import DualActivation, leaky_relu, polynomial, sine
from ntk.analytic.precision import double_precision
from tests.ntk.analytic.cases import EPS, printed


def test_weight_mean_constants() -> None:
    transfer = correlation_map("weight_mean")
    printed(transfer.sigma_w2, "2.93388441384852")
    printed(np.sqrt(transfer.sigma_w2), "1.71285855044966")
    printed(float(transfer(-1.0)), "-0.466942206924")
    printed(transfer.chi_1, "1.46694220692426")
    printed(float(transfer.derivative(0.0)), "0.733471103462130")
    printed(transfer.correlation_depth, "3.22614907289631", roundings=16)
    printed(transfer.gradient_depth, "2.60973884670153", roundings=16)
    assert transfer(0.0) == 0
    assert transfer(1.0) == 1


def test_weight_mean_fixed_points() -> None:
    zero, one = correlation_map("weight_mean").fixed_points()
    assert (zero.correlation, zero.stable) == (0.0, True)
    assert (one.correlation, one.stable) == (1.0, False)
    assert one.slope == pytest.approx(2 * zero.slope, rel=4 * EPS)


def test_plain_relu_is_critical() -> None:
    transfer = correlation_map()
    (one,) = transfer.fixed_points()
    assert (one.correlation, one.slope, one.stable) == (1.0, 1.0, True)
    assert transfer.sigma_w2 == 2
    assert transfer.correlation_depth == math.inf
    assert transfer.gradient_depth == math.inf
    printed(float(transfer(0.0)), "0.318309886183791")


def test_power_law_of_critical_relu() -> None:
    # The map itself up to 1000 layers; beyond, the same closed form compiled: 2 φ̂(ρ), layer by layer.
    transfer, rho = correlation_map(), 0.5
    ratio = lambda rho, layer: float(1 - rho) * 2 * layer**2 / (9 * np.pi**2)
    for layer in range(1, 1001):
        rho = float(transfer(rho))
        if layer == 100:
            printed(ratio(rho, 100), "0.776")
    printed(ratio(rho, 1000), "0.967")
    relu = dual_activation("relu").forms
    with double_precision():
        one = jnp.ones(())
        deeper = jax.jit(lambda rho, n: jax.lax.fori_loop(0, n, lambda _, c: 2 * relu.value(c, one, one), rho))
        printed(ratio(deeper(rho, 9_000), 10_000), "0.99596")
        # Each layer rounds by up to ε/2, contracted at 3/l per layer: εl/8 in all, of the 9π²/2l² that is left.
        assert ratio(deeper(rho, 99_000), 100_000) == pytest.approx(0.99953, abs=EPS * 1e5**3 / (36 * np.pi**2))
    assert abs(ratio(rho, 1000) - 0.99596) > 0.02


@pytest.mark.parametrize("sigma_b2", [0.1, 0.25, 0.5])
def test_biased_relu_of_unit_variance_is_ordered(sigma_b2: float) -> None:
    # σw²/2 + σb² = 1: T = σw² φ̂ + σb², χ1 = 1 − σb² (docs/mathematics.md §3.3).
    transfer, rho = correlation_map(sigma_b2=sigma_b2), np.linspace(-1, 1, 21)
    expected = 2 * (1 - sigma_b2) * dual_activation("relu").value(rho) + sigma_b2
    np.testing.assert_allclose(transfer(rho), expected, rtol=0, atol=4 * EPS)
    assert transfer.chi_1 == pytest.approx(1 - sigma_b2, rel=4 * EPS)
    assert [(point.correlation, point.stable) for point in transfer.fixed_points()] == [(1.0, True)]


@pytest.mark.parametrize(("sigma_w2", "rate", "depth"), [(1.5, 0.8660254, 85), (1.8, 0.9486833, 210)])
def test_ordered_relu_closes_its_gap_at_half_the_rate(sigma_w2: float, rate: float, depth: int) -> None:
    # p − o follows √(1−c) ~ χ1^(D/2). Corrections are of its own order, some 1e−5 here; deeper, 1 − c is lost in
    # rounding: it is the square of the gap.
    kernels = propagate(np.array([[1, 0.5], [0.5, 1]]), depth, sigma_w2=sigma_w2, sigma_b2=1 - sigma_w2 / 2)
    gap = kernels.ntk_by_depth[:, 0, 0] - kernels.ntk_by_depth[:, 0, 1]
    assert gap[-1] / gap[-2] == pytest.approx(rate, abs=2e-5)
    assert gap[-1] / gap[-2] != pytest.approx(sigma_w2 / 2, abs=1e-2)  # the rate of smooth activations


def test_ordered_erf_closes_its_gap_at_the_full_rate() -> None:
    # (p − o)/(Dχ1^D) = s + a/D up to what vanishes as χ1^D: two depths that float64 resolves give the value at 100.
    transfer = correlation_map("none", "erf", sigma_w2=0.6, sigma_b2=0.2)
    kernels = propagate(transfer.variance * np.array([[1, 0.5], [0.5, 1]]), 32, "none", "erf", 0.6, 0.2)
    gap = kernels.ntk_by_depth[:, 0, 0] - kernels.ntk_by_depth[:, 0, 1]
    scaled = {depth: gap[depth] / (depth * transfer.chi_1**depth) for depth in (16, 32)}
    limit = 2 * scaled[32] - scaled[16]
    printed(limit + 32 * (scaled[32] - limit) / 100, "0.2398")


def test_population_batch_norm_is_weight_mean() -> None:
    rho = np.linspace(-1, 1, 21)
    np.testing.assert_array_equal(correlation_map("batch_norm")(rho), correlation_map("weight_mean")(rho))


def test_weight_mean_with_bias_is_plain_he() -> None:
    rho = np.linspace(-1, 1, 201)
    biased = correlation_map("weight_mean", sigma_b2=1 / np.pi)
    assert biased.sigma_w2 == pytest.approx(2, rel=4 * EPS)
    np.testing.assert_allclose(biased(rho), correlation_map()(rho), rtol=0, atol=8 * EPS)
    assert np.abs(correlation_map("weight_mean", sigma_b2=0.3)(rho) - correlation_map()(rho)).max() > 1e-3


@pytest.mark.parametrize("name", ["erf", "tanh"])
def test_weight_mean_does_nothing_to_odd_activations(name: str) -> None:
    rho = np.linspace(-1, 1, 21)
    np.testing.assert_array_equal(correlation_map("weight_mean", name)(rho), correlation_map("none", name)(rho))


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "abs", "gelu", "silu", "erf", "tanh", "sine"])
def test_weight_mean_is_chaotic_for_every_bent_activation(name: str) -> None:
    transfer = correlation_map("weight_mean", name)
    assert transfer.derivative(0.0) < 1 < transfer.chi_1


def test_variance_fixed_point_of_erf() -> None:
    transfer = correlation_map("none", "erf", sigma_w2=0.6, sigma_b2=0.2)
    printed(transfer.variance, "0.3669353855")
    printed(transfer.chi_1, "0.4863081333")
    (one,) = transfer.fixed_points()
    assert one.stable
    assert one.correlation == 1


@pytest.mark.parametrize("norm", ["none", "weight_mean"])
@pytest.mark.parametrize("name", ["relu", "gelu", "erf", "tanh"])
def test_slope_is_the_derivative(norm: str, name: str) -> None:
    transfer, h = correlation_map(norm, name, sigma_w2=0.9, sigma_b2=0.3), 1e-4
    rho = np.array([-0.5, 0.1, 0.7])
    slope = (transfer(rho + h) - transfer(rho - h)) / (2 * h)
    np.testing.assert_allclose(slope, transfer.derivative(rho), rtol=0, atol=20 * h**2)
    assert transfer(1.0) == pytest.approx(1, rel=1e-12)


def test_ordered_relu() -> None:
    transfer = correlation_map(sigma_w2=1.5, sigma_b2=0.25)
    assert transfer.variance == pytest.approx(1, rel=1e-13)
    assert transfer.chi_1 == pytest.approx(0.75, rel=1e-13)
    assert transfer.gradient_depth == pytest.approx(-1 / math.log(0.75), rel=1e-12)


def test_scale_of_a_homogeneous_activation_leaves_correlations() -> None:
    small, stable = correlation_map("weight_mean", sigma_w2=2.0), correlation_map("weight_mean")
    rho = np.linspace(-1, 1, 11)
    np.testing.assert_allclose(small(rho), stable(rho), rtol=0, atol=4 * EPS)
    np.testing.assert_allclose(small.derivative(rho), stable.derivative(rho), rtol=4 * EPS)
    assert small.chi_1 == 1
    assert small.variance_growth == pytest.approx(1 - 1 / np.pi, rel=4 * EPS)


def test_absolute_value_forgets_in_one_layer() -> None:
    transfer = correlation_map("weight_mean", "abs")
    assert transfer.correlation_depth == 0
    assert [point.correlation for point in transfer.fixed_points()] == [0, 1]


@pytest.mark.parametrize("activation", ["erf", "tanh", "sine", polynomial((0, 1, 0, 0.3))])
def test_odd_activation_has_three_fixed_points(activation: str | DualActivation) -> None:
    points = correlation_map("none", activation).fixed_points()
    assert [point.correlation for point in points] == [-1, 0, 1]
    assert [point.stable for point in points] == [False, True, False]


def test_even_activation_has_no_negative_fixed_point() -> None:
    assert [point.correlation for point in correlation_map("none", "abs").fixed_points()] == [1]


ACTIVATIONS = ["relu", "abs", "erf", "gelu", "silu", leaky_relu(0.2), sine(2.0), polynomial((0.2, 1.0, -0.5, 0.3))]


@pytest.mark.parametrize("norm", ["none", "weight_mean"])
@pytest.mark.parametrize("sigma_b2", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: getattr(a, "name", a))
def test_fixed_points_are_all_there_are(norm: str, sigma_b2: float, activation: str | DualActivation) -> None:
    # Brute force: every sign change of T(c) − c over 200 001 correlations is at a fixed point, and the other way round.
    transfer = correlation_map(norm, activation, sigma_b2=sigma_b2)
    points = transfer.fixed_points()
    grid = np.linspace(-1, 1, 200_001) if activation != "silu" else np.linspace(-1, 1, 501)
    grid = grid + (grid[1] - grid[0]) / np.pi  # no node is a root
    grid = grid[grid < 1 - 1e-9]
    gap = transfer(grid) - grid
    crossings = grid[:-1][gap[:-1] * gap[1:] < 0]
    inner = [point for point in points if -1 < point.correlation < 1 and abs(point.slope - 1) > 1e-9]
    assert len(crossings) == len(inner)
    for crossing, point in zip(crossings, inner, strict=True):
        assert 0 <= point.correlation - crossing <= grid[1] - grid[0]
    for point in points:
        assert transfer(point.correlation) == pytest.approx(point.correlation, abs=64 * EPS)
        assert point.stable == (point.slope < 1 or (point.correlation == 1 and transfer.chi_1 <= 1 + 1e-12))


@pytest.mark.parametrize("excess", [1e-2, 1e-3, 1e-4])
def test_fixed_point_close_to_one(excess: float) -> None:
    # Weight-mean ReLU with χ1 = 1 + ε: from T(1−δ) = 1 − χ1 δ + (2√2/3π) σw² δ^1.5/2 the root is at √δ = 3πε/√2σw².
    sigma_b2 = 1 - (1 + excess) * (1 - 1 / np.pi)
    transfer = correlation_map("weight_mean", sigma_b2=sigma_b2)
    inner, one = transfer.fixed_points()
    assert (inner.stable, one.stable) == (True, False)
    delta = (3 * np.pi * excess / (np.sqrt(2) * transfer.sigma_w2)) ** 2
    assert 1 - inner.correlation == pytest.approx(delta, rel=5 * np.sqrt(delta))
    assert transfer.correlation_depth > 1


def test_tangent_fixed_point_is_found_once() -> None:
    # At criticality both roots merge in 1, which attracts from below by a power law.
    (one,) = correlation_map("weight_mean", sigma_b2=1 / np.pi).fixed_points()
    assert (one.correlation, one.stable) == (1.0, True)
    assert one.slope == pytest.approx(1, abs=8 * EPS)


def test_dual_activation_is_named_in_the_map() -> None:
    transfer = correlation_map("weight_mean", leaky_relu(0.2))
    assert transfer.activation == "leaky_relu(0.2)"
    assert transfer.chi_1 == pytest.approx(0.52 / (0.52 - 0.64 / (2 * np.pi)), rel=4 * EPS)


def test_identity_map_has_no_isolated_fixed_point() -> None:
    with pytest.raises(ValueError, match=r"fixed_points: requires a map other than the identity.*Add a bias variance"):
        correlation_map("none", "linear").fixed_points()


def test_stable_weight_variance() -> None:
    assert stable_weight_variance() == 2
    assert stable_weight_variance("relu", "weight_mean") == pytest.approx(2 * np.pi / (np.pi - 1), rel=4 * EPS)
    assert stable_weight_variance("relu", "batch_norm") == stable_weight_variance("relu", "weight_mean")
    assert stable_weight_variance("relu", "none", 0.25) == 1.5


def test_bias_variance_that_leaves_nothing() -> None:
    with pytest.raises(ValueError, match=r"sigma_b2: must be below 1 .* received 1\.0\. Lower it, or give sigma_w2"):
        correlation_map(sigma_b2=1.0)


@pytest.mark.parametrize(
    ("sigma_w2", "sigma_b2", "activation", "fate"),
    [(2.0, 0.1, "relu", "grows without bound"), (0.1, 0.0, "tanh", "shrinks to zero")],
)
def test_no_preserved_variance(sigma_w2: float, sigma_b2: float, activation: str, fate: str) -> None:
    with pytest.raises(
        ValueError, match=f"sigma_w2, sigma_b2: must preserve some variance .* {fate} .* or ntk.analytic.phase_diagram"
    ):
        correlation_map("none", activation, sigma_w2, sigma_b2)


@pytest.mark.parametrize(("parameter", "value"), [("sigma_w2", 0.0), ("sigma_w2", np.nan), ("sigma_b2", -0.1)])
def test_impossible_variances(parameter: str, value: float) -> None:
    kind = "positive" if parameter == "sigma_w2" else "non-negative"
    with pytest.raises(
        ValueError, match=f"{parameter}: must be a finite, {kind} variance; received .* Pass a variance, not"
    ):
        correlation_map(**{parameter: value})


def test_batch_norm_cancels_given_variances() -> None:
    with pytest.raises(
        ValueError, match=r"sigma_w2, sigma_b2: must be None and 0 under norm='batch_norm'.*Leave both out"
    ):
        correlation_map("batch_norm", sigma_w2=2.0)


def test_unknown_norm() -> None:
    with pytest.raises(
        ValueError, match=r"norm: must be one of 'none', 'weight_mean', 'batch_norm'; received 'batchnorm'"
    ):
        correlation_map("batchnorm")
