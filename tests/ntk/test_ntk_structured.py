"""What is particular to the layer-wise contraction: its rules, how it sums, and where it looks for batch statistics.

That its kernel is right is what tests/ntk/test_ntk_conformance.py shows, of every route.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ntk
from ntk import blocks, examples_apart, structured
from ntk import errors as ntk_errors
from ntk.forward import Evaluation
from ntk.recording import record
from tests.ntk.conformance import assert_same, reduced, scaled
from tests.ntk.modules import MODULES, Apply, build
from tests.ntk.oracle import jacobian, kernel, least_memory

pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel lengths:UserWarning")

WITHOUT_RULE = {
    "conv without batch axis": {"a.weight", "a.bias"},
    "linear on each example": {"a.weight", "a.bias"},
    "linear with one bias": {"b"},
    "linear with a vector": {"w"},
    "input changed afterwards": {"p"},
    "weight on the left": {"w"},
    "weight made of examples": {"w", "v"},
    "computed weight and what it is made of, without rule": {"w"},
    "computed weight changed afterwards": {"w"},
    "weight by einsum": {"w"},
    "baddbmm": {"w", "b"},
    "bilinear": {"a.weight", "a.bias"},
    "gain in place": {"p", "q"},
    "embedding by frequency": {"e.weight"},
    "embedding bag": {"e.weight"},
    "input gradient": {"inner.weight", "inner.bias", "norm.weight", "norm.bias", "head.weight"},
    "torch.func inside": {"a.weight", "a.bias", "b.weight"},
    "attention to another sequence": {"a.bias_k", "a.bias_v"},
    "attention of other widths": {
        f"a.{n}" for n in ("in_proj_bias", *(f"{k}_proj_weight" for k in "qkv"), "out_proj.weight", "out_proj.bias")
    },
    "gru": {f"a.{kind}_{gate}_l0" for kind in ("weight", "bias") for gate in ("ih", "hh")},
    "lstm": {f"a.{kind}_{gate}_l0" for kind in ("weight", "bias") for gate in ("ih", "hh")},
    "rnn cell": {f"a.{kind}_{gate}" for kind in ("weight", "bias") for gate in ("ih", "hh")},
}
"""What goes through the Jacobian; no parameter of any other module does."""


@pytest.mark.parametrize("name", MODULES)
def test_what_has_no_rule_is_named(name: str) -> None:
    model, x, _ = build(name)
    assert set(ntk.empirical_ntk(model, x, implementation="structured").by_jacobian) == WITHOUT_RULE.get(name, set())


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
@pytest.mark.parametrize(("units", "in_flight"), [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2)])
@pytest.mark.parametrize("name", ["linear", "conv2d", "conv2d groups", "linear over positions", "batch norm"])
def test_chunks_of_outputs(
    name: str, units: int, in_flight: int, cross: bool, reduce: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    portions = examples_apart.Portions(units, in_flight, entries=50, sums=math.inf)
    monkeypatch.setattr(structured, "choose_portions", lambda *arguments: portions)
    monkeypatch.setattr(blocks, "STRIP", 3)
    monkeypatch.setattr(blocks, "WRITTEN", 50)
    monkeypatch.setattr(blocks, "PRODUCTS", 20)
    model, x1, x2 = build(name)
    first, second = jacobian(model, x1), jacobian(model, x2)
    expected = kernel(first, second if cross else first)
    assert_same(ntk.empirical_ntk(model, x1, x2 if cross else None, reduce=reduce), reduced(expected, reduce))


@pytest.mark.parametrize("reduce", ["none", "trace", "sum"])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("way", ["positions", "outer", "separable"])
def test_multipliers_in_strips(way: str, cross: bool, reduce: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of weights, and of the biases that are added with them; also where products are summed over outputs first."""
    monkeypatch.setattr(blocks, "_ranking", lambda costs: [way, "outer"])
    monkeypatch.setattr(blocks, "STRIP", 2)
    torch.manual_seed(0)
    layers = [nn.Conv1d(2, 6, 3), nn.Tanh(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, 8), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(8, 3)).double()
    x1, x2 = torch.randn(5, 2, 6).double(), torch.randn(4, 2, 6).double()
    multipliers = dict(zip(dict(model.named_parameters()), (0.5, 3.0, 2.0, 0.25, 0.0, 1.5), strict=True))
    first, second = (scaled(jacobian(model, x), multipliers) for x in (x1, x2))
    expected = reduced(kernel(first, second if cross else first), reduce)
    for in_flight in (3, 2, 1):
        portions = examples_apart.Portions(3, in_flight, entries=50, sums=math.inf)
        monkeypatch.setattr(structured, "choose_portions", lambda *arguments, portions=portions: portions)
        result = ntk.empirical_ntk(model, x1, x2 if cross else None, reduce=reduce, params=multipliers)
        assert_same(result, expected)


