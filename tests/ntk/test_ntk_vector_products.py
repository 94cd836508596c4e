"""The kernel from products alone, against whole-batch autograd, for one batch and for two."""

import numpy as np
import pytest
import torch
from torch import nn

import ntk
from ntk import errors
from tests.ntk.oracle import CASES, build, jacobian, kernel, rows, state_hash
from tests.ntk.test_ntk_operator import CutOff, Through, flat, relative, shrink

ROUTE = "ntk_vector_products"


def reduced(values: torch.Tensor, reduce: str) -> np.ndarray:
    """[n1, n2, o, o] as the reduction has it."""
    return values.numpy() if reduce == "none" else flat(values, reduce)


@pytest.mark.parametrize("reduce", ["none", "trace", "sum"])
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_kernel(case: str, reduce: str) -> None:
    model, x1, x2 = build(case)
    first, second = jacobian(model, x1), jacobian(model, x2)
    before = state_hash(model)
    for other, columns in ((None, first), (x2, second)):
        found = ntk.empirical_ntk(model, x1, other, reduce=reduce, implementation=ROUTE)
        assert relative(found.values, reduced(kernel(first, columns), reduce)) < 1e-10
        assert (found.implementation, found.by_jacobian, found.symmetric) == (ROUTE, (), other is None)
        assert found.convention == ntk.empirical_ntk(model, x1, other, reduce=reduce).convention
    assert state_hash(model) == before


def test_each_result_names_its_route() -> None:
    model, x, _ = build("mlp")
    assert ntk.empirical_ntk(model, x).implementation == "structured"
    assert ntk.empirical_ntk(model, x, implementation="jacobian_contraction").implementation == "jacobian_contraction"


@pytest.mark.parametrize("reduce", ["none", "trace", "sum"])
def test_shares_of_the_layers(reduce: str) -> None:
    model, x1, x2 = build("conv with BatchNorm")
    found = ntk.layerwise_ntk(model, x1, x2, reduce=reduce, implementation=ROUTE)
    expected = ntk.layerwise_ntk(model, x1, x2, reduce=reduce, implementation="jacobian_contraction")
    assert list(found) == list(expected)
    for name, share in found.items():
        assert relative(share.values, expected[name].values) < 1e-10


@pytest.mark.parametrize("projection", [ntk.center_rows, shrink])
def test_multipliers_and_projections(projection: ntk.vector_products.Projection) -> None:
    model, x1, x2 = build("mlp")
    params = {"0.weight": 0.5, "0.bias": 3.0, "2.weight": 2.0}
    parts = []
    for x in (x1, x2):
        part = {name: value for name, value in jacobian(model, x).items() if name in params}
        for name, value in part.items():
            if value.ndim == 4:
                mapped = torch.stack([projection(weight) for weight in value.flatten(0, 1)])
                part[name] = mapped.reshape(value.shape)
        parts.append(part)
    expected = sum(c * torch.einsum("iap,jbp->ijab", rows(parts[0][k]), rows(parts[1][k])) for k, c in params.items())
    found = ntk.empirical_ntk(model, x1, x2, params=params, projection=projection, implementation=ROUTE)
    assert relative(found.values, expected.numpy()) < 1e-10
    operator = ntk.NtkOperator(model, x1, x2, params=params, projection=projection)
    assert relative(operator @ np.eye(8), flat_cross(expected)) < 1e-10


def flat_cross(values: torch.Tensor) -> np.ndarray:
    n1, n2, o, _ = values.shape
    return values.permute(0, 2, 1, 3).reshape(n1 * o, n2 * o).numpy()


@pytest.mark.parametrize("case", CASES)
def test_an_operator_between_two_batches(case: str) -> None:
    model, x1, x2 = build(case)
    expected = flat_cross(kernel(jacobian(model, x1), jacobian(model, x2)))
    operator = ntk.NtkOperator(model, x1, x2)
    assert operator.shape == expected.shape
    assert not operator.symmetric
    assert relative(operator @ np.eye(expected.shape[1]), expected) < 1e-10
    assert relative(operator.T @ np.eye(expected.shape[0]), expected.T) < 1e-10
    assert relative(operator.H @ np.ones(expected.shape[0]), expected.sum(0)) < 1e-10
    for reduce in ("trace", "sum"):
        shared = ntk.empirical_ntk(model, x1, x2, reduce=reduce).values
        operator = ntk.NtkOperator(model, x1, x2, reduce=reduce)
        assert relative(operator @ np.eye(4), shared) < 1e-10
        assert relative(operator.T @ np.eye(5), shared.T) < 1e-10


def test_a_parameter_that_one_batch_alone_uses() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.often = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.always(x) + self.often(x) if len(x) > 3 else self.always(x)

    torch.manual_seed(0)
    model, x1, x2 = Branch().double(), torch.randn(5, 3).double(), torch.randn(3, 3).double()
    same = torch.einsum("ij,ab->ijab", x1 @ x2.T + 1, torch.eye(2))
    for first, second, expected in ((x1, x2, same), (x2, x1, same.transpose(0, 1))):
        shares = ntk.layerwise_ntk(model, first, second, implementation=ROUTE)
        assert relative(shares["always"].values, expected.numpy()) < 1e-10
        assert not shares["often"].values.any()


def test_a_module_under_two_names() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.again = self.first
            self.head = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.tanh(self.again(torch.tanh(self.first(x)))))

    torch.manual_seed(0)
    model, x = Shared().double(), torch.randn(4, 3).double()
    part = jacobian(model, x)
    before = state_hash(model)
    found = ntk.empirical_ntk(model, x, implementation=ROUTE)
    assert relative(found.values, kernel(part, part).numpy()) < 1e-10
    assert relative(ntk.NtkOperator(model, x) @ np.eye(8), flat(kernel(part, part))) < 1e-10
    assert torch.allclose(ntk.linearize(model)(x), model(x), rtol=1e-12)
    assert state_hash(model) == before
    assert isinstance(model.again.weight, nn.Parameter)


def test_memory_bounds_the_vectors_at_once() -> None:
    model, x, _ = build("conv with BatchNorm")
    expected = ntk.empirical_ntk(model, x).values
    with pytest.raises(errors.MemoryBudgetError, match=r"max_memory must hold what one vector takes.*would do") as said:
        ntk.empirical_ntk(model, x, implementation=ROUTE, max_memory=1000)
    enough = int(str(said.value).split("max_memory=")[1].split()[0])
    assert relative(ntk.empirical_ntk(model, x, implementation=ROUTE, max_memory=enough).values, expected) < 1e-10
    assert [ntk.NtkOperator(model, x, max_memory=factor * enough).chunk for factor in (1, 3, 1000)] == [1, 3, 64]
    with pytest.raises(errors.MemoryBudgetError, match="one vector"):
        ntk.NtkOperator(model, x, max_memory=enough - 1)


def test_a_backward_pass_without_derivative_is_refused() -> None:
    with pytest.raises(errors.NoJacobianProductError, match=r"differs from ‖Jᵀv‖²"):
        ntk.empirical_ntk(Through(CutOff), torch.randn(5, 4), implementation=ROUTE)
    assert np.isfinite(ntk.empirical_ntk(Through(CutOff), torch.randn(5, 4)).values).all()
