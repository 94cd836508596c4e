"""Whole networks: against the recursions, and their finite forms against their kernels."""

from collections.abc import Iterator

import jax
import numpy as np
import pytest

from ntk.analytic import convolutional, fully_connected, pre_activation_resnet, propagate, propagate_residual
from ntk.analytic.compat import nt, stax
from tests.ntk.analytic.cases import Array

NORMS = ("none", "weight_mean", "batch_norm")
RNG = np.random.default_rng(0)
ROWS = RNG.standard_normal((8, 16)).astype(np.float32)
IMAGES = RNG.standard_normal((4, 3, 3, 3)).astype(np.float32)
DENSE_WIDTHS, CONV_WIDTHS = (32, 64, 128, 256), (16, 32, 64, 128)
STACKS = {
    "dense": (lambda width, norm: fully_connected(2, width, 2, norm=norm), ROWS, DENSE_WIDTHS, 48),
    "convolutional": (lambda width, norm: convolutional(2, width, 2, norm=norm), IMAGES, CONV_WIDTHS, 96),
    "gain and shift": (
        lambda width, _: fully_connected(2, width, 2, norm="batch_norm", affine=True),
        ROWS,
        DENSE_WIDTHS,
        48,
    ),
    "residual": (lambda width, norm: pre_activation_resnet(2, width, 2, norm=norm), ROWS, DENSE_WIDTHS, 48),
}
"""Networks by width and norm, inputs, widths, and the number of networks drawn at each."""


def gram(x: Array) -> Array:
    return x @ x.T / x.shape[1]


@pytest.mark.parametrize("norm", NORMS)
def test_kernels_are_those_of_the_recursions(norm: str) -> None:
    x = ROWS[:6].astype(np.float64)
    bias = 0.0 if norm == "batch_norm" else 0.2
    width = (16, 24, 24, 24)
    with jax.enable_x64(True):
        dense = fully_connected(3, norm=norm, sigma_b2=bias)[2](x, None, "ntk")
        standard = fully_connected(3, 24, norm=norm, parametrization="standard")[2](x, None, "ntk")
        residual = pre_activation_resnet(4, out_features=None, norm=norm, branch_depth=2)[2](x, None, "ntk")
        affine = fully_connected(2, norm="batch_norm", affine=True)[2](x, None, "ntk")
        scaled = {"branch_depth": 2, "branch_scale": "mimicnorm"}
        of_the_code = pre_activation_resnet(3, out_features=None, norm=norm, **scaled)[2](x, None, "ntk")
    for found, expected in (
        (dense, propagate(gram(x), 3, norm, sigma_b2=bias)),
        (standard, propagate(gram(x), 3, norm, parametrization="standard", width=width)),
        (residual, propagate_residual(gram(x), 4, norm, branch_depth=2)),
        (of_the_code, propagate_residual(gram(x), 3, norm, **scaled)),
        (affine, propagate(gram(x), 2, "batch_norm", affine=True)),
    ):
        np.testing.assert_allclose(found, expected.ntk, rtol=0, atol=1e-12 * np.abs(expected.ntk).max())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("readout", ["pool", "flatten"])
def test_a_convolution_over_one_pixel_is_dense(norm: str, readout: str) -> None:
    x = ROWS[:6].astype(np.float64)
    centred = norm == "weight_mean" and readout == "flatten"
    with jax.enable_x64(True):
        network = convolutional(2, norm=norm, filter_shape=(1, 1), readout=readout)
        found = network[2](x[:, None, None, :], None, ("nngp", "ntk"))
    if centred:  # the readout behind Flatten is that of a plain network
        before = propagate(gram(x), 1, norm)
        expected = propagate(before.nngp, 1)
        slope = (expected.ntk - expected.nngp) / before.nngp
        np.testing.assert_allclose(found.ntk, expected.nngp + slope * before.ntk, rtol=1e-10)
    else:
        expected = propagate(gram(x), 2, norm)
        np.testing.assert_allclose(found.ntk, expected.ntk, rtol=0, atol=1e-12 * np.abs(expected.ntk).max())


@pytest.fixture
def fast_to_compile() -> Iterator[None]:
    """Compile without optimizations: what draws networks is compiled anew for each width, which takes most of the time.

    A flag of XLA, not of the precision: errors of rounding are beyond what these tests resolve.
    """
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def sampled_kernels(network: tuple, x: Array, samples: int, group: int = 1) -> Array:
    """Empirical NTKs, each the mean over ``group`` networks [samples / group, n, n], from nt.monte_carlo_kernel_fn."""
    draw = nt.monte_carlo_kernel_fn(*network[:2], jax.random.PRNGKey(0), range(group, samples + 1, group))
    means = np.stack([np.asarray(kernel, np.float64) for kernel in draw(x, None, "ntk")])
    totals = means * group * np.arange(1, len(means) + 1)[:, None, None]
    return np.diff(totals, axis=0, prepend=0) / group


