"""Measures and reports: `make bench`, or .venv/bin/python -m benchmarks.empirical_ntk [--task T1] [--contender ours].

Everything takes about an hour on two cores. A run of everything is kept in benchmarks/results/; a part of it is only
printed, unless --out names a file. Returns 1 when a goal of ours is missed or a kernel of ours is wrong.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.empirical_ntk import report
from benchmarks.empirical_ntk.contenders.registry import CONTENDERS
from benchmarks.empirical_ntk.problem import load
from benchmarks.empirical_ntk.rounds import PEERS, ROOT, contenders_of, measure, prepare
from benchmarks.empirical_ntk.tasks import TASKS

RESULTS = ROOT / "benchmarks" / "results"


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.empirical_ntk", description=__doc__.partition("\n")[0])
    parser.add_argument("--task", choices=TASKS, action="append", help="only this one; may be repeated")
    parser.add_argument("--contender", choices=CONTENDERS, action="append", help="only this one beside ours")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--examples", type=int, help="instead of the task's own number")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds that one run may take")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--quick", action="store_true", help="few examples, one round: shows only that it works")
    parser.add_argument("--out", type=Path, help="where to write, without suffix")
    return parser.parse_args(given)


def main(options: argparse.Namespace) -> int:
    """Measure on the CPU, on the GPU as well if there is one, and write."""
    devices = ["cpu", "cuda"] if options.device == "auto" else [options.device]
    if "cuda" in devices and not gpu():
        print("No GPU at hand: the CPU alone is measured.", flush=True)
        devices = ["cpu"]
    everything = not (options.task or options.contender or options.examples or options.quick)
    missed = 0
    for device in devices:
        record = run(options, device)
        text = report.markdown(record)
        print("\n" + text)
        suffix = "" if device == "cpu" else "_cuda"
        base = options.out or (RESULTS / "empirical_ntk" if everything else None)
        if base is not None:
            base = base.with_name(base.name + suffix)
            base.parent.mkdir(parents=True, exist_ok=True)
            base.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
            base.with_suffix(".md").write_text(text)
            print(base.with_suffix(".md"))
        missed += sum(not goal.met for goal in report.goals(record))
    return int(missed > 0)


def run(options: argparse.Namespace, device: str) -> dict[str, Any]:
    """All tasks on one device."""
    tasks = {}
    for name in options.task or TASKS:
        task = TASKS[name]
        examples = options.examples or (task.quick if options.quick else task.examples)
        problem = load(prepare(task, examples))
        names = contenders_of(task, device, options.contender)
        repetitions = 1 if options.quick else options.repetitions
        records = measure(
            task, names, examples=examples, repetitions=repetitions, limit=options.limit, device=device, say=say
        )
        tasks[name] = {
            "says": task.says,
            "examples": examples,
            "reduce": task.reduce,
            "dtype": task.dtype,
            "left_out": problem.left_out,
            "operations": problem.operations,
            "max_memory": task.max_memory,
            "contenders": records,
        }
        say(report.line(name, tasks[name]))
    return {
        "machine": machine(device),
        "command": shlex.join(["python", "-m", "benchmarks.empirical_ntk", *sys.argv[1:]]),
        "quick": options.quick or options.examples is not None,
        "tasks": tasks,
    }


def say(line: str) -> None:
    """Progress."""
    print(line, flush=True)


def gpu() -> bool:
    """Whether torch finds one."""
    import torch

    return torch.cuda.is_available()


def machine(device: str) -> dict[str, Any]:
    """Date, hardware and versions."""
    import torch

    names = {name for contender in CONTENDERS.values() for name in contender.distributions}
    path = [str(PEERS), *sys.path]
    versions = {
        found.name: found.version for found in importlib.metadata.distributions(path=path) if found.name in names
    }
    model = next(
        (line.partition(":")[2].strip() for line in cpu_lines() if line.startswith("model name")), "unknown CPU"
    )
    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "cpu": model,
        "threads": torch.get_num_threads(),
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "gpu_at_hand": gpu(),
        "versions": {"python": platform.python_version(), **dict(sorted(versions.items()))},
    }


def cpu_lines() -> list[str]:
    """/proc/cpuinfo, where there is one."""
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


if __name__ == "__main__":
    sys.exit(main(arguments()))
