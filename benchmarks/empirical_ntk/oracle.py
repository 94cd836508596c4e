"""What the kernel is, by brute force, and inputs on which float32 can be held against it.

The reference is a loop of gradients of a float64 copy, over a block of a few examples spread over the batch. A ReLU
whose input lies within rounding of zero has one derivative in float32 and another in float64, which would look like an
error of 1e-4: examples with such an input are left out of the block. Where the examples of a batch meet, one of them
changes all, and inputs are drawn again until there is none.

Run: python -m benchmarks.empirical_ntk.oracle TASK EXAMPLES, which writes the problem and prints where.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from torch import Tensor, nn

import ntk
from benchmarks.empirical_ntk import floor
from benchmarks.empirical_ntk.networks import build
from benchmarks.empirical_ntk.problem import path_of
from benchmarks.empirical_ntk.tasks import OUTPUTS, TASKS, Task

BLOCK = {"none": 4, "trace": 8}
"""Examples in the block that is compared."""

MARGIN = 4.0
"""The input of a ReLU is safe at this many times the largest error that float32 makes in its layer."""

DRAWS = 100


def write(name: str, examples: int) -> Path:
    """Make the problem of a task, unless it is there already."""
    path = path_of(name, examples)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part.npz")
        np.savez(unfinished, **make(TASKS[name], examples))
        unfinished.rename(path)
    return path


def make(task: Task, examples: int) -> dict[str, np.ndarray]:
    """The fields of a `Problem`, weights under "w:NAME".

    Raises:
        RuntimeError: No inputs keep off the kinks.
    """
    model = build(task.network)
    for seed in range(DRAWS):
        x = torch.randn(examples, *task.shape, generator=torch.Generator().manual_seed(seed))
        safe = np.flatnonzero(safe_examples(model, x))
        if len(safe) == examples or (len(safe) >= 2 and not task.mixes):
            break
    else:
        raise RuntimeError(f"{task.name}: in {DRAWS} draws of the inputs, some ReLU was always at its kink.")
    rows = safe[np.linspace(0, len(safe) - 1, min(BLOCK[task.reduce], len(safe))).astype(int)]
    reference = brute_force(model, x, rows, task)
    found = floor.layers(model, task.shape)
    stored = model.to(getattr(torch, task.dtype)).state_dict()
    return {
        **{f"w:{name}": value.numpy() for name, value in stored.items()},
        "task": np.array(task.name),
        "x": x.numpy().astype(task.dtype),
        "parameters": np.array(sum(p.numel() for p in model.parameters())),
        "rows": rows,
        "reference": reference,
        "left_out": np.array(examples - len(safe)),
        "eigenvalues": eigenvalues(model, x, task, rows, reference) if task.eigenvalues else np.empty(0),
        "activations": np.array(sum(layer.fan_out * layer.positions for layer in found)),
        "operations": np.array(sum(floor.operations(task, found, examples).values())),
    }


def safe_examples(model: nn.Module, x: Tensor) -> np.ndarray:
    """Which of the n examples have no ReLU input within float32's error of zero."""
    low, high = (_relu_inputs(copy.deepcopy(model).to(dtype), x.to(dtype)) for dtype in (torch.float32, torch.float64))
    safe = torch.ones(len(x), dtype=torch.bool)
    for single, double in zip(low, high, strict=True):
        safe &= double.flatten(1).abs().amin(1) > MARGIN * (single - double).abs().max()
    return safe.numpy()


def _relu_inputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """What enters each ReLU of a network that is used for nothing else."""
    seen: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(x)
    return seen


def brute_force(model: nn.Module, x: Tensor, rows: np.ndarray, task: Task) -> np.ndarray:
    """Kernel of some examples in float64: one gradient of one output at a time, and their products."""
    twin = copy.deepcopy(model).double()
    output = twin(x.double())[rows] if task.mixes else twin(x[rows].double())
    parameters = list(twin.parameters())
    gradients = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in output.flatten()]
    flat = torch.stack([torch.cat([part.flatten() for part in gradient]) for gradient in gradients])
    values = (flat @ flat.T).reshape(len(rows), OUTPUTS, len(rows), OUTPUTS).transpose(1, 2).numpy()
    return np.einsum("ijaa->ij", values) / OUTPUTS if task.reduce == "trace" else values


def eigenvalues(model: nn.Module, x: Tensor, task: Task, rows: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Largest and smallest of the kernel in float64, which is ours once its block is that of brute force.

    Raises:
        RuntimeError: It is not.
    """
    kernel = ntk.empirical_ntk(model, x, reduce=task.reduce, dtype=torch.float64).values
    error = np.abs(kernel[np.ix_(rows, rows)] - reference).max() / np.abs(reference).max()
    if error > 1e-10:
        raise RuntimeError(f"{task.name}: the float64 kernel differs from brute force by {error:.1e}, relative.")
    return scipy.linalg.eigvalsh(kernel, check_finite=False)[[-1, 0]]


if __name__ == "__main__":
    print(write(sys.argv[1], int(sys.argv[2])))
