"""Record, during one forward pass, what the gradients of its parameters are made of.

A function that has a rule (ntk/factors.py) receives a detached alias of its parameter, so that whatever connects
the parameter to the output afterwards is a use without a rule: `Capture.leaks` names it, and it goes to the exact
Jacobian contraction instead. Layer outputs are held as edges of the autograd graph: a later in-place activation changes
the tensor, not the edge.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from ntk.factors import Factor
from ntk.layer_rules import couples_examples, find_rule


@dataclass(frozen=True, eq=False)
class Site:
    """One call that uses parameters.

    Attributes:
        edge: Of the output in the autograd graph.
        shape: Of the output.
        factors: What the gradients are made of, one entry for each parameter.
        sources: Tensors that the factors read later -> their version when the call was made.
    """

    edge: GradientEdge
    shape: tuple[int, ...]
    factors: tuple[Factor, ...]
    sources: tuple[tuple[torch.Tensor, int], ...]


class Capture(TorchFunctionMode):
    """Watches the calls of PyTorch functions while a model runs.

    Attributes:
        sites: Calls recorded, in their order.
        coupled: How many of the first sites lie before a layer that normalizes over the batch.
    """

    def __init__(self, excluded: set[str]) -> None:
        """Watch nothing yet.

        Args:
            excluded: Parameters to leave connected.
        """
        super().__init__()
        self.excluded = excluded
        self.sites: list[Site] = []
        self.coupled = 0
        self._every: dict[int, str] = {}
        self._names: dict[int, str] = {}
        self._parameters: dict[str, torch.Tensor] = {}

    def watch(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Say which tensors are parameters of the kernel.

        Args:
            parameters: Name -> leaf tensor.
        """
        self._every = {id(value): name for name, value in parameters.items()}
        self._parameters = {name: value for name, value in parameters.items() if name not in self.excluded}
        self._names = {id(value): name for name, value in self._parameters.items()}

    def __torch_function__(
        self, func: Callable, types: object, args: Sequence = (), kwargs: dict | None = None
    ) -> object:
        """Run one function, and record it if it has a rule.

        Args:
            func: The function.
            types: Not used.
            args: Its positional arguments.
            kwargs: Its named arguments.
        """
        kwargs = kwargs or {}
        rule = find_rule(func)
        if rule is None or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if couples_examples(func, args, kwargs):
            self.coupled = len(self.sites)
        factors = rule(self._named, *args, **kwargs) if self._watched(args, kwargs) else []
        if not factors:
            return func(*args, **kwargs)
        names = {factor.name for factor in factors}
        aliases = {id(self._parameters[name]): self._parameters[name].detach().requires_grad_() for name in names}
        sources = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if couples_examples(func, args, kwargs):
            sources = sources[:1]  # the running statistics are written to, and not read
        args, kwargs = tree_map(lambda leaf: aliases.get(id(leaf), leaf), (args, kwargs))
        output = func(*args, **kwargs)
        if output._is_view():  # an in-place operation on a view would reroute the graph around it
            output = output.clone()
        versions = tuple((source, source._version) for source in sources)
        self.sites.append(Site(get_gradient_edge(output), tuple(output.shape), tuple(factors), versions))
        return output

    def _named(self, value: object) -> str | None:
        return self._names.get(id(value)) if isinstance(value, torch.Tensor) else None

    def _watched(self, args: Sequence, kwargs: dict) -> bool:
        return any(id(leaf) in self._names for leaf in (*args, *kwargs.values()))

    def connected(self, output: torch.Tensor) -> set[str]:
        """Parameters that the output depends on through a use without a rule.

        Args:
            output: Of the model.
        """
        return {self._every[key] for key in _leaves(output) if key in self._every}

    def leaks(self, output: torch.Tensor) -> set[str]:
        """Recorded parameters that must not have been: also used without a rule, or with inputs changed in place.

        Args:
            output: Of the model.
        """
        recorded = {factor.name for site in self.sites for factor in site.factors}
        stale = {
            factor.name
            for site in self.sites
            if any(source._version != version for source, version in site.sources)
            for factor in site.factors
        }
        return recorded & (self.connected(output) | stale)


def _leaves(output: torch.Tensor) -> set[int]:
    """Identities of the leaf tensors that a tensor is connected to."""
    if output.grad_fn is None:
        return {id(output)}
    found: set[int] = set()
    seen: set[Node] = {output.grad_fn}
    stack = [output.grad_fn]
    while stack:
        node = stack.pop()
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.add(id(variable))
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return found
