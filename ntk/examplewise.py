"""Functions under which an example of a batch keeps to itself.

A function is listed with a condition on one call of it: that entry i of the leading axis of the output depends on entry
i of the leading axis of the inputs alone. Networks made of such calls need no test of it.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Condition = Callable[..., bool]
"""(output, *args, **kwargs) of a call -> whether examples stayed apart."""


def keeps_examples_apart(function: Callable, args: Sequence, kwargs: dict, output: object) -> bool:
    """Whether a call is known to let no example act on another.

    Args:
        function: As `__torch_function__` receives it.
        args: Its positional arguments.
        kwargs: Its named arguments.
        output: What it returned.
    """
    if function in _BATCH_NORMS:
        return not normalizes_over_batch(function, args, kwargs)
    condition = _CONDITIONS.get(function)
    if condition is None or not isinstance(output, Tensor) or "out" in kwargs:
        return False
    if output._is_view() and any(output is value for value in args):  # what it is a view of has changed, too
        return False
    return condition(output, *args, **kwargs)


def _elementwise(output: Tensor, input: Tensor, *args: object, **kwargs: object) -> bool:
    return output.shape == input.shape and input.ndim > 0 and _fixed(args, kwargs)


def _leading_axis(output: Tensor, input: Tensor, *args: object, **kwargs: object) -> bool:
    """Reshaping in row-major order, with the leading axis as it was."""
    return input.ndim > 0 and output.ndim > 0 and output.shape[0] == input.shape[0]


def _operands(output: Tensor, *args: object, **kwargs: object) -> bool:
    """Broadcasting, of operands that have the leading axis of the output or are constants or parameters."""
    return all(
        value.ndim == output.ndim > 0 and value.shape[0] == output.shape[0]
        for value in (*args, *kwargs.values())
        if isinstance(value, Tensor) and _varies(value)
    )


def _spatial(axes: int) -> Condition:
    """Convolution and pooling over the trailing axes of a batch."""

    def condition(output: Tensor, input: Tensor, *args: object, **kwargs: object) -> bool:
        return input.ndim == axes + 2 and _fixed(args, kwargs)

    return condition


def _matmul(output: Tensor, input: object, other: object) -> bool:
    return (
        isinstance(input, Tensor)
        and input.ndim > 1
        and isinstance(other, Tensor)
        and other.ndim == 2
        and not _varies(other)
    )


def _along(output: Tensor, input: Tensor, dim: object = None, *args: object, **kwargs: object) -> bool:
    """Over named axes, none of which is the leading one."""
    axes = list(dim) if isinstance(dim, Iterable) else [dim]
    named = input.ndim > 0 and len(axes) > 0  # torch takes an empty list for all axes
    return named and all(isinstance(axis, int) and axis % input.ndim != 0 for axis in axes)


def _trailing(output: Tensor, input: Tensor, normalized_shape: Sequence[int], *args: object, **kwargs: object) -> bool:
    return len(normalized_shape) < input.ndim and _fixed(args, kwargs)


def _others_fixed(output: Tensor, input: Tensor, *args: object, **kwargs: object) -> bool:
    return input.ndim > 1 and _fixed(args, kwargs)


def _fixed(args: Sequence, kwargs: dict) -> bool:
    """Whether no tensor among the arguments depends on the examples."""
    return not any(isinstance(value, Tensor) and _varies(value) for value in (*args, *kwargs.values()))


def _varies(value: Tensor) -> bool:
    """Whether a tensor may depend on the examples: it is neither a constant nor a parameter."""
    return value.requires_grad and not value.is_leaf


def normalizes_over_batch(function: Callable, args: Sequence, kwargs: dict) -> bool:
    """Whether a call normalizes by the statistics of its own batch.

    Args:
        function: As `__torch_function__` receives it.
        args: Its positional arguments.
        kwargs: Its named arguments.
    """
    signature = _BATCH_NORMS.get(function)
    return signature is not None and bool(signature.bind(*args, **kwargs).arguments.get("training", False))


def _signature(names: str) -> inspect.Signature:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature([inspect.Parameter(name, kind) for name in names.split()])


_BATCH_NORMS = {
    F.batch_norm: inspect.signature(F.batch_norm),
    torch.batch_norm: _signature("input weight bias running_mean running_var training momentum eps cudnn_enabled"),
}

_OPERATORS = [
    *(f"__{prefix}{name}__" for name in ("add", "sub", "mul", "truediv", "pow") for prefix in ("", "r", "i")),
    *(f"{name}{suffix}" for name in ("add", "sub", "mul", "div", "pow") for suffix in ("", "_")),
    "maximum",
    "minimum",
]
_UNARY = ["abs", "clamp", "clamp_min", "clone", "contiguous", "cos", "detach", "erf", "exp", "neg"]
_UNARY += ["relu", "relu_", "sigmoid", "sigmoid_", "sin", "sqrt", "square", "tanh", "tanh_"]
_RESHAPING = ["view", "reshape", "flatten", "unflatten"]
_ACTIVATIONS = ["celu", "dropout", "elu", "elu_", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu"]
_ACTIVATIONS += ["leaky_relu_", "logsigmoid", "mish", "relu", "relu6", "relu_", "selu", "sigmoid", "silu", "softplus"]
_ACTIVATIONS += ["softsign", "tanh", "tanhshrink"]
_POOLS = ["avg_pool{}d", "max_pool{}d", "adaptive_avg_pool{}d", "adaptive_max_pool{}d"]


def _named(names: Sequence[str], *owners: object) -> list[Callable]:
    return [getattr(owner, name) for name in names for owner in owners if hasattr(owner, name)]


_CONDITIONS: dict[Callable, Condition] = {
    **dict.fromkeys(_named(_OPERATORS, torch, Tensor), _operands),
    **dict.fromkeys(_named(_UNARY, torch, Tensor), _elementwise),
    **dict.fromkeys(_named(_ACTIVATIONS, F), _elementwise),
    **dict.fromkeys(_named(_RESHAPING, torch, Tensor), _leading_axis),
    **dict.fromkeys(_named(["mean", "sum", "amax", "softmax"], torch, Tensor), _along),
    **{pool: _spatial(axes) for axes in (1, 2, 3) for pool in _named([name.format(axes) for name in _POOLS], F)},
    torch.conv1d: _spatial(1),
    torch.conv2d: _spatial(2),
    torch.conv3d: _spatial(3),
    torch.conv_transpose1d: _spatial(1),
    torch.conv_transpose2d: _spatial(2),
    torch.conv_transpose3d: _spatial(3),
    F.linear: _others_fixed,
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), _matmul),
    F.layer_norm: _trailing,
    F.rms_norm: _trailing,
    F.group_norm: _others_fixed,
    F.instance_norm: _others_fixed,
    torch.prelu: _others_fixed,
}
"""Function -> condition."""
