"""Weights that are computed from parameters, and what a model may do with them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ntk
from ntk import errors
from ntk.forward import Evaluation
from ntk.recording import record
from tests.ntk.conformance import ROUTES, assert_same, each_route
from tests.ntk.modules import Apply
from tests.ntk.oracle import jacobian, kernel, state_hash
from tests.ntk.test_ntk_refusals import refused

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def assert_exact(model: nn.Module, x: Tensor = X) -> ntk.KernelResult:
    rows = jacobian(model, x)
    expected = kernel(rows, rows).numpy()
    result = ntk.empirical_ntk(model, x, implementation="structured")
    np.testing.assert_allclose(result.values, expected, rtol=0, atol=1e-10 * np.abs(expected).max())
    return result


def made(forward: Callable[[Apply, Tensor], Tensor], **parts: nn.Module | tuple) -> nn.Module:
    torch.manual_seed(0)
    return Apply(forward, **parts).double()


CHANGES = {
    "by what examples make": lambda s, w, x: w.add_(s.a(x).mean()),
    "by another parameter": lambda s, w, x: w.copy_(s.u),
    "to nothing": lambda s, w, x: w.zero_(),
    "cut off": lambda s, w, x: w.detach_(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_computed_weight_that_is_changed_once_it_was_applied(name: str) -> None:
    """What it was made of is what it was made of when it was applied."""

    def forward(s: Apply, x: Tensor) -> Tensor:
        weight = s.w * s.w
        y = x @ weight
        CHANGES[name](s, weight, x)
        return torch.tanh(y) @ s.v

    assert_exact(made(forward, w=(4, 3), v=(3, 2), a=nn.Linear(4, 3), u=(4, 3)))


def complex_weight(s: Apply) -> Tensor:
    return torch.view_as_complex(s.w)


def split(y: Tensor) -> Tensor:
    """Real and imaginary parts as features."""
    return torch.view_as_real(y).flatten(1)


COMPLEX = {
    "matrix product": lambda s, z: z @ complex_weight(s),
    "linear": lambda s, z: F.linear(z, complex_weight(s).T),
    "convolution": lambda s, z: F.conv1d(z.unsqueeze(1), complex_weight(s).unsqueeze(1)),
    "transposed convolution": lambda s, z: F.conv_transpose1d(z.unsqueeze(2), complex_weight(s).unsqueeze(2)),
    "gain": lambda s, z: z * complex_weight(s)[:, 0],
}


@pytest.mark.parametrize("name", COMPLEX)
def test_complex_weights_of_real_parameters(name: str) -> None:
    """As of a Fourier neural operator: the gradient by such a weight takes the conjugate of its input."""
    forward = lambda s, x: s.head(split(COMPLEX[name](s, torch.complex(x, s.first(x)))))
    assert_exact(made(forward, first=nn.Linear(4, 4), w=(4, 3, 2), head=nn.LazyLinear(2)))


class Keeps(nn.Module):
    """Computes its weight once, and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.head = nn.Parameter(torch.randn(3, 4)), nn.Linear(3, 2)
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = self.w.tanh()
        return self.head(F.linear(x, self.kept).tanh())


class Lists(Keeps):
    """Takes its weight from a list."""

    def __init__(self) -> None:
        super().__init__()
        self.double()
        self.kept = [self.w]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(x, self.kept[0]).tanh())


def kept_from_before() -> nn.Module:
    model = Keeps().double()
    model(X)
    return model


MEASURES = {
    **{route: partial(ntk.empirical_ntk, implementation=route) for route in ROUTES},
    "operator": ntk.NtkOperator,
    "linearized": lambda model, x: ntk.linearize(model)(x),
}


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
@pytest.mark.parametrize("make", [kept_from_before, Lists])
def test_parameters_that_enter_by_another_way_are_not_left_out(make: Callable, measure: Callable) -> None:
    model = make()
    before = state_hash(model)
    with refused(errors.WrappedModelError, "must take its parameters from its modules", "'w'", "clear what is kept"):
        measure(model, X)
    assert state_hash(model) == before
    if measure is MEASURES["structured"]:  # they are no concern of the kernel by others
        ntk.empirical_ntk(model, X, params=["head.weight"])


