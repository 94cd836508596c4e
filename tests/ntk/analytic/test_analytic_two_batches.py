"""Kernels between two BatchNorm batches: docs/mathematics.md §5.6, its integral as printed, Monte Carlo."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntk.analytic import batch_norm_fixed_point, propagate
from ntk.analytic.batch_norm import STATISTICS, centring
from ntk.analytic.precision import double_precision
from ntk.analytic.two_batches import propagate_two_batches, two_batch_layer
from ntk.errors import BatchTooSmallError, CentredRankError, GramError, UnknownNameError
from tests.ntk.analytic.cases import Array, autoregressive, circle, printed, random_covariance, standard_scores

SAMPLES = 40_000


def layer(sigma: Array, theta: Array, size: int, **options: object) -> tuple[Array, Array]:
    """V and F between the first ``size`` rows and the others, in float64."""
    blocks = sigma[:size, :size], sigma[size:, size:], sigma[:size, size:], theta[:size, size:]
    with double_precision():
        return tuple(np.array(part) for part in two_batch_layer(*map(jnp.asarray, blocks), **options))


def as_printed(sigma: Array, theta: Array, size: int, step: float = 0.5) -> tuple[Array, Array]:
    """V and F for ReLU by the trapezoid rule in (ln s, ln t), with an inverse and a determinant of the joint Gram."""
    n, first, second = len(sigma), slice(None, size), slice(size, None)
    g = np.zeros((n, n))
    g[first, first], g[second, second] = centring(size, size), centring(n - size, n - size)
    omega, theta = g @ sigma @ g, (g @ theta @ g)[first, second]
    nodes = np.exp(np.arange(-72, 26, step))
    value, tangent = np.zeros((2, *theta.shape))
    for s in nodes:
        root = np.concatenate([np.full((nodes.size, size), s), np.outer(nodes, np.ones(n - size))], axis=1) ** 0.5
        scaled = root[:, :, None] * omega * root[:, None, :]
        matrix = np.eye(n) + 2 * scaled
        c = np.linalg.solve(matrix, scaled)
        c11, c22, c12, c21 = c[:, first, first], c[:, second, second], c[:, first, second], c[:, second, first]
        q1, q2 = (np.einsum("kii->ki", part) ** 0.5 for part in (c11, c22))
        rho = np.clip(c12 / q1[:, :, None] / q2[:, None, :], -1, 1)
        angle, sine = (np.pi - np.arccos(rho)) / (2 * np.pi), np.sqrt(1 - rho**2) / (2 * np.pi)
        v = q1[:, :, None] * q2[:, None, :] * (sine + rho * angle)
        r, mirrored = q1[:, :, None] / q2[:, None, :] * sine, q2[:, None, :] / q1[:, :, None] * sine
        columns = lambda a: np.einsum("kjj->kj", a)[:, None, :]
        rows = lambda a: np.einsum("kii->ki", a)[:, :, None]
        f = theta * angle
        f = f - 2 * ((c11 @ theta) * angle + columns(c21 @ theta) * r)
        f = f - 2 * ((theta @ c22) * angle + rows(theta @ c21) * mirrored)
        f = f + 4 * (np.einsum("kii->k", theta @ c21)[:, None, None] * v)
        f = f + 4 * (c11 @ theta @ c22 + c12 @ theta.T @ c12) * angle
        f = f + 4 * (rows(c11 @ theta @ c21) * mirrored + columns(c21 @ theta @ c22) * r)
        weight = step**2 / np.pi / np.sqrt(np.linalg.det(matrix))
        value += np.einsum("k,kij->ij", weight, v)
        tangent += np.einsum("k,kij->ij", weight * np.sqrt(s * nodes), f)
    factor = np.sqrt(size * (n - size))
    return factor * value, factor * tangent


def simulate(sigma: Array, theta: Array, size: int, statistics: str, slope: float, seed: int) -> tuple[Array, ...]:
    """Draw x x'ᵀ, J Θ J'ᵀ and the parts of a gain and a shift, by automatic differentiation of the layer as defined."""

    def normalized(h: jax.Array, gain: jax.Array, shift: jax.Array) -> jax.Array:
        mean, scale = h.mean(), h.std()
        mean = jax.lax.stop_gradient(mean) if statistics == "constant" else mean
        scale = scale if statistics == "differentiated" else jax.lax.stop_gradient(scale)
        y = gain * (h - mean) / scale + shift
        return jnp.where(y > 0, y, slope * y)

    h = np.random.default_rng(seed).standard_normal((SAMPLES, len(sigma))) @ np.linalg.cholesky(sigma).T
    draw = lambda row: (normalized(row, 1.0, 0.0), *jax.jacfwd(normalized, (0, 1, 2))(row, 1.0, 0.0))
    with double_precision():
        parts = [jax.jit(jax.vmap(draw))(jnp.asarray(batch)) for batch in (h[:, :size], h[:, size:])]
        (x, jacobian, gain, shift), others = ([np.array(part) for part in batch] for batch in parts)
    outer = lambda a, b: a[:, :, None] * b[:, None, :]
    backward = jacobian @ theta[:size, size:] @ others[1].transpose(0, 2, 1)
    return outer(x, others[0]), backward, outer(gain, others[2]) + outer(shift, others[3])


def test_documented_batches() -> None:
    kernels = propagate_two_batches(autoregressive(10), (5, 5), 1)
    k, ntk = kernels.nngp[:5, 5:], kernels.ntk[:5, 5:]
    values = (k[0, 0], k[4, 0], ntk[0, 0], ntk[4, 0], ntk[0, 4])
    texts = ("0.221917035180", "0.288227892628", "0.191127108731", "0.324156955036", "0.307453623516")
    for value, text in zip(values, texts, strict=True):
        printed(value, text, roundings=1000)
    expected = as_printed(autoregressive(10), autoregressive(10), 5)
    np.testing.assert_allclose(k, expected[0], rtol=1e-11)
    np.testing.assert_allclose(ntk, sum(expected), rtol=1e-11)


def test_against_the_integral_as_printed() -> None:
    sigma, theta = random_covariance(11, 81), random_covariance(11, 82)
    for computed, expected in zip(layer(sigma, theta, 6), as_printed(sigma, theta, 6), strict=True):
        np.testing.assert_allclose(computed, expected, rtol=0, atol=1e-10 * np.abs(expected).max())


@pytest.mark.parametrize(("slope", "statistics"), list(zip((0.3, 0.0, -1.0), STATISTICS, strict=True)))
def test_against_monte_carlo_of_the_definition(slope: float, statistics: str) -> None:
    sigma, theta = random_covariance(10, 83), random_covariance(10, 84)
    forward, backward, parameters = simulate(sigma, theta, 6, statistics, slope, 85)
    options = {"affine": True, "statistics": statistics, "negative_slope": slope}
    value, tangent = layer(sigma, theta, 6, **options)
    assert np.abs(standard_scores(forward, value)).max() < 4
    assert np.abs(standard_scores(backward + parameters, tangent)).max() < 4
    # Controls: the parameters forgotten, another slope, other statistics differentiated.
    assert np.abs(standard_scores(backward, tangent)).max() > 10
    assert np.abs(standard_scores(forward, layer(sigma, theta, 6, **{**options, "negative_slope": 0.1})[0])).max() > 10
    others = {**options, "statistics": STATISTICS[STATISTICS.index(statistics) - 1]}
    assert np.abs(standard_scores(backward + parameters, layer(sigma, theta, 6, **others)[1])).max() > 4


def test_blocks_on_the_diagonal_are_those_of_each_batch_alone() -> None:
    gram = random_covariance(10, 86)
    options = {"activation": "abs", "affine": True, "sigma_w2": 1.5}
    kernels = propagate_two_batches(gram, (5, 5), 2, **options)
    for rows in (slice(None, 5), slice(5, None)):
        alone = propagate(gram[rows, rows], 2, "batch_norm", **options)
        for block, whole in ((kernels.nngp_by_depth, alone.nngp_by_depth), (kernels.ntk_by_depth, alone.ntk_by_depth)):
            np.testing.assert_allclose(block[:, rows, rows], whole, rtol=0, atol=1e-13 * np.abs(whole).max())
    np.testing.assert_array_equal(kernels.ntk, kernels.ntk.T)
    assert kernels.batch_sizes == (5, 5)
    assert (kernels.norm, kernels.activation, kernels.n_statistics) == ("batch_norm", "abs", None)


def test_order_of_the_batches() -> None:
    gram = random_covariance(11, 87)
    swapped = np.roll(gram, 5, axis=(0, 1))
    kernels, other = (
        propagate_two_batches(gram, (6, 5), 2),
        propagate_two_batches(swapped, (5, 6), 2, every_depth=False),
    )
    scale = 1e-11 * np.abs(kernels.ntk).max()
    np.testing.assert_allclose(np.roll(kernels.ntk, 5, axis=(0, 1)), other.ntk, rtol=0, atol=scale)


@pytest.mark.parametrize("size", [4, 5])
def test_unrelated_batches(size: int) -> None:
    # Uniform on the sphere and independent: E[φ(y)]² between them, and a gradient that meets −1/(B−1) of nothing.
    gram = np.kron(np.eye(2), 0.5 * np.eye(size) + 0.5)
    kernels = propagate_two_batches(gram, (size, size), 1)
    expected = batch_norm_fixed_point(size).cross_batch_correlation / 2
    for kernel in (kernels.nngp, kernels.ntk):
        np.testing.assert_allclose(kernel[:size, size:], expected, rtol=1e-11)


def test_deep_limit() -> None:
    # Both cross kernels tend to (Eφ)² 11ᵀ, geometrically; what is left is removed by Aitken's rule.
    kernels = propagate_two_batches(random_covariance(8, 88), (4, 4), 30)
    for kernel, tolerance in ((kernels.nngp_by_depth, 1e-7), (kernels.ntk_by_depth, 1e-3)):
        before, middle, last = (2 * kernel[depth, :4, 4:] for depth in (20, 25, 30))
        limit = last - (last - middle) ** 2 / (last - 2 * middle + before)
        np.testing.assert_allclose(limit, 0.375, rtol=0, atol=tolerance)
        assert np.abs(last - 0.375).max() < np.abs(middle - 0.375).max() / 2
    ratio = kernels.ntk_by_depth[30, 0, 0] / kernels.ntk_by_depth[29, 0, 0]
    assert ratio == pytest.approx(batch_norm_fixed_point(4).gradient_growth, rel=1e-4)


def test_single_precision() -> None:
    sigma, theta = random_covariance(10, 83), random_covariance(10, 84)
    blocks = sigma[:6, :6], sigma[6:, 6:], sigma[:6, 6:], theta[:6, 6:]
    traced = two_batch_layer(*(jnp.asarray(block, jnp.float32) for block in blocks))
    for computed, expected in zip(traced, layer(sigma, theta, 6), strict=True):
        assert computed.dtype == jnp.float32
        np.testing.assert_allclose(np.array(computed), expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_forward_alone() -> None:
    sigma = random_covariance(10, 83)
    with double_precision():
        value, tangent = two_batch_layer(*map(jnp.asarray, (sigma[:6, :6], sigma[6:, 6:], sigma[:6, 6:])), None)
        np.testing.assert_allclose(np.array(value), layer(sigma, sigma, 6)[0], rtol=1e-13)
    assert tangent is None


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        (
            (5, 4),
            ValueError,
            r"sizes: must be the sizes of two batches .* 10 rows of gram; received \(5, 4\)\. Pass \(B, 10 - B\)",
        ),
        ((4, 4, 2), ValueError, r"received \(4, 4, 2\).*for a single batch take ntk\.analytic\.propagate"),
        (
            (7, 3),
            BatchTooSmallError,
            r"sizes\[1\]: must be an integer of at least 4; received 3\. .*diverges for B <= 3",
        ),
    ],
)
def test_sizes_that_are_not_admissible(sizes: tuple[int, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        propagate_two_batches(random_covariance(10, 89), sizes, 1)


def test_other_inputs_that_are_not_admissible() -> None:
    gram = random_covariance(10, 89)
    flat = np.kron(np.eye(2), circle(5) + 1e-20)
    with pytest.raises(CentredRankError, match=r"centred rank of at least 3 over the batch .* found 2 over 5 rows"):
        propagate_two_batches(flat, (5, 5), 1)
    with pytest.raises(ValueError, match=r"activation: must be 'relu', .* received 'tanh'"):
        propagate_two_batches(gram, (5, 5), 1, activation="tanh")
    with pytest.raises(UnknownNameError, match="statistics: must be one of 'differentiated'"):
        propagate_two_batches(gram, (5, 5), 1, statistics="running")
    with pytest.raises(ValueError, match="depth: must be an integer of at least 1; received 0"):
        propagate_two_batches(gram, (5, 5), 0)
    with pytest.raises(ValueError, match="sigma_w2: must be a finite, positive variance; received -1"):
        propagate_two_batches(gram, (5, 5), 1, sigma_w2=-1.0)
    with pytest.raises(GramError, match="gram: must be a square matrix"):
        propagate_two_batches(gram[:5], (5, 5), 1)
