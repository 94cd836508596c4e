"""Training as the kernel predicts it: gradient flow and gradient descent on the squared error.

A network that is linear in its weights trains in the eigenbasis of its tangent kernel, each mode by itself; an
infinitely wide network is one (Jacot et al. 2018; Lee et al. 2019, arXiv 1902.06720). docs/mathematics.md §6.2, §6.3.
"""

from dataclasses import dataclass
from functools import cached_property
from warnings import warn

import numpy as np
from numpy.typing import ArrayLike

from ntk.analytic.gram import rounding
from ntk.analytic.precision import Array, read_only
from ntk.analytic.tangent import by_output, require_kernel, require_outputs, require_shape
from ntk.analytic.trajectory import Trajectory
from ntk.errors import PrecisionFloorWarning
from ntk.spectrum import condition_limit

_DRAWN_MODES = 5
_EXPONENTIAL_FORM = 0.5  # below this step times rate, 1 − (1 − ηλ)^k is formed without the subtraction


@dataclass(frozen=True, eq=False, repr=False)
class TrainingDynamics:
    """Training under a kernel that stays as it is, from given outputs towards given targets.

    The loss is ½ Σ (f − y)², over examples and outputs, or with ``averaged`` that divided by the number m of examples.
    Outputs do not interact. Eigenvalues within rounding of zero are taken as zero: along these directions the outputs
    stay what they are.

    Attributes:
        eigenvalues: Of Θ, descending, as they came out [m]; [C, m] where each output has a kernel of its own.
        eigenvectors: Column k is u_k [m, m] or [C, m, m].
        targets: y [m] or [m, C].
        initial: Outputs f at the start, of the same shape.
        averaged: Whether the loss is divided by m.
        relative_rounding: Relative rounding of the kernel; m times it, of the largest eigenvalue, is the floor below
            which an eigenvalue is zero.
        test_ntk: Θ between test and training points [t, m] or [C, t, m]; None without test points.
        test_initial: Outputs on the test points at the start [t] or [t, C]; None without test points.
    """

    eigenvalues: Array
    eigenvectors: Array
    targets: Array
    initial: Array
    averaged: bool
    relative_rounding: float
    test_ntk: Array | None = None
    test_initial: Array | None = None

    def __post_init__(self) -> None:
        """Make every array a read-only float64 copy."""
        for name in ("eigenvalues", "eigenvectors", "targets", "initial", "test_ntk", "test_initial"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, read_only(getattr(self, name)))

    @property
    def n_examples(self) -> int:
        """Number m of training examples."""
        return len(self.targets)

    @cached_property
    def rates(self) -> Array:
        """Rate of decay of each mode under gradient flow, [m] or [C, m]: λ, or λ/m if averaged; 0 within rounding."""
        floor = self.n_examples * self.relative_rounding * self.eigenvalues[..., :1]
        return read_only(np.where(self.eigenvalues > floor, self.eigenvalues, 0) / self._scale)

    @property
    def rank(self) -> int:
        """Number of modes that train; over all outputs where each has a kernel of its own."""
        return int(np.count_nonzero(self.rates))

    @property
    def condition_number(self) -> float:
        """κ = largest over smallest rate of the modes that train."""
        return float(self.rates.max() / self.rates[self.rates > 0].min())

    @property
    def largest_stable_learning_rate(self) -> float:
        """2/λmax, times m if averaged: gradient descent decays below it and grows above it, in the leading mode."""
        return float(2 / self.rates.max())

    @property
    def best_learning_rate(self) -> float:
        """2/(λmax + λmin), times m if averaged: the step at which the slowest of the modes that train is fastest."""
        return float(2 / (self.rates.max() + self.rates[self.rates > 0].min()))

    @property
    def convergence_factor(self) -> float:
        """(κ − 1)/(κ + 1): what one step of the best learning rate leaves of the slowest mode that trains."""
        return (self.condition_number - 1) / (self.condition_number + 1)

    def gradient_flow(self, time: ArrayLike) -> Trajectory:
        """Predict the outputs under gradient flow, df/dt = −Θ(f − y).

        Args:
            time: One time, or several [n]; not negative, infinity included.

        Returns:
            Outputs at these times; mode k has decayed by exp(−rate_k t).

        Raises:
            ValueError: If a time is negative or NaN, or there is more than one axis of times.
        """
        times = np.asarray(time, dtype=np.float64)
        if times.ndim > 1 or times.size == 0 or not np.all(times >= 0):
            raise ValueError(
                f"time: must be one non-negative number or a list of them; received {time!r}. Count the time from "
                "the start of training, and pass np.inf for its end."
            )
        rates, grid = self.rates[..., None], np.atleast_1d(times)
        active = rates > 0
        exponent = np.where(active, -rates, -1.0) * grid
        decay = np.where(active, np.exp(exponent), 1.0)
        # Where nothing decays, test points move linearly in time; at its end they count for nothing (rank deficiency).
        idle = np.where(np.isfinite(grid), grid, 0.0)
        reach = np.where(active, -np.expm1(exponent) / np.where(active, rates, 1.0), idle)
        return self._trajectory(times, None, decay, reach)

    def gradient_descent(self, steps: ArrayLike, learning_rate: float) -> Trajectory:
        """Predict the outputs under gradient descent, f ← f − ηΘ(f − y).

        Args:
            steps: One number of steps, or several [n]; non-negative integers.
            learning_rate: Step size η; above ``largest_stable_learning_rate`` the prediction grows.

        Returns:
            Outputs after these steps; mode k has been multiplied by (1 − η rate_k)^steps.

        Raises:
            ValueError: If steps are not non-negative integers, the learning rate is not positive, or the outputs
                overflow.
        """
        counts = np.asarray(steps)
        if counts.ndim > 1 or counts.size == 0 or counts.dtype.kind not in "iu" or counts.min() < 0:
            raise ValueError(
                f"steps: must be one non-negative integer or a list of them; received {steps!r}. Pass the number of "
                "steps taken, such as np.arange(101)."
            )
        if not 0 < learning_rate < np.inf:
            raise ValueError(
                f"learning_rate: must be positive and finite; received {learning_rate!r}. Stable ones lie below "
                f"{self.largest_stable_learning_rate:.6g}."
            )
        rates, grid = self.rates[..., None], np.atleast_1d(counts)
        step = learning_rate * rates
        gentle = np.minimum(step, _EXPONENTIAL_FORM)
        with np.errstate(over="ignore"):
            decay = (1 - step) ** grid
            representable = np.all(np.isfinite(decay**2))
        if not representable:
            raise ValueError(
                f"learning_rate: must keep the outputs within float64 over {counts.max()} steps; received "
                f"{learning_rate!r}, {learning_rate / self.largest_stable_learning_rate:.4g} times the largest stable "
                "one. Lower it, or take fewer steps."
            )
        lost = np.where(step < _EXPONENTIAL_FORM, -np.expm1(grid * np.log1p(-gentle)), 1 - decay)
        reach = np.where(rates > 0, lost / np.where(rates > 0, rates, 1.0), learning_rate * grid)
        return self._trajectory(counts, float(learning_rate), decay, reach)

    @cached_property
    def label_weights(self) -> Array:
        """Θ_*Θ⁻¹, what each label counts for in the trained prediction [t, m] or [C, t, m]; Θ⁺ if rank-deficient.

        Warns with `PrecisionFloorWarning` where the inverse is beyond the reach of the kernel's precision.

        Raises:
            ValueError: There are no test points.
        """
        self._warn_beyond_precision(np.inf)
        active = self.rates > 0
        inverse = np.where(active, 1 / np.where(active, self.rates, 1.0), 0.0)
        return read_only((self._overlaps * inverse[..., None, :]) @ np.swapaxes(self.eigenvectors, -1, -2))

    def mean_predictor(self) -> Array:
        """Return Θ_*Θ⁻¹y, the trained prediction averaged over initializations of mean zero, [t] or [t, C].

        A given start is followed to its end by ``gradient_flow(np.inf)``.

        Raises:
            ValueError: There are no test points.
        """
        values = self.label_weights @ by_output(self.targets)[..., None]
        return self._arranged(values, several=False)

    @property
    def _scale(self) -> float:
        return float(self.n_examples) if self.averaged else 1.0

    @cached_property
    def _coefficients(self) -> Array:
        """⟨u_k, f − y⟩ at the start, [C, m]."""
        residual = by_output(self.initial) - by_output(self.targets)
        return (np.swapaxes(self.eigenvectors, -1, -2) @ residual[..., None])[..., 0]

    @cached_property
    def _overlaps(self) -> Array:
        """Θ_* u_k in units of the rates, [t, m] or [C, t, m]; exactly 0 where it is so but for rounding.

        Along a null direction of Θ a covariance has no overlap. The computed one errs by the eigenvector's error, of
        order κ times the rounding as long as the null space stands apart from the range.

        Raises:
            ValueError: There are no test points.
        """
        if self.test_ntk is None:
            raise ValueError(
                "test_ntk: required to predict test points; received None. Pass the kernel between test and training "
                "points [t, m] to training_dynamics."
            )
        overlaps = self.test_ntk @ self.eigenvectors / self._scale
        kappa = self.condition_number
        spread = kappa if kappa < self.relative_rounding**-0.5 else 1.0
        noise = 8 * self.n_examples * self.relative_rounding * spread * np.abs(self.test_ntk).max() / self._scale
        null = (self.rates == 0)[..., None, :]
        return np.where(null & (np.abs(overlaps) <= noise), 0.0, overlaps)

    def _warn_beyond_precision(self, time: float) -> None:
        """Warn where a test prediction depends on eigenvalues that the kernel's precision does not resolve."""
        largest = self.rates.max(axis=-1, keepdims=True)
        limit = condition_limit(np.float64) * float(np.finfo(np.float64).eps) / self.relative_rounding
        weak = (self.rates * limit < largest)[..., None, :] & (self._overlaps != 0)
        if np.any(weak) and time * float(largest.max()) > limit:
            count = int(np.any(weak, axis=-2).sum())
            warn(
                f"test predictions at time {time:.3g} depend on {count} eigenvalues of the kernel below 1/{limit:.2g} "
                "of the largest, which are at the floor of its precision. Train for a shorter time, remove training "
                "points that nearly coincide, or compute the kernel in float64.",
                PrecisionFloorWarning,
                stacklevel=4,
            )

    def _trajectory(self, grid: Array, learning_rate: float | None, decay: Array, reach: Array) -> Trajectory:
        """Build the outputs from what is left of each mode and how far test points have come, [m, n] or [C, m, n]."""
        several = grid.ndim == 1
        residuals = self._coefficients[..., None] * decay
        train = by_output(self.targets)[..., None] + self.eigenvectors @ residuals
        test = None
        if self.test_initial is not None:
            self._warn_beyond_precision(float(grid.max()) * (learning_rate or 1.0))
            moved = self._overlaps @ (self._coefficients[..., None] * reach)
            test = self._arranged(by_output(self.test_initial)[..., None] - moved, several=several)
        loss = (residuals**2).sum(axis=(0, 1)) / (2 * self._scale)
        return Trajectory(
            grid=grid,
            learning_rate=learning_rate,
            train=self._arranged(train, several=several),
            test=test,
            mode_residuals=self._arranged(residuals, several=several),
            loss=loss if several else loss[0],
        )

    def _arranged(self, values: Array, *, several: bool) -> Array:
        """Bring [C, points, n] into [n, points, C], without the axes that were not given."""
        moved = np.transpose(values, (2, 1, 0))
        moved = moved if self.targets.ndim == 2 else moved[..., 0]
        return moved if several else moved[0]

    def summary(self) -> str:
        """The figures in one line."""
        outputs = "one output" if self.targets.ndim == 1 else f"{self.targets.shape[1]} outputs"
        loss = "½ Σ (f − y)²" + (f" / {self.n_examples}" if self.averaged else "")
        return (
            f"{self.n_examples} examples, {outputs}, loss {loss}; {self.rank} of {self.rates.size} modes train, "
            f"condition number {self.condition_number:.6g}; "
            f"largest stable learning rate {self.largest_stable_learning_rate:.6g}"
        )

    def __repr__(self) -> str:
        """The figures in one line."""
        return f"TrainingDynamics({self.summary()})"

    def _repr_html_(self) -> str:
        """Drawing of the decay of the leading modes under gradient flow, with the figures."""
        leading = np.sort(self.rates[self.rates > 0])[::-1][:_DRAWN_MODES]
        return self.gradient_flow(np.linspace(0, 5 / leading[-1], 101)).draw(_DRAWN_MODES, self.summary())


