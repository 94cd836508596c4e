"""A network as plain data, for code that does not know PyTorch: each operation by kind, with its numbers.

Nothing is guessed: what has no kind, or whose arguments cannot be read, is "unsupported", with the reason.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from mimicnorm._validation import check_example_input, check_network
from mimicnorm.convert import row_projections
from mimicnorm.graph import Node, call, is_leaf, read_graph, tensors
from mimicnorm.layer_kinds import (
    Call,
    Fields,
    UnsupportedError,
    activation_call,
    arrays,
    call_fields,
    function_name,
    module_fields,
    rank_after,
    weighted_tensor,
    writes_over_input,
)
from mimicnorm.operations import WeightLayer
from mimicnorm.snapshot import undisturbed
from mimicnorm.state import STATE

FORMAT = 1
"""Version of the description."""


def describe(model: nn.Module, example_input: Any = None, *, weights: bool = False) -> dict[str, Any]:
    """A network as dicts, lists, strings and numbers, which `json.dumps` takes as they are.

    The result is {"format": 1, "input_shape": list or None, "training": bool, "layers": list}. Layers come in execution
    order, the last is the output, and the network's input goes by the name "input". Each has "name" (its path, or a
    made-up one such as "add_1"), "kind", "inputs" (names), and

    | kind | more |
    |---|---|
    | linear | in_features, out_features, bias, weight_mean, trainable, weight_variance, bias_variance |
    | conv1d, conv2d | in_channels, out_channels, kernel_size, stride, padding (list or "same"), padding_mode, dilation,
      groups, and from bias on as linear |
    | batch_norm | features, eps, affine (a trainable gain and shift), neutral (gain 1, shift 0; None on meta),
      momentum, track |
    | activation | activation: relu, leaky_relu (negative_slope), gelu, gelu_tanh, silu, tanh, erf, sine or abs |
    | avg_pool | kernel_size, stride, padding, count_include_pad |
    | global_avg_pool | keepdim |
    | scale | factor, trainable |
    | add, flatten, identity | |
    | unsupported | type (of the module or function), reason |

    weight_mean says that the layer computes and trains with the centred weight, by `MimicNorm`'s projection after the
    step or in the forward pass. weight_variance and bias_variance are the mean squares of the entries, that of a
    centred weight per degree of freedom, n - 1 in a row of n: of the weight that was centred. Dropout that is idle is
    an identity; BatchNorm uses the statistics of the batch where "training" is true, or track false.

    Args:
        model: A network; left as it was.
        example_input: One batch, or a tuple of positional or a mapping of keyword arguments. Gives "input_shape"
            (without the batch), and reads a network that torch.fx cannot, whose function calls are then unsupported
            if they take arguments.
        weights: Whether to add the stored "weight" and "bias_values" of weighted layers, and these, "running_mean" and
            "running_var" of BatchNorm, as NumPy arrays in the network's dtype (None where there is none).

    Returns:
        The description.

    Raises:
        ValueError: If the model is no network, cannot be read, has lazy parameters, or has not one input and one
            output; with weights, if a tensor has no values or none that NumPy can hold.
    """
    check_network(model)
    lazy = next((name for name, value in model.named_parameters() if nn.parameter.is_lazy(value)), None)
    if lazy is not None:
        raise ValueError(f"model must have shapes; got the lazy parameter {lazy!r}: run one forward pass first.")
    shape = None
    if example_input is not None:
        check_example_input(
            model, lambda: tensors(call(model, example_input)), type(example_input).__name__, classes=None
        )
        shape = next((list(tensor.shape) for tensor in tensors(example_input)), None)
    whole = nn.Sequential(model) if is_leaf(model) else model
    axes = None if shape is None else len(shape)
    describer = _Describer(whole, training=model.training, weights=weights, axes=axes)
    layers = describer.layers(_read(whole, example_input))
    input_shape = None if shape is None else shape[1:]
    return {"format": FORMAT, "input_shape": input_shape, "training": model.training, "layers": layers}


@dataclass(eq=False)
class _Step:
    """One operation as read.

    Attributes:
        key: What stands for its result among the arguments of others.
        op: "input", "module", "function", "output", or anything else for a stored tensor.
        target: The module's path, the function, the method's name, or the stored tensor's.
        module: The module called, if any.
        args: Positional arguments, results of other steps by their keys; only these where `seen` is false.
        kwargs: Keyword arguments.
        sources: Keys of all results among the arguments.
        seen: Whether args and kwargs are those of the call.
    """

    key: Any
    op: str
    target: Any
    module: nn.Module | None
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    sources: tuple[Any, ...]
    seen: bool = True


class _Tracer(fx.Tracer):
    """Keeps whole what `read_graph` keeps whole."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m)


