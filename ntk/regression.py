"""Kernel regression: what a network that is linear in its weights learns, from its finite kernel alone."""

from dataclasses import dataclass
from typing import Any
from warnings import warn

import numpy as np
import scipy.linalg

from ntk.display import html_figure, spectrum_svg
from ntk.errors import ConventionError, PrecisionFloorWarning
from ntk.results import KernelResult
from ntk.spectrum import condition_limit, precision_floor


@dataclass(frozen=True, eq=False, repr=False)
class Prediction:
    """Outputs of a network after training on ½ Σ (f − y)² + ½ ridge ‖θ − θ0‖², as its kernel has them.

    Attributes:
        mean: On the test examples [t, o], float64, read-only.
        variance: Of each test output [t, o], of the Gaussian process with the kernel as its covariance and `ridge` as
            the variance of its noise, given the targets; None where no kernel among the test examples was given.
        train: On the training examples [n, o].
        rank: Eigenvalues of the training kernel above `floor`. The outputs do not move in the other directions.
        size: Eigenvalues that there are.
        floor: Below it an eigenvalue is zero: eps * λmax * size with the eps of the kernel.
        unreachable: Norm of the part of y − f0 in the null space of the kernel, over the norm of y − f0.
        eigenvalues: Of the training kernel [size], descending.
        ridge: As given.
        time: As given, None for the end of training.
        source: Convention of the training kernel in one line.
    """

    mean: np.ndarray
    variance: np.ndarray | None
    train: np.ndarray
    rank: int
    size: int
    floor: float
    unreachable: float
    eigenvalues: np.ndarray
    ridge: float
    time: float | None
    source: str

    def __post_init__(self) -> None:
        """Make the arrays read-only copies."""
        for name in ("mean", "variance", "train", "eigenvalues"):
            if getattr(self, name) is not None:
                array = np.array(getattr(self, name), dtype=np.float64)
                array.setflags(write=False)
                object.__setattr__(self, name, array)

    def summary(self) -> str:
        """The figures in one line."""
        when = "at the end of training" if self.time is None else f"at time {self.time:.4g}"
        null = "" if self.rank == self.size else f"; {self.unreachable:.2g} of the targets is out of its range"
        variance = "" if self.variance is None else f"; mean variance {self.variance.mean():.3g}"
        return (
            f"{len(self.mean)} test examples from {len(self.train)}, {when}, ridge {self.ridge:.3g}; kernel of rank "
            f"{self.rank} of {self.size}{null}{variance}"
        )

    def __repr__(self) -> str:
        """The figures in one line."""
        return f"Prediction({self.summary()})"

    def _repr_html_(self) -> str:
        """Eigenvalues that were learned from, with the figures and the convention."""
        return html_figure(spectrum_svg(self.eigenvalues, self.floor), f"{self.summary()}. {self.source}")


def predict(
    kernel_train_train: KernelResult,
    y_train: Any,
    kernel_test_train: KernelResult,
    *,
    kernel_test_test: KernelResult | None = None,
    ridge: float = 0.0,
    time: float | None = None,
    learning_rate: float = 1.0,
    f0_train: Any = None,
    f0_test: Any = None,
) -> Prediction:
    """Outputs of a network that trains linearly in its weights, by gradient flow from θ0.

    f_t = f0 + Θ_test,train (Θ + r)⁻¹ (1 − exp(−η t (Θ + r))) (y − f0), with r the ridge, exact for `ntk.linearize`. On
    the null space of Θ, eigenvalues up to eps * λmax * size, the inverse is zero. A kernel of reduce="trace" or "sum"
    is shared by all outputs, which then do not interact. Source: J. Lee et al. 2019, arXiv 1902.06720, equations 8 to
    11; C. E. Rasmussen and C. K. I. Williams, "Gaussian processes for machine learning", 2006, equation 2.24.

    Args:
        kernel_train_train: Of the n training examples with themselves.
        y_train: Targets [n, o], or [n] for one output.
        kernel_test_train: Of the test examples, rows, with the training examples, columns.
        kernel_test_test: Of the test examples with themselves, for the variance.
        ridge: r >= 0, in the units of the kernel.
        time: Of gradient flow on the loss summed over examples and outputs; None for the end of training.
        learning_rate: η, which multiplies time.
        f0_train: Outputs on the training examples before training, of the shape of y_train; None for zero.
        f0_test: Outputs on the test examples before training; None for zero.

    Returns:
        The prediction, in float64.

    Raises:
        TypeError: A kernel is no `KernelResult`.
        ConventionError: The kernels are of two conventions, or kernel_train_train is no Gram matrix.
        ValueError: A shape does not fit; ridge, time or learning_rate is negative; a variance at a finite time.
    """
    _check(kernel_train_train, kernel_test_train, kernel_test_test)
    _check_numbers(ridge, time, learning_rate, variance=kernel_test_test is not None)
    matrix, cross = (np.asarray(kernel.flatten(), np.float64) for kernel in (kernel_train_train, kernel_test_train))
    (n, t), full = (kernel_train_train.shape[0], kernel_test_train.shape[0]), kernel_train_train.reduce == "none"
    outputs = kernel_train_train.shape[2] if full else None
    targets = _outputs("y_train", y_train, n, outputs)
    o = targets.shape[1]
    start = np.zeros((n, o)) if f0_train is None else _outputs("f0_train", f0_train, n, o)
    start_test = np.zeros((t, o)) if f0_test is None else _outputs("f0_test", f0_test, t, o)
    # With a full kernel the outputs are one vector, example-major as `flatten` has them; else a column each.
    residual = (targets - start).reshape(len(matrix), -1)
    values, vectors = scipy.linalg.eigh((matrix + matrix.T) / 2)
    floor = precision_floor(
        float(np.abs(values).max()), len(values), kernel_train_train.dtype, kernel_train_train.computed_in
    )
    kept = values > floor
    _warn_beyond_precision(values[kept], kernel_train_train, ridge, time)
    learned = 1.0 if time is None else -np.expm1(-learning_rate * time * (values[kept] + ridge))
    inverse, basis = learned / (values[kept] + ridge), vectors[:, kept]
    overlaps = basis.T @ residual
    weights = basis @ (inverse[:, None] * overlaps)
    variance = None
    if kernel_test_test is not None:
        explained = (cross @ basis) ** 2 @ inverse
        variance = (np.diag(kernel_test_test.flatten()).astype(np.float64) - explained).reshape(t, -1)
        variance = np.broadcast_to(variance, (t, o))
    norm = np.linalg.norm(residual)
    return Prediction(
        mean=start_test + (cross @ weights).reshape(t, o),
        variance=variance,
        train=start + (basis @ (values[kept, None] * (basis.T @ weights))).reshape(n, o),
        rank=int(kept.sum()),
        size=len(values),
        floor=floor,
        unreachable=float(np.linalg.norm(residual - basis @ overlaps) / norm) if norm > 0 else 0.0,
        eigenvalues=values[::-1],
        ridge=ridge,
        time=time,
        source=kernel_train_train.describe(),
    )


