"""Weights that are computed from parameters, and what a model may do with them."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ntk
from tests.ntk.modules import Apply
from tests.ntk.oracle import jacobian, kernel

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
