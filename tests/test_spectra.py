"""Recorded kernel spectra, and the fixture that holds them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import ntk
from diagnostics.pytest_plugin import SpectrumRegression
from tests.ntk.networks import dense

NORMS = ("none", "weight_mean", "batch_norm")
SPECTRA = Path(__file__).parent / "spectra"
SIZE, DEPTH, WIDTH = 8, 3, 128


def gram() -> np.ndarray:
    """AR(1) batch: unit variance, correlation 0.6 to the power of the distance; no two eigenvalues coincide."""
    index = np.arange(SIZE)
    return 0.6 ** np.abs(index[:, None] - index[None, :])


def empirical(norm: str, dtype: torch.dtype = torch.float64, order: list[int] | None = None) -> dict:
    """NTK (projected for weight mean) and NNGP of one seeded network of width 128."""
    x = np.sqrt(SIZE) * np.linalg.cholesky(gram())
    net = dense(norm, DEPTH, SIZE, width=WIDTH, seed=0, dtype=torch.float64)
    batch = torch.from_numpy(x if order is None else x[order])
    projection = net.projection or None
    return {
        "ntk": ntk.empirical_ntk(
            net.model.to(dtype), batch.to(dtype), params=net.multipliers, projection=projection, reduce="sum"
        ),
        "nngp": ntk.empirical_nngp(net.model, batch.to(dtype), layer=str(len(net.model) - 2)),
    }


@pytest.mark.parametrize("norm", NORMS)
def test_empirical(norm: str, spectrum_regression: SpectrumRegression) -> None:
    spectrum_regression.check(empirical(norm), fullpath=SPECTRA / f"empirical_{norm}.npz")


@pytest.mark.parametrize("norm", NORMS)
def test_analytic(norm: str, spectrum_regression: SpectrumRegression) -> None:
    kernels = ntk.analytic.propagate(gram(), DEPTH, norm=norm)
    spectrum_regression.check({"ntk": kernels.ntk, "nngp": kernels.nngp}, fullpath=SPECTRA / f"analytic_{norm}.npz")


@pytest.mark.parametrize("norm", NORMS)
def test_float32_agrees_within_its_own_tolerance(norm: str, spectrum_regression: SpectrumRegression) -> None:
    spectra = empirical(norm, torch.float32)
    spectrum_regression.check(spectra, fullpath=SPECTRA / f"empirical_{norm}.npz")
    with pytest.raises(AssertionError, match="worst eigenvalue"):
        spectrum_regression.check(spectra, rtol=1e-9, fullpath=SPECTRA / f"empirical_{norm}.npz")


@pytest.mark.parametrize("norm", NORMS)
def test_order_of_the_examples_does_not_matter(norm: str, spectrum_regression: SpectrumRegression) -> None:
    order = [3, 1, 7, 0, 2, 6, 5, 4]
    spectrum_regression.check(empirical(norm, order=order), fullpath=SPECTRA / f"empirical_{norm}.npz")


def test_spectra_and_eigenvalues_in_any_order(spectrum_regression: SpectrumRegression) -> None:
    spectra = {name: ntk.spectrum(kernel) for name, kernel in empirical("none").items()}
    shuffled = {name: spectrum.eigenvalues[[5, 2, 7, 0, 1, 3, 6, 4]] for name, spectrum in spectra.items()}
    for value in (spectra, shuffled):
        spectrum_regression.check(value, fullpath=SPECTRA / "empirical_none.npz")


@pytest.mark.parametrize("index", [0, 3, 7])
@pytest.mark.parametrize("factor", [1 + 1e-4, 1 - 1e-4])
def test_a_perturbed_spectrum_fails(index: int, factor: float, spectrum_regression: SpectrumRegression) -> None:
    values = {name: ntk.spectrum(kernel).eigenvalues.copy() for name, kernel in empirical("none").items()}
    values["ntk"][index] *= factor
    message = rf"spectrum 'ntk': worst eigenvalue is number {index + 1} of 8.*moved by 0.0001 of itself.*--force-regen"
    with pytest.raises(AssertionError, match="(?s)" + message) as caught:
        spectrum_regression.check(values, fullpath=SPECTRA / "empirical_none.npz")
    assert "'nngp'" not in str(caught.value)


def test_the_networks_have_different_spectra(spectrum_regression: SpectrumRegression) -> None:
    for norm, other in (("none", "weight_mean"), ("weight_mean", "batch_norm"), ("batch_norm", "none")):
        with pytest.raises(AssertionError, match=r"'ntk': worst eigenvalue(.|\n)*'nngp': worst eigenvalue"):
            spectrum_regression.check(empirical(norm), fullpath=SPECTRA / f"empirical_{other}.npz")


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    path = tmp_path / "recorded.npz"
    np.savez(path, a=np.array([4.0, 1.0, 0.0]))
    return path


@pytest.mark.parametrize("smallest", [0.0, 1e-16, -1e-16])
def test_the_sign_of_a_zero_does_not_matter(
    smallest: float, recorded: Path, spectrum_regression: SpectrumRegression
) -> None:
    spectrum_regression.check({"a": [1.0, smallest, 4.0]}, fullpath=recorded)


def test_a_negative_eigenvalue_is_no_zero(recorded: Path, spectrum_regression: SpectrumRegression) -> None:
    with pytest.raises(AssertionError, match="number 3 of 3: recorded 0, obtained -1e-06; it moved by inf of itself"):
        spectrum_regression.check({"a": [1.0, -1e-6, 4.0]}, fullpath=recorded)
    spectrum_regression.check({"a": [1.0, -1e-6, 4.0]}, rtol=1e-6, fullpath=recorded)


def test_names_and_sizes_must_agree(recorded: Path, spectrum_regression: SpectrumRegression) -> None:
    with pytest.raises(AssertionError, match=r"(?s)keys.*differ.*New in obtained: \['b'\]"):
        spectrum_regression.check({"b": [1.0]}, fullpath=recorded)
    with pytest.raises(AssertionError, match=r"(?s)Shapes are not the same.*\(2,\)"):
        spectrum_regression.check({"a": [1.0, 4.0]}, fullpath=recorded)


@pytest.mark.parametrize("rtol", [0.0, 1.0, -1e-3])
def test_tolerance_out_of_range(rtol: float, recorded: Path, spectrum_regression: SpectrumRegression) -> None:
    with pytest.raises(ValueError, match=f"rtol must lie between 0 and 1.*got {rtol}"):
        spectrum_regression.check({"a": [1.0]}, rtol=rtol, fullpath=recorded)


def test_not_a_number(recorded: Path, spectrum_regression: SpectrumRegression) -> None:
    with pytest.raises(ValueError, match="spectrum 'a' has eigenvalues that are not finite"):
        spectrum_regression.check({"a": [1.0, np.nan]}, fullpath=recorded)


def pytest_in(folder: Path, *options: str) -> subprocess.CompletedProcess:
    """Run pytest on a test of a user, in a process of its own."""
    (folder / "test_user.py").write_text(
        "def test_kernel(spectrum_regression):\n    spectrum_regression.check({'a': [3.0, 1.0]})\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, "test_user.py"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_first_run_records_and_second_compares(tmp_path: Path) -> None:
    first, second = pytest_in(tmp_path), pytest_in(tmp_path)
    assert first.returncode == 1
    assert "created" in first.stdout
    assert (tmp_path / "test_user" / "test_kernel.npz").is_file()
    assert second.returncode == 0


def test_missing_plugin_is_named(tmp_path: Path) -> None:
    run = pytest_in(tmp_path, "-p", "no:pytest-regressions", "-p", "no:regressions", "-p", "no:pytest_regressions")
    assert run.returncode != 0
    assert "pip install 'mimicnorm[test]'" in run.stdout + run.stderr


def test_the_plugin_imports_nothing_heavy() -> None:
    heavy = "('numpy', 'torch', 'jax', 'scipy', 'matplotlib', 'pandas', 'xarray', 'pytest_regressions')"
    script = f"import sys, diagnostics.pytest_plugin; print(*(name for name in {heavy} if name in sys.modules))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
