"""What one operation of a network is, as plain data: a kind and its numbers, or why there is none."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from mimicnorm.branch import BranchScalar, ConstantScale
from mimicnorm.normalization import AnyBatchNorm, ExactBatchNorm1d, LastBatchNorm1d
from mimicnorm.operations import is_plain
from mimicnorm.weight_mean import CenteredWeight, RowCentering

Fields = dict[str, Any]
"""The kind of an operation, under "kind", and the numbers that belong to it."""

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, ExactBatchNorm1d, LastBatchNorm1d, AnyBatchNorm)

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)

_ACTIVATIONS = {
    "ReLU": "relu", "SiLU": "silu", "Tanh": "tanh", "relu": "relu", "silu": "silu", "tanh": "tanh", "erf": "erf",
    "sin": "sine", "abs": "abs", "absolute": "abs",
}  # fmt: skip
"""Classes of torch.nn, and functions, that have no argument but their input and perhaps `inplace`."""

_GELU = {"none": "gelu", "tanh": "gelu_tanh"}

_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "padding_mode", "dilation", "groups")

_REASONS: Mapping[str, tuple[str, ...]] = {
    "takes the largest of correlated values": ("MaxPool", "max_pool"),
    "couples the entries of an example": ("softmax",),
    "normalizes each example": ("GroupNorm", "LayerNorm", "InstanceNorm", "RMSNorm", "layer_norm", "group_norm"),
    "weighs values by products of inputs": ("attention",),
    "joins tensors": ("cat", "stack"),
    "takes a part of a tensor": ("chunk", "split", "getitem"),
    "multiplies by a tensor": ("mul", "div", "mm", "einsum"),
}


class UnsupportedError(Exception):
    """An operation has no kind; the text says why."""


@dataclass(frozen=True)
class Call:
    """A call of a function or method.

    Attributes:
        name: Name of the function of PyTorch or of Python's operators, or of the method; empty for any other.
        args: Positional arguments, of a method with its tensor.
        kwargs: Keyword arguments.
        computed: Whether an argument is a tensor that the network computes from its input.
        stored: The parameter or buffer that an argument is, None for any other.
        is_batch_size: Whether an argument is the number of examples.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    computed: Callable[[Any], bool]
    stored: Callable[[Any], Tensor | None]
    is_batch_size: Callable[[Any], bool]

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)


def function_name(target: Any) -> str:
    """Name of a method, or of a function of PyTorch or Python's operators; empty for any other."""
    if isinstance(target, str):
        return target
    name = getattr(target, "__name__", "")
    homes = (torch, functional, operator, Tensor, torch._C._nn)
    return name if any(getattr(home, name, None) is target for home in homes) else ""


def activation_call(name: str) -> Fields | None:
    """The nonlinearity that a function without arguments of its own is; None for any other."""
    known = _ACTIVATIONS.get(name.removesuffix("_"))
    return None if known is None else _activation(known)


def writes_over_input(module: nn.Module | None, call: Call) -> bool:
    """Whether an operation works in place."""
    if module is not None:
        return bool(getattr(module, "inplace", False))
    return call.name in ("iadd", "imul") or call.name.endswith("_") or call.kwargs.get("inplace") is True


