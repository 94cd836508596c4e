"""Record, during one forward pass, what the gradients of its parameters are made of.

A function that has a rule (ntk/factors.py) receives a detached alias of its parameter, so that whatever connects
the parameter to the output afterwards is a use without a rule: `Capture.leaks` names it, and it goes to the exact
Jacobian contraction instead. Layer outputs are held as edges of the autograd graph: a later in-place activation changes
the tensor, not the edge. A model that differentiates inside its forward pass reaches an alias past that output:
`Capture.leaks` looks for edges that enter a recorded call by another way. Weights that are computed from parameters
are taken for parameters (ntk/computed.py); that no examples enter them is seen by following what is made of examples.
"""

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from traceback import walk_stack
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from ntk.attention import attend
from ntk.computed import ComputedWeights
from ntk.convolution import LAYOUTS, convolve
from ntk.examplewise import keeps_examples_apart, normalizes_over_batch
from ntk.factors import Factor
from ntk.layer_rules import find_rule

_OF_LAYOUT = {torch.Tensor.view, torch.Tensor.view_as, torch.Tensor.as_strided, torch.as_strided}
"""Functions that see in what order the entries of a tensor lie."""

_HOOKED: set[Callable] = {torch.Tensor.register_hook, vars(torch._C.TensorBase)["grad_fn"].__get__}
"""How a model reaches tensors and nodes of the graph, whose hooks may change derivatives."""


class GradientInsideError(Exception):
    """A model differentiates by parameters, and must be given these themselves, and not aliases.

    Attributes:
        names: Of the parameters.
    """

    def __init__(self, names: frozenset[str]) -> None:
        """Name the parameters.

        Args:
            names: Of the parameters.
        """
        self.names = names
        super().__init__(f"the model differentiates by {sorted(names)}")


@dataclass(frozen=True, eq=False)
class Site:
    """One call that uses parameters.

    Attributes:
        edge: Of the output in the autograd graph.
        shape: Of the output.
        factors: What the gradients are made of, one entry for each parameter.
        sources: Tensors that the factors read later -> their version when the call was made.
        inside: Nodes of the graph between the output and the parameters.
    """

    edge: GradientEdge
    shape: tuple[int, ...]
    factors: tuple[Factor, ...]
    sources: tuple[tuple[torch.Tensor, int], ...]
    inside: frozenset[Node]


