"""Rules for biases, gains and shifts: gradients that are written out, being no larger than the layer's output."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ntk.factors import Factor, Named, Rule, Written


def _batch_norm(
    named: Named,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> list[Factor]:
    statistics = (None, None) if training else (running_mean, running_var)
    normalized = lambda: F.batch_norm(input.detach(), *statistics, training=training, eps=eps)
    return _channel_affine(named, weight, bias, normalized)


def _torch_batch_norm(
    named: Named,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> list[Factor]:
    return _batch_norm(named, input, running_mean, running_var, weight, bias, training, momentum, eps)


def _instance_norm(
    named: Named,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> list[Factor]:
    if input.ndim < 3:
        return []
    statistics = (None, None) if use_input_stats else (running_mean, running_var)
    normalized = lambda: F.instance_norm(input.detach(), *statistics, use_input_stats=use_input_stats, eps=eps)
    return _channel_affine(named, weight, bias, normalized)


def _group_norm(
    named: Named,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> list[Factor]:
    return _channel_affine(named, weight, bias, lambda: F.group_norm(input.detach(), num_groups, eps=eps))


def _channel_affine(
    named: Named, weight: Tensor | None, bias: Tensor | None, normalized: Callable[[], Tensor]
) -> list[Factor]:
    """Gain and shift of each channel, the second axis."""
    factors: list[Factor] = []
    if weight is not None and (name := named(weight)):
        factors.append(Written(name, lambda d: _over_positions(d * normalized())))
    if bias is not None and (name := named(bias)):
        factors.append(Written(name, _over_positions))
    return factors


def _over_positions(derivatives: Tensor) -> Tensor:
    """[u, M, C, ...] -> [u, M, C]."""
    return derivatives.flatten(3).sum(3) if derivatives.ndim > 3 else derivatives


def _layer_norm(
    named: Named,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> list[Factor]:
    return _trailing_affine(
        named, input, normalized_shape, weight, bias, lambda: F.layer_norm(input.detach(), normalized_shape, eps=eps)
    )


def _rms_norm(
    named: Named,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> list[Factor]:
    return _trailing_affine(
        named, input, normalized_shape, weight, None, lambda: F.rms_norm(input.detach(), normalized_shape, eps=eps)
    )


def _trailing_affine(
    named: Named,
    input: Tensor,
    shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    normalized: Callable[[], Tensor],
) -> list[Factor]:
    """Gain and shift of each entry of the trailing axes."""
    if input.ndim <= len(shape):
        return []
    m = input.shape[0]
    summed = lambda d: d.reshape(len(d), m, -1, *shape).sum(2)
    factors: list[Factor] = []
    if weight is not None and (name := named(weight)):
        factors.append(Written(name, lambda d: summed(d * normalized())))
    if bias is not None and (name := named(bias)):
        factors.append(Written(name, summed))
    return factors


def _prelu(named: Named, input: Tensor, weight: Tensor) -> list[Factor]:
    name = named(weight)
    if name is None or input.ndim < 2:
        return []

    def rows(derivatives: Tensor) -> Tensor:
        channels = _over_positions(derivatives * input.detach().clamp(max=0))
        return channels if weight.numel() > 1 else channels.sum(2, keepdim=True)

    return [Written(name, lambda d: rows(d).reshape(len(d), -1, *weight.shape))]


def _multiply(named: Named, input: object, other: object) -> list[Factor]:
    return _broadcast(named, input, other, None)


def _add(named: Named, input: object, other: object, *, alpha: float = 1) -> list[Factor]:
    return _broadcast(named, input, other, alpha if named(other) else 1)


def _subtract(named: Named, input: object, other: object, *, alpha: float = 1) -> list[Factor]:
    return _broadcast(named, input, other, -alpha if named(other) else 1)


def _broadcast(named: Named, input: object, other: object, factor: float | None) -> list[Factor]:
    """A parameter broadcast over the leading axis of the other operand, and multiplied by a factor, or by that one."""
    names = named(input), named(other)
    if (names[0] is None) == (names[1] is None):
        return []
    name, parameter, rest = (names[0], input, other) if names[0] else (names[1], other, input)
    if not (isinstance(parameter, Tensor) and isinstance(rest, Tensor)):
        return []
    if rest.is_complex() or rest.ndim == 0:
        return []
    shape = tuple(torch.broadcast_shapes(parameter.shape, rest.shape))
    padded = (1,) * (len(shape) - parameter.ndim) + tuple(parameter.shape)
    if padded[0] != 1:
        return []
    axes = [axis + 1 for axis in range(1, len(shape)) if padded[axis] == 1]

    def rows(derivatives: Tensor) -> Tensor:
        terms = derivatives * (rest.detach() if factor is None else factor)
        return (terms.sum(axes) if axes else terms).reshape(len(derivatives), shape[0], *parameter.shape)

    return [Written(str(name), rows)]


WRITTEN_RULES: dict[Callable, Rule] = {
    F.batch_norm: _batch_norm,
    torch.batch_norm: _torch_batch_norm,
    F.instance_norm: _instance_norm,
    F.group_norm: _group_norm,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    torch.prelu: _prelu,
    torch.mul: _multiply,
    torch.Tensor.mul: _multiply,
    torch.Tensor.__mul__: _multiply,
    torch.Tensor.__rmul__: _multiply,
    torch.add: _add,
    torch.Tensor.add: _add,
    torch.Tensor.__add__: _add,
    torch.Tensor.__radd__: _add,
    torch.sub: _subtract,
    torch.Tensor.sub: _subtract,
    torch.Tensor.__sub__: _subtract,
}
"""Function -> rule."""
