"""Measurements in; ratios, goals and Markdown out. Nothing is measured here."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from benchmarks.empirical_ntk.contenders.registry import CONTENDERS, GEMM, OURS
from benchmarks.empirical_ntk.tasks import GIB, PRODUCT_OPERATIONS

FASTER = {"T1": 3.5, "T2": 3.5, "T3": 3.5, "T4": 2.0, "T5": 2.0, "T6": 3.0}
"""Least ratio of the best peer's time to ours."""
FROM_FLOOR = {"T1": 2.5, "T2": 2.5, "T3": 2.5, "T4": 3.0, "T5": 3.0}
"""Largest ratio of our time to the floor's."""
RIVAL = {"T6": "torch-whole-batch"}
"""Whom a goal names in place of the best peer."""
ERROR = {"float32": 1e-5, "float64": 1e-10}
"""Largest relative error of ours."""
SAME = 1e-6
"""Largest relative difference of a bounded result to the unbounded one."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """Something that ours must reach.

    Attributes:
        says: What.
        found: What was found.
        met: Whether that is enough.
    """

    says: str
    found: str
    met: bool


@dataclass(frozen=True)
class Ratio:
    """Ratios of neighbouring runs.

    Attributes:
        median: Median.
        smallest: Smallest.
        largest: Largest.
    """

    median: float
    smallest: float
    largest: float

    def __str__(self) -> str:
        """The median, and the range."""
        if self.smallest == self.largest:
            return f"{self.median:.3g}"
        return f"{self.median:.3g} ({self.smallest:.3g} to {self.largest:.3g})"


def ratio(record: Record) -> Ratio | None:
    """A contender's time over ours; None where it was not measured."""
    values = [theirs / ours for theirs, ours in record.get("pairs", [])]
    return Ratio(statistics.median(values), min(values), max(values)) if values else None


def distance(task: Record) -> Ratio | None:
    """Our time over that of the task's operations at the rate of the matrix product beside it."""
    pairs = task["contenders"].get(GEMM, {}).get("pairs", [])
    values = [ours / (task["operations"] * product / PRODUCT_OPERATIONS) for product, ours in pairs]
    return Ratio(statistics.median(values), min(values), max(values)) if values else None


def seconds(record: Record) -> float | None:
    """Median time of a contender."""
    times = [theirs for theirs, _ in record.get("pairs", [])]
    return statistics.median(times) if times else None


def best_peer(task: Record) -> str | None:
    """The fastest of the libraries of others."""
    peers = {
        name: found.median
        for name, record in task["contenders"].items()
        if CONTENDERS[name].peer and (found := ratio(record)) is not None
    }
    return min(peers, key=peers.get) if peers else None


def goals(record: Record) -> list[Goal]:
    """What ours must reach; of a quick run, or a GPU, only that the kernels are right."""
    found: list[Goal] = []
    speed = not record["quick"] and record["machine"]["device"] == "CPU"
    for name, task in record["tasks"].items():
        found += _correctness(name, task)
        if speed:
            found += _speed(name, task)
    return found


def _correctness(name: str, task: Record) -> list[Goal]:
    found = []
    for contender, record in task["contenders"].items():
        if not contender.startswith("ours"):
            continue
        says = f"{name}, {CONTENDERS[contender].says}"
        if "failed" in record:
            found.append(Goal(says, record["failed"], met=False))
        elif "eigenvalues" in record:
            for end, value, bar, reference in zip(
                ("largest", "smallest"), record["eigenvalues"], record["bars"], record["references"], strict=True
            ):
                off = abs(value - reference)
                met = off <= max(0.01 * abs(reference), bar)
                what = f"{value:.6g} ± {bar:.1g}, float64 {reference:.6g}"
                found.append(Goal(f"{says}: {end} eigenvalue within 1 % or its error bar", what, met))
        else:
            limit = ERROR[task["dtype"]]
            error = record["error"]
            found.append(Goal(f"{says}: relative error below {limit:g}", f"{error:.1e}", error < limit))
        if "difference" in record:
            off = record["difference"]
            found.append(Goal(f"{says}: as without a bound, to {SAME:g}", f"{off:.1e}", off <= SAME))
    return found


def _speed(name: str, task: Record) -> list[Goal]:
    found = []
    peer, away = RIVAL.get(name, best_peer(task)), distance(task)
    if name in FASTER and ratio(task["contenders"].get(peer, {})) is not None:
        theirs, ours = task["contenders"][peer], task["contenders"][OURS]
        times = ratio(theirs)
        says = f"{name}: at least {FASTER[name]:g} times as fast as the peer to beat ({CONTENDERS[peer].says})"
        found.append(Goal(says, str(times), times.median >= FASTER[name]))
        if name in FROM_FLOOR:
            what = f"{ours['peak'] / GIB:.2f} GiB, peer {theirs['peak'] / GIB:.2f} GiB"
            found.append(Goal(f"{name}: peak memory no higher than that peer's", what, ours["peak"] <= theirs["peak"]))
    if name in FROM_FLOOR and away is not None:
        says = f"{name}: within {FROM_FLOOR[name]:g} times the floor"
        found.append(Goal(says, str(away), away.median <= FROM_FLOOR[name]))
    if task["max_memory"] and "peak" in (bounded := task["contenders"].get("ours-bounded", {})):
        above = bounded["peak"] - bounded["own"]
        says = f"{name}: peak above the interpreter's own below {task['max_memory'] / GIB:g} GiB"
        found.append(Goal(says, f"{above / GIB:.3f} GiB", above < task["max_memory"]))
    return found


