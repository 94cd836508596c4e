"""Plain and weight-mean kernels: docs/mathematics.md §3, §4, §6, §9.2 and §9.3."""

import jax
import numpy as np
import pytest

from ntk.analytic import AnalyticKernels, dual_activation, propagate
from ntk.errors import CoincidentPointsWarning, PrecisionFloorWarning
from tests.ntk.analytic.cases import (
    EPS,
    Array,
    circle,
    condition_number,
    constant_half,
    printed,
    random_covariance,
    standard_scores,
)

ENTRIES = """
1  0.608997781044229 0.942331114377563 2  0.426422342012739   0.915403077654159   2.46694220692426
5  0.810454201004628 2.46289313245802  6  0.183888382480484   1.40151285448796    19.1994136539591
10 0.897646729807323 4.10835152642275  11 0.0468155581203805  0.672048406513928   142.829000430281
50 0.988662613225747 15.1563181296644  51 2.04398633219205e-7 1.13139082553164e-5 657355174.620345
"""
CONDITION = """
1  9.909509651 6.899967718
2  9.198136518 4.571975622
5  7.96301589  1.787459639
10 6.961348061 1.0472751
20 6.070941842 1.000084197
"""
CONDITION_CIRCLE = """
2  37.75470462 16.02994979
5  15.65703875 2.597519267
10 9.984217662 1.107628905
20 7.239763849 1.000209081
50 5.575772785 1.000000000
"""
CONDITION_NNGP = """
1  16.575 8.4344
2  22.636 6.5256
5  43.758 3.2532
10 88.701 1.49115
20 214.51 1.02233
50 873.04 1.000002
"""
LARGEST_EIGENVALUE = """
10    2.817/3.181 4.798/14.89 7.024/144.4 8.459/668.8 18.74/6.57e7
256   2.477/1.471 4.135/1.227 5.959/5.796 7.120/26.18 15.30/2.57e6
50000 2.463/1.402 4.108/0.675 5.916/0.190 7.066/0.190 15.16/1.31e4
"""
DEPTHS = (5, 10, 16, 20, 50)
NORMS = ("none", "weight_mean")


def pair(depth: int, norm: str) -> AnalyticKernels:
    return propagate([[1.0, 0.5], [0.5, 1.0]], depth, norm)


@pytest.mark.parametrize("row", ENTRIES.strip().splitlines())
def test_entries(row: str) -> None:
    depth, plain_k, plain_off, plain_diagonal, k, off, diagonal = row.split()
    roundings = 8 * int(depth)
    plain, weight_mean = propagate(constant_half(), int(depth)), propagate(constant_half(), int(depth), "weight_mean")
    for kernels, texts in ((plain, (plain_k, plain_off, plain_diagonal)), (weight_mean, (k, off, diagonal))):
        printed(kernels.nngp[0, 1], texts[0], roundings)
        printed(kernels.ntk[0, 1], texts[1], roundings)
        printed(kernels.ntk[0, 0], texts[2], roundings)
        np.testing.assert_allclose(kernels.nngp.diagonal(), 1, rtol=roundings * EPS)


@pytest.mark.parametrize(("gram", "table"), [(constant_half(), CONDITION), (circle(), CONDITION_CIRCLE)])
def test_ntk_condition_numbers(gram: Array, table: str) -> None:
    for row in table.strip().splitlines():
        depth, plain, weight_mean = row.split()
        for norm, text in zip(NORMS, (plain, weight_mean), strict=True):
            value = condition_number(propagate(gram, int(depth), norm).ntk)
            printed(value, text, roundings=10 * int(depth) * value)


def test_condition_number_at_the_floor() -> None:
    excess = condition_number(propagate(constant_half(), 50, "weight_mean").ntk) - 1
    assert excess == pytest.approx(1.7e-13, abs=10 * EPS + 0.05e-13)


@pytest.mark.parametrize("norm", NORMS)
def test_circle_is_singular_at_depth_one(norm: str) -> None:
    spectrum = np.linalg.eigvalsh(propagate(circle(), 1, norm).ntk)
    assert np.all(np.abs(spectrum[:3]) < 100 * EPS * spectrum[-1])  # modes 3 (twice) and 5
    assert spectrum[3] > 1e-3


