"""Every refusal names the parameter, what is admissible, what came, and the next step."""

import random
import re
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import ntk
from ntk import errors
from ntk.memory import parse_memory
from tests.ntk.oracle import build, least_memory, mlp


def refused(error: type[Exception], *words: str) -> pytest.RaisesExc:
    """All words, in this order."""
    return pytest.raises(error, match="(?s)" + ".*".join(map(re.escape, words)))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return mlp().double()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("measure", [ntk.empirical_ntk, ntk.layerwise_ntk, ntk.empirical_nngp])
def test_non_finite_weight(net: nn.Module, x: torch.Tensor, bad: float, measure: Callable) -> None:
    net[2].weight.data[0, 1] = bad
    with refused(errors.NonFiniteWeightsError, "1 non-finite of 12", "parameter '2.weight'", "checkpoint"):
        measure(net, x)


def test_non_finite_buffer() -> None:
    model, x, _ = build("conv with BatchNorm")
    model[1].running_var[2] = torch.inf
    with refused(errors.NonFiniteWeightsError, "buffer '1.running_var'"):
        ntk.empirical_ntk(model.eval(), x)


@pytest.mark.parametrize("measure", [ntk.empirical_ntk, ntk.empirical_nngp])
def test_batch_of_one(measure: Callable) -> None:
    model, x, _ = build("conv with BatchNorm")
    with refused(errors.BatchOfOneError, "at least 2", "module '1'", "got 1", "model.eval()"):
        measure(model, x[:1])
    with refused(errors.BatchOfOneError, "got 1"):
        measure(model, x, x[:1])
    measure(model.eval(), x[:1])


def test_batch_of_one_in_eval_mode_without_running_statistics() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)).eval()
    with refused(errors.BatchOfOneError, "module '1'"):
        ntk.empirical_ntk(model, torch.randn(1, 4))


def test_active_dropout(net: nn.Module, x: torch.Tensor) -> None:
    model = nn.Sequential(net, nn.Dropout(0.3))
    with refused(errors.ActiveDropoutError, "module '1'", "p=0.3", ".eval()"):
        ntk.empirical_ntk(model, x)
    model.eval()
    ntk.empirical_ntk(model, x)
    model.train()[1].p = 0.0
    ntk.empirical_ntk(model, x)


class Random(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x, 0.5, training=True)


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * self.calls


class Alternates(Counts):
    """Is what it was at every other call."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * (1 + self.calls % 2)


class DropsLater(nn.Module):
    """Random for examples that are not among the first."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gain = torch.tensor([1.0] * 8 + [self.draw() for _ in range(8, len(x))], dtype=x.dtype)[: len(x)]
        return x * gain[:, None]  # without a call in which examples might meet: that alone would have all run twice


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: torch.rand(()).item()])
def test_randomness_of_later_examples(net: nn.Module, draw: Callable[[], float]) -> None:
    x = torch.randn(32, 4, dtype=torch.float64)
    with refused(errors.NondeterministicModelError, "two runs on x1 differ"):
        ntk.empirical_ntk(nn.Sequential(net, DropsLater(draw)), x)


