"""Finite-batch BatchNorm kernels: docs/mathematics.md §5, §9.4 and §9.5, and Monte Carlo of their definitions."""

from math import gamma

import numpy as np
import pytest
from scipy.integrate import quad_vec

from ntk.analytic import batch_norm_fixed_point, propagate
from ntk.analytic.batch_norm import STATISTICS, batch_norm_layer, centring
from ntk.analytic.quadrature import laplace_rule, node_count
from ntk.errors import CoincidentPointsWarning
from tests.ntk.analytic.cases import (
    Array,
    autoregressive,
    condition_number,
    constant_half,
    printed,
    random_covariance,
    standard_scores,
)

SAMPLES = 40_000


def simulate(
    sigma: Array, theta: Array, size: int, seed: int, statistics: str = "differentiated"
) -> tuple[Array, Array]:
    """Draw x xᵀ and J Θ Jᵀ of one unit of one BatchNorm-ReLU layer, from their definitions [samples, n, n]."""
    n = len(sigma)
    operator = centring(n, size)
    h = np.random.default_rng(seed).standard_normal((SAMPLES, n)) @ np.linalg.cholesky(sigma).T
    z = h @ operator.T
    scale = np.sqrt(size) / np.linalg.norm(z[:, :size], axis=1)
    x = np.maximum(z, 0) * scale[:, None]
    gate = (z > 0) * scale[:, None]
    if statistics == "constant":
        inner = np.broadcast_to(theta, (SAMPLES, n, n))
    else:
        inner = np.broadcast_to(operator @ theta @ operator.T, (SAMPLES, n, n))
    if statistics == "differentiated":
        batch = z[:, :size] / np.linalg.norm(z[:, :size], axis=1)[:, None]
        unit = z / np.linalg.norm(z[:, :size], axis=1)[:, None]
        along = np.einsum("nij,nj->ni", inner[:, :, :size], batch)
        twice = np.einsum("ni,ni->n", along[:, :size], batch)
        inner = inner - unit[:, :, None] * along[:, None, :] - along[:, :, None] * unit[:, None, :]
        inner = inner + twice[:, None, None] * unit[:, :, None] * unit[:, None, :]
    return x[:, :, None] * x[:, None, :], gate[:, :, None] * gate[:, None, :] * inner


@pytest.mark.parametrize(
    ("depth", "entries"),
    [
        (
            1,
            "0.712060156346 0.361142572471 0.114762736571 1.732132596263 0.535998245958 -0.163695560239 0.913230177194",
        ),
        (
            2,
            "0.658764629043 0.252666670744 0.133742969915 3.337045126786 0.247317874033 -0.401108393769 2.103574667339",
        ),
    ],
)
def test_documented_batch(depth: int, entries: str) -> None:
    kernels = propagate(autoregressive(), depth, "batch_norm")
    k, ntk = kernels.nngp, kernels.ntk
    for value, text in zip(
        (k[0, 0], k[0, 1], k[0, 7], ntk[0, 0], ntk[0, 1], ntk[0, 7], ntk[3, 3]), entries.split(), strict=True
    ):
        printed(value, text, roundings=64)
    conditions = {1: ("4.386980385", "9.259694290"), 2: ("2.363776052", "6.100396606")}[depth]
    printed(condition_number(ntk), conditions[0], roundings=1000)
    printed(condition_number(k), conditions[1], roundings=1000)
    assert np.trace(k) == pytest.approx(4, rel=1e-13)


def test_rows_of_the_documented_batch() -> None:
    k = propagate(autoregressive(), 1, "batch_norm").nngp
    first = "0.712060156 0.361142572 0.198375285 0.117538603 0.080528086 0.069347478 0.077963902 0.114762737"
    fourth = "0.117538603 0.118702279 0.180275693 0.377514994 0.165684667 0.090612210 0.068259629 0.080528086"
    for row, texts in ((0, first), (3, fourth)):
        for value, text in zip(k[row], texts.split(), strict=True):
            printed(value, text)
    # K34 at D = 1 to all its digits, by the direct integral as well.
    printed(direct_integral(autoregressive())[3, 4], "0.165684666748", roundings=64)
    printed(k[3, 4], "0.165684666748", roundings=64)
    printed(propagate(autoregressive(), 2, "batch_norm").nngp[3, 4], "0.159105711646", roundings=64)


