"""A kernel of a part of what a model returns, and models of integers and of complex numbers."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ntk
from ntk import errors
from ntk.empirical import IMPLEMENTATIONS
from tests.ntk.oracle import jacobian, kernel, mlp
from tests.ntk.test_ntk_refusals import refused


@dataclass
class Record:
    loss: Tensor | None
    logits: Tensor
    states: tuple[Tensor, ...]


class Named(NamedTuple):
    logits: Tensor
    states: tuple[Tensor, ...]


@dataclass
class Both(OrderedDict):
    """A mapping and a dataclass at once, as Hugging Face models return."""

    logits: Tensor

    def __post_init__(self) -> None:
        self["logits"] = self.logits


class Network(nn.Module):
    """Hidden layer h and logits y, returned in one form or another."""

    def __init__(self, form: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.hidden, self.head, self.form = nn.Linear(4, 3), nn.Linear(3, 2), form

    def forward(self, x: Tensor) -> object:
        h = torch.tanh(self.hidden(x))
        return self.form(h, self.head(h))


def network(form: Callable[[Tensor, Tensor], object]) -> nn.Module:
    torch.manual_seed(0)
    return Network(form).double()


X = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

LOGITS: dict[str, tuple[Callable[[Tensor, Tensor], object], object]] = {
    "key": (lambda h, y: {"h": h, "logits": y}, "logits"),
    "key of an integer": (lambda h, y: {7: h, 3: y}, 3),
    "index": (lambda h, y: (h, y), 1),
    "negative index": (lambda h, y: [y, h], -2),
    "attribute of a dataclass": (lambda h, y: Record(None, y, (h,)), "logits"),
    "attribute of a named tuple": (lambda h, y: Named(y, (h,)), "logits"),
    "index into a named tuple": (lambda h, y: Named(y, (h,)), 0),
    "mapping and dataclass": (lambda h, y: Both(y), "logits"),
    "path": (lambda h, y: {"out": Record(None, h, (h, y))}, ("out", "states", 1)),
    "dotted path": (lambda h, y: {"out": Record(None, h, (h, y))}, "out.states.1"),
    "key with a dot": (lambda h, y: {"a.b": y, "a": {"b": h}}, "a.b"),
    "function": (lambda h, y: Record(None, y[:, :, None], (h,)), lambda returned: returned.logits.flatten(1)),
    "function of a tensor": (lambda h, y: y[:, :, None].expand(-1, -1, 1), lambda returned: returned.flatten(1)),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
@pytest.mark.parametrize("case", LOGITS)
def test_a_part_of_what_is_returned(case: str, implementation: str) -> None:
    form, output = LOGITS[case]
    rows = jacobian(network(lambda h, y: y), X)
    found = ntk.empirical_ntk(network(form), X, output=output, implementation=implementation)
    assert np.abs(found.values - kernel(rows, rows).numpy()).max() < 1e-10


def test_every_entry_takes_it() -> None:
    model, plain = network(lambda h, y: {"h": h, "y": y}), network(lambda h, y: h)
    expected = ntk.empirical_ntk(plain, X)
    shares = ntk.layerwise_ntk(model, X, output="h")
    assert np.abs(shares["hidden"].values - expected.values).max() < 1e-10
    assert not shares["head"].values.any()  # the hidden layer does not depend on the head
    operator = ntk.NtkOperator(model, X, output="h")
    assert np.abs(operator @ np.eye(12) - expected.flatten()).max() < 1e-10
    tracker = ntk.NtkTracker(model, X, output="h", reduce="none")
    tracker.record(0)
    assert abs(tracker.result.trace[0] / np.trace(expected.flatten()) - 1) < 1e-10
    linear = ntk.linearize(model, output="h")
    assert torch.equal(linear(X), plain(X))
    cross = ntk.empirical_ntk(model, X[:1], X[1:], output=lambda returned: returned["h"], reduce="trace")
    assert np.abs(cross.values - expected.trace_mean().values[:1, 1:]).max() < 1e-10


@pytest.mark.parametrize(
    ("form", "output", "words"),
    [
        (lambda h, y: {"h": h, "logits": y}, "logit", ("output", "dict", "'h', 'logits'", "'logit'", "Nearest")),
        (lambda h, y: (h, y), 2, ("output", "tuple", "must be one of '0', '1'", "received 2", "function")),
        (lambda h, y: Named(y, (h,)), "hidden", ("output", "Named", "'logits', 'states'", "received 'hidden'")),
        (lambda h, y: Record(None, y, (h,)), ("states", 3), ("output", "tuple", "'0'", "('states', 3)")),
        (lambda h, y: y, 0, ("output", "returns Tensor", "one of none", "received 0")),
    ],
)
def test_no_such_part(form: Callable, output: object, words: tuple[str, ...]) -> None:
    for measure in (ntk.empirical_ntk, ntk.layerwise_ntk, ntk.NtkOperator):
        with refused(errors.UnknownNameError, *words):
            measure(network(form), X, output=output)


@pytest.mark.parametrize("output", [1.5, (), ("a", None), ["a"]])
def test_no_way_to_name_a_part(output: object) -> None:
    with refused(TypeError, "output must be None, a key", "tuple", "function", repr(output), "output='logits'"):
        ntk.empirical_ntk(network(lambda h, y: y), X, output=output)


@pytest.mark.parametrize(
    ("form", "output", "words"),
    [
        (lambda h, y: {"h": h, "y": y}, None, ("one tensor [n, o]", "x1", "dict of 'h', 'y'", "output='logits'")),
        (lambda h, y: (h, y), None, ("tuple of 0, 1", "output=0")),
        (lambda h, y: Record(None, y, (h,)), None, ("Record of 'loss', 'logits', 'states'", "function")),
        (lambda h, y: Record(None, y, (h,)), "loss", ("one tensor [n, o]", "NoneType")),
        (lambda h, y: y[:, :, None], None, ("(4, 2, 1)", "Flatten", "output=lambda y: y.flatten(1)")),
        (lambda h, y: torch.complex(y, y), None, ("real outputs", "x1", "complex128", "torch.view_as_real")),
        (lambda h, y: y, lambda returned: returned.mean(0), ("4 examples", "(2,)")),
    ],
)
def test_what_is_no_matrix_of_outputs(form: Callable, output: object, words: tuple[str, ...]) -> None:
    with refused(errors.OutputShapeError, *words):
        ntk.empirical_ntk(network(form), X, output=output)


def test_complex_outputs_as_the_error_says() -> None:
    model = network(lambda h, y: torch.complex(y, y.square()))
    rows = jacobian(network(lambda h, y: torch.stack([y, y.square()], -1).flatten(1)), X)
    found = ntk.empirical_ntk(model, X, output=lambda y: torch.view_as_real(y).flatten(1))
    assert np.abs(found.values - kernel(rows, rows).numpy()).max() < 1e-10


class Spectrum(nn.Module):
    """Complex inputs, a real gain on them, and a complex buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.head = nn.Parameter(torch.randn(4)), nn.Linear(4, 2)
        self.register_buffer("phase", torch.polar(torch.ones(4), torch.arange(4.0)))

    def forward(self, z: Tensor) -> Tensor:
        return self.head(torch.fft.fft(z * self.gain * self.phase).abs())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
