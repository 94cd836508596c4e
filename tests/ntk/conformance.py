"""What it means for a route to an empirical kernel to be right: it gives the kernel of whole-batch autograd."""

from collections.abc import Iterable

import numpy as np
import pytest
import torch

import ntk
from ntk import errors
from ntk.empirical import IMPLEMENTATIONS
from tests.ntk.oracle import kernel

ROUTES = tuple(name for name in IMPLEMENTATIONS if name != "auto")

each_route = pytest.mark.parametrize("route", ROUTES)

SLOW = "ntk_vector_products"
"""The route that knows no layers, so that a sample of them stands for all."""

WITHOUT_PRODUCTS = {
    "checkpoint": (errors.CheckpointingError, "must keep its activations"),
    "embedding bag": (errors.NoJacobianProductError, "differentiated twice, or in forward mode"),
    "embedding by frequency": (errors.NoJacobianProductError, "differs from ‖Jᵀv‖²"),
}
"""Modules that the slow route refuses, and how: their kernel goes by no products that torch has."""


def each_route_with(argument: str, names: Iterable[str], every: int = 1) -> pytest.MarkDecorator:
    """Every route with every name; the slow one with every so many of those that have products."""
    names = list(names)
    sample = [name for name in names if name not in WITHOUT_PRODUCTS][::every]
    pairs = [(route, name) for route in ROUTES for name in (sample if route == SLOW else names)]
    return pytest.mark.parametrize(("route", argument), pairs)


RELATIVE = 1e-10
"""Exact identity in float64 (style.md, tolerance policy)."""


def reduced(values: torch.Tensor, reduce: str) -> torch.Tensor:
    """[n, m, o, o] -> the kernel that a reduction means."""
    if reduce == "trace":
        return torch.einsum("ijaa->ij", values) / values.shape[2]
    return values.sum((2, 3)) if reduce == "sum" else values


def assert_same(result: ntk.KernelResult, expected: torch.Tensor, relative: float = RELATIVE) -> None:
    assert result.shape == tuple(expected.shape)
    assert np.abs(result.values - expected.numpy()).max() <= relative * float(expected.abs().max())
    if result.symmetric and result.implementation != SLOW:  # mirrored, so that nobody looks whether it is
        assert np.array_equal(result.values, result.values.transpose((1, 0, 3, 2)[: result.values.ndim]))


def scaled(rows: dict[str, torch.Tensor], multipliers: dict[str, float]) -> dict[str, torch.Tensor]:
    """The Jacobian whose kernel weights each parameter with its multiplier."""
    return {name: rows[name] * c**0.5 for name, c in multipliers.items()}


def summed(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], prefix: str | None = None) -> torch.Tensor:
    """Kernel of all parameters, or of those that one module holds itself."""
    names = [name for name in first if prefix is None or name.rpartition(".")[0] == prefix]
    return kernel({name: first[name] for name in names}, {name: second[name] for name in names})
