"""neural-tangents layers for weight mean and batch norm: against closed recursions, sums over patches, finite layers.

Everything runs in double precision within the contexts named, except where single precision is what is tested.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntk.analytic import dual_activation, layers, leaky_relu, propagate, propagate_two_batches, stable_weight_variance
from ntk.analytic.compat import nt, stax
from ntk.errors import (
    BatchOfOneError,
    BatchTilingError,
    BatchTooSmallError,
    CentredRankError,
    MaskError,
    NotGaussianError,
)
from tests.ntk.analytic.cases import Array, printed

STABLE = float(np.sqrt(stable_weight_variance("relu", "weight_mean")))


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def inputs(n: int, dimension: int = 10, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((n, dimension))


def images(n: int, height: int = 4, width: int = 5, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal((n, height, width, 3))


def gram(x: Array) -> Array:
    return x @ x.T / x.shape[1]


def dense(*between: Any, depth: int, deviation: float, b_std: float | None = None) -> Any:
    """Dense layers with others between them; the first of gain one and without biases."""
    after = stax.Dense(8, deviation, b_std)
    return stax.serial(stax.Dense(8, 1.0), *[*between, after] * depth)


# ----------------------------------------------------------------------------------------------- against the recursions


@pytest.mark.parametrize("activation", ["relu", "abs", "gelu", "erf", "sine", "leaky_relu"])
@pytest.mark.parametrize("norm", ["none", "weight_mean"])
def test_dense_networks_follow_the_recursion(activation: str, norm: str) -> None:
    x, deviation, bias = inputs(6), 1.6, 0.3
    between = layers.Activation(activation) if norm == "none" else layers.WeightMean(activation)
    kernels = dense(between, depth=3, deviation=deviation, b_std=bias)[2](x)
    expected = propagate(gram(x), 3, norm, activation, deviation**2, bias**2)
    np.testing.assert_allclose(kernels.nngp, expected.nngp, rtol=1e-12)
    np.testing.assert_allclose(kernels.ntk, expected.ntk, rtol=1e-12)


def test_weight_mean_behind_a_relu_of_stax() -> None:
    x = inputs(6)
    kernels = dense(stax.Relu(), layers.WeightMean(behind="relu"), depth=5, deviation=STABLE)[2](x)
    expected = propagate(gram(x), 5, "weight_mean")
    np.testing.assert_allclose(kernels.nngp, expected.nngp, rtol=1e-12)
    np.testing.assert_allclose(kernels.ntk, expected.ntk, rtol=1e-12)


def test_diagonals_are_exact_at_depth() -> None:
    # Θ_ii = D + 1 for critical ReLU of unit variance: an angle that errs by √ε a layer would show.
    x = inputs(4)
    x *= np.sqrt(10 / (x**2).sum(1, keepdims=True))
    diagonal = dense(layers.Activation(), depth=50, deviation=np.sqrt(2))[2](x, None, "ntk").diagonal()
    assert np.abs(diagonal / 51 - 1).max() < 1e-13


@pytest.mark.parametrize("parametrization", ["ntk", "standard"])
def test_kernel_between_two_sets(parametrization: str) -> None:
    x = inputs(7)
    first = stax.Dense(8, 1.0, parameterization=parametrization)
    second = stax.Dense(8, STABLE, parameterization=parametrization)
    network = stax.serial(first, layers.WeightMean("relu"), second)
    across = network[2](x[:4], x[4:], ("nngp", "ntk"))
    width = {} if parametrization == "ntk" else {"parametrization": "standard", "width": (10, 8)}
    expected = propagate(gram(x), 1, "weight_mean", **width)
    np.testing.assert_allclose(across.nngp, expected.nngp[:4, 4:], rtol=1e-12)
    np.testing.assert_allclose(across.ntk, expected.ntk[:4, 4:], rtol=1e-12)


@pytest.mark.parametrize("statistics", ["differentiated", "mean_differentiated", "constant"])
@pytest.mark.parametrize(("slope", "affine"), [(0.0, False), (0.2, True), (1.0, False)])
def test_batch_norm_follows_the_recursion(slope: float, affine: bool, statistics: str) -> None:
    x = inputs(8)
    norm = layers.BatchNormRelu(slope, affine=affine, statistics=statistics)
    network = dense(norm, depth=3, deviation=1.3)
    options = {"statistics": statistics, "affine": affine, "sigma_w2": 1.3**2}
    expected = propagate(gram(x), 3, "batch_norm", leaky_relu(slope), **options)
    scale = np.abs(expected.ntk).max()
    traced = jax.jit(lambda x: network[2](x, None, ("nngp", "ntk")))(x)
    for kernels, tolerance in ((network[2](x), 1e-12), (traced, 1e-10)):
        np.testing.assert_allclose(kernels.nngp, expected.nngp, rtol=0, atol=tolerance * np.abs(expected.nngp).max())
        np.testing.assert_allclose(kernels.ntk, expected.ntk, rtol=0, atol=tolerance * scale)


def test_batch_norm_of_points_beyond_the_batch() -> None:
    x = inputs(10)
    kernels = dense(layers.BatchNormRelu(n_statistics=7), depth=2, deviation=1.0)[2](x)
    expected = propagate(gram(x), 2, "batch_norm", n_statistics=7)
    np.testing.assert_allclose(kernels.ntk, expected.ntk, rtol=0, atol=1e-12 * np.abs(expected.ntk).max())


def test_batch_norm_of_two_batches() -> None:
    x = inputs(11)
    network = dense(layers.BatchNormRelu(), depth=2, deviation=1.0)
    expected = propagate_two_batches(gram(x), (6, 5), 2)
    across = network[2](x[:6], x[6:])
    traced = jax.jit(lambda a, b: network[2](a, b, ("nngp", "ntk")))(x[:6], x[6:])
    for kernels in (across, traced):
        np.testing.assert_allclose(kernels.nngp, expected.nngp[:6, 6:], rtol=0, atol=1e-9)
        np.testing.assert_allclose(kernels.ntk, expected.ntk[:6, 6:], rtol=0, atol=1e-9)
    np.testing.assert_allclose(across.cov2, expected.nngp[6:, 6:], rtol=0, atol=1e-12)
    # A second batch that is the first is the same batch, whether that is known beforehand or found out.
    alone = network[2](x[:6], None, "ntk")
    np.testing.assert_allclose(network[2](x[:6], x[:6], "ntk"), alone, rtol=1e-12)
    np.testing.assert_allclose(jax.jit(lambda a, b: network[2](a, b, "ntk"))(x[:6], x[:6]), alone, rtol=1e-9)


def test_batch_norm_over_positions_is_that_of_a_larger_batch() -> None:
    # 1 × 1 convolutions treat each position as a sample: n·H·W rows under one set of statistics.
    x = images(2, 2, 3)
    conv = [stax.Conv(8, (1, 1), W_std=1.0), layers.BatchNormRelu(), stax.Conv(8, (1, 1), W_std=1.0)]
    kernels = stax.serial(*conv, stax.Flatten())[2](x)
    rows = x.reshape(-1, 3)
    whole = propagate(gram(rows) + 1e-12 * np.eye(len(rows)), 1, "batch_norm")
    blocks = whole.ntk.reshape(2, 6, 2, 6)
    np.testing.assert_allclose(kernels.ntk, np.einsum("ipjp->ij", blocks) / 6, rtol=0, atol=1e-5)


# -------------------------------------------------------------------------------------------------- against the patches


def patches(x: Array, padding: str, size: int = 3) -> Array:
    """All size × size patches [n, H', W', size², C] of images, by slicing."""
    reach = size // 2
    modes = {"SAME": {"mode": "constant"}, "CIRCULAR": {"mode": "wrap"}}
    if padding != "VALID":
        x = np.pad(x, [(0, 0), (reach, reach), (reach, reach), *[(0, 0)] * (x.ndim - 3)], **modes[padding])
    height, width = x.shape[1] - size + 1, x.shape[2] - size + 1
    shifted = [x[:, i : i + height, j : j + width] for i in range(size) for j in range(size)]
    return np.stack(shifted, axis=3)


def weight_mean_conv_oracle(x: Array, padding: str, activation: str, variance: float) -> tuple[Array, Array]:
    """NNGP and NTK [n, n, H, W, H, W] of conv 1 × 1, activation, weight-mean conv 3 × 3: a sum over offsets."""
    n, height, width, channels = x.shape
    dual = dual_activation(activation)
    flat = x.reshape(-1, channels)
    covariance = flat @ flat.T / channels
    scale = np.sqrt(covariance.diagonal())
    rho = np.clip(covariance / np.outer(scale, scale), -1, 1)
    np.fill_diagonal(rho, 1)
    q1, q2 = covariance.diagonal()[:, None], covariance.diagonal()[None]
    inside = np.arange(len(flat)).reshape(n, height, width) + 1
    index = patches(inside, padding).reshape(-1, 9)  # the row at each offset of each patch; 0 in the padding
    border = lambda matrix: np.pad(matrix, ((1, 0), (1, 0)))
    value, slope = border(dual.value(rho, q1, q2)), border(dual.derivative(rho, q1, q2) * covariance)
    mean = np.concatenate([[0.0], dual.mean(covariance.diagonal())])
    patch_mean = mean[index].mean(axis=1)
    averaged = lambda matrix: sum(matrix[np.ix_(index[:, b], index[:, b])] for b in range(9)) / 9
    nngp = variance * (averaged(value) - np.outer(patch_mean, patch_mean))
    ntk = nngp + variance * averaged(slope)
    h, w = patches(inside, padding).shape[1:3]
    shape = (n, h, w, n, h, w)
    return tuple(kernel.reshape(shape).transpose(0, 3, 1, 2, 4, 5) for kernel in (nngp, ntk))


@pytest.mark.parametrize("padding", ["SAME", "CIRCULAR", "VALID"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("fused", [True, False])
def test_weight_mean_convolution_sums_over_its_patch(padding: str, activation: str, fused: bool) -> None:
    # The ReLU of stax errs by √ε where a position meets itself at a correlation of one less its rounding.
    x, variance, exact = images(2), 1.9, 1e-13 if fused else 1e-7
    nngp, ntk = weight_mean_conv_oracle(x, padding, activation, variance)
    options = {"padding": padding, "W_std": np.sqrt(variance)}
    if fused:
        behind = [layers.Conv(8, (3, 3), activation=activation, **options)]
    elif activation == "relu":
        behind = [stax.Relu(), layers.Conv(8, (3, 3), behind="relu", **options)]
    else:
        return
    network = stax.serial(stax.Conv(8, (1, 1), W_std=1.0), *behind)
    whole = network[2](x, None, diagonal_spatial=False)
    assert not whole.is_reversed
    np.testing.assert_allclose(whole.nngp.transpose(0, 1, 2, 4, 3, 5), nngp, rtol=0, atol=1e-13)
    np.testing.assert_allclose(whole.ntk.transpose(0, 1, 2, 4, 3, 5), ntk, rtol=0, atol=exact)
    diagonal = stax.serial(network, stax.Flatten())[2](x)
    h, w = nngp.shape[2:4]
    np.testing.assert_allclose(diagonal.ntk, np.einsum("ijhwhw->ij", ntk) / (h * w), rtol=0, atol=exact)
    np.testing.assert_allclose(diagonal.cov1, np.einsum("iihwhw->i", nngp) / (h * w), rtol=1e-12)
    pooled = stax.serial(network, stax.GlobalAvgPool())[2](x)
    np.testing.assert_allclose(pooled.nngp, nngp.mean(axis=(2, 3, 4, 5)), rtol=0, atol=1e-13)


def test_borders_of_a_zero_padded_weight_mean_convolution() -> None:
    # docs/mathematics.md §4.6: images of uniform unit variance, uncorrelated with each other.
    x = np.sqrt(2) * np.broadcast_to(np.eye(2)[:, None, None, :], (2, 5, 5, 2))
    network = stax.serial(stax.Conv(8, (1, 1), W_std=1.0), layers.Conv(8, (3, 3), activation="relu"))
    nngp = network[2](x, None, "nngp", diagonal_spatial=True)
    for place, correlation, variance in (((0, 2), "0.134684", "0.770432"), ((0, 0), "0.205979", "0.559739")):
        printed(float(nngp[0, 0][place]), variance)
        printed(float(nngp[0, 1][place] / nngp[0, 0][place]), correlation)
    assert nngp[0, 0, 2, 2] == pytest.approx(1, rel=1e-12)
    assert nngp[0, 1, 2, 2] == pytest.approx(0, abs=1e-12)
    circular = stax.serial(
        stax.Conv(8, (1, 1), W_std=1.0), layers.Conv(8, (3, 3), padding="CIRCULAR", activation="relu")
    )
    np.testing.assert_allclose(circular[2](x, None, "nngp", diagonal_spatial=True)[0, 1], 0, atol=1e-12)


@pytest.mark.parametrize("strides", [(1, 1), (2, 1)])
def test_explicit_padding(strides: tuple[int, int]) -> None:
    # Zeros by themselves, then no padding; with stride one also what "SAME" does.
    x, widths = images(2), [(1, 1), (1, 1)]
    stem = stax.Conv(8, (2, 2), W_std=1.0)
    padded = stax.serial(stem, layers.Conv(8, (3, 3), strides, widths, activation="gelu"), stax.GlobalAvgPool())
    apart = stax.serial(
        stem, stax.Gelu(), layers.Pad(widths), stax.Conv(8, (3, 3), strides, "VALID"), stax.GlobalAvgPool()
    )
    plain = stax.serial(stem, stax.Gelu(), stax.Conv(8, (3, 3), strides, "SAME"), stax.GlobalAvgPool())
    if strides == (1, 1):
        same = stax.serial(stem, layers.Conv(8, (3, 3), strides, "SAME", activation="gelu"), stax.GlobalAvgPool())
        np.testing.assert_allclose(padded[2](x, None, "ntk"), same[2](x, None, "ntk"), rtol=1e-12)
        np.testing.assert_allclose(apart[2](x, None, "ntk"), plain[2](x, None, "ntk"), rtol=1e-12)
    shape, params = padded[0](jax.random.key(0), x.shape)
    assert padded[1](params, x).shape == shape == (2, 8)
    weight = params[1][0]
    centred = weight - weight.mean(axis=(0, 1, 2), keepdims=True)
    deviation = np.sqrt(stable_weight_variance("gelu", "weight_mean"))
    direct = jax.lax.conv_general_dilated(
        jax.nn.gelu(stem[1](params[0], x), approximate=False),
        centred,
        strides,
        widths,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    expected = (deviation / np.sqrt(9 * 8) * direct).mean(axis=(1, 2))
    np.testing.assert_allclose(padded[1](params, x), expected, rtol=0, atol=1e-12)


# ----------------------------------------------------------------------------------------------------- finite networks


def test_finite_layers_do_what_they_say() -> None:
    x = inputs(9)
    centred = layers.WeightMean("relu")[1]((), x)
    rectified = np.maximum(x, 0)
    np.testing.assert_allclose(centred, rectified - rectified.mean(1, keepdims=True), atol=1e-15)
    gain, shift = np.full((1, 10), 2.0), np.full((1, 10), 0.5)
    normalized = layers.BatchNormRelu(0.1, epsilon=1e-3, affine=True, n_statistics=6)[1]((gain, shift), x)
    y = 2 * (x - x[:6].mean(0)) / np.sqrt(x[:6].var(0) + 1e-3) + 0.5
    np.testing.assert_allclose(normalized, np.where(y > 0, y, 0.1 * y), atol=1e-14)
    assert layers.BatchNormRelu(affine=True)[0](jax.random.key(0), (4, 3, 3, 5))[1][0].shape == (1, 1, 1, 5)
    np.testing.assert_allclose(layers.Scale(0.3)[1]((), x), 0.3 * x)


@pytest.mark.parametrize("statistics", ["differentiated", "mean_differentiated", "constant"])
def test_finite_batch_norm_differentiates_what_it_says(statistics: str) -> None:
    x, h = inputs(6, 1)[:, 0], 1e-6
    apply = lambda x: layers.BatchNormRelu(statistics=statistics)[1]((), x[:, None])[:, 0]
    jacobian = jax.jacobian(apply)(x)

    def by_hand(values: Array, at: Array) -> Array:
        mean = (at if statistics == "constant" else values).mean()
        deviation = (values if statistics == "differentiated" else at).std()
        return np.maximum((values - mean) / deviation, 0)

    columns = [(by_hand(x + h * e, x) - by_hand(x - h * e, x)) / (2 * h) for e in np.eye(6)]
    np.testing.assert_allclose(jacobian, np.stack(columns, axis=1), rtol=0, atol=1e-8)


def test_scale_and_sums_of_branches() -> None:
    x = inputs(5)
    stem, branch = stax.Dense(8, 1.0), stax.serial(layers.Activation(), stax.Dense(8, 1.2))
    network = stax.serial(stem, layers.sum_branches(stax.Identity(), stax.serial(branch, layers.Scale(0.5))))
    stream, alone = stem[2](x), stax.serial(stem, branch)[2](x)
    summed = network[2](x)  # and warns of nothing
    np.testing.assert_allclose(summed.ntk, stream.ntk + 0.25 * alone.ntk, rtol=1e-14)
    np.testing.assert_allclose(summed.nngp, stream.nngp + 0.25 * alone.nngp, rtol=1e-14)


def test_gradients_of_kernels_are_finite() -> None:
    # JAX's own derivative of √(1 − c²) is NaN at c = 1, that is on every diagonal.
    x = inputs(5)
    for between in (layers.Activation(), layers.WeightMean("relu"), layers.BatchNormRelu()):
        kernel = dense(between, depth=2, deviation=1.4)[2]
        gradient = jax.grad(lambda x, kernel=kernel: kernel(x, None, "nngp").sum())(jnp.asarray(x))
        h, direction = 1e-5, inputs(5, seed=3)
        ahead, behind = (float(kernel(x + sign * h * direction, None, "nngp").sum()) for sign in (1, -1))
        assert float((gradient * direction).sum()) == pytest.approx((ahead - behind) / (2 * h), rel=1e-6)


@pytest.mark.parametrize("between", ["WeightMean", "BatchNormRelu"])
def test_single_precision(between: str) -> None:
    x = inputs(8)
    with jax.enable_x64(False):
        layer = layers.WeightMean("relu") if between == "WeightMean" else layers.BatchNormRelu()
        network = dense(layer, depth=3, deviation=1.5)
        single = network[2](x.astype(np.float32), None, ("nngp", "ntk"))
        traced = jax.jit(lambda x: network[2](x, None, "ntk"))(x.astype(np.float32))
    assert single.ntk.dtype == np.float32
    norm = "weight_mean" if between == "WeightMean" else "batch_norm"
    expected = propagate(gram(x), 3, norm, sigma_w2=1.5**2)
    for ntk in (single.ntk, traced):
        np.testing.assert_allclose(ntk, expected.ntk, rtol=0, atol=1e-5 * np.abs(expected.ntk).max())


# ------------------------------------------------------------------------------------------------------------- refusals


def test_batches_are_not_tiled() -> None:
    x = inputs(8)
    kernel = dense(layers.BatchNormRelu(), depth=1, deviation=1.0)[2]
    for tiled in (nt.batch(kernel, batch_size=4), nt.batch(kernel, batch_size=4, device_count=0)):
        with pytest.raises(
            BatchTilingError, match=r"kernel_fn: must not be computed in tiles by nt\.batch .*whole batch"
        ):
            tiled(x, None, "ntk")
    network = stax.serial(stax.Dense(16), layers.BatchNormRelu(), stax.Dense(1))
    sampled = nt.monte_carlo_kernel_fn(*network[:2], jax.random.PRNGKey(0), 1, batch_size=4)
    with pytest.raises(BatchTilingError, match=r"batch_size of nt.monte_carlo_kernel_fn"):
        sampled(x, None, "ntk")
    assert nt.monte_carlo_kernel_fn(*network[:2], jax.random.PRNGKey(0), 1)(x, None, "ntk").shape == (8, 8)


def test_tiles_of_weight_mean_are_admitted() -> None:
    x = inputs(8)
    kernel = dense(layers.WeightMean("relu"), depth=2, deviation=STABLE)[2]
    np.testing.assert_allclose(nt.batch(kernel, batch_size=4)(x, None, "ntk"), kernel(x, None, "ntk"), rtol=1e-12)


def test_a_tiled_batch_norm_would_be_wrong() -> None:
    # What the refusal is for: tiles of four are another network.
    x = inputs(8)
    kernel = dense(layers.BatchNormRelu(), depth=1, deviation=1.0)[2]
    tile = kernel(x[:4], None, "ntk")
    assert np.abs(tile - kernel(x, None, "ntk")[:4, :4]).max() > 0.1


def test_what_has_no_kernel() -> None:
    x = inputs(8)
    with pytest.raises(NotGaussianError, match=r"activation: 'relu' must act on Gaussian .*Put a Dense or Conv"):
        layers.Activation()[2](x)
    with pytest.raises(NotGaussianError, match="'gelu' must act on Gaussian"):
        stax.serial(stax.Dense(8), layers.Activation(), layers.WeightMean("gelu"))[2](x)
    with pytest.raises(NotGaussianError, match="'BatchNormRelu' must act on Gaussian"):
        stax.serial(stax.Dense(8), stax.Relu(), layers.BatchNormRelu())[2](x)
    with pytest.raises(NotGaussianError, match=r"behind: .* directly behind 'relu'.*Pass activation='relu'"):
        stax.serial(stax.Dense(8), layers.WeightMean(behind="relu"))[2](x)
    with pytest.raises(NotGaussianError, match="behind: the layer must stand directly behind 'abs'"):
        stax.serial(stax.Conv(8, (1, 1)), layers.Conv(8, (3, 3), behind="abs"))[2](images(2))


@pytest.mark.parametrize("build", [layers.WeightMean, lambda **options: layers.Conv(8, (3, 3), **options)])
def test_weight_mean_is_told_what_it_centres(build: Any) -> None:
    with pytest.raises(ValueError, match=r"activation, behind: one of the two must say .*activation=None, behind=None"):
        build()
    with pytest.raises(ValueError, match=r"activation, behind: one of the two .*activation='relu', behind='relu'"):
        build(activation="relu", behind="relu")
    with pytest.raises(ValueError, match=r"behind: must be 'relu' or another .* 'gelu'\. Pass activation='gelu'"):
        build(behind="gelu")


@pytest.mark.parametrize("slope", [0.2, -1.0])
def test_weight_mean_behind_other_homogeneous_activations(slope: float) -> None:
    x, dual = inputs(6), leaky_relu(slope)
    kernels = dense(layers.Activation(dual), layers.WeightMean(behind=dual), depth=3, deviation=1.3)[2](x)
    expected = propagate(gram(x), 3, "weight_mean", dual, 1.3**2)
    np.testing.assert_allclose(kernels.ntk, expected.ntk, rtol=0, atol=1e-13)


def test_what_batch_norm_refuses() -> None:
    x = inputs(8)
    network = dense(layers.BatchNormRelu(), depth=1, deviation=1.0)
    with pytest.raises(BatchTooSmallError, match=r"x1 \(samples times positions\): must be an integer of at least 4"):
        network[2](x[:3])
    with pytest.raises(BatchTooSmallError, match=r"x1, x2 \(samples times positions\): must be"):
        network[2](x[:5], x[5:])
    circle = np.stack([np.cos(np.arange(8.0)), np.sin(np.arange(8.0))], axis=1)
    with pytest.raises(CentredRankError, match=r"centred rank of at least 3 .* found 2 over 8 rows"):
        network[2](circle)
    with pytest.raises(MaskError, match=r"mask_constant: must be None with a BatchNormRelu layer.*Leave it out"):
        network[2](x, None, mask_constant=100.0)
    with pytest.raises(ValueError, match=r"x2: must be None under n_statistics=5.*concatenation"):
        dense(layers.BatchNormRelu(n_statistics=5), depth=1, deviation=1.0)[2](x[:5], x[5:])
    with pytest.raises(ValueError, match=r"statistics: must be one of 'differentiated'.*received 'running'"):
        layers.BatchNormRelu(statistics="running")
    with pytest.raises(BatchTooSmallError, match="n_statistics: must be an integer of at least 4; received 2"):
        layers.BatchNormRelu(n_statistics=2)
    with pytest.raises(ValueError, match=r"epsilon: must be a finite, non-negative variance; received -1"):
        layers.BatchNormRelu(epsilon=-1.0)
    with pytest.raises(ValueError, match=r"negative_slope: must be"):
        layers.BatchNormRelu(np.nan)
    by_sample = nt.empirical_ntk_fn(layers.BatchNormRelu()[1], vmap_axes=0)
    with pytest.raises(BatchOfOneError, match=r"inputs: must hold two values .* shape \(1, 10\).*vmap_axes=None"):
        by_sample(x, None, ())
