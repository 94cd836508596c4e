"""A kernel of more examples than memory holds, computed from tiles of them.

Where no example acts on another, the kernel of two tiles is the kernel of the whole restricted to them. Tiles are run
again for every pair that they belong to.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ntk.contraction import Contraction
from ntk.examples_apart import working_memory
from ntk.forward import Evaluation, cast, compare
from ntk.memory import Needs
from ntk.outputs import as_rows
from ntk.recording import Recording, record, shares_of
from ntk.sketch import sketch_batch
from ntk.structured import contract_structured

FORWARD = 2
"""Forward passes over a batch: one that records, and one that sees whether the model repeats itself."""

Inputs = Sequence[tuple[str, Tensor]]
"""(name of the argument, batch), one batch or two."""


def contract_by_examples(
    model: torch.nn.Module, inputs: Inputs, names: Sequence[str], evaluation: Evaluation, plan: Contraction
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Contract layer by layer, in as few tiles of examples as max_memory admits.

    Args:
        model: The network.
        inputs: The batch of the rows of the kernel, and unless it is the same, that of its columns.
        names: Parameters of the kernel.
        evaluation: Type to compute in, statistics and outputs.
        plan: As in `ntk.structured.contract_structured`.

    Returns:
        As `ntk.structured.contract_structured`.
    """
    drawn = None if plan.max_memory is None else sketch(model, inputs, names, evaluation)
    tiling = None if drawn is None else choose_tiling(drawn, plan)
    if plan.max_memory is None or tiling is None or not _may_be_cut(model, inputs, tiling, evaluation):
        return contract_structured(record(model, inputs, names, evaluation), plan)
    counts = len(inputs[0][1]), len(inputs[-1][1])
    pairs = list(_tile_pairs(counts, tiling.examples, symmetric=len(inputs) == 1))
    kernels: dict[str, np.ndarray] = {}
    for number, (rows, columns) in enumerate(pairs):
        parts = [(inputs[0][0], inputs[0][1][rows])]
        if len(inputs) == 2 or rows != columns:
            parts.append((inputs[-1][0], inputs[-1][1][columns]))
        report = lambda done, total, before=number: plan.report(before * total + done, len(pairs) * total)
        tiled = replace(plan, report=report, max_memory=plan.max_memory - sum(k.nbytes for k in kernels.values()))
        for group, values in contract_structured(record(model, parts, names, evaluation), tiled)[0].items():
            if group not in kernels:
                kernels[group] = _empty(counts, values)
            kernels[group][rows, columns] = values
            if len(inputs) == 1 and rows != columns:
                kernels[group][columns, rows] = values.transpose((1, 0, 3, 2)[: values.ndim])
    return kernels, ()


def sketch(
    model: torch.nn.Module, inputs: Inputs, names: Sequence[str], evaluation: Evaluation
) -> list[Recording] | None:
    """What the batches would record, without values; None for a model that looks at values.

    Args:
        model: The network.
        inputs: One batch or two.
        names: Parameters of the kernel.
        evaluation: Type to compute in, statistics and outputs.
    """
    try:
        return record(model, inputs, names, evaluation, sketch_batch)
    except Exception:  # whatever a model says of tensors without values; on real ones it may have no complaint
        return None


@dataclass(frozen=True)
class Tiling:
    """In what portions a kernel is computed.

    Attributes:
        examples: Of a tile.
        tiles: Along each axis of the kernel.
        outputs: Differentiated at once.
        passes: Forward and backward passes over the whole batch, for all outputs, that this amounts to.
    """

    examples: int
    tiles: int
    outputs: int
    passes: float

    @property
    def repeats(self) -> int:
        """How often each example is run."""
        return _times(self.tiles)


