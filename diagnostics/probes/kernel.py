"""The empirical kernels of a network: their entries, their conditioning, their spectrum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn

import ntk
from diagnostics.anatomy import check_network
from diagnostics.measurement import Measurement
from diagnostics.subject import Subject


def ntk_multipliers(network: nn.Module, projections: dict) -> dict[str, float]:
    """Per-parameter multipliers that turn the kernel of the stored weights into that of the NTK parametrization.

    A Gaussian weight is s·ω with ω standard normal, so that its kernel contribution is multiplied by s², its second
    moment; a projection takes one of n degrees of freedom per row, which the second moment is corrected for. Biases,
    scalars and affine parameters do not exist in that parametrization.

    Args:
        network: The network at initialization.
        projections: Parameter name to projection.

    Returns:
        Name of every weight to its multiplier.
    """
    multipliers = {}
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            fan_in = parameter[0].numel()
            lost = fan_in / (fan_in - 1) if name in projections else 1.0
            multipliers[name] = parameter.detach().double().square().mean().item() * lost
    return multipliers


@dataclass(frozen=True)
class KernelEntries:
    """Diagonal, off-diagonal and condition number of a network's kernel, and its largest eigenvalue.

    Attributes:
        kind: "ntk" or "nngp" (of the network's output).
        parametrization: "ntk" scales the contribution of every weight by its variance, "standard" takes it as stored.
        projected: Whether weights that a method trains in a subspace contribute J P Jᵀ or J Jᵀ.
    """

    kind: Literal["ntk", "nngp"] = "ntk"
    parametrization: Literal["ntk", "standard"] = "ntk"
    projected: bool = True

    @property
    def name(self) -> str:
        """Name in the registry."""
        return "kernel"

    def kernel(self, subject: Subject) -> ntk.KernelResult:
        """The kernel itself, averaged over outputs.

        Raises:
            UsageError: If the network or its inputs cannot be probed.
        """
        network = subject.network()
        check_network(network, subject.x)
        if self.kind == "nngp":
            return ntk.empirical_nngp(network, subject.x, dtype=torch.float64)
        projections = subject.projections(network)
        return ntk.empirical_ntk(
            network,
            subject.x,
            reduce="trace",
            projection=projections if self.projected and projections else None,
            params=ntk_multipliers(network, projections) if self.parametrization == "ntk" else None,
            dtype=torch.float64,
        )

    def measure(self, subject: Subject) -> Measurement:
        """Measures one network; axis statistic.

        Raises:
            UsageError: If the network or its inputs cannot be probed.
        """
        values = np.asarray(self.kernel(subject).values, dtype=np.float64)
        m = len(values)
        diagonal = np.trace(values) / m
        spectrum = ntk.spectrum(values)
        largest, smallest = float(spectrum.eigenvalues[0]), float(spectrum.eigenvalues[-1])
        statistics = {
            "diagonal": diagonal,
            "off_diagonal": (values.sum() - m * diagonal) / (m * (m - 1)),
            "condition_number": largest / smallest if smallest > spectrum.error_estimate else np.inf,
            "largest": largest,
        }
        return Measurement(
            probe=self.name,
            quantity=f"empirical {self.kind.upper()}: entries and conditioning",
            unit="1",
            estimate=np.array(list(statistics.values())),
            axes={"statistic": tuple(statistics)},
            seeds=(subject.seed,),
        )


@dataclass(frozen=True)
class KernelSpectrum:
    """Eigenvalues of a network's kernel relative to their mean, in descending order.

    Attributes:
        entries: Which kernel.
    """

    entries: KernelEntries = KernelEntries(parametrization="standard")

    @property
    def name(self) -> str:
        """Name in the registry."""
        return "spectrum"

    def measure(self, subject: Subject) -> Measurement:
        """Measures one network; axis rank, from 1.

        Raises:
            UsageError: If the network or its inputs cannot be probed.
        """
        eigenvalues = ntk.spectrum(self.entries.kernel(subject)).eigenvalues
        return Measurement(
            probe=self.name,
            quantity=f"eigenvalues of the empirical {self.entries.kind.upper()} over their mean",
            unit="1",
            estimate=eigenvalues / eigenvalues.mean(),
            axes={"rank": range(1, len(eigenvalues) + 1)},
            seeds=(subject.seed,),
        )


def constant_mode_ratio(diagonal: float, off_diagonal: float, m: int) -> float:
    """Eigenvalue of the constant mode over that of all others, of the kernel (p − o) I + o 1 1ᵀ.

    Args:
        diagonal: p.
        off_diagonal: o.
        m: Number of examples.
    """
    return (diagonal + (m - 1) * off_diagonal) / (diagonal - off_diagonal)


def exchangeable_condition_number(diagonal: float, off_diagonal: float, m: int) -> float:
    """Condition number of (p − o) I + o 1 1ᵀ, the kernel to which averaging over exchangeable examples leads.

    Args:
        diagonal: p.
        off_diagonal: o.
        m: Number of examples.
    """
    ratio = constant_mode_ratio(diagonal, off_diagonal, m)
    return max(ratio, 1 / ratio)
