"""The exact NTK of a model by layers, without its Jacobian.

The gradient of an output by a weight is a sum of outer products over positions, Σ_p g_p ⊗ a_p (ntk/factors.py), so
that a share of the kernel is Σ_pq (a_p·a_q)(g_p·g_q) (Novak et al. 2022, arXiv 2206.08720). It is summed in the cheaper
of two ways: over pairs of positions, or by writing the gradients of one example out and multiplying those.

Where examples do not meet, one backward pass per output serves all examples. Where they do, as before a BatchNorm in
train mode, an output has derivatives at every example: a row of the Jacobian is then a sum over the positions of the
whole batch, and is written in an orthonormal basis of the inputs where that is shorter. Which layers these are is
tested: a random weight for each example must come out at its own derivatives only. What has no rule goes through
ntk/contraction.py.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ntk.backward import IN_CACHE, Backward, Joined, Rights
from ntk.blocks import ENTRIES, Block, OutputSum, add_share, mirror
from ntk.capture import Capture
from ntk.contraction import Contraction, Gradients, RowSource, contract, kernel_bytes, parameter_sources
from ntk.costs import factored
from ntk.errors import NondeterministicModelError
from ntk.factors import Product
from ntk.forward import Batch, Evaluation, run_batch
from ntk.memory import Needs, pieces
from ntk.projection import acts_on_rows
from ntk.shares import Derivatives, Share, bias_shares, fold, outer, row_spans

WORKING_BYTES = 2**31
"""Memory that derivatives and temporaries may take when max_memory leaves it open (chosen, not tuned)."""

_OF_LAYOUT = ("contiguous", "stride", "view")
"""Words by which a model complains of how its tensors lie in memory."""

ROUNDING = 200
"""Multiple of the machine precision up to which examples count as independent (chosen, not tuned)."""


@dataclass(frozen=True, eq=False)
class Recording:
    """One batch, and the calls that used its parameters."""

    batch: Batch
    capture: Capture


def record(
    model: torch.nn.Module,
    inputs: Sequence[tuple[str, Tensor]],
    names: Sequence[str],
    evaluation: Evaluation,
    run: Callable[..., Batch] = run_batch,
) -> list[Recording]:
    """Run each batch and record the calls that use parameters, all of a parameter's uses or none.

    Args:
        model: The network.
        inputs: (name of the argument, batch).
        names: Parameters of the kernel.
        evaluation: Type to compute in, statistics and outputs.
        run: What runs a batch: `run_batch`, or `ntk.sketch.sketch_batch` on shapes alone.

    Raises:
        NondeterministicModelError: Two runs of the model differ.
        RuntimeError: As the model raises it.
    """
    watch = partial(_record, model, inputs, names, evaluation, run)
    try:
        return watch(rearrange=True)
    except (RuntimeError, NondeterministicModelError) as error:
        sees_layout = isinstance(error, NondeterministicModelError) or any(word in str(error) for word in _OF_LAYOUT)
        if not sees_layout:
            raise
        return watch(rearrange=False)


def _record(
    model: torch.nn.Module,
    inputs: Sequence[tuple[str, Tensor]],
    names: Sequence[str],
    evaluation: Evaluation,
    run: Callable[..., Batch],
    *,
    rearrange: bool,
) -> list[Recording]:
    excluded: set[str] = set()
    while True:
        recordings = []
        for argument, x in inputs:
            capture = Capture(excluded, rearrange=rearrange)
            recordings.append(Recording(run(model, x, names, evaluation, argument, capture), capture))
        found = [{factor.name for site in part.capture.sites for factor in site.factors} for part in recordings]
        leaks = set().union(*(part.capture.leaks(part.batch.output) for part in recordings))
        leaks |= found[0] ^ found[-1]
        if not leaks:
            return recordings
        excluded = excluded | leaks


def contract_structured(
    recordings: Sequence[Recording], plan: Contraction
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Contract the Jacobians of two recorded batches, or of one with itself.

    Args:
        recordings: The batch of the rows of the kernel, and unless it is the same, that of its columns.
        plan: Reduction, multipliers, projections, groups and memory.

    Returns:
        Group -> kernel as `ntk.contraction.contract` gives it; and the parameters that went through the Jacobian.
    """
    connected = set().union(*(part.capture.connected(part.batch.output) for part in recordings))
    fallback = tuple(name for name in plan.multipliers if name in connected)
    shares = shares_of(recordings, plan)
    independent = [_independent_sites(part) for part in recordings]
    apart = [
        share
        for share in shares
        if all(flags[site] for flags, uses in zip(independent, share.uses, strict=True) for site, _ in uses)
    ]
    rest = [share for share in shares if share not in apart]
    reserved = _bytes_of_rows(recordings, rest, fallback, plan)
    portions = _portions(recordings, apart, plan, reserved) if apart else None
    if portions is None:
        apart, rest = [], shares
    kernels = {} if portions is None else _contract_apart(recordings, apart, plan, portions)
    if rest or fallback or not apart:
        held = sum(values.nbytes for values in kernels.values())
        for group, values in _contract_rows(recordings, rest, fallback, plan, held).items():
            kernels[group] = kernels[group] + values if group in kernels else values
    return kernels, fallback