def module_fields(module: Any, rank: int | None, projection: object) -> Fields:
    """Kind and numbers of a module.

    Args:
        module: A module that counts as one operation.
        rank: Number of axes of its input, None where unknown.
        projection: What its weight trains under, None for nothing.

    Returns:
        The fields.

    Raises:
        UnsupportedError: If it has no kind.
    """
    kind = type(module)
    if module._forward_hooks or module._forward_pre_hooks:
        raise UnsupportedError("has forward hooks, which may change what it computes")
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d) and is_plain(module):
        return _weighted(module, rank, projection)
    if kind in BATCH_NORMS:
        return _batch_norm(module)
    if kind in _DROPOUTS:
        return _dropout(float(module.p), active=module.training)
    if kind.__module__.startswith("torch.nn.modules.") and kind.__name__ in _ACTIVATIONS:
        return _activation(_ACTIVATIONS[kind.__name__])
    makers: dict[type, Callable[[Any], Fields]] = {
        nn.LeakyReLU: lambda m: _activation("leaky_relu", negative_slope=float(m.negative_slope)),
        nn.GELU: lambda m: _activation(_GELU[m.approximate]),
        nn.Identity: lambda m: {"kind": "identity"},
        nn.Flatten: lambda m: _flatten(m.start_dim, m.end_dim, rank),
        nn.AvgPool1d: lambda m: _avg_pool(m, 1),
        nn.AvgPool2d: lambda m: _avg_pool(m, 2),
        nn.AdaptiveAvgPool1d: lambda m: _adaptive_pool(m.output_size),
        nn.AdaptiveAvgPool2d: lambda m: _adaptive_pool(m.output_size),
        ConstantScale: lambda m: {"kind": "scale", "factor": float(m.value), "trainable": False},
        BranchScalar: lambda m: _scalar(m.scalar),
    }
    if kind not in makers:
        raise UnsupportedError(_reason(kind.__name__))
    return makers[kind](module)


def call_fields(call: Call, rank: int | None) -> Fields:
    """Kind and numbers of a call whose arguments are known.

    Args:
        call: The call.
        rank: Number of axes of its first tensor, None where unknown.

    Returns:
        The fields; "identity" for what changes no value.

    Raises:
        UnsupportedError: If it has no kind.
    """
    name, argument = call.name.removesuffix("_"), call.argument
    if name in ("add", "iadd"):
        return _addition(call)
    if name in ("mul", "multiply", "imul"):
        return _product(call)
    if name in ("div", "truediv"):
        divisor = argument(1, "other")
        if isinstance(divisor, int | float) and not call.kwargs:
            return {"kind": "scale", "factor": 1 / divisor, "trainable": False}
        raise UnsupportedError(_reason("div"))
    makers: dict[str, Callable[[], Fields]] = {
        "leaky_relu": lambda: _activation("leaky_relu", negative_slope=float(argument(1, "negative_slope", 0.01))),
        "gelu": lambda: _activation(_GELU[argument(1, "approximate", "none")]),
        "dropout": lambda: _dropout(float(argument(1, "p", 0.5)), active=argument(2, "training", True)),
        "contiguous": lambda: {"kind": "identity"},
        "flatten": lambda: _flatten(argument(1, "start_dim", 0), argument(2, "end_dim", -1), rank),
        "view": lambda: _view(call),
        "reshape": lambda: _view(call),
        "mean": lambda: _mean(argument(1, "dim"), rank, keepdim=bool(argument(2, "keepdim", False))),
        "adaptive_avg_pool1d": lambda: _adaptive_pool(argument(1, "output_size")),
        "adaptive_avg_pool2d": lambda: _adaptive_pool(argument(1, "output_size")),
    }
    if name not in makers:
        raise UnsupportedError(_reason(name))
    return makers[name]()


def rank_after(fields: Fields, rank: int | None) -> int | None:
    """Number of axes behind an operation, None where unknown."""
    known = {"conv1d": 3, "conv2d": 4, "flatten": 2, "unsupported": None}
    if fields["kind"] == "global_avg_pool" and not fields["keepdim"]:
        return 2
    return known.get(fields["kind"], rank)


def weighted_tensor(module: Any) -> Tensor:
    """The stored weight of a Linear or convolution, the first of several that it is computed from."""
    if not parametrize.is_parametrized(module, "weight"):
        return module.weight
    return next(module.parametrizations.weight.parameters(recurse=False))


