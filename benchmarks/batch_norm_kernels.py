"""Accuracy, time and memory of the exact BatchNorm kernels at finite batch size.

Run: .venv/bin/python benchmarks/batch_norm_kernels.py

Prints the largest relative difference of B = 8, D = 50 to the integrals as docs/mathematics.md §5 prints them, in
extended precision; the time of B = 256, D = 20 after compilation; and the memory that B = 1024, D = 1 adds to a fresh
interpreter. Returns 1 when one exceeds its limit.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from time import perf_counter

import numpy as np

from ntk.analytic import propagate

DIFFERENCE = 1e-9
SECONDS = 10.0
GIB = 4.0


def gram(size: int, dimension: int) -> np.ndarray:
    """Gram matrix of standard normal inputs."""
    inputs = np.random.default_rng(0).standard_normal((size, dimension))
    return inputs @ inputs.T / dimension


def solve(matrix: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gauss elimination on a stack of positive definite matrices, in any precision; also their determinants."""
    a, b, determinant = matrix.copy(), np.broadcast_to(right, matrix.shape).copy(), 1
    for k in range(a.shape[1]):
        pivot = a[:, k, k][:, None].copy()
        determinant = determinant * pivot[:, 0]
        a[:, k], b[:, k] = a[:, k] / pivot, b[:, k] / pivot
        others = np.arange(a.shape[1]) != k
        factor = a[:, others, k][:, :, None].copy()
        a[:, others], b[:, others] = a[:, others] - factor * a[:, None, k], b[:, others] - factor * b[:, None, k]
    return b, determinant


def layer(sigma: np.ndarray, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """K' and Θ' for ReLU, by the trapezoid rule in ln s, with an inverse and a determinant at each node."""
    n, step, pi = len(sigma), np.longdouble(0.2), np.arccos(np.longdouble(-1))
    identity = np.eye(n, dtype=np.longdouble)
    g = identity - np.ones((n, n), dtype=np.longdouble) / n
    sigma, theta = g @ sigma @ g, g @ theta @ g
    s = np.exp(np.arange(-50, 24, step))[:, None, None]
    c, determinant = solve(identity + 2 * s * sigma, sigma)
    root = np.sqrt(np.einsum("kii->ki", c))
    outer = root[:, :, None] * root[:, None, :]
    rho = np.where(identity == 1, 1, np.clip(c / outer, -1, 1))
    angle, sine = (pi - np.arccos(rho)) / (2 * pi), np.sqrt((1 - rho) * (1 + rho)) / (2 * pi)
    v, r = outer * (sine + angle * rho), root[:, :, None] / root[:, None, :] * sine
    tc, ctc = theta @ c, c @ (theta @ c)
    m = tc.transpose(0, 2, 1) * angle + np.einsum("kii->ki", tc)[:, None, :] * r
    cross = np.einsum("kii->ki", ctc)[:, None, :] * r
    twice = np.einsum("kii->k", tc)[:, None, None] * v + 2 * ctc * angle + cross + cross.transpose(0, 2, 1)
    f = theta * angle - s * (m + m.transpose(0, 2, 1)) + s**2 / 2 * twice
    weight = n * step * s / np.sqrt(determinant)[:, None, None]
    value = (weight * v).sum(0)
    return value, value + (weight * f).sum(0)


def difference(depth: int = 50) -> float:
    """Largest difference of an entry of both kernels after ``depth`` layers, B = 8, relative to that entry."""
    start = gram(8, 16)
    sigma = theta = start.astype(np.longdouble)
    for _ in range(depth):
        sigma, theta = layer(sigma, theta)
    kernels = propagate(start, depth, "batch_norm")
    pairs = ((kernels.nngp, sigma), (kernels.ntk, theta))
    return max(float(np.abs(computed / reference - 1).max()) for computed, reference in pairs)


def seconds(dimension: int) -> float:
    """Time of B = 256, D = 20 on inputs of that dimension, the shapes being compiled."""
    start = gram(256, dimension)
    propagate(start, 2, "batch_norm")
    clock = perf_counter()
    propagate(start, 20, "batch_norm", every_depth=False)
    return perf_counter() - clock


def gibibytes() -> float:
    """Largest memory that this process has held, imports included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> int:
    """Measures and prints."""
    worst = difference()
    print(f"B =    8, D = 50   largest relative difference {worst:8.1e}     limit {DIFFERENCE:g}")
    times = {dimension: seconds(dimension) for dimension in (64, 3072)}
    for dimension, time in times.items():
        print(f"B =  256, D = 20   {dimension:>5} inputs {time:20.2f} s     limit {SECONDS:g} s")
    command = [sys.executable, __file__, "--memory"]
    base, peak, wall = map(float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    print(
        f"B = 1024, D =  1   peak memory beyond {base:.2f} GiB {peak - base:5.2f} GiB   limit {GIB:g} GiB, {wall:.0f} s"
    )
    return int(worst > DIFFERENCE or max(times.values()) > SECONDS or peak - base > GIB)


def memory() -> int:
    """Prints the interpreter's own peak, that after B = 1024, D = 1, and the time taken."""
    base, clock = gibibytes(), perf_counter()
    propagate(gram(1024, 2048), 1, "batch_norm")
    print(base, gibibytes(), perf_counter() - clock)
    return 0


if __name__ == "__main__":
    sys.exit(memory() if "--memory" in sys.argv else main())
