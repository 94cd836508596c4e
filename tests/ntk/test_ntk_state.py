"""A measurement leaves the model, and the random generators, as they were."""

import random
import warnings
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import ntk
from ntk import errors
from tests.ntk.oracle import CASES, build, jacobian, kernel, state_hash
from tests.ntk.test_ntk_refusals import refused

MEASUREMENTS: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "empirical_ntk": lambda model, x: ntk.empirical_ntk(model, x),
    "in float32": lambda model, x: ntk.empirical_ntk(model, x, dtype=torch.float32),
    "tiled": lambda model, x: ntk.empirical_ntk(model, x, max_memory=200_000),
    "projected": lambda model, x: ntk.empirical_ntk(model, x, projection=ntk.center_rows),
    "frozen": lambda model, x: ntk.empirical_ntk(model, x, batch_statistics="frozen"),
    "reference": lambda model, x: ntk.empirical_ntk(model, x, batch_statistics="reference", reference=x),
    "layerwise_ntk": lambda model, x: ntk.layerwise_ntk(model, x),
    "empirical_nngp": lambda model, x: ntk.empirical_nngp(model, x),
}


class Notebook(nn.Module):
    """Keeps what it has seen, and tells a cached tensor from a fresh one."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.cache: dict[str, Tensor] = {}
        self.names = {"input"}
        self.last = torch.zeros(2)
        self.total = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        self.cache["x"], self.last, self.fresh = x, x, x
        self.names.add(str(len(self.seen)))
        self.total += 1
        return x


def with_history(case: str) -> tuple[nn.Module, Tensor]:
    """A network with moved buffers, some gradients, mixed flags, a frozen parameter, hooks and attributes."""
    model, x, _ = build(case)
    model(x).sum().backward()
    modules = list(model.modules())
    modules[-1].eval()
    modules[-1].register_forward_hook(lambda module, inputs, output: output)
    modules[-1].register_forward_pre_hook(lambda module, inputs: inputs)
    modules[-1].register_full_backward_hook(lambda module, before, after: None)
    modules[-1].register_full_backward_pre_hook(lambda module, after: None)
    modules[-1].tags = ["one"]
    parameters = list(model.parameters())
    parameters[0].grad = None
    parameters[-1].register_hook(lambda gradient: gradient)
    parameters[-1].requires_grad_(False)
    return model, x


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MEASUREMENTS)
def test_nothing_is_left_changed(case: str, name: str) -> None:
    model, x = with_history(case)
    before = state_hash(model)
    MEASUREMENTS[name](model, x)
    assert state_hash(model) == before


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_a_model_that_keeps_notes(name: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 6), Notebook(), nn.Tanh(), nn.Linear(6, 2)).double(), torch.randn(5, 4)
    before = state_hash(model)
    MEASUREMENTS[name](model, x.double())
    assert state_hash(model) == before
    model(x.double())
    assert state_hash(model) != before  # negative control


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "a forward pass in train mode": lambda model: model(torch.zeros(3, 3, 6, 6).double()),
    "a flag": lambda model: model[1].eval(),
    "a gradient": lambda model: setattr(model[0].weight, "grad", torch.ones_like(model[0].weight)),
    "the values of a gradient": lambda model: model[3].weight.grad.mul_(1 + 1e-15),
    "requires_grad": lambda model: model[0].weight.requires_grad_(False),
    "the random generator": lambda model: torch.rand(1),
    "that of NumPy": lambda model: np.random.rand(),  # ruff: ignore[numpy-legacy-random]
    "that of Python": lambda model: random.random(),
    "a buffer": lambda model: setattr(model[1], "running_mean", torch.zeros(4).double()),
    "a forward hook": lambda model: model[0].register_forward_hook(lambda *_: None),
    "a forward hook less": lambda model: model[8]._forward_hooks.clear(),
    "a forward pre-hook": lambda model: model[0].register_forward_pre_hook(lambda *_: None),
    "a backward hook": lambda model: model[0].register_full_backward_hook(lambda *_: None),
    "a backward hook less": lambda model: model[8]._backward_hooks.clear(),
    "a backward pre-hook": lambda model: model[0].register_full_backward_pre_hook(lambda *_: None),
    "hooks in another dict": lambda model: model[0].__dict__.update(_forward_hooks=OrderedDict()),
    "an attribute": lambda model: setattr(model[0], "note", 1),
    "an attribute less": lambda model: delattr(model[8], "tags"),
    "an entry of an attribute": lambda model: model[8].tags.append("two"),
    "a child": lambda model: setattr(model, "2", nn.Tanh()),
    "a parametrization": lambda model: nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Tanh()),
    "weight norm": lambda model: nn.utils.parametrizations.weight_norm(model[0]),
    "a weight": lambda model: model[0].weight.data.mul_(1 + 1e-15),
    "a hook of a parameter": lambda model: model[0].weight.register_hook(lambda gradient: gradient),
}

NOT_UNDONE = {"a weight", "a hook of a parameter", "a parametrization", "weight norm"}
"""Parameters are not copied, and a parametrization changes the class of its module: both are of the user's doing."""


