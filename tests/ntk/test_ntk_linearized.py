"""The Taylor model, against Jacobians, finite differences, and what the kernel says of its training."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import ntk
from ntk import errors
from tests.ntk.oracle import CASES, build, jacobian, state_hash
from tests.ntk.test_ntk_operator import Once, Through


def moved(twin: ntk.LinearizedModel, size: float = 1.0) -> dict[str, torch.Tensor]:
    """Move θ by random numbers, and say by which."""
    generator = torch.Generator().manual_seed(1)
    step = {}
    with torch.no_grad():
        for name, value in twin.params.items():
            step[name] = size * torch.randn(value.shape, generator=generator, dtype=value.dtype)
            value.add_(step[name])
    return step


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_network_and_its_jacobian(case: str) -> None:
    model, x, _ = build(case)
    output = copy.deepcopy(model)(x).detach()
    part = jacobian(model, x)
    before = state_hash(model)
    twin = ntk.linearize(model)
    assert torch.allclose(twin(x), output, rtol=0, atol=1e-13)
    step = moved(twin)
    expected = output.reshape(len(x), -1) + sum(
        part[name].reshape(*part[name].shape[:2], -1) @ step[name].flatten() for name in step
    )
    found = twin(x)
    assert found.shape == output.shape
    assert torch.allclose(found.reshape(len(x), -1), expected, rtol=1e-10, atol=1e-10)
    weight = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).reshape(len(x), -1)
    (weight * found.reshape(len(x), -1)).sum().backward()
    for name, value in twin.params.items():
        gradient = torch.einsum("ia,ia...->...", weight, part[name])
        assert torch.allclose(value.grad, gradient, rtol=1e-10, atol=1e-10)
    assert state_hash(model) == before


def test_finite_differences() -> None:
    """The network leaves its expansion by O(ε²): a step ten times smaller, a hundred times less."""
    model, x, _ = build("tied and called twice")
    error = []
    for size in (1e-2, 1e-3):
        twin = ntk.linearize(model)
        start = {name: value.detach().clone() for name, value in model.named_parameters()}
        step = moved(twin, size)
        there = torch.func.functional_call(model, {name: start[name] + step[name] for name in step}, (x,))
        error.append((there - twin(x)).abs().max().item())
        assert (there - model(x)).abs().max() > 10 * error[-1]  # control: without J it is off by O(ε)
    assert np.log10(error[0] / error[1]) == pytest.approx(2, abs=0.1)


def test_gradient_descent_follows_the_kernel() -> None:
    """f_t − y = (1 − ηΘ)^t (f_0 − y), exactly and for as long as one likes; for the network it is not so (control)."""
    model, x, _ = build("conv with BatchNorm", n1=8)
    target = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(8, 3)
    matrix = ntk.empirical_ntk(model, x).flatten()
    rate, steps = 0.5 / float(np.linalg.eigvalsh(matrix)[-1]), 30
    twin = ntk.linearize(model)
    residual = (twin(x) - target).detach().numpy().ravel()
    expected = np.linalg.matrix_power(np.eye(24) - rate * matrix, steps) @ residual
    deviation = {}
    for name, network in (("twin", twin), ("network", model)):
        optimizer = torch.optim.SGD(network.parameters(), lr=rate)
        for _ in range(steps):
            optimizer.zero_grad()
            ((network(x) - target).square().sum() / 2).backward()
            optimizer.step()
        found = (network(x) - target).detach().numpy().ravel()
        deviation[name] = np.abs(found - expected).max() / np.abs(expected).max()
    assert deviation["twin"] < 1e-10
    assert deviation["network"] > 1e-3


def test_it_is_fixed_at_the_moment_of_construction() -> None:
    model, x, _ = build("conv with BatchNorm")
    twin = ntk.linearize(model)
    before = twin(x).detach()
    for parameter in model.parameters():
        parameter.data.mul_(2)
    model.eval()
    twin.eval()
    assert torch.equal(twin(x), before)
    assert not torch.allclose(ntk.linearize(model)(x), before)


def test_a_choice_of_parameters() -> None:
    model, x, _ = build("mlp")
    twin = ntk.linearize(model, params=["2.weight"])
    assert list(twin.params) == ["2.weight"]
    assert [tuple(p.shape) for p in twin.parameters()] == [(2, 6)]
    step = moved(twin)
    there = torch.func.functional_call(model, {"2.weight": model[2].weight.detach() + step["2.weight"]}, (x,))
    assert torch.allclose(twin(x), there, rtol=1e-12, atol=1e-12)  # a network is linear in its last layer
    assert ntk.linearize(model, dtype=torch.float32)(x).dtype == torch.float32


def test_state_is_saved_and_loaded() -> None:
    model, x, _ = build("mlp")
    twin, other = ntk.linearize(model), ntk.linearize(model)
    moved(twin)
    assert not torch.allclose(other(x), twin(x))
    other.load_state_dict(twin.state_dict())
    assert torch.equal(other(x), twin(x))


def test_refusals() -> None:
    model, x, _ = build("mlp")
    with pytest.raises(errors.UnknownNameError, match=r"params: must be one of .*'3.weight'"):
        ntk.linearize(model, params=["3.weight"])
    with pytest.raises(ValueError, match=r"dtype must be None.*got torch\.float16"):
        ntk.linearize(model, dtype=torch.float16)
    with pytest.raises(errors.ActiveDropoutError, match="active dropout"):
        ntk.linearize(nn.Sequential(model, nn.Dropout()))
    with pytest.raises(errors.BatchOfOneError, match="at least 2 examples"):
        ntk.linearize(build("conv with BatchNorm")[0])(torch.zeros(1, 3, 6, 6).double())
    with pytest.raises(errors.NoJacobianProductError, match="forward-mode derivative to be linearized"):
        ntk.linearize(Through(Once))(torch.randn(5, 4))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ntk.linearize(model)(x[:, :3])