def test_complex_inputs(implementation: str) -> None:
    torch.manual_seed(0)
    model, z = Spectrum(), torch.randn(3, 4, dtype=torch.complex64)
    cast = ntk.empirical_ntk(model, z, dtype=torch.float64, implementation=implementation)
    model.double().phase = model.phase.to(torch.complex128)
    rows = jacobian(model, z.to(torch.complex128))
    expected = kernel(rows, rows).numpy()
    assert np.abs(cast.values - expected).max() < 1e-10 * np.abs(expected).max()


class Tokens(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 3, **options), nn.Linear(3, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(tokens.long())).sum(1))


@pytest.mark.parametrize("options", [{}, {"max_norm": 0.5}, {"padding_idx": 1}], ids=str)
@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.uint8])
def test_integer_inputs(kind: torch.dtype, options: dict) -> None:
    """With max_norm the layer writes into its weight when called, which must stay as it is."""
    torch.manual_seed(0)
    model, tokens = Tokens(**options).double(), torch.randint(0, 7, (5, 3)).to(kind)
    weight = model.embed.weight.detach().clone()
    found = ntk.empirical_ntk(model, tokens, dtype=torch.float64)
    assert torch.equal(model.embed.weight, weight)
    rows = jacobian(model, tokens)
    assert torch.equal(model.embed.weight, weight) == ("max_norm" not in options)  # the case is one
    assert np.abs(found.values - kernel(rows, rows).numpy()).max() < 1e-10


def test_boolean_inputs() -> None:
    torch.manual_seed(0)
    model, mask = Tokens().double(), torch.randint(0, 2, (5, 3)).bool()
    rows = jacobian(model, mask)
    assert np.abs(ntk.empirical_ntk(model, mask).values - kernel(rows, rows).numpy()).max() < 1e-10


def test_parameters_that_are_not_real() -> None:
    with refused(errors.ParameterTypeError, "real parameters", "'weight'", "complex64", "torch.view_as_complex"):
        ntk.empirical_ntk(nn.Linear(4, 2, dtype=torch.complex64), X)
    with refused(errors.ParameterTypeError, "no values yet", "lazy parameter 'weight'", "call it once"):
        ntk.empirical_ntk(nn.LazyLinear(2), X)
    with refused(errors.NonFiniteWeightsError, "1 non-finite", "buffer 'phase'"):
        model = Spectrum()
        model.phase[0] = complex(torch.nan, 0)
        ntk.empirical_ntk(model, X)


def test_frozen_parameters() -> None:
    torch.manual_seed(0)
    model = mlp().double()
    rows = jacobian(model, X)
    model[0].requires_grad_(False)
    for params, names in ((None, ["2.weight", "2.bias"]), (["0.weight", "2.bias"], ["0.weight", "2.bias"])):
        chosen = {name: rows[name] for name in names}
        found = ntk.empirical_ntk(model, X, params=params)
        assert np.abs(found.values - kernel(chosen, chosen).numpy()).max() < 1e-10