def line(name: str, task: Record) -> str:
    """One task in one line, as it is done."""
    ours, peer, away = task["contenders"][OURS], best_peer(task), distance(task)
    parts = [f"{name}  ours {seconds(ours) or float('nan'):.3f} s, error {ours['error']:.0e}"]
    if peer is not None:
        parts.append(f"best peer {peer} {ratio(task['contenders'][peer])} times that")
    if away is not None:
        parts.append(f"{away} times the floor")
    return ", ".join(parts)


def markdown(record: Record) -> str:
    """The report."""
    parts = [
        _heading(record["machine"], record["command"], quick=record["quick"]),
        _goals(record),
        _ratios(record["tasks"]),
    ]
    return "\n\n".join([*parts, *(_task(name, task) for name, task in record["tasks"].items())]) + "\n"


def _heading(machine: Record, command: str, *, quick: bool) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        "# The empirical NTK against its peers and against the floor",
        "",
        f"{machine['date']}, {machine['device']} ({machine['cpu']}, {machine['threads']} threads, "
        f"{machine['memory'] / GIB:.0f} GiB). {versions}. Written by `{command}`.",
        "",
        "A ratio is the time of another contender over ours: the median of neighbouring runs, the smallest and the "
        "largest. Each contender has a process of its own; compiling is not counted. The error is that of a block of "
        "the kernel, relative to its largest entry, against a loop of gradients in float64. The floor is the "
        "operations of the layer-wise algorithm (benchmarks/empirical_ntk/floor.py) at the rate of a large matrix "
        "product measured beside our runs.",
    ]
    if not machine["gpu_at_hand"]:
        lines += ["", "No GPU was at hand; `make bench` measures against torch.func on it where there is one."]
    if quick:
        lines += ["", "**Few examples: this run shows that everything works, and no times.**"]
    return "\n".join(lines)


def _goals(record: Record) -> str:
    rows = [(goal.says, goal.found, "met" if goal.met else "**missed**") for goal in goals(record)]
    return "## Goals\n\n" + _table(("goal", "found", ""), rows)


def _ratios(tasks: Record) -> str:
    """Contenders by tasks."""
    shown = [name for name, task in tasks.items() if any(ratio(r) for r in task["contenders"].values())]
    names = [n for n in CONTENDERS if n not in {OURS, GEMM} and any(n in tasks[t]["contenders"] for t in shown)]
    rows = [[CONTENDERS[n].says, *(_cell(tasks[t]["contenders"].get(n)) for t in shown)] for n in names]
    rows.append(["our time over the floor", *(str(distance(tasks[t]) or "") for t in shown)])
    return "## Times over ours\n\n" + _table(("", *shown), rows)


def _cell(record: Record | None) -> str:
    if record is None:
        return "–"
    return record["failed"].partition(":")[0] if "failed" in record else str(ratio(record))


def _task(name: str, task: Record) -> str:
    kernel = "full kernel" if task["reduce"] == "none" else "trace over outputs"
    lines = [
        f"## {name}",
        "",
        f"{task['says']}; N = {task['examples']}, {kernel}, {task['dtype']}; {task['operations'] / 1e9:.1f} GFLOP. "
        f"{task['left_out']} of the examples were not compared, a ReLU being within rounding of its kink.",
        "",
        "",
    ]
    rows = []
    for contender, record in task["contenders"].items():
        if contender == GEMM:
            continue
        if "failed" in record:
            rows.append((CONTENDERS[contender].says, record["failed"], "", "", "", ""))
            continue
        times = [theirs for theirs, _ in record["pairs"]]
        rows.append(
            (
                CONTENDERS[contender].says,
                f"{statistics.median(times):.3f}" if times else "",
                f"{record['peak'] / GIB:.2f}",
                f"{(record['peak'] - record['own']) / GIB:.2f}",
                f"{record['error']:.0e}",
                f"{record['prepared']:.1f}",
            )
        )
    columns = ("", "seconds", "peak / GiB", "above own / GiB", "error", "prepared in / s")
    rates = [PRODUCT_OPERATIONS / product / 1e9 for product, _ in task["contenders"].get(GEMM, {}).get("pairs", [])]
    rate = f"\n\nMatrix products ran at {statistics.median(rates):.0f} GFLOP/s." if rates else ""
    return "\n".join(lines) + _table(columns, rows) + rate


def _table(columns: tuple[str, ...], rows: list[Any]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)
