"""What `import ntk, mimicnorm, diagnostics` costs beyond `import torch`, in fresh interpreters, interleaved.

Run: .venv/bin/python benchmarks/import_cost.py [REPETITIONS]

Prints the median wall-clock time of each of the two, their difference, and the median of the ratios of neighbouring
runs. The first run of each only warms the disk's cache and is left out.
"""

from __future__ import annotations

import statistics
import subprocess
import sys

BASE = "import torch"
ALL = "import torch, ntk, mimicnorm, diagnostics"
LIMIT = 0.5  # seconds beyond torch


def seconds(statement: str) -> float:
    """Time the statement takes in a fresh interpreter, the interpreter's own start not counted."""
    timed = f"from time import perf_counter as clock; start = clock()\n{statement}\nprint(clock() - start)"
    return float(subprocess.run([sys.executable, "-c", timed], capture_output=True, text=True, check=True).stdout)


def main(repetitions: int) -> int:
    """Measures and prints; returns 1 when the difference of the medians exceeds the limit."""
    pairs = [(seconds(BASE), seconds(ALL)) for _ in range(repetitions + 1)][1:]
    base, everything = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    print(f"{BASE:<45} {base:7.3f} s   median of {repetitions}")
    print(f"{ALL:<45} {everything:7.3f} s   median of {repetitions}")
    print(f"{'beyond torch':<45} {everything - base:7.3f} s   limit {LIMIT} s")
    print(f"{'ratio of neighbouring runs':<45} {ratio:7.3f}     median of {repetitions}")
    return int(everything - base > LIMIT)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 9))
