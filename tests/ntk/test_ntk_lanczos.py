"""Ends of the spectrum of an operator, against dense decompositions; null spaces are named, never made into numbers."""

import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from torch import nn

import ntk
from ntk import errors
from ntk.lanczos import Tridiagonal, lanczos
from tests.ntk.oracle import build
from tests.ntk.test_ntk_spectrum import rotated

EPS = float(np.finfo(np.float64).eps)


def last_batch_norm() -> tuple[nn.Module, torch.Tensor]:
    """A classifier that ends in BatchNorm, whose outputs have a fixed mean and variance over the batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 3), nn.BatchNorm1d(3, eps=1e-30, affine=False))
    return model.double(), torch.randn(20, 6).double()


def test_basis_is_orthonormal_and_reproduces_the_matrix() -> None:
    matrix = rotated(list(np.geomspace(1, 1e-12, 60)))
    start = np.random.default_rng(0).normal(size=(60, 2))
    *_, state = lanczos(lambda v: matrix @ v, start / np.linalg.norm(start, axis=0), EPS, 60)
    for column in range(2):
        basis = state.basis[:, :, column]
        m = int(np.flatnonzero(state.off_diagonal[column] == 0)[0]) + 1
        basis = basis[:m]
        assert np.abs(basis @ basis.T - np.eye(m)).max() < 1e-13
        off = state.off_diagonal[column, : m - 1]
        tridiagonal = np.diag(state.diagonal[column, :m]) + np.diag(off, 1) + np.diag(off, -1)
        assert np.abs(basis @ matrix @ basis.T - tridiagonal).max() < 1e-13


@pytest.mark.parametrize("k", [1, 4, (1, 1), (3, 2), (5, 0)])
def test_ends_are_those_of_the_dense_decomposition(k: int | tuple[int, int]) -> None:
    matrix = rotated(list(np.geomspace(7, 1e-4, 80)))
    largest, smallest = k if isinstance(k, tuple) else (k, 0)
    every = np.linalg.eigvalsh(matrix)[::-1]
    expected = np.concatenate([every[:largest], every[80 - smallest :]])
    found = ntk.spectrum(aslinearoperator(matrix), k=k)
    dense = ntk.spectrum(matrix, k=k)
    assert (found.method, found.size, found.source, dense.method) == ("lanczos", 80, "operator", "dense")
    assert found.eigenvalues == pytest.approx(expected, rel=1e-10)
    assert dense.eigenvalues == pytest.approx(expected, rel=1e-10)
    assert not found.eigenvectors.flags.writeable
    recomputed = np.linalg.norm(matrix @ found.eigenvectors - found.eigenvectors * found.eigenvalues, axis=0)
    assert recomputed == pytest.approx(found.residuals, abs=1e-14)
    assert np.linalg.norm(found.eigenvectors, axis=0) == pytest.approx(np.ones(len(expected)), rel=1e-12)
    assert (np.abs(found.eigenvalues - expected) <= found.errors).all()
    if smallest:
        for result in (found, dense):
            assert result.condition_number == pytest.approx(7e4, rel=1e-9)
            assert result.range_condition_number == pytest.approx(7e4, rel=1e-9)
            assert (result.nullity, result.nullity_is_exact, result.at_precision_floor) == (0, True, False)
        assert "± " in repr(found)
    else:
        with pytest.raises(errors.PartialSpectrumError, match=r"condition_number needs all 80.*k=\(1, 1\)"):
            found.condition_number  # ruff: ignore[useless-expression]


@pytest.mark.parametrize("k", [(3, 2), (1, 1), (4, 3)])
def test_multiple_eigenvalues_are_found_as_often_as_they_are(k: tuple[int, int]) -> None:
    eigenvalues = [3.0, 3.0, 3.0, 2.0, *np.linspace(1.5, 0.5, 40), 0.1, 0.1]
    found = ntk.spectrum(aslinearoperator(rotated(eigenvalues)), k=k)
    expected = eigenvalues[: k[0]] + eigenvalues[len(eigenvalues) - k[1] :]
    assert found.eigenvalues == pytest.approx(expected, rel=1e-10)


def test_identity() -> None:
    found = ntk.spectrum(aslinearoperator(2 * np.eye(9)), k=(2, 2))
    assert found.eigenvalues == pytest.approx([2, 2, 2, 2], rel=1e-14)
    assert found.condition_number == pytest.approx(1, rel=1e-14)


def test_null_space_is_counted_and_the_condition_number_is_that_of_the_range() -> None:
    matrix = rotated([*np.linspace(5, 0.5, 30), *[0.0] * 12])
    found = ntk.spectrum(aslinearoperator(matrix), k=(1, 1))
    assert (found.nullity, found.nullity_is_exact, found.at_precision_floor) == (12, True, True)
    assert found.range_condition_number == pytest.approx(10, rel=1e-10)
    assert found.products < 42
    with pytest.warns(errors.PrecisionFloorWarning, match=r"inf.*range_condition_number"):
        assert found.condition_number == np.inf
    assert "null space of dimension 12, condition number on the range 10" in repr(found)
    for k in (None, (1, 1)):
        dense = ntk.spectrum(matrix, k=k)
        assert (dense.nullity, dense.nullity_is_exact) == (12, True)
        assert dense.range_condition_number == pytest.approx(10, rel=1e-10)


def test_a_lower_bound_is_called_one() -> None:
    """Distinct eigenvalues hide behind a double one, so that the Krylov space does not say how much is null."""
    found = ntk.spectrum(aslinearoperator(rotated([3.0, 3.0, 2.0, 1.0, *[0.0] * 8])), k=(1, 2))
    assert (found.nullity, found.nullity_is_exact) == (2, False)
    assert "null space of dimension at least 2" in repr(found)
    assert found.range_condition_number == pytest.approx(3, rel=1e-10)


def test_an_end_that_did_not_converge_has_no_condition_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ntk.lanczos.MAX_STEPS", 12)
    matrix = rotated(list(np.geomspace(1, 1e-7, 200)))
    found = ntk.spectrum(aslinearoperator(matrix), k=(1, 1))
    assert found.at_precision_floor
    assert found.errors[-1] > found.eigenvalues[-1]
    with pytest.raises(errors.PartialSpectrumError, match=r"not resolved.*at least"):
        found.range_condition_number  # ruff: ignore[useless-expression]
    with pytest.warns(errors.PrecisionFloorWarning, match="inf"):
        assert found.condition_number == np.inf
    every = np.linalg.eigvalsh(matrix)
    for value, bound in zip(found.eigenvalues, found.errors, strict=True):
        assert np.abs(every - value).min() <= bound


def test_zero_kernel() -> None:
    found = ntk.spectrum(aslinearoperator(np.zeros((6, 6))), k=(1, 1))
    assert (found.nullity, found.nullity_is_exact) == (6, True)
    assert np.isnan(found.range_condition_number)


@pytest.mark.parametrize("case", ["conv with BatchNorm", "mlp", "tied and called twice"])
def test_ends_of_a_network(case: str) -> None:
    model, x, _ = build(case, n1=12)
    expected = np.linalg.eigvalsh(ntk.empirical_ntk(model, x).flatten())[::-1]
    operator = ntk.NtkOperator(model, x)
    found = ntk.spectrum(operator, k=(2, 1))
    assert found.eigenvalues[:2] == pytest.approx(expected[:2], rel=1e-10)
    assert (np.abs(found.eigenvalues - [*expected[:2], expected[-1]]) <= found.errors).all()
    assert found.source == operator.describe()
    every = ntk.spectrum(operator)
    assert (every.method, every.products) == ("dense", len(expected))
    assert every.eigenvalues == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_null_space_of_a_last_batch_norm() -> None:
    """Each output has one mean and one variance over the batch, so that two directions an output do not move."""
    model, x = last_batch_norm()
    dense = ntk.spectrum(ntk.empirical_ntk(model, x))
    found = ntk.spectrum(ntk.NtkOperator(model, x), k=(1, 1))
    for result in (dense, found):
        assert (result.nullity, result.nullity_is_exact) == (6, True)
        assert result.at_precision_floor
    assert found.range_condition_number == pytest.approx(dense.range_condition_number, rel=1e-6)
    assert np.isfinite(dense.range_condition_number)
    model[3] = nn.Identity()
    control = ntk.spectrum(ntk.NtkOperator(model, x), k=(1, 1))
    assert (control.nullity, control.nullity_is_exact, control.at_precision_floor) == (0, True, False)


def test_float32_null_space_is_not_a_condition_number() -> None:
    model, x = last_batch_norm()
    found = ntk.spectrum(ntk.NtkOperator(model, x, dtype=torch.float32), k=(1, 1))
    assert found.dtype == np.float32
    assert found.nullity >= 1
    with pytest.warns(errors.PrecisionFloorWarning, match="inf"):
        assert found.condition_number == np.inf


@pytest.mark.parametrize("k", [0, 10, (0, 1), (1, -1), (5, 5)])
def test_counts_out_of_range(k: int | tuple[int, int]) -> None:
    for kernel in (np.eye(9), aslinearoperator(np.eye(9))):
        with pytest.raises(ValueError, match=r"k must be between 1 and the size 9.*\(largest, smallest\).*got"):
            ntk.spectrum(kernel, k=k)


def test_operators_that_are_no_kernels() -> None:
    with pytest.raises(errors.AsymmetricKernelError, match=r"square operator.*\(3, 4\)"):
        ntk.spectrum(aslinearoperator(np.zeros((3, 4))), k=1)
    with pytest.raises(errors.AsymmetricKernelError, match="symmetric operator; u·Av and Au·v differ"):
        ntk.spectrum(aslinearoperator(np.triu(np.ones((5, 5)))), k=1)
    operator = LinearOperator((2, 2), matvec=lambda v: np.array([[1, 2], [0, 1]]) @ v, dtype=np.float64)
    with pytest.raises(errors.AsymmetricKernelError, match="entries differ from their transpose"):
        ntk.spectrum(operator)


class Counted(LinearOperator):
    """A matrix that counts the vectors it multiplies."""

    def __init__(self, matrix: np.ndarray) -> None:
        super().__init__(matrix.dtype, matrix.shape)
        self.matrix, self.products = matrix, 0

    def _matvec(self, vector: np.ndarray) -> np.ndarray:
        return self._matmat(vector.reshape(-1, 1))[:, 0]

    def _matmat(self, vectors: np.ndarray) -> np.ndarray:
        self.products += vectors.shape[1]
        return self.matrix @ vectors


@pytest.mark.parametrize("k", [(1, 1), (3, 2), (4, 0)])
def test_a_restarted_process_finds_the_same_ends(k: tuple[int, int]) -> None:
    """A basis of 40 vectors where one of 200 or so would be taken; products, and the vectors held, are counted."""
    matrix = rotated([30.0, 30.0, *np.linspace(9, 1, 297), 0.7])
    every = np.linalg.eigvalsh(matrix)[::-1]
    whole, restarted = Counted(matrix), Counted(matrix)
    free = ntk.spectrum(whole, k=k)
    found = ntk.spectrum(restarted, k=k, max_memory=40 * 16 * 300)
    expected = np.concatenate([every[: k[0]], every[300 - k[1] :]])
    for result in (free, found):
        assert result.eigenvalues == pytest.approx(expected, rel=1e-9)
        assert (result.residuals <= 1e-5 * result.eigenvalues).all()
    assert whole.products == free.products < 300
    assert restarted.products == found.products < 2 * free.products
    vectors = found.eigenvectors
    assert np.abs(vectors.T @ vectors - np.eye(sum(k))).max() < 1e-9


def test_the_basis_stays_within_its_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    held = []

    def watched(*arguments: object) -> Iterator[Tridiagonal]:
        for state in lanczos(*arguments):
            held.append(len(state.basis) + arguments[4].shape[1])
            yield state

    monkeypatch.setattr("ntk.lanczos.lanczos", watched)
    matrix = rotated([50.0, *np.linspace(9, 1, 248), 0.9])
    for capacity in (20, 30):
        held.clear()
        found = ntk.spectrum(aslinearoperator(matrix), k=(1, 1), max_memory=capacity * 16 * 250)
        assert max(held) == capacity
        assert len(held) > 2 * capacity
        assert found.condition_number == pytest.approx(50 / 0.9, rel=1e-8)


def test_memory_of_a_large_basis_is_bounded() -> None:
    """Ten thousand examples; what NumPy holds at its peak, against a bound that the whole basis would break."""
    diagonal = np.concatenate([[50.0], np.linspace(9, 1, 9998), [0.9]])
    operator = LinearOperator((10000, 10000), matvec=lambda v: diagonal * v.ravel(), dtype=np.float64)
    operator.matmat = lambda v: diagonal[:, None] * v
    peak = {}
    for bound in (None, 60 * 16 * 10000):
        tracemalloc.start()
        found = ntk.spectrum(operator, k=(1, 1), max_memory=bound)
        peak[bound] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert found.condition_number == pytest.approx(50 / 0.9, rel=1e-6)
    slack = 12 * 8 * 10000  # the vector in work, its images, and the eigenvectors returned
    assert peak[60 * 16 * 10000] < 60 * 16 * 10000 + slack < peak[None]


def test_a_tolerance_saves_products_and_its_error_bar_covers() -> None:
    matrix = rotated(list(np.geomspace(5, 1e-2, 300)))
    fine, rough = (ntk.spectrum(aslinearoperator(matrix), k=(1, 1), tolerance=tolerance) for tolerance in (1e-6, 1e-2))
    assert rough.products < 0.9 * fine.products
    assert abs(rough.eigenvalues[1] - 1e-2) < rough.errors[1] < 1e-2 * rough.eigenvalues[1]
    assert fine.errors[1] < 1e-6 * fine.eigenvalues[1]


def test_a_null_space_is_named_under_restarts_too() -> None:
    """Its dimension is a lower bound then, as no Krylov space was exhausted; the range is found all the same."""
    matrix = rotated([*np.linspace(5, 0.5, 160), *[0.0] * 40])
    found = ntk.spectrum(aslinearoperator(matrix), k=(1, 1), max_memory=30 * 16 * 200)
    assert found.nullity >= 1
    assert not found.nullity_is_exact
    with pytest.warns(errors.PrecisionFloorWarning, match="inf"):
        assert found.condition_number == np.inf
    value, residual = found.positive
    assert min(abs(np.linalg.eigvalsh(matrix) - value)) <= max(residual, found.error_estimate)
    assert found.range_condition_number == pytest.approx(10, rel=1e-8)


def test_refused_memory_and_tolerance() -> None:
    operator = aslinearoperator(np.eye(50))
    with pytest.raises(errors.MemoryBudgetError, match=r"max_memory must hold 20 vectors.*max_memory=16000 would do"):
        ntk.spectrum(operator, k=(1, 1), max_memory=15999)
    assert ntk.spectrum(operator, k=(1, 1), max_memory=16000).condition_number == pytest.approx(1)
    for tolerance in (0.0, 1.0):
        with pytest.raises(ValueError, match=f"tolerance must be between 0 and 1.*got {tolerance}"):
            ntk.spectrum(operator, k=1, tolerance=tolerance)


@pytest.mark.parametrize("case", ["mlp", "conv with BatchNorm"])
def test_values_of_a_float32_search_are_checked_in_float64(case: str) -> None:
    """Control: by itself it knows the smallest eigenvalue to the floor of float32 only."""
    model, x, _ = build(case, n1=12)
    dense = np.linalg.eigvalsh(ntk.empirical_ntk(model, x, reduce="sum").flatten())[::-1]
    single, double = (ntk.NtkOperator(model, x, reduce="sum", dtype=t) for t in (torch.float32, torch.float64))
    found, alone = (ntk.spectrum(single, k=(1, 1), exact=exact) for exact in (double, None))
    expected = dense[[0, -1]]
    assert (np.abs(found.eigenvalues - expected) <= found.errors).all()
    assert found.eigenvalues == pytest.approx(expected, rel=1e-4)
    assert found.errors[0] < alone.errors[0] / 3
    assert (found.dtype, alone.dtype) == (np.float64, np.float32)
    recomputed = np.linalg.norm(double @ found.eigenvectors - found.eigenvectors * found.eigenvalues, axis=0)
    assert recomputed == pytest.approx(found.residuals, rel=1e-6, abs=1e-12)
    assert ntk.spectrum(single, exact=double).eigenvalues == pytest.approx(dense, rel=1e-9, abs=1e-12)


def test_float64_finds_what_float32_takes_for_zero() -> None:
    matrix = rotated([100.0, *np.linspace(2, 1, 60), 1e-4])
    single = aslinearoperator(matrix.astype(np.float32))
    found, alone = (ntk.spectrum(single, k=(1, 1), exact=exact) for exact in (aslinearoperator(matrix), None))
    assert alone.nullity == 1
    assert (found.nullity, found.nullity_is_exact) == (0, True)
    assert abs(found.eigenvalues[1] - 1e-4) <= found.errors[1] < 1e-4
    null = rotated([100.0, *np.linspace(2, 1, 60), 0.0])  # control: what is zero stays so
    single = aslinearoperator(null.astype(np.float32))
    assert not ntk.spectrum(single, k=(1, 1), exact=aslinearoperator(null)).nullity_is_exact


def test_an_interior_eigenvalue_above_the_floor_is_not_waited_for_without_end() -> None:
    """A float32 floor inside the bulk of the spectrum: what converged is reported, the rest is called unresolved."""
    diagonal = np.concatenate([[3e4], np.geomspace(30, 0.1, 1999)]).astype(np.float32)
    operator = Counted(np.diag(diagonal))
    found = ntk.spectrum(operator, k=(1, 1), max_memory=120 * 16 * 2000, tolerance=1e-2)
    assert found.error_estimate > 1
    assert operator.products < 500
    assert found.at_precision_floor


def test_an_exact_kernel_of_another_kind_is_refused() -> None:
    operator = aslinearoperator(np.eye(5, dtype=np.float32))
    for wrong in (np.eye(4), np.eye(5, dtype=np.float32)):
        with pytest.raises(ValueError, match=r"exact must be the same kernel in float64, of shape \(5, 5\); got float"):
            ntk.spectrum(operator, k=1, exact=aslinearoperator(wrong))
