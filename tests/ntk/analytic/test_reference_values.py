"""Printed numbers of docs/mathematics.md that no other test asserts, through the public functions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntk.analytic import (
    ConstantCorrelation,
    batch_norm_fixed_point,
    correlation_map,
    dual_activation,
    normalized_ntk,
    phase_diagram,
    propagate,
    stable_weight_variance,
    variance_map,
)
from ntk.analytic.precision import double_precision
from tests.ntk.analytic.cases import EPS, Array, condition_number, constant_half, printed

CHI_1 = math.pi / (math.pi - 1)


def test_critical_relu_near_one() -> None:
    # §3.2: 1 − T = ε − (2√2/3π) ε^1.5 and 1 − T' = (√2/π) √ε, both up to a relative ε.
    epsilon, transfer = 1e-5, correlation_map()
    bend = (float(transfer(1 - epsilon)) - 1 + epsilon) / epsilon**1.5
    assert bend == pytest.approx(2 * math.sqrt(2) / (3 * math.pi), rel=epsilon, abs=4 * EPS / epsilon**1.5)
    drop = (1 - float(transfer.derivative(1 - epsilon))) / math.sqrt(epsilon)
    assert drop == pytest.approx(math.sqrt(2) / math.pi, rel=epsilon)


def condition_number_of_critical_relu(depth: int) -> float:
    """κ of ten inputs of correlation 1/2, carrying 1 − c, whose loss of 1 to rounding is what limits `propagate`."""
    gap, off = 0.5, 0.5
    for _ in range(depth):
        angle = 2 * math.asin(math.sqrt(gap / 2))
        gap -= (math.sin(angle) - angle * math.cos(angle)) / math.pi
        off = 1 - gap + (1 - angle / math.pi) * off
    return ConstantCorrelation(depth + 1, off, 10).condition_number


def test_condition_number_of_the_deepest_plain_network() -> None:
    """(m + 3)/3 from above, as ln D/D; at D = 10^5 c itself has rounded D times, and κ is known to 1e-3 (§3.2)."""
    for depth, text in ((10, "6.96135"), (1000, "4.40128"), (10_000, "4.34167"), (100_000, "4.33432")):
        printed(condition_number_of_critical_relu(depth), text)
    depth, relu = 100_000, dual_activation("relu").forms
    with double_precision():
        one = jnp.ones(())

        def layer(_: int, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            c = 2 * relu.value(state[0], one, one)
            return c, c + 2 * relu.derivative(state[0], one, one) * state[1]

        off = float(jax.jit(lambda: jax.lax.fori_loop(0, depth, layer, (one / 2, one / 2)))()[1])
    # 1 − c errs by εD³/36π² of itself, its root by half of that, and κ, with o/p = 1/(1 + 3(1 + δ/2)), by 1.7 δ.
    allowance = 1.7 * EPS * depth**3 / (36 * math.pi**2)
    value = ConstantCorrelation(depth + 1, off, 10).condition_number
    assert value == pytest.approx(4.33432, abs=allowance)
    assert value != pytest.approx(4.34167, abs=3 * allowance)


def test_nngp_of_a_deep_plain_network_is_nearly_singular() -> None:
    # §6.1: κ(K) → 2mD²/9π², as slowly as 1 − c follows its power law.
    kernel = propagate(constant_half(2), 10_000, every_depth=False).nngp
    closed = ConstantCorrelation(kernel[0, 0], kernel[0, 1], 10)
    assert closed.condition_number == pytest.approx(2 * 10 * 10_000**2 / (9 * math.pi**2), rel=0.005)
    printed(condition_number(propagate(constant_half(), 50).ntk), "5.228449015", roundings=1000)


def test_smooth_activation_at_criticality() -> None:
    """p is linear in D, o/p → 1/3 and κ → (m + 2)/2 (§6.1), faster than D^−1/2."""
    bias = 0.1
    weight = float(phase_diagram("none", "erf", [0.5, 2.0], [bias, 0.2]).critical_line()[0])
    q, m = variance_map("none", "erf", weight, bias).fixed_point, 10
    by_depth = propagate(q * constant_half(2), 10_000, "none", "erf", weight, bias).ntk_by_depth
    assert by_depth[-1, 0, 0] / 10_001 == pytest.approx(q, rel=1e-6)
    shallow, deep = (ConstantCorrelation(*by_depth[depth, 0], m) for depth in (1000, 10_000))
    for value, limit in ((lambda k: k.off_diagonal / k.diagonal, 1 / 3), (lambda k: k.condition_number, (m + 2) / 2)):
        assert abs(value(deep) / limit - 1) < abs(value(shallow) / limit - 1) / math.sqrt(10)
        assert value(deep) == pytest.approx(limit, rel=2 * math.log(10_000) / 10_000)
    relu = propagate(constant_half(2), 1000).ntk
    assert relu[0, 1] / relu[0, 0] != pytest.approx(1 / 3, rel=0.2)  # the control: 1/4


@pytest.mark.parametrize(("activation", "weight", "bias"), [("relu", 1.5, 0.25), ("erf", 0.6, 0.2)])
def test_diagonal_of_an_ordered_network(activation: str, weight: float, bias: float) -> None:
    # §6.1: p → q*/(1 − χ1), geometrically, and so does o: o/p → 1.
    transfer = correlation_map("none", activation, weight, bias)
    kernel = propagate(transfer.variance * constant_half(2), 400, "none", activation, weight, bias).ntk
    limit = transfer.variance / (1 - transfer.chi_1)
    np.testing.assert_allclose(kernel, limit, rtol=1e-6)
    assert kernel[0, 0] == pytest.approx(limit, rel=1e-12)


@pytest.mark.parametrize("sigma_b2", [0.1, 1 / math.pi, 0.6])
def test_bias_lowers_the_slope_of_weight_mean(sigma_b2: float) -> None:
    assert correlation_map("weight_mean", sigma_b2=sigma_b2).chi_1 == pytest.approx((1 - sigma_b2) * CHI_1, rel=4 * EPS)


def test_covariances_of_one_finite_layer() -> None:
    # §4.4, at σw = 1 and ρ = 1/2.
    for n, text in ((4, "0.10901"), (16, "0.13626"), (64, "0.14307")):
        kernels = propagate(constant_half(2), 1, "weight_mean", sigma_w2=1.0, mean_correction=True, width=n)
        printed(kernels.nngp[0, 1], text)


def test_constants_of_the_scatter() -> None:
    # 1/(1 − t²) = 2.164408 (§4.4).
    t = float(correlation_map("weight_mean").derivative(0.0))
    settled = 1 / (1 - t**2)
    printed(settled, "2.16441")
    printed(math.sqrt(settled + 1), "1.77888")
    printed(math.sqrt((settled + 1) / 300), "0.1027")
    printed(math.sqrt((settled + 1) / 1200), "0.0514")


def test_weights_of_the_code() -> None:
    # 2.8/fan-in in place of 2.934, as a factor of the variance per layer.
    printed(2.8 / stable_weight_variance("relu", "weight_mean"), "0.95437")


def test_last_decade_of_a_million_blocks() -> None:
    """§8 for k = 1, the recursion of `propagate_residual` in one compiled loop."""
    relu, weight, blocks = dual_activation("relu").forms, stable_weight_variance("relu", "weight_mean"), 10**6

    def block(number: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        rho, diagonal = state
        share = 1.0 / (number + 1)
        one = jnp.ones(())
        # The variance before block l is l, and the block adds one.
        mixed = (rho + share * weight * relu.covariance(rho, one, one)) / (1 + share)
        return mixed, diagonal + share * ((number + 1.0) + weight * relu.derivative(one, one, one) * diagonal)

    with double_precision():
        loop = jax.jit(lambda first, last, state: jax.lax.fori_loop(first, last, block, state))
        earlier = loop(0, blocks // 10, (jnp.asarray(0.5), jnp.asarray(1.0)))
        later = loop(blocks // 10, blocks, earlier)
    printed(math.log10(float(earlier[0] / later[0])), "0.2587")
    printed(math.log10(float(later[1] / earlier[1])), "1.4681")


def test_off_diagonal_of_deep_batch_norm() -> None:
    # §5.4: o/p → −(J + J')/(B − 2), which is −0.818/B for a large batch.
    point = batch_norm_fixed_point(16)
    kernel = propagate(constant_half(16), 60, "batch_norm").ntk
    expected = -(point.rectified_correlation + point.derivative_correlation) / 14
    assert kernel[0, 1] / kernel[0, 0] == pytest.approx(expected, rel=1e-9)
    limit = batch_norm_fixed_point()
    printed(limit.rectified_correlation + limit.derivative_correlation, "0.818")


def test_unequal_norms_in_large_batches() -> None:
    """§5.5: deviations contract by 1 − 2.25/B, and one input of norm s in a population by s ↦ s'."""
    b, h = 128, 1e-4
    fixed, norm = propagate(np.eye(b), 1, "batch_norm").nngp, np.zeros((b, b))
    norm[[0, 1], [0, 1]] = 1, -1
    ahead, behind = (propagate(fixed + step * norm, 1, "batch_norm").nngp for step in (h, -h))
    change = (ahead - behind) / (2 * h)
    printed(b * (1 - change[0, 0] + 2 * change[0, 2]), "2.25", roundings=1 / h)
    for s in (0.5, 2.0):
        small, large = (squared_norm(s, size) for size in (200, 400))
        expected = (s**2 / 2 - s / math.pi + 1 / (2 * math.pi)) / (0.5 - 0.5 / math.pi)
        assert 2 * large - small == pytest.approx(expected, rel=1e-3)  # the other inputs err by 1/B
        assert abs(expected - s**2) > 0.1


