"""What `max_memory` means: a bound on everything that a kernel needs beyond the model and its inputs."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

from ntk.errors import MemoryBudgetError

TEMPORARY = 0.3
"""Fraction of the memory left to work in that temporaries may take (chosen, not tuned)."""

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_memory(value: int | str | None) -> int | None:
    """Bytes that a user wrote down.

    Args:
        value: A number of bytes, or a string such as "1GiB", "512 MiB" or "800MB"; None for no bound.

    Raises:
        ValueError: It is neither, or not positive.
    """
    if value is None:
        return None
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", value, re.IGNORECASE)
        if match:
            number, unit, binary = match.groups()
            base = _UNITS[unit.upper()]
            return int(float(number) * (base if binary or base == 1 else 1000 ** list(_UNITS).index(unit.upper())))
    elif isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise ValueError(
        f"max_memory must be a positive number of bytes, or a string such as '1GiB' or '800MB'; got {value!r}. "
        "None sets no bound."
    )


def left_to_work_in(max_memory: int, held: int, least: int, piece: str) -> int:
    """Bytes that remain once what is held throughout is subtracted.

    Args:
        max_memory: Bytes allowed.
        held: Bytes of the kernel itself, and of the activations of the batch.
        least: Bytes of the smallest piece of work.
        piece: What that is, for the error.

    Raises:
        MemoryBudgetError: The piece does not fit.
    """
    if max_memory - held < least:
        raise MemoryBudgetError(
            f"max_memory must hold the kernel and the activations of the batch, {held} bytes, and {piece}, {least} "
            f"bytes; got {max_memory} bytes. max_memory={held + least} would do; or take fewer examples or params, "
            "another reduce, or float32."
        )
    return max_memory - held


def pieces(whole: slice, most: int) -> Iterator[slice]:
    """Cut a range into ranges of about one length.

    Args:
        whole: To be cut.
        most: Length of a piece at most.
    """
    length = whole.stop - whole.start
    parts = -(-length // most)
    edges = [whole.start + length * part // parts for part in range(parts + 1)]
    return (slice(start, stop) for start, stop in itertools.pairwise(edges))


@dataclass(frozen=True)
class Needs:
    """Bytes that a layer-wise contraction takes.

    Attributes:
        kernel: The kernels themselves, and copies of the parameters.
        batch: The graph of the examples, and what is held of them throughout.
        output: For each output that is differentiated at once.
        again: For each of them beside, where not all are differentiated at once and two parts of them meet.
    """

    kernel: int
    batch: int
    output: int
    again: int

    def outputs_at_once(self, max_memory: int, most: int) -> int:
        """How many outputs to differentiate at once; 0 if one does not fit.

        Args:
            max_memory: Bytes allowed.
            most: Outputs that there are.
        """
        left = max_memory - self.kernel - self.batch
        room = int(left * (1 - TEMPORARY))
        if room >= most * self.output:
            return most
        one = self.output + self.again
        return max(room // one, int(left >= one))

    def entries(self, max_memory: int, itemsize: int = 8) -> int:
        """Entries that a temporary may have.

        Args:
            max_memory: Bytes allowed.
            itemsize: Bytes of an entry.
        """
        return max(1, int((max_memory - self.kernel - self.batch) * TEMPORARY) // (3 * itemsize))
