"""Weights that a model computes from its parameters before it applies them, as weight normalization does.

Such a tensor takes part in the layer-wise contraction like a parameter. Gradients by it are written out and pulled back
through its computation, one example after the other, to those by the parameters it is made of.
"""

from collections.abc import Mapping

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge


class ComputedWeights:
    """Tensors that depend on leaves of the autograd graph among the parameters alone."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        """Know no such tensor yet.

        Args:
            parameters: Name -> leaf tensor.
        """
        self._names = {id(value): name for name, value in parameters.items()}
        self._sources: dict[Node, frozenset[str]] = {}
        self._keys: dict[tuple[int, Node], str] = {}
        self.tensors: dict[str, Tensor] = {}
        self.edges: dict[str, GradientEdge] = {}

    def name(self, value: Tensor) -> str | None:
        """A name for such a tensor as it is now, which no parameter can have; None for any other.

        Its edge is kept with it: what is done to it in place, after it was applied, changes how it is computed.

        Args:
            value: A tensor.
        """
        node = value.grad_fn
        if node is None or not self._made_of(node):
            return None
        key = self._keys.setdefault((id(value), node), f"computed.{len(self._keys)}.")
        if key not in self.tensors:
            self.tensors[key], self.edges[key] = value, get_gradient_edge(value)
        return key

    def sources(self, name: str) -> frozenset[str]:
        """The parameters that a tensor is made of.

        Args:
            name: From `name`, or of a parameter, which is made of itself.
        """
        return self._made_of(self.edges[name].node) if name in self.edges else frozenset([name])

    def _made_of(self, start: Node) -> frozenset[str]:
        """Parameters that a node is computed from; none if there is anything else among its leaves."""
        stack = [start]
        while start not in self._sources:
            node = stack[-1]
            if hasattr(node, "variable"):
                name = self._names.get(id(node.variable))
                self._sources[node] = frozenset() if name is None else frozenset([name])
            parents = [parent for parent, _ in node.next_functions if parent is not None]
            known = [self._sources[parent] for parent in parents if parent in self._sources]
            if node not in self._sources and not all(known):
                self._sources[node] = frozenset()
            elif node not in self._sources and len(known) == len(parents):
                self._sources[node] = frozenset().union(*known)
            if node in self._sources:
                stack.pop()
            else:
                stack += [parent for parent in parents if parent not in self._sources]
        return self._sources[start]
