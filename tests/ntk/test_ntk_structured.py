"""The layer-wise contraction against a loop of whole-batch gradients, over every rule and what has none."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ntk
from ntk import blocks, structured
from ntk import errors as ntk_errors
from ntk.structured import record
from tests.ntk.oracle import jacobian, kernel, state_hash

RELATIVE = 1e-10
"""Exact identity in float64 (style.md, tolerance policy)."""


class Apply(nn.Module):
    """A module from a function of itself, its modules and parameters, and x."""

    def __init__(self, function: Callable[["Apply", torch.Tensor], torch.Tensor], **parts: nn.Module | tuple) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part if isinstance(part, nn.Module) else nn.Parameter(torch.randn(part)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


def image(*layers: nn.Module, channels: int = 4, size: int = 5) -> tuple[nn.Module, tuple[int, ...]]:
    return nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.LazyLinear(2)), (channels, size, size)


def signal(*layers: nn.Module, channels: int = 4, length: int = 6) -> tuple[nn.Module, tuple[int, ...]]:
    return nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.LazyLinear(2)), (channels, length)


def vector(*layers: nn.Module) -> tuple[nn.Module, tuple[int, ...]]:
    return nn.Sequential(*layers), (4,)


def tied_embedding() -> nn.Module:
    return Apply(lambda s, x: F.linear(torch.tanh(s.embed(x)), s.embed.weight).mean(1), embed=nn.Embedding(5, 3))


def residual() -> nn.Module:
    def forward(self: Apply, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        h += torch.relu_(self.second(h.tanh()))
        return self.head(h)

    return Apply(forward, first=nn.Linear(4, 4), second=nn.Linear(4, 4), head=nn.Linear(4, 3))


CONV_TYPES = {
    "conv1d": lambda: signal(nn.Conv1d(4, 3, 3, stride=2, padding=2, dilation=2)),
    "conv1d same": lambda: signal(nn.Conv1d(4, 3, 4, padding="same", dilation=2)),
    "conv1d valid": lambda: signal(nn.Conv1d(4, 2, 2, padding="valid")),
    "conv2d": lambda: image(nn.Conv2d(4, 3, 3)),
    "conv2d 1x1": lambda: image(nn.Conv2d(4, 6, 1)),
    "conv2d anisotropic": lambda: image(nn.Conv2d(4, 3, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1))),
    "conv2d groups": lambda: image(nn.Conv2d(4, 6, 3, padding=1, groups=2)),
    "conv2d depthwise": lambda: image(nn.Conv2d(4, 8, 3, groups=4, bias=False), nn.Conv2d(8, 3, 1)),
    "conv2d circular": lambda: image(nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular")),
    "conv2d whole image": lambda: image(nn.Conv2d(4, 6, 5)),
    "conv3d": lambda: (
        nn.Sequential(nn.Conv3d(2, 3, 2, stride=(1, 2, 1), padding=1), nn.Flatten(), nn.Tanh(), nn.LazyLinear(2)),
        (2, 3, 3, 3),
    ),
    "conv transposed 1d": lambda: signal(nn.ConvTranspose1d(4, 3, 3, stride=2, output_padding=1)),
    "conv transposed 2d": lambda: image(nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2, dilation=2)),
    "conv transposed 3d": lambda: (
        nn.Sequential(nn.ConvTranspose3d(2, 2, 2, bias=False), nn.Flatten(), nn.Tanh(), nn.LazyLinear(2)),
        (2, 2, 2, 2),
    ),
}

OTHERS = {
    "linear": lambda: vector(nn.Linear(4, 3)),
    "linear without bias": lambda: vector(nn.Linear(4, 6, bias=False), nn.GELU(), nn.Linear(6, 2, bias=False)),
    "linear in place": lambda: vector(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)),
    "linear over positions": lambda: signal(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)),
    "linear over folded positions": lambda: (
        Apply(
            lambda s, x: s.head(torch.tanh(s.inner(x.flatten(0, 1))).reshape(len(x), -1)),
            inner=nn.Linear(3, 2),
            head=nn.Linear(8, 2),
        ),
        (4, 3),
    ),
    "linear, positions first": lambda: (
        Apply(
            lambda s, x: s.head(torch.tanh(s.inner(x.transpose(0, 1))).sum(0)),
            inner=nn.Linear(3, 2),
            head=nn.Linear(2, 2),
        ),
        (4, 3),
    ),
    "residual in place": lambda: (residual(), (4,)),
    "called twice": lambda: (Apply(lambda s, x: s.a(torch.tanh(s.a(x))), a=nn.Linear(4, 4)), (4,)),
    "called on two lengths": lambda: (
        Apply(lambda s, x: s.a(torch.tanh(s.a(x))).sum(1) + s.a(x[:, 0]), a=nn.Linear(3, 3)),
        (4, 3),
    ),
    "bias of its own": lambda: (
        Apply(lambda s, x: s.a(x) + F.linear(torch.tanh(x), s.a.weight), a=nn.Linear(4, 4)),
        (4,),
    ),
    "conv called twice": lambda: image(conv := nn.Conv2d(4, 4, 3, padding=1), nn.Tanh(), conv),
    "matrix product": lambda: (Apply(lambda s, x: torch.tanh(x @ s.w) @ s.v, w=(4, 5), v=(5, 2)), (4,)),
    "scalars and shifts": lambda: (
        Apply(lambda s, x: s.a((s.g * x + s.p).tanh()) * s.h - s.k, a=nn.Linear(4, 3), g=(), p=(4,), h=(1, 3), k=(3,)),
        (4,),
    ),
    "position embedding": lambda: (
        Apply(lambda s, x: s.a((x + s.p).tanh()).mean(1), a=nn.Linear(3, 2), p=(1, 4, 3)),
        (4, 3),
    ),
    "embedding": lambda: (Apply(lambda s, x: s.e(x).tanh().mean(1), e=nn.Embedding(7, 3)), "tokens"),
    "embedding with padding": lambda: (
        nn.Sequential(nn.Embedding(5, 3, padding_idx=-2), nn.Flatten(), nn.Tanh(), nn.LazyLinear(2)),
        "tokens",
    ),
    "tied embedding": lambda: (tied_embedding(), "tokens"),
    "prelu": lambda: vector(nn.Linear(4, 5), nn.PReLU(), nn.Linear(5, 2)),
    "prelu of channels": lambda: image(nn.Conv2d(4, 3, 2), nn.PReLU(3)),
    "batch norm": lambda: vector(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)),
    "batch norm 2d": lambda: image(nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Conv2d(3, 2, 2)),
    "batch norm last": lambda: vector(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3)),
    "batch norm without statistics": lambda: vector(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)),
    "batch norm called twice": lambda: (
        Apply(lambda s, x: s.n(s.a(s.n(x).tanh())), a=nn.Linear(4, 4), n=nn.BatchNorm1d(4)),
        (4,),
    ),
    "wide batch norm": lambda: vector(nn.Linear(4, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 2)),
    "mean over the batch": lambda: (
        Apply(lambda s, x: s.b(torch.tanh(s.a(x) - s.a(x).mean(0))), a=nn.Linear(4, 4), b=nn.Linear(4, 2)),
        (4,),
    ),
    "layer norm": lambda: vector(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 2)),
    "layer norm of two axes": lambda: signal(nn.LayerNorm((4, 6))),
    "layer norm over positions": lambda: signal(nn.LayerNorm(6)),
    "rms norm": lambda: signal(nn.RMSNorm(6)),
    "group norm": lambda: image(nn.Conv2d(4, 4, 2), nn.GroupNorm(2, 4)),
    "instance norm": lambda: image(nn.Conv2d(4, 3, 2), nn.InstanceNorm2d(3, affine=True)),
    "weight norm": lambda: vector(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 2)),
    "rule and no rule": lambda: (Apply(lambda s, x: s.a(x) + x @ s.a.weight.exp().T, a=nn.Linear(4, 3)), (4,)),
    "attention": lambda: (
        Apply(
            lambda s, x: s.b(s.a(x, x, x)[0].mean(1)),
            a=nn.MultiheadAttention(4, 2, batch_first=True),
            b=nn.Linear(4, 2),
        ),
        (3, 4),
    ),
    "transformer": lambda: (
        nn.Sequential(
            nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True), nn.Flatten(), nn.LazyLinear(2)
        ),
        (3, 4),
    ),
    "gru": lambda: (
        Apply(lambda s, x: s.b(s.a(x)[0][:, -1]), a=nn.GRU(3, 4, batch_first=True), b=nn.Linear(4, 2)),
        (4, 3),
    ),
    "bilinear": lambda: (Apply(lambda s, x: s.a(x, x.tanh()), a=nn.Bilinear(4, 4, 2)), (4,)),
    "one output": lambda: vector(nn.Linear(4, 1), nn.Flatten(0)),
    "unused layer": lambda: (Apply(lambda s, x: s.a(x), a=nn.Linear(4, 2), b=nn.Linear(4, 2)), (4,)),
    "layer without influence": lambda: (
        Apply(lambda s, x: s.a(x + s.b(x).detach()), a=nn.Linear(4, 2), b=nn.Linear(4, 4)),
        (4,),
    ),
}

MODULES = {**CONV_TYPES, **OTHERS}

WITHOUT_RULE = {
    "weight norm": {"0.parametrizations.weight.original0", "0.parametrizations.weight.original1"},
    "rule and no rule": {"a.weight"},
    "attention": {"a.in_proj_weight", "a.in_proj_bias", "a.out_proj.weight", "a.out_proj.bias"},
    "transformer": {f"0.self_attn.{n}" for n in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")},
    "gru": {"a.weight_ih_l0", "a.weight_hh_l0", "a.bias_ih_l0", "a.bias_hh_l0"},
    "bilinear": {"a.weight", "a.bias"},
}


def build(name: str, n: int = 4, m: int = 3) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model, shape = MODULES[name]()
    draw = (lambda n: torch.randint(5, (n, 4))) if shape == "tokens" else (lambda n: torch.randn(n, *shape).double())
    x1, x2 = draw(n), draw(m)
    model.double()(x1)  # lazy layers take their shape
    return model, x1, x2


def reduced(values: torch.Tensor, reduce: str) -> torch.Tensor:
    if reduce == "trace":
        return torch.einsum("ijaa->ij", values) / values.shape[2]
    return values.sum((2, 3)) if reduce == "sum" else values


def assert_same(result: ntk.KernelResult, expected: torch.Tensor) -> None:
    assert result.shape == tuple(expected.shape)
    assert np.abs(result.values - expected.numpy()).max() <= RELATIVE * float(expected.abs().max())


def test_there_are_enough_modules() -> None:
    assert len(MODULES) >= 30


@pytest.mark.parametrize("name", MODULES)
def test_every_reduction_of_gram_and_cross_kernel(name: str) -> None:
    model, x1, x2 = build(name)
    first, second = jacobian(model, x1), jacobian(model, x2)
    for x, other in ((None, first), (x2, second)):
        expected = kernel(first, other)
        for reduce in ("none", "trace", "sum"):
            result = ntk.empirical_ntk(model, x1, x, reduce=reduce, implementation="structured")
            assert_same(result, reduced(expected, reduce))
            assert set(result.by_jacobian) == WITHOUT_RULE.get(name, set())


@pytest.mark.parametrize("name", MODULES)
def test_projected_and_scaled(name: str) -> None:
    """`center_rows` acts on one factor, and a callable that is not known on the gradient: both as the definition."""
    model, x, _ = build(name)
    rows = jacobian(model, x)
    multipliers = {key: 0.5 + index for index, key in enumerate(rows)}
    projected = dict(rows)
    for key, value in rows.items():
        if value.ndim >= 4:
            projected[key] = value - value.mean(tuple(range(3, value.ndim)), keepdim=True)
    expected = sum(c * kernel({key: projected[key]}, {key: projected[key]}) for key, c in multipliers.items())
    for projection in (ntk.center_rows, lambda weight: ntk.center_rows(weight)):
        result = ntk.empirical_ntk(model, x, projection=projection, params=multipliers, implementation="structured")
        assert_same(result, expected)


@pytest.mark.parametrize("way", ["positions", "outer", "separable"])
@pytest.mark.parametrize("reduce", ["none", "trace"])
@pytest.mark.parametrize("name", ["conv2d groups", "conv transposed 2d", "embedding", "called twice", "layer norm"])
def test_every_way_to_sum(name: str, reduce: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_ranking", lambda costs: [way, "outer"])
    model, x1, x2 = build(name)
    first, second = jacobian(model, x1), jacobian(model, x2)
    assert_same(ntk.empirical_ntk(model, x1, reduce=reduce), reduced(kernel(first, first), reduce))
    assert_same(ntk.empirical_ntk(model, x1, x2, reduce=reduce), reduced(kernel(first, second), reduce))


@pytest.mark.parametrize("reduce", ["none", "trace", "sum"])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("units", [1, 2])
@pytest.mark.parametrize("name", ["conv2d groups", "linear over positions", "batch norm"])
def test_chunks_of_outputs(name: str, units: int, cross: bool, reduce: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structured, "_units_at_once", lambda *arguments: units)
    monkeypatch.setattr(structured, "ENTRIES", 50)
    monkeypatch.setattr(blocks, "STRIP", 3)
    model, x1, x2 = build(name)
    first, second = jacobian(model, x1), jacobian(model, x2)
    expected = kernel(first, second if cross else first)
    assert_same(ntk.empirical_ntk(model, x1, x2 if cross else None, reduce=reduce), reduced(expected, reduce))


@pytest.mark.parametrize("name", ["linear in place", "conv2d groups", "batch norm", "gru"])
def test_memory(name: str) -> None:
    """Any budget gives the same kernel or an error that names one that does; "auto" needs no more than the Jacobian."""
    model, x, _ = build(name)
    expected = ntk.empirical_ntk(model, x).values
    for budget in (3 * 8 * sum(p.numel() for p in model.parameters()), 10_000, 30_000, 100_000):
        result = ntk.empirical_ntk(model, x, max_memory=budget)
        assert np.abs(result.values - expected).max() <= RELATIVE * np.abs(expected).max()
    with pytest.raises(ntk_errors.MemoryBudgetError, match=r"got 100 bytes\. max_memory=\d+ would do"):
        ntk.empirical_ntk(model, x, max_memory=100, implementation="structured")


def independent(name: str) -> dict[str, bool]:
    """Parameter -> whether the examples do not meet between it and the output."""
    model, x, _ = build(name, n=6)
    (part,) = record(model, [("x1", x)], [key for key, _ in model.named_parameters()], None)
    flags = structured._independent_sites(part)
    return {factor.name: flag for flag, site in zip(flags, part.capture.sites, strict=True) for factor in site.factors}


def test_where_examples_meet() -> None:
    assert independent("batch norm") == {
        "0.weight": False, "0.bias": False, "1.weight": True, "1.bias": True, "3.weight": True, "3.bias": True
    }  # fmt: skip
    assert independent("mean over the batch") == {"a.weight": False, "a.bias": False, "b.weight": True, "b.bias": True}
    assert independent("linear, positions first") == {
        "inner.weight": False, "inner.bias": False, "head.weight": True, "head.bias": True
    }  # fmt: skip
    assert set(independent("linear over folded positions").values()) == {True}
    assert set(independent("group norm").values()) == {True}


def test_examples_that_meet_are_not_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: without the test for it, the kernel of a batch-normalized network is wrong."""
    model, x, _ = build("batch norm")
    rows = jacobian(model, x)
    expected = kernel(rows, rows).numpy()
    monkeypatch.setattr(structured, "_independent_sites", lambda part: [True] * len(part.capture.sites))
    wrong = ntk.empirical_ntk(model, x).values
    assert np.abs(wrong - expected).max() > 0.01 * np.abs(expected).max()