@pytest.mark.parametrize("reduce", ["none", "trace"])
@pytest.mark.parametrize("name", MODULES)
def test_one_output_at_a_time(name: str, reduce: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples_apart, "IN_CACHE", 1)
    model, x1, x2 = build(name)
    first, second = jacobian(model, x1), jacobian(model, x2)
    assert_same(ntk.empirical_ntk(model, x1, reduce=reduce), reduced(kernel(first, first), reduce))
    assert_same(ntk.empirical_ntk(model, x1, x2, reduce=reduce), reduced(kernel(first, second), reduce))


def test_memory_that_is_too_little() -> None:
    model, x, _ = build("gru")
    with pytest.raises(ntk_errors.MemoryBudgetError, match=r"got 100 bytes\. max_memory=\d+ would do"):
        ntk.empirical_ntk(model, x, max_memory=100, implementation="structured")


def test_memory_that_the_error_names_is_enough() -> None:
    """Of each layer, where some go by rows of the Jacobian and the others are contracted output by output."""
    torch.manual_seed(0)
    before = [nn.Conv2d(2, 6, 2), *(nn.GroupNorm(1, 6) for _ in range(4)), nn.BatchNorm2d(6, affine=False)]
    model = nn.Sequential(*before, nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 1)).double()
    x1, x2 = torch.randn(2, 2, 5, 7).double(), torch.randn(5, 2, 5, 7).double()
    for other in (None, x2):
        compute = partial(ntk.layerwise_ntk, model, x1, other, reduce="trace", implementation="structured")
        expected, found = compute(), compute(max_memory=least_memory(compute))
        for layer, share in expected.items():
            np.testing.assert_allclose(found[layer].values, share.values, rtol=1e-9, atol=1e-12)


def independent(name: str) -> dict[str, bool]:
    """Parameter -> whether the examples do not meet between it and the output."""
    model, x, _ = build(name, n=6)
    (part,) = record(model, [("x1", x)], [key for key, _ in model.named_parameters()], Evaluation())
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
    assert set(independent("transformer").values()) == {True}
    assert set(independent("attention over examples").values()) == {False}


