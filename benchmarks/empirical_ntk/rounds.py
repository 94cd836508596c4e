"""Contenders take turns, each in its own process, and each of its runs stands beside one of ours.

The machine may be shared and its speed may change from minute to minute: what is kept is the ratio of neighbouring
runs. Everyone runs once to warm up. Whoever takes longer than `PATIENCE` for that is measured by that run, with one of
ours after it, and leaves; whoever takes longer than the limit is stopped.
"""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.empirical_ntk.contenders.registry import CONTENDERS, GEMM, OURS
from benchmarks.empirical_ntk.problem import ROOT, path_of
from benchmarks.empirical_ntk.tasks import Task

PEERS = ROOT / ".cache" / "peers"
PATIENCE = 20.0
"""Seconds up to which a contender is measured repeatedly."""

Say = Callable[[str], None]


class WorkerError(RuntimeError):
    """A contender raised, ran out of memory or of time; the message says which."""


class Worker:
    """The process of one contender on one task.

    Attributes:
        ready: What it said of its preparation.
    """

    def __init__(self, name: str, problem: Path, device: str, limit: float) -> None:
        """Start it, and wait until it is prepared.

        Raises:
            WorkerError: It is not prepared within the limit.
        """
        self._limit, self._device = limit, device
        self._errors = tempfile.TemporaryFile(mode="w+")  # ruff: ignore[open-file-with-context-handler] (closed by `close`)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.empirical_ntk.worker", name, str(problem), device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=ROOT,
            env=environment(),
        )
        self.ready = self._answer()

    def ask(self, command: str) -> dict[str, Any]:
        """Send a command and wait for its answer.

        Raises:
            WorkerError: There is none within the limit.
        """
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _answer(self) -> dict[str, Any]:
        if not select.select([self._process.stdout], [], [], self._limit)[0]:
            self.close()
            raise WorkerError(f"over {self._limit:.0f} s")
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        status = self._process.wait()
        self._errors.seek(0)
        written = self._errors.read()
        self.close()
        raise WorkerError("killed, as by want of memory" if status == -9 else message(written))


def message(written: str) -> str:
    """The line of a traceback that names the exception, cut short."""
    lines = [line for line in written.splitlines() if line.strip()] or ["ended without a message"]
    return next((line for line in reversed(lines) if re.match(r"[\w.]*(Error|Exception)\b", line)), lines[-1])[:160]


def environment() -> dict[str, str]:
    """Of the workers: this checkout, and the peers that `make bench` installs."""
    paths = [str(ROOT), str(PEERS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def prepare(task: Task, examples: int) -> Path:
    """The file of a problem, made in a process of its own if it is not there."""
    command = [sys.executable, "-m", "benchmarks.empirical_ntk.oracle", task.name, str(examples)]
    if not path_of(task.name, examples).exists():
        subprocess.run(command, check=True, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
    return path_of(task.name, examples)


def measure(
    task: Task,
    names: list[str],
    *,
    examples: int,
    repetitions: int,
    limit: float,
    device: str = "cpu",
    say: Say = print,
) -> dict[str, dict[str, Any]]:
    """Run all contenders of one task.

    Args:
        task: The task.
        names: Contenders beside ours.
        examples: N.
        repetitions: Rounds after the one that warms up.
        limit: Seconds that one preparation or one run may take.
        device: "cpu" or "cuda".
        say: Receives a line of progress.

    Returns:
        Contender -> its record: "own", "prepared", "peak" (bytes, seconds, bytes), "error", "pairs" of its seconds and
        of ours beside them, or "failed" with the reason.

    Raises:
        WorkerError: Ours failed.
    """
    problem = prepare(task, examples)
    start = lambda name: Worker(name, problem, device, limit)
    ours = start(OURS)
    active: dict[str, Worker] = {}
    records: dict[str, dict[str, Any]] = {OURS: {**ours.ready, **ours.ask("run"), "pairs": []}}
    try:
        for name in names:
            worker = None
            try:
                worker = start(name)
                record = records[name] = {**worker.ready, **worker.ask("run"), "pairs": []}
            except WorkerError as error:
                records[name] = {"failed": str(error)}
                say(f"{task.name}  {CONTENDERS[name].says}: {error}")
                continue
            if task.max_memory is not None:
                record["difference"] = _difference(ours, worker)
            if record["seconds"] > PATIENCE:
                _pair(records, ours, name, record["seconds"])
                worker.close()
            else:
                active[name] = worker
        for turn in range(repetitions if active or not records[OURS]["pairs"] else 0):
            for name in rotated(list(active), turn) or [OURS]:
                try:
                    _pair(records, ours, name, active.get(name))
                except WorkerError as error:
                    records[name] = {"failed": str(error)}
                    del active[name]
    finally:
        for worker in [ours, *active.values()]:
            worker.close()
    for record in records.values():
        record.pop("seconds", None)
    return records


def rotated(names: list[str], turn: int) -> list[str]:
    """The names, another one first at each turn."""
    first = turn % len(names) if names else 0
    return names[first:] + names[:first]


def _pair(records: dict[str, dict[str, Any]], ours: Worker, name: str, other: Worker | float | None) -> None:
    """One run of ours, and one of a contender after it or, given its seconds, before it; None for ours alone."""
    own = ours.ask("run")
    records[OURS]["peak"] = own["peak"]
    records[OURS]["pairs"].append((own["seconds"], own["seconds"]))
    if isinstance(other, Worker):
        theirs = other.ask("run")
        records[name]["peak"] = theirs["peak"]
        other = theirs["seconds"]
    if other is not None:
        records[name]["pairs"].append((other, own["seconds"]))


def _difference(ours: Worker, other: Worker) -> float:
    """Largest relative difference between two results that are too large to send."""
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "values.npy"
        ours.ask(f"save {kept}")
        return other.ask(f"against {kept}")["difference"]


def contenders_of(task: Task, device: str, chosen: list[str] | None) -> list[str]:
    """Who takes part beside ours; the matrix product always does."""
    able = [c.name for c in CONTENDERS.values() if task.name in c.tasks and (device == "cpu" or c.cuda)]
    if task.eigenvalues and device == "cpu":
        able = [name for name in able if name != "torch-eigenvalues"]  # hours
    return [name for name in able if name != OURS and (chosen is None or name in {GEMM, *chosen})]
