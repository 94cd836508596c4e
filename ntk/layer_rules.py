"""How the gradient of a parameter factors at a call of a PyTorch function.

Where a function is linear in a weight, the gradient of an output by it is a sum of outer products over positions:
∂f/∂W = Σ_p g_p ⊗ a_p, with a_p a patch of the layer's input, known after one forward pass, and g_p the derivative of f
by the layer's output (Novak et al. 2022, arXiv 2206.08720, §3.4 and 4). A rule says what a and g are for one function.
Biases, and gains of normalization layers, have gradients no larger than the layer's output: theirs are written out.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Named = Callable[[object], str | None]
"""The name of a tensor that is a parameter of the kernel, else None."""


@dataclass(frozen=True, eq=False)
class Product:
    """A parameter whose gradient is a sum of outer products over positions.

    Shapes: M, the leading axis of the layer's output; u, rows of the Jacobian; g groups; P positions; K entries on the
    side of the input, Q on the side of the derivatives.

    Attributes:
        name: Of the parameter.
        left: Side of the input, [M, g, K, P]; of an embedding, one-hot over the tokens given, or over all for None.
        right: Side of the derivatives, [u, *output] -> [u, M, g, Q, P].
        sizes: (g, K, P, Q).
        derivative_first: Whether the axes of the parameter are (g Q, K), as in a linear layer, or (g K, Q).
        tokens: Of an embedding, else None.
    """

    name: str
    left: Callable[[Tensor | None], Tensor]
    right: Callable[[Tensor], Tensor]
    sizes: tuple[int, int, int, int]
    derivative_first: bool = True
    tokens: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Written:
    """A parameter whose gradient is written out.

    Attributes:
        name: Of the parameter.
        rows: [u, *output] -> [u, M, *parameter].
        bias_of: Weight of the same call whose derivative side, summed over positions, is this gradient; or None.
    """

    name: str
    rows: Callable[[Tensor], Tensor]
    bias_of: str | None = None


Factor = Product | Written
Rule = Callable[..., list[Factor]]


def find_rule(function: Callable) -> Rule | None:
    """The rule of a function, or None.

    Args:
        function: As `__torch_function__` receives it.
    """
    return _RULES.get(function)


def couples_examples(function: Callable, args: Sequence, kwargs: dict) -> bool:
    """Whether a call normalizes over the batch.

    Args:
        function: As `__torch_function__` receives it.
        args: Its positional arguments.
        kwargs: Its named arguments.
    """
    if function is not F.batch_norm:
        return False
    return bool(_BATCH_NORM.bind(*args, **kwargs).arguments.get("training", False))


_BATCH_NORM = inspect.signature(F.batch_norm)


def _linear(named: Named, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[Factor]:
    if input.ndim < 2:
        return []
    m, (q, k) = input.shape[0], weight.shape
    factors: list[Factor] = []
    if name := named(weight):
        factors.append(
            Product(
                name,
                lambda tokens: input.detach().reshape(m, -1, k).transpose(1, 2).unsqueeze(1),
                lambda d: d.reshape(len(d), m, -1, q).transpose(2, 3).unsqueeze(2),
                (1, k, input.numel() // (m * k), q),
            )
        )
    if bias is not None and (bias_name := named(bias)):
        rows = lambda d: d if d.ndim == 3 else d.reshape(len(d), m, -1, q).sum(2)
        factors.append(Written(bias_name, rows, named(weight)))
    return factors


def _matmul(named: Named, input: object, other: object) -> list[Factor]:
    name = named(other)
    if not (name and isinstance(input, Tensor) and isinstance(other, Tensor) and other.ndim == 2 and input.ndim >= 2):
        return []
    if named(input):
        return []
    m, (k, q) = input.shape[0], other.shape
    return [
        Product(
            name,
            lambda tokens: input.detach().reshape(m, -1, k).transpose(1, 2).unsqueeze(1),
            lambda d: d.reshape(len(d), m, -1, q).transpose(2, 3).unsqueeze(2),
            (1, k, input.numel() // (m * k), q),
            derivative_first=False,
        )
    ]


def _convolution(dims: int) -> Rule:
    """Rule of torch.conv1d, conv2d or conv3d."""

    def rule(
        named: Named,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> list[Factor]:
        if input.ndim != dims + 2:
            return []
        kernel = tuple(weight.shape[2:])
        steps, dilations = _tuple(stride, dims), _tuple(dilation, dims)
        pads = _pads(padding, kernel, dilations)
        m, q, k = input.shape[0], weight.shape[0] // groups, math.prod(weight.shape[1:])
        positions = math.prod(_positions(input.shape[2:], kernel, steps, pads, dilations))
        factors: list[Factor] = []
        if name := named(weight):
            factors.append(
                Product(
                    name,
                    lambda tokens: _patches(input.detach(), kernel, steps, pads, dilations).reshape(m, groups, k, -1),
                    lambda d: d.reshape(len(d), m, groups, q, -1),
                    (groups, k, positions, q),
                )
            )
        if bias is not None and (bias_name := named(bias)):
            factors.append(Written(bias_name, lambda d: d.flatten(3).sum(3), named(weight)))
        return factors

    return rule


def _transposed_convolution(dims: int) -> Rule:
    """Rule of torch.conv_transpose1d, 2d or 3d: input and derivatives change places."""

    def rule(
        named: Named,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        dilation: int | Sequence[int] = 1,
    ) -> list[Factor]:
        if input.ndim != dims + 2:
            return []
        kernel = tuple(weight.shape[2:])
        steps, dilations = _tuple(stride, dims), _tuple(dilation, dims)
        pads = _pads(padding, kernel, dilations)
        m, k, q = input.shape[0], weight.shape[0] // groups, math.prod(weight.shape[1:])
        shape = tuple(input.shape[2:])

        def right(derivatives: Tensor) -> Tensor:
            flat = derivatives.flatten(0, 1)
            patches = _patches(flat, kernel, steps, pads, dilations, positions=shape)
            return patches.reshape(len(derivatives), m, groups, q, -1)

        factors: list[Factor] = []
        if name := named(weight):
            sizes = groups, k, math.prod(shape), q
            left = lambda tokens: input.detach().reshape(m, groups, k, -1)
            factors.append(Product(name, left, right, sizes, derivative_first=False))
        if bias is not None and (bias_name := named(bias)):
            factors.append(Written(bias_name, lambda d: d.flatten(3).sum(3)))
        return factors

    return rule


def _embedding(
    named: Named,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> list[Factor]:
    name = named(weight)
    if name is None or max_norm is not None or scale_grad_by_freq or input.ndim == 0:
        return []
    m, (words, q) = input.shape[0], weight.shape
    tokens = input.detach().reshape(m, -1)

    def left(used: Tensor | None) -> Tensor:
        codes = torch.arange(words, device=tokens.device) if used is None else used
        hot = (tokens.unsqueeze(1) == codes[:, None]).to(weight.dtype)
        if padding_idx is not None:
            hot = hot * (tokens != padding_idx % words).unsqueeze(1)
        return hot.unsqueeze(1)

    right = lambda d: d.reshape(len(d), m, -1, q).transpose(2, 3).unsqueeze(2)
    return [Product(name, left, right, (1, words, tokens.shape[1], q), derivative_first=False, tokens=tokens)]


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


def _tuple(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


def _pads(
    padding: int | str | Sequence[int], kernel: Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """(before, after) along each axis; padding="same" puts an odd one after, as PyTorch does."""
    if padding == "valid":
        return ((0, 0),) * len(kernel)
    if isinstance(padding, str):
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((p, p) for p in _tuple(padding, len(kernel)))


def _positions(
    shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    pads: Sequence[tuple[int, int]],
    dilation: Sequence[int],
) -> tuple[int, ...]:
    return tuple(
        (size + sum(pad) - d * (k - 1) - 1) // step + 1
        for size, pad, d, k, step in zip(shape, pads, dilation, kernel, stride, strict=True)
    )


def _patches(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    pads: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    positions: Sequence[int] | None = None,
) -> Tensor:
    """The patches that a kernel meets: [m, channels, *space] -> [m, channels, *kernel, *positions], a view."""
    if positions is None:
        positions = _positions(x.shape[2:], kernel, stride, pads, dilation)
    if any(sum(pads, ())):
        x = F.pad(x, [size for pad in reversed(pads) for size in pad])
    x = x.contiguous()
    steps = x.stride()
    taps = [step * d for step, d in zip(steps[2:], dilation, strict=True)]
    moves = [step * s for step, s in zip(steps[2:], stride, strict=True)]
    return x.as_strided((*x.shape[:2], *kernel, *positions), (*steps[:2], *taps, *moves))


_RULES: dict[Callable, Rule] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.conv1d: _convolution(1),
    torch.conv2d: _convolution(2),
    torch.conv3d: _convolution(3),
    torch.conv_transpose1d: _transposed_convolution(1),
    torch.conv_transpose2d: _transposed_convolution(2),
    torch.conv_transpose3d: _transposed_convolution(3),
    F.embedding: _embedding,
    F.batch_norm: _batch_norm,
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