def choose_tiling(recordings: Sequence[Recording], plan: Contraction) -> Tiling | None:
    """The tiling with the fewest passes that fits; all examples at once where they may meet, or must round alike.

    Args:
        recordings: From `sketch`, or real ones.
        plan: With the memory allowed.

    Returns:
        None where nothing fits, or where no share is contracted layer by layer.
    """
    shares = shares_of(recordings, plan)
    if not shares:
        return None
    most = max(len(part.batch.output) for part in recordings)
    needs = working_memory(recordings, shares, plan)
    outputs = 1 if plan.reduce == "sum" else recordings[0].batch.output.shape[1]
    if plan.max_memory is None:
        return Tiling(most, 1, outputs, outputs + FORWARD)
    found = []
    apart = all(part.capture.apart(part.batch.output) for part in recordings)
    divisible = apart and plan.accumulate is None  # a tile rounds in its own way, and the kernel is no Gram matrix
    for tiles in (2**power for power in range(most.bit_length() + 1 if divisible else 1)):
        size = math.ceil(most / tiles)
        parted = needs if tiles == 1 else _of_tiles(needs, recordings, size)
        if units := parted.outputs_at_once(plan.max_memory, outputs):
            again = 1 if units == outputs or plan.reduce != "none" else (math.ceil(outputs / units) + 1) / 2
            found.append(Tiling(size, math.ceil(most / size), units, _times(tiles) * (FORWARD + outputs * again)))
    return min(found, key=lambda tiling: tiling.passes, default=None)


def _of_tiles(needs: Needs, recordings: Sequence[Recording], size: int) -> Needs:
    """Of one pair of tiles, beside the kernel of all; a Gram matrix has tiles of two batches too."""
    counts = [len(part.batch.output) for part in recordings]
    rows, columns = min(size, counts[0]), min(size, counts[-1])
    share = (rows + columns) / sum(counts)
    own = rows * columns / (counts[0] * counts[-1])
    copies = (2 - len(recordings)) * recordings[0].batch.copied_bytes
    return Needs(
        math.ceil(needs.kernel * (1 + own)) + copies,
        *(math.ceil(count * share) for count in (needs.batch, needs.output, needs.again)),
    )


def _times(tiles: int) -> int:
    return tiles + 1 if tiles > 1 else 1


def _may_be_cut(model: torch.nn.Module, inputs: Inputs, tiling: Tiling, evaluation: Evaluation) -> bool:
    """Whether there is more than one tile, and examples have the outputs in a tile that they have in any other."""
    apart = tiling.tiles > 1 and evaluation.statistics.choice != "frozen"  # which is of the whole batch
    return apart and all(_alike_in_tiles(model, x, tiling.examples, evaluation, name) for name, x in inputs)


def _alike_in_tiles(model: torch.nn.Module, x: Tensor, size: int, evaluation: Evaluation, argument: str) -> bool:
    """Whether outputs are the same in tiles of more than twice the size: examples may meet without derivatives, too."""
    if len(x) <= size:
        return True
    try:
        outputs = [
            torch.cat([_rows_of(model, x, start, length, evaluation, argument) for start in range(0, len(x), length)])
            for length in (size, 2 * size + 1)
        ]
    except Exception:  # it does not take so few, and may say so in any way
        return False
    difference, _, allowed = compare(*outputs)
    return difference <= allowed


def _rows_of(
    model: torch.nn.Module, x: Tensor, start: int, length: int, evaluation: Evaluation, argument: str
) -> Tensor:
    """Outputs of one tile of examples."""
    tile = x[start : start + length]
    parameters = {name: cast(p.detach(), evaluation.dtype).clone() for name, p in model.named_parameters()}
    with torch.enable_grad():  # a model may differentiate inside its forward pass
        moments = evaluation.moments(model, tile, parameters, parameters)
        returned = evaluation.outputs(model, tile, parameters, moments, argument)
    return as_rows(returned, len(tile), argument).detach()


def _tile_pairs(counts: tuple[int, int], size: int, *, symmetric: bool) -> Iterator[tuple[slice, slice]]:
    """Pairs of ranges of examples; for a Gram matrix its lower triangle."""
    rows, columns = ([slice(a, min(a + size, n)) for a in range(0, n, size)] for n in counts)
    return ((a, b) for a in rows for b in columns if not symmetric or b.start <= a.start)


def _empty(counts: tuple[int, int], values: np.ndarray) -> np.ndarray:
    """[n, m, ...], laid out as contractions lay kernels out: with the outputs first."""
    if values.ndim == 2:
        return np.empty(counts, values.dtype)
    o = values.shape[2]
    return np.empty((o, counts[0], o, counts[1]), values.dtype).transpose(1, 3, 0, 2)