def direct_integral(sigma: Array) -> Array:
    """V as docs/mathematics.md §5.1 prints it, by adaptive quadrature over ln s, with a determinant and an inverse."""
    n = len(sigma)
    centred = centring(n, n) @ sigma @ centring(n, n).T

    def integrand(r: float) -> Array:
        s = np.exp(r)
        matrix = np.eye(n) + 2 * s * centred
        c = centred @ np.linalg.inv(matrix)
        scale = np.sqrt(c.diagonal())
        rho = np.clip(c / np.outer(scale, scale), -1, 1)
        value = (np.sqrt(1 - rho**2) + (np.pi - np.arccos(rho)) * rho) / (2 * np.pi)
        return np.outer(scale, scale) * value * s / np.sqrt(np.linalg.det(matrix))

    return n * quad_vec(integrand, -34, 14, epsabs=1e-14, epsrel=1e-12)[0]


@pytest.mark.parametrize("seed", [1, 2])
def test_against_the_integral_as_printed(seed: int) -> None:
    sigma = random_covariance(7, seed)
    np.testing.assert_allclose(propagate(sigma, 1, "batch_norm").nngp, direct_integral(sigma), rtol=1e-10)


def test_points_beyond_the_batch() -> None:
    gram = autoregressive(10)
    full = propagate(gram, 1, "batch_norm", n_statistics=8)
    k, ntk = full.nngp, full.ntk
    values = (k[8, 8], k[8, 9], k[0, 8], k[0, 9], ntk[8, 8], ntk[0, 8], ntk[8, 9])
    texts = "1.422302245944 1.380657094920 0.217498827229 0.292891257187 3.717356430545 -0.022394994376 3.155593090429"
    for value, text in zip(values, texts.split(), strict=True):
        printed(value, text, roundings=64)
    constant = propagate(gram, 1, "batch_norm", n_statistics=8, statistics="constant").ntk
    for value, text in zip(
        (constant[8, 8], constant[0, 8], constant[0, 0]),
        ("5.557780915562", "1.003441538874", "4.847538825963"),
        strict=True,
    ):
        printed(value, text, roundings=64)
    assert (full.n_statistics, full.statistics) == (8, "differentiated")


def test_the_batch_does_not_see_the_points_beyond() -> None:
    gram = random_covariance(11, 3)
    joint = propagate(gram, 3, "batch_norm", n_statistics=7)
    alone = propagate(gram[:7, :7], 3, "batch_norm")
    np.testing.assert_allclose(joint.nngp[:7, :7], alone.nngp, rtol=1e-12)
    np.testing.assert_allclose(joint.ntk[:7, :7], alone.ntk, rtol=0, atol=1e-12 * np.abs(alone.ntk).max())


def test_a_point_beyond_that_repeats_a_row_repeats_its_forward_kernel() -> None:
    gram = random_covariance(7, 4)
    index = [*range(7), 2]
    with pytest.warns(CoincidentPointsWarning, match=r"1 pair\(s\) coincide"):
        repeated = propagate(gram[np.ix_(index, index)], 1, "batch_norm", n_statistics=7)
    alone = propagate(gram, 1, "batch_norm")
    # A repeated row has correlation one off the diagonal, where the angle is √(2ε).
    np.testing.assert_allclose(repeated.nngp, alone.nngp[np.ix_(index, index)], rtol=1e-7)


def test_constant_correlation_batch() -> None:
    rows = (
        (1, "1.0714285714 0.0802691685 1.8098512532"),
        (2, "2.0405770682 -0.0080784436 1.0410516915"),
        (3, "3.6842624838 -0.1579168657 1.697817585"),
    )
    kernels = propagate(constant_half(), 3, "batch_norm")
    for depth, texts in rows:
        ntk = kernels.ntk_by_depth[depth]
        for value, text in zip((ntk[0, 0], ntk[0, 1], condition_number(ntk)), texts.split(), strict=True):
            printed(value, text, roundings=1000)
        printed(kernels.nngp_by_depth[depth, 0, 1], "0.1323606177")
        assert kernels.nngp_by_depth[depth, 0, 0] == pytest.approx(0.5, rel=1e-13)


