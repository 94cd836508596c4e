"""One phenomenon per file."""

from diagnostics.probes.base import Probe
from diagnostics.probes.chaos import GradientGrowth, TransitionOperator
from diagnostics.probes.correlation import Correlation
from diagnostics.probes.kernel import KernelEntries, KernelSpectrum
from diagnostics.probes.last_batch_norm import RateStability, ScaleInvariance, Sharpness
from diagnostics.probes.learning_rate import LearningRateRange
from diagnostics.probes.memory import ActivationMemory
from diagnostics.probes.registry import PROBES
from diagnostics.probes.weight_projection import ProjectionEquivalence
from diagnostics.probes.whitening import Whitening

__all__ = [
    "PROBES",
    "ActivationMemory",
    "Correlation",
    "GradientGrowth",
    "KernelEntries",
    "KernelSpectrum",
    "LearningRateRange",
    "Probe",
    "ProjectionEquivalence",
    "RateStability",
    "ScaleInvariance",
    "Sharpness",
    "TransitionOperator",
    "Whitening",
]
