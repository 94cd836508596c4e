"""Finite networks drawn from their definitions, against docs/mathematics.md §4.4, §4.6, §5.4 and §9.5.

Seeds and sizes were fixed beforehand; four standard errors are allowed. Networks are propagated here by hand, apart
from the convolutions, whose finite layers are those of :mod:`ntk.analytic.layers`.
"""

import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntk.analytic import correlation_map, dual_activation, gradient_growth, layers, propagate, stable_weight_variance
from ntk.analytic.compat import stax
from ntk.analytic.precision import double_precision
from tests.ntk.analytic.cases import Array, condition_number, constant_half, printed, standard_scores

RELU = dual_activation("relu")
WEIGHT = stable_weight_variance("relu", "weight_mean")
PAIR = ((1.0, 0.5), (0.5, 1.0))


def agrees(samples: Array, expected: float) -> bool:
    return bool(abs(standard_scores(samples, np.float64(expected))) < 4)


def test_finite_width_of_64() -> None:
    # Lemma 1; widths 4 and 16 are in test_analytic_propagation.
    x, y = np.random.default_rng(12).standard_normal((2, 40_000, 64))
    first, second = np.maximum(x, 0), np.maximum(0.5 * x + math.sqrt(0.75) * y, 0)
    samples = (first * second).mean(axis=1) - first.mean(axis=1) * second.mean(axis=1)
    assert agrees(samples, propagate(PAIR, 1, "weight_mean", sigma_w2=1, mean_correction=True, width=64).nngp[0, 1])
    assert not agrees(samples, propagate(PAIR, 1, "weight_mean", sigma_w2=1).nngp[0, 1])


def test_scatter_of_norms() -> None:
    """Var ln q_D is 4.40764 D/n under weight mean, 5 D/n in a plain network, up to a relative 10/n."""
    n, depth, chains = 1024, 10, 8000
    first, second, third, fourth = 1 / math.sqrt(2 * math.pi), 1 / 2, 2 / math.sqrt(2 * math.pi), 3 / 2
    moment = fourth - 4 * third * first + 6 * second * first**2 - 3 * first**4
    centred, plain = moment / RELU.variance**2 - 1, fourth / RELU.second_moment**2 - 1
    printed(centred, "4.40764")
    assert plain == 5
    generator, logarithms = np.random.default_rng(13), np.zeros((2, chains))
    for _ in range(depth):
        for block in np.split(logarithms, 16, axis=1):
            # A ReLU is homogeneous: the factors of the variance are independent of the variance.
            a = np.maximum(generator.standard_normal((block.shape[1], n)), 0)
            block += np.log([a.var(axis=1) * WEIGHT, (a**2).mean(axis=1) * 2])
    for values, excess, other in zip(logarithms, (centred, plain), (plain, centred), strict=True):
        squares = (values - values.mean()) ** 2 * n / depth
        error = squares.std() / math.sqrt(chains)
        assert abs(squares.mean() - excess) < 4 * error + excess * 10 / n
        assert abs(squares.mean() - other) > 4 * error + excess * 10 / n
    printed(math.sqrt(centred * 50 / 300), "0.86")


def correlations_of_units(h: Array) -> Array:
    """Correlations over the units of all pairs of examples; h is [networks, examples, units]."""
    unit = h / np.linalg.norm(h, axis=2, keepdims=True)
    pairs = np.triu_indices(h.shape[1], 1)
    return (unit @ unit.swapaxes(1, 2))[:, *pairs]


@pytest.mark.parametrize(("n", "text"), [(300, "0.1027"), (1200, "0.0514")])
def test_scatter_of_correlations(n: int, text: str) -> None:
    """std(c) = √((1 + 1/(1 − t²))/n) under weight mean: given its inputs, a layer is exactly Gaussian."""
    chains, m, depth = 400, 8, 15
    generator = np.random.default_rng(14)
    h = generator.standard_normal((chains, m, n))
    for _ in range(depth):
        a = np.maximum(h, 0)
        a -= a.mean(axis=2, keepdims=True)
        covariance = a @ a.swapaxes(1, 2) * (WEIGHT / (n - 1))
        h = np.linalg.cholesky(covariance) @ generator.standard_normal((chains, m, n))
    squares = (correlations_of_units(h) ** 2).mean(axis=1)
    settled = 1 / (1 - float(correlation_map("weight_mean").derivative(0.0)) ** 2)
    printed(math.sqrt((1 + settled) / n), text)
    assert agrees(squares, (1 + settled) / n)
    assert not agrees(squares, settled / n)  # the control: without the units of the last layer