def test_finite_width_table_of_batch_16() -> None:
    kernels = propagate(constant_half(16), 6, "batch_norm")
    for depth, diagonal, off in (
        (1, "1.038462", "0.113440"),
        (3, "3.255788", "-0.007633"),
        (6, "14.33214", "-0.612440"),
    ):
        printed(kernels.ntk_by_depth[depth, 0, 0], diagonal)
        printed(kernels.ntk_by_depth[depth, 0, 1], off)
    printed(condition_number(kernels.ntk), "2.90437", roundings=1000)
    printed(kernels.nngp_by_depth[1, 0, 1], "0.142842")


@pytest.mark.parametrize("batch_size", [4, 8, 10, 16, 64])
def test_closed_recursion_at_the_fixed_point(batch_size: int) -> None:
    # docs/mathematics.md §5.4: Θ1, then the two multipliers, for a batch of constant correlation.
    b, point = batch_size, batch_norm_fixed_point(batch_size)
    j, slope = point.rectified_correlation, point.derivative_correlation
    diagonal, off = 0.5 + (b - 2) / (2 * (b - 3)), j / 2 - (j + slope) / (2 * (b - 3))
    kernels = propagate(constant_half(b), 5, "batch_norm")
    for depth in range(1, 6):
        scale = 1e-12 * abs(diagonal)
        assert kernels.ntk_by_depth[depth, 0, 0] == pytest.approx(diagonal, abs=scale)
        assert kernels.ntk_by_depth[depth, 0, 1] == pytest.approx(off, abs=scale)
        centred = diagonal - off
        diagonal = 0.5 + centred * (b - 2) / ((1 - j) * (b - 3))
        off = j / 2 - centred * (j + slope) / ((1 - j) * (b - 3))


@pytest.mark.parametrize("batch_size", [8, 16])
def test_deep_limit(batch_size: int) -> None:
    point = batch_norm_fixed_point(batch_size)
    kernels = propagate(constant_half(batch_size), 80, "batch_norm")
    ratios = kernels.ntk_by_depth[1:, 0, 0] / kernels.ntk_by_depth[:-1, 0, 0]
    assert ratios[-1] == pytest.approx(point.gradient_growth, rel=1e-11)
    assert condition_number(kernels.ntk) == pytest.approx(point.ntk_condition_number, rel=1e-11)
    assert condition_number(kernels.nngp) == pytest.approx(point.nngp_condition_number, rel=1e-11)


@pytest.mark.parametrize(
    ("batch_size", "correlation_mode", "norm_mode"),
    [
        (4, ".377435", ".525812"),
        (8, ".538611", ".743611"),
        (16, ".630815", ".865584"),
        (32, ".680696", ".931049"),
        (64, ".706703", ".965064"),
        (128, ".719989", ".982413"),
    ],
)
def test_local_stability(batch_size: int, correlation_mode: str, norm_mode: str) -> None:
    # Central differences of step h err by h² ≈ 1e−8, below the printed digits.
    b, h = batch_size, 1e-4
    j = batch_norm_fixed_point(b).rectified_correlation
    fixed = 0.5 * ((1 - j) * np.eye(b) + j)
    correlation, norm = np.zeros((2, b, b))
    correlation[[0, 2, 1, 3], [2, 0, 3, 1]], correlation[[0, 3, 1, 2], [3, 0, 2, 1]] = 1, -1
    norm[[0, 1], [0, 1]] = 1, -1

    def response(direction: Array) -> Array:
        ahead = propagate(fixed + h * direction, 1, "batch_norm").nngp
        return (ahead - propagate(fixed - h * direction, 1, "batch_norm").nngp) / (2 * h)

    printed(response(correlation)[0, 2], correlation_mode, roundings=1 / h)
    change = response(norm)
    printed(change[0, 0] - 2 * change[0, 2], norm_mode, roundings=1 / h)


