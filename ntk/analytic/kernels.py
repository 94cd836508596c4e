"""The result of a propagation: kernels at every depth, with the conventions under which they hold."""

import math
from dataclasses import dataclass, field

import numpy as np

from ntk.analytic.precision import Array, read_only
from ntk.display import html_figure, kernel_svg


@dataclass(frozen=True, eq=False)
class AnalyticKernels:
    """NNGP and NTK of an infinitely wide network, and what they assume.

    Attributes:
        nngp: Pre-activation covariance K at the last depth [n, n].
        ntk: Tangent kernel Θ of one output at the last depth [n, n].
        depth: Number of activations D; the network has D + 1 linear layers.
        norm: "none", "weight_mean" or "batch_norm".
        activation: Name of the activation.
        sigma_w2: Weight variance σw² of the layers after the first, whose gain is one.
        sigma_b2: Bias variance of these layers.
        parametrization: "ntk" or "standard".
        projected: Whether the NTK is that of training in the subspace that the norm allows (docs/mathematics.md
            §4.3).
        n_statistics: Number of leading rows whose batch statistics are used; None without batch norm.
        statistics: "differentiated", "mean_differentiated" or "constant"; None without batch norm.
        nngp_by_depth: K at depths 0 … D [D + 1, n, n]; at D alone [1, n, n] unless every depth was kept.
        ntk_by_depth: Θ at depths 0 … D [D + 1, n, n]; at D alone [1, n, n] unless every depth was kept.
        mean_correction: Whether weight mean is over finitely many units, (n − 1)/n per layer (docs/mathematics.md
            §4.4).
        affine: Whether the NTK includes batch norm's gain and shift.
        population: Whether the rows of batch norm stand for an infinitely large batch.
        batch_sizes: Sizes of the batches that the rows are, one after the other, where they are several.
    """

    nngp: Array = field(repr=False)
    ntk: Array = field(repr=False)
    depth: int
    norm: str
    activation: str
    sigma_w2: float
    sigma_b2: float
    parametrization: str
    projected: bool
    n_statistics: int | None
    statistics: str | None
    nngp_by_depth: Array = field(repr=False)
    ntk_by_depth: Array = field(repr=False)
    mean_correction: bool = False
    affine: bool = False
    population: bool = False
    batch_sizes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Make every array a read-only float64 copy."""
        for name in ("nngp", "ntk", "nngp_by_depth", "ntk_by_depth"):
            object.__setattr__(self, name, read_only(getattr(self, name)))

    @property
    def condition_number(self) -> float:
        """κ of the NTK at the last depth; infinite if it is singular."""
        return _condition_number(self.ntk)

    @property
    def condition_number_by_depth(self) -> Array:
        """κ of the NTK at each depth kept; infinite where it is singular."""
        return np.array([_condition_number(ntk) for ntk in self.ntk_by_depth])

    def describe(self) -> str:
        """The convention in one line."""
        parts = [
            f"depth {self.depth}, norm {self.norm!r}, {self.activation}, σw² = {self.sigma_w2:.6g}, "
            f"σb² = {self.sigma_b2:.6g}, {self.parametrization} parametrization"
        ]
        if self.norm == "weight_mean":
            parts.append("projected" if self.projected else "raw weights")
        if self.statistics is not None:
            rows = "two batches" if self.batch_sizes else f"batch of {self.n_statistics}"
            parts.append(f"{'population' if self.population else rows}, statistics {self.statistics}")
        parts += [name for name in ("affine", "mean_correction") if getattr(self, name)]
        return ", ".join(parts)

    def _repr_html_(self) -> str:
        """Both kernels as heat maps, with their convention."""
        return html_figure(kernel_svg(self.nngp), f"NNGP kernel: {self.describe()}") + html_figure(
            kernel_svg(self.ntk), f"NTK of one output: {self.describe()}"
        )


def _condition_number(kernel: Array) -> float:
    """Largest over smallest eigenvalue; infinite where the smallest is within rounding of zero."""
    values = np.linalg.eigvalsh(kernel)
    floor = len(values) * np.finfo(np.float64).eps * values[-1]
    return float(values[-1] / values[0]) if values[0] > floor else math.inf
