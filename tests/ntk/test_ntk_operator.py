"""Products with the kernel, against a matrix from a loop of whole-batch gradients."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import nn

import ntk
from ntk import errors
from tests.ntk.oracle import CASES, build, jacobian, kernel, rows, state_hash


def flat(values: torch.Tensor, reduce: str = "none") -> np.ndarray:
    """The oracle's kernel [n, n, o, o] as the matrix that the operator stands for."""
    if reduce == "trace":
        return torch.einsum("ijkk->ij", values).numpy() / values.shape[2]
    if reduce == "sum":
        return values.sum((2, 3)).numpy()
    n, _, o, _ = values.shape
    return values.permute(0, 2, 1, 3).reshape(n * o, n * o).numpy()


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("reduce", ["none", "trace", "sum"])
@pytest.mark.parametrize("case", CASES)
def test_products_are_those_of_the_matrix(case: str, reduce: str) -> None:
    model, x, _ = build(case)
    part = jacobian(model, x)
    expected = flat(kernel(part, part), reduce)
    operator = ntk.NtkOperator(model, x, reduce=reduce)
    assert isinstance(operator, LinearOperator)
    assert (operator.shape, operator.dtype) == (expected.shape, np.float64)
    block = operator @ np.eye(len(expected))
    columns = np.stack([operator @ unit for unit in np.eye(len(expected))])
    adjoint = operator.H @ np.eye(len(expected))
    for found in (block, columns, adjoint, operator.T @ np.eye(len(expected))):
        assert relative(found, expected) < 1e-10
        assert relative(found, found.T) < 1e-13


def test_layout_is_that_of_the_kernel() -> None:
    model, x, _ = build("conv with BatchNorm")
    for reduce in ("none", "trace", "sum"):
        expected = ntk.empirical_ntk(model, x, reduce=reduce).flatten()
        operator = ntk.NtkOperator(model, x, reduce=reduce)
        assert relative(operator @ np.eye(len(expected)), expected) < 1e-10


def test_terms_through_the_statistics_of_the_batch_are_there() -> None:
    """Control: without them, in eval mode, the matrix is another one."""
    model, x, _ = build("conv with BatchNorm")
    train = ntk.NtkOperator(model, x)
    model.eval()
    frozen = ntk.NtkOperator(model, x)
    identity = np.eye(train.shape[0])
    assert relative(frozen @ identity, train @ identity) > 1e-3
    assert (train.statistics, frozen.statistics) == ("differentiated, one batch", "running")


@pytest.mark.parametrize("chunk", [1, 2, 7, 1000])
def test_chunks_change_nothing(chunk: int) -> None:
    model, x, _ = build("conv with BatchNorm")
    vectors = np.random.default_rng(0).normal(size=(15, 9))
    expected = ntk.NtkOperator(model, x) @ vectors
    assert relative(ntk.NtkOperator(model, x, chunk=chunk) @ vectors, expected) < 1e-12


def shrink(weight: torch.Tensor) -> torch.Tensor:
    """A linear map that is neither symmetric nor a projector."""
    mixing = torch.arange(weight.shape[-1] ** 2, dtype=weight.dtype).reshape(weight.shape[-1], -1).cos()
    return weight @ mixing


@pytest.mark.parametrize("projection", [ntk.center_rows, shrink])
def test_multipliers_and_projections(projection: Callable[[torch.Tensor], torch.Tensor]) -> None:
    model, x, _ = build("mlp")
    params = {"0.weight": 0.5, "0.bias": 3.0, "2.weight": 2.0}
    part = {name: value for name, value in jacobian(model, x).items() if name in params}
    for name, value in part.items():
        if value.ndim == 4:
            mapped = torch.stack([projection(weight) for weight in value.flatten(0, 1)])
            part[name] = mapped.reshape(value.shape)
    expected = sum(c * torch.einsum("iap,jbp->ijab", rows(part[k]), rows(part[k])) for k, c in params.items())
    operator = ntk.NtkOperator(model, x, params=params, projection=projection)
    assert relative(operator @ np.eye(10), flat(expected)) < 1e-10
    assert operator.parametrization == "scaled"
    assert projection.__name__ in repr(operator)


def test_float32_and_casts() -> None:
    model, x, _ = build("conv with BatchNorm")
    expected = ntk.NtkOperator(model, x) @ np.eye(15)
    single = ntk.NtkOperator(model, x, dtype=torch.float32)
    found = single @ np.eye(15)
    assert single.dtype == found.dtype == np.float32
    assert 0 < relative(found, expected) < 1e-4