@pytest.mark.parametrize(
    ("rho", "texts"),
    [
        (0.5, "0.16788 0.36522 0.41128 0.42159"),
        (0.9, "0.70766 0.83795 0.86037 0.86511"),
        (-0.5, "-0.34208 -0.31189 -0.30815 -0.30740"),
    ],
)
def test_tagged_pair_in_an_orthogonal_batch(rho: float, texts: str) -> None:
    for batch_size, text in zip((8, 32, 128, 400), texts.split(), strict=True):
        gram = np.eye(batch_size)
        gram[0, 1] = gram[1, 0] = rho
        operator = centring(batch_size, batch_size)
        centred = operator @ propagate(gram, 1, "batch_norm").nngp @ operator.T
        printed(centred[0, 1] / centred[0, 0], text)


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize(("n", "size"), [(8, 8), (12, 9)])
def test_against_monte_carlo(n: int, size: int, statistics: str) -> None:
    sigma, theta = random_covariance(n, 21), random_covariance(n, 22)
    value, tangent = batch_norm_layer(sigma, theta, size, statistics)
    forward, backward = simulate(sigma, theta, size, 23, statistics)
    assert np.abs(standard_scores(forward, value)).max() < 4
    assert np.abs(standard_scores(backward, tangent)).max() < 4


@pytest.mark.parametrize("statistics", STATISTICS)
def test_simulated_jacobian_is_a_derivative(statistics: str) -> None:
    # J Θ Jᵀ of single draws, J by central differences of the layer with its statistics frozen as they should be.
    n, size, h = 9, 7, 1e-5
    sigma, theta = random_covariance(n, 21), random_covariance(n, 22)
    simulated = simulate(sigma, theta, size, 23, statistics)[1]
    draws = np.random.default_rng(23).standard_normal((SAMPLES, n)) @ np.linalg.cholesky(sigma).T

    def layer(values: Array, at: Array) -> Array:
        mean = (at if statistics == "constant" else values)[:size].mean()
        std = (values if statistics == "differentiated" else at)[:size].std()
        return np.maximum((values - mean) / std, 0)

    for draw, expected in zip(draws[:5], simulated[:5], strict=True):
        columns = [(layer(draw + h * e, draw) - layer(draw - h * e, draw)) / (2 * h) for e in np.eye(n)]
        jacobian = np.stack(columns, axis=1)
        np.testing.assert_allclose(jacobian @ theta @ jacobian.T, expected, rtol=0, atol=1e-7 * np.abs(expected).max())


def test_monte_carlo_tells_the_statistics_apart() -> None:
    sigma, theta = random_covariance(8, 21), random_covariance(8, 22)
    backward = simulate(sigma, theta, 8, 23)[1]
    for statistics in ("mean_differentiated", "constant"):
        assert np.abs(standard_scores(backward, batch_norm_layer(sigma, theta, 8, statistics)[1])).max() > 10


def test_monte_carlo_notices_a_lost_term() -> None:
    # A twentieth of the tangent is more than four standard errors.
    sigma, theta = random_covariance(8, 21), random_covariance(8, 22)
    tangent = batch_norm_layer(sigma, theta)[1]
    assert np.abs(standard_scores(simulate(sigma, theta, 8, 23)[1], 1.05 * tangent)).max() > 4


@pytest.mark.parametrize("statistics", STATISTICS)
def test_tangent_map_is_linear_and_homogeneous(statistics: str) -> None:
    sigma, first, second = (random_covariance(9, seed) for seed in (31, 32, 33))
    apply = lambda covariance, theta: batch_norm_layer(covariance, theta, 7, statistics)[1]
    expected = 2 * apply(sigma, first) - 3 * apply(sigma, second)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(apply(sigma, 2 * first - 3 * second), expected, rtol=0, atol=1e-12 * scale)
    np.testing.assert_allclose(4 * apply(4 * sigma, first), apply(sigma, first), rtol=0, atol=1e-12 * scale)


