"""The `spectrum_regression` fixture: hold the eigenvalues of a kernel against recorded ones.

    def test_kernel_is_unchanged(spectrum_regression):
        spectrum_regression.check({"ntk": ntk.empirical_ntk(model, x)})

The first run records, later runs compare; `pytest --force-regen` records anew. Files lie where pytest-regressions puts
them: in the folder that is named after the test module, or at `fullpath`.

pytest loads this module in every session in which the distribution is installed, so that NumPy, torch and
pytest-regressions are imported when the fixture is used, never before.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import numpy as np

MISSING = (
    "the spectrum_regression fixture needs the pytest plugin pytest-regressions, which is not loaded; "
    "install it with: pip install 'mimicnorm[test]'"
)


@pytest.fixture
def spectrum_regression(request: pytest.FixtureRequest) -> "SpectrumRegression":
    """Compare spectra with recorded ones; see `SpectrumRegression.check`.

    Args:
        request: Of pytest.

    Raises:
        UsageError: pytest-regressions is not installed.
        FixtureLookupError: Another fixture that it needs is not there.
    """
    try:
        backend = request.getfixturevalue("ndarrays_regression")
    except pytest.FixtureLookupError as error:
        if error.argname != "ndarrays_regression":
            raise
        raise pytest.UsageError(MISSING) from None
    return SpectrumRegression(backend, request)


class SpectrumRegression:
    """Recorded spectra on top of the `ndarrays_regression` fixture of pytest-regressions."""

    def __init__(self, backend: Any, request: pytest.FixtureRequest) -> None:
        """Hold on to the fixture beneath.

        Args:
            backend: The `ndarrays_regression` fixture.
            request: Of pytest; it names the test.
        """
        self._backend = backend
        self._request = request

    def check(
        self, spectra: Mapping[str, Any], *, rtol: float | None = None, fullpath: str | Path | None = None
    ) -> None:
        """Compare spectra with the recorded ones, or record them.

        Eigenvalues are compared in descending order, so that a permutation of the examples changes nothing. Deviations
        are measured against the largest eigenvalue, as rounding of a symmetric matrix moves every eigenvalue by about
        as much (Weyl). Values within the precision floor, size * eps * λmax, count as zero whatever their sign; a
        negative eigenvalue beyond it is compared as it is.

        Args:
            spectra: Name -> `ntk.KernelResult`, `ntk.Spectrum`, symmetric matrix [n, n], or eigenvalues [n] in any
                order.
            rtol: Deviation allowed, relative to λmax, between 0 and 1. None derives it from dtype and size n as
                n * eps ** (2/3): Weyl's bound with a third of the digits of each entry left to the order of summation,
                which differs between machines. That is 5.9e-10 for float64 and 3.9e-4 for float32 at n = 16; where the
                recorded spectrum has the coarser dtype, that one counts.
            fullpath: File of the recorded spectra, .npz; None for `<test module>/<test>.npz`.

        Raises:
            AssertionError: A spectrum departs from the recorded one.
            ValueError: An argument is out of range, or eigenvalues are not finite.
        """
        __tracebackhide__ = True
        if rtol is not None and not 0 < rtol < 1:
            raise ValueError(f"rtol must lie between 0 and 1, relative to the largest eigenvalue; got {rtol}.")
        obtained = {name: _eigenvalues(name, value) for name, value in spectra.items()}
        path = self._path() if fullpath is None else Path(fullpath)
        recorded = _load(path)
        tolerances = {
            name: {
                "rtol": 0.0,
                "atol": _tolerance(values, recorded.get(name), rtol) * float(abs(values).max(initial=0.0)),
            }
            for name, values in obtained.items()
        }
        try:
            self._backend.check(dict(obtained), fullpath=path, tolerances=tolerances)
        except AssertionError as error:
            raise AssertionError(_explain(obtained, recorded, rtol, path) or str(error)) from None

    def _path(self) -> Path:
        module = self._request.path
        return module.with_suffix("") / (re.sub(r"\W", "_", self._request.node.name) + ".npz")


def _eigenvalues(name: str, value: Any) -> "np.ndarray":
    """Descending eigenvalues in the dtype of the kernel, with those within the precision floor set to zero.

    Raises:
        ValueError: An eigenvalue is not finite.
    """
    import numpy as np

    if not hasattr(value, "eigenvalues") and np.ndim(value) != 1:
        from ntk import spectrum

        value = spectrum(value)
    values = np.asarray(getattr(value, "eigenvalues", value))
    dtype = np.dtype(getattr(value, "dtype", values.dtype))
    dtype = dtype if dtype in (np.float32, np.float64) else np.dtype(np.float64)
    values = np.sort(values.astype(np.float64))[::-1]
    if not np.isfinite(values).all():
        raise ValueError(
            f"spectrum {name!r} has eigenvalues that are not finite; check the kernel for NaN and for overflow."
        )
    floor = values.size * float(np.finfo(dtype).eps) * np.abs(values).max(initial=0.0)
    return np.where(np.abs(values) <= floor, 0.0, values).astype(dtype)


def _tolerance(values: "np.ndarray", recorded: "np.ndarray | None", rtol: float | None) -> float:
    """Deviation allowed relative to λmax."""
    import numpy as np

    if rtol is not None:
        return rtol
    eps = max(float(np.finfo(array.dtype).eps) for array in (values, recorded) if array is not None)
    return float(values.size * eps ** (2 / 3))


def _load(path: Path) -> "dict[str, np.ndarray]":
    """Spectra recorded in a file, none if there is no file."""
    import numpy as np

    if not path.is_file():
        return {}
    with np.load(path) as data:
        return {name: data[name] for name in data.files}


def _explain(
    obtained: "dict[str, np.ndarray]", recorded: "dict[str, np.ndarray]", rtol: float | None, path: Path
) -> str | None:
    """The worst eigenvalue of each spectrum that departs; None where names or sizes differ instead."""
    import numpy as np

    if obtained.keys() != recorded.keys():
        return None
    lines = []
    for name, values in obtained.items():
        before = recorded[name]
        if before.shape != values.shape:
            return None
        deviations = np.abs(values.astype(np.float64) - before) / float(np.abs(values).max(initial=0.0) or 1.0)
        worst = int(deviations.argmax())
        allowed = _tolerance(values, before, rtol)
        if deviations[worst] > allowed:
            own = abs(float(values[worst]) / float(before[worst]) - 1) if before[worst] else float("inf")
            lines.append(
                f"spectrum {name!r}: worst eigenvalue is number {worst + 1} of {len(values)}: recorded "
                f"{before[worst]:.10g}, obtained {values[worst]:.10g}; it moved by {own:.3g} of itself and by "
                f"{deviations[worst]:.3g} of the largest eigenvalue, allowed is {allowed:.3g}."
            )
    lines.append(f"Recorded in {path}. If the change is meant, run pytest with --force-regen and commit the file.")
    return "\n".join(lines)
