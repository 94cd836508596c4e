"""One BatchNorm layer: every activation, gain and shift, the population, and the form that JAX traces."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntk.analytic import batch_norm_fixed_point, dual_activation, propagate
from ntk.analytic.batch_norm import STATISTICS, batch_norm_layer, centring, traced_batch_norm_layer
from ntk.analytic.precision import double_precision
from tests.ntk.analytic.cases import (
    Array,
    autoregressive,
    condition_number,
    constant_half,
    random_covariance,
    standard_scores,
)

SAMPLES = 40_000
SLOPES = (0.0, -1.0, 1.0, 0.3)


def simulate(sigma: Array, theta: Array, size: int, statistics: str, slope: float, seed: int) -> tuple[Array, ...]:
    """Draw x xᵀ, J Θ Jᵀ and the parts of a gain and a shift, J by automatic differentiation of the layer as defined."""

    def layer(h: jax.Array, gain: jax.Array, shift: jax.Array) -> jax.Array:
        mean, scale = h[:size].mean(), h[:size].std()
        mean = jax.lax.stop_gradient(mean) if statistics == "constant" else mean
        scale = scale if statistics == "differentiated" else jax.lax.stop_gradient(scale)
        y = gain * (h - mean) / scale + shift
        return jnp.where(y > 0, y, slope * y)

    h = np.random.default_rng(seed).standard_normal((SAMPLES, len(sigma))) @ np.linalg.cholesky(sigma).T
    with double_precision():
        draw = lambda row: (layer(row, 1.0, 0.0), *jax.jacfwd(layer, (0, 1, 2))(row, 1.0, 0.0))
        x, jacobian, gain, shift = (np.array(part) for part in jax.jit(jax.vmap(draw))(jnp.asarray(h)))
    outer = lambda part: part[:, :, None] * part[:, None, :]
    return outer(x), jacobian @ theta @ jacobian.transpose(0, 2, 1), outer(gain), outer(shift)


@pytest.mark.parametrize(
    ("slope", "statistics", "n", "size"),
    [
        (-1.0, "differentiated", 8, 8),
        (0.3, "differentiated", 10, 8),
        (1.0, "differentiated", 8, 8),
        (0.3, "mean_differentiated", 10, 8),
        (-1.0, "constant", 10, 8),
    ],
)
def test_against_monte_carlo_of_the_definition(slope: float, statistics: str, n: int, size: int) -> None:
    sigma, theta = random_covariance(n, 61), random_covariance(n, 62)
    forward, backward, gain, shift = simulate(sigma, theta, size, statistics, slope, 63)
    value, tangent = batch_norm_layer(sigma, theta, size, statistics, negative_slope=slope)
    affine = batch_norm_layer(sigma, theta, size, statistics, negative_slope=slope, affine=True)
    np.testing.assert_array_equal(affine[0], value)
    assert np.abs(standard_scores(forward, value)).max() < 4
    assert np.abs(standard_scores(backward, tangent)).max() < 4
    # The identity has the derivative one: the part of the shift is one in every draw.
    parameters = gain if slope == 1 else gain + shift
    assert np.abs(standard_scores(parameters, affine[1] - tangent - float(slope == 1))).max() < 4
    # Controls: another slope, and the shift forgotten.
    other = batch_norm_layer(sigma, theta, size, statistics, negative_slope=slope / 2 + 0.1)
    assert np.abs(standard_scores(forward, other[0])).max() > 10
    assert np.abs(standard_scores(backward, other[1])).max() > 10
    assert slope == 1 or np.abs(standard_scores(parameters, value)).max() > 10


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("population", [False, True])
def test_an_activation_is_its_odd_and_its_even_part(statistics: str, population: bool) -> None:
    # φ(z) = pz + m|z|; expectations of an odd times an even function vanish.
    sigma, theta = random_covariance(9, 64), random_covariance(9, 65)
    of = lambda slope: batch_norm_layer(sigma, theta, 8, statistics, negative_slope=slope, population=population)
    for slope in SLOPES:
        for part, odd, even in zip(of(slope), of(1.0), of(-1.0), strict=True):
            expected = ((1 + slope) / 2) ** 2 * odd + ((1 - slope) / 2) ** 2 * even
            np.testing.assert_allclose(part, expected, rtol=0, atol=1e-13 * np.abs(expected).max())


@pytest.mark.parametrize("slope", SLOPES)
def test_trace(slope: float) -> None:
    # Σ y² = B in every draw, and either sign is as likely.
    value = batch_norm_layer(random_covariance(9, 66), None, negative_slope=slope)[0]
    assert np.trace(value) == pytest.approx(9 * (1 + slope**2) / 2, rel=1e-12)


@pytest.mark.parametrize("size", [4, 8, 64])
def test_normalization_alone(size: int) -> None:
    # docs/mathematics.md §5.4: the kernel before the activation, and the growth of a linear network.
    projector = centring(size, size)
    value, tangent = batch_norm_layer(constant_half(size), projector, negative_slope=1.0)
    np.testing.assert_allclose(value, size / (size - 1) * projector, rtol=0, atol=1e-12)
    growth = batch_norm_layer(value, projector, negative_slope=1.0)[1]
    np.testing.assert_allclose(growth, (size - 2) / (size - 3) * projector, rtol=0, atol=1e-12)
    np.testing.assert_allclose(tangent, 2 * size / (size - 1) * growth, rtol=0, atol=1e-11)


def test_forward_alone() -> None:
    sigma = random_covariance(9, 67)
    value, tangent = batch_norm_layer(sigma, None, 8, affine=True)
    np.testing.assert_allclose(value, batch_norm_layer(sigma, sigma, 8)[0], rtol=1e-14)
    assert tangent is None
    assert batch_norm_layer(sigma, None, 8, population=True)[1] is None


@pytest.mark.parametrize("decades", [0, 4])
def test_fifty_layers(decades: int) -> None:
    """B = 8, D = 50 to 1e−9 of docs/mathematics.md §5.1 and §5.2 as printed, by a fine trapezoid rule."""
    rotation = np.linalg.qr(np.random.default_rng(5).standard_normal((8, 8)))[0]
    gram = (rotation * np.geomspace(1, 10.0**decades, 8)) @ rotation.T
    kernels = propagate(gram, 50, "batch_norm")
    sigma = theta = gram
    for _ in range(50):
        value, tangent = as_printed(sigma, theta)
        sigma, theta = value, value + tangent
    for computed, expected in ((kernels.nngp, sigma), (kernels.ntk, theta)):
        np.testing.assert_allclose(computed, expected, rtol=0, atol=1e-9 * np.abs(expected).min())


def as_printed(sigma: Array, theta: Array, step: float = 0.2) -> tuple[Array, Array]:
    """V and F for ReLU with an inverse and a determinant, all nodes at once."""
    n = len(sigma)
    g = centring(n, n)
    sigma, theta = g @ sigma @ g, g @ theta @ g
    s = np.exp(np.arange(-46, 22, step))[:, None, None]
    matrix = np.eye(n) + 2 * s * sigma
    c = np.linalg.solve(matrix, np.broadcast_to(sigma, matrix.shape))
    root = np.sqrt(np.einsum("kii->ki", c))
    outer = root[:, :, None] * root[:, None, :]
    rho = np.where(np.eye(n) == 1, 1, np.clip(c / outer, -1, 1))
    angle = (np.pi - np.arccos(rho)) / (2 * np.pi)
    sine = np.sqrt(1 - rho**2) / (2 * np.pi)
    v, r = outer * (sine + angle * rho), root[:, :, None] / root[:, None, :] * sine
    tc, ctc = theta @ c, c @ theta @ c
    diagonal = lambda a: np.einsum("kii->ki", a)[:, None, :]
    m = tc.transpose(0, 2, 1) * angle + diagonal(tc) * r
    cross = diagonal(ctc) * r
    trace = np.einsum("kii->k", tc)[:, None, None]
    twice = trace * v + 2 * ctc * angle + cross + cross.transpose(0, 2, 1)
    f = theta * angle - s * (m + m.transpose(0, 2, 1)) + s**2 / 2 * twice
    weight = n * step * s / np.sqrt(np.linalg.det(matrix))[:, None, None]
    return (weight * v).sum(0), (weight * f).sum(0)


def rectified(covariance: Array) -> Array:
    scale = np.sqrt(covariance.diagonal())
    return dual_activation("relu").value(np.clip(covariance / np.outer(scale, scale), -1, 1), 1.0, 1.0) * np.outer(
        scale, scale
    )


def test_population_centres_and_divides_by_means_over_inputs() -> None:
    # The pre-activation after a layer is [C(x, x') − C̄(x) − C̄(x') + C̄]/(mean C(x, x) − C̄), C = V_φ(Σ).
    c = rectified(random_covariance(12, 68))
    batch = c[:9, :9]
    numerator = c - c[:, :9].mean(1)[:, None] - c[:, :9].mean(1)[None, :] + batch.mean()
    normalized = numerator / (batch.diagonal().mean() - batch.mean())
    theta = random_covariance(12, 69)
    value, tangent = batch_norm_layer(c, theta, 9, "constant", population=True)
    np.testing.assert_allclose(value, rectified(normalized), rtol=1e-12)
    scale = np.sqrt(normalized.diagonal())
    slope = dual_activation("relu").derivative(np.clip(normalized / np.outer(scale, scale), -1, 1))
    np.testing.assert_allclose(tangent, slope * theta / (batch.diagonal().mean() - batch.mean()), rtol=1e-7)


def slope_of(errors: list[float], sizes: tuple[int, ...]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(errors), 1)[0])


SIZES = (64, 128, 256)


def tagged(size: int) -> Array:
    """Orthogonal inputs, among them a pair of correlation one half."""
    gram = np.eye(size)
    gram[0, 1] = gram[1, 0] = 0.5
    return gram


def test_a_tagged_pair_of_a_population_follows_weight_mean() -> None:
    # The map of weight mean sends 0.5 to 0.426422342013; the other inputs share 1/B of the mean.
    errors = []
    for size in SIZES:
        value = batch_norm_layer(tagged(size), None, population=True)[0]
        centred = centring(size, size) @ value @ centring(size, size)
        errors.append(abs(centred[0, 1] / centred[0, 0] - 0.426422342013))
    assert slope_of(errors, SIZES) == pytest.approx(-1, abs=0.1)


@pytest.mark.parametrize("statistics", STATISTICS)
def test_a_batch_tends_to_its_population(statistics: str) -> None:
    # 1/r² fluctuates about its mean by 1/rank.
    errors: list[list[float]] = [[], []]
    for size in SIZES:
        kernels = [
            batch_norm_layer(tagged(size), tagged(size), None, statistics, population=large) for large in (False, True)
        ]
        for error, finite, limit in zip(errors, *kernels, strict=True):
            error.append(np.abs(finite - limit).max())
    for error in errors:
        assert slope_of(error, SIZES) == pytest.approx(-1, abs=0.1)


def test_population_keeps_what_acts_on_the_constant_vector() -> None:
    # Of order 1/B each, the entries off the diagonal act together: −(J + J')/((1 − J)(B − 3)) in §5.4.
    errors, without = [], []
    for size in SIZES:
        j = batch_norm_fixed_point(size)
        exact = -(j.rectified_correlation + j.derivative_correlation) / ((1 - j.rectified_correlation) * (size - 3))
        sigma = 0.5 * ((1 - j.rectified_correlation) * np.eye(size) + j.rectified_correlation)
        for statistics, error in (("differentiated", errors), ("mean_differentiated", without)):
            tangent = batch_norm_layer(sigma, centring(size, size), None, statistics, population=True)[1]
            error.append(abs(tangent[0, 1] / exact - 1))
    assert slope_of(errors, SIZES) == pytest.approx(-1, abs=0.1)
    assert min(without) > 0.3


def test_deep_population() -> None:
    # κ errs by 1/B, which two sizes remove.
    small, large = (
        condition_number(propagate(constant_half(size), 60, "batch_norm", population=True).ntk) for size in (100, 200)
    )
    assert 2 * large - small == pytest.approx(batch_norm_fixed_point().ntk_condition_number, rel=1e-4)


def test_population_of_low_rank() -> None:
    # Three points have a centred rank of 2, where a finite batch has no NTK; a population needs no moment of 1/r².
    angle = 2 * np.pi * np.arange(3) / 3
    circle = np.cos(angle[:, None] - angle)
    for kernel in batch_norm_layer(circle, circle, population=True):
        assert np.all(np.isfinite(kernel))
    assert np.all(np.isnan(batch_norm_layer(circle, circle)[1]))


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_traced_layer(dtype: type) -> None:
    sigma, theta = random_covariance(9, 71), random_covariance(9, 72)
    options = {"n_statistics": 7, "affine": True, "negative_slope": 0.3}
    function = jax.jit(lambda s, t: traced_batch_norm_layer(s, t, **options))
    with double_precision() if dtype == jnp.float64 else nullcontext():
        traced = [np.array(part) for part in function(jnp.asarray(sigma, dtype), jnp.asarray(theta, dtype))]
    tolerance = 1e-12 if dtype == jnp.float64 else 1e-5
    for computed, expected in zip(traced, batch_norm_layer(sigma, theta, **options), strict=True):
        assert computed.dtype == dtype
        np.testing.assert_allclose(computed, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def test_traced_layer_masks_null_directions() -> None:
    # Twenty examples in four dimensions, and the same example twice; forward alone.
    inputs = np.random.default_rng(6).standard_normal((20, 4))
    inputs[1] = inputs[0]
    gram = inputs @ inputs.T
    expected = batch_norm_layer(gram, None)[0]
    value, tangent = traced_batch_norm_layer(jnp.asarray(gram, jnp.float32), None)
    np.testing.assert_allclose(np.array(value), expected, rtol=0, atol=2e-4 * expected.max())
    assert tangent is None
    circle = jnp.asarray(autoregressive(3), jnp.float32)
    assert np.all(np.isnan(np.array(traced_batch_norm_layer(circle, circle)[1])))
