"""A measurement leaves the model, and the random generators, as they were."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import ntk
from tests.ntk.oracle import CASES, build, state_hash

MEASUREMENTS: dict[str, Callable[[nn.Module, torch.Tensor], object]] = {
    "empirical_ntk": lambda model, x: ntk.empirical_ntk(model, x),
    "in float32": lambda model, x: ntk.empirical_ntk(model, x, dtype=torch.float32),
    "tiled": lambda model, x: ntk.empirical_ntk(model, x, max_memory=200_000),
    "projected": lambda model, x: ntk.empirical_ntk(model, x, projection=ntk.center_rows),
    "layerwise_ntk": lambda model, x: ntk.layerwise_ntk(model, x),
    "empirical_nngp": lambda model, x: ntk.empirical_nngp(model, x),
}


def with_history(case: str) -> tuple[nn.Module, torch.Tensor]:
    """A network with moved buffers, some gradients, mixed flags and a frozen parameter."""
    model, x, _ = build(case)
    model(x).sum().backward()
    modules = list(model.modules())
    modules[-1].eval()
    parameters = list(model.parameters())
    parameters[0].grad = None
    parameters[-1].requires_grad_(False)
    return model, x


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MEASUREMENTS)
def test_nothing_is_left_changed(case: str, name: str) -> None:
    model, x = with_history(case)
    before = state_hash(model)
    MEASUREMENTS[name](model, x)
    assert state_hash(model) == before


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "a forward pass in train mode": lambda model: model(torch.zeros(3, 3, 6, 6).double()),
    "a flag": lambda model: model[1].eval(),
    "a gradient": lambda model: setattr(model[0].weight, "grad", torch.ones_like(model[0].weight)),
    "the values of a gradient": lambda model: model[3].weight.grad.mul_(1 + 1e-15),
    "requires_grad": lambda model: model[0].weight.requires_grad_(False),
    "the random generator": lambda model: torch.rand(1),
    "a weight": lambda model: model[0].weight.data.mul_(1 + 1e-15),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_hash_sees_each_change(change: str) -> None:
    """Negative control of the test above."""
    model, _ = with_history("conv with BatchNorm")
    before = state_hash(model)
    CHANGES[change](model)
    assert state_hash(model) != before


@pytest.mark.parametrize("change", [c for c in CHANGES if c != "a weight"])
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


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_a_module_under_two_names_keeps_its_parameters(name: str) -> None:
    torch.manual_seed(0)
    twice = nn.Linear(4, 4)
    model, x = nn.Sequential(twice, nn.Tanh(), twice, nn.Linear(4, 2)).double(), torch.randn(5, 4).double()
    before = [id(parameter) for parameter in model.parameters()]
    MEASUREMENTS[name](model, x)
    assert [id(parameter) for parameter in model.parameters()] == before
