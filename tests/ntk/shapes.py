"""Layers of any shape, for hypothesis to choose from: each alone, or with normalization over the batch around it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import nn

from tests.ntk.modules import Apply

FEW = settings(max_examples=30, deadline=None, derandomize=True, database=None)
"""The same examples in every run, and few: every one costs a loop of gradients."""

Draw = Callable[[st.SearchStrategy], object]


@dataclass(frozen=True)
class Layer:
    """A layer and the shape of one example, [channels, *positions]; a vocabulary of `words` where it reads tokens."""

    make: Callable[[], nn.Module]
    example: tuple[int, ...]
    words: int | None = None

    def input(self, n: int) -> torch.Tensor:
        shape = (n, *self.example)
        return torch.randn(shape).double() if self.words is None else torch.randint(self.words, shape)


def small(least: int = 1, most: int = 3) -> st.SearchStrategy[int]:
    return st.integers(least, most)


def axes(least: int, most: int, size: st.SearchStrategy[int]) -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(size, min_size=least, max_size=most).map(tuple)


def one_or_each(draw: Draw, dims: int, size: st.SearchStrategy[int]) -> tuple[int | tuple[int, ...], tuple[int, ...]]:
    """A setting as it is passed, one number or one for each axis, and as it is meant."""
    each = draw(axes(dims, dims, size))
    return draw(st.sampled_from([(each[0], each[:1] * dims), (each, each)]))


@st.composite
def linear(draw: Draw) -> Layer:
    k, q, bias = draw(small()), draw(small(1, 4)), draw(st.booleans())
    return Layer(lambda: nn.Linear(k, q, bias=bias), (*draw(axes(0, 2, small())), k))


@st.composite
def convolution(draw: Draw) -> Layer:
    dims, groups, bias = draw(small()), draw(small()), draw(st.booleans())
    channels, filters = groups * draw(small(1, 2)), groups * draw(small(1, 2))
    kernel, sizes = one_or_each(draw, dims, small())
    dilation, dilations = one_or_each(draw, dims, small(1, 2))
    stride, _ = one_or_each(draw, dims, small())
    padding, pads = one_or_each(draw, dims, small(0, 2))
    if word := draw(st.sampled_from([None, None, "same", "valid"])):
        padding, pads = word, (0,) * dims
        stride = 1 if word == "same" else stride
    space = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilations, sizes, pads, strict=True)]
    convolve = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    return Layer(
        lambda: convolve(channels, filters, kernel, stride, padding, dilation, groups, bias),
        (channels, *[size + draw(small(0, 2)) for size in space]),
    )


@st.composite
def transposed_convolution(draw: Draw) -> Layer:
    dims, groups, bias = draw(small()), draw(small()), draw(st.booleans())
    channels, filters = groups * draw(small(1, 2)), groups * draw(small(1, 2))
    kernel, sizes = one_or_each(draw, dims, small())
    dilation, dilations = one_or_each(draw, dims, small(1, 2))
    stride, steps = one_or_each(draw, dims, small())
    padding, pads = one_or_each(draw, dims, small(0, 1))
    extra = tuple(draw(small(0, max(s, d) - 1)) for s, d in zip(steps, dilations, strict=True))
    least = [
        max(1, -(-(2 * p - d * (k - 1) - e) // s) + 1)
        for p, d, k, e, s in zip(pads, dilations, sizes, extra, steps, strict=True)
    ]
    convolve = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    return Layer(
        lambda: convolve(channels, filters, kernel, stride, padding, extra, groups, bias, dilation),
        (channels, *[size + draw(small(0, 1)) for size in least]),
    )


@st.composite
def embedding(draw: Draw) -> Layer:
    words, q = draw(small(1, 6)), draw(small())
    padding = draw(st.none() | st.integers(-words, words - 1))
    return Layer(lambda: nn.Embedding(words, q, padding_idx=padding), draw(axes(1, 2, small())), words)


@st.composite
def normalization(draw: Draw) -> Layer:
    space, groups = draw(axes(1, 3, small(2, 3))), draw(small(1, 2))
    channels = groups * draw(small())
    example = (channels, *space)
    trailing = example[draw(st.integers(0, len(space))) :]
    dims, bias = len(space) - 1, draw(st.booleans())
    batch_norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims]
    instance_norm = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[dims]
    tracked, mode, eps = draw(st.booleans()), draw(st.booleans()), draw(st.sampled_from([1e-5, 0.1]))
    make = draw(
        st.sampled_from(
            [
                lambda: nn.GroupNorm(groups, channels, eps),
                lambda: nn.LayerNorm(trailing, eps, bias=bias),
                lambda: nn.RMSNorm(trailing, eps),
                lambda: batch_norm(channels, eps, track_running_stats=tracked).train(mode),
                lambda: instance_norm(channels, eps, affine=True, track_running_stats=tracked).train(mode),
                lambda: nn.PReLU(channels if bias else 1),
            ]
        )
    )
    return Layer(make, example)


OPERATIONS = {
    "x * p": lambda s, x: x * s.p,
    "p * x": lambda s, x: s.p * x,
    "x + p": lambda s, x: torch.sin(x + s.p),
    "p + x": lambda s, x: torch.sin(s.p + x),
    "x - p": lambda s, x: torch.sin(x - s.p),
    "p - x": lambda s, x: torch.sin(s.p - x),
    "add with alpha": lambda s, x: torch.sin(torch.add(x, s.p, alpha=3)),
    "add to it with alpha": lambda s, x: torch.sin(torch.add(s.p, x, alpha=3)),
    "subtract with alpha": lambda s, x: torch.sin(x.sub(s.p, alpha=3)),
    "subtract from it with alpha": lambda s, x: torch.sin(torch.sub(s.p, x, alpha=3)),
    "twice": lambda s, x: x * s.p + s.p * x.sin(),
}


@st.composite
def broadcast(draw: Draw) -> Layer:
    """A parameter beside an input, of fewer axes, or with axes of one entry on either side."""
    example = draw(axes(1, 3, small()))
    sizes = [draw(st.sampled_from([1, size, 3 if size == 1 else size])) for size in example]
    shape = (*draw(st.sampled_from([(), (1,), (1, 1)])), *sizes)[draw(st.integers(0, len(sizes) + 1)) :]
    operation = OPERATIONS[draw(st.sampled_from(sorted(OPERATIONS)))]
    fits = len(shape) <= len(example) + 1
    return Layer(lambda: Apply(operation, p=shape if fits else shape[1:]), example)


LAYERS = {
    "linear": linear(),
    "convolution": convolution(),
    "transposed convolution": transposed_convolution(),
    "embedding": embedding(),
    "normalization": normalization(),
    "broadcast": broadcast(),
}


class BatchNormalized(nn.Module):
    """Batch normalization of the second axis, whatever the number of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LazyBatchNorm1d()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x.flatten(2) if x.ndim > 2 else x).reshape(x.shape)


def in_context(layer: Layer, before: bool, after: bool, outputs: int | None) -> nn.Module:
    """The layer, normalized over the batch before or after it, and read out by a linear layer, or for None by means."""
    layers = [BatchNormalized()] if before and layer.words is None else []
    layers += [layer.make(), *([BatchNormalized()] if after else []), nn.Tanh(), nn.Flatten()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(2) if outputs is None else nn.LazyLinear(outputs)).double()