def arrays(module: Any) -> Fields:
    """The stored tensors of a weighted layer or BatchNorm, copied to NumPy; None where there is none.

    Raises:
        ValueError: If one has no values, or a type that NumPy lacks.
    """
    named: dict[str, Tensor | None]
    if isinstance(module, BATCH_NORMS):
        named = {"weight": module.weight, "bias_values": module.bias}
        named |= {"running_mean": module.running_mean, "running_var": module.running_var}
    else:
        named = {"weight": weighted_tensor(module), "bias_values": module.bias}
    for name, tensor in named.items():
        if tensor is not None and (tensor.is_meta or tensor.dtype is torch.bfloat16):
            kind = "one on the meta device" if tensor.is_meta else "one of bfloat16"
            raise ValueError(
                f"model must hold values of a type that NumPy has for weights=True; got {name} of "
                f"{type(module).__name__}, {kind}: load a state dict on a device, or pass model.float()."
            )
    return {name: None if t is None else t.detach().cpu().numpy().copy() for name, t in named.items()}


def _weighted(module: nn.Linear | nn.Conv1d | nn.Conv2d, rank: int | None, projection: object) -> Fields:
    """A Linear or convolution that computes with its own weight, or with that weight centred.

    Raises:
        UnsupportedError: If it computes or trains with anything else, or on another axis.
    """
    centred = False
    for name, entries in getattr(module, "parametrizations", {}).items():
        makers = [type(entry).__name__ for entry in entries]
        centred = name == "weight" and makers == [CenteredWeight.__name__] and type(entries[0]) is CenteredWeight
        if not centred:
            raise UnsupportedError(f"computes its {name} by {', '.join(makers)}")
    if projection is not None and not isinstance(projection, RowCentering):
        raise UnsupportedError(f"trains under the projection {projection}")
    linear = isinstance(module, nn.Linear)
    if linear and rank is not None and rank > 2:
        raise UnsupportedError(f"acts on the last of {rank} axes")
    kind = "linear" if linear else "conv1d" if isinstance(module, nn.Conv1d) else "conv2d"
    fields: Fields = {"kind": kind}
    for name in ("in_features", "out_features") if linear else _CONV:
        value = getattr(module, name)
        fields[name] = list(value) if isinstance(value, tuple) else value
    if fields.get("padding") == "valid":
        fields["padding"] = [0] * len(fields["kernel_size"])
    centred = centred or projection is not None
    weight = weighted_tensor(module)
    return fields | {
        "bias": module.bias is not None,
        "weight_mean": centred,
        "trainable": weight.requires_grad and (module.bias is None or module.bias.requires_grad),
        "weight_variance": _weight_variance(weight.detach(), centred=centred),
        "bias_variance": None if module.bias is None else _mean_square(module.bias.detach()),
    }


def _weight_variance(weight: Tensor, *, centred: bool) -> float | None:
    """Mean square of the entries; of a centred weight, before centring: a row of n keeps n - 1 degrees of freedom."""
    if not centred:
        return _mean_square(weight)
    rows = weight.flatten(1)
    mean_square = _mean_square(rows - rows.mean(1, keepdim=True))
    return None if mean_square is None else mean_square * rows.shape[1] / (rows.shape[1] - 1)


def _mean_square(values: Tensor) -> float | None:
    return None if values.is_meta else float(values.double().square().mean())


def _batch_norm(module: Any) -> Fields:
    parts = [part for part in (module.weight, module.bias) if part is not None]
    trained = [part for part in parts if part.requires_grad]
    if len(trained) == 1:
        raise UnsupportedError("trains its gain or its shift, not both")
    neutral: bool | None = True
    if parts:
        known = not any(part.is_meta for part in parts)
        neutral = bool((module.weight == 1).all() and (module.bias == 0).all()) if known else None
    if not trained and neutral is False:
        raise UnsupportedError("has a frozen gain or shift other than 1 and 0")
    return {
        "kind": "batch_norm",
        "features": module.num_features,
        "eps": float(module.eps),
        "affine": bool(trained),
        "neutral": neutral,
        "momentum": module.momentum,
        "track": module.running_mean is not None,
    }


def _activation(name: str, **more: float) -> Fields:
    return {"kind": "activation", "activation": name, **more}


