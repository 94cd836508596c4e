"""One task made concrete: the same inputs, weights and reference for everyone, as NumPy arrays.

No framework is imported until one is asked for, so that each contender's memory is its own.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.empirical_ntk.tasks import TASKS, Task

if TYPE_CHECKING:
    import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CACHE = ROOT / ".cache" / "benchmarks"


@dataclass(frozen=True, eq=False)
class Problem:
    """A task with its numbers, as `oracle` makes them.

    Attributes:
        task: The task.
        x: [n, ...] in the task's dtype.
        weights: Name in torch -> array.
        parameters: Numbers that the kernel is taken over.
        rows: [k] examples that are compared.
        reference: Kernel of these in float64, [k, k, 10, 10] or [k, k].
        left_out: How many of the n examples could not be compared.
        eigenvalues: Largest and smallest in float64, or empty.
        activations: Numbers that one example puts into layer outputs.
        operations: Operations the task needs.
    """

    task: Task
    x: np.ndarray
    weights: dict[str, np.ndarray]
    parameters: int
    rows: np.ndarray
    reference: np.ndarray
    left_out: int
    eigenvalues: np.ndarray
    activations: int
    operations: float

    def torch(self, device: str = "cpu") -> tuple[torch.nn.Module, torch.Tensor]:
        """The network and its batch in torch."""
        import torch

        from benchmarks.empirical_ntk.networks import build

        x = torch.from_numpy(self.x).to(device)
        model = build(self.task.network).to(device, x.dtype)
        model.load_state_dict({name: torch.from_numpy(value) for name, value in self.weights.items()})
        return model, x

    def error(self, values: np.ndarray) -> float:
        """Largest difference of the compared block of a kernel, relative to the largest entry of the reference."""
        block = values[np.ix_(self.rows, self.rows)]
        return float(np.abs(block - self.reference).max() / np.abs(self.reference).max())


def path_of(name: str, examples: int) -> Path:
    """Where the problem of a task is kept; another path once the code that makes it is another."""
    sources = b"".join((HERE / file).read_bytes() for file in ("tasks.py", "networks.py", "oracle.py", "floor.py"))
    return CACHE / f"{name}-{examples}-{hashlib.sha256(sources).hexdigest()[:12]}.npz"


def load(path: Path) -> Problem:
    """A problem from its file."""
    with np.load(path) as stored:
        fields = dict(stored)
    weights = {key[2:]: fields.pop(key) for key in list(fields) if key.startswith("w:")}
    numbers = {key: fields.pop(key).item() for key in ("parameters", "left_out", "activations", "operations")}
    return Problem(task=TASKS[fields.pop("task").item()], weights=weights, **fields, **numbers)