def training_dynamics(
    ntk: ArrayLike,
    targets: ArrayLike,
    *,
    initial: ArrayLike | None = None,
    test_ntk: ArrayLike | None = None,
    test_initial: ArrayLike | None = None,
    averaged: bool = False,
) -> TrainingDynamics:
    """Predict training on the squared error from the kernel (docs/mathematics.md §6.2).

    Args:
        ntk: Θ over the training points [m, m], the same for all outputs, such as `AnalyticKernels.ntk` or a
            `KernelResult` reduced over outputs; or [C, m, m], one per output. A full kernel [m, m, C, C] goes in as
            ``kernel.flatten()`` with ``targets.ravel()``.
        targets: y [m] or [m, C].
        initial: Outputs f at the start, of the same shape; None for zero, which gives the average over
            initializations.
        test_ntk: Θ between test and training points [t, m] or [C, t, m]; None for no test points.
        test_initial: Outputs on the test points at the start [t] or [t, C]; None for zero.
        averaged: Whether the loss ½ Σ (f − y)² is divided by the number of examples m.

    Returns:
        The dynamics, ready to be asked for outputs at any time.

    Raises:
        ValueError: If the shapes do not fit, a value is not finite, or the kernel is not positive semi-definite.
    """
    kernel, relative = require_kernel(ntk), rounding(ntk)
    m = kernel.shape[-1]
    labels = require_outputs("targets", targets, m)
    if kernel.ndim == 3 and labels.shape[1:] != kernel.shape[:1]:
        raise ValueError(
            f"targets: must be [m, C] with one column for each of the {len(kernel)} kernels; received shape "
            f"{labels.shape}. Pass one kernel [m, m] if it serves all outputs."
        )
    start = np.zeros_like(labels) if initial is None else require_shape("initial", initial, labels.shape)
    if test_ntk is None and test_initial is not None:
        raise ValueError(
            "test_initial: requires test_ntk, the kernel between test and training points [t, m]. Pass it too."
        )
    cross = first = None
    if test_ntk is not None:
        shape = (*kernel.shape[:-2], np.shape(test_ntk)[-2] if np.ndim(test_ntk) > 1 else "t", m)
        cross = require_shape("test_ntk", test_ntk, shape)
        outputs = (cross.shape[-2], *labels.shape[1:])
        if test_initial is None and initial is not None:
            raise ValueError(
                "test_initial: required along with initial and test_ntk, as the test points start from the outputs of "
                f"the same network; received None. Pass them, of shape {outputs}."
            )
        first = np.zeros(outputs) if test_initial is None else require_shape("test_initial", test_initial, outputs)
    values, vectors = np.linalg.eigh(kernel)
    return TrainingDynamics(
        eigenvalues=values[..., ::-1],
        eigenvectors=vectors[..., ::-1],
        targets=labels,
        initial=start,
        averaged=averaged,
        relative_rounding=relative,
        test_ntk=cross,
        test_initial=first,
    )