@pytest.mark.parametrize(("n", "measured"), [(300, 0.0992), (1200, 0.0493)])
def test_scatter_of_correlations_of_batch_norm(n: int, measured: float) -> None:
    """A batch of 40 scatters about −1/(B − 1) as one network measured before did, and more than 1/√n."""
    chains, b, depth = 40, 40, 15
    generator = np.random.default_rng(16)
    y = generator.standard_normal((chains, b, n))
    for layer in range(depth + 1):
        y = y - y.mean(axis=1, keepdims=True)
        y /= y.std(axis=1, keepdims=True)
        if layer < depth:
            x = np.maximum(y, 0)
            y = np.linalg.cholesky(x @ x.swapaxes(1, 2) / n) @ generator.standard_normal((chains, b, n))
    spread = correlations_of_units(y).std(axis=1)
    reach = 4 * spread.std(ddof=1) * math.sqrt(1 + 1 / chains)
    assert abs(spread.mean() - measured) < reach
    assert abs(spread.mean() - n**-0.5) > reach


# Convolutions.

CHANNELS, SIDE, OFFSETS = 8, 4, [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]


def images(smooth: bool) -> Array:
    """Three images [3, 4, 4, 48]: two of correlation 1/2, one unrelated; positions are alike or unrelated."""
    mix = np.linalg.cholesky([[1, 0.5, 0], [0.5, 1, 0], [0, 0, 1]])
    position = np.ones((SIDE**2, 1)) if smooth else np.eye(SIDE**2)
    flat = np.kron(mix, position)
    padded = np.zeros((3 * SIDE**2, 3 * SIDE**2))
    padded[:, : flat.shape[1]] = flat
    return math.sqrt(3 * SIDE**2) * padded.reshape(3, SIDE, SIDE, -1)


def convolved(x: Array, channels: float) -> Array:
    """E[K̂] behind a zero-padded 3×3 layer with ``channels`` inputs, sums written out [3, 3, 4, 4]."""
    covariance = np.einsum("aijd,bkld->abijkl", x, x) / x.shape[-1]
    value, apart = RELU.value(np.clip(covariance, -1, 1)), float(RELU.value(0.0))
    inside = lambda i, j: 0 <= i < SIDE and 0 <= j < SIDE
    result = np.zeros((3, 3, SIDE, SIDE))
    for i in range(SIDE):
        for j in range(SIDE):
            patch = [(i + di, j + dj) for di, dj in OFFSETS if inside(i + di, j + dj)]
            same = sum(value[:, :, p, q, p, q] for p, q in patch) / 9
            pairs = sum(value[:, :, p, q, r, s] for p, q in patch for r, s in patch) / 81
            between = apart * (len(patch) / 9) ** 2
            result[:, :, i, j] = WEIGHT * (same - pairs / channels - (1 - 1 / channels) * between)
    return result


def network(channels: int, outputs: int) -> tuple:
    """Pre-activations by a 1×1 layer, whose covariance is that of the pixels, and a weight-mean convolution."""
    return stax.serial(
        stax.Conv(channels, (1, 1), W_std=1.0, b_std=None), layers.Conv(outputs, (3, 3), activation="relu")
    )


@cache
def convolution_samples(smooth: bool) -> Array:
    """K̂ of 5000 networks of 8 channels [5000, 3, 3, 4, 4], each from 32 outputs."""
    outputs = 32
    with double_precision():
        x = jnp.asarray(images(smooth))
        init_fn, apply_fn, _ = network(CHANNELS, outputs)

        def draw(key: jax.Array) -> jax.Array:
            y = apply_fn(init_fn(key, x.shape)[1], x)
            return jnp.einsum("aijo,bijo->abij", y, y) / outputs

        return np.array(jax.jit(lambda keys: jax.lax.map(draw, keys))(jax.random.split(jax.random.key(15), 5000)))


