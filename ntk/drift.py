"""How the tangent kernel moves while a network trains, from any training loop."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ntk.display import figure_svg, html_figure
from ntk.eigenvalues import spectrum
from ntk.empirical import empirical_ntk
from ntk.outputs import OutputChoice
from ntk.parameters import ParameterChoice
from ntk.projection import Projection
from ntk.results import KernelResult

if TYPE_CHECKING:
    import xarray


@dataclass(frozen=True, eq=False, repr=False)
class NtkDrift:
    """The kernel Θ of one network on one batch at several times of its training.

    Alignments are <A, B> / (‖A‖ ‖B‖) in the Frobenius inner product, of centred matrices where `centred`: H A H with
    H = 1 − 11ᵀ/n over examples, for each pair of outputs. Source: C. Cortes, M. Mohri and A. Rostamizadeh, "Algorithms
    for learning kernels based on centered alignment", JMLR 13 (2012), section 2. Arrays are float64 and read-only.

    Attributes:
        steps: When Θ was measured [t].
        relative_change: ‖Θ_t − Θ_0‖ / ‖Θ_0‖ [t], not centred, with Θ_0 the first one.
        alignment: Between the kernels of two times [t, t]; NaN with a kernel that is zero.
        target_alignment: Between Θ and the kernel of the targets, y yᵀ [t]; None without targets.
        trace: Of Θ [t].
        largest: Eigenvalue of Θ [t]; gradient descent is stable up to a learning rate of 2 over it.
        centred: Whether alignments are those of centred matrices.
        source: Convention of the kernels in one line.
    """

    steps: np.ndarray
    relative_change: np.ndarray
    alignment: np.ndarray
    target_alignment: np.ndarray | None
    trace: np.ndarray
    largest: np.ndarray
    centred: bool
    source: str

    def __post_init__(self) -> None:
        """Make the arrays read-only copies."""
        for name in ("steps", "relative_change", "alignment", "target_alignment", "trace", "largest"):
            if getattr(self, name) is not None:
                array = np.array(getattr(self, name), dtype=np.float64)
                array.setflags(write=False)
                object.__setattr__(self, name, array)

    def summary(self) -> str:
        """The figures in one line."""
        if not len(self.steps):
            return "no kernel recorded yet"
        of = self.target_alignment
        targets = "" if of is None else f"; alignment with the targets {of[0]:.4g} to {of[-1]:.4g}"
        return (
            f"{len(self.steps)} kernels, step {self.steps[0]:.6g} to {self.steps[-1]:.6g}; relative change "
            f"{self.relative_change[-1]:.4g}; alignment of last with first {self.alignment[0, -1]:.6g}{targets}; "
            f"largest eigenvalue {self.largest[0]:.4g} to {self.largest[-1]:.4g}"
        )

    def to_dataset(self) -> "xarray.Dataset":
        """The measurements as an xarray dataset, their convention in the attributes."""
        import xarray

        names = ("relative_change", "target_alignment", "trace", "largest")
        variables: dict[str, Any] = {name: ("step", getattr(self, name)) for name in names}
        variables["alignment"] = (("step", "step_2"), self.alignment)
        return xarray.Dataset(
            {name: value for name, value in variables.items() if value[1] is not None},
            coords={"step": self.steps, "step_2": self.steps},
            attrs={"source": self.source, "centred": int(self.centred)},
        )

    def __repr__(self) -> str:
        """The figures in one line."""
        return f"NtkDrift({self.summary()})"

    def _repr_html_(self) -> str:
        """Change and alignments against the step, with the figures and the convention."""
        return html_figure(_svg(self), f"{self.summary()}. {self.source}")


class NtkTracker:
    """Measures the kernel of a network whenever it is told to.

        tracker = ntk.NtkTracker(model, x, targets=y)
        for step in range(steps):
            if step % 100 == 0:
                tracker.record(step)
            ...
        tracker.result

    A measurement leaves the model, its gradients and the random generators as they were. The matrices are kept, for the
    alignments between times.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        x: torch.Tensor,
        *,
        targets: Any = None,
        centred: bool = True,
        reduce: str = "trace",
        implementation: str = "auto",
        projection: Projection | Mapping[str, Projection] | None = None,
        params: ParameterChoice = None,
        max_memory: int | str | None = None,
        dtype: torch.dtype | None = None,
        batch_statistics: str = "batch",
        reference: torch.Tensor | None = None,
        output: OutputChoice = None,
    ) -> None:
        """Hold what to measure; nothing is measured yet.

        Args:
            model: The network that trains.
            x: [n, ...], copied.
            targets: y [n] or [n, o], floating-point: classes as one-hot rows. None for no alignment with them.
            centred: Whether alignments are those of centred matrices.
            reduce: As in `ntk.empirical_ntk`, and so are the arguments that follow.
            implementation: As there.
            projection: As there.
            params: As there.
            max_memory: As there.
            dtype: As there.
            batch_statistics: As there.
            reference: As there, copied.
            output: As there.

        Raises:
            ValueError: The targets are no floating-point numbers, one row an example, or all of them are alike.
        """
        self._model, self._x = model, x.detach().clone()
        self._targets = None if targets is None else _targets(targets, len(x), centred=centred)
        self._centred = centred
        self._settings: dict[str, Any] = {
            "reduce": reduce,
            "implementation": implementation,
            "projection": projection,
            "params": params if params is None or isinstance(params, str | Mapping) else list(params),
            "max_memory": max_memory,
            "dtype": dtype,
            "batch_statistics": batch_statistics,
            "reference": reference.detach().clone() if isinstance(reference, torch.Tensor) else reference,
            "output": output,
        }
        self._steps: list[float] = []
        self._kernels: list[KernelResult] = []

    def record(self, step: float) -> None:
        """Measure the kernel at the present weights.

        Args:
            step: When this is, in any unit; later than the last.

        Raises:
            ValueError: The step is not later than the last, or the targets do not fit the outputs.
            ConventionError: The network is in another mode, train or eval, than at first.
        """
        if self._steps and not step > self._steps[-1]:
            raise ValueError(f"step must be later than the last one recorded, {self._steps[-1]:g}; got {step}.")
        kernel = empirical_ntk(self._model, self._x, **self._settings)
        if self._kernels:
            _ = kernel - self._kernels[0]  # refuses another convention
        elif self._targets is not None and kernel.reduce == "none" and kernel.shape[2] != self._targets.shape[1]:
            raise ValueError(
                f"targets must have one column for each of the {kernel.shape[2]} outputs where reduce='none'; got "
                f"{self._targets.shape[1]}. Pass them as one-hot rows, or reduce='trace'."
            )
        self._kernels.append(kernel)
        self._steps.append(float(step))

    @property
    def result(self) -> NtkDrift:
        """What was recorded so far."""
        if not self._kernels:
            empty = np.empty(0)
            return NtkDrift(empty, empty, np.empty((0, 0)), None, empty, empty, self._centred, "")
        matrices = [kernel.flatten().astype(np.float64) for kernel in self._kernels]
        first = matrices[0]
        change = [np.linalg.norm(matrix - first) / np.linalg.norm(first) for matrix in matrices]
        n = len(self._x)
        compared = [_centre(matrix, n) if self._centred else matrix for matrix in matrices]
        units = np.stack([_unit(matrix) for matrix in compared])
        return NtkDrift(
            steps=np.array(self._steps),
            relative_change=np.array(change),
            alignment=units @ units.T,
            target_alignment=None if self._targets is None else units @ _unit(_target_kernel(self._targets, first)),
            trace=np.array([np.trace(matrix) for matrix in matrices]),
            largest=np.array([spectrum(kernel, k=1).eigenvalues[0] for kernel in self._kernels]),
            centred=self._centred,
            source=self._kernels[0].describe(),
        )