def test_what_normalization_removes() -> None:
    # A shift of the whole batch leaves y, so Θ = 1vᵀ + v1ᵀ is not seen; neither is it added to Σ.
    sigma, v = random_covariance(8, 41), np.linspace(-1, 2, 8)
    shift = np.add.outer(v, v)
    value, tangent = batch_norm_layer(sigma, shift)
    assert np.abs(tangent).max() < 1e-13
    np.testing.assert_allclose(batch_norm_layer(sigma + 5, shift)[0], value, rtol=1e-12)
    assert np.abs(batch_norm_layer(sigma, shift, statistics="constant")[1]).max() > 0.1


def test_weight_variance_scales_both_kernels() -> None:
    gram = random_covariance(6, 51)
    unit, scaled = propagate(gram, 3, "batch_norm"), propagate(gram, 3, "batch_norm", sigma_w2=2.5)
    np.testing.assert_allclose(scaled.nngp, 2.5 * unit.nngp, rtol=1e-12)
    np.testing.assert_allclose(scaled.ntk, 2.5 * unit.ntk, rtol=0, atol=1e-12 * np.abs(scaled.ntk).max())


@pytest.mark.parametrize("order", [0.5, 1.0])
@pytest.mark.parametrize(("size", "ratio"), [(4, 1.0), (4, 20.0), (4, 1e4), (8, 20.0), (8, 1e6), (40, 1e8), (400, 1.0)])
def test_quadrature(size: int, ratio: float, order: float) -> None:
    """E[1/r²] or E[1/r], with a factor and without, against a fine trapezoid rule in ln s."""
    eigenvalues = np.geomspace(1, ratio, size - 1)
    r = np.arange(-120, 90, 0.05)
    s = np.exp(r)
    density = np.exp(-0.5 * np.log1p(2 * s[:, None] * eigenvalues).sum(axis=1) + order * r) * 0.05 / gamma(order)
    nodes, weights = laplace_rule(eigenvalues, node_count(eigenvalues, order=order), order=order)
    for factor in (lambda s: 1.0, lambda s: s / (1 + 2 * s * eigenvalues[0]), lambda s: 1 / np.sqrt(1 + 2 * s)):
        assert np.sum(weights * factor(nodes)) == pytest.approx(density @ (factor(s) + 0 * s), rel=2e-12, abs=0)


def test_quadrature_of_too_few_nodes_is_noticed() -> None:
    eigenvalues = np.geomspace(1, 20, 7)
    enough, few = (laplace_rule(eigenvalues, nodes)[1].sum() for nodes in (64, 16))
    assert abs(few / enough - 1) > 1e-6


@pytest.mark.parametrize("decades", [0, 3, 7])
def test_spread_spectrum(decades: int) -> None:
    # Against the trace of V, and the same kernel embedded as a batch of which one more point is only a witness.
    rotation = np.linalg.qr(np.random.default_rng(5).standard_normal((9, 9)))[0]
    sigma = (rotation * np.geomspace(1, 10.0**decades, 9)) @ rotation.T
    kernels = propagate(sigma, 2, "batch_norm")
    assert np.trace(kernels.nngp) == pytest.approx(4.5, rel=1e-12)
    bordered = np.eye(10)
    bordered[:9, :9] = sigma
    witness = propagate(bordered, 2, "batch_norm", n_statistics=9)
    np.testing.assert_allclose(witness.ntk[:9, :9], kernels.ntk, rtol=0, atol=1e-10 * np.abs(kernels.ntk).max())


def test_low_rank_batch() -> None:
    # Twenty examples in five dimensions: centred rank 5, the rest of the spectrum is rounding. Directions of
    # variance 1e−9 matter from s = 1e9 on, where a tail of s^(−5/2) s ds holds 1e−9^(1/2) = 3e−5 of the integral.
    inputs = np.random.default_rng(6).standard_normal((20, 5))
    kernels = propagate(inputs @ inputs.T / 5, 2, "batch_norm")
    assert np.trace(kernels.nngp) == pytest.approx(10, rel=1e-12)
    shaken = propagate(inputs @ inputs.T / 5 + 1e-9 * np.eye(20), 2, "batch_norm")
    np.testing.assert_allclose(kernels.ntk, shaken.ntk, rtol=0, atol=1e-4 * np.abs(kernels.ntk).max())
