"""Shares of parameters at whose calls examples do not meet: one backward pass for each output serves all examples."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import Tensor

from ntk.backward import IN_CACHE, Backward, Joined, Rights
from ntk.blocks import ENTRIES, Block, OutputSum, add_share, mirror
from ntk.contraction import Contraction, kernel_bytes
from ntk.costs import factored
from ntk.factors import Product
from ntk.memory import Needs, pieces
from ntk.recording import Recording
from ntk.shares import Derivatives, Share, bias_shares

WORKING_BYTES = 2**31
"""Memory that derivatives and temporaries may take when max_memory leaves it open (chosen, not tuned)."""


def working_memory(recordings: Sequence[Recording], shares: Sequence[Share], plan: Contraction) -> Needs:
    """What the shares of parameters take at whose calls examples do not meet.

    Args:
        recordings: As in `ntk.structured.contract_structured`.
        shares: Of these parameters.
        plan: As in `ntk.structured.contract_structured`.
    """
    outputs = [part.batch.output for part in recordings]
    size, wide = outputs[0].element_size(), plan.kernel_dtype(outputs[0]).itemsize
    o = outputs[0].shape[1] if plan.reduce == "none" else 1
    counts = [len(output) for output in outputs]
    derivatives = lefts = copies = 0
    for side, part in enumerate(recordings):
        sizes = [math.prod(part.capture.sites[site].shape) for site in _used(shares, side)]
        derivatives += sum(sizes)
        copies += 0 if wide == size else _most_at_once(shares, side, part)
        lefts += max(share.fixed_entries(side, counts[side]) for share in shares)
    temporary = max(share.temporary_entries(*counts) for share in shares)
    largest = max(part.batch.activation_bytes for part in recordings)
    return Needs(
        kernel=kernel_bytes((counts[0] * o, counts[-1] * o), plan, wide)
        + sum(part.batch.copied_bytes for part in recordings),
        batch=sum(part.batch.graph_bytes for part in recordings) + wide * lefts,
        output=size * derivatives + wide * (copies + 2 * temporary) + 2 * largest,
        again=size * derivatives if plan.reduce == "none" and len(recordings) == 1 else 0,
    )


@dataclass(frozen=True)
class Portions:
    """How much is done at once.

    Attributes:
        outputs: Whose derivatives are held.
        in_flight: Of these, that one backward pass differentiates.
        entries: That a temporary may have.
        sums: Bytes that sums over outputs may take.
    """

    outputs: int
    in_flight: int
    entries: int
    sums: float


def choose_portions(
    recordings: Sequence[Recording], shares: list[Share], plan: Contraction, reserved: int
) -> Portions | None:
    """What max_memory holds.

    Args:
        recordings: As in `ntk.structured.contract_structured`.
        shares: Of parameters at whose calls examples do not meet.
        plan: As in `ntk.structured.contract_structured`.
        reserved: Bytes to be left for other shares.

    Returns:
        None if it does not hold the derivatives of one output.
    """
    outputs = 1 if plan.reduce == "sum" else recordings[0].batch.output.shape[1]
    needs = working_memory(recordings, shares, plan)
    sites = [part.capture.sites[number] for side, part in enumerate(recordings) for number in _used(shares, side)]
    sizes = [recordings[0].batch.output.element_size() * math.prod(site.shape) for site in sites]
    on_cpu = recordings[0].batch.output.device.type == "cpu"
    in_flight = max(1, IN_CACHE // max(1, *sizes)) if on_cpu else outputs  # elsewhere one large pass is the fastest
    if plan.max_memory is None:
        at_once = max(1, needs.outputs_at_once(WORKING_BYTES + needs.kernel + needs.batch, outputs))
        return Portions(at_once, in_flight, ENTRIES, math.inf)
    at_once = needs.outputs_at_once(plan.max_memory - reserved, outputs)
    if at_once == 0:
        return None
    spare = (plan.max_memory - reserved - needs.kernel - needs.batch - at_once * (needs.output + needs.again)) / 2
    affordable = max(0, int(spare)) // max(1, sum(sizes))
    entries = min(ENTRIES, needs.entries(plan.max_memory))
    return Portions(at_once, min(in_flight, affordable) or at_once, entries, spare)


def contract_apart(
    recordings: Sequence[Recording], shares: list[Share], plan: Contraction, portions: Portions
) -> dict[str, np.ndarray]:
    """Add the shares up, output by output.

    Args:
        recordings: As in `ntk.structured.contract_structured`.
        shares: Of parameters at whose calls examples do not meet.
        plan: As in `ntk.structured.contract_structured`.
        portions: From `choose_portions`.

    Returns:
        Group -> kernel as `ntk.contraction.contract` gives it.
    """
    outputs = [part.batch.output for part in recordings]
    o, (n, m) = outputs[0].shape[1], (len(outputs[0]), len(outputs[-1]))
    symmetric, paired = len(recordings) == 1, plan.reduce != "none"
    rows = o if plan.reduce != "sum" else 1
    shape = (n, m) if paired else (o * n, o * m)
    dtype = plan.kernel_dtype(outputs[0])
    kernels = {group: outputs[0].new_zeros(shape, dtype=dtype) for group in dict.fromkeys(plan.groups.values())}
    biases = bias_shares(shares, plan)
    sums = _sums(recordings, shares, plan, portions)
    apart = [share for share in shares if share.name not in {*sums, *(biases.get(name) for name in sums)}]
    written = {share.name for share in apart if _is_written(share, (n, m), rows, symmetric=symmetric, paired=paired)}
    sides = [_side(part, number, shares, apart, written) for number, part in enumerate(recordings)]

    def blocks(place: slice, other: slice, *, lower: bool) -> dict[str, Block]:
        return {
            group: Block(kernel[place, other], (n, m), paired, lower, portions.entries)
            for group, kernel in kernels.items()
        }

    for a, b, derivatives in _derivatives(sides, rows, plan, portions, list(sums.values())):
        places = (slice(None),) * 2 if paired else (slice(a.start * n, a.stop * n), slice(b.start * m, b.stop * m))
        _add_shares(blocks(*places, lower=symmetric and a == b), apart, biases, derivatives, plan)
        if b.stop == (a.stop if symmetric or paired else rows):
            plan.report(a.stop * n, rows * n)
    whole = blocks(slice(None), slice(None), lower=symmetric)
    for products in sums.values():
        share = products.share
        products.add_to(whole[plan.groups[share.name]], _multipliers(share, biases, plan))
    scale = 1.0 / o if plan.reduce == "trace" else 1.0
    return {group: _values(kernel, scale, (n, m, o), plan.reduce, symmetric) for group, kernel in kernels.items()}


def _is_written(share: Share, examples: tuple[int, int], rows: int, *, symmetric: bool, paired: bool) -> bool:
    """Whether the gradients of a weight are cheaper to write out than to sum over pairs of positions."""
    if not share.factored:
        return False
    g, k, p, q = share.total_sizes(0)
    costs = factored((g, k, q, p, share.total_sizes(-1)[2]), (rows, rows), examples, paired=paired, lower=symmetric)
    return costs["outer"] < costs["positions"]


def _sums(
    recordings: Sequence[Recording], shares: list[Share], plan: Contraction, portions: Portions
) -> dict[str, OutputSum]:
    """Shares whose sum over outputs takes less memory than their derivatives."""
    outputs = [part.batch.output for part in recordings]
    rows, (n, m) = outputs[0].shape[1], (len(outputs[0]), len(outputs[-1]))
    if plan.reduce != "trace" or portions.outputs < rows or portions.in_flight >= rows:
        return {}
    found: dict[str, OutputSum] = {}
    dtype = plan.kernel_dtype(outputs[0])
    held = 0
    for share in shares:
        whole = all(
            part.capture.sites[number].shape[0] == len(part.batch.output)
            for part, uses in zip(recordings, share.uses, strict=True)
            for number, _ in uses
        )
        if not (share.without_positions and whole):
            continue
        derivatives = share.total_sizes(0)[3] * sum(map(len, outputs))  # of one output, which is kept
        taken = dtype.itemsize * (n * m + derivatives)
        if n * m <= rows * derivatives and held + taken <= portions.sums:
            held += taken
            found[share.name] = OutputSum(share, (n, m), dtype)
    return found


@dataclass(frozen=True, eq=False)
class _Side:
    """The derivatives of one batch that its shares ask for."""

    backward: Backward
    kept: frozenset[int]
    written: Rights


def _side(part: Recording, side: int, shares: list[Share], kept: list[Share], written: set[str]) -> _Side:
    rights = {
        number: factor.right
        for share in kept
        if share.name in written
        for number, factor in share.uses[side]
        if isinstance(factor, Product)
    }
    backward = Backward(part.batch.output, part.capture.sites, _used(shares, side))
    return _Side(backward, frozenset(_used(kept, side)), rights)


def _derivatives(
    sides: Sequence[_Side], rows: int, plan: Contraction, portions: Portions, sums: Sequence[OutputSum]
) -> Iterator[tuple[slice, slice, tuple[Derivatives, Derivatives]]]:
    """What meets what.

    Yields:
        A range of outputs of the first batch, one of the second, and the derivatives of both.
    """
    chunks = [slice(start, min(start + portions.outputs, rows)) for start in range(0, rows, portions.outputs)]
    differentiate = partial(_differentiate, plan=plan, in_flight=portions.in_flight)
    for number, a in enumerate(chunks):
        if plan.reduce != "none":
            yield a, a, differentiate(sides, a, sums=sums)
            continue
        first, _ = differentiate(sides[:1], a)
        for b in chunks[: number + 1] if len(sides) == 1 else chunks:
            second = first if len(sides) == 1 and a == b else differentiate(sides[-1:], b)[1]
            yield a, b, (first, second)


def _differentiate(
    sides: Sequence[_Side], units: slice, plan: Contraction, in_flight: int, sums: Sequence[OutputSum] = ()
) -> tuple[Derivatives, Derivatives]:
    """Derivatives of some outputs by the calls of one batch, or of two."""
    joined = [Joined(units, side.kept, side.written) for side in sides]
    for piece in pieces(units, in_flight):
        found = [side.backward(piece, plan.reduce) for side in sides]
        for products in sums:
            products.take(found[0], found[-1])
        for part, derivatives in zip(joined, found, strict=True):
            part.put(piece, derivatives)
    return joined[0].derivatives, joined[-1].derivatives


def _multipliers(share: Share, biases: dict[str, str], plan: Contraction) -> tuple[float, float]:
    """Of a weight, and of the bias that is added with it."""
    bias = biases.get(share.name)
    return plan.multipliers[share.name], 0.0 if bias is None else plan.multipliers[bias]


def _add_shares(
    blocks: dict[str, Block],
    shares: list[Share],
    biases: dict[str, str],
    derivatives: tuple[Derivatives, Derivatives],
    plan: Contraction,
) -> None:
    """Add every share to the block of its group; a bias together with its weight where that costs nothing."""
    added = set()
    for share in sorted(shares, key=lambda share: share.name not in biases):
        if share.name in added:
            continue
        with_bias = add_share(blocks[plan.groups[share.name]], share, derivatives, _multipliers(share, biases, plan))
        if with_bias and share.name in biases:
            added.add(biases[share.name])


def _values(kernel: Tensor, scale: float, sizes: tuple[int, int, int], reduce: str, symmetric: bool) -> np.ndarray:
    n, m, o = sizes
    if symmetric:
        mirror(kernel)
    kernel = (kernel if scale == 1 else kernel.mul_(scale)).cpu()
    if reduce != "none":
        return kernel.numpy()
    return kernel.reshape(o, n, o, m).permute(1, 3, 0, 2).numpy()


def _most_at_once(shares: Sequence[Share], side: int, part: Recording) -> int:
    """Entries of the derivatives that one share reads."""
    return max(sum(math.prod(part.capture.sites[number].shape) for number, _ in share.uses[side]) for share in shares)


def _used(shares: Sequence[Share], side: int) -> list[int]:
    return sorted({site for share in shares for site, _ in share.uses[side]})