@pytest.mark.parametrize("smooth", [False, True])
def test_convolution_of_few_channels(smooth: bool) -> None:
    """E[K̂] of §4.6 at 8 channels, at each position: inside, on the edge, in the corner."""
    x, samples = images(smooth), convolution_samples(smooth)
    assert np.abs(standard_scores(samples, convolved(x, CHANNELS))).max() < 4
    inside = convolved(x, CHANNELS)[:, :, 1:2, 1:2]
    assert np.abs(standard_scores(samples, inside)).max() > 10  # the control: as if borders were like the inside
    with double_precision():
        limit = np.array(network(1, 1)[2](jnp.asarray(x), None, "nngp", diagonal_spatial=True))
    np.testing.assert_allclose(limit, convolved(x, math.inf), rtol=0, atol=1e-12)
    printed(float(limit[0, 2, 0, 0]), "0.1153")
    printed(float(limit[0, 2, 0, 1]), "0.1038")


@pytest.mark.parametrize(("smooth", "effective"), [(False, 9 * CHANNELS), (True, CHANNELS)])
def test_effective_number_of_samples(smooth: bool, effective: int) -> None:
    """Inside, K̂ is low by 1/Ck² where neighbours are unrelated, as Lemma 1 has it, and by 1/C where they are alike."""
    inside = convolution_samples(smooth)[:, 0, 1, 1, 1]
    full = float(correlation_map("weight_mean")(0.5))
    assert agrees(inside, (1 - 1 / effective) * full)
    assert not agrees(inside, (1 - effective / (9 * CHANNELS**2)) * full)


# Dense networks at depth.


def dense_kernels(n: int, depth: int, seed: int) -> tuple[Array, Array]:
    """K̂ and the projected Θ̂ [10, 10] of one weight-mean network on const-0.5, its backward pass written out."""
    rng, scale = np.random.default_rng(seed), np.float32(math.sqrt(WEIGHT / n))
    h = np.linalg.cholesky(constant_half()).astype(np.float32) @ rng.standard_normal((10, n), dtype=np.float32)
    activations, gates, weights = [], [], []
    for layer in range(depth):
        a = np.maximum(h, 0)
        activations.append(a - a.mean(axis=1, keepdims=True))
        gates.append(h > 0)
        weights.append(scale * rng.standard_normal((n if layer < depth - 1 else 1, n), dtype=np.float32))
        h = activations[-1] @ weights[-1].T
    second = [constant_half(), *(a @ a.T * (WEIGHT / n) for a in activations)]
    ntk, gradient = second[-1], np.ones((10, 1), np.float32)
    for layer in reversed(range(depth)):
        gradient = gradient @ weights[layer]
        gradient = (gradient - gradient.mean(axis=1, keepdims=True)) * gates[layer]
        ntk = ntk + second[layer] * (gradient @ gradient.T)
    return second[-1], ntk


def entries(kernel: Array) -> tuple[float, float]:
    """Mean diagonal and mean off-diagonal entry."""
    m, trace = len(kernel), float(np.trace(kernel))
    return trace / m, (float(kernel.sum()) - trace) / (m * (m - 1))


def test_entries_of_weight_mean_at_depth_5() -> None:
    theory = propagate(constant_half(), 5, "weight_mean")
    drawn = np.array([[entries(kernel) for kernel in dense_kernels(1024, 5, seed)] for seed in range(24)])
    for samples, kernel in zip(drawn.swapaxes(0, 1), (theory.nngp, theory.ntk), strict=True):
        assert np.abs(standard_scores(samples, np.array(entries(kernel)))).max() < 4
    plain = propagate(constant_half(), 5)
    for samples, kernel in zip(drawn.swapaxes(0, 1), (plain.nngp, plain.ntk), strict=True):
        assert not agrees(samples[:, 1], kernel[0, 1])