class Capture(TorchFunctionMode):
    """Watches the calls of PyTorch functions while a model runs.

    Attributes:
        sites: Calls recorded, in their order.
        coupled: How many of the first sites lie before a layer that normalizes over the batch.
        doubtful: How many of the first sites lie before a call of which it is not known that it keeps examples apart.
        normalized: Whether there is such a layer, be it the first of the model.
    """

    def __init__(self, excluded: set[str], *, rearrange: bool = True) -> None:
        """Watch nothing yet.

        Args:
            excluded: Parameters to leave connected.
            rearrange: Whether convolutions may lay their outputs out as is fastest.
        """
        super().__init__()
        self.rearrange = rearrange
        self.excluded = excluded
        self.sites: list[Site] = []
        self.coupled = 0
        self.doubtful = 0
        self.normalized = False
        self._within_reach: tuple[Site, ...] = ()
        self._nodes_seen = _nodes_made()
        self._every: dict[int, str] = {}
        self._data: dict[int, weakref.ref] = {}
        self._viewed: dict[int, weakref.ref] = {}
        self._names: dict[int, str] = {}
        self.parameters: dict[str, torch.Tensor] = {}
        self.computed = ComputedWeights({})

    def watch(self, parameters: Mapping[str, torch.Tensor], examples: Iterable[torch.Tensor]) -> None:
        """Say which tensors are parameters of the kernel, and which are not the model's own.

        Args:
            parameters: Name -> leaf tensor.
            examples: What the model is applied to, and whatever else is computed from examples.
        """
        self._follow(examples)
        self._every = {id(value): name for name, value in parameters.items()}
        self.parameters = {name: value for name, value in parameters.items() if name not in self.excluded}
        self._names = {id(value): name for name, value in self.parameters.items()}
        self.computed = ComputedWeights(self.parameters)

    def __torch_function__(
        self, func: Callable, types: object, args: Sequence = (), kwargs: dict | None = None
    ) -> object:
        """Run one function, and record it if it has a rule.

        Args:
            func: The function.
            types: Not used.
            args: Its positional arguments.
            kwargs: Its named arguments.

        Raises:
            GradientInsideError: It differentiates by a parameter that is not excluded.
        """
        kwargs = kwargs or {}
        if func is torch.Tensor.retain_grad:  # what it keeps would leave torch.func.vmap
            return None
        before = len(self.sites)
        self._notice_unseen(args, kwargs)
        self._notice_access(func, args)
        if _inside_transform():
            self.doubtful = before
        if not torch.is_grad_enabled() or _inside_transform():
            output = func(*args, **kwargs)
            self._nodes_seen = _nodes_made()
            self._follow(output, args, kwargs)
            return output
        if func is F.multi_head_attention_forward and (attended := self._attend(args, kwargs)) is not None:
            return attended
        output = self._record(func, args, kwargs)
        self._nodes_seen = _nodes_made()
        self._follow(output, args, kwargs)
        if all(self._named(leaf) for leaf in tree_leaves(output)):  # a weight that is computed
            return output
        if normalizes_over_batch(func, args, kwargs):
            self.coupled, self.normalized = before, True
        elif not keeps_examples_apart(func, args, kwargs, output):
            self._viewed |= {id(leaf._base): weakref.ref(leaf._base) for leaf in _tensors(output) if leaf._is_view()}
            self.doubtful = before if _may_carry_gradients(output) else self.doubtful
        elif self._holds(self._viewed, output) and any(output is leaf for leaf in args):  # its views change with it
            self.doubtful = before
        return output

    def _attend(self, args: Sequence, kwargs: dict) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Multi-head attention with its projections recorded, or None; that examples do not meet is to be tested."""
        if not (self.rearrange and self._of_examples(args, kwargs)) or _recomputed():
            return None

        def project(x: torch.Tensor, *weight: torch.Tensor | None) -> torch.Tensor:
            self._follow(x)  # where a query is learned, it is still what a weight is applied to
            return self._record(F.linear, (x, *weight), {})

        output = attend(project, *args, **kwargs)
        self._follow(output)
        self.doubtful = len(self.sites)
        self._nodes_seen = _nodes_made()
        return output

    def __enter__(self) -> Self:
        """Start to watch."""
        self._nodes_seen = _nodes_made()
        return super().__enter__()

    def __exit__(self, *exception: object) -> None:
        """Stop watching."""
        self._notice_unseen()
        super().__exit__(*exception)

    def _notice_unseen(self, *arguments: object) -> None:
        """Doubt what was computed past `__torch_function__`: in an autograd.Function, TorchScript, another thread."""
        unknown = [leaf for leaf in _tensors(arguments) if self._of_unknown_origin(leaf)]
        self._follow(unknown)  # they may be made of examples, and are doubted once
        if unknown or _nodes_made() != self._nodes_seen:
            self.doubtful = len(self.sites)

    def _of_unknown_origin(self, value: torch.Tensor) -> bool:
        """Whether a tensor has a graph, and was neither made of examples nor of parameters here."""
        return value.grad_fn is not None and not self._of_data(value) and self._named(value) is None

    def _notice_access(self, func: Callable, args: Sequence) -> None:
        """Doubt what a model does to the graph itself.

        Raises:
            GradientInsideError: It differentiates by a parameter that is not excluded.
        """
        if func is torch.autograd.grad:
            names = [name for leaf in tree_leaves(args[1]) if (name := self._named(leaf))]
            if names:
                raise GradientInsideError(frozenset().union(*map(self.computed.sources, names)))
        if func in _HOOKED and not _called_by_torch():
            self.doubtful = len(self.sites)
            if func is not torch.Tensor.register_hook:
                self._within_reach = tuple(self.sites)

    def _record(self, func: Callable, args: Sequence, kwargs: dict) -> Any:
        """Run one function, and note the call if all that its parameters reach is its output."""
        rule = find_rule(func)
        factors = rule(self._named, *args, **kwargs) if rule and self._of_examples(args, kwargs) else []
        names = Counter(factor.name for factor in factors)
        sources = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)] if factors else []
        if names != Counter(name for leaf in sources if (name := self._named(leaf)) in names):
            return self._run(func, args, kwargs, ())  # a weight that is its own input has a second gradient
        weights = [
            self.computed.tensors[name] if name in self.computed.tensors else self.parameters[name] for name in names
        ]
        aliases = {id(weight): weight.detach().requires_grad_() for weight in weights}
        if aliases:
            args, kwargs = tree_map(lambda leaf: aliases.get(id(leaf), leaf), (args, kwargs))
        output = self._run(func, args, kwargs, aliases.values())
        if not factors or output.numel() == 0:  # nothing depends on an empty output
            return output
        if output._is_view():  # an in-place operation on a view would reroute the graph around it
            output = output.clone()
        versions = tuple((source, source._version) for source in sources if not source.is_inference())
        edge = get_gradient_edge(output)
        inputs = [source for source in sources if source.requires_grad and id(source) not in aliases]
        inside = frozenset(_nodes(edge.node, {get_gradient_edge(source).node for source in inputs}))
        self.sites.append(Site(edge, tuple(output.shape), tuple(factors), versions, inside))
        return output

    def _run(self, func: Callable, args: Sequence, kwargs: dict, aliases: Iterable[torch.Tensor]) -> Any:
        """Run one function, a convolution in its faster form unless its weight or bias must be differentiated by."""
        if not self.rearrange or _recomputed():
            return func(*args, **kwargs)
        known = {id(alias) for alias in aliases}
        rest = [leaf for leaf in (*args[1:], *kwargs.values()) if isinstance(leaf, torch.Tensor)]
        if func in LAYOUTS and all(id(leaf) in known or not leaf.requires_grad for leaf in rest):
            return convolve(func, *args, **kwargs)
        if func in _OF_LAYOUT and args and isinstance(args[0], torch.Tensor):
            args = args[0].contiguous(), *args[1:]
        return func(*args, **kwargs)

    def _follow(self, made: object, *sources: object) -> None:
        """Note that tensors are made of examples, if any of their sources is."""
        if not sources or any(self._of_data(leaf) for leaf in tree_leaves(sources)):
            self._data |= {id(leaf): weakref.ref(leaf) for leaf in _tensors(made)}

    def _of_data(self, value: object) -> bool:
        return self._holds(self._data, value)

    @staticmethod
    def _holds(known: Mapping[int, weakref.ref], value: object) -> bool:
        """Whether a tensor is among those known, and not another one in the place of one that is gone."""
        found = known.get(id(value))
        return found is not None and found() is value

    def _named(self, value: object) -> str | None:
        """The name of a parameter, or one for a weight computed from parameters."""
        if not isinstance(value, torch.Tensor):
            return None
        name = self._names.get(id(value))
        return self.computed.name(value) if name is None and not self._of_data(value) else name

    def _of_examples(self, args: Sequence, kwargs: dict) -> bool:
        """Whether a call applies a weight to something else, and does not compute one."""
        named = [
            self._named(leaf) is not None for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        ]
        return any(named) and not all(named)

    def prune(self, output: torch.Tensor) -> None:
        """Forget the calls that the output does not depend on, as behind the last statistics of a reference batch.

        Args:
            output: Of the model.
        """
        reached = ancestors(output)
        kept = [(number, site) for number, site in enumerate(self.sites) if not site.inside.isdisjoint(reached)]
        self.coupled = sum(number < self.coupled for number, _ in kept)
        self.doubtful = sum(number < self.doubtful for number, _ in kept)
        self.sites = [site for _, site in kept]

    @property
    def recorded(self) -> set[str]:
        """The parameters of all recorded calls."""
        return self._sources(self.sites)

    def _sources(self, sites: Iterable[Site]) -> set[str]:
        return {name for site in sites for factor in site.factors for name in self.computed.sources(factor.name)}

    def connected(self, output: torch.Tensor) -> set[str]:
        """Parameters that the output depends on through a use without a rule.

        Args:
            output: Of the model.
        """
        leaves = {id(getattr(node, "variable", None)) for node in ancestors(output)} | {id(output)}
        return {self._every[key] for key in leaves if key in self._every}

    def doubtful_sites(self) -> range:
        """Numbers of the sites of which it must be tested whether examples meet behind them."""
        return range(self.coupled, self.doubtful)

    def apart(self, output: torch.Tensor) -> bool:
        """Whether it is known, without a test, that no example acts on another on the way to the output.

        Args:
            output: Of the model.
        """
        certain = not (self.normalized or self.doubtful_sites() or self.connected(output))
        return certain and all(site.shape[:1] == output.shape[:1] for site in self.sites)

    def leaks(self, output: torch.Tensor) -> set[str]:
        """Recorded parameters that must not have been.

        They are also used without a rule, or with inputs changed in place, or the model may have hooks on the graph.

        Args:
            output: Of the model.
        """
        changed = [site for site in self.sites if any(source._version != version for source, version in site.sources)]
        misused = self._sources((*changed, *self._within_reach, *self._bypassed(output)))
        return self.recorded & self.connected(output) | misused

    def _bypassed(self, output: torch.Tensor) -> list[Site]:
        """Calls whose parameters the output depends on otherwise than through the output of the call."""
        homes = {node: site for site in self.sites for node in site.inside}
        return [
            homes[parent]
            for node in ancestors(output)
            for parent, _ in node.next_functions
            if parent in homes and parent != homes[parent].edge.node and homes.get(node) is not homes[parent]
        ]


def _tensors(values: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _may_carry_gradients(output: object) -> bool:
    """Whether what a call returns may depend on parameters; a call that returns nothing has changed something."""
    leaves = tree_leaves(output)
    return output is None or any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves)


def _nodes_made() -> int:
    """Nodes of autograd graphs that this thread has made so far."""
    return torch.autograd._get_sequence_nr()


def _recomputed() -> bool:
    """Whether the backward pass will run the model's own calls again, as `torch.utils.checkpoint` has it."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _called_by_torch() -> bool:
    """Whether it is no model that calls the method under watch, but a tool of torch, such as a flop counter."""
    callers = (frame.f_globals.get("__name__", "") for frame, _ in walk_stack(sys._getframe()))
    between = {__name__, "torch.overrides", "torch._tensor"}
    return next(name for name in callers if name not in between).startswith("torch.")


def _inside_transform() -> bool:
    """Whether the model is inside a transform of torch.func, where tensors stand for batches or for dual numbers."""
    return torch._C._functorch.maybe_current_level() is not None


def ancestors(output: torch.Tensor) -> set[Node]:
    """Nodes of the autograd graph that a tensor is computed by.

    Args:
        output: Of the model.
    """
    return set() if output.grad_fn is None else _nodes(output.grad_fn, ())


def _nodes(start: Node, outside: Iterable[Node]) -> set[Node]:
    """Nodes of the graph that lead to one, those outside and what lies behind them left out."""
    seen: set[Node] = {start}
    excluded = set(outside) - seen
    stack = [start]
    while stack:
        for parent, _ in stack.pop().next_functions:
            if parent is not None and parent not in seen and parent not in excluded:
                seen.add(parent)
                stack.append(parent)
    return seen
