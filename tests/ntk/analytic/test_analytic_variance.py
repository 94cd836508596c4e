"""Variance maps: docs/mathematics.md §3.4."""

import numpy as np
import pytest

from ntk.analytic.activations import DualActivation, dual_activation, leaky_relu, polynomial, sine
from ntk.analytic.variance import VarianceFixedPoint, settled_variance, variance_map
from tests.ntk.analytic.cases import EPS, Array, printed

DUALS: dict[str, DualActivation] = {
    **{name: dual_activation(name) for name in ("relu", "abs", "erf", "gelu", "tanh", "silu")},
    "leaky": leaky_relu(0.2),
    "sine": sine(1.7),
    "polynomial": polynomial((0.3, 1.0, -0.4, 0.2)),
}
NORMS = ("none", "weight_mean")


def iterate(step: object, start: float, layers: int) -> float:
    value = start
    for _ in range(layers):
        value = float(step(value))
    return value


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", DUALS)
def test_map_is_the_second_moment_of_the_layer(norm: str, name: str) -> None:
    # The definition, by Gauss–Legendre in one dimension, broken at the kink.
    nodes, weights = np.polynomial.legendre.leggauss(100)
    z = np.concatenate([6 * (nodes - 1), 6 * (nodes + 1)])
    density = 6 * np.tile(weights, 2) * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    activated = DUALS[name].function(np.sqrt(1.7) * z)
    moment = density @ activated**2 - (norm == "weight_mean") * (density @ activated) ** 2
    assert variance_map(norm, DUALS[name], 1.3, 0.2)(1.7) == pytest.approx(1.3 * moment + 0.2, rel=1e-12)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", DUALS)
def test_slope_is_the_derivative(norm: str, name: str) -> None:
    # Central differences of step h err by h²/6 times a third derivative, of order 100 for the polynomial.
    transfer, q, h = variance_map(norm, DUALS[name], 1.3, 0.2), np.array([0.4, 1.0, 2.5]), 1e-5
    slope = (transfer(q + h) - transfer(q - h)) / (2 * h)
    np.testing.assert_allclose(slope, transfer.derivative(q), rtol=0, atol=1e-8)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", DUALS)
def test_slope_at_zero_is_that_of_the_linear_part(norm: str, name: str) -> None:
    transfer, dual = variance_map(norm, DUALS[name], 1.3, 0.2), DUALS[name]
    if dual.homogeneous:
        assert transfer.derivative(0.0) == transfer.derivative(1.0)
        return
    h = 1e-6
    difference = float(transfer(h) - transfer(0.0)) / h
    assert transfer.derivative(0.0) == pytest.approx(difference, abs=1e-4)


def test_relu_is_linear() -> None:
    transfer, q = variance_map("none", "relu", 1.5, 0.25), np.array([0.0, 0.5, 4.0])
    np.testing.assert_allclose(transfer(q), 0.75 * q + 0.25, rtol=4 * EPS)
    assert transfer.fixed_point == pytest.approx(1, rel=4 * EPS)
    assert transfer.fixed_points() == (VarianceFixedPoint(transfer.fixed_point, 0.75, stable=True),)


def test_weight_mean_relu_is_bounded_up_to_its_stable_weight_variance() -> None:
    below = variance_map("weight_mean", "relu", 2.9, 0.1)
    assert below.fixed_point == pytest.approx(0.1 / (1 - 2.9 * (0.5 - 0.5 / np.pi)), rel=1e-13)
    assert variance_map("weight_mean", "relu", 2.95, 0.1).fixed_point == np.inf
    assert variance_map("weight_mean", "relu").fixed_point == 1
    assert variance_map("none", "relu", 2.9, 0.1).fixed_point == np.inf


def test_fates_without_biases() -> None:
    assert [variance_map("none", "relu", w).fixed_point for w in (1.9, 2.0, 2.1)] == [0, 1, np.inf]
    assert variance_map("none", "relu", 2.0, 0.1).fixed_point == np.inf
    assert variance_map("none", "relu", 1.9).fixed_points() == (VarianceFixedPoint(0.0, 0.95, stable=True),)
    assert variance_map("none", "relu", 2.1).fixed_points() == (VarianceFixedPoint(0.0, 1.05, stable=False),)
    assert variance_map("none", "relu", 2.1, 0.1).fixed_points() == ()


def test_erf() -> None:
    transfer = variance_map("none", "erf", 0.6, 0.2)
    printed(transfer.fixed_point, "0.3669353855")
    (point,) = transfer.fixed_points()
    assert point.variance == pytest.approx(transfer.fixed_point, rel=1e-14)
    assert point.stable
    assert point.slope < 1