def test_examples_that_meet_are_not_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: without the test for it, the kernel of a batch-normalized network is wrong."""
    model, x, _ = build("batch norm")
    rows = jacobian(model, x)
    expected = kernel(rows, rows).numpy()
    monkeypatch.setattr(structured, "_independent_sites", lambda part: [True] * len(part.capture.sites))
    wrong = ntk.empirical_ntk(model, x).values
    assert np.abs(wrong - expected).max() > 0.01 * np.abs(expected).max()


def test_what_lies_before_batch_statistics_is_not_put_to_the_test() -> None:
    for name, before in (("batch norm 2d", 1), ("batch norm of torch", 1), ("batch norm in eval mode", 0)):
        model, x, _ = build(name)
        (part,) = record(model, [("x1", x)], [key for key, _ in model.named_parameters()], Evaluation())
        assert part.capture.coupled == before


def less_its_mean(gradient: Tensor) -> Tensor:
    return gradient - gradient.mean(0)


def hook(s: Apply, h: Tensor) -> Tensor:
    if h.requires_grad:
        h.register_hook(less_its_mean)
    return s.b(h)


def hook_on_the_graph(s: Apply, h: Tensor) -> Tensor:
    if h.requires_grad:
        h.grad_fn.register_prehook(lambda gradients: (less_its_mean(gradients[0]),))
    return s.b(h)


def base_of_a_view(s: Apply, h: Tensor) -> Tensor:
    """Five examples of five features."""
    turned = h.T
    h.mul_(s.c(h.clone()))
    return s.b(turned)


def another_thread(s: Apply, h: Tensor) -> Tensor:
    with ThreadPoolExecutor(1) as pool:
        return s.b(pool.submit(lambda: h - h.mean(0)).result())


@pytest.mark.parametrize("function", [hook, hook_on_the_graph, base_of_a_view, another_thread])
@pytest.mark.parametrize("activation", [torch.sin, torch.clone])
def test_examples_that_meet_behind_the_back_of_autograd(function: Callable, activation: Callable) -> None:
    torch.manual_seed(0)
    layers = {"a": nn.Linear(4, 5), "b": nn.Linear(5, 3), "c": nn.Linear(5, 5)}
    model, x = Apply(lambda s, x: function(s, activation(s.a(x))), **layers).double(), torch.randn(5, 4).double()
    rows = jacobian(model, x)
    assert_same(ntk.empirical_ntk(model, x), kernel(rows, rows))


@pytest.mark.parametrize("name", ["register_prehook", "register_hook"])
def test_hooks_on_the_node_of_a_layer(name: str) -> None:
    """They run after the derivative by the output of the layer has been taken."""

    def forward(s: Apply, x: Tensor) -> Tensor:
        h = s.a(x)
        if h.requires_grad:
            getattr(h.grad_fn, name)(
                lambda gradients, *_: tuple(part if part is None else 2 * part for part in gradients)
            )
        return s.b(h.tanh())

    model, x = Apply(forward, a=nn.Linear(4, 5, bias=False), b=nn.Linear(5, 3)).double(), torch.randn(5, 4).double()
    rows = jacobian(model, x)
    assert_same(ntk.empirical_ntk(model, x), kernel(rows, rows))


def test_weak_coupling_is_seen() -> None:
    """Examples that meet with a weight of 1e-9 are still not independent in float64."""
    model = Apply(lambda s, x: s.b(torch.tanh(s.a(x) + 1e-9 * s.a(x).sum(0))), a=nn.Linear(4, 4), b=nn.Linear(4, 2))
    (part,) = record(model.double(), [("x1", torch.randn(6, 4).double())], ["a.weight", "b.weight"], Evaluation())
    assert structured._independent_sites(part) == [True, False, True]


def test_a_rule_that_serves_one_batch_only() -> None:
    """A model that takes another path on the second batch, where its weight has no rule."""
    path = lambda s, x: s.a(x).tanh() if x.sum() > 0 else (torch.einsum("ni,oi->no", x, s.a.weight) + s.a.bias).sin()
    model, x = Apply(path, a=nn.Linear(4, 3)).double(), torch.rand(3, 4).double()
    result = ntk.empirical_ntk(model, x, -x, implementation="structured")
    assert result.by_jacobian == ("a.weight",)
    assert_same(result, kernel(jacobian(model, x), jacobian(model, -x)))


RECOMPUTED = {
    "convolution": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 2), nn.Flatten()), (3, 5, 5)),
    "attention": (nn.Sequential(nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True), nn.Flatten()), (4, 4)),
}


@pytest.mark.parametrize("name", RECOMPUTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layers_whose_activations_are_computed_again(name: str, dtype: torch.dtype) -> None:
    """What is arranged otherwise for speed is then not what the backward pass finds."""
    torch.manual_seed(0)
    inner, shape = RECOMPUTED[name]
    model = Apply(lambda s, x: s.b(checkpoint(s.a, x, use_reentrant=False)), a=inner, b=nn.Linear(16, 2)).double()
    x = torch.randn(5, *shape).double()
    rows = jacobian(model, x)
    model.to(dtype)
    exact = dtype == torch.float64
    for params in (None, ["b.weight"]):
        own = rows if params is None else {name: rows[name] for name in params}
        assert_same(ntk.empirical_ntk(model, x.to(dtype), params=params), kernel(own, own), 1e-10 if exact else 1e-4)


def minus_a_step(s: Apply, x: Tensor) -> Tensor:
    """A network adapted to its batch, as in meta-learning."""
    loss = (s.a(x).tanh() - 1).square().sum()
    (gradient,) = torch.autograd.grad(loss, s.a.weight, create_graph=True, allow_unused=True)
    return F.linear(x, s.a.weight - 0.1 * gradient, s.a.bias).tanh()


def features_without_versions(s: Apply, x: Tensor) -> Tensor:
    with torch.inference_mode():
        features = x.sin()
    return s.a((features + s.p).tanh())


def gradients_retained(s: Apply, x: Tensor) -> Tensor:
    h = s.b(x).sin()
    if h.requires_grad:
        h.retain_grad()
    return s.a(h + s.p)


@pytest.mark.parametrize(
    "forward",
    [features_without_versions, gradients_retained, lambda s, x: s.a(torch.pow(2.0, s.b(x)) + s.p), minus_a_step],
)
def test_ways_to_write_a_forward_pass(forward: Callable[[Apply, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = Apply(forward, a=nn.Linear(4, 2), b=nn.Linear(4, 4), p=(4,)).double()
    x1, x2 = torch.randn(5, 4).double(), torch.randn(3, 4).double()
    first, second = jacobian(model, x1), jacobian(model, x2)
    assert_same(ntk.empirical_ntk(model, x1), kernel(first, first))
    assert_same(ntk.empirical_ntk(model, x1, x2), kernel(first, second))
    assert_same(ntk.empirical_ntk(model, x1, implementation="jacobian_contraction"), kernel(first, first))


def test_a_detached_output_depends_on_nothing() -> None:
    with pytest.raises(ntk_errors.NoParametersError, match="depends on none of the selected parameters"):
        ntk.empirical_ntk(Apply(lambda s, x: s.a(x).detach(), a=nn.Linear(4, 2)), torch.randn(3, 4))


def test_parameters_chosen_by_name() -> None:
    model, x, _ = build("linear in place")
    rows = jacobian(model, x)
    for names in (["2.bias"], ["0.weight", "2.bias"], ["0.weight", "0.bias"]):
        own = {name: rows[name] for name in names}
        assert_same(ntk.empirical_ntk(model, x, params=names), kernel(own, own))