def _dropout(p: float, *, active: bool) -> Fields:
    if active and p > 0:
        raise UnsupportedError(f"drops at random with p = {p:g} in train mode; model.eval() idles it")
    return {"kind": "identity"}


def _flatten(start: int, end: int, rank: int | None) -> Fields:
    if start != 1 or (end != -1 and (rank is None or end != rank - 1)):
        raise UnsupportedError(f"flattens axes {start} to {end}, not all but the first")
    return {"kind": "flatten"}


def _view(call: Call) -> Fields:
    """A reshape to (number of examples, the rest).

    Raises:
        UnsupportedError: If it is to another shape.
    """
    shape = call.args[1] if len(call.args) == 2 and isinstance(call.args[1], tuple | list) else call.args[1:]
    if len(shape) != 2 or not call.is_batch_size(shape[0]) or shape[1] != -1:
        raise UnsupportedError("reshapes to another shape than (x.size(0), -1)")
    return {"kind": "flatten"}


def _mean(dim: Any, rank: int | None, *, keepdim: bool) -> Fields:
    """A mean over all axes behind the channels.

    Raises:
        UnsupportedError: If it is over others, or that cannot be known.
    """
    if rank is None:
        raise UnsupportedError("averages a tensor of an unknown number of axes; pass example_input")
    axes = sorted(axis % rank for axis in (dim if isinstance(dim, tuple | list) else [dim] if dim is not None else []))
    if rank < 3 or axes != list(range(2, rank)):
        raise UnsupportedError(f"averages over {dim}, not over all positions")
    return {"kind": "global_avg_pool", "keepdim": keepdim}


def _avg_pool(module: Any, axes: int) -> Fields:
    if module.ceil_mode or getattr(module, "divisor_override", None) is not None:
        raise UnsupportedError("pools with ceil_mode or divisor_override")
    given = {name: getattr(module, name) for name in ("kernel_size", "stride", "padding")}
    sizes = {name: list(v) if isinstance(v, tuple | list) else [v] * axes for name, v in given.items()}
    return {"kind": "avg_pool", **sizes, "count_include_pad": module.count_include_pad}


def _adaptive_pool(size: Any) -> Fields:
    if any(entry != 1 for entry in (size if isinstance(size, tuple | list) else [size])):
        raise UnsupportedError(f"pools to {size} positions, not to one")
    return {"kind": "global_avg_pool", "keepdim": True}


def _addition(call: Call) -> Fields:
    parts = call.argument(0, "input"), call.argument(1, "other")
    if call.kwargs.get("alpha", 1) != 1 or len(call.args) > 2:
        raise UnsupportedError("adds a multiple")
    if call.computed(parts[0]) and call.computed(parts[1]):
        return {"kind": "add"}
    if any(isinstance(part, int | float) and part == 0 for part in parts):
        return {"kind": "identity"}
    raise UnsupportedError("adds a constant")


def _product(call: Call) -> Fields:
    """A multiple by a number, or by a parameter of one entry.

    Raises:
        UnsupportedError: If it is by anything else.
    """
    parts = call.argument(0, "input"), call.argument(1, "other")
    factors = [part for part in parts if not call.computed(part)]
    if len(factors) == 1 and isinstance(factors[0], int | float):
        return {"kind": "scale", "factor": float(factors[0]), "trainable": False}
    stored = call.stored(factors[0]) if len(factors) == 1 else None
    if stored is not None and stored.numel() == 1:
        return _scalar(stored)
    raise UnsupportedError(_reason("mul"))


def _scalar(value: Tensor) -> Fields:
    if value.is_meta:
        raise UnsupportedError("multiplies by a scalar that has no value yet, on the meta device")
    return {"kind": "scale", "factor": float(value.detach()), "trainable": value.requires_grad}


def _reason(name: str) -> str:
    """Why nothing of that name has a kind."""
    for reason, parts in _REASONS.items():
        if any(part.lower() in name.lower() for part in parts):
            return reason
    return "is none of the operations that have a kind"
