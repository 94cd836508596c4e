"""Modules that every exact route is held against.

An entry makes a module that returns [n, o] for a batch of n, and says what one example is: a shape, or "tokens".
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

Example = tuple[int, ...] | str
"""Shape of one example, or "tokens" for four out of a vocabulary of five."""


LAST = torch.tensor([[False, False, True]])
"""Of three keys, the one that a query must not see."""


class Apply(nn.Module):
    """A module from a function of itself, its modules and parameters, and x."""

    def __init__(self, function: Callable[["Apply", torch.Tensor], torch.Tensor], **parts: nn.Module | tuple) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part if isinstance(part, nn.Module) else nn.Parameter(torch.randn(part)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


def draw(example: Example, n: int) -> torch.Tensor:
    return torch.randint(5, (n, 4)) if example == "tokens" else torch.randn(n, *example).double()


def build(name: str, n: int = 4, m: int = 3) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A module of the table in float64, and two batches."""
    torch.manual_seed(0)
    model, example = MODULES[name]()
    x1, x2 = draw(example, n), draw(example, m)
    model.double()(x1)  # lazy layers take their shape
    return model, x1, x2


def headed(*layers: nn.Module, example: Sequence[int]) -> tuple[nn.Module, Example]:
    return nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.LazyLinear(2)), tuple(example)


def image(*layers: nn.Module, channels: int = 4, size: int = 5) -> tuple[nn.Module, Example]:
    return headed(*layers, example=(channels, size, size))


def signal(*layers: nn.Module, channels: int = 4, length: int = 6) -> tuple[nn.Module, Example]:
    return headed(*layers, example=(channels, length))


def vector(*layers: nn.Module) -> tuple[nn.Module, Example]:
    return nn.Sequential(*layers), (4,)


def of_vector(function: Callable, **parts: nn.Module | tuple) -> tuple[nn.Module, Example]:
    return Apply(function, **parts), (4,)


def of_sequence(function: Callable, **parts: nn.Module | tuple) -> tuple[nn.Module, Example]:
    return Apply(function, **parts), (4, 3)


def of_tokens(function: Callable, **parts: nn.Module | tuple) -> tuple[nn.Module, Example]:
    return Apply(function, **parts), "tokens"