def squared_norm(s: float, size: int) -> float:
    """Variance, relative to the others, of an input of norm s among unrelated ones of norm one, a layer on."""
    scale = np.ones(size)
    scale[0] = s
    value = propagate(np.diag(scale**2), 1, "batch_norm", population=True).nngp
    centre = np.eye(size) - 1 / size
    centred: Array = centre @ value @ centre
    return float(centred[0, 0] / centred[-1, -1])


def test_condition_numbers_of_gaussian_data() -> None:
    """κ of BatchNorm on data in 100 dimensions, drawn in this order; at depth 60 near its limit."""
    generator = np.random.default_rng(0)
    tables = {
        16: ((1, "4.961"), (3, "1.670"), (10, "5.441"), (20, "5.964"), (60, "5.832")),
        64: ((1, "29.50"), (5, "2.17"), (20, "6.38"), (30, "6.20")),
    }
    for size, rows in tables.items():
        x = generator.standard_normal((size, 100))
        kernels = propagate(x @ x.T / 100, rows[-1][0], "batch_norm")
        for depth, text in rows:
            printed(condition_number(kernels.ntk_by_depth[depth]), text)
    printed(batch_norm_fixed_point(64).ntk_condition_number, "5.577")


@pytest.mark.parametrize(
    ("classes", "text"), [(2, "0.126928"), (10, "0.278439"), (100, "0.00426467"), (1000, "1.8e-11")]
)
def test_floor_under_the_loss(classes: int, text: str) -> None:
    """§7.5: behind a last BatchNorm whose inputs are the labels, where every class has the same two logits."""
    m = max(classes, 4)
    column = (np.arange(m) % classes == 0).astype(float)
    logits = normalized_ntk(np.eye(m), column).outputs
    printed(math.log1p((classes - 1) * math.exp(logits[1] - logits[0])), text, roundings=1000)
    # No other logits of that form do better.
    generator = np.random.default_rng(1)
    for noise in (0.01, 0.1, 1.0):
        other = normalized_ntk(np.eye(m), column + noise * generator.standard_normal(m)).outputs
        assert np.mean(other[column == 1]) - np.mean(other[column == 0]) < logits[0] - logits[1]
