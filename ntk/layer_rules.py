"""What the gradient of a weight factors into, for each function that is linear in one."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ntk.convolution import per_axis
from ntk.factors import Factor, Named, Product, Rule, Written
from ntk.written_rules import WRITTEN_RULES


def find_rule(function: Callable) -> Rule | None:
    """The rule of a function, or None.

    Args:
        function: As `__torch_function__` receives it.
    """
    return _RULES.get(function)


def _linear(named: Named, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[Factor]:
    if input.ndim < 2 or weight.ndim != 2:
        return []
    m, p, (q, k) = input.shape[0], math.prod(input.shape[1:-1]), weight.shape
    factors: list[Factor] = []
    if name := named(weight):
        factors.append(
            Product(
                name,
                lambda tokens: input.detach().reshape(m, p, k).transpose(1, 2).unsqueeze(1),
                lambda d: d.reshape(len(d), m, -1, q).transpose(2, 3).unsqueeze(2),
                (1, k, p, q),
            )
        )
    if bias is not None and bias.shape == (q,) and (bias_name := named(bias)):
        rows = lambda d: d if d.ndim == 3 else d.reshape(len(d), m, -1, q).sum(2)
        factors.append(Written(bias_name, rows, named(weight)))
    return factors


def _matmul(named: Named, input: object, other: object) -> list[Factor]:
    name = named(other)
    if not (name and isinstance(input, Tensor) and isinstance(other, Tensor) and other.ndim == 2 and input.ndim >= 2):
        return []
    if named(input):
        return []
    m, p, (k, q) = input.shape[0], math.prod(input.shape[1:-1]), other.shape
    return [
        Product(
            name,
            lambda tokens: input.detach().reshape(m, p, k).transpose(1, 2).unsqueeze(1),
            lambda d: d.reshape(len(d), m, -1, q).transpose(2, 3).unsqueeze(2),
            (1, k, p, q),
            derivative_first=False,
        )
    ]


def _addmm(
    named: Named, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> list[Factor]:
    factors = _matmul(named, mat1, mat2) if beta == alpha == 1 else []
    for weight in factors:
        if input.shape == mat2.shape[1:] and (bias := named(input)):
            return [weight, Written(bias, lambda d: d, weight.name)]
    return factors


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
        steps, dilations = per_axis(stride, dims), per_axis(dilation, dims)
        pads = _pads(padding, kernel, dilations)
        m, q, k = input.shape[0], weight.shape[0] // groups, math.prod(weight.shape[1:])
        positions = math.prod(_positions(input.shape[2:], kernel, steps, pads, dilations))

        def left(tokens: Tensor | None) -> Tensor:
            patches = _patches(input.detach(), kernel, steps, pads, dilations).unflatten(dims + 1, (groups, -1))
            last = patches.movedim(dims + 2, -1)  # channels, as they lie in memory
            return last.reshape(m, positions, groups, k).permute(0, 2, 3, 1)

        factors: list[Factor] = []
        if name := named(weight):
            order = torch.arange(k, device=input.device).reshape(math.prod(kernel), -1).T.flatten()
            right = lambda d: d.reshape(len(d), m, groups, q, -1)
            factors.append(Product(name, left, right, (groups, k, positions, q), order=order))
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
        steps, dilations = per_axis(stride, dims), per_axis(dilation, dims)
        pads = _pads(padding, kernel, dilations)
        m, k, q = input.shape[0], weight.shape[0] // groups, math.prod(weight.shape[1:])
        shape = tuple(input.shape[2:])

        def right(derivatives: Tensor) -> Tensor:
            flat = derivatives.flatten(0, 1)
            patches = _patches(flat, kernel, steps, pads, dilations, positions=shape)
            return patches.reshape(len(derivatives), m, -1, groups, q).permute(0, 1, 3, 4, 2)

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
    tokens = input.detach().reshape(m, math.prod(input.shape[1:]))

    def left(used: Tensor | None) -> Tensor:
        codes = torch.arange(words, device=tokens.device) if used is None else used
        hot = (tokens.unsqueeze(1) == codes[:, None]).to(weight.dtype)
        if padding_idx is not None:
            hot = hot * (tokens != padding_idx % words).unsqueeze(1)
        return hot.unsqueeze(1)

    right = lambda d: d.reshape(len(d), m, -1, q).transpose(2, 3).unsqueeze(2)
    return [Product(name, left, right, (1, words, tokens.shape[1], q), derivative_first=False, tokens=tokens)]


def _pads(
    padding: int | str | Sequence[int], kernel: Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """(before, after) along each axis; padding="same" puts an odd one after, as PyTorch does."""
    if padding == "valid":
        return ((0, 0),) * len(kernel)
    if isinstance(padding, str):
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((p, p) for p in per_axis(padding, len(kernel)))


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
    """The patches that a kernel meets: [m, channels, *space] -> [m, *positions, channels, *kernel], a view."""
    if positions is None:
        positions = _positions(x.shape[2:], kernel, stride, pads, dilation)
    if any(sum(pads, ())):
        x = F.pad(x, [size for pad in reversed(pads) for size in pad])
    steps = x.stride()
    taps = [step * d for step, d in zip(steps[2:], dilation, strict=True)]
    moves = [step * s for step, s in zip(steps[2:], stride, strict=True)]
    return x.as_strided((len(x), *positions, x.shape[1], *kernel), (steps[0], *moves, steps[1], *taps))


_RULES: dict[Callable, Rule] = {
    **WRITTEN_RULES,
    F.linear: _linear,
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.addmm: _addmm,
    torch.Tensor.addmm: _addmm,
    torch.conv1d: _convolution(1),
    torch.conv2d: _convolution(2),
    torch.conv3d: _convolution(3),
    torch.conv_transpose1d: _transposed_convolution(1),
    torch.conv_transpose2d: _transposed_convolution(2),
    torch.conv_transpose3d: _transposed_convolution(3),
    F.embedding: _embedding,
}
