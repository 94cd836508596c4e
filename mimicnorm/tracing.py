"""The structure of a network, read from its torch.fx graph: layers, normalizations, residual branches, head."""

import operator
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from mimicnorm.branch import BranchScalar

WeightLayer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d

_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_FUNCTIONAL = (
    functional.batch_norm,
    torch.batch_norm,
    functional.linear,
    functional.conv1d,
    functional.conv2d,
    functional.conv3d,
)


@dataclass(frozen=True)
class Layer:
    """A Linear or convolution, at its first call.

    Attributes:
        path: Qualified name.
        module: The layer.
        first: Whether it sees the raw input: no other weight layer lies before it.
        normalized: Whether a BatchNorm acts on its output.
    """

    path: str
    module: WeightLayer
    first: bool
    normalized: bool


@dataclass(frozen=True)
class ResidualBlock:
    """A residual addition.

    Attributes:
        number: Position in the network in execution order, from 1.
        branch_end: Path of the last module of the branch, the deeper of the two inputs.
        branch_layers: Number of weight layers in the branch.
        shortcut_end: Path of the last module of the shortcut, None for the identity.
        shortcut_layers: Number of weight layers in the shortcut.
    """

    number: int
    branch_end: str
    branch_layers: int
    shortcut_end: str | None
    shortcut_layers: int


@dataclass(frozen=True)
class Structure:
    """What conversion needs to know about a network.

    Attributes:
        layers: Linear and convolution layers in execution order.
        blocks: Residual blocks in execution order.
        head: The last weight layer before the output.
        head_end: Path of the module after which [N, C] logits are available.
        calls: How often each module is called.
        undecided: Names of additions whose branch and shortcut cannot be told apart.
    """

    layers: tuple[Layer, ...]
    blocks: tuple[ResidualBlock, ...]
    head: Layer
    head_end: str
    calls: dict[str, int]
    undecided: tuple[str, ...]


class _Tracer(fx.Tracer):
    """Keeps our own layers and subclasses of PyTorch's whole."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaf = isinstance(m, (_BatchNorm, _ConvNd, nn.Linear, BranchScalar))
        return leaf or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> Structure:
    """Read the structure of a network without running it.

    Args:
        model: A network that torch.fx can trace and whose layers are modules.

    Returns:
        Its structure.

    Raises:
        ValueError: If torch.fx cannot trace the network, or a weight layer or BatchNorm is a functional call, or there
            is no weight layer.
    """
    try:
        nodes = list(_Tracer().trace(model).nodes)
    except Exception as error:
        raise ValueError(
            f"model must be traceable by torch.fx; {type(model).__name__} is not: {type(error).__name__}: {error}. "
            "Remove control flow that depends on tensor values from forward, or convert the traceable part."
        ) from error
    return _Reader(model, nodes).structure()


class _Reader:
    """Answers questions about one graph."""

    def __init__(self, model: nn.Module, nodes: list[fx.Node]) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.nodes = nodes
        self.order = {node: index for index, node in enumerate(nodes)}
        self.before: dict[fx.Node, set[fx.Node]] = {}
        for node in nodes:
            self.before[node] = set(node.all_input_nodes).union(*(self.before[n] for n in node.all_input_nodes))

    def structure(self) -> Structure:
        for node in self.nodes:
            if node.op == "call_function" and node.target in _FUNCTIONAL:
                raise ValueError(
                    f"model must hold its layers as modules; node {node.name!r} calls {node.target} directly: "
                    "replace it by the torch.nn module of the same name (a lone layer: wrap it in nn.Sequential)."
                )
        layers = self._layers()
        if not layers:
            raise ValueError(
                "model must have at least one Linear or convolution called in forward; got none: nothing to convert."
            )
        blocks, undecided = self._blocks()
        head = self._head(layers)
        calls: dict[str, int] = {}
        for node in self.nodes:
            if node.op == "call_module":
                calls[str(node.target)] = calls.get(str(node.target), 0) + 1
        return Structure(tuple(layers.values()), blocks, head, self._head_end(head), calls, undecided)

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def _is_layer(self, node: fx.Node) -> bool:
        return isinstance(self._module(node), WeightLayer)

    def _layers(self) -> dict[str, Layer]:
        layers: dict[str, Layer] = {}
        for node in self.nodes:
            module = self._module(node)
            path = str(node.target)
            if isinstance(module, WeightLayer) and path not in layers:
                first = not any(self._is_layer(other) for other in self.before[node])
                normalized = any(isinstance(self._module(user), _BatchNorm) for user in node.users)
                layers[path] = Layer(path, module, first, normalized)
        return layers

    def _blocks(self) -> tuple[tuple[ResidualBlock, ...], tuple[str, ...]]:
        blocks: list[ResidualBlock] = []
        undecided: list[str] = []
        for node in self.nodes:
            sides = [argument for argument in node.args[:2] if isinstance(argument, fx.Node)]
            if node.op not in ("call_function", "call_method") or node.target not in _ADDITIONS or len(sides) != 2:
                continue
            left, right = (self.before[side] | {side} for side in sides)
            common = left & right
            if not common:
                continue
            fork = max(common, key=self.order.__getitem__)
            depths = [sum(self._is_layer(n) and fork in self.before[n] for n in side) for side in (left, right)]
            if depths == [0, 0]:
                continue
            branch = 0 if depths[0] > depths[1] else 1
            ends = [self._end(side, fork) for side in sides]
            branch_end = ends[branch]
            if depths[0] == depths[1] or branch_end is None:
                undecided.append(node.name)
                continue
            blocks.append(
                ResidualBlock(len(blocks) + 1, branch_end, depths[branch], ends[1 - branch], depths[1 - branch])
            )
        return tuple(blocks), tuple(undecided)

    def _end(self, node: fx.Node, fork: fx.Node) -> str | None:
        """Path of the last module on the way back from a node to the fork."""
        while node is not fork and node.all_input_nodes:
            if node.op == "call_module":
                return str(node.target)
            node = node.all_input_nodes[0]
        return None

    def _head(self, layers: dict[str, Layer]) -> Layer:
        output = self.nodes[-1]
        reached = [node for node in self.nodes if node in self.before[output] and self._is_layer(node)]
        if not reached:
            raise ValueError(
                "model must compute its output from a Linear or convolution; got none on the way: check forward."
            )
        return layers[str(reached[-1].target)]

    def _head_end(self, head: Layer) -> str:
        """The head itself if Linear; else the last module between it and the output (pooling, flatten)."""
        if isinstance(head.module, nn.Linear):
            return head.path
        modules = [node for node in self.nodes if node.op == "call_module" and node in self.before[self.nodes[-1]]]
        return str(modules[-1].target)
