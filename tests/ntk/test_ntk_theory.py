"""Finite networks against closed forms, and against the infinite-width values of docs/mathematics.md §9.5.

Monte Carlo: width 1024 and the 12 seeds 0 to 11, fixed beforehand; four standard errors allowed. Weights and rows are
float32, whose rounding (1e-6 relative) is a thousandth of one standard error.
"""

from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

import ntk
from tests.ntk.networks import constant_correlation, dense

WIDTH = 1024
SEEDS = range(12)


def entries(values: np.ndarray) -> tuple[float, float]:
    """Mean diagonal and mean off-diagonal entry."""
    n, trace = len(values), float(np.trace(values))
    return trace / n, (float(values.sum()) - trace) / (n * (n - 1))


@cache
def sample(norm: str, depth: int, m: int, variant: str) -> np.ndarray:
    """[seeds, 2], mean diagonal and off-diagonal entry of the NTK on const-0.5 data, in NTK parametrization."""
    x = constant_correlation(m, 0.5)
    rows = []
    for seed in SEEDS:
        net = dense(norm, depth, m, width=WIDTH, seed=seed, detached=variant == "detached")
        projection = net.projection if variant == "projected" else None
        kernel = ntk.empirical_ntk(net.model, x, params=net.multipliers, projection=projection, reduce="sum")
        rows.append(entries(kernel.values))
    return np.array(rows)


def agrees(sample: np.ndarray, expected: float) -> bool:
    """Whether a mean is within four standard errors of what is expected."""
    return bool(abs(sample.mean() - expected) <= 4 * sample.std(ddof=1) / np.sqrt(len(sample)))


def condition(diagonal: float, off: float, m: int) -> float:
    """Condition number of (diagonal - off) I + off 11ᵀ."""
    bulk, outlier = diagonal - off, diagonal + (m - 1) * off
    return max(bulk, outlier) / min(bulk, outlier)


