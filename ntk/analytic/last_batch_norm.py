"""The tangent kernel behind a last BatchNorm, linearized at the present outputs: docs/mathematics.md §7.3."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from ntk.analytic.dynamics import TrainingDynamics, training_dynamics
from ntk.analytic.gram import rounding
from ntk.analytic.precision import Array, read_only
from ntk.analytic.tangent import by_output, require_kernel, require_outputs, require_shape

_SMALLEST_BATCH = 3


@dataclass(frozen=True, eq=False)
class NormalizedKernel:
    """The kernel Θ̂ = JΘJᵀ of the normalized outputs ẑ of one batch, one kernel per output.

    J = (I − 11ᵀ/m − ẑẑᵀ/m)/√(σ² + ε) is the Jacobian of BatchNorm in train mode, without affine parameters, over the
    m rows. The axis C is missing where outputs [m] were given. Outputs do not interact, as at infinite width.

    Attributes:
        ntk: Θ̂ [C, m, m].
        outputs: ẑ [m, C].
        deviation: √(σ² + ε) of each output [C], σ² the biased variance over the batch.
        epsilon: ε.
        test_ntk: Between test points, normalized by the statistics of the batch, and the batch [C, t, m]; or None.
        test_outputs: Outputs of the test points, normalized by the statistics of the batch [t, C]; or None.
        relative_rounding: Rounding of the entries of Θ̂, relative to its largest eigenvalue: that of the dtype of Θ, of
            whose largest eigenvalue BatchNorm may have taken most.
    """

    ntk: Array
    outputs: Array
    deviation: Array
    epsilon: float
    test_ntk: Array | None = None
    test_outputs: Array | None = None
    relative_rounding: float = float(np.finfo(np.float64).eps)

    def __post_init__(self) -> None:
        """Make every array a read-only float64 copy."""
        for name in ("ntk", "outputs", "deviation", "test_ntk", "test_outputs"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, read_only(getattr(self, name)))

    @property
    def null_directions(self) -> Array:
        """Orthonormal directions in which the outputs cannot move: 1, and ẑ if ε = 0; [C, m, 2], or [C, m, 1]."""
        directions = _null_directions(by_output(self.outputs), self.epsilon)
        return directions if self.outputs.ndim == 2 else directions[0]

    @property
    def sharpness(self) -> Array:
        """λmax(Θ̂) of each output [C]: the sharpness of ½ Σ (ẑ − y)² but for the curvature of ẑ itself."""
        return read_only(np.linalg.eigvalsh(self.ntk)[..., -1])

    @property
    def largest_stable_learning_rate(self) -> float:
        """2/λmax(Θ̂) over all outputs, for the loss ½ Σ (ẑ − y)² linearized at the present outputs."""
        return float(2 / self.sharpness.max())

    def dynamics(self, targets: ArrayLike, *, averaged: bool = False) -> TrainingDynamics:
        """Predict training of the normalized outputs, linearized at the present ones.

        Args:
            targets: For ẑ, [m] or [m, C] as the outputs.
            averaged: Whether the loss ½ Σ (ẑ − y)² is divided by m.

        Returns:
            The dynamics; the null directions do not train.

        Raises:
            ValueError: If the targets do not have the shape of the outputs, or are not finite.
        """
        dynamics = training_dynamics(
            self.ntk,
            require_shape("targets", targets, self.outputs.shape),
            initial=self.outputs,
            test_ntk=self.test_ntk,
            test_initial=self.test_outputs,
            averaged=averaged,
        )
        return replace(dynamics, relative_rounding=max(dynamics.relative_rounding, self.relative_rounding))


def normalized_ntk(
    ntk: ArrayLike,
    outputs: ArrayLike,
    epsilon: float = 0.0,
    *,
    test_ntk: ArrayLike | None = None,
    test_outputs: ArrayLike | None = None,
) -> NormalizedKernel:
    """Put a last BatchNorm behind a network whose kernel and outputs are known.

    Args:
        ntk: Θ of the outputs before BatchNorm, over one batch [m, m], the same for all outputs; or [C, m, m].
        outputs: The outputs before BatchNorm [m] or [m, C]; at initialization a draw from N(0, K), K the NNGP kernel.
        epsilon: ε, not negative; PyTorch's default is 1e-5.
        test_ntk: Θ between test points and the batch [t, m] or [C, t, m]; None for no test points.
        test_outputs: Outputs of the test points before BatchNorm [t] or [t, C]; None for no test points.

    Returns:
        The kernel of the normalized outputs.

    Raises:
        ValueError: If the batch is too small, an output is constant over it, or shapes do not fit.
    """
    kernel = require_kernel(ntk)
    m = kernel.shape[-1]
    if m < _SMALLEST_BATCH:
        raise ValueError(
            f"ntk: must cover a batch of at least {_SMALLEST_BATCH} under a last BatchNorm; received {m}. The two "
            "directions 1 and ẑ are lost, so at B = 2 the gradient is exactly zero and nothing trains. Use more rows."
        )
    if not 0 <= epsilon < np.inf:
        raise ValueError(f"epsilon: must be finite and not negative; received {epsilon!r}. PyTorch's default is 1e-5.")
    logits = require_outputs("outputs", outputs, m)
    if kernel.ndim == 3 and logits.shape[1:] != kernel.shape[:1]:
        raise ValueError(
            f"outputs: must be [m, C] with one column for each of the {len(kernel)} kernels; received shape "
            f"{logits.shape}. Pass one kernel [m, m] if it serves all outputs."
        )
    batch = _Batch.of(by_output(logits), epsilon)
    values, vectors = np.linalg.eigh(kernel)
    root = vectors * np.sqrt(np.clip(values, 0, None))[..., None, :]
    # Θ̂ as a square stays semi-definite; the null directions, in which a large eigenvalue of Θ would leave its
    # rounding, are taken out once more.
    factor = batch.without_null(batch.jacobian(root))
    squared = factor @ np.swapaxes(factor, -1, -2)
    cross = first = None
    if test_ntk is not None or test_outputs is not None:
        cross, first = _test_points(kernel, logits, test_ntk, test_outputs, batch)
    # Rounding is relative to Θ, and Θ̂ may be small against it.
    scale = values[..., -1] / batch.deviation[:, 0] ** 2 / np.linalg.eigvalsh(squared)[..., -1]
    single = logits.ndim == 1
    return NormalizedKernel(
        ntk=squared[0] if single else squared,
        outputs=batch.normalized[0] if single else batch.normalized.T,
        deviation=batch.deviation[0, 0] if single else batch.deviation[:, 0],
        epsilon=float(epsilon),
        test_ntk=cross,
        test_outputs=first,
        relative_rounding=rounding(ntk) * max(1.0, float(np.max(scale))),
    )


@dataclass(frozen=True, eq=False)
class _Batch:
    """Statistics of one batch, one row per output.

    Attributes:
        mean: μ [C, 1].
        deviation: √(σ² + ε) [C, 1].
        normalized: ẑ [C, m].
        null: Orthonormal directions that J maps to zero [C, m, 2], or [C, m, 1] under a positive ε.
    """

    mean: Array
    deviation: Array
    normalized: Array
    null: Array

    @staticmethod
    def of(columns: Array, epsilon: float) -> "_Batch":
        """Take the statistics of outputs [C, m].

        Raises:
            ValueError: If an output is constant over the batch and there is no ε.
        """
        mean, variance = columns.mean(axis=1, keepdims=True), columns.var(axis=1, keepdims=True)
        noise = (8 * np.finfo(np.float64).eps * np.abs(columns).max(axis=1, keepdims=True)) ** 2
        constant = np.flatnonzero(variance + epsilon <= noise)
        if constant.size:
            raise ValueError(
                f"outputs: must vary over the batch, as BatchNorm divides by their deviation; column {constant[0]} is "
                "constant. Remove that output, or pass a positive epsilon."
            )
        deviation = np.sqrt(variance + epsilon)
        normalized = (columns - mean) / deviation
        return _Batch(mean, deviation, normalized, _null_directions(normalized, epsilon))

    def jacobian(self, values: Array) -> Array:
        """Return J times ``values`` [m, k] or [C, m, k], for each output: [C, m, k]."""
        centred = values - values.mean(axis=-2, keepdims=True)
        along = self.normalized[:, None, :] @ centred / self.normalized.shape[1]
        return (centred - self.normalized[:, :, None] * along) / self.deviation[..., None]

    def without_null(self, values: Array) -> Array:
        """Return ``values`` [C, m, k] without their parts along the null directions."""
        return values - self.null @ (_transposed(self.null) @ values)


def _null_directions(normalized: Array, epsilon: float) -> Array:
    """Return 1, and ẑ if ε = 0, orthonormal: [C, m, 2], or [C, m, 1] under a positive ε, for ẑ [C, m]."""
    constant = np.full_like(normalized, normalized.shape[1] ** -0.5)
    if epsilon > 0:
        return constant[..., None]
    return np.stack([constant, normalized / np.linalg.norm(normalized, axis=1, keepdims=True)], axis=-1)


def _transposed(values: Array) -> Array:
    return np.swapaxes(values, -1, -2)


def _test_points(
    kernel: Array, logits: Array, test_ntk: ArrayLike | None, test_outputs: ArrayLike | None, batch: _Batch
) -> tuple[Array, Array]:
    """Return Θ̂ between test points and batch, [C, t, m] or [t, m], and the normalized test outputs.

    Raises:
        ValueError: If only one of the two was given, or a shape does not fit.
    """
    if test_ntk is None or test_outputs is None:
        missing = "test_outputs" if test_outputs is None else "test_ntk"
        raise ValueError(
            f"{missing}: required along with the other of test_ntk and test_outputs, as test points need both a kernel "
            "with the batch and outputs to be normalized; received None. Pass both or neither."
        )
    t = len(np.atleast_1d(test_outputs))
    first = by_output(require_shape("test_outputs", test_outputs, (t, *logits.shape[1:])))
    cross = require_shape("test_ntk", test_ntk, (*kernel.shape[:-2], t, kernel.shape[-1]))
    first = (first - batch.mean) / batch.deviation
    own, other = _transposed(batch.jacobian(kernel)), _transposed(batch.jacobian(_transposed(cross)))  # ΘJᵀ, Θ_*Jᵀ
    through_mean = own.mean(axis=-2, keepdims=True)
    through_deviation = first[:, :, None] * (batch.normalized[:, None, :] @ own / kernel.shape[-1])
    moved = (other - through_mean - through_deviation) / batch.deviation[..., None]
    moved = _transposed(batch.without_null(_transposed(moved)))
    return (moved, first.T) if logits.ndim == 2 else (moved[0], first[0])
