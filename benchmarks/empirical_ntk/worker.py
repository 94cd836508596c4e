"""One contender on one task, in a process of its own. Commands come on the standard input, answers go out as JSON.

Run: python -m benchmarks.empirical_ntk.worker CONTENDER PROBLEM.npz DEVICE

The first line out says what the imports took and what preparing, compiling included, took. Then:

    run         the work once: seconds, the peak of the process, and the relative error of what came out
    save FILE   keep what the last run returned
    against FILE  its largest difference to what was kept, relative to the largest entry
"""

from __future__ import annotations

import json
import resource
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.empirical_ntk.contenders.registry import CONTENDERS
from benchmarks.empirical_ntk.problem import Problem, load


def main(name: str, path: str, device: str) -> None:
    """Prepare, and answer commands until the input ends."""
    warnings.simplefilter("ignore")  # of the peers; an error still ends the process
    contender = CONTENDERS[name].load()
    memory = Memory(device)
    start = perf_counter()
    problem = load(Path(path))
    work = contender(problem, device)
    answer(own=memory.own, prepared=perf_counter() - start)
    values = None
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        if command == "run":
            del values
            seconds, values = timed(work)
            answer(seconds=seconds, peak=memory.peak(), **judged(problem, values))
        elif command == "save":
            np.save(argument, values)
            answer()
        else:
            answer(difference=difference(values, np.load(argument, mmap_mode="r")))


def answer(**fields: Any) -> None:
    """One line of JSON."""
    print(json.dumps(fields), flush=True)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Wall-clock time of the work, and what it returned."""
    start = perf_counter()
    values = work()
    return perf_counter() - start, values


def judged(problem: Problem, values: Any) -> dict[str, Any]:
    """How far what came out is from the reference."""
    if values is None:
        return {}
    if problem.task.eigenvalues:
        found, bars = values[:2], values[2:]
        return {
            "eigenvalues": found.tolist(),
            "bars": bars.tolist(),
            "references": problem.eigenvalues.tolist(),
            "error": float(np.abs(found / problem.eigenvalues - 1).max()),
        }
    return {"error": problem.error(values)}


def difference(values: np.ndarray, kept: np.ndarray) -> float:
    """Largest difference of two arrays relative to the largest entry, a row at a time: one may lie on the disk."""
    largest = max(float(np.abs(row).max()) for row in kept)
    return max(float(np.abs(a - b).max()) for a, b in zip(values, kept, strict=True)) / largest


class Memory:
    """Peak memory of this process in bytes, or of the GPU where there is one.

    Attributes:
        own: What the interpreter and its imports had taken when this was made.
    """

    def __init__(self, device: str) -> None:
        """Read what is taken already."""
        self._device = device
        self.own = self.peak()

    def peak(self) -> int:
        """Largest so far."""
        if self._device != "cpu":
            import torch

            return torch.cuda.max_memory_allocated()
        try:  # unlike ru_maxrss, not inherited from the process that started this one
            status = Path("/proc/self/status").read_text()
            return 1024 * int(status.partition("VmHWM:")[2].split()[0])
        except (OSError, IndexError):
            unit = 1 if sys.platform == "darwin" else 1024
            return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main(*sys.argv[1:])