def residual() -> tuple[nn.Module, Example]:
    def forward(self: Apply, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        h += torch.relu_(self.second(h.tanh()))
        return self.head(h)

    return of_vector(forward, first=nn.Linear(4, 4), second=nn.Linear(4, 4), head=nn.Linear(4, 3))


def input_gradient() -> tuple[nn.Module, Example]:
    """A network that returns its own derivative, as an energy model or one trained on a differential equation."""

    def forward(self: Apply, x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        value = self.head(torch.tanh(self.norm(self.inner(x))))
        return torch.autograd.grad(value.sum(), x, create_graph=True)[0] + self.skip(x)

    parts = {
        "inner": nn.Linear(4, 5),
        "norm": nn.LayerNorm(5, eps=0.1),
        "head": nn.Linear(5, 1),
        "skip": nn.Linear(4, 4),
    }
    return of_vector(forward, **parts)


def attention(self: Apply, x: torch.Tensor) -> torch.Tensor:
    query, key, value = (part.unflatten(2, (2, 2)).transpose(1, 2) for part in self.project(x).chunk(3, 2))
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return self.out(mixed.transpose(1, 2).flatten(2)).mean(1)


class Standardize(nn.Module):
    """Each row of a weight without its mean, to the length of one, times a gain."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(rows, 1, 1, 1))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        centered = weight - weight.mean((1, 2, 3), keepdim=True)
        return self.gain * centered / centered.square().sum((1, 2, 3), keepdim=True).sqrt()


def standardized(layer: nn.Module) -> nn.Module:
    return nn.utils.parametrize.register_parametrization(layer, "weight", Standardize(len(layer.weight)))


def twice_by_a_computed_weight(self: Apply, x: torch.Tensor) -> torch.Tensor:
    weight = self.g * F.normalize(self.w, dim=1)
    return F.linear(torch.tanh(F.linear(x, weight)), weight.T)


def attended_and_weights(attended: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return attended.mean(1) + weights[:, 1, :, 0]


def direct_batch_norm(self: Apply, x: torch.Tensor) -> torch.Tensor:
    """torch.batch_norm itself, as networks call it that keep their own running statistics."""
    h = torch.batch_norm(self.a(x), self.g, self.s, self.mean, self.var, self.training, 0.1, 1e-5, False)
    return self.b(torch.relu(h))


def with_buffers(module: nn.Module, **buffers: torch.Tensor) -> nn.Module:
    for name, value in buffers.items():
        module.register_buffer(name, value)
    return module


CONVOLUTIONS = {
    "conv1d": lambda: signal(nn.Conv1d(4, 3, 3, stride=2, padding=2, dilation=2)),
    "conv1d same": lambda: signal(nn.Conv1d(4, 3, 4, padding="same", dilation=2)),
    "conv1d same, one more after": lambda: signal(nn.Conv1d(4, 3, 2, padding="same")),
    "conv1d valid": lambda: signal(nn.Conv1d(4, 2, 2, padding="valid")),
    "conv2d": lambda: image(nn.Conv2d(4, 3, 3)),
    "conv2d 1x1": lambda: image(nn.Conv2d(4, 6, 1)),
    "conv2d with steps of NumPy": lambda: (
        Apply(
            lambda s, x: s.b(F.conv2d(x, s.w, None, np.int64(2), (np.int64(1), 0)).tanh()),
            w=(2, 4, 3, 3),
            b=nn.Flatten(),
        ),
        (4, 5, 5),
    ),
    "conv2d anisotropic": lambda: image(nn.Conv2d(4, 3, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1))),
    "conv2d groups": lambda: image(nn.Conv2d(4, 6, 3, padding=1, groups=2)),
    "conv2d depthwise": lambda: image(nn.Conv2d(4, 8, 3, groups=4, bias=False), nn.Conv2d(8, 3, 1)),
    "conv2d circular": lambda: image(nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular")),
    "conv2d whole image": lambda: image(nn.Conv2d(4, 6, 5)),
    "conv3d": lambda: headed(nn.Conv3d(2, 3, 2, stride=(1, 2, 1), padding=1), example=(2, 3, 3, 3)),
    "conv transposed 1d": lambda: signal(nn.ConvTranspose1d(4, 3, 3, stride=2, output_padding=1)),
    "conv transposed 2d": lambda: image(nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2, dilation=2)),
    "conv transposed 3d": lambda: headed(nn.ConvTranspose3d(2, 2, 2, bias=False), example=(2, 2, 2, 2)),
    "conv called twice": lambda: image(conv := nn.Conv2d(4, 4, 3, padding=1), nn.Tanh(), conv),
    "conv called with two dilations": lambda: of_sequence(
        lambda s, x: (F.conv1d(x, s.w, s.b, padding=1) + F.conv1d(x.sin(), s.w, padding=2, dilation=2)).tanh().mean(2),
        w=(2, 4, 3),
        b=(2,),
    ),
    "conv called with two groupings": lambda: of_sequence(
        lambda s, x: (F.conv1d(x, s.w, groups=2) + F.conv1d(x[:, :2].sin(), s.w)).tanh().mean(2), w=(2, 2, 2)
    ),
    "conv without batch axis": lambda: of_sequence(
        lambda s, x: s.b(s.a(x.flatten(1).T).tanh().T), a=nn.Conv1d(12, 5, 1), b=nn.Linear(5, 2)
    ),
    "conv across examples": lambda: of_vector(
        lambda s, x: s.a(x.T.unsqueeze(0))[0].T.tanh(), a=nn.Conv1d(4, 2, 3, padding=1)
    ),
}

DENSE = {
    "linear": lambda: vector(nn.Linear(4, 3)),
    "linear without bias": lambda: vector(nn.Linear(4, 6, bias=False), nn.GELU(), nn.Linear(6, 2, bias=False)),
    "linear in place": lambda: vector(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)),
    "linear over positions": lambda: signal(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)),
    "linear over positions, in place": lambda: signal(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)),
    "linear over two axes": lambda: image(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2)),
    "linear over folded positions": lambda: of_sequence(
        lambda s, x: s.head(torch.tanh(s.inner(x.flatten(0, 1))).reshape(len(x), -1)),
        inner=nn.Linear(3, 2),
        head=nn.Linear(8, 2),
    ),
    "linear, positions first": lambda: of_sequence(
        lambda s, x: s.head(torch.tanh(s.inner(x.transpose(0, 1))).sum(0)), inner=nn.Linear(3, 2), head=nn.Linear(2, 2)
    ),
    "linear, examples reversed": lambda: of_vector(
        lambda s, x: s.b(s.a(x.flip(0)).tanh()), a=nn.Linear(4, 3), b=nn.Linear(3, 2)
    ),
    "linear on each example": lambda: of_vector(lambda s, x: torch.stack([s.a(row) for row in x]), a=nn.Linear(4, 3)),
    "linear on no position": lambda: of_sequence(
        lambda s, x: s.a(x[:, :0]).sum(1) + s.b(x.tanh()).sum(1), a=nn.Linear(3, 2), b=nn.Linear(3, 2)
    ),
    "linear on no example": lambda: of_vector(
        lambda s, x: s.a(x) + s.a(x[x[:, 0] > 100]).sum() + s.b(x[:0]).sum(), a=nn.Linear(4, 3), b=nn.Linear(4, 3)
    ),
    "linear on no feature": lambda: of_vector(
        lambda s, x: (F.linear(x[:, :0], s.w, s.b) + x[:, :2]).tanh(), w=(2, 0), b=(2,)
    ),
    "matrix product on no example": lambda: of_vector(lambda s, x: (x @ s.w).tanh() + (x[:0] @ s.w).sum(), w=(4, 3)),
    "linear with one bias": lambda: of_vector(lambda s, x: F.linear(x, s.w, s.b), w=(3, 4), b=(1,)),
    "linear with a vector": lambda: of_sequence(lambda s, x: F.linear(x, s.w), w=(3,)),
    "linear of a parameter": lambda: of_vector(lambda s, x: x @ s.a(s.p), a=nn.Linear(4, 3), p=(4, 4)),
    "linear of its own weight": lambda: of_vector(lambda s, x: x @ F.linear(s.w, s.w), w=(4, 4)),
    "residual in place": residual,
    "written through a view": lambda: of_vector(
        lambda s, x: s.b(s.a(x).index_fill_(1, torch.tensor([0]), 0.3).tanh()), a=nn.Linear(4, 3), b=nn.Linear(3, 2)
    ),
    "input changed afterwards": lambda: of_vector(
        lambda s, x: (h := s.a(x), k := h + s.p, k * h.mul_(2))[2], a=nn.Linear(4, 2), p=(2,)
    ),
    "called twice": lambda: of_vector(lambda s, x: s.a(torch.tanh(s.a(x))), a=nn.Linear(4, 4)),
    "called on two lengths": lambda: of_sequence(
        lambda s, x: s.a(torch.tanh(s.a(x))).sum(1) + s.a(x[:, 0]), a=nn.Linear(3, 3)
    ),
    "bias of its own": lambda: of_vector(lambda s, x: s.a(x) + F.linear(torch.tanh(x), s.a.weight), a=nn.Linear(4, 4)),
    "bias of its own, wide": lambda: of_vector(
        lambda s, x: (F.linear(x, s.w, s.b).tanh() + F.linear(x.sin(), s.w)) @ s.v, w=(30, 4), b=(30,), v=(30, 2)
    ),
    "weight and bias of two modules": lambda: of_vector(
        lambda s, x: s.c(F.linear(x, s.a.weight, s.b.bias).tanh()),
        a=nn.Linear(4, 30, bias=False),
        b=nn.GroupNorm(1, 30),
        c=nn.Linear(30, 2),
    ),
    "one bias of two layers": lambda: of_vector(
        lambda s, x: F.linear(F.linear(x, s.w, s.b).tanh(), s.v, s.b), w=(3, 4), v=(3, 3), b=(3,)
    ),
    "matrix product": lambda: of_vector(lambda s, x: torch.tanh(x @ s.w) @ s.v, w=(4, 5), v=(5, 2)),
    "matrix product of positions": lambda: of_sequence(lambda s, x: x.matmul(s.w).tanh().sum(1), w=(3, 2)),
    "weight transposed": lambda: of_vector(lambda s, x: torch.tanh(x @ s.w.T), w=(3, 4)),
    "weight on the left": lambda: of_vector(lambda s, x: torch.tanh(s.w @ x.T).T, w=(3, 4)),
    "weight by einsum": lambda: of_sequence(lambda s, x: torch.einsum("nti,oi->no", x, s.w).tanh(), w=(2, 3)),
    "addmm": lambda: of_vector(lambda s, x: torch.addmm(s.b, x, s.w).tanh(), w=(4, 3), b=(3,)),
    "addmm of many": lambda: of_vector(
        lambda s, x: torch.addmm(s.b, x, s.w).tanh() @ s.v, w=(4, 60), b=(60,), v=(60, 2)
    ),
    "baddbmm": lambda: of_sequence(
        lambda s, x: torch.baddbmm(s.b, x, s.w.expand(len(x), -1, -1)).tanh().sum(1), w=(3, 2), b=(1, 1, 2)
    ),
    "bilinear": lambda: of_vector(lambda s, x: s.a(x, x.tanh()), a=nn.Bilinear(4, 4, 2)),
    "weight norm": lambda: vector(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 2)),
    "spectral norm": lambda: vector(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)).eval(), nn.Tanh()),
    "standardized convolution": lambda: image(standardized(nn.Conv2d(4, 3, 3)), nn.Tanh(), nn.Conv2d(3, 2, 2)),
    "convolution of a batch-normed weight": lambda: (
        Apply(
            lambda s, x: F.conv2d(x, F.batch_norm(s.w[None], None, None, training=True)[0]).tanh().mean((2, 3)),
            w=(3, 4, 2, 2),
        ),
        (4, 5, 5),
    ),
    "weight norm over positions": lambda: signal(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), nn.Tanh()),
    "weight norm before batch norm": lambda: vector(
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2)
    ),
    "computed weight used twice": lambda: of_vector(twice_by_a_computed_weight, w=(4, 4), g=(4, 1)),
    "computed weight and what it is made of": lambda: of_vector(
        lambda s, x: torch.tanh(x @ (s.w * s.g).T) @ s.w + s.g[:, 0], w=(4, 4), g=(4, 1)
    ),
    "computed weight and what it is made of, without rule": lambda: of_vector(
        lambda s, x: torch.tanh(x @ s.w.exp()) + torch.einsum("ni,io->no", x, s.w), w=(4, 4)
    ),
    "computed weight changed afterwards": lambda: of_vector(
        lambda s, x: (x @ (w := s.w * s.w)).tanh() + 0 * w.mul_(2).sum().detach(), w=(4, 3)
    ),
    "computed embedding": lambda: of_tokens(lambda s, x: F.embedding(x, s.w.tanh()).sin().mean(1), w=(5, 3)),
    "weight made of examples": lambda: of_vector(
        lambda s, x: torch.tanh(x @ (s.w * x.mean())) @ (s.v + x.sum()), w=(4, 3), v=(3, 2)
    ),
    "weights of a hypernetwork": lambda: of_vector(
        lambda s, x: torch.tanh(x @ s.a(s.p).view(4, 3)), a=nn.Linear(2, 12), p=(2,)
    ),
    "weight of each example": lambda: of_vector(
        lambda s, x: torch.einsum("ni,nio->no", x, s.a(x).view(-1, 4, 2)), a=nn.Linear(4, 8)
    ),
    "gain through a view": lambda: image(nn.Conv2d(4, 3, 2), Apply(lambda s, x: x * s.g.view(1, -1, 1, 1), g=(3,))),
    "rule and no rule": lambda: of_vector(lambda s, x: s.a(x) + x @ s.a.weight.exp().T, a=nn.Linear(4, 3)),
    "one output": lambda: vector(nn.Linear(4, 1), nn.Flatten(0)),
    "unused layer": lambda: of_vector(lambda s, x: s.a(x), a=nn.Linear(4, 2), b=nn.Linear(4, 2)),
    "layer without influence": lambda: of_vector(
        lambda s, x: s.a(x + s.b(x).detach()), a=nn.Linear(4, 2), b=nn.Linear(4, 4)
    ),
    "frozen layer": lambda: vector(nn.Linear(4, 5).requires_grad_(False), nn.Tanh(), nn.Linear(5, 2)),
    "frozen weight": lambda: of_vector(
        lambda s, x: F.linear(x, s.w.detach(), s.b).tanh() * s.w[0, 0], w=(3, 4), b=(3,)
    ),
}

NORMALIZED = {
    "batch norm": lambda: vector(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)),
    "batch norm 2d": lambda: image(
        nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3, eps=0.1), nn.ReLU(inplace=True), nn.Conv2d(3, 2, 2)
    ),
    "batch norm last": lambda: vector(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3)),
    "batch norm without statistics": lambda: vector(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)),
    "batch norm without affine": lambda: image(nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3, affine=False)),
    "batch norm called twice": lambda: of_vector(
        lambda s, x: s.n(s.a(s.n(x).tanh())), a=nn.Linear(4, 4), n=nn.BatchNorm1d(4)
    ),
    "batch norm in eval mode": lambda: image(nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3, eps=0.1).eval(), nn.ReLU()),
    "batch norm of torch": lambda: (
        with_buffers(
            Apply(direct_batch_norm, a=nn.Linear(4, 5), g=(5,), s=(5,), b=nn.Linear(5, 2)),
            mean=torch.zeros(5),
            var=torch.ones(5),
        ),
        (4,),
    ),
    "batch norm of torch in eval mode": lambda: (
        with_buffers(
            Apply(direct_batch_norm, a=nn.Linear(4, 5), g=(5,), s=(5,), b=nn.Linear(5, 2)),
            mean=torch.arange(5.0),
            var=torch.arange(1.0, 6.0),
        ).eval(),
        (4,),
    ),
    "wide batch norm": lambda: vector(nn.Linear(4, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 2)),
    "conv before and after batch norm": lambda: image(
        nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), nn.GELU(), nn.ConvTranspose2d(6, 2, 2, bias=False)
    ),
    "embedding before batch norm": lambda: of_tokens(
        lambda s, x: s.n(s.e(x).flatten(1)).tanh() @ s.w, e=nn.Embedding(5, 2), n=nn.BatchNorm1d(8), w=(8, 2)
    ),
    "mean over the batch": lambda: of_vector(
        lambda s, x: s.b(torch.tanh(s.a(x) - s.a(x).mean(0))), a=nn.Linear(4, 4), b=nn.Linear(4, 2)
    ),
    "layer norm": lambda: vector(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 2)),
    "layer norm of two axes": lambda: signal(nn.LayerNorm((4, 6))),
    "layer norm over positions": lambda: signal(nn.LayerNorm(6)),
    "layer norm, gain is shift": lambda: of_vector(lambda s, x: F.layer_norm(x, (4,), s.p, s.p), p=(4,)),
    "rms norm": lambda: signal(nn.RMSNorm(6, eps=0.1)),
    "group norm": lambda: image(nn.Conv2d(4, 4, 2), nn.GroupNorm(2, 4, eps=0.1)),
    "group norm of vectors": lambda: vector(nn.Linear(4, 6), nn.GroupNorm(3, 6), nn.Tanh()),
    "instance norm": lambda: image(nn.Conv2d(4, 3, 2), nn.InstanceNorm2d(3, eps=0.1, affine=True)),
    "instance norm in eval mode": lambda: signal(nn.InstanceNorm1d(4, affine=True, track_running_stats=True).eval()),
    "instance norm with statistics": lambda: signal(nn.InstanceNorm1d(4, affine=True, track_running_stats=True)),
}

OTHERS = {
    "scalars and shifts": lambda: of_vector(
        lambda s, x: s.a((s.g * x + s.p).tanh()) * s.h - s.k, a=nn.Linear(4, 3), g=(), p=(4,), h=(1, 3), k=(3,)
    ),
    "scaled shifts": lambda: of_vector(
        lambda s, x: (
            torch.add(x, s.p, alpha=-2) * torch.sub(x, s.q, alpha=3) * torch.sub(s.r, x, alpha=2)
            + torch.add(s.r, x.sin(), alpha=2)
        ),
        p=(4,),
        q=(1, 4),
        r=(),
    ),
    "gain of a mask": lambda: of_vector(lambda s, x: (x > 0) * s.p + s.q * x[:, :1], p=(4,), q=(1, 4)),
    "gain of examples": lambda: of_vector(
        lambda s, x: (x @ s.w)[:, 0].mul(s.p).mul(s.q).add(s.p), w=(4, 1), p=(), q=(1,)
    ),
    "gain squared": lambda: of_vector(lambda s, x: x * (s.p * s.p), p=(4,)),
    "gain over the batch axis": lambda: of_vector(
        lambda s, x: s.a(x).tanh() + s.p * s.q.exp(), a=nn.Linear(4, 2), p=(2,), q=(2,)
    ),
    "gain in place": lambda: of_vector(lambda s, x: s.a(x).mul_(s.p).add_(s.q), a=nn.Linear(4, 2), p=(2,), q=(2,)),
    "position embedding": lambda: of_sequence(
        lambda s, x: s.a((x + s.p).tanh()).mean(1), a=nn.Linear(3, 2), p=(1, 4, 3)
    ),
    "position embedding without batch axis": lambda: of_sequence(lambda s, x: (x * s.p).sin().mean(1), p=(4, 3)),
    "embedding": lambda: of_tokens(lambda s, x: s.e(x).tanh().mean(1), e=nn.Embedding(7, 3)),
    "embedding of one token": lambda: of_tokens(lambda s, x: s.e(x[:, 0]).tanh(), e=nn.Embedding(7, 3)),
    "embedding of no token": lambda: of_tokens(
        lambda s, x: s.e(x).tanh().mean(1) + s.e(x[x > 9]).sum(), e=nn.Embedding(7, 3)
    ),
    "embedding called twice": lambda: of_tokens(lambda s, x: (s.e(x) * s.e(4 - x)).sum(1), e=nn.Embedding(5, 3)),
    "embedding with padding": lambda: (
        nn.Sequential(nn.Embedding(5, 3, padding_idx=-2), nn.Flatten(), nn.Tanh(), nn.LazyLinear(2)),
        "tokens",
    ),
    "embedding with padding counted from the end": lambda: of_tokens(
        lambda s, x: F.embedding(x, s.w, padding_idx=-2).tanh().mean(1), w=(5, 3)
    ),
    "embedding by frequency": lambda: of_tokens(
        lambda s, x: s.e(x).tanh().mean(1), e=nn.Embedding(5, 3, scale_grad_by_freq=True)
    ),
    "embedding bag": lambda: of_tokens(lambda s, x: s.e(x).tanh(), e=nn.EmbeddingBag(5, 3)),
    "tied embedding": lambda: of_tokens(
        lambda s, x: F.linear(torch.tanh(s.embed(x)), s.embed.weight).mean(1), embed=nn.Embedding(5, 3)
    ),
    "prelu": lambda: vector(nn.Linear(4, 5), nn.PReLU(), nn.Linear(5, 2)),
    "prelu of channels": lambda: image(nn.Conv2d(4, 3, 2), nn.PReLU(3)),
    "prelu of positions": lambda: image(nn.Conv2d(4, 3, 2), nn.PReLU()),
    "max pool with ties": lambda: image(nn.Conv2d(4, 3, 2), nn.ReLU(), nn.MaxPool2d(2, 1), nn.AdaptiveAvgPool2d(2)),
    "pixel shuffle": lambda: image(nn.Conv2d(4, 8, 2), nn.PixelShuffle(2), nn.Conv2d(2, 2, 3, stride=3)),
    "fold and unfold": lambda: image(nn.Conv2d(4, 2, 2), nn.Unfold(2), nn.Fold((4, 4), 2), nn.Softmax(1)),
    "upsampling": lambda: image(nn.Conv2d(4, 2, 3), nn.Upsample(scale_factor=2, mode="bilinear")),
    "complex numbers": lambda: of_vector(lambda s, x: torch.fft.fft(s.a(x)).abs() @ s.w, a=nn.Linear(4, 5), w=(5, 2)),
    "checkpoint": lambda: of_vector(
        lambda s, x: s.b(checkpoint(s.a, x, use_reentrant=False)),
        a=nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 4), nn.LayerNorm(4)),
        b=nn.Linear(4, 2),
    ),
    "input gradient": input_gradient,
    "torch.func inside": lambda: of_sequence(
        lambda s, x: torch.func.vmap(torch.func.grad(lambda z: s.b(s.a(z).tanh()).sum()))(x).mean(1),
        a=nn.Linear(3, 4),
        b=nn.Linear(4, 1),
    ),
    "scaled dot product": lambda: of_sequence(
        lambda s, x: attention(s, s.embed(x)), embed=nn.Linear(3, 4), project=nn.Linear(4, 12), out=nn.Linear(4, 2)
    ),
    "attention": lambda: of_sequence(
        lambda s, x: s.b(s.a(*[s.e(x)] * 3)[0].mean(1)),
        e=nn.Linear(3, 4),
        a=nn.MultiheadAttention(4, 2, batch_first=True),
        b=nn.Linear(4, 2),
    ),
    "attention, positions first": lambda: of_sequence(
        lambda s, x: s.b(s.a(*[s.e(x.transpose(0, 1))] * 3, need_weights=False)[0].mean(0)),
        e=nn.Linear(3, 4),
        a=nn.MultiheadAttention(4, 2),
        b=nn.Linear(4, 2),
    ),
    "attention to another sequence": lambda: of_sequence(
        lambda s, x: sum(s.a(s.e(x[:, :1]), *[s.e(x[:, 1:])] * 2, attn_mask=LAST)[0].mean(1) for _ in range(2)),
        e=nn.Linear(3, 4),
        a=nn.MultiheadAttention(4, 2, add_bias_kv=True, add_zero_attn=True, batch_first=True),
    ),
    "attention with its weights": lambda: of_sequence(
        lambda s, x: attended_and_weights(*s.a(s.e(x), s.f(x), s.e(x).tanh(), average_attn_weights=False)),
        e=nn.Linear(3, 4),
        f=nn.Linear(3, 4),
        a=nn.MultiheadAttention(4, 2, bias=False, batch_first=True),
    ),
    "attention of other widths": lambda: of_sequence(
        lambda s, x: s.a(s.e(x), x, x)[0].mean(1),
        e=nn.Linear(3, 4),
        a=nn.MultiheadAttention(4, 2, kdim=3, vdim=3, batch_first=True),
    ),
    "attention over examples": lambda: of_vector(
        lambda s, x: s.a(*[x.unsqueeze(0)] * 3)[0][0], a=nn.MultiheadAttention(4, 2, batch_first=True)
    ),
    "transformer": lambda: (
        nn.Sequential(
            nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True), nn.Flatten(), nn.LazyLinear(2)
        ),
        (3, 4),
    ),
    "gru": lambda: of_sequence(lambda s, x: s.b(s.a(x)[0][:, -1]), a=nn.GRU(3, 4, batch_first=True), b=nn.Linear(4, 2)),
    "lstm": lambda: of_sequence(lambda s, x: s.b(s.a(x.transpose(0, 1))[0][-1]), a=nn.LSTM(3, 3), b=nn.Linear(3, 2)),
    "rnn cell": lambda: of_sequence(
        lambda s, x: s.b(s.a(x[:, 1], s.a(x[:, 0]))), a=nn.RNNCell(3, 4), b=nn.Linear(4, 2)
    ),
}

MODULES = {**CONVOLUTIONS, **DENSE, **NORMALIZED, **OTHERS}