@pytest.mark.parametrize("row", CONDITION_NNGP.strip().splitlines())
def test_nngp_condition_numbers(row: str) -> None:
    depth, plain, weight_mean = row.split()
    for norm, text in zip(NORMS, (plain, weight_mean), strict=True):
        value = condition_number(propagate(constant_half(), int(depth), norm).nngp)
        printed(value, text, roundings=10 * int(depth) * value)


@pytest.mark.parametrize(
    ("norm", "depth", "smallest", "largest"),
    [
        ("none", 1, "1.057668886", "10.48098003"),
        ("none", 5, "3.537106868", "28.16603819"),
        ("none", 50, "35.84368187", "187.4068632"),
        ("weight_mean", 1, "1.551539129", "10.70556991"),
        (
            "weight_mean",
            5,
            "17.7979008",
            "31.81302934",
        ),  # p − o = 19.19941365 − 1.40151285
        ("weight_mean", 50, "657355174.6", "657355174.6"),
    ],
)
def test_extreme_eigenvalues(norm: str, depth: int, smallest: str, largest: str) -> None:
    spectrum = np.linalg.eigvalsh(propagate(constant_half(), depth, norm).ntk)
    printed(spectrum[0], smallest, roundings=1000)
    printed(spectrum[-1], largest, roundings=1000)


def test_raw_weights_add_a_constant_per_layer() -> None:
    projected = propagate(constant_half(), 5, "weight_mean")
    raw = propagate(constant_half(), 5, "weight_mean", projected=False)
    printed(projected.ntk[0, 0], "19.19941")
    printed(projected.ntk[0, 1], "1.401513")
    printed(condition_number(projected.ntk), "1.78746")
    printed(raw.ntk[0, 0], "24.99247")
    printed(raw.ntk[0, 1], "3.206575")
    printed(condition_number(raw.ntk), "2.47186")
    np.testing.assert_array_equal(raw.nngp, projected.nngp)
    first = propagate(constant_half(), 1, "weight_mean", projected=False).ntk
    excess = first - propagate(constant_half(), 1, "weight_mean").ntk
    np.testing.assert_allclose(excess, 1 / (np.pi - 1), rtol=32 * EPS)


def test_weight_mean_diagonal_explodes_as_stated() -> None:
    kernels = pair(50, "weight_mean")
    growth = np.pi / (np.pi - 1)
    expected = (np.pi - 1) * (growth ** np.arange(1, 52) - 1)
    np.testing.assert_allclose(kernels.ntk_by_depth[:, 0, 0], expected, rtol=8 * 50 * EPS)


def test_standard_parametrization() -> None:
    for trained, diagonal, off in ((True, "44", "24.487928993415"), (False, "42", "22.821262326749")):
        kernels = propagate(constant_half(), 1, parametrization="standard", width=(10, 64), bias_trained=trained)
        assert kernels.ntk[0, 0] == float(diagonal)
        printed(kernels.ntk[0, 1], off)
    same = propagate(constant_half(), 2, parametrization="standard", width=32)
    listed = propagate(constant_half(), 2, parametrization="standard", width=[32, 32, 32])
    np.testing.assert_array_equal(same.ntk, listed.ntk)


def compare_ntk(ours: Array, theirs: Array) -> None:
    """Off the diagonal to rounding; on it, where a correlation is one less its rounding in some JAX, to √ε a layer."""
    off = ~np.eye(len(ours), dtype=bool)
    np.testing.assert_allclose(ours[off], theirs[off], rtol=1e-12)
    np.testing.assert_allclose(ours.diagonal(), theirs.diagonal(), rtol=1e-7)


@pytest.mark.parametrize(
    ("norm", "name", "bias"), [("none", "Relu", 0.0), ("none", "Relu", 0.3), ("none", "Erf", 0.2), ("none", "Abs", 0.1)]
)
def test_against_neural_tangents(norm: str, name: str, bias: float) -> None:
    from ntk.analytic.compat import stax

    inputs, depth, weight = np.random.default_rng(3).standard_normal((7, 12)), 6, 1.7
    layers = [stax.Dense(1, 1.0, 0.0)]
    for _ in range(depth):
        layers += [getattr(stax, name)(), stax.Dense(1, weight**0.5, bias**0.5)]
    with jax.enable_x64(True):
        expected = stax.serial(*layers)[2](inputs, None, ("nngp", "ntk"))
        nngp, ntk = np.array(expected.nngp), np.array(expected.ntk)
    ours = propagate(inputs @ inputs.T / 12, depth, norm, name.lower(), sigma_w2=weight, sigma_b2=bias)
    np.testing.assert_allclose(ours.nngp, nngp, rtol=1e-12)
    compare_ntk(ours.ntk, ntk)