def test_the_kernel_is_that_of_the_moment_of_construction() -> None:
    model, x, _ = build("conv with BatchNorm")
    operator = ntk.NtkOperator(model, x)
    vectors = np.random.default_rng(0).normal(size=(15, 2))
    before = operator @ vectors, operator @ vectors[:, 0]
    for parameter in model.parameters():
        parameter.data.mul_(2)
    model.eval()
    x.zero_()
    assert np.array_equal(operator @ vectors, before[0])
    assert np.array_equal(operator @ vectors[:, 0], before[1])
    assert relative(ntk.NtkOperator(model, x + 1) @ vectors, before[0]) > 0.1


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_left_changed(case: str) -> None:
    model, x, _ = build(case)
    model(x).sum().backward()
    list(model.modules())[-1].eval()
    list(model.parameters())[-1].requires_grad_(False)
    before = state_hash(model)
    operator = ntk.NtkOperator(model, x)
    assert state_hash(model) == before
    for vectors in (np.ones(operator.shape[0]), np.eye(operator.shape[0])):
        operator @ vectors
        assert state_hash(model) == before


def test_scipy_takes_it() -> None:
    model, x, _ = build("conv with BatchNorm", n1=8)
    expected = np.linalg.eigvalsh(ntk.empirical_ntk(model, x).flatten())
    found = eigsh(ntk.NtkOperator(model, x), k=3, return_eigenvectors=False)
    assert found == pytest.approx(expected[-3:], rel=1e-10)


class CutOff(torch.autograd.Function):
    """A backward pass on detached values: right once, wrong when differentiated again."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor) -> torch.Tensor:
        return gradient + gradient.detach()


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor) -> torch.Tensor:
        return 2 * gradient


class Through(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function.apply(self.layer(x))


@pytest.mark.parametrize(
    ("function", "message"),
    [(CutOff, r"differs from ‖Jᵀv‖².*empirical_ntk"), (Once, r"differentiated twice.*empirical_ntk")],
)
def test_a_backward_pass_that_has_no_derivative_is_refused(
    function: type[torch.autograd.Function], message: str
) -> None:
    with pytest.raises(errors.NoJacobianProductError, match=message):
        ntk.NtkOperator(Through(function), torch.randn(5, 4))


def test_refusals() -> None:
    model, x, _ = build("mlp")
    with pytest.raises(errors.UnknownNameError, match=r"reduce: must be one of .*'mean'"):
        ntk.NtkOperator(model, x, reduce="mean")
    with pytest.raises(ValueError, match="chunk must be at least one vector, or None; got 0"):
        ntk.NtkOperator(model, x, chunk=0)
    with pytest.raises(errors.InputMismatchError, match="at least one example"):
        ntk.NtkOperator(model, x[:0])
    with pytest.raises(errors.BatchOfOneError, match="at least 2 examples"):
        ntk.NtkOperator(build("conv with BatchNorm")[0], torch.zeros(1, 3, 6, 6).double())
    with pytest.raises(ValueError, match=r"projection of parameter '0.weight' must be differentiable"):
        ntk.NtkOperator(model, x, projection={"0.weight": lambda w: w.detach()})

    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x).detach()

    with pytest.raises(errors.NoParametersError, match="depends on none"):
        ntk.NtkOperator(Detached(), x.float())


def test_a_gradient_that_overflows_is_named() -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * self.weight).square().sum(1, keepdim=True).sqrt()

    with pytest.raises(errors.NonFiniteKernelError, match="not finite although the output is"):
        ntk.NtkOperator(Norm(), torch.zeros(3, 4)) @ np.ones(3)


def test_read_only_vectors_are_taken() -> None:
    """The eigenvectors of a result are read-only."""
    model, x, _ = build("mlp")
    operator = ntk.NtkOperator(model, x)
    vectors = np.eye(10)
    vectors.setflags(write=False)
    assert np.array_equal(operator @ vectors, operator @ np.eye(10))


def test_memory_in_words() -> None:
    model, x, _ = build("mlp")
    in_words, in_bytes = (ntk.NtkOperator(model, x, max_memory=bound) for bound in ("1MiB", 2**20))
    assert in_words.chunk == in_bytes.chunk
    found, expected = (ntk.spectrum(in_words, k=1, max_memory=bound).eigenvalues for bound in ("1MiB", 2**20))
    np.testing.assert_array_equal(found, expected)