def _targets(values: Any, n: int, *, centred: bool) -> np.ndarray:
    """Targets [n, o] in float64, without their mean where `centred`.

    Raises:
        ValueError: They are no floating-point numbers, one row an example, or all of them are alike.
    """
    array = np.asarray(values.detach().cpu() if isinstance(values, torch.Tensor) else values)
    if array.dtype.kind != "f" or array.ndim not in (1, 2) or len(array) != n:
        raise ValueError(
            f"targets must be floating-point numbers [{n}] or [{n}, o], one row an example; got {array.dtype} of shape "
            f"{array.shape}. Classes go as torch.nn.functional.one_hot(y).double()."
        )
    array = array.reshape(n, -1).astype(np.float64)
    if centred:
        array = array - array.mean(0)
    if not np.abs(array).max() > 0:
        raise ValueError("targets must differ from each other (or from zero, with centred=False) for an alignment.")
    return array


def _target_kernel(targets: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Y Yᵀ over examples, or y yᵀ over all outputs of a full kernel, example-major."""
    rows = targets if len(kernel) == len(targets) else targets.reshape(-1, 1)
    return rows @ rows.T


def _centre(matrix: np.ndarray, n: int) -> np.ndarray:
    """H A H over examples, for each pair of outputs of an example-major matrix [n*o, n*o]."""
    values = matrix.reshape(n, len(matrix) // n, n, -1)
    values = values - values.mean(0, keepdims=True)
    return (values - values.mean(2, keepdims=True)).reshape(matrix.shape)


def _unit(matrix: np.ndarray) -> np.ndarray:
    """All entries in one row of norm 1, or NaN for a zero matrix."""
    norm = np.linalg.norm(matrix)
    return matrix.ravel() / norm if norm > 0 else np.full(matrix.size, np.nan)


def _svg(drift: NtkDrift) -> str:
    """Change and alignments against the step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 3.0), layout="constrained")
    axes = figure.subplots()
    if len(drift.steps):
        axes.plot(drift.steps, drift.relative_change, "o-", markersize=3, label="relative change")
        axes.plot(drift.steps, drift.alignment[0], "s-", markersize=3, label="alignment with the first")
        if drift.target_alignment is not None:
            axes.plot(drift.steps, drift.target_alignment, "^-", markersize=3, label="alignment with the targets")
        axes.legend(frameon=False)
    axes.set(xlabel="step", ylim=(0.0, None))
    return figure_svg(figure)
