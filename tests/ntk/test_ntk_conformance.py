"""Every route to an empirical kernel against a loop of whole-batch gradients, over every module of the table."""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import ntk
from ntk import errors as ntk_errors
from tests.ntk.conformance import (
    RELATIVE,
    ROUTES,
    SLOW,
    WITHOUT_PRODUCTS,
    assert_same,
    each_route,
    each_route_with,
    reduced,
    scaled,
    summed,
)
from tests.ntk.modules import MODULES, build
from tests.ntk.oracle import jacobian, kernel, state_hash
from tests.ntk.shapes import FEW

pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel lengths:UserWarning")
each_module = each_route_with("name", MODULES)
some_modules = each_route_with("name", MODULES, every=4)


@dataclass(frozen=True, eq=False)
class Case:
    """A module, two batches, and their Jacobians."""

    model: nn.Module
    x1: torch.Tensor
    x2: torch.Tensor
    first: dict[str, torch.Tensor]
    second: dict[str, torch.Tensor]


@functools.cache
def case(name: str) -> Case:
    """The oracle of a module is slow: it is asked once."""
    model, x1, x2 = build(name)
    return Case(model, x1, x2, jacobian(model, x1), jacobian(model, x2))


def test_the_table_is_large_enough() -> None:
    assert len(MODULES) >= 30
    assert {"structured", "jacobian_contraction", SLOW} <= set(ROUTES)


@pytest.mark.parametrize("name", WITHOUT_PRODUCTS)
def test_modules_without_products_are_refused(name: str) -> None:
    model, x, _ = build(name)
    error, message = WITHOUT_PRODUCTS[name]
    with pytest.raises(error, match=message):
        ntk.empirical_ntk(model, x, implementation=SLOW)


@each_module
def test_every_reduction_of_gram_and_cross_kernel(route: str, name: str) -> None:
    it = case(name)
    for x, other in ((None, it.first), (it.x2, it.second)):
        expected = kernel(it.first, other)
        for reduce in ("none", "trace", "sum"):
            result = ntk.empirical_ntk(it.model, it.x1, x, reduce=reduce, implementation=route)
            assert_same(result, reduced(expected, reduce))


@some_modules
def test_layers_add_up(route: str, name: str) -> None:
    """The share of each layer, and so their sum."""
    it = case(name)
    shares = ntk.layerwise_ntk(it.model, it.x1, it.x2, reduce="trace", implementation=route)
    largest = float(kernel(it.first, it.second).abs().max())
    assert set(shares) == {key.rpartition(".")[0] for key in it.first}
    for layer, share in shares.items():
        expected = reduced(summed(it.first, it.second, layer), "trace")
        assert np.abs(share.values - expected.numpy()).max() <= RELATIVE * largest


def reject_shift(weight: torch.Tensor) -> torch.Tensor:
    """I - v vᵀ / |v|² on the rows of a weight, v not a constant: mean shift rejection for a fixed mean v."""
    rows = weight.flatten(1)
    mean = torch.arange(1, rows.shape[1] + 1, dtype=rows.dtype)
    return (rows - torch.outer(rows @ mean, mean) / (mean @ mean)).reshape(weight.shape)


def shear(weight: torch.Tensor) -> torch.Tensor:
    """A linear map that is no projector, and mixes the rows."""
    return 2 * weight - weight.flip(0)


def projected(rows: dict[str, torch.Tensor], projection: Callable) -> dict[str, torch.Tensor]:
    """A Jacobian with each gradient projected, one at a time."""
    return {
        key: torch.stack([projection(part) for part in value.flatten(0, 1)]).reshape(value.shape)
        if value.ndim >= 4
        else value
        for key, value in rows.items()
    }


@pytest.mark.parametrize("projection", [ntk.center_rows, reject_shift], ids=["center_rows", "reject_shift"])
@some_modules
def test_projected_scaled_and_chosen(route: str, name: str, projection: Callable) -> None:
    """With a multiplier for each parameter that is kept: all of them, or every second one."""
    it = case(name)
    chosen = list(it.first)[:: 1 if projection is ntk.center_rows else 2]
    multipliers = {key: 0.5 + index for index, key in enumerate(chosen)}
    first, second = (projected(scaled(rows, multipliers), projection) for rows in (it.first, it.second))
    settings = {"params": multipliers, "projection": projection, "implementation": route}
    assert_same(ntk.empirical_ntk(it.model, it.x1, it.x2, **settings), kernel(first, second))
    result = ntk.empirical_ntk(it.model, it.x1, reduce="sum", **settings)
    assert_same(result, reduced(kernel(first, first), "sum"))


@pytest.mark.parametrize("name", ["conv2d groups", "conv transposed 2d", "tied embedding", "position embedding", "gru"])
@each_route
def test_a_linear_map_that_is_no_projector(route: str, name: str) -> None:
    it = case(name)
    rows = projected(it.first, shear)
    assert_same(ntk.empirical_ntk(it.model, it.x1, projection=shear, implementation=route), kernel(rows, rows))


