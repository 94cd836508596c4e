"""Eigenvalues, condition number and effective rank, and when they are not to be trusted."""

import re
import warnings

import numpy as np
import pytest
import torch

import ntk
from ntk import errors
from ntk.spectrum import condition_limit
from tests.ntk.oracle import build


def rotated(eigenvalues: list[float], seed: int = 0) -> np.ndarray:
    """Symmetric matrix with these eigenvalues."""
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(eigenvalues),) * 2))[0]
    matrix = basis @ np.diag(eigenvalues) @ basis.T
    return (matrix + matrix.T) / 2


def test_known_eigenvalues() -> None:
    result = ntk.spectrum(rotated([0.5, 8.0, 2.0, 4.0]))
    assert np.abs(result.eigenvalues - [8, 4, 2, 0.5]).max() <= result.error_estimate
    assert not result.eigenvalues.flags.writeable
    assert result.condition_number == pytest.approx(16, rel=1e-12)
    assert (result.method, result.size, result.dtype, result.n_negative) == ("dense", 4, np.float64, 0)
    assert result.error_estimate == pytest.approx(np.finfo(np.float64).eps * 8 * 4)


def test_effective_rank_is_the_exponential_of_the_entropy() -> None:
    assert ntk.spectrum(np.eye(7)).effective_rank == pytest.approx(7, rel=1e-12)
    assert ntk.spectrum(np.ones((5, 5))).effective_rank == pytest.approx(1, rel=1e-12)
    assert ntk.spectrum(np.diag([3.0, 1.0])).effective_rank == pytest.approx(4 / 3**0.75, rel=1e-12)
    assert ntk.spectrum(np.zeros((3, 3))).effective_rank == 0


def test_kernel_is_flattened() -> None:
    model, x, _ = build("mlp")
    kernel = ntk.empirical_ntk(model, x)
    result = ntk.spectrum(kernel)
    assert result.eigenvalues == pytest.approx(np.linalg.eigvalsh(kernel.flatten())[::-1], rel=1e-10, abs=1e-10)
    assert result.source == kernel.describe()
    assert "NTK" in result._repr_html_()


def test_tensors_and_integers_are_arrays_too() -> None:
    assert ntk.spectrum(torch.eye(3)).dtype == np.float32
    assert ntk.spectrum(np.eye(3, dtype=int)).dtype == np.float64


def test_partial_spectrum() -> None:
    matrix = rotated([5.0, 3.0, 1.0, 0.1])
    result = ntk.spectrum(matrix, k=2)
    assert result.eigenvalues == pytest.approx([5, 3])
    for figure in ("condition_number", "effective_rank", "at_precision_floor"):
        with pytest.raises(errors.PartialSpectrumError, match=rf"{figure} needs all 4 eigenvalues, and k=2.*k=None"):
            getattr(result, figure)
    assert "2 of 4" in repr(result)
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"k must be between 1 and the size 4.*got {k}"):
            ntk.spectrum(matrix, k=k)


@pytest.mark.parametrize(
    ("dtype", "ratio", "noise"),
    [(np.float32, 0.5e4, False), (np.float32, 2e4, True), (np.float64, 2e4, False), (np.float64, 1e14, True)],
)
def test_precision_floor(dtype: type, ratio: float, noise: bool) -> None:
    result = ntk.spectrum(np.diag([1.0, 1 / ratio]).astype(dtype))
    assert result.at_precision_floor is noise
    if noise:
        with pytest.warns(errors.PrecisionFloorWarning, match=rf"at the floor of {np.dtype(dtype)}.*float64"):
            assert result.condition_number == pytest.approx(ratio, rel=1e-6)
        assert "at the precision floor" in repr(result)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert result.condition_number == pytest.approx(ratio, rel=1e-6)


def test_float32_limit_is_that_of_the_design() -> None:
    assert condition_limit(np.float32) == 1e4
    assert condition_limit(np.float64) == pytest.approx(5.4e12, rel=0.01)


def test_float32_condition_number_above_the_limit_is_noise() -> None:
    """What the limit says, measured: at 1e9 the float32 figure is off by more than a tenth, at 1e3 by less than 1 %."""
    for ratio, within in ((1e3, True), (1e9, False)):
        matrix = rotated(list(np.geomspace(1.0, 1 / ratio, 20))).astype(np.float32)
        smallest = ntk.spectrum(matrix).eigenvalues[-1]
        assert bool(abs(smallest * ratio - 1) < 0.01) == within
        assert bool(abs(smallest * ratio - 1) < 0.1) == within


def test_slightly_negative_eigenvalues_are_reported() -> None:
    result = ntk.spectrum(np.diag([1.0, 1e-3, -1e-17]))
    assert result.n_negative == 1
    assert result.eigenvalues[-1] == -1e-17
    assert "1 negative, smallest -1e-17" in repr(result)
    with pytest.warns(errors.PrecisionFloorWarning, match="inf"):
        assert result.condition_number == np.inf


@pytest.mark.parametrize(
    ("matrix", "error", "message"),
    [
        (np.array([[1.0, 0.1], [0.2, 1.0]]), errors.AsymmetricKernelError, "differ from their transpose by up to 0.1"),
        (np.zeros((2, 3)), errors.AsymmetricKernelError, r"square matrix.*\(2, 3\)"),
        (np.zeros((2, 2, 1, 1)), errors.AsymmetricKernelError, r"flatten\(\)"),
        (np.zeros((0, 0)), errors.AsymmetricKernelError, r"square matrix.*\(0, 0\)"),
        (np.diag([1.0, np.nan]), errors.NonFiniteKernelError, "1 of 4 are NaN or inf"),
        (np.diag([np.inf, 1.0]), errors.NonFiniteKernelError, "1 of 4 are NaN or inf"),
    ],
)
def test_refusals(matrix: np.ndarray, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ntk.spectrum(matrix)


def test_cross_kernel_has_no_spectrum() -> None:
    model, x1, x2 = build("mlp")
    with pytest.raises(errors.AsymmetricKernelError, match=re.escape("cross kernel of shape (5, 4, 2, 2)")):
        ntk.spectrum(ntk.empirical_ntk(model, x1, x2))


def test_rounding_is_not_asymmetry() -> None:
    matrix = rotated([3.0, 2.0, 1.0]).astype(np.float32)
    matrix[0, 1] *= 1 + 1e-6
    ntk.spectrum(matrix)
    with pytest.raises(errors.AsymmetricKernelError, match="symmetric matrix"):
        ntk.spectrum(matrix.astype(np.float64))