@pytest.mark.parametrize(("bias", "trained"), [(0.0, True), (None, False)])
def test_standard_parametrization_against_neural_tangents(bias: float | None, trained: bool) -> None:
    from ntk.analytic.compat import stax

    inputs = np.random.default_rng(4).standard_normal((5, 9))
    layers = [stax.Dense(24, 1.0, bias, parameterization="standard")]
    for width in (40, 1):
        layers += [stax.Relu(), stax.Dense(width, 2**0.5, bias, parameterization="standard")]
    with jax.enable_x64(True):
        expected = np.array(stax.serial(*layers)[2](inputs, None, "ntk"))
    ours = propagate(inputs @ inputs.T / 9, 2, parametrization="standard", width=(9, 24, 40), bias_trained=trained)
    compare_ntk(ours.ntk, expected)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["relu", "gelu", "tanh"])
def test_recursion_written_out(norm: str, name: str) -> None:
    # The definition of docs/mathematics.md §3.1 and §4.3, pair by pair, at unequal variances and with biases.
    gram, depth, weight, bias = random_covariance(4, 5), 3, 1.3, 0.2
    dual, nngp, ntk = dual_activation(name), gram.copy(), gram.copy()
    for _ in range(depth):
        q = nngp.diagonal().copy()
        new_nngp, new_ntk = np.empty((2, 4, 4))
        for i in range(4):
            for j in range(4):
                rho = 1.0 if i == j else nngp[i, j] / np.sqrt(q[i] * q[j])
                moment = dual.value(rho, q[i], q[j]) - (norm == "weight_mean") * dual.mean(q[i]) * dual.mean(q[j])
                new_nngp[i, j] = weight * moment + bias
                new_ntk[i, j] = new_nngp[i, j] + weight * dual.derivative(rho, q[i], q[j]) * ntk[i, j]
        nngp, ntk = new_nngp, new_ntk
    ours = propagate(gram, depth, norm, name, sigma_w2=weight, sigma_b2=bias)
    np.testing.assert_allclose(ours.nngp, nngp, rtol=1e-12)
    compare_ntk(ours.ntk, ntk)


def test_weight_mean_keeps_ratios_of_norms() -> None:
    gram = random_covariance(5, 6)
    ours = propagate(gram, 20, "weight_mean")
    np.testing.assert_allclose(ours.nngp.diagonal(), gram.diagonal(), rtol=8 * 20 * EPS)


def test_biased_weight_mean_is_plain_he() -> None:
    plain = propagate(constant_half(), 20)
    biased = propagate(constant_half(), 20, "weight_mean", sigma_b2=1 / np.pi)
    np.testing.assert_allclose(biased.nngp, plain.nngp, rtol=8 * 20 * EPS)
    np.testing.assert_allclose(biased.ntk, plain.ntk, rtol=1e-12)


@pytest.mark.parametrize("n", [4, 16])
def test_finite_width_expectation(n: int) -> None:
    # Lemma 1 at finite width: E[K̂] = (1 − 1/n)(φ̂(c) − φ̂(0)) for one layer of n units.
    x, y = np.random.default_rng(11).standard_normal((2, 40_000, n))
    first, second = np.maximum(x, 0), np.maximum(0.5 * x + np.sqrt(0.75) * y, 0)
    samples = (first * second).mean(axis=1) - first.mean(axis=1) * second.mean(axis=1)
    expected = (1 - 1 / n) * dual_activation("relu").covariance(0.5)
    assert abs(standard_scores(samples, expected)) < 4
    assert abs(standard_scores(samples, expected * n / (n - 1))) > 4  # the factor (n − 1)/n is seen
    assert abs(standard_scores(samples, dual_activation("relu").value(0.5))) > 4  # and so is the centring


