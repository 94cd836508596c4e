"""Residual networks: docs/mathematics.md §8, against scalar recursions, closed forms and finite networks."""

import math
import xml.etree.ElementTree as ET
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

import ntk
from ntk.analytic import propagate
from ntk.analytic.residual import propagate_residual
from tests.ntk.analytic.cases import EPS, Array, autoregressive, printed, random_covariance, standard_scores

CHI_1 = math.pi / (math.pi - 1)
PAIR = ((1.0, 0.5), (0.5, 1.0))


def scalar_oracle(blocks: int, depth: int) -> tuple[Array, Array, Array]:
    """c_l, Θ_ii and Θ_ij of one pair at q = 1 + Σ 1/l: weight-mean ReLU, α_l² = 1/l; plain floats, no array."""
    q, k, diagonal, off = 1.0, 0.5, 1.0, 0.5
    rows = []
    for number in range(1, blocks + 1):
        rho, branch_diagonal, branch_off = k / q, diagonal, off
        for _ in range(depth):
            angle = math.atan2(math.sqrt((1 - rho) * (1 + rho)), rho)
            slope = CHI_1 * (math.pi - angle) / math.pi
            rho = CHI_1 / math.pi * (math.sin(angle) + (math.pi - angle) * math.cos(angle) - 1)
            branch_diagonal, branch_off = q + CHI_1 * branch_diagonal, q * rho + slope * branch_off
        k, q = k + q * rho / number, q + q / number
        diagonal, off = diagonal + branch_diagonal / number, off + branch_off / number
        rows.append((k / q, diagonal, off))
    correlation, diagonals, offs = np.array(rows).T
    return correlation, diagonals, offs


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_scalar_recursion(depth: int) -> None:
    kernels = propagate_residual(PAIR, 1000, "weight_mean", branch_depth=depth)
    correlation, diagonal, off = scalar_oracle(1000, depth)
    np.testing.assert_allclose(kernels.correlation[1:, 0, 1], correlation, rtol=1e-10)
    np.testing.assert_allclose(kernels.ntk_by_block[1:, 0, 0], diagonal, rtol=1e-10)
    np.testing.assert_allclose(kernels.ntk_by_block[1:, 0, 1], off, rtol=1e-10)
    np.testing.assert_allclose(kernels.variance, np.arange(1, 1002)[:, None] * np.ones(2), rtol=1e-12)
    slope = math.log(correlation[99] / correlation[999]) / math.log(10)
    assert kernels.correlation_exponent() == pytest.approx(slope, rel=1e-10)
    growth = math.log(diagonal[999] / diagonal[99]) / math.log(10)
    assert kernels.ntk_exponent() == pytest.approx(growth, rel=1e-10)


@pytest.mark.parametrize(
    ("depth", "texts"),
    [
        (1, ("0.408257", "0.226772", "0.169717", "0.098904", "0.019035")),
        (3, ("0.215269", "0.015634", "0.003861", "0.000274")),
    ],
)
def test_ntk_ratio_falls_as_a_power(depth: int, texts: tuple[str, ...]) -> None:
    kernels = propagate_residual(PAIR, 1000, "weight_mean", branch_depth=depth)
    for number, text in zip((1, 8, 16, 50, 1000), texts, strict=False):
        diagonal, off = kernels.ntk_by_block[number, 0]
        printed(off / diagonal, text)


def test_exponents() -> None:
    t = float(ntk.analytic.correlation_map("weight_mean").derivative(0.0))
    chi_1 = ntk.analytic.correlation_map("weight_mean").chi_1
    for depth, decay, growth in ((1, "0.266529", "1.466942"), (2, "0.462020", "2.151919"), (3, "0.605407", "3.156741")):
        printed(1 - t**depth, decay)
        printed(chi_1**depth, growth)


