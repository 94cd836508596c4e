"""One batch of a model, with the calls that used its parameters."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ntk.capture import Capture, GradientInsideError
from ntk.contraction import Contraction, Gradients
from ntk.errors import NondeterministicModelError
from ntk.factors import Computed, Factor, Use
from ntk.forward import Batch, Evaluation, run_batch
from ntk.projection import acts_on_rows
from ntk.shares import Share

_OF_LAYOUT = ("contiguous", "stride", "view")
"""Words by which a model complains of how its tensors lie in memory."""


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
        try:
            for argument, x in inputs:
                capture = Capture(excluded, rearrange=rearrange)
                recordings.append(Recording(run(model, x, names, evaluation, argument, capture), capture))
        except GradientInsideError as error:
            excluded = excluded | error.names
            continue
        found = [part.capture.recorded for part in recordings]
        leaks = set().union(*(part.capture.leaks(part.batch.output) for part in recordings))
        leaks |= found[0] ^ found[-1]
        if not leaks:
            return recordings
        excluded = excluded | leaks


def shares_of(recordings: Sequence[Recording], plan: Contraction) -> list[Share]:
    """The recorded parameters, with the uses of each in each batch.

    Args:
        recordings: Of one batch or two.
        plan: Which parameters there are, and their projections.
    """
    uses: dict[str, tuple[list, ...]] = {}
    for index, part in enumerate(recordings):
        for number, site in enumerate(part.capture.sites):
            for factor in itertools.chain.from_iterable(_by_parameter(part.capture, found) for found in site.factors):
                uses.setdefault(factor.name, tuple([] for _ in recordings))[index].append((number, factor))
    found = []
    for name in plan.multipliers:
        if name in uses:
            parameter, projection = recordings[0].batch.parameters[name], plan.projections.get(name)
            by_rows = projection is None or acts_on_rows(projection, parameter)
            found.append(Share(name, tuple(parameter.shape), uses[name], projection, by_rows))
    return found


def _by_parameter(capture: Capture, factor: Factor) -> Sequence[Use]:
    """Factors of the parameters, in place of that of a weight computed from them."""
    if factor.name not in capture.computed.tensors:
        return [factor]
    weight, edge = capture.computed.tensors[factor.name], capture.computed.edges[factor.name]
    made_of = {name: capture.parameters[name] for name in sorted(capture.computed.sources(factor.name))}
    return [
        Computed(name, factor, tuple(weight.shape), partial(_pull, Gradients(edge, [value]), value.shape))
        for name, value in made_of.items()
    ]


def _pull(gradients: Gradients, shape: torch.Size, rows: Tensor) -> Tensor:
    """Gradients by a weight [r, *weight] -> by a parameter of this shape that it is computed from."""
    (pulled,) = gradients(rows)
    return rows.new_zeros(len(rows), *shape) if pulled is None else pulled