def _read(model: nn.Module, example_input: Any) -> list[_Step]:
    """The operations by torch.fx, which gives the arguments of calls; else by `read_graph`, which does not."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    defaults = {entry.name: entry.default for entry in parameters[1:] if entry.default is not entry.empty}
    try:
        with undisturbed(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of defaults that torch.fx takes as they are
            graph = _Tracer().trace(model, defaults)
    except Exception:  # whatever stops torch.fx, read_graph runs the network or says what is missing
        nodes = read_graph(model, example_input)
        return [_Step(n, n.op, n.target, n.module, n.inputs, {}, n.inputs, seen=False) for n in nodes]
    modules = dict(model.named_modules(remove_duplicate=False))
    ops = {"placeholder": "input", "call_module": "module", "output": "output", "get_attr": "stored"}
    steps = []
    for node in graph.nodes:
        op = ops.get(node.op, "function")
        module = modules[str(node.target)] if op == "module" else None
        steps.append(_Step(node, op, node.target, module, node.args, node.kwargs, tuple(node.all_input_nodes)))
    return steps


class _Describer:
    """Turns steps into layers.

    Args:
        model: The network.
        training: Whether it is in train mode.
        weights: Whether to add its tensors.
        axes: Number of axes of its input, None where unknown.
    """

    def __init__(self, model: nn.Module, *, training: bool, weights: bool, axes: int | None) -> None:
        self.model = model
        self.training = training
        self.weights = weights
        self.axes = axes
        self.names: dict[Any, str] = {}
        self.rank: dict[str, int | None] = {}
        self.origin: dict[str, str] = {}
        self.writer: dict[str, str] = {}
        self.owner: dict[int, str] = {}
        self.paths = {path for path, _ in model.named_modules(remove_duplicate=False)}
        self.projections: dict[int, Callable[[Tensor], Tensor]] = {}
        for module in model.modules():
            if STATE in vars(module):
                inner = row_projections(module)
                self.projections |= {id(module.get_parameter(name)): inner[name] for name in inner}

    def layers(self, steps: Sequence[_Step]) -> list[Fields]:
        """All layers that the output depends on.

        Raises:
            ValueError: If there is not one input and one output, or nothing between them.
        """
        inputs: list[str] = []
        found: list[Fields] = []
        for step in steps:
            if step.op == "input":
                inputs.append(f"input_{len(inputs) + 1}" if inputs else "input")
                self.names[step.key] = inputs[-1]
                self.rank[inputs[-1]] = self.axes
            elif step.op in ("module", "function") and not self._is_size(step):
                found.append(self._layer(step))
        result = steps[-1].args[0] if len(steps[-1].args) == 1 else None
        output = self.names.get(result, "") if isinstance(result, fx.Node | Node) else ""
        if not output or output in inputs:
            raise ValueError(
                "model must return one tensor that it computes from its input; got another output: return the tensor "
                "whose kernel is wanted."
            )
        needed = {output}
        for layer in reversed(found):
            if layer["name"] in needed:
                needed.update(layer["inputs"])
        if (used := needed & set(inputs)) != {"input"}:
            raise ValueError(
                "model must compute its output from one tensor, its first argument; got "
                f"{', '.join(sorted(used))}: wrap it in a module that takes one tensor."
            )
        return [layer for layer in found if layer["name"] in needed]

    def _is_size(self, step: _Step) -> bool:
        """Whether a call gives a number or a shape, or works on such and on constants alone."""
        attribute = step.target is getattr and step.args[1] in ("shape", "ndim", "dtype", "device")
        return attribute or step.target in ("size", "dim", "numel") or not self._sources(step)

    def _sources(self, step: _Step) -> list[str]:
        return [self.names[key] for key in step.sources if key in self.names]

    def _layer(self, step: _Step) -> Fields:
        """One operation with its name, inputs, kind and numbers."""
        inputs = self._sources(step)
        rank = self.rank[inputs[0]]
        call = self._call(step)
        try:
            fields = self._fields(step, call, inputs)
        except UnsupportedError as reason:
            title = type(step.module).__name__ if step.module is not None else call.name
            title = title or getattr(step.target, "__name__", str(step.target))
            fields = {"kind": "unsupported", "type": title, "reason": str(reason)}
        if fields["kind"] == "add":  # a tensor added to itself counts twice
            inputs = [self.names[call.argument(0, "input")], self.names[call.argument(1, "other")]]
        name = self._new_name(step, call.name)
        self.names[step.key], self.rank[name] = name, rank_after(fields, rank)
        origin = self.origin.get(inputs[0], inputs[0])
        if step.seen and writes_over_input(step.module, call):
            self.writer[origin] = name
        elif fields["kind"] in ("identity", "flatten"):
            self.origin[name] = origin
        return {"name": name, "kind": fields.pop("kind"), "inputs": inputs, **fields}

    def _new_name(self, step: _Step, function: str) -> str:
        """A module's path at its first call; else that or the function's name with the first number that is free."""
        if step.module is not None and step.target not in self.rank:
            return str(step.target)
        base = str(step.target) if step.module is not None else function.strip("_") or "call"
        number = 1 if step.module is None else 2
        while (name := f"{base}_{number}") in self.rank or name in self.paths:
            number += 1
        return name

    def _fields(self, step: _Step, call: Call, inputs: Sequence[str]) -> Fields:
        """Kind and numbers.

        Raises:
            UnsupportedError: If there is no kind.
        """
        for source in inputs:
            if (writer := self.writer.get(self.origin.get(source, source))) is not None:
                raise UnsupportedError(f"reads a tensor that {writer!r} has written over")
        rank = self.rank[inputs[0]]
        if step.module is None:
            known = activation_call(call.name) if len(step.sources) == 1 else None
            if known is not None or step.seen:
                return known or call_fields(call, rank)
            raise UnsupportedError("is called with arguments that a network read by running it does not show")
        weighted = isinstance(step.module, WeightLayer)
        stored = weighted_tensor(step.module) if weighted else None
        fields = module_fields(step.module, rank, self.projections.get(id(stored)))
        if stored is not None:
            owner = self.owner.setdefault(id(stored), str(step.target))
            if owner != step.target or owner in self.rank:
                raise UnsupportedError(f"shares its weight with {owner!r}")
        if fields["kind"] == "batch_norm" and step.module.training != self.training:
            raise UnsupportedError("is not in the mode, train or eval, of the network")
        if self.weights and (weighted or fields["kind"] == "batch_norm"):
            fields |= arrays(step.module)
        return fields

    def _call(self, step: _Step) -> Call:
        """The call of a function as its kind needs it."""
        name = "" if step.module is not None else function_name(step.target)
        return Call(name, step.args, step.kwargs, self._is_computed, self._stored, _is_batch_size)

    def _is_computed(self, argument: Any) -> bool:
        return isinstance(argument, fx.Node) and argument in self.names

    def _stored(self, argument: Any) -> Tensor | None:
        if not isinstance(argument, fx.Node) or argument.op != "get_attr":
            return None
        owner, _, name = str(argument.target).rpartition(".")
        return getattr(self.model.get_submodule(owner), name)


def _is_batch_size(argument: Any) -> bool:
    """Whether an argument is x.size(0) or x.shape[0]: no operation with a kind changes the number of examples."""
    if not isinstance(argument, fx.Node):
        return False
    if argument.target == "size":
        return argument.args[1:] == (0,)
    whole = argument.args[0] if function_name(argument.target) == "getitem" and argument.args[1] == 0 else None
    return isinstance(whole, fx.Node) and (
        (whole.target == "size" and len(whole.args) == 1) or (whole.target is getattr and whole.args[1] == "shape")
    )