def shares_of(recordings: Sequence[Recording], plan: Contraction) -> list[Share]:
    """The recorded parameters, with the uses of each in each batch.

    Args:
        recordings: As in `contract_structured`.
        plan: As in `contract_structured`.
    """
    uses: dict[str, tuple[list, ...]] = {}
    for index, part in enumerate(recordings):
        for number, site in enumerate(part.capture.sites):
            for factor in site.factors:
                uses.setdefault(factor.name, tuple([] for _ in recordings))[index].append((number, factor))
    found = []
    for name in plan.multipliers:
        if name in uses:
            parameter, projection = recordings[0].batch.parameters[name], plan.projections.get(name)
            by_rows = projection is None or acts_on_rows(projection, parameter)
            found.append(Share(name, tuple(parameter.shape), uses[name], projection, by_rows))
    return found


def _independent_sites(part: Recording) -> list[bool]:
    """Whether an example's outputs have derivatives at that example alone, for each recorded call."""
    output, sites = part.batch.output, part.capture.sites
    n, o = output.shape
    if not output.requires_grad:
        return [False] * len(sites)
    coupled = part.capture.coupled
    found = [
        number >= coupled and site.shape[:1] > (0,) and site.shape[0] % n == 0 for number, site in enumerate(sites)
    ]
    tested = [number for number in part.capture.doubtful_sites() if found[number]]
    if not tested:
        return found
    generator = torch.Generator().manual_seed(0)  # any numbers will do, and the global generator is left alone
    direction, weight = (torch.randn(*size, generator=generator).to(output) for size in ((o,), (n, 1)))
    seeds = torch.stack([direction.expand(n, o), weight * direction])
    gradients = Gradients(output, [sites[number].edge for number in tested])(seeds)
    allowed = ROUNDING * torch.finfo(output.dtype).eps
    for number, gradient in zip(tested, gradients, strict=True):
        if gradient is not None:
            plain, weighted = gradient.reshape(2, n, -1)
            rest = torch.addcmul(weighted, weight, plain, value=-1)
            largest, excess = (torch.linalg.vector_norm(part, math.inf) for part in (plain, rest))
            found[number] = bool(excess <= allowed * largest * weight.abs().max())
    return found


def _used(shares: Sequence[Share], side: int) -> list[int]:
    return sorted({site for share in shares for site, _ in share.uses[side]})


def working_memory(recordings: Sequence[Recording], shares: Sequence[Share], plan: Contraction) -> Needs:
    """What the shares of parameters take at whose calls examples do not meet.

    Args:
        recordings: As in `contract_structured`.
        shares: Of these parameters.
        plan: As in `contract_structured`.
    """
    outputs = [part.batch.output for part in recordings]
    size, o = outputs[0].element_size(), outputs[0].shape[1] if plan.reduce == "none" else 1
    counts = [len(output) for output in outputs]
    derivatives = lefts = 0
    for side, part in enumerate(recordings):
        derivatives += sum(math.prod(part.capture.sites[site].shape) for site in _used(shares, side))
        lefts += max(share.fixed_entries(side, counts[side]) for share in shares)
    temporary = max(share.temporary_entries(*counts) for share in shares)
    largest = max(part.batch.activation_bytes for part in recordings)
    return Needs(
        kernel=kernel_bytes((counts[0] * o, counts[-1] * o), plan, size),
        batch=sum(part.batch.graph_bytes for part in recordings) + size * lefts,
        output=size * (derivatives + 2 * temporary) + 2 * largest,
        again=size * derivatives if plan.reduce == "none" and len(recordings) == 1 else 0,
    )