def condition_agrees(sample: np.ndarray, m: int, expected: float) -> bool:
    """The condition number of the mean entries within four jackknife standard errors."""
    n = len(sample)
    left_out = np.array([condition(*np.delete(sample, i, 0).mean(0), m) for i in range(n)])
    error = np.sqrt((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum())
    return bool(abs(condition(*sample.mean(0), m) - expected) <= 4 * error)


def test_the_helpers_can_fail() -> None:
    draws = np.random.default_rng(0).normal(1.0, 0.1, 12)
    assert agrees(draws, 1.0)
    assert not agrees(draws, 1.2)
    pairs = np.stack([draws + 1, draws / 2], 1)
    value = condition(2.0, 0.5, 10)
    assert condition_agrees(pairs, 10, value)
    assert not condition_agrees(pairs, 10, 2 * value)


RAW, PROJECTED, PLAIN = (24.9925, 3.20657), (19.1994, 1.40151), (6.0, 2.46289)


@pytest.mark.parametrize(
    ("norm", "variant", "expected"),
    [("none", "raw", PLAIN), ("weight_mean", "projected", PROJECTED), ("weight_mean", "raw", RAW)],
    ids=["plain", "weight mean, projected", "weight mean, raw"],
)
def test_weight_mean_at_depth_5(norm: str, variant: str, expected: tuple[float, float]) -> None:
    """docs/mathematics.md §9.5, entries first: the condition number is biased upward at finite width."""
    drawn = sample(norm, 5, 10, variant)
    assert agrees(drawn[:, 0], expected[0])
    assert agrees(drawn[:, 1], expected[1])
    assert condition_agrees(drawn, 10, condition(*expected, 10))


def test_the_raw_kernel_is_not_the_projected_one() -> None:
    """Negative control: without the projection every entry is off by 0.467 per layer, and the test above sees it."""
    raw, projected = sample("weight_mean", 5, 10, "raw"), sample("weight_mean", 5, 10, "projected")
    for column in (0, 1):
        assert not agrees(raw[:, column], PROJECTED[column])
        assert not agrees(projected[:, column], RAW[column])
    assert not agrees(sample("none", 5, 10, "raw")[:, 1], PROJECTED[1])
    assert not condition_agrees(raw, 10, condition(*PROJECTED, 10))


BATCH_NORM = {1: (1.038462, 0.113440), 3: (3.255788, -0.007633), 6: (14.33214, -0.612440)}


@pytest.mark.parametrize("depth", BATCH_NORM)
def test_batch_norm_of_16(depth: int) -> None:
    """docs/mathematics.md §9.5."""
    drawn = sample("batch_norm", depth, 16, "raw")
    assert agrees(drawn[:, 0], BATCH_NORM[depth][0])
    assert agrees(drawn[:, 1], BATCH_NORM[depth][1])


def test_condition_number_of_batch_norm_at_depth_6() -> None:
    assert condition_agrees(sample("batch_norm", 6, 16, "raw"), 16, 2.90437)
    assert not condition_agrees(sample("batch_norm", 6, 16, "raw"), 16, 1.0)


@pytest.mark.parametrize("depth", [1, 3])
def test_statistics_are_differentiated(depth: int) -> None:
    """Negative control: with the statistics held constant the kernel is another one, and the test above sees it."""
    drawn = sample("batch_norm", depth, 16, "detached")
    assert not agrees(drawn[:, 1], BATCH_NORM[depth][1])


def test_nngp_of_batch_norm() -> None:
    """docs/mathematics.md §5.4: 1/2 and J/2 behind ReLU at B = 16; the pre-activation kernel is singular instead."""
    drawn = []
    for seed in SEEDS:
        net = dense("batch_norm", 1, 16, width=WIDTH, seed=seed)
        drawn.append(entries(ntk.empirical_nngp(net.model, constant_correlation(16, 0.5), layer="2").values))
    assert agrees(np.array(drawn)[:, 0], 0.5)
    assert agrees(np.array(drawn)[:, 1], 0.142842)
    assert not agrees(np.array(drawn)[:, 1], -1 / 30)


def gaussian(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_one_linear_layer() -> None:
    """Standard parametrization: x xᵀ + 1 for each output, and nothing between outputs; 1/n0 makes it x xᵀ/n0."""
    x = gaussian(5, 4)
    model = nn.Linear(4, 3).double()
    expected = torch.einsum("ij,ab->ijab", x @ x.T + 1, torch.eye(3, dtype=torch.float64)).numpy()
    assert np.abs(ntk.empirical_ntk(model, x).values - expected).max() < 1e-13
    scaled = ntk.empirical_ntk(model, x, params={"weight": 1 / 4}, reduce="trace").values
    assert np.abs(scaled - (x @ x.T / 4).numpy()).max() < 1e-13


def test_deep_linear_network() -> None:
    """Θ = Σ_l (B_l B_lᵀ) ⊗ (A_l A_lᵀ), A_l the input of layer l and B_l the product of the weights above it."""
    torch.manual_seed(1)
    layers = [nn.Linear(4, 6, bias=False), nn.Linear(6, 5, bias=False), nn.Linear(5, 2, bias=False)]
    model = nn.Sequential(*layers).double()
    x = gaussian(3, 4)
    expected = np.zeros((3, 3, 2, 2))
    for index in range(3):
        below, above = x, torch.eye(2, dtype=torch.float64)
        for layer in layers[:index]:
            below = below @ layer.weight.detach().T
        for layer in reversed(layers[index + 1 :]):
            above = above @ layer.weight.detach()
        expected += torch.einsum("ij,ab->ijab", below @ below.T, above @ above.T).numpy()
    assert np.abs(ntk.empirical_ntk(model, x).values - expected).max() < 1e-12 * np.abs(expected).max()


def test_one_relu_layer_of_two_weights() -> None:
    """Θ = Σ_u φ(h_u)φ(h_u') + x·x' Σ_u v_u² φ'(h_u)φ'(h_u'), written out."""
    net = dense("none", 1, 4, width=7, seed=0, dtype=torch.float64)
    x = gaussian(5, 4)
    hidden = x @ net.model[0].weight.detach().T
    gates, read_out = (hidden > 0).double(), net.model[2].weight.detach().squeeze(0)
    expected = hidden.relu() @ hidden.relu().T + (x @ x.T) * ((gates * read_out**2) @ gates.T)
    assert np.abs(ntk.empirical_ntk(net.model, x, reduce="sum").values - expected.numpy()).max() < 1e-13
