"""The exact NTK of a model by layers, without its Jacobian.

The gradient of an output by a weight is a sum of outer products over positions, Σ_p g_p ⊗ a_p (ntk/factors.py), so
that a share of the kernel is Σ_pq (a_p·a_q)(g_p·g_q) (Novak et al. 2022, arXiv 2206.08720). It is summed in the cheaper
of two ways: over pairs of positions, or by writing the gradients of one example out and multiplying those.

Where examples do not meet, one backward pass per output serves all examples (ntk/examples_apart.py). Where they do, as
before a BatchNorm in train mode, an output has derivatives at every example: a row of the Jacobian is then a sum over
the positions of the whole batch, and is written in an orthonormal basis of the inputs where that is shorter. Which
layers these are is tested: a random weight for each example must come out at its own derivatives only. What has no rule
goes through ntk/contraction.py.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ntk.contraction import Contraction, Gradients, RowSource, contract, kernel_bytes, parameter_sources
from ntk.examples_apart import choose_portions, contract_apart
from ntk.recording import Recording, shares_of
from ntk.shares import Share, fold, outer, row_spans

ROUNDING = 200
"""Multiple of the machine precision up to which examples count as independent (chosen, not tuned)."""


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
    portions = choose_portions(recordings, apart, plan, reserved) if apart else None
    if portions is None:
        apart, rest = [], shares
    kernels = {} if portions is None else contract_apart(recordings, apart, plan, portions)
    if rest or fallback or not apart:
        held = sum(values.nbytes for values in kernels.values())
        for group, values in _contract_rows(recordings, rest, fallback, plan, held).items():
            kernels[group] = kernels[group] + values if group in kernels else values
    return kernels, fallback


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


def _bytes_of_rows(
    recordings: Sequence[Recording], shares: Sequence[Share], fallback: Sequence[str], plan: Contraction
) -> int:
    """At least what `_contract_rows` takes beside the activations, to be left for it."""
    if not (shares or fallback):
        return 0
    outputs = [part.batch.output for part in recordings]
    size, o = plan.kernel_dtype(outputs[0]).itemsize, outputs[0].shape[1] if plan.reduce == "none" else 1
    features = sum(math.prod(share.shape) for share in shares)
    features += sum(recordings[0].batch.parameters[name].numel() for name in fallback)
    sites = max(
        sum(math.prod(part.capture.sites[number].shape) for share in shares for number, _ in share.uses[side])
        for side, part in enumerate(recordings)
    )
    return 3 * size * (features + sites) + kernel_bytes((len(outputs[0]) * o, len(outputs[-1]) * o), plan, 8 + size)


def _contract_rows(
    recordings: Sequence[Recording], shares: list[Share], fallback: Sequence[str], plan: Contraction, held: int
) -> dict[str, np.ndarray]:
    """Shares that need a row of the Jacobian for each output of each example."""
    dtype = plan.kernel_dtype(recordings[0].batch.output)
    spans = [row_spans(share, dtype) for share in shares]
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
        right = share.right(side, derivatives, 1).to(bases[side])
        return outer(bases[side].unsqueeze(0), fold(right), c).movedim(2, 0).flatten(1)

    features = math.prod(share.shape) if bases is None else share.features(bases[side].shape[1])
    edges = tuple(part.capture.sites[number].edge for number in numbers)
    in_flight = sum(map(math.prod, shapes)) + share.row_entries() - math.prod(share.shape)
    return RowSource(share.name, edges, features, in_flight, rows)