@dataclass(frozen=True)
class _Portions:
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


def _portions(
    recordings: Sequence[Recording], shares: list[Share], plan: Contraction, reserved: int
) -> _Portions | None:
    """What max_memory holds; None if it does not hold the derivatives of one output."""
    outputs = 1 if plan.reduce == "sum" else recordings[0].batch.output.shape[1]
    needs = working_memory(recordings, shares, plan)
    sites = [part.capture.sites[number] for side, part in enumerate(recordings) for number in _used(shares, side)]
    sizes = [recordings[0].batch.output.element_size() * math.prod(site.shape) for site in sites]
    in_flight = max(1, IN_CACHE // max(1, *sizes))
    if plan.max_memory is None:
        at_once = max(1, needs.outputs_at_once(WORKING_BYTES + needs.kernel + needs.batch, outputs))
        return _Portions(at_once, in_flight, ENTRIES, math.inf)
    at_once = needs.outputs_at_once(plan.max_memory - reserved, outputs)
    if at_once == 0:
        return None
    spare = (plan.max_memory - reserved - needs.kernel - needs.batch - at_once * (needs.output + needs.again)) / 2
    affordable = max(0, int(spare)) // max(1, sum(sizes))
    entries = min(ENTRIES, needs.entries(plan.max_memory))
    return _Portions(at_once, min(in_flight, affordable) or at_once, entries, spare)


def _bytes_of_rows(
    recordings: Sequence[Recording], shares: Sequence[Share], fallback: Sequence[str], plan: Contraction
) -> int:
    """At least what `_contract_rows` takes beside the activations, to be left for it."""
    if not (shares or fallback):
        return 0
    outputs = [part.batch.output for part in recordings]
    size, o = outputs[0].element_size(), outputs[0].shape[1] if plan.reduce == "none" else 1
    features = sum(math.prod(share.shape) for share in shares)
    features += sum(recordings[0].batch.parameters[name].numel() for name in fallback)
    sites = sum(math.prod(site.shape) for part in recordings for site in part.capture.sites)
    return 3 * size * (features + sites) + kernel_bytes((len(outputs[0]) * o, len(outputs[-1]) * o), plan, 8 + size)


def _contract_apart(
    recordings: Sequence[Recording], shares: list[Share], plan: Contraction, portions: _Portions
) -> dict[str, np.ndarray]:
    """Shares of parameters at whose calls examples do not meet: one backward pass for each output."""
    outputs = [part.batch.output for part in recordings]
    o, (n, m) = outputs[0].shape[1], (len(outputs[0]), len(outputs[-1]))
    symmetric, paired = len(recordings) == 1, plan.reduce != "none"
    rows = o if plan.reduce != "sum" else 1
    shape = (n, m) if paired else (o * n, o * m)
    kernels = {group: outputs[0].new_zeros(shape) for group in dict.fromkeys(plan.groups.values())}
    biases = bias_shares(shares, plan)
    sums = _sums(recordings, shares, plan, portions)
    apart = [share for share in shares if share.name not in {*sums, *(biases.get(name) for name in sums)}]
    written = {share.name for share in apart if _is_written(share, (n, m), rows, symmetric=symmetric, paired=paired)}
    sides = [_side(part, number, shares, apart, written) for number, part in enumerate(recordings)]
    differentiate = partial(_differentiate, plan=plan, in_flight=portions.in_flight)
    blocks = lambda place, other, lower: {
        group: Block(kernel[place, other], (n, m), paired, lower, portions.entries) for group, kernel in kernels.items()
    }
    everything = slice(None)
    chunks = [slice(start, min(start + portions.outputs, rows)) for start in range(0, rows, portions.outputs)]
    for a in chunks:
        if paired:
            derivatives = differentiate(sides, a, sums=sums.values())
            _add_shares(blocks(everything, everything, symmetric), apart, biases, derivatives, plan)
            continue
        first = differentiate(sides[:1], a)
        for b in [b for b in chunks if not symmetric or b.start <= a.start]:
            second = first if symmetric and a == b else differentiate(sides[-1:], b)
            places = slice(a.start * n, a.stop * n), slice(b.start * m, b.stop * m)
            _add_shares(blocks(*places, symmetric and a == b), apart, biases, (first[0], second[1]), plan)
        plan.report(a.stop * n, rows * n)
    for share in shares:
        if share.name in sums:
            block = blocks(everything, everything, symmetric)[plan.groups[share.name]]
            sums[share.name].add_to(block, _multipliers(share, biases, plan))
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
    recordings: Sequence[Recording], shares: list[Share], plan: Contraction, portions: _Portions
) -> dict[str, OutputSum]:
    """Shares whose sum over outputs takes less memory than their derivatives."""
    outputs = [part.batch.output for part in recordings]
    rows, (n, m) = outputs[0].shape[1], (len(outputs[0]), len(outputs[-1]))
    if plan.reduce != "trace" or portions.outputs < rows or portions.in_flight >= rows:
        return {}
    found: dict[str, OutputSum] = {}
    size = outputs[0].element_size() * n * m
    for share in shares:
        whole = all(
            part.capture.sites[number].shape[0] == len(part.batch.output)
            for part, uses in zip(recordings, share.uses, strict=True)
            for number, _ in uses
        )
        if not (share.without_positions and whole):
            continue
        derivatives = rows * share.total_sizes(0)[3] * sum(map(len, outputs))
        if n * m <= derivatives and size * (len(found) + 1) <= portions.sums:
            found[share.name] = OutputSum(share, (n, m))
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