def _check(train: KernelResult, cross: KernelResult, test: KernelResult | None) -> None:
    """Hold the kernels against each other.

    Raises:
        TypeError: One is no `KernelResult`.
        ConventionError: They are of two conventions, or one that must be a Gram matrix is not.
        ValueError: Their shapes do not fit.
    """
    given = {"kernel_train_train": train, "kernel_test_train": cross}
    given |= {} if test is None else {"kernel_test_test": test}
    for name, kernel in given.items():
        if not isinstance(kernel, KernelResult):
            raise TypeError(
                f"{name} must be a KernelResult, which knows its convention, as ntk.empirical_ntk returns it; got "
                f"{type(kernel).__name__}. For a matrix alone there is ntk.analytic.dynamics.training_dynamics."
            )
        mine, theirs = _convention(train), _convention(kernel)
        differing = [key for key in mine if mine[key] != theirs.get(key)]
        if differing:
            raise ConventionError(
                f"{name} must be of the convention of kernel_train_train; {', '.join(differing)} differ. One is "
                f"{train.describe()}. The other is {kernel.describe()}. Recompute one of them."
            )
        if name != "kernel_test_train" and not kernel.symmetric:
            raise ConventionError(f"{name} must be a kernel of one batch with itself; compute it with x2=None.")
    expected = (len(cross.values) if test is None else len(test.values), len(train.values), *train.shape[2:])
    if cross.shape != expected:
        raise ValueError(
            f"kernel_test_train must have the test examples as rows and the {len(train.values)} training examples as "
            f"columns, shape {expected}; got {cross.shape}. Compute empirical_ntk(model, x_test, x_train)."
        )


def _convention(kernel: KernelResult) -> dict[str, Any]:
    """What kernels of one regression agree in: a kernel of two batches goes with one of one batch."""
    statistics = kernel.statistics and kernel.statistics.replace("two batches", "one batch")
    return kernel.convention | {"statistics": statistics, "layer": kernel.layer}


def _check_numbers(ridge: float, time: float | None, learning_rate: float, *, variance: bool) -> None:
    for name, value in (("ridge", ridge), ("time", time), ("learning_rate", learning_rate)):
        if value is not None and not (np.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be a finite number >= 0; got {value}.")
    if variance and time is not None:
        raise ValueError(
            f"kernel_test_test gives the variance of the posterior, at time=None only; got time={time}. Leave out one "
            "of the two."
        )


def _outputs(name: str, values: Any, n: int, o: int | None) -> np.ndarray:
    """Outputs as float64 [n, o], from NumPy or from torch on any device.

    Raises:
        ValueError: The shape is another one, or a value is not finite.
    """
    detached = values.detach().cpu() if hasattr(values, "detach") else values
    array = np.asarray(detached, dtype=np.float64)
    shaped = array[:, None] if array.ndim == 1 else array
    if shaped.ndim != 2 or len(shaped) != n or shaped.shape[1] != (shaped.shape[1] if o is None else o):
        raise ValueError(f"{name} must have shape [{n}, {o or 'outputs'}], one row an example; got {array.shape}.")
    if not np.isfinite(shaped).all():
        raise ValueError(f"{name} must be finite; {int((~np.isfinite(shaped)).sum())} of {shaped.size} values are not.")
    return shaped


def _warn_beyond_precision(values: np.ndarray, kernel: KernelResult, ridge: float, time: float | None) -> None:
    """Say so where the inverse on the range is rounding."""
    limit = condition_limit(kernel.dtype, kernel.computed_in)
    if time is None and len(values) and values[-1] + ridge > limit * (values[0] + ridge):
        of = f"{kernel.dtype} kernel" if kernel.computed_in is None else f"kernel of {kernel.computed_in} derivatives"
        warn(
            f"the prediction rests on eigenvalues down to {values[0]:.3g} of a {of} whose largest is "
            f"{values[-1]:.3g}, which are at the floor of its precision. Compute the kernels with dtype=torch.float64, "
            "or give a ridge.",
            PrecisionFloorWarning,
            stacklevel=3,
        )