@pytest.mark.parametrize("change", CHANGES)
def test_the_hash_sees_each_change(change: str) -> None:
    """Negative control of the tests above."""
    model, _ = with_history("conv with BatchNorm")
    before = state_hash(model)
    assert state_hash(model) == before
    CHANGES[change](model)
    assert state_hash(model) != before


@pytest.mark.parametrize("change", [c for c in CHANGES if c not in NOT_UNDONE])
@pytest.mark.parametrize("raises", [False, True])
def test_preserve_state_undoes_each_change(change: str, raises: bool) -> None:
    model, _ = with_history("conv with BatchNorm")
    before = state_hash(model)

    def inside() -> None:
        with ntk.preserve_state(model):
            CHANGES[change](model)
            if raises:
                raise RuntimeError("inside")

    if raises:
        with pytest.raises(RuntimeError, match="inside"):
            inside()
    else:
        inside()
    assert state_hash(model) == before


class Fails(nn.Module):
    """Changes all it can reach and raises, at the second call or in the backward pass."""

    def __init__(self, when: str) -> None:
        super().__init__()
        self.when, self.calls = when, 0
        self.register_buffer("moved", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.moved += torch.rand(1)
        self.register_forward_hook(lambda module, inputs, output: None)
        self.eval()
        if self.when == "second call" and self.calls == 2:
            raise RuntimeError("as told")
        return Cut.apply(x) if self.when == "backward" else x


class Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        torch.rand(1)
        raise RuntimeError("as told")


@pytest.mark.parametrize("when", ["second call", "backward"])
@pytest.mark.parametrize("name", ["empirical_ntk", "in float32", "tiled", "frozen", "reference", "layerwise_ntk"])
def test_nothing_is_left_changed_by_an_exception(name: str, when: str) -> None:
    model, x = with_history("conv with BatchNorm")
    model.insert(3, Fails(when))
    before = state_hash(model)
    with pytest.raises(RuntimeError, match="as told"):
        MEASUREMENTS[name](model, x)
    assert state_hash(model) == before


def test_buffers_keep_their_identity() -> None:
    model, _ = with_history("conv with BatchNorm")
    buffer, values = model[1].running_mean, model[1].running_mean.clone()
    with ntk.preserve_state(model):
        model[1].running_mean = torch.full_like(values, torch.nan)
        model[1].register_buffer("extra", torch.zeros(1))
    assert model[1].running_mean is buffer
    assert torch.equal(buffer, values)
    assert not hasattr(model[1], "extra")


def test_not_a_number_in_a_buffer_is_restored_bitwise() -> None:
    model, _ = with_history("conv with BatchNorm")
    model[1].running_var[0] = torch.nan
    before = state_hash(model)
    with ntk.preserve_state(model):
        model[1].running_var.zero_()
    assert state_hash(model) == before


def test_tensors_without_bits_to_compare() -> None:
    for mode in (torch.device("meta"), FakeTensorMode()):
        with mode:
            model, x = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), torch.zeros(5, 4)
            with ntk.preserve_state(model):
                model(x)
    model.register_buffer("sparse", torch.eye(2).to_sparse())
    with ntk.preserve_state(model):
        model.sparse.mul_(2)
    assert torch.equal(model.sparse.to_dense(), torch.eye(2))


