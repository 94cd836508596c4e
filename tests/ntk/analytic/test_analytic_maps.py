"""Correlation maps: docs/mathematics.md §1.2, §3 and §4.2."""

import math

import numpy as np
import pytest

from ntk.analytic import correlation_map, stable_weight_variance
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
    transfer, rho = correlation_map(), np.asarray(0.5)
    ratios = {}
    for layer in range(1, 100_001):
        rho = transfer(rho)
        ratios[layer] = float(1 - rho) * 2 * layer**2 / (9 * np.pi**2)
    printed(ratios[100], "0.776")
    printed(ratios[1000], "0.967")
    printed(ratios[10_000], "0.99596")
    # Each layer rounds by up to ε/2, contracted at 3/l per layer: εl/8 in all, of the 9π²/2l² that is left.
    assert ratios[100_000] == pytest.approx(0.99953, abs=EPS * 1e5**3 / (36 * np.pi**2))


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


@pytest.mark.parametrize("name", ["relu", "abs", "gelu", "erf", "tanh"])
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


def test_odd_activation_has_three_fixed_points() -> None:
    assert [point.correlation for point in correlation_map("none", "erf").fixed_points()] == [-1, 0, 1]


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
        ValueError, match=f"sigma_w2, sigma_b2: must preserve some variance .* {fate} .* Take sigma_w2=None"
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
