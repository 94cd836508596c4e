"""The benchmark of the empirical NTK: its harness runs, and its check of kernels and goals can fail."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.empirical_ntk import floor, oracle, report, rounds
from benchmarks.empirical_ntk import problem as problems
from benchmarks.empirical_ntk.contenders import hand_written
from benchmarks.empirical_ntk.contenders.blocks import block_size, in_blocks
from benchmarks.empirical_ntk.contenders.ours import kernel
from benchmarks.empirical_ntk.contenders.registry import CONTENDERS, GEMM, OURS
from benchmarks.empirical_ntk.networks import build
from benchmarks.empirical_ntk.problem import Problem, load
from benchmarks.empirical_ntk.tasks import TASKS

MACHINE = {
    "date": "2026-01-01T00:00+00:00",
    "device": "CPU",
    "cpu": "some",
    "threads": 1,
    "memory": 2**30,
    "gpu_at_hand": False,
    "versions": {"torch": "0"},
}


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Problem:
    """T1 on three examples."""
    path = tmp_path_factory.mktemp("problem") / "T1.npz"
    np.savez(path, **oracle.make(TASKS["T1"], 3))
    return load(path)


def test_ours_and_a_peer_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problems, "CACHE", tmp_path)
    path = oracle.write("T6", 3)
    monkeypatch.setattr(rounds, "prepare", lambda task, examples: path)
    records = rounds.measure(TASKS["T6"], ["torch-whole-batch"], examples=3, repetitions=2, limit=60)
    for record in records.values():
        assert len(record["pairs"]) == 2
        assert record["error"] < 1e-5
        assert record["peak"] > record["own"] > 0
    assert report.best_peer({**_task(), "contenders": records}) == "torch-whole-batch"


def test_a_contender_that_raises_or_takes_too_long_is_named(tmp_path: Path) -> None:
    with pytest.raises(rounds.WorkerError, match="KeyError: 'nobody'"):
        rounds.Worker("nobody", tmp_path, "cpu", limit=60)
    with pytest.raises(rounds.WorkerError, match="over 0 s"):
        rounds.Worker(OURS, tmp_path, "cpu", limit=0)


def test_the_check_passes_the_kernel_and_catches_a_wrong_one(problem: Problem) -> None:
    values = kernel(problem, "cpu")()
    assert problem.error(values) < 1e-6
    scaled, transposed, swapped = values * 1.001, values.swapaxes(2, 3), values[::-1]
    for wrong in (scaled, transposed, swapped):
        assert problem.error(wrong) > 1e-4
    model, x = problem.torch()
    without_biases = sum(
        np.einsum("iap,jbp->ijab", part, part)
        for name, part in _jacobian(model, x).items()
        if not name.endswith("bias")
    )
    assert problem.error(without_biases) > 1e-4


@pytest.mark.parametrize("name", ["T1", "T2", "T3"])
def test_the_one_written_out_is_right(name: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "problem.npz", **oracle.make(TASKS[name], 3))
    problem = load(tmp_path / "problem.npz")
    assert problem.error(hand_written.linear_relu(problem, "cpu")()) < 1e-6


def _jacobian(model: nn.Module, x: torch.Tensor) -> dict[str, np.ndarray]:
    rows = [torch.autograd.grad(entry, list(model.parameters()), retain_graph=True) for entry in model(x).flatten()]
    return {
        name: torch.stack([row[k].flatten() for row in rows]).reshape(len(x), 10, -1).numpy()
        for k, (name, _) in enumerate(model.named_parameters())
    }


def test_an_example_at_a_kink_is_left_out() -> None:
    model, x = build("mlp"), torch.randn(4, 784, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model[0].bias[7] -= model[0](x)[2, 7]
    safe = oracle.safe_examples(model, x)
    assert not safe[2]
    assert safe[[0, 1, 3]].all()


def test_the_operations_of_the_convolutions_are_those_counted_by_hand() -> None:
    task = TASKS["T4"]
    count = floor.operations(task, floor.layers(build("conv"), task.shape), 64)
    weights = {1024: 32 * 27, 256: 64 * 288, 64: 64 * 576}  # by positions
    assert count["gram"] == 640**2 * sum(weights.values()) + 64**2 * 64
    assert count["gradients"] == 2 * 640 * sum(s * p for s, p in weights.items())
    assert count["backward"] == 2 * 640 * sum(s * p for s, p in weights.items() if s < 1024)


@pytest.mark.parametrize("size", [1, 2, 6])
def test_blocks_give_the_whole(size: int) -> None:
    rows = np.random.default_rng(0).standard_normal((6, 2, 5))
    block = lambda i, j: np.einsum("iap,jbp->ijab", rows[i : i + size], rows[j : j + size])
    np.testing.assert_array_equal(in_blocks(block, 6, size), np.einsum("iap,jbp->ijab", rows, rows))


def test_a_block_takes_no_more_than_its_share() -> None:
    assert block_size(12, lambda b: b, 12) == 12
    assert block_size(12, lambda b: b, 11) == 4
    assert block_size(12, lambda b: b, 0) == 1


def _task(**changes: Any) -> dict[str, Any]:
    """A record of T1 that meets every goal: 4 times as fast as the peer, 2 times the floor, half its memory."""
    product = 0.1
    contenders = {
        OURS: {"own": 1, "peak": 50, "error": 1e-7, "prepared": 0.0, "pairs": [(0.2, 0.2)] * 3},
        GEMM: {"own": 1, "peak": 1, "prepared": 0.0, "pairs": [(product, 0.2)] * 3},
        "nngeometry": {"own": 1, "peak": 100, "error": 1e-7, "prepared": 0.0, "pairs": [(0.8, 0.2)] * 3},
    }
    return {
        "says": "a network",
        "examples": 256,
        "reduce": "none",
        "dtype": "float32",
        "left_out": 0,
        "operations": report.PRODUCT_OPERATIONS,
        "max_memory": None,
        "contenders": contenders,
        **changes,
    }


def _record(task: dict[str, Any]) -> dict[str, Any]:
    return {"machine": MACHINE, "command": "make bench", "quick": False, "tasks": {"T1": task}}


def test_a_record_that_meets_the_goals_is_reported_so() -> None:
    record = _record(_task())
    goals = report.goals(record)
    assert len(goals) == 4
    assert all(goal.met for goal in goals)
    text = report.markdown(record)
    assert "| nngeometry, GramMatrix | 4 |" in text
    assert "| our time over the floor | 2 |" in text
    assert "No GPU was at hand" in text


@pytest.mark.parametrize(
    ("contender", "field", "value", "missed"),
    [
        (OURS, "error", 1e-4, "relative error"),
        (OURS, "error", float("nan"), "relative error"),
        (OURS, "peak", 101, "peak memory"),
        ("nngeometry", "pairs", [(0.6, 0.2)], "3.5 times as fast"),
        (GEMM, "pairs", [(0.05, 0.2)], "times the floor"),
    ],
)
def test_a_missed_goal_is_named(contender: str, field: str, value: Any, missed: str) -> None:
    task = copy.deepcopy(_task())
    task["contenders"][contender][field] = value
    record = _record(task)
    (goal,) = [goal for goal in report.goals(record) if not goal.met]
    assert missed in goal.says
    assert "**missed**" in report.markdown(record)


def test_an_eigenvalue_outside_its_bar_is_a_miss() -> None:
    ends = {"eigenvalues": [10.0, 1.02], "bars": [0.1, 0.001], "references": [10.05, 1.0], "error": 0.02}
    task = _task()
    task["contenders"] = {OURS: {**task["contenders"][OURS], **ends}}
    largest, smallest = report.goals({**_record(task), "tasks": {"T7": task}})
    assert largest.met
    assert not smallest.met


def test_every_contender_can_be_told_apart_and_takes_known_tasks() -> None:
    assert len({contender.says for contender in CONTENDERS.values()}) == len(CONTENDERS)
    for contender in CONTENDERS.values():
        assert set(contender.tasks) <= TASKS.keys()


def test_the_message_of_a_failed_peer_is_its_exception() -> None:
    written = 'Traceback (most recent call last):\n  File "a"\nValueError: no batch norm.\nin two lines\n'
    assert rounds.message(written) == "ValueError: no batch norm."
    assert rounds.message("") == "ended without a message"
