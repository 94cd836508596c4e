"""The kernel along training: against kernels by autograd, and against what theory says of wide networks."""

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn

import ntk
from ntk import errors
from tests.ntk.oracle import CASES, build, jacobian, kernel, state_hash
from tests.ntk.test_ntk_operator import flat


def descend(model: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int, rate: float) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        ((model(x) - y).square().sum() / 2).backward()
        optimizer.step()


def centred(matrix: np.ndarray, n: int) -> np.ndarray:
    """H A H with H written out."""
    h = np.kron(np.eye(n) - 1 / n, np.eye(len(matrix) // n))
    return h @ matrix @ h


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.trace(a.T @ b) / np.sqrt(np.trace(a.T @ a) * np.trace(b.T @ b)))


@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("reduce", ["none", "trace", "sum"])
def test_figures_are_those_of_the_kernels(reduce: str, centre: bool) -> None:
    model, x, _ = build("conv with BatchNorm")
    y = torch.linspace(-1, 2, 15, dtype=torch.float64).reshape(5, 3).sin()
    tracker = ntk.NtkTracker(model, x, targets=y, reduce=reduce, centred=centre)
    matrices = []
    for step in (0, 4, 9):
        part = jacobian(model, x)
        matrices.append(flat(kernel(part, part), reduce))
        tracker.record(step)
        descend(model, x, y, 3, 0.01)
    found = tracker.result
    assert found.steps == pytest.approx([0, 4, 9])
    first, last = matrices[0], matrices[-1]
    assert found.relative_change[0] == 0
    assert found.relative_change[2] == pytest.approx(np.linalg.norm(last - first) / np.linalg.norm(first), rel=1e-10)
    assert found.relative_change[2] > 1e-3
    compared = [centred(matrix, 5) if centre else matrix for matrix in matrices]
    columns = y.numpy() if reduce != "none" else y.numpy().reshape(-1, 1)
    target = centred(columns @ columns.T, 5) if centre else columns @ columns.T
    for i, matrix in enumerate(compared):
        assert found.target_alignment[i] == pytest.approx(cosine(matrix, target), rel=1e-10)
        for j, other in enumerate(compared):
            assert found.alignment[i, j] == pytest.approx(cosine(matrix, other), rel=1e-10)
        assert found.trace[i] == pytest.approx(np.trace(matrices[i]), rel=1e-10)
        assert found.largest[i] == pytest.approx(np.linalg.eigvalsh(matrices[i])[-1], rel=1e-10)
    assert not found.alignment.flags.writeable


@pytest.mark.parametrize("case", CASES)
def test_a_measurement_changes_nothing(case: str) -> None:
    """Neither the state, nor the training that goes on: each step draws noise, as dropout would."""

    def train(tracked: bool) -> tuple[list[str], dict[str, torch.Tensor]]:
        model, x, _ = build(case)
        tracker = ntk.NtkTracker(model, x)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        hashes = []
        for step in range(3):
            optimizer.zero_grad()
            output = model(x)
            (output * torch.randn_like(output)).sum().backward()
            if tracked:
                before = state_hash(model)
                tracker.record(step)
                assert state_hash(model) == before
            optimizer.step()
            hashes.append(state_hash(model))
        assert len(tracker.result.steps) == (3 if tracked else 0)
        return hashes, {name: value.clone() for name, value in model.state_dict().items()}

    (_, with_it), (_, without) = train(True), train(False)
    assert all(torch.equal(with_it[name], without[name]) for name in without)


def test_it_is_the_kernel_of_the_moment() -> None:
    model, x, _ = build("mlp")
    tracker = ntk.NtkTracker(model, x)
    with torch.no_grad():
        tracker.record(0)
        x.zero_()
        tracker.record(1)
    before = tracker.result
    for parameter in model.parameters():
        parameter.data.mul_(2)
    tracker.record(2)
    assert before.relative_change.tolist() == [0, 0]
    assert tracker.result.relative_change[2] > 0.1
    assert len(before.steps) == 2


def test_a_linearized_network_does_not_drift() -> None:
    """Control: the network itself does."""
    model, x, _ = build("mlp")
    y = torch.linspace(-1, 1, 10, dtype=torch.float64).reshape(5, 2)
    for network, bound in ((ntk.linearize(model), (0, 1e-12)), (copy.deepcopy(model), (1e-2, 1e2))):
        tracker = ntk.NtkTracker(network, x)
        tracker.record(0)
        descend(network, x, y, 20, 0.02)
        tracker.record(20)
        assert bound[0] <= tracker.result.relative_change[1] <= bound[1]


class Wide(nn.Module):
    """width^-power Σ a tanh(w x): power 1/2 is the NTK parametrization, power 1 the mean-field one."""

    def __init__(self, width: int, power: float, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.w = nn.Parameter(torch.randn(width, 6, generator=generator, dtype=torch.float64))
        self.a = nn.Parameter(torch.randn(1, width, generator=generator, dtype=torch.float64))
        self.scale = width**-power

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * (torch.tanh(x @ self.w.T) @ self.a.T)


@pytest.mark.parametrize(("power", "expected"), [(0.5, -1.0), (1.0, 0.0)])
def test_drift_falls_with_width_in_the_ntk_parametrization_alone(power: float, expected: float) -> None:
    """As 1/width, within four standard errors of a jackknife, for the drift of Θ by Σ O3 (f − y): O3 is 1/width.

    Source: E. Dyer and G. Gur-Ari, "Asymptotics of wide networks from Feynman diagrams", ICLR 2020, arXiv 1909.11304;
    1/√width is an upper bound (Lee et al. 2019, arXiv 1902.06720). Control: under mean-field scaling, the
    rate scaled to keep the kernel's speed, the drift stays, and either slope refutes the other scaling.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 6, generator=generator, dtype=torch.float64) / 6**0.5
    y = torch.randn(12, 1, generator=generator, dtype=torch.float64)
    seeds, widths, logs, error = 12, (256, 4096), [], []
    for width in widths:
        squares = []
        for seed in range(seeds):
            model = Wide(width, power, width + seed)
            tracker = ntk.NtkTracker(model, x)
            tracker.record(0)
            descend(model, x, y, 20, 0.3 * width ** (2 * power - 1))
            tracker.record(20)
            squares.append(tracker.result.relative_change[1] ** 2)
        left_out = np.array([np.log(np.delete(squares, seed).mean()) / 2 for seed in range(seeds)])
        logs.append(np.log(np.mean(squares)) / 2)
        error.append(np.sqrt((seeds - 1) * left_out.var()))
    span = np.log(widths[1] / widths[0])
    slope, uncertainty = (logs[1] - logs[0]) / span, np.hypot(*error) / span
    allowed = 4 * uncertainty
    assert abs(slope - expected) < allowed
    assert abs(slope - (-1.0 - expected)) > allowed


def test_result_draws_and_exports_itself() -> None:
    model, x, _ = build("mlp")
    tracker = ntk.NtkTracker(model, x, targets=torch.linspace(0, 1, 5))
    assert repr(tracker.result) == "NtkDrift(no kernel recorded yet)"
    assert "<svg" in tracker.result._repr_html_()
    tracker.record(0)
    tracker.record(2.5)
    found = tracker.result
    assert "2 kernels, step 0 to 2.5; relative change 0; alignment of last with first 1" in repr(found)
    assert found.source in found._repr_html_()
    dataset = found.to_dataset()
    assert dataset.alignment.shape == (2, 2)
    assert dataset.step.to_numpy().tolist() == [0, 2.5]
    assert dataset.attrs["centred"] == 1
    assert "target_alignment" not in ntk.NtkTracker(model, x).result.to_dataset()


def test_refusals() -> None:
    model, x, _ = build("conv with BatchNorm")
    for wrong, said in (
        (torch.zeros(5, dtype=torch.long), r"got int64 of shape \(5,\).*one_hot"),
        (torch.zeros(4), r"\[5\] or \[5, o\].*shape \(4,\)"),
        (torch.ones(5), "differ from each other"),
    ):
        with pytest.raises(ValueError, match=f"targets must .*{said}"):
            ntk.NtkTracker(model, x, targets=wrong)
    tracker = ntk.NtkTracker(model, x, targets=torch.linspace(0, 1, 5), reduce="none")
    with pytest.raises(ValueError, match=re.escape("one column for each of the 3 outputs where reduce='none'; got 1")):
        tracker.record(0)
    tracker = ntk.NtkTracker(model, x)
    tracker.record(3)
    with pytest.raises(ValueError, match="step must be later than the last one recorded, 3; got 3"):
        tracker.record(3)
    model.eval()
    with pytest.raises(errors.ConventionError, match="mode, statistics differ"):
        tracker.record(4)
    assert len(tracker.result.steps) == 1