# docs/mathematics.md §6.2; at D = 10, m = 50000 it is 4.10835 + 6.89165/50000 = 4.10849.
@pytest.mark.parametrize("row", LARGEST_EIGENVALUE.strip().splitlines())
def test_largest_eigenvalue_per_example(row: str) -> None:
    size, *columns = row.split()
    m = int(size)
    for norm, which in (("none", 0), ("weight_mean", 1)):
        by_depth = pair(50, norm).ntk_by_depth
        for depth, column in zip(DEPTHS, columns, strict=True):
            diagonal, off = by_depth[depth, 0]
            printed((diagonal + (m - 1) * off) / m, column.split("/")[which])


def test_total_weight_of_the_mean_predictor() -> None:
    weight_mean, plain = pair(50, "weight_mean").ntk_by_depth, pair(20, "none").ntk_by_depth
    total = lambda kernel, m: m * kernel[0, 1] / (kernel[0, 0] + (m - 1) * kernel[0, 1])
    for depth, text in ((5, "0.4405"), (10, "0.0451"), (20, "8.4e-5")):
        printed(total(weight_mean[depth], 10), text)
    for depth, text in ((5, "0.874"), (10, "0.856"), (20, "0.835")):
        printed(total(plain[depth], 10), text)
    for depth, text in ((10, "0.9958"), (16, "0.8485"), (20, "0.296"), (50, "8.6e-10")):
        printed(total(weight_mean[depth], 50_000), text)


def test_plain_condition_number_falls_towards_its_limit() -> None:
    # (m + 3)/3 = 4.3333, approached as ln D/D.
    for depth, text in ((10, "6.96135"), (100, "4.84404"), (1000, "4.40128"), (10_000, "4.34167")):
        kernels = propagate(constant_half(2), depth, every_depth=False)
        diagonal, off = kernels.ntk[0]
        printed((diagonal + 9 * off) / (diagonal - off), text)


def test_weight_mean_condition_number_tends_to_one() -> None:
    # κ − 1 = m (A/π) (D + const) 2^−D once t^D is negligible, with A = 1.0998353 at ρ0 = 0.5; t^100 = 3e−14.
    by_depth = pair(100, "weight_mean").ntk_by_depth
    scaled = by_depth[:, 0, 1] / by_depth[:, 0, 0] * 2.0 ** np.arange(101)
    printed(np.pi * (scaled[100] - scaled[99]), "1.0998353", roundings=8 * 100 * 100)
    assert scaled[100] / 100 == pytest.approx(1.0998353 / np.pi, rel=0.2)


def test_amplitudes_of_the_weight_mean_correlation() -> None:
    slope = np.pi / (2 * (np.pi - 1))
    for start, text in ((0.5, "1.0998353"), (0.9, "10.15663"), (0.1, "0.1132846"), (-0.3, "-0.2175146")):
        kernels = propagate([[1.0, start], [start, 1.0]], 120, "weight_mean")
        # K_D = A t^D (1 + O(t^D)), and t^120 = 7e−17.
        printed(kernels.nngp[0, 1] / slope**120, text, roundings=8 * 120)


def test_ordered_relu_forgets_at_half_the_rate() -> None:
    for weight, bias, depth in ((1.5, 0.25, 70), (1.8, 0.1, 220)):
        kernels = propagate(constant_half(2), depth, sigma_w2=weight, sigma_b2=bias)
        gap = kernels.ntk_by_depth[:, 0, 0] - kernels.ntk_by_depth[:, 0, 1]
        ratio = gap[-1] / gap[-2]
        # δ' = χ1 δ + const (√χ1)^D leaves a transient of ratio (√χ1)^D; √(1 − c) is noise where 1 − c ~ χ1^D nears ε.
        transient = np.sqrt(weight / 2) ** depth
        assert ratio == pytest.approx(np.sqrt(weight / 2), abs=10 * transient + EPS / transient**2)
        assert ratio != pytest.approx(weight / 2, abs=0.03)