# Printed for the last decade of 10⁵ blocks; for k = 1 it is 0.2587 and 1.4681 over that of 10⁶, which takes minutes.
@pytest.mark.parametrize(("depth", "decay", "growth"), [(2, 0.4596, "2.1518"), (3, 0.6049, "3.1565")])
def test_last_decade(depth: int, decay: float, growth: str) -> None:
    blocks = 100_000
    correlation, diagonal, _ = scalar_oracle(blocks, depth)
    measured = math.log10(correlation[blocks // 10 - 1] / correlation[-1])
    assert measured == pytest.approx(decay, abs=0.6e-4)  # 0.459649 … and 0.604896 …
    printed(math.log10(diagonal[-1] / diagonal[blocks // 10 - 1]), growth)


def test_exponents_are_approached() -> None:
    # dc/d ln l = T̄(c) − c = −(1 − t)c + O(c²): what is missing is of the order of c.
    for depth in (1, 2, 3):
        kernels = propagate_residual(PAIR, 1000, "weight_mean", branch_depth=depth)
        limit = 1 - (CHI_1 / 2) ** depth
        missing = limit - kernels.correlation_exponent()
        assert 0 < missing < kernels.correlation[100, 0, 1]
        assert kernels.ntk_exponent() == pytest.approx(CHI_1**depth, rel=0.02)
        other = 1 - (CHI_1 / 2) ** (depth % 3 + 1)
        assert abs(other - kernels.correlation_exponent()) > abs(
            missing
        )  # the control: another k's exponent is further


def test_sums_of_scales() -> None:
    inverse = propagate_residual(PAIR, 1000, "weight_mean", branch_scale="inverse")
    # Π (1 + a/l²) = sinh(π√a)/(π√a) less a factor of about 1 − a/L.
    assert inverse.variance[-1, 0] * (1 + 1 / 1000) == pytest.approx(math.sinh(math.pi) / math.pi, rel=5e-6)
    code = propagate_residual(PAIR, 1000, "weight_mean", branch_depth=2, branch_scale="mimicnorm")
    assert code.sigma_w2 == 2
    share = code.variance[1, 0] - 1
    printed(share, "0.964")
    root = math.pi * math.sqrt(share)
    assert code.variance[-1, 0] * (1 + share / 1000) == pytest.approx(math.sinh(root) / root, rel=5e-6)
    np.testing.assert_allclose(code.scales[:3], [1.44, 0.72, 0.48], rtol=4 * EPS)
    triple = propagate_residual(PAIR, 1, "weight_mean", branch_depth=3, branch_scale="mimicnorm")
    printed(triple.scales[0], "1.728")


def test_a_callable_is_its_named_rule() -> None:
    for name, rule in (("inverse_sqrt", lambda number: number**-0.5), ("one", lambda number: 1)):
        named = propagate_residual(PAIR, 5, branch_depth=2, branch_scale=name)
        called = propagate_residual(PAIR, 5, branch_depth=2, branch_scale=rule)
        np.testing.assert_allclose(called.ntk, named.ntk, rtol=8 * EPS)
        assert (named.branch_scale, called.branch_scale) == (name, "callable")


@pytest.mark.parametrize("norm", ["none", "weight_mean", "batch_norm"])
def test_a_branch_alone_is_a_chain(norm: str) -> None:
    # With α = 1 one block is K + K_F, and F of k layers is what propagate makes of k layers.
    gram = random_covariance(6, 3)
    block = propagate_residual(gram, 1, norm, branch_depth=2, branch_scale="one")
    chain = propagate(gram, 2, norm, sigma_w2=block.sigma_w2)
    np.testing.assert_allclose(block.nngp - block.nngp_by_block[0], chain.nngp, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(block.ntk - block.ntk_by_block[0], chain.ntk, rtol=1e-12, atol=1e-12)


def test_batch_norm_adds_one_to_the_variance() -> None:
    kernels = propagate_residual(autoregressive(), 6, "batch_norm", branch_depth=2, branch_scale="one")
    np.testing.assert_allclose(kernels.variance.mean(axis=1), np.arange(1, 8), rtol=1e-9)  # tr V = B/2
    assert (kernels.sigma_w2, kernels.statistics) == (2, "differentiated")


def test_raw_kernel_counts_the_mean_direction() -> None:
    projected = propagate_residual(PAIR, 3, "weight_mean")
    raw = propagate_residual(PAIR, 3, "weight_mean", projected=False)
    np.testing.assert_array_equal(raw.nngp, projected.nngp)
    first = raw.ntk_by_block[1] - projected.ntk_by_block[1]
    np.testing.assert_allclose(first, 1 / (math.pi - 1), rtol=1e-12)


class Residual(nn.Module):
    """x + α F(x), F of k layers ReLU, linear."""

    def __init__(self, alpha: float, layers: list[nn.Module]) -> None:
        super().__init__()
        self.alpha = alpha
        self.branch = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.alpha * self.branch(x)


def finite_network(width: int, blocks: int, depth: int, seed: int) -> tuple[nn.Sequential, dict[str, float]]:
    """A weight-mean network with inputs in R²; the compensated variance 2n/((n−1)(1−1/π)) of Theorem 3."""
    generator = np.random.default_rng(seed)
    multipliers: dict[str, float] = {}

    def linear(name: str, fan_in: int, fan_out: int, variance: float, *, center: bool) -> nn.Linear:
        weight = torch.from_numpy(generator.standard_normal((fan_out, fan_in))) * math.sqrt(variance / fan_in)
        layer = nn.Linear(fan_in, fan_out, bias=False, device="meta")
        layer.weight = nn.Parameter(ntk.center_rows(weight) if center else weight)
        multipliers[f"{name}.weight"] = variance / fan_in
        return layer

    variance = 2 * CHI_1 * width / (width - 1)
    modules: list[nn.Module] = [linear("0", 2, width, 1.0, center=False)]
    for number in range(1, blocks + 1):
        branch: list[nn.Module] = []
        for index in range(depth):
            name = f"{number}.branch.{2 * index + 1}"
            branch += [nn.ReLU(), linear(name, width, width, variance, center=True)]
        modules.append(Residual(number**-0.5, branch))
    modules.append(linear(str(blocks + 1), width, 1, 1.0, center=False))
    return nn.Sequential(*modules), multipliers


@pytest.mark.parametrize("depth", [1, 2])
def test_finite_networks(depth: int) -> None:
    blocks, width, seeds = 4, 256, 24
    inputs = torch.from_numpy(math.sqrt(2) * np.linalg.cholesky(np.array(PAIR)))
    samples = []
    for seed in range(seeds):
        network, multipliers = finite_network(width, blocks, depth, seed)
        centred = dict.fromkeys(list(multipliers)[1:-1], ntk.center_rows)
        result = ntk.empirical_ntk(network, inputs, reduce="sum", params=multipliers, projection=centred)
        stream = network[:-1](inputs).detach().numpy()
        samples.append([result.values, stream @ stream.T / width])
    by_seed = np.array(samples)  # [seeds, (Θ, K), 2, 2]
    kernels = propagate_residual(PAIR, blocks, "weight_mean", branch_depth=depth)
    # The read-out is trained here: it adds its own part, the kernel of what it reads.
    scores = standard_scores(by_seed, np.stack([kernels.ntk + kernels.nngp, kernels.nngp]))
    assert np.abs(scores).max() < 4
    unscaled = propagate_residual(PAIR, blocks, "weight_mean", branch_depth=depth, branch_scale="one")
    assert np.abs(standard_scores(by_seed[:, 1], unscaled.nngp)).max() > 4  # the control


def test_last_block_alone() -> None:
    every = propagate_residual(PAIR, 20, "weight_mean", branch_depth=2)
    last = propagate_residual(PAIR, 20, "weight_mean", branch_depth=2, every_block=False)
    np.testing.assert_array_equal(every.ntk, last.ntk)
    np.testing.assert_array_equal(every.ntk_by_block[-1], every.ntk)
    assert last.nngp_by_block.shape == (1, 2, 2)
    with pytest.raises(ValueError, match=r"ntk_exponent: requires the kernels of 10 blocks or more.*every_block=True"):
        last.ntk_exponent()


def test_result_states_its_convention_and_is_frozen() -> None:
    kernels = propagate_residual(PAIR, 12, "weight_mean", branch_depth=2)
    with pytest.raises(ValueError, match="read-only"):
        kernels.ntk[0, 0] = 0
    with pytest.raises(AttributeError, match="cannot assign to field"):
        kernels.norm = "none"
    for part in ("12 blocks", "2 (weight_mean, relu, linear)", "inverse_sqrt", "projected", "scales constant"):
        assert part in kernels.describe()
    dataset = kernels.to_dataset()
    assert dataset["ntk"].sel(block=12).values.tolist() == kernels.ntk.tolist()
    assert dataset.attrs["convention"] == kernels.describe()


@pytest.mark.parametrize("every", [True, False])
def test_it_draws_itself(every: bool) -> None:
    drawn = propagate_residual(PAIR, 12, "weight_mean", every_block=every)._repr_html_()
    svg = ET.fromstring(drawn[drawn.index("<svg") : drawn.index("</svg>") + 6])
    assert len(svg.findall(".//{http://www.w3.org/2000/svg}path")) > 3
    assert "12 blocks" in drawn


def test_exponents_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match="correlation_exponent: requires two inputs or more; received one"):
        propagate_residual([[1.0]], 20).correlation_exponent()
    opposed = propagate_residual([[1.0, -0.5], [-0.5, 1.0]], 20, "weight_mean")
    with pytest.raises(ValueError, match=r"correlation_exponent: requires a positive mean.*at block 2 and"):
        opposed.correlation_exponent()
    with pytest.raises(ValueError, match="requires the kernels of 10 blocks or more; there are 9, 10 of which"):
        propagate_residual(PAIR, 9).ntk_exponent()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": 0}, "blocks: must be an integer of at least 1; received 0.*residual additions"),
        ({"branch_depth": 1.5}, "branch_depth: must be an integer of at least 1; received 1.5"),
        ({"branch_scale": "inverse_root"}, "branch_scale: must be one of.*Nearest: 'inverse_sqrt'"),
        ({"branch_scale": lambda number: 1 / (number - 2) if number != 2 else math.nan}, "nan for block 2"),
        ({"norm": "layer_norm"}, "norm: must be one of"),
        ({"gram": [[1.0, 2.0], [2.0, 1.0]]}, "gram: must be positive semi-definite"),
        ({"projected": False}, "projected: only for norm='weight_mean'"),
        ({"norm": "batch_norm"}, r"gram \(number of rows\): must be an integer of at least 4; received 2"),
        (
            {"branch_scale": "one", "blocks": 1100},
            "blocks: must keep the kernels within float64; .* at block",
        ),
    ],
)
def test_refusals(options: dict, message: str) -> None:
    arguments = {"gram": PAIR, "blocks": 3} | options
    with pytest.raises(ValueError, match=message):
        propagate_residual(**arguments)


def test_scales_nest() -> None:
    kernels = propagate_residual(PAIR, 6, branch_scale="inverse")
    for shorter, longer in pairwise(range(1, 7)):
        again = propagate_residual(PAIR, shorter, branch_scale="inverse")
        np.testing.assert_array_equal(again.ntk, kernels.ntk_by_block[shorter])
        assert kernels.ntk_by_block[longer, 0, 0] > again.ntk[0, 0]
