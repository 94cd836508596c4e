"""Kernels of infinitely wide networks in closed form, and the only door to JAX and neural-tangents.

Nothing here imports neural-tangents but :mod:`ntk.analytic.compat` and what asks for it.
"""

from ntk.analytic.activations import DualActivation, dual_activation
from ntk.analytic.fixed_point import BatchNormFixedPoint, batch_norm_fixed_point, gradient_growth
from ntk.analytic.kernels import AnalyticKernels
from ntk.analytic.maps import CorrelationMap, FixedPoint, correlation_map
from ntk.analytic.norms import stable_weight_variance
from ntk.analytic.propagation import propagate

__all__ = [
    "AnalyticKernels",
    "BatchNormFixedPoint",
    "CorrelationMap",
    "DualActivation",
    "FixedPoint",
    "batch_norm_fixed_point",
    "correlation_map",
    "dual_activation",
    "gradient_growth",
    "propagate",
    "stable_weight_variance",
]