def test_a_graph_of_the_user_stays_usable() -> None:
    """Writing a buffer, though with its own values, would invalidate what holds it for its backward pass."""
    model, x = with_history("conv with BatchNorm")
    loss = model.eval()(x).square().sum()
    model.train()
    ntk.empirical_ntk(model, x)
    loss.backward()
    loss = model.eval()(x).square().sum()
    with torch.no_grad():
        model[1].running_var.copy_(model[1].running_var.clone())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # negative control
        loss.backward()


def test_handles_of_hooks_stay_usable() -> None:
    model, x = with_history("mlp")
    forward = model[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    backward = model[0].register_full_backward_hook(lambda module, before, after: None)
    ntk.empirical_ntk(model, x)
    forward.remove()
    backward.remove()
    assert not (model[0]._forward_hooks)
    assert not (model[0]._backward_hooks)


@pytest.mark.parametrize("implementation", ["structured", "jacobian_contraction"])
def test_forward_hooks_are_part_of_the_function_and_backward_hooks_are_not(implementation: str) -> None:
    model, x, _ = build("mlp")
    runs: list[str] = []
    model[0].register_forward_hook(lambda module, inputs, output: runs.append("forward") or 2 * output)
    rows = jacobian(model, x)
    runs.clear()
    model[2].register_full_backward_hook(lambda module, before, after: runs.append("backward") or (3 * before[0],))
    model[2].register_full_backward_pre_hook(lambda module, after: runs.append("before") or (3 * after[0],))
    model[2].weight.register_hook(lambda gradient: runs.append("parameter"))
    found = ntk.empirical_ntk(model, x, implementation=implementation)
    assert np.abs(found.values - kernel(rows, rows).numpy()).max() < 1e-10
    assert set(runs) == {"forward"}


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_a_module_under_two_names_keeps_its_parameters(name: str) -> None:
    torch.manual_seed(0)
    twice = nn.Linear(4, 4)
    model, x = nn.Sequential(twice, nn.Tanh(), twice, nn.Linear(4, 2)).double(), torch.randn(5, 4).double()
    before = [id(parameter) for parameter in model.parameters()]
    MEASUREMENTS[name](model, x)
    assert [id(parameter) for parameter in model.parameters()] == before


def old_weight_norm(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module)


PARAMETRIZATIONS = {
    "weight norm": nn.utils.parametrizations.weight_norm,
    "spectral norm": nn.utils.parametrizations.spectral_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
    "weight norm by hooks": old_weight_norm,
    "spectral norm by hooks": nn.utils.spectral_norm,
}


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_parametrized_weights(name: str) -> None:
    """The kernel is by the underlying originals; the hooks of the older ones leave a computed weight behind."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double(), torch.randn(5, 4).double()
    PARAMETRIZATIONS[name](model[0])
    rows, before = jacobian(model, x), state_hash(model)
    found = ntk.empirical_ntk(model, x)
    assert state_hash(model) == before
    assert np.abs(found.values - kernel(rows, rows).numpy()).max() < 1e-10
    ntk.empirical_ntk(model, x, dtype=torch.float32)
    assert state_hash(model) == before
    with refused(errors.UnknownNameError, "params", "received '0.weight'"):
        ntk.empirical_ntk(model, x, params=["0.weight"])
