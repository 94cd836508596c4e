"""Kernels of converted networks: exact for every method, and layer by layer for nearly all of their parameters."""

import pytest
import torch
from torch import nn

import mimicnorm
import ntk
from tests.ntk.conformance import assert_same
from tests.ntk.oracle import jacobian, kernel

RUN_ONCE = {"mabn", "power_norm"}
"""Methods whose statistics move in the backward pass: a second forward pass before it is refused."""

BY_JACOBIAN = {"memorized_batch_norm": {"1.weight", "1.bias"}, "unified_batch_norm": {"1.scaling.bias"}}


def network() -> nn.Module:
    layers = [nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 2), nn.Tanh()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).double()


@pytest.mark.parametrize("method", [name for name in mimicnorm.METHODS if name not in RUN_ONCE])
def test_the_kernel_of_a_converted_network(method: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    model = mimicnorm.convert(network(), method, example_input=x).train()
    rows = jacobian(model, x)
    result = ntk.empirical_ntk(model, x)
    assert_same(result, kernel(rows, rows))
    assert set(result.by_jacobian) == BY_JACOBIAN.get(method, set())
