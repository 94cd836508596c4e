"""For contenders that would need more memory than there is: the kernel block by block, each pair of blocks once."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np


def budget() -> float:
    """Half of the memory of the machine, in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2


def block_size(n: int, bytes_of: Callable[[int], float], limit: float) -> int:
    """All n examples if what they need is within the limit; else the largest divisor of n two blocks of which are."""
    if bytes_of(n) <= limit:
        return n
    return max(b for b in range(1, n) if n % b == 0 and (b == 1 or 2 * bytes_of(b) <= limit))


def in_blocks(kernel: Callable[[int, int], np.ndarray], n: int, size: int) -> np.ndarray:
    """A symmetric kernel from its blocks.

    Args:
        kernel: First example of each of two blocks -> values [size, size, ...].
        n: Examples.
        size: Examples in a block; it divides n.
    """
    if size == n:
        return kernel(0, 0)
    values = None
    for i in range(0, n, size):
        for j in range(0, i + 1, size):
            block = kernel(i, j)
            if values is None:
                values = np.empty((n, n, *block.shape[2:]), block.dtype)
            values[i : i + size, j : j + size] = block
            values[j : j + size, i : i + size] = block.swapaxes(0, 1).swapaxes(-1, -2) if block.ndim == 4 else block.T
    return values