@each_route
def test_what_a_model_keeps_of_one_batch_does_not_enter_the_next(route: str) -> None:
    torch.manual_seed(0)
    model = Keeps().double()
    first, second = jacobian(model, X), jacobian(model, X[:3])
    model.kept = None
    for memory in (None, 10**6):
        result = ntk.empirical_ntk(model, X, X[:3], implementation=route, max_memory=memory)
        assert_same(result, kernel(first, second))
    assert model.kept is None


QUERIES = {
    "learned": (lambda s: s.q, {"q"}),
    "computed": (lambda s: s.q.sin() + s.r, {"q", "r"}),
    "rows of the weight that it meets": (lambda s: s.a.in_proj_weight[:2], {"a.in_proj_weight"}),
}


@pytest.mark.parametrize("name", QUERIES)
def test_attention_by_a_query_that_is_no_example(name: str) -> None:
    """It goes through the Jacobian, and the projections that it meets do not."""
    query, by_jacobian = QUERIES[name]

    def forward(s: Apply, x: Tensor) -> Tensor:
        tokens = s.embed(x).unflatten(1, (3, 4))
        return s.a(query(s).expand(len(x), -1, -1), tokens, tokens)[0].mean(1)

    parts = {"embed": nn.Linear(4, 12), "q": (2, 4), "r": (2, 4)}
    model = made(forward, a=nn.MultiheadAttention(4, 2, batch_first=True), **parts)
    assert set(assert_exact(model).by_jacobian) == by_jacobian


INNER = {
    "by a parameter": (lambda s: s.w, 0.0),
    "by a computed weight": (lambda s: s.w.tanh(), 0.0),
    "by one that is used without a rule, too": (lambda s: s.w, 0.1),
}


@pytest.mark.parametrize("materialize", [False, True])
@pytest.mark.parametrize("name", INNER)
@each_route
def test_a_step_of_gradient_descent_inside_a_model(route: str, name: str, materialize: bool) -> None:
    """As in meta-learning: the weights that it is taken in stay connected, and no others have to."""
    weight, without_rule = INNER[name]

    def forward(s: Apply, x: Tensor) -> Tensor:
        by = weight(s)
        loss = F.linear(x, by).tanh().square().mean()
        if without_rule:
            loss = loss + without_rule * torch.einsum("oi,ni->", by, x)
        step = torch.autograd.grad(outputs=loss, inputs=by, create_graph=True, materialize_grads=materialize)
        return s.head(F.linear(x, by - step[0]).tanh())

    model = made(forward, w=(3, 4), head=nn.Linear(3, 2))
    rows = jacobian(model, X)
    result = ntk.empirical_ntk(model, X, implementation=route)
    assert_same(result, kernel(rows, rows))
    assert route != "structured" or result.by_jacobian == ("w",)


def test_a_gradient_that_is_not_felt_yet() -> None:
    """With a gain of zero the outputs do not tell that the gradient is missing, but the derivative by the gain does."""

    def forward(s: Apply, x: Tensor) -> Tensor:
        h = F.linear(x, s.w).tanh()
        step = torch.autograd.grad(h.square().sum(), s.w, create_graph=True, materialize_grads=True)
        return s.head(h) + s.gain * step[0].sum()

    model = made(forward, w=(3, 4), gain=(), head=nn.Linear(3, 2))
    model.gain.data.zero_()
    assert_exact(model)


