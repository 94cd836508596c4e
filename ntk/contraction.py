"""The exact NTK of any module, by contracting its Jacobian.

Each batch is run once. A row of the Jacobian is the gradient of one output of one example, of a function of the *whole
batch*: under batch statistics it carries the terms that run through mean and variance. Rows are computed in chunks with
`torch.func.vmap`, and one at a time where an operator has no batching rule.

Cost: one backward pass over the batch per row. Memory: the rows held, which `max_memory` bounds by working in tiles and
computing rows again, plus the activations of one forward pass.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ntk.errors import NoParametersError
from ntk.forward import Batch
from ntk.memory import left_to_work_in
from ntk.projection import Projection, apply_projection

MAX_CHUNK = 64
"""Rows per call of autograd at most: beyond it the loop overhead is gone (chosen, not tuned)."""

STRIP = 256
"""Rows of a Gram matrix that are multiplied at once (chosen, not tuned)."""

CHUNK_BYTES = 2**29
"""Memory that the batched backward pass of one chunk may take for its largest activation (chosen, not tuned)."""


@dataclass(frozen=True, eq=False)
class Contraction:
    """How the rows of two Jacobians are contracted.

    Attributes:
        reduce: "none", "trace" or "sum".
        multipliers: Parameter name -> factor of its contribution.
        projections: Parameter name -> linear map applied to its rows.
        groups: Parameter name -> key of the kernel that its contribution is added to.
        max_memory: Bytes that everything beyond the model and its inputs may take, or None.
        report: Called after each chunk with (rows computed, rows to compute in all).
        accumulate: Type that derivatives are multiplied and summed in; None for their own.
    """

    reduce: str
    multipliers: dict[str, float]
    projections: dict[str, Projection]
    groups: dict[str, str]
    max_memory: int | None
    report: Callable[[int, int], None]
    accumulate: torch.dtype | None = None

    def kernel_dtype(self, derivatives: torch.Tensor) -> torch.dtype:
        """Type of the kernel.

        Args:
            derivatives: Anything of the type that derivatives are computed in.
        """
        return derivatives.dtype if self.accumulate is None else self.accumulate


class Gradients:
    """Derivatives of a model output, for several cotangents at once."""

    def __init__(self, output: torch.Tensor | GradientEdge, inputs: Sequence[torch.Tensor | GradientEdge]) -> None:
        """Say what is differentiated, and by what.

        Args:
            output: [n, o], attached to the graph, or its edge; or a computed weight.
            inputs: Leaf tensors, or edges of the graph.
        """
        self.output = output
        self.inputs = [entry if isinstance(entry, GradientEdge) else get_gradient_edge(entry) for entry in inputs]
        self.batched = True

    def __call__(self, seeds: torch.Tensor) -> list[torch.Tensor | None]:
        """Derivatives for all cotangents at once, or one by one once an operator has refused to be batched.

        Args:
            seeds: [rows, n, o]

        Returns:
            [rows, *shape] for each input, None for one that the output does not depend on.

        Raises:
            OutOfMemoryError: A chunk of rows does not fit the device.
        """
        if self.batched and len(seeds) > 1:
            try:
                return self._grad(seeds, batched=True)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                self.batched = False
        single = [self._grad(seed, batched=False) for seed in seeds]
        return [None if parts[0] is None else torch.stack(parts) for parts in zip(*single, strict=True)]

    def _grad(self, seeds: torch.Tensor, *, batched: bool) -> list[torch.Tensor | None]:
        """Gradients for one cotangent, or for one along each entry of the first axis."""
        reached: list[bool] = []

        def gradients(seed: torch.Tensor) -> list[torch.Tensor]:
            found = torch.autograd.grad(self.output, self.inputs, seed, retain_graph=True, allow_unused=True)
            reached[:] = [gradient is not None for gradient in found]
            return [gradient for gradient in found if gradient is not None]

        with warnings.catch_warnings():
            # An operator without a batching rule is computed in a loop inside torch: slower, and as exact.
            warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)
            # torch.func.vmap batches convolutions; is_grads_batched of torch.autograd.grad computes them in a loop.
            found = iter(torch.func.vmap(gradients)(seeds) if batched else gradients(seeds))
        return [next(found) if there else None for there in reached]


@dataclass(frozen=True, eq=False)
class RowSource:
    """Where the rows of one parameter come from.

    Attributes:
        name: Of the parameter.
        inputs: What is differentiated by: leaf tensors, or edges of the graph.
        features: Entries of a row.
        in_flight: Entries of the derivatives that a row is made of.
        rows: Derivatives by the inputs, each [rows, *shape] or None -> [rows, features] or None.
    """

    name: str
    inputs: tuple[torch.Tensor | GradientEdge, ...]
    features: int
    in_flight: int
    rows: Callable[[list[torch.Tensor | None]], torch.Tensor | None]


def parameter_sources(batch: Batch, plan: Contraction) -> list[RowSource]:
    """Rows that are the projected gradients by the parameters themselves.

    Args:
        batch: A forward pass with its graph.
        plan: How rows are projected.
    """
    return [_parameter_source(name, value, plan) for name, value in batch.parameters.items()]


def _parameter_source(name: str, parameter: torch.Tensor, plan: Contraction) -> RowSource:
    def rows(gradients: list[torch.Tensor | None]) -> torch.Tensor | None:
        (gradient,) = gradients
        if gradient is None:
            return None
        if name in plan.projections:
            gradient = apply_projection(plan.projections[name], gradient, name)
        return gradient.reshape(len(gradient), -1)

    return RowSource(name, (parameter,), parameter.numel(), 0, rows)


class JacobianRows:
    """Rows of the Jacobian of one batch, computed on request."""

    def __init__(
        self, batch: Batch, plan: Contraction, chunk: int, on_rows: Callable[[int], None], sources: list[RowSource]
    ) -> None:
        """Hold a batch and see that it can be differentiated.

        Args:
            batch: A forward pass with its graph.
            plan: Which rows there are, and how they are projected.
            chunk: Rows per call of autograd at most.
            on_rows: Called after each chunk with its number of rows.
            sources: Of the parameters.

        Raises:
            NoParametersError: The output is not connected to any selected parameter.
        """
        if not batch.output.requires_grad:
            raise NoParametersError(
                f"the model output depends on none of the selected parameters {sorted(plan.multipliers)[:4]}; select "
                "parameters that the forward pass uses, and remove .detach(), .data and torch.no_grad() from it."
            )
        self.batch = batch
        self.plan = plan
        self.chunk = max(1, min(chunk, CHUNK_BYTES // (4 * batch.activation_bytes)))
        self.on_rows = on_rows
        self.dtype = plan.kernel_dtype(batch.output)
        self.sources = sources
        self.gradients = Gradients(batch.output, [entry for source in sources for entry in source.inputs])

    def rows(self, start: int, stop: int, unit: int) -> dict[str, torch.Tensor]:
        """Projected rows start to stop, flattened per parameter.

        Args:
            start: First row.
            stop: One past the last row.
            unit: Output whose rows are meant, for reduce="trace" only.

        Returns:
            Parameter name -> [stop - start, features]; parameters that no output depends on are missing.
        """
        tile: dict[str, torch.Tensor] = {}
        for begin in range(start, stop, self.chunk):
            end = min(begin + self.chunk, stop)
            gradients = iter(self.gradients(self.cotangents(begin, end, unit)))
            for source in self.sources:
                rows = source.rows([next(gradients) for _ in source.inputs])
                if rows is None:
                    continue
                if (begin, end) == (start, stop):
                    tile[source.name] = rows.to(self.dtype)
                    continue
                if source.name not in tile:
                    tile[source.name] = rows.new_empty(stop - start, source.features, dtype=self.dtype)
                tile[source.name][begin - start : end - start] = rows
            self.on_rows(end - begin)
        return tile

    def cotangents(self, start: int, stop: int, unit: int) -> torch.Tensor:
        """[stop - start, n, o], one selection of outputs per row."""
        n, o = self.batch.output.shape
        seeds = self.batch.output.new_zeros(stop - start, n, o)
        local, row = torch.arange(stop - start), torch.arange(start, stop)
        if self.plan.reduce == "none":
            seeds[local, row // o, row % o] = 1
        elif self.plan.reduce == "trace":
            seeds[local, row, unit] = 1
        else:
            seeds[local, row, :] = 1
        return seeds


def contract(
    first: Batch,
    second: Batch | None,
    plan: Contraction,
    sources: tuple[list[RowSource], list[RowSource]] | None = None,
    taken: int = 0,
) -> dict[str, np.ndarray]:
    """Contract the Jacobians of two batches, or of one with itself.

    Sums run in float64 over tiles and parameters, whatever the dtype of the rows.

    Args:
        first: The batch of the rows of the kernel, n1 examples.
        second: The batch of its columns, n2 examples, or None for the first one.
        plan: Reduction, multipliers, projections, groups and memory.
        sources: Of the rows of either batch; None for the gradients by its parameters.
        taken: Bytes of `max_memory` that are spoken for already.

    Returns:
        Group -> kernel in the type of `plan.kernel_dtype`: [n1, n2, o, o] for reduce="none", else [n1, n2].
    """
    dtype, itemsize = plan.kernel_dtype(first.output), first.output.element_size()
    if sources is None:
        sources = parameter_sources(first, plan), [] if second is None else parameter_sources(second, plan)
    row_bytes = max(
        sum(dtype.itemsize * part.features + itemsize * part.in_flight for part in parts) for parts in sources
    )
    n, o = first.output.shape
    per_example = o if plan.reduce == "none" else 1
    counts = n * per_example, 0 if second is None else second.output.shape[0] * per_example
    shape = counts[0], counts[0] if second is None else counts[1]
    taken += kernel_bytes(shape, plan, 8 + dtype.itemsize)
    taken += sum(b.graph_bytes + b.copied_bytes for b in (first, second) if b is not None)
    tile, chunk = tile_rows(counts, row_bytes, plan.max_memory, taken)
    steps = list(_tile_pairs(shape, tile, symmetric=second is None))
    units = range(o) if plan.reduce == "trace" else range(1)
    on_rows = _counter(plan, len(units) * _rows_to_compute(steps, symmetric=second is None))
    left = JacobianRows(first, plan, chunk, on_rows, sources[0])
    right = left if second is None else JacobianRows(second, plan, chunk, on_rows, sources[1])
    kernels = {group: torch.zeros(shape, dtype=torch.float64) for group in dict.fromkeys(plan.groups.values())}
    for unit in units:
        held: slice | None = None
        rows: dict[str, torch.Tensor] = {}
        columns: dict[str, torch.Tensor] = {}
        for a, b in steps:
            columns = {}  # let go of one tile before the next is computed
            if held != a:
                rows = {}
                held, rows = a, left.rows(a.start, a.stop, unit)
            columns = rows if right is left and a == b else right.rows(b.start, b.stop, unit)
            _accumulate(kernels, plan, (rows, columns), (a, b), mirror=right is left)
    scale = 1.0 / o if plan.reduce == "trace" else 1.0
    return {group: _shape(kernel.mul_(scale), plan, o, dtype) for group, kernel in kernels.items()}


def kernel_bytes(shape: tuple[int, int], plan: Contraction, itemsize: int) -> int:
    """Bytes of the kernels of all groups.

    Args:
        shape: Rows and columns.
        plan: Its groups.
        itemsize: Bytes of an entry.
    """
    return math.prod(shape) * itemsize * len(set(plan.groups.values()))


def tile_rows(counts: tuple[int, int], row_bytes: int, max_memory: int | None, held: int = 0) -> tuple[int, int]:
    """How many rows to hold per tile, and how many to compute at once.

    At most two tiles and one chunk in flight are held: 2 * tile + chunk rows.

    Args:
        counts: Rows of the first and, 0 if it is the same, of the second Jacobian.
        row_bytes: Bytes of one row.
        max_memory: Bytes allowed, or None for no bound.
        held: Bytes of them that are not for rows.

    Returns:
        Rows per tile and rows per chunk.

    Raises:
        MemoryBudgetError: Three rows, a pair and the one in flight, do not fit.
    """
    longest = max(counts)
    if max_memory is None:
        return longest, MAX_CHUNK
    piece = f"three rows of the Jacobian of {row_bytes} bytes each (a pair, and the one being computed)"
    capacity = left_to_work_in(max_memory, held, 3 * row_bytes, piece) // max(row_bytes, 1)
    if capacity > sum(counts):
        return longest, min(MAX_CHUNK, capacity - sum(counts))
    chunk = max(1, min(MAX_CHUNK, capacity // 4))
    return (capacity - chunk) // 2, chunk


def _tile_pairs(shape: tuple[int, int], tile: int, *, symmetric: bool) -> Iterator[tuple[slice, slice]]:
    """Pairs of row ranges that cover the kernel; for a symmetric one the upper triangle only.

    Yields:
        Rows of the first and of the second Jacobian.
    """
    for i in range(math.ceil(shape[0] / tile)):
        a = slice(i * tile, min((i + 1) * tile, shape[0]))
        for j in range(i if symmetric else 0, math.ceil(shape[1] / tile)):
            yield a, slice(j * tile, min((j + 1) * tile, shape[1]))


def _counter(plan: Contraction, total: int) -> Callable[[int], None]:
    """A function that adds up rows and passes the sum on."""
    done = 0

    def on_rows(rows: int) -> None:
        nonlocal done
        done += rows
        plan.report(done, total)

    return on_rows


def _rows_to_compute(steps: list[tuple[slice, slice]], *, symmetric: bool) -> int:
    """Rows that one pass over the tile pairs computes, those computed again included."""
    rows = {a.start: a.stop - a.start for a, _ in steps}
    return sum(rows.values()) + sum(b.stop - b.start for a, b in steps if not (symmetric and a == b))


def _accumulate(
    kernels: dict[str, torch.Tensor],
    plan: Contraction,
    tiles: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]],
    place: tuple[slice, slice],
    *,
    mirror: bool,
) -> None:
    """Add the contraction of two tiles to each group, and its transpose across the diagonal."""
    a, b = place
    for name, rows in tiles[0].items():
        if name not in tiles[1]:
            continue
        kernel, multiplier = kernels[plan.groups[name]], plan.multipliers[name]
        if mirror and a == b:
            _add_gram(kernel[a, b], rows, multiplier)
            continue
        block = (rows @ tiles[1][name].T).to("cpu", torch.float64) * multiplier
        kernel[a, b] += block
        if mirror:
            kernel[b, a] += block.T


def _add_gram(kernel: torch.Tensor, rows: torch.Tensor, multiplier: float) -> None:
    """Add rows @ rows.T, of which only the lower triangle is computed."""
    for start in range(0, len(rows), STRIP):
        stop = min(start + STRIP, len(rows))
        strip = (rows[start:stop] @ rows[:stop].T).to("cpu", torch.float64) * multiplier
        corner = strip[:, start:].tril()
        kernel[start:stop, start:stop] += corner + corner.tril(-1).T
        kernel[start:stop, :start] += strip[:, :start]
        kernel[:start, start:stop] += strip[:, :start].T


def _shape(kernel: torch.Tensor, plan: Contraction, o: int, dtype: torch.dtype) -> np.ndarray:
    values = kernel.to(dtype).numpy()
    if plan.reduce != "none":
        return values
    n1, n2 = values.shape[0] // o, values.shape[1] // o
    return values.reshape(n1, o, n2, o).transpose(0, 2, 1, 3)