@pytest.mark.parametrize(
    ("depth", "n", "networks", "theory", "measured"),
    [
        (10, 512, 12, "1.0473", 2.24),
        (20, 512, 12, "1.00008", 4.28),
        (10, 2048, 6, "1.0473", 1.67),
        (20, 1536, 6, "1.00008", 1.79),
    ],
)
def test_condition_number_of_finite_networks(depth: int, n: int, networks: int, theory: str, measured: float) -> None:
    """Far above its limit, as measured before: the mean of twelve networks at width 512, one network beyond.

    What makes it so large is the spread of Θ_ii over examples.
    """
    kernels = [dense_kernels(n, depth, 100 + seed)[1] for seed in range(networks)]
    values = np.array([condition_number(kernel) for kernel in kernels])
    limit = condition_number(propagate(constant_half(), depth, "weight_mean").ntk)
    printed(limit, theory)
    assert not agrees(values, limit)
    error = values.std(ddof=1) * math.sqrt(1 / networks + (1 / 12 if n == 512 else 1))
    assert abs(values.mean() - measured) < 4 * error + 0.005
    scales = [np.sqrt(np.diag(kernel)) for kernel in kernels]
    levelled = np.array([condition_number(k / np.outer(s, s)) for k, s in zip(kernels, scales, strict=True)])
    assert levelled.mean() - 1 < (values.mean() - 1) / 2
    if (depth, n) == (20, 512):
        spread = np.array([s.std() / s.mean() for s in (np.diag(kernel) for kernel in kernels)])
        assert abs(spread.mean() - 0.45) < 4 * math.sqrt(2) * spread.std(ddof=1) / math.sqrt(12) + 0.005


GROWTH = {
    ("batch_norm", "relu", 8): "1.78819",
    ("batch_norm", "relu", 16): "1.58995",
    ("batch_norm", "relu", 64): "1.49306",
    ("batch_norm", "linear", 16): "1.07692",
    ("weight_mean", "relu", 16): "1.46694",
    ("none", "relu", 16): "1",
}
"""Norm, activation and batch, with the growth of the gradient's second moment per layer."""


def growth(norm: str, activation: str, batch: int, layers_of_weights: Array, seed: int) -> float:
    """Mean growth from layer to layer over interior layers of one network; backward passes written out."""
    depth, n, _ = layers_of_weights.shape
    rng, backward, norms = np.random.default_rng(seed), [], []
    h = rng.standard_normal((batch, n), dtype=np.float32)
    for w in layers_of_weights:
        scale = np.ones(n, np.float32)
        if norm == "batch_norm":
            h = h - h.mean(axis=0)
            scale = h.std(axis=0)
        y = h / scale
        gate = np.ones_like(y) if activation == "linear" else y > 0
        backward.append((y, gate, scale))
        x = y * gate
        h = (x - x.mean(axis=1, keepdims=True) if norm == "weight_mean" else x) @ w.T
    gradient = rng.standard_normal((batch, n), dtype=np.float32)
    for w, (y, gate, scale) in zip(layers_of_weights[::-1], reversed(backward), strict=True):
        gradient = gradient @ w
        if norm == "weight_mean":
            gradient = gradient - gradient.mean(axis=1, keepdims=True)
        gradient = gradient * gate
        if norm == "batch_norm":
            gradient = (gradient - gradient.mean(axis=0) - y * (gradient * y).mean(axis=0)) / scale
        norms.append(float((gradient**2).sum()))
        if norm != "batch_norm":
            gradient = gradient * np.float32(math.sqrt(stable_weight_variance("relu", norm)))
    return float((np.array(norms[1:]) / norms[:-1])[3 : depth - 3].mean())


@cache
def growth_samples() -> dict[tuple[str, str, int], Array]:
    """Growth in each of the settings, of twelve networks of width 1000 and depth 12."""
    samples: dict[tuple[str, str, int], list[float]] = {setting: [] for setting in GROWTH}
    for seed in range(12):
        w = np.random.default_rng(seed).standard_normal((12, 1000, 1000), dtype=np.float32)
        w *= np.float32(1000**-0.5)
        for setting in GROWTH:
            samples[setting].append(growth(*setting, w, 200 + seed))
    return {setting: np.array(values) for setting, values in samples.items()}


@pytest.mark.parametrize(("setting", "text"), GROWTH.items())
def test_growth_of_gradients(setting: tuple[str, str, int], text: str) -> None:
    norm, activation, batch = setting
    expected = gradient_growth(norm, batch, activation)
    printed(expected, text if "." in text else f"{text}.00000")
    drawn = growth_samples()[setting]
    assert agrees(drawn, expected)
    for other, theirs in GROWTH.items():
        assert other == setting or not agrees(drawn, float(theirs))
