"""The kernel behind a last BatchNorm: docs/mathematics.md §7.3.

Oracles: JAX's own Jacobian of the normalization, and the law of σ² for Gaussian outputs.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

from ntk.analytic import propagate
from ntk.analytic.constant_correlation import ConstantCorrelation
from ntk.analytic.last_batch_norm import normalized_ntk
from ntk.errors import AsymmetricKernelError
from tests.ntk.analytic.cases import Array, constant_half, printed, random_covariance

M, T, C = 8, 3, 2
DRAWS = 2000


def joint(seed: int) -> tuple[Array, Array]:
    """A kernel over M + T points, and outputs [M + T, C]."""
    outputs = 3 + 2 * np.random.default_rng(seed).standard_normal((M + T, C))
    return random_covariance(M + T, seed), outputs


def autodiff(outputs: Array, epsilon: float) -> tuple[Array, Array]:
    """Outputs [M + T] normalized by the statistics of the first M, and their Jacobian, both by JAX."""

    def normalize(z: jax.Array) -> jax.Array:
        batch = z[:M]
        return (z - batch.mean()) / jnp.sqrt(((batch - batch.mean()) ** 2).mean() + epsilon)

    with jax.enable_x64(True):
        return np.array(normalize(jnp.asarray(outputs))), np.array(jax.jacobian(normalize)(jnp.asarray(outputs)))


@pytest.mark.parametrize("epsilon", [0.0, 1e-5, 0.7])
def test_against_autodiff(epsilon: float) -> None:
    kernel, outputs = joint(0)
    ours = normalized_ntk(kernel[:M, :M], outputs[:M], epsilon, test_ntk=kernel[M:, :M], test_outputs=outputs[M:])
    for column in range(C):
        values, jacobian = autodiff(outputs[:, column], epsilon)
        expected = jacobian @ kernel @ jacobian.T
        assert ours.test_ntk is not None
        assert ours.test_outputs is not None
        scale = 1e-12 * np.abs(expected).max()
        np.testing.assert_allclose(ours.outputs[:, column], values[:M], atol=1e-13)
        np.testing.assert_allclose(ours.test_outputs[:, column], values[M:], atol=1e-13)
        np.testing.assert_allclose(ours.ntk[column], expected[:M, :M], atol=scale)
        np.testing.assert_allclose(ours.test_ntk[column], expected[M:, :M], atol=scale)
        single = normalized_ntk(
            kernel[:M, :M], outputs[:M, column], epsilon, test_ntk=kernel[M:, :M], test_outputs=outputs[M:, column]
        )
        for name in ("outputs", "test_outputs"):
            np.testing.assert_allclose(getattr(single, name), getattr(ours, name)[:, column], atol=1e-13)
        for name in ("ntk", "test_ntk", "deviation", "null_directions"):
            np.testing.assert_allclose(getattr(single, name), getattr(ours, name)[column], atol=scale)


def test_one_kernel_per_output() -> None:
    (first, outputs), (second, _) = joint(1), joint(2)
    both = normalized_ntk(np.stack([first, second]), outputs)
    for column, kernel in enumerate((first, second)):
        alone = normalized_ntk(kernel, outputs[:, column])
        np.testing.assert_allclose(both.ntk[column], alone.ntk, rtol=1e-12, atol=1e-12)


def test_null_directions_and_rank() -> None:
    kernel, outputs = joint(3)
    ours = normalized_ntk(kernel[:M, :M], outputs[:M])
    assert ours.null_directions.shape == (C, M, 2)
    for column in range(C):
        spectrum = np.linalg.eigvalsh(ours.ntk[column])
        assert np.all(np.abs(spectrum[:2]) < 1e-14 * spectrum[-1])
        assert spectrum[2] > 1e-4 * spectrum[-1]
        null = ours.null_directions[column]
        np.testing.assert_allclose(null.T @ null, np.eye(2), atol=1e-14)
        for direction in (np.ones(M), ours.outputs[:, column]):
            assert np.abs(ours.ntk[column] @ direction).max() < 1e-14 * spectrum[-1]
            np.testing.assert_allclose(null @ (null.T @ direction), direction, atol=1e-13)
    assert ours.dynamics(np.zeros((M, C))).rank == C * (M - 2)


def test_positive_epsilon_only_damps_the_outputs() -> None:
    kernel, outputs = joint(4)
    epsilon = 0.5
    ours = normalized_ntk(kernel[:M, :M], outputs[:M, 0], epsilon)
    variance = outputs[:M, 0].var()
    assert ours.null_directions.shape == (M, 1)
    # ẑᵀJ = ẑᵀ ε/(σ² + ε)^(3/2), docs/mathematics.md §7.2.
    along = ours.outputs @ kernel[:M, :M] @ ours.outputs * (epsilon / (variance + epsilon)) ** 2 / (variance + epsilon)
    assert ours.outputs @ ours.ntk @ ours.outputs == pytest.approx(along, rel=1e-12)
    assert ours.dynamics(np.zeros(M)).rank == M - 1


def test_invariances() -> None:
    kernel, outputs = joint(5)
    kernel, outputs = kernel[:M, :M], outputs[:M]
    base = normalized_ntk(kernel, outputs)
    shifted = normalized_ntk(kernel, outputs + np.array([10.0, -3.0]))
    scaled = normalized_ntk(kernel, outputs * np.array([4.0, 0.5]))
    mean_added = normalized_ntk(kernel + 5.0, outputs)  # a common part of the kernel, such as a trained bias
    np.testing.assert_allclose(shifted.ntk, base.ntk, rtol=0, atol=1e-12 * base.ntk.max())
    np.testing.assert_allclose(mean_added.ntk, base.ntk, rtol=0, atol=1e-12 * base.ntk.max())
    np.testing.assert_allclose(scaled.ntk * np.reshape([16, 0.25], (2, 1, 1)), base.ntk, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(scaled.outputs, base.outputs, atol=1e-14)
    assert base.largest_stable_learning_rate == pytest.approx(2 / max(base.sharpness), rel=1e-14)
    deviation = outputs.std(axis=0)
    assert np.all(base.sharpness <= np.linalg.eigvalsh(kernel)[-1] / deviation**2)


@pytest.mark.parametrize("norm", ["none", "weight_mean"])
def test_one_correlation_gives_a_projector(norm: str) -> None:
    """κ is exactly 1 on the range for plain networks too."""
    kernels = propagate(constant_half(), 5, norm)
    outputs = np.random.default_rng(6).multivariate_normal(np.zeros(10), kernels.nngp)
    ours = normalized_ntk(kernels.ntk, outputs)
    amplified = (kernels.ntk[0, 0] - kernels.ntk[0, 1]) / outputs.var()
    null = ours.null_directions
    np.testing.assert_allclose(ours.ntk, amplified * (np.eye(10) - null @ null.T), atol=1e-13 * amplified)
    dynamics = ours.dynamics(np.ones(10))
    assert dynamics.rank == 8
    assert dynamics.condition_number == pytest.approx(1, abs=1e-13)
    assert dynamics.largest_stable_learning_rate == pytest.approx(2 / amplified, rel=1e-13)


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_the_bound_separates_decay_from_growth(epsilon: float) -> None:
    kernel, outputs = joint(7)
    ours, targets = normalized_ntk(kernel[:M, :M], outputs[:M], epsilon), np.random.default_rng(8).random((M, C))
    for share, grows in ((0.999, False), (1.001, True)):
        rate = share * ours.largest_stable_learning_rate
        leading = ours.dynamics(targets).gradient_descent(np.arange(50), rate).mode_residuals[:, 0]
        leading = np.abs(leading[:, np.argmax(ours.sharpness)])
        assert np.all((np.diff(leading) > 0) == grows)
        averaged = ours.dynamics(targets, averaged=True).gradient_descent(np.arange(50), M * rate)
        np.testing.assert_allclose(
            np.abs(averaged.mode_residuals[:, 0, np.argmax(ours.sharpness)]), leading, rtol=1e-10
        )


def test_what_stays_of_the_error() -> None:
    """Trained to the end, the linearized outputs keep their errors along 1 and ẑ, on test points too."""
    kernel, outputs = joint(9)
    ours = normalized_ntk(kernel[:M, :M], outputs[:M, 0], test_ntk=kernel[M:, :M], test_outputs=outputs[M:, 0])
    targets = np.random.default_rng(10).standard_normal(M)
    error, null = ours.outputs - targets, ours.null_directions
    dynamics = ours.dynamics(targets)
    ended = dynamics.gradient_flow(np.inf)
    np.testing.assert_allclose(ended.train - targets, null @ (null.T @ error), atol=1e-12)
    inverse = np.linalg.pinv(ours.ntk, rcond=1e-9, hermitian=True)
    np.testing.assert_allclose(ended.test, ours.test_outputs - ours.test_ntk @ inverse @ error, atol=1e-10)
    np.testing.assert_allclose(dynamics.gradient_flow(1e12).test, ended.test, atol=1e-10)


MEDIANS = """
1  0.309 0.311 0.303 0.311
5  0.794 0.791 0.822 0.822
10 1.682 1.735 1.201 1.225
20 4.41  4.42  1.201 1.207
50 20.2  20.2  1.199 1.219
"""
"""Depth; for plain and for weight mean the median by the law of σ², and that of an independent run of 2000 draws."""


def sharpness_ratio(depth: int, norm: str) -> tuple[Array, float]:
    """DRAWS of λmax(Θ̂)/λmax(Θ) over f ~ N(0, K), const-0.5, ascending; and the median by the law of σ²."""
    kernels = propagate(constant_half(), depth, norm)
    draws = np.random.default_rng(depth).standard_normal((10, DRAWS))
    ours = normalized_ntk(kernels.ntk, np.linalg.cholesky(kernels.nngp) @ draws)
    closed = ConstantCorrelation(kernels.ntk[0, 0], kernels.ntk[0, 1], 10)
    # m σ² / (K_ii − K_ij) is χ² with m − 1 degrees of freedom.
    variance = (kernels.nngp[0, 0] - kernels.nngp[0, 1]) * chi2.median(9) / 10
    largest = 2 / closed.largest_stable_learning_rate
    return np.sort(ours.sharpness) / largest, closed.bulk / variance / largest


def covers(ascending: Array, value: float, draws: float, digit: float = 0.0) -> bool:
    """Whether a value lies within four standard errors of a median, by ranks: theirs vary as √(draws)/2."""
    reach = 4 * np.sqrt(draws) / 2
    low, high = ascending[int(np.floor(DRAWS / 2 - reach))], ascending[int(np.ceil(DRAWS / 2 + reach))]
    return bool(low - digit <= value <= high + digit)


@pytest.mark.parametrize("row", MEDIANS.strip().splitlines())
def test_median_sharpness(row: str) -> None:
    depth, *texts = row.split()
    for norm, by_law, drawn in (("none", *texts[:2]), ("weight_mean", *texts[2:])):
        ascending, exact = sharpness_ratio(int(depth), norm)
        printed(exact, by_law)
        assert covers(ascending, exact, DRAWS)
        # The difference of two medians of 2000 draws has twice the variance of one.
        assert covers(ascending, float(drawn), 2 * DRAWS, 0.5 * 10.0 ** -len(drawn.partition(".")[2]))


def test_the_law_of_the_variance_is_seen() -> None:
    """Negative control: σ² = K_ii − K_ij, 17 % above its median, misses by three times the four standard errors."""
    ascending, exact = sharpness_ratio(5, "none")
    assert not covers(ascending, exact * chi2.median(9) / 10, DRAWS)
    assert not covers(sharpness_ratio(10, "none")[0], 1.225, 2 * DRAWS)  # nor is plain taken for weight mean


def amplified(by_depth: Callable[[int], tuple[Array, Array]], depth: int) -> float:
    """λmax(Θ̂) at depth D for outputs of variance K_ii − K_ij."""
    nngp, ntk = by_depth(depth)
    outputs = np.linspace(-1, 1, 10)
    outputs *= np.sqrt(nngp[0, 0] - nngp[0, 1]) / outputs.std()
    return float(normalized_ntk(ConstantCorrelation(ntk[0, 0], ntk[0, 1], 10).matrix(), outputs).sharpness)


def test_plain_networks_amplify_as_the_cube_of_the_depth() -> None:
    kernels = propagate(constant_half(2), 10_000)
    at = lambda depth: amplified(lambda d: (kernels.nngp_by_depth[d], kernels.ntk_by_depth[d]), depth)
    # D³/6π² (1 + O(ln D/D)): ln D/D is 0.007 and 0.0009.
    slope = np.log10(at(10_000) / at(1000))
    assert slope == pytest.approx(3, abs=10 * np.log(1000) / 1000 / np.log(10))
    ratio = at(10_000) / (10_000**3 / (6 * np.pi**2))
    assert ratio == pytest.approx(1, abs=10 * np.log(10_000) / 10_000)
    assert abs(at(1000) / (1000**3 / (6 * np.pi**2)) - 1) > abs(ratio - 1)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (
            {"ntk": np.eye(2), "outputs": np.eye(2)},
            ValueError,
            "ntk: must cover a batch of at least 3 .* received 2.*at B = 2 the gradient is exactly zero",
        ),
        ({"ntk": np.eye(1), "outputs": np.eye(1)}, ValueError, "ntk: must cover a batch of at least 3 .* received 1"),
        ({"ntk": np.ones((M, M, C, C))}, AsymmetricKernelError, r"ntk: must be square.*\(8, 8, 2, 2\)"),
        ({"ntk": np.eye(M) - 0.5}, ValueError, "ntk: must be positive semi-definite"),
        ({"ntk": np.stack([np.eye(M)] * 3)}, ValueError, r"outputs: must be \[m, C\] .* each of the 3 kernels"),
        ({"outputs": np.ones((M + 1, C))}, ValueError, r"outputs: must be \[m\] or \[m, C\].* received shape \(9, 2\)"),
        ({"outputs": np.full((M, C), np.nan)}, ValueError, "outputs: must be finite"),
        (
            {"outputs": np.eye(M, 3) * [1, 0, 1] + 0.1},
            ValueError,
            "outputs: must vary .* column 1 is constant.*epsilon",
        ),
        ({"epsilon": -1e-5}, ValueError, "epsilon: must be finite and not negative; received -1e-05.*PyTorch"),
        ({"epsilon": np.nan}, ValueError, "epsilon: must be finite and not negative; received nan"),
        ({"test_ntk": np.ones((T, M))}, ValueError, "test_outputs: required along with .* received None. Pass both"),
        ({"test_outputs": np.ones((T, C))}, ValueError, "test_ntk: required along with"),
        ({"test_outputs": np.ones(T), "test_ntk": np.ones((T, M))}, ValueError, r"test_outputs: must have shape"),
        ({"test_outputs": np.ones((T, C)), "test_ntk": np.ones((M, T))}, ValueError, r"test_ntk: must have shape \[3"),
    ],
)
def test_refused(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    kernel, outputs = joint(11)
    with pytest.raises(error, match=message):
        normalized_ntk(**({"ntk": kernel[:M, :M], "outputs": outputs[:M]} | changed))


def test_refused_targets() -> None:
    kernel, outputs = joint(12)
    with pytest.raises(ValueError, match=r"targets: must have shape \[8, 2\] to fit .* received shape \(8,\)"):
        normalized_ntk(kernel[:M, :M], outputs[:M]).dynamics(np.ones(M))


def test_constant_output_with_epsilon() -> None:
    kernel, _ = joint(13)
    ours = normalized_ntk(kernel[:M, :M], np.ones(M), 1e-2)
    centre = np.eye(M) - 1 / M
    np.testing.assert_allclose(ours.ntk, centre @ kernel[:M, :M] @ centre / 1e-2, rtol=1e-10, atol=1e-10)


def test_result_is_frozen_and_its_dynamics_draw_themselves() -> None:
    kernel, outputs = joint(14)
    ours = normalized_ntk(kernel[:M, :M], outputs[:M], 1e-5)
    assert ours.epsilon == 1e-5
    with pytest.raises(AttributeError, match="cannot assign to field"):
        ours.epsilon = 0.0
    with pytest.raises(ValueError, match="read-only"):
        ours.ntk[0, 0, 0] = 1
    assert "14 of 16 modes train" in ours.dynamics(np.zeros((M, C)))._repr_html_()


def test_a_single_precision_kernel_keeps_its_rank_behind_batch_norm() -> None:
    rng = np.random.default_rng(0)
    features, outputs = rng.standard_normal((12, 4)), rng.standard_normal(12)
    exact = features @ features.T
    ranks = [
        normalized_ntk(exact.astype(dtype), outputs).dynamics(np.zeros(12)).rank for dtype in (np.float64, np.float32)
    ]
    assert ranks == [4, 4]