class TakesEight(nn.Module):
    """Knows how many examples will come."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert len(x) == 8
        return x


class DemandsEight(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert len(x) == 8
        return x


class LooksUpEight(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * {8: 1.0}[len(x)]


@pytest.mark.parametrize("layer", [Random, Counts, Alternates])
def test_random_and_self_mutating_models(net: nn.Module, x: torch.Tensor, layer: type[nn.Module]) -> None:
    with refused(errors.NondeterministicModelError, "two runs on x1 differ", "changes itself", ".eval()"):
        ntk.empirical_ntk(nn.Sequential(net, layer()), x)


@pytest.mark.parametrize("layer", [TakesEight, DemandsEight, LooksUpEight])
def test_a_model_for_so_many_examples_is_not_random(net: nn.Module, layer: type[nn.Module]) -> None:
    x = torch.randn(8, 4, dtype=next(net.parameters()).dtype)
    assert ntk.empirical_ntk(nn.Sequential(net, layer()), x).shape[0] == 8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"reduce": "trase"}, ("reduce", "'none', 'trace', 'sum'", "received 'trase'", "Nearest: 'trace'")),
        ({"reduce": "xyz"}, ("reduce", "received 'xyz'", "Choose one")),
        (
            {"implementation": "jacobian"},
            ("implementation", "received 'jacobian'", "Nearest: 'jacobian_contraction'"),
        ),
        ({"params": ["2.wieght"]}, ("params", "received '2.wieght'", "Nearest: '2.weight'")),
        ({"params": {"0.bia": 1.0}}, ("params", "received '0.bia'", "Nearest: '0.bias'")),
        (
            {"projection": {"0.weigth": ntk.center_rows}},
            ("projection", "received '0.weigth'", "Nearest: '0.weight'"),
        ),
        (
            {"projection": {"0.weight": ntk.center_rows}, "params": ["2.weight"]},
            ("projection", "must be one of '2.weight'", "received '0.weight'"),
        ),
    ],
)
def test_unknown_names(net: nn.Module, x: torch.Tensor, arguments: dict, words: tuple[str, ...]) -> None:
    with refused(errors.UnknownNameError, *words):
        ntk.empirical_ntk(net, x, **arguments)


def test_unknown_layer(net: nn.Module, x: torch.Tensor) -> None:
    with refused(errors.UnknownNameError, "layer", "'0', '1', '2'", "received '3'"):
        ntk.empirical_nngp(net, x, layer="3")


@pytest.mark.parametrize("params", [[], {}, ()])
def test_empty_params(net: nn.Module, x: torch.Tensor, params: object) -> None:
    with refused(errors.NoParametersError, "params is empty", "4 parameters", "None"):
        ntk.empirical_ntk(net, x, params=params)


def test_everything_frozen(net: nn.Module, x: torch.Tensor) -> None:
    with refused(errors.NoParametersError, "requires a gradient", "requires_grad_(True)"):
        ntk.empirical_ntk(net.requires_grad_(False), x)


def test_params_as_a_string(net: nn.Module, x: torch.Tensor) -> None:
    with refused(TypeError, "params", "'0.weight'", "write ['0.weight']"):
        ntk.empirical_ntk(net, x, params="0.weight")


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "1"])
def test_bad_multipliers(net: nn.Module, x: torch.Tensor, value: object) -> None:
    with refused(ValueError, "params['0.bias']", ">= 0", repr(value)):
        ntk.empirical_ntk(net, x, params={"0.bias": value})


def test_two_multipliers_for_a_tied_weight() -> None:
    model, x, _ = build("tied and called twice")
    with refused(ValueError, "tied weight 'first.weight'", "two multipliers", "give it one"):
        ntk.empirical_ntk(model, x, params={"first.weight": 1.0, "second.weight": 2.0})


class Detached(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach()


def test_output_without_graph(net: nn.Module, x: torch.Tensor) -> None:
    with refused(errors.NoParametersError, "depends on none", ".detach()"):
        ntk.empirical_ntk(nn.Sequential(net, Detached()), x)


class Returns(nn.Module):
    """A network that returns something else."""

    def __init__(self, net: nn.Module, change: Callable[[torch.Tensor], object]) -> None:
        super().__init__()
        self.net, self.change = net, change

    def forward(self, x: torch.Tensor) -> object:
        return self.change(self.net(x))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda y: (y, y), ("one tensor [n, o]", "x1", "tuple", "logits")),
        (lambda y: y[:, :, None], ("[n, o]", "5 examples", "(5, 2, 1)", "Flatten")),
        (lambda y: y.sum(0), ("5 examples", "(2,)")),
        (lambda y: y.to(torch.bfloat16), ("float32 or float64", "bfloat16", "dtype=torch.float32")),
    ],
)
def test_output_shape(net: nn.Module, x: torch.Tensor, change: Callable, words: tuple[str, ...]) -> None:
    with refused(errors.OutputShapeError, *words):
        ntk.empirical_ntk(Returns(net, change), x)


def test_non_finite_output(net: nn.Module, x: torch.Tensor) -> None:
    x[0, 0] = torch.nan
    with refused(errors.NonFiniteKernelError, "output on x1 is not finite", "input"):
        ntk.empirical_ntk(net, x)
    with refused(errors.NonFiniteKernelError, "output of layer '0' is not finite"):
        ntk.empirical_nngp(net, x, layer="0")


def test_non_finite_gradient(x: torch.Tensor) -> None:
    root = Returns(nn.Linear(4, 2, bias=False).double(), lambda y: (y * 0).sqrt())
    with refused(errors.NonFiniteKernelError, "kernel is not finite", "square root"):
        ntk.empirical_ntk(root, x)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (torch.zeros(3, 5).double(), ("x1 and x2", "shape of one example", "(4,)", "(5,)")),
        (torch.zeros(3, 4), ("x1 and x2", "dtype", "float64", "float32")),
        (torch.zeros(0, 4).double(), ("x2", "at least one example", "(0, 4)")),
    ],
)
def test_inputs_that_do_not_match(net: nn.Module, x: torch.Tensor, other: torch.Tensor, words: tuple[str, ...]) -> None:
    for measure in (ntk.empirical_ntk, ntk.empirical_nngp):
        with refused(errors.InputMismatchError, *words):
            measure(net, x, other)


def test_input_that_is_no_tensor(net: nn.Module, x: torch.Tensor) -> None:
    with refused(TypeError, "x1 must be a torch.Tensor", "ndarray", "torch.as_tensor"):
        ntk.empirical_ntk(net, x.numpy())


def test_dtype(net: nn.Module, x: torch.Tensor) -> None:
    with refused(ValueError, "dtype must be None, torch.float32 or torch.float64", "float16"):
        ntk.empirical_ntk(net, x, dtype=torch.float16)


def test_memory_budget(net: nn.Module, x: torch.Tensor) -> None:
    row = 8 * sum(p.numel() for p in net.parameters())
    compute = partial(ntk.empirical_ntk, net, x, implementation="jacobian_contraction")
    enough = least_memory(compute)
    assert enough > 3 * row
    with refused(errors.MemoryBudgetError, f"of {row} bytes", f"got {enough - 1}", f"max_memory={enough} would do"):
        compute(max_memory=enough - 1)
    compute(max_memory=enough)


@pytest.mark.parametrize(("text", "expected"), [("1GiB", 2**30), ("1.5 MiB", 3 * 2**19), ("20kB", 20_000), ("7", 7)])
def test_memory_in_words(text: str, expected: int) -> None:
    assert parse_memory(text) == expected


@pytest.mark.parametrize("value", ["much", "-1GiB", 0, -5, 1.5, True])
def test_memory_that_is_none(net: nn.Module, x: torch.Tensor, value: object) -> None:
    with refused(ValueError, "max_memory must be a positive number of bytes", f"got {value!r}", "None sets no bound"):
        ntk.empirical_ntk(net, x, max_memory=value)


@pytest.mark.parametrize(
    ("projection", "error", "words"),
    [
        (lambda w: w[:1], ValueError, ("projection of parameter '0.weight'", "(6, 4)", "(1, 4)")),
        ({"0.weight": "center"}, TypeError, ("projection", "'0.weight'", "ntk.center_rows", "'center'")),
        ({"0.bias": ntk.center_rows}, ValueError, ("center_rows", "two axes", "ndim=1", "unprojected")),
    ],
)
def test_bad_projection(
    net: nn.Module, x: torch.Tensor, projection: object, error: type[Exception], words: tuple[str, ...]
) -> None:
    with refused(error, *words):
        ntk.empirical_ntk(net, x, projection=projection)


def test_layer_without_rows(net: nn.Module, x: torch.Tensor) -> None:
    model = nn.Sequential(net, Returns(nn.Identity(), lambda y: y.sum(0)))
    with refused(errors.OutputShapeError, "layer '1'", "5 examples", "(2,)", "example axis first"):
        ntk.empirical_nngp(model, x, layer="1")


def test_layer_that_is_not_called(net: nn.Module, x: torch.Tensor) -> None:
    net[1].unused = nn.Linear(2, 2).double()
    with refused(errors.OutputShapeError, "layer '1.unused'", "not called"):
        ntk.empirical_nngp(net, x, layer="1.unused")
