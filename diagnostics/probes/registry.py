"""All probes by name."""

from diagnostics.probes.base import Probe
from diagnostics.probes.chaos import GradientGrowth, TransitionOperator
from diagnostics.probes.correlation import Correlation
from diagnostics.probes.kernel import KernelEntries, KernelSpectrum
from diagnostics.probes.last_batch_norm import RateStability, ScaleInvariance, Sharpness
from diagnostics.probes.learning_rate import LearningRateRange
from diagnostics.probes.memory import ActivationMemory
from diagnostics.probes.weight_projection import ProjectionEquivalence
from diagnostics.probes.whitening import Whitening

PROBES: dict[str, Probe] = {
    probe.name: probe
    for probe in (
        Correlation(),
        Whitening(),
        TransitionOperator(),
        GradientGrowth(),
        KernelEntries(),
        KernelSpectrum(),
        ScaleInvariance(),
        Sharpness(),
        RateStability(),
        LearningRateRange(),
        ActivationMemory(),
        ProjectionEquivalence(),
    )
}
"""Name to probe, with the settings that a first look needs."""