def test_ordered_erf_forgets_at_the_full_rate() -> None:
    variance, growth = 0.3669353855, 0.4863081333
    gram = variance * constant_half(2)
    kernels = propagate(gram, 30, activation="erf", sigma_w2=0.6, sigma_b2=0.2)
    gap = kernels.ntk_by_depth[:, 0, 0] - kernels.ntk_by_depth[:, 0, 1]
    scaled = gap / growth ** np.arange(31)
    slope = scaled[26] - scaled[25]
    # p − o → (a + sD) χ1^D; at D = 100, (a + sD)/D is 0.2398, and its limit s is 0.2394.
    printed((scaled[26] + 74 * slope) / 100, "0.2398")
    printed(slope, "0.2394")


@pytest.mark.parametrize("norm", NORMS)
def test_depths_nest(norm: str) -> None:
    gram = random_covariance(5, 8)
    deep = propagate(gram, 4, norm)
    np.testing.assert_array_equal(deep.nngp_by_depth[0], (gram + gram.T) / 2)
    np.testing.assert_array_equal(deep.ntk_by_depth[0], deep.nngp_by_depth[0])
    for depth in (1, 2, 3, 4):
        shallow = propagate(gram, depth, norm, every_depth=False)
        np.testing.assert_array_equal(deep.nngp_by_depth[depth], shallow.nngp)
        np.testing.assert_array_equal(deep.ntk_by_depth[depth], shallow.ntk)
        assert shallow.nngp_by_depth.shape == (1, 5, 5)
        assert shallow.ntk_by_depth.shape == (1, 5, 5)


def test_condition_numbers_of_a_result() -> None:
    kernels = propagate(constant_half(), 5)
    np.testing.assert_allclose(kernels.condition_number_by_depth[[1, 5]], [9.909509651, 7.96301589], rtol=1e-8)
    assert kernels.condition_number == kernels.condition_number_by_depth[-1]
    assert propagate(circle(), 1).condition_number == np.inf


def test_result_states_its_convention_and_is_frozen() -> None:
    kernels = propagate(constant_half(), 2, "weight_mean", sigma_b2=0.1, projected=False)
    stated = (kernels.depth, kernels.norm, kernels.activation, kernels.parametrization, kernels.projected)
    assert stated == (2, "weight_mean", "relu", "ntk", False)
    assert kernels.sigma_b2 == 0.1
    assert kernels.sigma_w2 == pytest.approx(0.9 / dual_activation("relu").variance, rel=4 * EPS)
    assert kernels.n_statistics is None
    assert kernels.ntk.dtype == kernels.nngp.dtype == np.float64
    assert kernels.describe().startswith("depth 2, norm 'weight_mean', relu, σw² = 2.64")
    assert kernels.describe().endswith("raw weights")
    assert kernels._repr_html_().count("<svg") == 2
    with pytest.raises(ValueError, match="read-only"):
        kernels.ntk[0, 0] = 0
    with pytest.raises(AttributeError, match="cannot assign to field"):
        kernels.depth = 3


def test_single_precision_gram_beyond_its_precision() -> None:
    inputs = np.random.default_rng(9).standard_normal((20, 8)).astype(np.float32)
    gram = inputs @ inputs.T / 8  # rank 8 of 20: eigenvalues down to −1e−7
    with pytest.warns(
        PrecisionFloorWarning, match="condition number beyond what the dtype in which it came .* float64"
    ):
        kernels = propagate(gram, 2)
    exact = inputs.astype(np.float64) @ inputs.T.astype(np.float64) / 8
    scale = 20 * np.finfo(np.float32).eps * np.abs(kernels.ntk).max()
    np.testing.assert_allclose(kernels.ntk, propagate(exact, 2).ntk, rtol=0, atol=scale)
    well_conditioned = propagate((gram + np.eye(20)).astype(np.float32), 2)  # does not warn
    assert np.all(np.isfinite(well_conditioned.ntk))


def test_coincident_points() -> None:
    gram = random_covariance(4, 1)
    index = [0, 1, 2, 3, 1]
    with pytest.warns(CoincidentPointsWarning, match=r"1 pair\(s\) coincide.*first \(1, 4\) with correlation 1.*κ = ∞"):
        repeated = propagate(gram[np.ix_(index, index)], 2)
    # Off the diagonal a correlation of one is known to ε, and its angle to √ε.
    np.testing.assert_allclose(repeated.ntk, propagate(gram, 2).ntk[np.ix_(index, index)], rtol=1e-7)