def slope_and_error(x: Array, log_errors: Array) -> tuple[float, float]:
    """Slope of the mean of log_errors [x, samples] in log x, with its standard error."""
    centred = np.log(x) - np.log(x).mean()
    weights = centred / (centred**2).sum()
    spread = log_errors.var(axis=1, ddof=1) / log_errors.shape[1]
    return float(weights @ log_errors.mean(axis=1)), float(np.sqrt(weights**2 @ spread))


@pytest.mark.usefixtures("fast_to_compile")
@pytest.mark.parametrize(
    ("stack", "norm"),
    [(stack, norm) for stack in ("dense", "convolutional", "residual") for norm in NORMS]
    + [("gain and shift", "batch_norm")],
)
def test_finite_networks_approach_their_kernel(stack: str, norm: str) -> None:
    # The relative Frobenius error of single networks falls like 1/√width: asked is a slope of −0.5 ± 0.1.
    build, x, widths, samples = STACKS[stack]
    errors = []
    for width in widths:
        network = build(width, norm)
        exact = np.asarray(network[2](x, None, "ntk"), np.float64)
        deviation = sampled_kernels(network, x, samples) - exact
        errors.append(0.5 * np.log((deviation**2).sum((1, 2)) / (exact**2).sum()))
    slope, standard_error = slope_and_error(np.array(widths), np.array(errors))
    assert standard_error < 0.04
    assert abs(slope + 0.5) < 0.1


@pytest.mark.usefixtures("fast_to_compile")
@pytest.mark.parametrize(
    ("stack", "norm", "other"), [("dense", "weight_mean", "none"), ("gain and shift", "batch_norm", "batch_norm")]
)
def test_the_same_slope_refuses_another_kernel(stack: str, norm: str, other: str) -> None:
    # Plain networks for weight-mean ones, and batch norm that trains no gain and shift for batch norm that does.
    build, x, widths, _ = STACKS[stack]
    kernel = np.asarray(STACKS["dense"][0](32, other)[2](x, None, "ntk"), np.float64)
    errors = []
    for width in widths[1:]:
        deviation = sampled_kernels(build(width, norm), x, 12) - kernel
        errors.append(0.5 * np.log((deviation**2).sum((1, 2)) / (kernel**2).sum()))
    assert slope_and_error(np.array(widths[1:]), np.array(errors))[0] > -0.25


@pytest.mark.usefixtures("fast_to_compile")
def test_more_samples_are_as_good_as_more_width() -> None:
    # At one width, the mean of n networks: again 1/√n, until the bias of that width shows.
    build, x, _, _ = STACKS["dense"]
    network = build(256, "weight_mean")
    exact = np.asarray(network[2](x, None, "ntk"), np.float64)
    singles = sampled_kernels(network, x, 64)
    sizes, errors = np.array([1, 2, 4, 8]), []
    for size in sizes:
        means = singles.reshape(-1, size, *exact.shape).mean(axis=1)
        errors.append(0.5 * np.log(((means - exact) ** 2).sum((1, 2)) / (exact**2).sum()).mean())
    assert abs(np.polyfit(np.log(sizes), errors, 1)[0] + 0.5) < 0.1


def test_networks_compose() -> None:
    x = ROWS[:5].astype(np.float64)
    with jax.enable_x64(True):
        body = fully_connected(1, 32, 32, norm="weight_mean")
        joined = stax.serial(body, stax.Relu(), stax.Dense(1, np.sqrt(2)))
        shape, params = joined[0](jax.random.key(0), x.shape)
        assert joined[1](params, x).shape == shape == (5, 1)
        nngp = joined[2](x, None, "nngp")
    expected = propagate(propagate(gram(x), 1, "weight_mean").nngp, 1)
    np.testing.assert_allclose(nngp, expected.nngp, rtol=1e-12)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"depth: must be an integer of at least 1; received 0. It counts activations"):
        fully_connected(0)
    with pytest.raises(ValueError, match="blocks: must be an integer of at least 1"):
        pre_activation_resnet(0)
    with pytest.raises(ValueError, match=r"norm: must be one of .* received 'batchnorm'. Nearest: 'batch_norm'"):
        convolutional(2, norm="batchnorm")
    with pytest.raises(ValueError, match="readout: must be one of 'pool', 'flatten'; received 'mean'"):
        convolutional(2, readout="mean")
    with pytest.raises(ValueError, match=r"affine: requires norm='batch_norm'.*Leave it out"):
        fully_connected(2, affine=True)
    with pytest.raises(ValueError, match=r"activation: must be 'relu'.*received 'tanh'"):
        fully_connected(2, norm="batch_norm", activation="tanh")
    with pytest.raises(ValueError, match="parametrization: must be one of 'ntk', 'standard'; received 'mup'"):
        fully_connected(2, parametrization="mup")