def test_weak_coupling_is_seen() -> None:
    """Examples that meet with a weight of 1e-9 are still not independent in float64."""
    model = Apply(lambda s, x: s.b(torch.tanh(s.a(x) + 1e-9 * s.a(x).sum(0))), a=nn.Linear(4, 4), b=nn.Linear(4, 2))
    (part,) = record(model.double(), [("x1", torch.randn(6, 4).double())], ["a.weight", "b.weight"], None)
    assert structured._independent_sites(part) == [True, False, True]


@pytest.mark.parametrize("name", ["linear in place", "conv2d", "layer norm", "called twice"])
def test_float32_is_what_its_dtype_explains(name: str) -> None:
    model, x, _ = build(name)
    exact = ntk.empirical_ntk(model, x).values
    rows = jacobian(model.float(), x.float())
    allowed = 2 * np.abs(kernel(rows, rows).numpy() - exact).max()
    result = ntk.empirical_ntk(model, x.float())
    assert result.dtype == np.float32
    assert np.abs(result.values - exact).max() <= max(allowed, 1e-6 * np.abs(exact).max())


@pytest.mark.parametrize("name", MODULES)
def test_nothing_is_left_changed(name: str) -> None:
    model, x, _ = build(name)
    model(x).sum().backward()
    before = state_hash(model)
    ntk.empirical_ntk(model, x)
    assert state_hash(model) == before


def test_layers_add_up() -> None:
    model, x, _ = build("conv2d groups")
    rows = jacobian(model, x)
    for layer, share in ntk.layerwise_ntk(model, x).items():
        own = {key: value for key, value in rows.items() if key.rpartition(".")[0] == layer}
        assert_same(share, kernel(own, own))


def test_a_detached_output_depends_on_nothing() -> None:
    with pytest.raises(ntk_errors.NoParametersError, match="depends on none of the selected parameters"):
        ntk.empirical_ntk(Apply(lambda s, x: s.a(x).detach(), a=nn.Linear(4, 2)), torch.randn(3, 4))


def test_parameters_chosen_by_name() -> None:
    model, x, _ = build("linear in place")
    rows = jacobian(model, x)
    for names in (["2.bias"], ["0.weight", "2.bias"], ["0.weight", "0.bias"]):
        own = {name: rows[name] for name in names}
        assert_same(ntk.empirical_ntk(model, x, params=names), kernel(own, own))
