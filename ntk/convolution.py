"""Convolution in channels-last memory, with a backward pass for its input alone.

On a CPU the derivative of a convolution by its input takes half the time in this layout, and no copies of the input.
The values differ from those of the model's own layout by rounding.
"""

from collections.abc import Callable, Sequence
from operator import index
from typing import Any, SupportsIndex

import torch
import torch.nn.functional as F
from torch import Tensor

LAYOUTS = {torch.conv2d: torch.channels_last, torch.conv3d: torch.channels_last_3d}

_TRANSPOSED = {torch.conv2d: F.conv_transpose2d, torch.conv3d: F.conv_transpose3d}


def convolve(
    function: Callable,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Convolution that can be differentiated by its input only.

    Args:
        function: torch.conv2d or torch.conv3d, whose arguments follow.
        input: [n, channels, *space]; an unbatched one, and what oneDNN does not compute, goes to `function` itself.
        weight: [out, channels / groups, *kernel]
        bias: [out]
        stride: Of each axis.
        padding: Of each axis.
        dilation: Of each axis.
        groups: Into which channels are divided.
    """
    axes = weight.ndim - 2
    fast = input.dtype == torch.float32 and input.device.type == "cpu" and input.ndim == weight.ndim
    if not fast or isinstance(padding, str):
        return function(input, weight, bias, stride, padding, dilation, groups)
    sizes = (per_axis(value, axes) for value in (stride, padding, dilation))
    return Convolution.apply(function, input, weight, bias, *sizes, groups)


def per_axis(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    """One number for each axis, of what may be one for all.

    Args:
        value: A number, a sequence of one, or of one for each axis.
        axes: How many there are.
    """
    values = (index(value),) if isinstance(value, SupportsIndex) else tuple(value)  # of NumPy, too
    return values * axes if len(values) == 1 else values


class Convolution(torch.autograd.Function):
    """A convolution whose backward pass is one transposed convolution."""

    @staticmethod
    def forward(
        ctx: Any,
        function: Callable,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int,
    ) -> Tensor:
        """See `convolve`."""
        output = function(
            input.contiguous(memory_format=LAYOUTS[function]), weight, bias, stride, padding, dilation, groups
        )
        spans = [d * (k - 1) + 1 - 2 * p for d, k, p in zip(dilation, weight.shape[2:], padding, strict=True)]
        reached = [(size - 1) * s + span for size, s, span in zip(output.shape[2:], stride, spans, strict=True)]
        rest = [size - end for size, end in zip(input.shape[2:], reached, strict=True)]
        ctx.transposed = _TRANSPOSED[function]
        ctx.arguments = weight, None, stride, padding, rest, groups, dilation
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Derivative by the input."""
        return None, ctx.transposed(gradient, *ctx.arguments), *[None] * 6
