"""Kernels of neural networks: empirical in PyTorch, analytic in JAX (behind ntk.analytic, loaded on first use)."""

import importlib
from types import ModuleType

from ntk.drift import NtkDrift, NtkTracker
from ntk.eigenvalues import spectrum
from ntk.empirical import empirical_ntk, layerwise_ntk
from ntk.estimators import Estimate, SpectralDensity, estimate_trace, spectral_density
from ntk.linearized import LinearizedModel, linearize
from ntk.nngp import empirical_nngp
from ntk.operator import NtkOperator
from ntk.planning import Plan, plan
from ntk.projection import center_rows
from ntk.regression import Prediction, predict
from ntk.results import KernelResult
from ntk.spectrum import Spectrum
from ntk.state import preserve_state
from ntk.width_study import Slope, WidthStudy, width_study

__all__ = [
    "Estimate",
    "KernelResult",
    "LinearizedModel",
    "NtkDrift",
    "NtkOperator",
    "NtkTracker",
    "Plan",
    "Prediction",
    "Slope",
    "SpectralDensity",
    "Spectrum",
    "WidthStudy",
    "center_rows",
    "empirical_nngp",
    "empirical_ntk",
    "estimate_trace",
    "layerwise_ntk",
    "linearize",
    "plan",
    "predict",
    "preserve_state",
    "spectral_density",
    "spectrum",
    "width_study",
]


def __getattr__(name: str) -> ModuleType:
    """Load `ntk.analytic`, and with it JAX, when it is first asked for.

    Args:
        name: Attribute that is not there.

    Raises:
        AttributeError: It is not "analytic".
    """
    if name == "analytic":
        return importlib.import_module("ntk.analytic")
    raise AttributeError(f"module 'ntk' has no attribute {name!r}; it exports {', '.join([*__all__, 'analytic'])}.")