@pytest.mark.parametrize(
    ("name", "sigma_w2", "sigma_b2"),
    [("tanh", 2.0, 0.1), ("tanh", 1.2, 0.0), ("silu", 1.5, 0.3), ("gelu", 1.9, 0.05), ("sine", 3.0, 0.0)],
)
def test_unit_variance_is_drawn_to_the_fixed_point(name: str, sigma_w2: float, sigma_b2: float) -> None:
    transfer = variance_map("none", DUALS[name], sigma_w2, sigma_b2)
    slope = float(transfer.derivative(transfer.fixed_point))
    assert 0 < slope < 1
    settled = iterate(transfer, 1.0, int(40 / -np.log(slope)))
    assert transfer.fixed_point == pytest.approx(settled, rel=1e-11)
    assert iterate(transfer, 1.0, 2) != pytest.approx(transfer.fixed_point, rel=1e-9)  # two layers are not enough


def test_bistable_gelu() -> None:
    # Convex, then linear with slope above one: a stable point below an unstable one; beyond it variances grow.
    transfer = variance_map("none", "gelu", 2.2, 0.02)
    low, high = transfer.fixed_points()
    assert (low.stable, high.stable) == (True, False)
    assert low.slope < 1 < high.slope
    assert transfer.fixed_point == pytest.approx(low.variance, rel=1e-13)
    assert iterate(transfer, 0.99 * high.variance, 2000) == pytest.approx(low.variance, rel=1e-9)
    assert iterate(transfer, 1.01 * high.variance, 2000) > 1e3


def test_fixed_points_that_nearly_coincide() -> None:
    # σb² a billionth below the value at which both points of the last test merge: 4e−5 apart, between two nodes.
    free = variance_map("none", "gelu", 2.2, 0.0)
    q = np.linspace(0.2, 1.0, 400_001)
    tangent = float(np.max(q - free(q)))
    low, high = variance_map("none", "gelu", 2.2, tangent - 1e-9).fixed_points()
    assert (low.stable, high.stable) == (True, False)
    assert 1e-6 < high.variance - low.variance < 1e-3
    assert variance_map("none", "gelu", 2.2, tangent + 1e-9).fixed_points() == ()


def test_double_fixed_point() -> None:
    # φ = z² + c: E[φ²] = 3q² + 2cq + c², and q = 3q² + 2cq + c² is (√3 q − c)² if 1 − 2c = 2√3 c.
    c = 1 / (2 + 2 * np.sqrt(3))
    (point,) = variance_map("none", polynomial((c, 0.0, 1.0)), 1.0).fixed_points()
    assert point.variance == pytest.approx(c / np.sqrt(3), rel=1e-7)
    assert point.slope == pytest.approx(1, abs=1e-7)
    assert not point.stable


def test_zero_is_a_fixed_point_without_biases() -> None:
    zero, bounded = variance_map("none", "tanh", 1.5).fixed_points()
    assert (zero.variance, zero.stable) == (0.0, False)
    assert zero.slope == pytest.approx(1.5, rel=64 * EPS)
    assert bounded.stable
    (only,) = variance_map("none", "tanh", 1.0).fixed_points()
    assert only.variance == 0
    assert only.stable  # marginal, and decided by trial: tanh shrinks


def test_batch_norm_forgets_the_variance() -> None:
    transfer = variance_map("batch_norm")
    np.testing.assert_array_equal(transfer([0.1, 1.0, 10.0]), np.ones(3))
    np.testing.assert_array_equal(transfer.derivative([0.1, 1.0, 10.0]), np.zeros(3))
    assert transfer.fixed_point == 1
    assert transfer.fixed_points() == (VarianceFixedPoint(1.0, 0.0, stable=True),)


@pytest.mark.parametrize("name", ["relu", "erf", "gelu", "tanh", "polynomial"])
def test_grid_of_variances_agrees_with_single_maps(name: str) -> None:
    weights: Array = np.array([0.4, 1.0, 1.7, 2.3])
    biases: Array = np.array([0.0, 0.1, 0.3, 0.0])
    together = settled_variance(DUALS[name], "none", weights, biases)
    single = [variance_map("none", DUALS[name], w, b).fixed_point for w, b in zip(weights, biases, strict=True)]
    np.testing.assert_array_equal(together, single)


def test_identity_map() -> None:
    with pytest.raises(ValueError, match=r"fixed_points: requires a map other than the identity; .* or fixed_point"):
        variance_map("none", "relu").fixed_points()


def test_batch_norm_refuses_variances() -> None:
    with pytest.raises(ValueError, match=r"sigma_w2, sigma_b2: must be None and 0 under norm='batch_norm'"):
        variance_map("batch_norm", "relu", 2.0)


def test_negative_variance() -> None:
    with pytest.raises(ValueError, match=r"q1: must be a finite, non-negative variance; received -1\.0\."):
        variance_map()(-1.0)


@pytest.mark.parametrize("norm", ["none", "weight_mean"])
@pytest.mark.parametrize("name", ["relu", "abs", "erf", "tanh", "gelu", "silu", "sine", "linear"])
def test_the_stable_weight_variance_keeps_one(norm: str, name: str) -> None:
    assert variance_map(norm, name).fixed_point == pytest.approx(1, rel=1e-12)