class Scale(torch.autograd.Function):
    """The first argument times the mean of the second, past whoever watches functions."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, h: Tensor) -> Tensor:
        ctx.save_for_backward(weight, h)
        return torch.from_numpy(weight.detach().numpy() * h.detach().numpy().mean())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        weight, h = ctx.saved_tensors
        return gradient * h.mean(), ((gradient * weight).sum() / h.numel()).expand_as(h)


@pytest.mark.parametrize("of", [lambda s, x: s.first(x), lambda s, x: x], ids=["activations", "examples"])
def test_a_weight_that_is_made_of_examples_unseen(of: Callable) -> None:
    forward = lambda s, x: s.head(F.linear(x, Scale.apply(s.w, of(s, x))).tanh())
    assert_exact(made(forward, first=nn.Linear(4, 4), w=(3, 4), head=nn.Linear(3, 2)))


def changed_before(s: Apply, x: Tensor) -> Tensor:
    weight = s.w * s.w
    weight.mul_(s.u)
    weight[0].mul_(2)
    return torch.tanh(x @ weight) @ s.v


def pieces_of_one(s: Apply, x: Tensor) -> Tensor:
    first, second = s.w.exp().chunk(2)
    shift, gain = torch.stack([s.u, s.u.sin()]).unbind()
    return F.linear(x.sin(), second, shift) * F.linear(x, first) * gain


def one_of_the_other(s: Apply, x: Tensor) -> Tensor:
    first = F.normalize(s.w)
    return torch.tanh(x @ first) @ (first.T @ s.v) * s.v.sum()


WITH_RULES = {
    "changed before": (changed_before, {"w": (4, 3), "u": (3,), "v": (3, 2)}),
    "pieces of one": (pieces_of_one, {"w": (4, 4), "u": (2,)}),
    "one of the other": (one_of_the_other, {"w": (4, 3), "v": (4, 2)}),
}


@pytest.mark.parametrize("name", WITH_RULES)
def test_weights_that_need_no_jacobian(name: str) -> None:
    forward, shapes = WITH_RULES[name]
    assert assert_exact(made(forward, **shapes)).by_jacobian == ()


def test_a_weight_that_is_added_to_its_own_product() -> None:
    model = made(lambda s, x: torch.addmm(s.w, x, s.w).tanh(), w=(4, 3))
    assert assert_exact(model, X[:4]).by_jacobian == ("w",)


@pytest.mark.parametrize("heads", [1, 2])
def test_attention_that_takes_examples_for_positions(heads: int) -> None:
    """Of which there are as many, so that nothing but its derivatives tells."""
    forward = lambda s, x: s.head(s.a(*[s.embed(x).unflatten(1, (5, 4))] * 3)[0].mean(1))
    parts = {"embed": nn.Linear(4, 20), "head": nn.Linear(4, 2)}
    assert_exact(made(forward, a=nn.MultiheadAttention(4, heads), **parts))


def attend(s: Apply, x: Tensor, out: Tensor, **given: Tensor) -> Tensor:
    tokens = s.embed(x).unflatten(1, (3, 4)).transpose(0, 1)
    arguments = {"in_proj_weight": s.w, "in_proj_bias": None, "out_proj_weight": out, "out_proj_bias": None}
    arguments |= {"bias_k": None, "bias_v": None, "add_zero_attn": False, "dropout_p": 0.0, "need_weights": False}
    call = F.multi_head_attention_forward
    return call(tokens, tokens, tokens.sin(), embed_dim_to_check=4, num_heads=2, **arguments, **given)[0].mean(0)


FUNCTION = {
    "more outputs than entries": lambda s, x: attend(s, x, s.out),
    "weights in pieces of one": lambda s, x: attend(s, x, s.w[2:8]),
    "keys given": lambda s, x: attend(s, x, s.out, static_k=s.key(x).reshape(-1, 3, 2)),
    "keys and values given": lambda s, x: attend(
        s, x, s.out, static_k=s.key(x).reshape(-1, 3, 2), static_v=s.key(x).sin().reshape(-1, 3, 2)
    ),
}


@pytest.mark.parametrize("name", FUNCTION)
def test_the_function_of_attention(name: str) -> None:
    parts = {"embed": nn.Linear(4, 12), "key": nn.Linear(4, 12), "w": (12, 4), "out": (6, 4)}
    assert assert_exact(made(FUNCTION[name], **parts)).by_jacobian == ()


class Stops(torch.autograd.Function):
    """Has no derivative, and says so by None."""

    @staticmethod
    def forward(ctx: object, weight: Tensor) -> Tensor:
        return weight.exp()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> None:
        return None


def test_a_weight_without_a_derivative() -> None:
    model = made(lambda s, x: s.head(F.linear(x, Stops.apply(s.w))), w=(3, 4), head=nn.Linear(3, 2))
    assert assert_exact(model).by_jacobian == ()


def test_weights_that_are_normalized_as_a_batch_couple_no_examples() -> None:
    """As weight standardization is written by some, with `torch.nn.functional.batch_norm`."""
    standardized = lambda weight: F.batch_norm(weight[None], None, None, training=True)[0]
    forward = lambda s, x: s.head(F.linear(F.linear(x, standardized(s.w)).tanh(), standardized(s.v)))
    model = made(forward, w=(3, 4), v=(3, 3), head=nn.Linear(3, 2))
    (part,) = record(model, [("x1", X)], [name for name, _ in model.named_parameters()], Evaluation())
    assert (part.capture.coupled, part.capture.normalized) == (0, False)
    assert_exact(model)