def _differentiate(
    sides: Sequence[_Side], units: slice, plan: Contraction, in_flight: int, sums: Iterable[OutputSum] = ()
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


def _contract_rows(
    recordings: Sequence[Recording], shares: list[Share], fallback: Sequence[str], plan: Contraction, held: int
) -> dict[str, np.ndarray]:
    """Shares that need a row of the Jacobian for each output of each example."""
    spans = [row_spans(share) for share in shares]
    sources = []
    for side, part in enumerate(recordings):
        batch = replace(part.batch, parameters={name: part.batch.parameters[name] for name in fallback})
        sources.append(
            parameter_sources(batch, plan)
            + [_row_source(share, span, side, part) for share, span in zip(shares, spans, strict=True)]
        )
    second = recordings[1].batch if len(recordings) == 2 else None
    return contract(recordings[0].batch, second, plan, (sources[0], sources[-1] if second is not None else []), held)


def _row_source(share: Share, bases: list[Tensor] | None, side: int, part: Recording) -> RowSource:
    """Rows of one parameter, each a sum over the positions of the whole batch."""
    numbers = [number for number, _ in share.uses[side]]
    shapes = [part.capture.sites[number].shape for number in numbers]
    zero = part.batch.output.new_zeros(())

    def rows(gradients: list[Tensor | None]) -> Tensor | None:
        c = next((len(gradient) for gradient in gradients if gradient is not None), None)
        if c is None:
            return None
        derivatives = {
            number: zero.expand(c, *shape) if gradient is None else gradient
            for number, shape, gradient in zip(numbers, shapes, gradients, strict=True)
        }
        if bases is None:
            return share.written(side, derivatives, 1).flatten(1)
        return outer(bases[side].unsqueeze(0), fold(share.right(side, derivatives, 1)), c).movedim(2, 0).flatten(1)

    features = math.prod(share.shape) if bases is None else share.features(bases[side].shape[1])
    edges = tuple(part.capture.sites[number].edge for number in numbers)
    return RowSource(share.name, edges, features, sum(map(math.prod, shapes)), rows)