@each_route
def test_one_projection_for_one_parameter(route: str) -> None:
    it = case("conv2d groups")
    (chosen,) = (key for key in it.first if key.startswith("0.weight"))
    rows = {
        key: projected({key: value}, ntk.center_rows)[key] if key == chosen else value
        for key, value in it.first.items()
    }
    result = ntk.empirical_ntk(it.model, it.x1, projection={chosen: ntk.center_rows}, implementation=route)
    assert_same(result, kernel(rows, rows))


@pytest.mark.parametrize("name", ["linear in place", "conv2d groups", "batch norm", "tied embedding", "gru"])
@each_route
def test_a_cross_kernel_of_equal_sizes(route: str, name: str) -> None:
    """Nothing takes two batches of one size for one batch."""
    model, x1, x2 = build(name, n=3, m=3)
    expected = kernel(jacobian(model, x1), jacobian(model, x2))
    for reduce in ("none", "trace", "sum"):
        result = ntk.empirical_ntk(model, x1, x2, reduce=reduce, implementation=route)
        assert_same(result, reduced(expected, reduce))


@some_modules
def test_a_batch_of_one(route: str, name: str) -> None:
    model, x1, x2 = build(name, n=1 if "batch norm" not in name else 2, m=2)
    first, second = jacobian(model, x1), jacobian(model, x2)
    assert_same(ntk.empirical_ntk(model, x1, implementation=route), kernel(first, first))
    assert_same(ntk.empirical_ntk(model, x2, x1, implementation=route), kernel(second, first))


@some_modules
def test_float32_is_what_its_dtype_explains(route: str, name: str) -> None:
    """No further from float64 than twice the error of the naive loop in float32, or a few roundings of its own."""
    it = case(name)
    model, x, _ = build(name)
    model, x = model.float(), x.float() if x.is_floating_point() else x
    rows = jacobian(model, x)
    exact = kernel(it.first, it.first).numpy()
    allowed = 2 * np.abs(kernel(rows, rows).numpy() - exact).max()
    result = ntk.empirical_ntk(model, x, implementation=route)
    assert result.dtype == np.float32
    assert np.abs(result.values - exact).max() <= max(allowed, 8 * np.finfo(np.float32).eps * np.abs(exact).max())


@some_modules
def test_nothing_is_left_changed(route: str, name: str) -> None:
    model, x, _ = build(name)
    model(x).sum().backward()
    before = state_hash(model)
    ntk.empirical_ntk(model, x, implementation=route)
    assert state_hash(model) == before


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "strided": lambda x: torch.stack([x, x + 1], -1)[..., 0],
    "expanded": lambda x: x[:1].expand(x.shape),
    "offset": lambda x: torch.cat([x + 1, x])[len(x) :],
    "requires a gradient": lambda x: x.clone().requires_grad_(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x.mT.contiguous().mT,
}


@pytest.mark.parametrize(
    "name", ["conv2d groups", "conv transposed 2d", "conv1d", "layer norm of two axes", "group norm"]
)
@pytest.mark.parametrize("layout", LAYOUTS)
@each_route
def test_layouts_of_the_input_and_the_weights(route: str, layout: str, name: str) -> None:
    model, x, _ = build(name)
    x = LAYOUTS[layout](x)
    rows = jacobian(model, x.detach().contiguous())
    for parameter in model.parameters():
        if parameter.ndim > 2:
            parameter.data = parameter.data.transpose(0, 1).contiguous().transpose(0, 1)
    assert_same(ntk.empirical_ntk(model, x, implementation=route), kernel(rows, rows))
    assert x.grad is None


@each_route_with("name", ["linear in place", "conv2d groups", "batch norm", "tied embedding"], every=2)
@given(budget=st.integers(1, 60_000), reduce=st.sampled_from(["none", "trace", "sum"]), cross=st.booleans())
@FEW
def test_any_budget_of_memory(route: str, name: str, budget: int, reduce: str, cross: bool) -> None:
    """The same kernel, or an error that names a budget which gives it."""
    it = case(name)
    x2, other = (it.x2, it.second) if cross else (None, it.first)
    compute = functools.partial(ntk.empirical_ntk, it.model, it.x1, x2, reduce=reduce, implementation=route)
    try:
        result = compute(max_memory=budget)
    except ntk_errors.MemoryBudgetError as error:
        enough = int(re.search(r"max_memory=(\d+)", str(error))[1])
        assert enough > budget
        result = compute(max_memory=enough)
    assert_same(result, reduced(kernel(it.first, other), reduce))


@each_route
def test_the_oracle_can_disagree(route: str) -> None:
    """Negative control: the kernel of other weights is not accepted."""
    it = case("conv2d groups")
    model, x, _ = build("conv2d groups")
    with torch.no_grad():
        next(model.parameters()).mul_(1 + 1e-8)
    with pytest.raises(AssertionError):
        assert_same(ntk.empirical_ntk(model, x, implementation=route), kernel(it.first, it.first))
