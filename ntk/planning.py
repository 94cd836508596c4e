"""What a kernel will cost, route by route and layer by layer, before it is computed.

The model is run on shapes alone. Operations are counted from the products that each route makes, 2 for a multiply-add;
elementwise work is left out. Bytes are what a route holds at once beyond the model and its inputs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ntk.checks import check_accumulation, check_inputs, check_model
from ntk.contraction import MAX_CHUNK, Contraction, kernel_bytes
from ntk.costs import factored, pairs_of_rows
from ntk.display import html_table
from ntk.errors import UnknownNameError
from ntk.factors import Computed, Product
from ntk.forward import Evaluation
from ntk.memory import parse_memory
from ntk.outputs import OutputChoice
from ntk.parameters import ParameterChoice, select_parameters
from ntk.projection import Projection, resolve_projection
from ntk.recording import Recording, record, shares_of
from ntk.results import AXES, REDUCTIONS
from ntk.shares import Share, bias_shares
from ntk.statistics import Statistics
from ntk.tiles import FORWARD, Inputs, Tiling, choose_tiling, sketch
from ntk.wrappers import measured

LABELS = {"structured": "structured", "jacobian_contraction": "Jacobian", "ntk_vector_products": "products"}
"""Route -> its heading in the table."""

ROUTES = tuple(LABELS)


@dataclass(frozen=True)
class Cost:
    """Cost of one route, for a layer or for all.

    Attributes:
        operations: Floating-point operations of its matrix products.
        bytes: Held at once, the activations and the kernel apart.
    """

    operations: float
    bytes: float

    def __add__(self, other: "Cost") -> "Cost":
        """Of two layers."""
        return Cost(self.operations + other.operations, self.bytes + other.bytes)


@dataclass(frozen=True)
class LayerPlan:
    """One parameter.

    Attributes:
        name: Of the parameter.
        way: How its share is summed layer by layer: "positions" or "outer" products, "written" out, by "rows" of the
            whole batch where examples meet, or from its "jacobian" where no rule knows it.
        costs: Route -> its cost.
    """

    name: str
    way: str
    costs: Mapping[str, Cost]


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """How a kernel would be computed, and what the other routes would cost.

    Attributes:
        implementation: The route that `implementation="auto"` takes.
        layers: One entry for each parameter.
        held: Bytes of the kernel and of the activations, which every route holds.
        tiling: Portions of examples and outputs of the layer-wise route; None where rows of the Jacobian set them.
        convention: Shape of the kernel and reduction, in words.
    """

    implementation: str
    layers: tuple[LayerPlan, ...]
    held: int
    tiling: Tiling | None
    convention: str

    def total(self, route: str) -> Cost:
        """Cost of all layers by one route.

        Args:
            route: "structured", "jacobian_contraction" or "ntk_vector_products".

        Raises:
            UnknownNameError: There is no such route.
        """
        if route not in ROUTES:
            raise UnknownNameError("route", route, ROUTES)
        return sum((layer.costs[route] for layer in self.layers), Cost(0.0, 0.0))

    def rows(self) -> list[list[str]]:
        """The table: a header, a row for each parameter, and the sum."""
        header = ["parameter", "way", *(f"{label} {unit}" for label in LABELS.values() for unit in ("GFLOP", "MiB"))]
        body = [[layer.name, layer.way, *_figures(layer.costs)] for layer in self.layers]
        return [header, *body, ["all", "", *_figures({route: self.total(route) for route in ROUTES})]]

    def summary(self) -> str:
        """The choice in one line."""
        parts = [f"{self.convention}: {self.implementation}", f"{self.held / 2**20:.4g} MiB of kernel and activations"]
        if self.tiling is not None and self.implementation == "structured":
            parts.append(
                f"{_count(self.tiling.examples, 'example')} and {_count(self.tiling.outputs, 'output')} at once, "
                f"{self.tiling.passes:g} passes over the batch"
            )
        return "; ".join(parts)

    def __repr__(self) -> str:
        """The table."""
        rows = self.rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if number < 2 else cell.rjust(width)
                for number, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join([self.summary(), *lines])

    def _repr_html_(self) -> str:
        """The table."""
        return html_table(self.rows(), self.summary(), names=2)


def plan(
    model: torch.nn.Module,
    x1: torch.Tensor,
    x2: torch.Tensor | None = None,
    *,
    reduce: str = "none",
    projection: Projection | Mapping[str, Projection] | None = None,
    params: ParameterChoice = None,
    max_memory: int | str | None = None,
    dtype: torch.dtype | None = None,
    accumulate: torch.dtype | None = None,
    batch_statistics: str = "batch",
    reference: torch.Tensor | None = None,
    output: OutputChoice = None,
) -> Plan:
    """Predict what `ntk.empirical_ntk` with the same arguments costs by each of its implementations.

    Args:
        model: As in `ntk.empirical_ntk`; it is run on shapes, or on the inputs where it looks at values.
        x1: As in `ntk.empirical_ntk`.
        x2: As in `ntk.empirical_ntk`.
        reduce: As in `ntk.empirical_ntk`.
        projection: As in `ntk.empirical_ntk`.
        params: As in `ntk.empirical_ntk`.
        max_memory: As in `ntk.empirical_ntk`.
        dtype: As in `ntk.empirical_ntk`.
        accumulate: As in `ntk.empirical_ntk`; the vector products, which do not take it, are counted without it.
        batch_statistics: As in `ntk.empirical_ntk`.
        reference: As in `ntk.empirical_ntk`.
        output: As in `ntk.empirical_ntk`.

    Returns:
        A table of layers and routes, with the choice.

    Raises:
        UnknownNameError: As in `ntk.empirical_ntk`.
    """
    if reduce not in REDUCTIONS:
        raise UnknownNameError("reduce", reduce, REDUCTIONS)
    statistics = Statistics(batch_statistics, reference)
    check_inputs(x1, x2, dtype, reference)
    check_accumulation(accumulate)
    inputs = [("x1", x1)] if x2 is None else [("x1", x1), ("x2", x2)]
    evaluation = Evaluation(dtype, statistics, output)
    with measured(model) as (plain, _):
        check_model(plain, statistics.smallest_batch(*(x for _, x in inputs)))
        multipliers, _ = select_parameters(plain, params)
        own = dict(plain.named_parameters())
        projections, _ = resolve_projection(projection, {name: own[name] for name in multipliers})
        groups = dict.fromkeys(multipliers, "")
        contraction = Contraction(
            reduce, multipliers, projections, groups, parse_memory(max_memory), lambda done, total: None, accumulate
        )
        recordings = sketch(plain, inputs, list(multipliers), evaluation)
        if recordings is None:
            recordings = record(plain, inputs, list(multipliers), evaluation)
        return _judge(plain, inputs, evaluation, recordings, contraction)


def _judge(
    model: torch.nn.Module,
    inputs: Inputs,
    evaluation: Evaluation,
    recordings: Sequence[Recording],
    contraction: Contraction,
) -> Plan:
    """Count each route, and choose as `ntk.empirical_ntk` does."""
    tiling = choose_tiling(recordings, contraction)
    work = _Work(recordings, contraction, tiling)
    shares = {share.name: share for share in shares_of(recordings, contraction)}
    unruled = [name for name in contraction.multipliers if name not in shares]
    passes = _forward_operations(model, inputs, evaluation) - sum(work.forward(share) for share in shares.values())
    ruled = work.layers(list(shares.values()), bias_shares(list(shares.values()), contraction))
    layers = []
    for name in contraction.multipliers:
        if name in ruled:
            layers.append(ruled[name])
        elif any(name in part.capture.connected(part.batch.output) for part in recordings):
            size = recordings[0].batch.parameters[name].numel()
            layers.append(work.without_rule(name, size, max(0.0, passes) / len(unruled)))
    if tiling is not None and tiling.tiles > 1 and evaluation.statistics.choice == "frozen":
        tiling = None  # a tile has other statistics
    tiling = tiling if work.apart else None
    fits = contraction.max_memory is None or tiling is not None or not work.apart
    return Plan("structured" if fits else "jacobian_contraction", tuple(layers), work.held, tiling, work.describe())


class _Work:
    """Counts for one kernel."""

    def __init__(self, recordings: Sequence[Recording], contraction: Contraction, tiling: Tiling | None) -> None:
        outputs = [part.batch.output for part in recordings]
        self.recordings, self.reduce = recordings, contraction.reduce
        self.size = outputs[0].element_size()
        self.wide = contraction.kernel_dtype(outputs[0]).itemsize
        self.examples = len(outputs[0]), len(outputs[-1])
        self.sides = len(recordings)
        self.o = outputs[0].shape[1]
        self.passes = self._outputs if tiling is None else tiling.passes - FORWARD * tiling.repeats
        self.apart = all(part.capture.coupled == 0 for part in recordings)
        per_example = self.o if contraction.reduce == "none" else 1
        shape = self.examples[0] * per_example, self.examples[1] * per_example
        self.held = kernel_bytes(shape, contraction, self.wide) + sum(part.batch.graph_bytes for part in recordings)

    def layers(self, shares: Sequence[Share], biases: Mapping[str, str]) -> dict[str, LayerPlan]:
        """Costs of the parameters that have a rule; a bias is added with its weight where that costs nothing.

        Args:
            shares: Of these parameters.
            biases: Weight -> bias, from `ntk.shares.bias_shares`.
        """
        found = {share.name: self._layer(share) for share in shares}
        for weight, bias in biases.items():
            if found[weight].way == "positions":
                costs = {**found[bias].costs, "structured": Cost(0.0, 0.0)}
                found[bias] = LayerPlan(bias, "positions", costs)
        return found

    def describe(self) -> str:
        """Shape of the kernel and reduction."""
        sizes = [*self.examples, *([self.o, self.o] if self.reduce == "none" else [])]
        return f"NTK [{', '.join(map(str, sizes))}] ({', '.join(AXES[self.reduce])}), reduce {self.reduce}"

    @property
    def _outputs(self) -> int:
        """Outputs differentiated, where examples do not meet."""
        return 1 if self.reduce == "sum" else self.o

    @property
    def _rows(self) -> float:
        """Rows of the Jacobian of all batches."""
        return self._outputs * sum(self.examples[: self.sides])

    def _products_of_rows(self, features: float) -> float:
        outputs = (self._outputs, self._outputs)
        paired, lower = self.reduce != "none", self.sides == 1
        return 2 * pairs_of_rows(outputs, self.examples, paired=paired, lower=lower) * features

    def forward(self, share: Share) -> float:
        """Operations of the calls that use a parameter, in one pass over all batches."""
        factors = [
            (factor.weight if isinstance(factor, Computed) else factor, n)
            for uses, n in zip(share.uses, self.examples, strict=False)
            for _, factor in uses
        ]
        return sum(
            2.0 * n * math.prod(factor.sizes)
            for factor, n in factors
            if isinstance(factor, Product) and factor.tokens is None
        )

    def _layer(self, share: Share) -> LayerPlan:
        forward, features = self.forward(share), math.prod(share.shape)
        backward = forward if self._passes_back(share) else 0.0
        together = any(
            site < part.capture.coupled
            for part, uses in zip(self.recordings, share.uses, strict=True)
            for site, _ in uses
        )
        if together:
            way, cost = "rows", self._by_rows(backward, *self._shortened(share, forward, features))
        else:
            way, cost = self._by_outputs(share, backward, forward, features)
        return LayerPlan(share.name, way, {"structured": cost, **self._general(backward, forward, features)})

    def without_rule(self, name: str, features: int, forward: float) -> LayerPlan:
        """Costs of a parameter that has no rule."""
        general = self._general(forward, forward, features)
        return LayerPlan(name, "jacobian", {"structured": general["jacobian_contraction"], **general})

    def _by_outputs(self, share: Share, backward: float, forward: float, features: int) -> tuple[str, Cost]:
        """One backward pass for each output."""
        outputs = self._outputs
        sites = sum(
            math.prod(part.capture.sites[site].shape)
            for part, uses in zip(self.recordings, share.uses, strict=True)
            for site, _ in uses
        )
        held = self.size * outputs * sites
        if not share.factored:
            writing = self.passes * backward + outputs * forward
            return "written", Cost(writing + self._products_of_rows(features), held)
        g, k, p, q = share.total_sizes(0)
        p2 = share.total_sizes(-1)[2]
        ways = partial(
            factored,
            (g, k, q, p, p2),
            (outputs, outputs),
            self.examples,
            paired=self.reduce != "none",
            lower=self.sides == 1,
        )
        way = min(("positions", "outer"), key=ways().__getitem__)
        lefts = self.wide * sum(share.fixed_entries(side, self.examples[side]) for side in range(self.sides))
        return way, Cost(self.passes * backward + 2 * ways(elementwise=0)[way], held + lefts)

    def _passes_back(self, share: Share) -> bool:
        """Whether derivatives are taken by the input of a layer; not so at the first one."""
        return any(
            source.requires_grad and not source.is_leaf
            for part, uses in zip(self.recordings, share.uses, strict=True)
            for number, _ in uses
            for source, _ in part.capture.sites[number].sources
        )

    def _shortened(self, share: Share, forward: float, features: int) -> tuple[float, int]:
        """Operations to write a row, and its length, in a basis of the inputs of the batch."""
        if not share.factored:
            return 0.0, features
        g, k, _, q = share.total_sizes(0)
        inputs = sum(n * share.total_sizes(side)[2] for side, n in enumerate(self.examples[: self.sides]))
        length = min(k, inputs)
        return forward * length / k, g * q * length

    def _by_rows(self, backward: float, writing: float, features: int) -> Cost:
        """A row of the Jacobian for each output of each example, over the whole batch."""
        rows = self._rows
        return Cost(rows * (backward + writing) + self._products_of_rows(features), self.wide * rows * features)

    def _general(self, backward: float, forward: float, features: int) -> dict[str, Cost]:
        """The two routes that need no rule: both run the whole batch for each row."""
        rows = self._rows
        return {
            "jacobian_contraction": self._by_rows(backward, forward, features),
            "ntk_vector_products": Cost(
                rows * 2 * (backward + forward), self.size * 2 * min(rows, MAX_CHUNK) * features
            ),
        }


def _forward_operations(model: torch.nn.Module, inputs: Inputs, evaluation: Evaluation) -> float:
    """Operations of a forward pass over all batches, counted by torch; 0 for a model that looks at values."""
    counter, mode = FlopCounterMode(display=False), FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with counter, torch.no_grad():
            parameters = {name: mode.from_tensor(value.detach()) for name, value in model.named_parameters()}
            for argument, x in inputs:
                moments = evaluation.moments(model, x, parameters, parameters)
                evaluation.outputs(model, mode.from_tensor(x), parameters, moments, argument)
    except (RuntimeError, NotImplementedError, AssertionError, TypeError):
        return 0.0
    return float(counter.get_total_flops())


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _figures(costs: Mapping[str, Cost]) -> list[str]:
    return [
        f"{figure:.3g}" for route in ROUTES for figure in (costs[route].operations / 1e9, costs[route].bytes / 2**20)
    ]
