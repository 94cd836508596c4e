"""Networks of infinite width: exact kernels, maps and predictions, and the only door to JAX and neural-tangents.

All is double precision whatever the global flag says, but for the networks and layers of neural-tangents, which compute
in the precision that JAX is set to: ``with jax.enable_x64(True)`` for the same. Under ``jax.jit`` their kernel
functions compile once.

Nothing here imports neural-tangents but :mod:`ntk.analytic.compat` and what asks for it: the layers, the networks made
of them, and the bridge from PyTorch, which are loaded when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ntk.analytic.activations import DualActivation, dual_activation, leaky_relu, polynomial, sine
from ntk.analytic.constant_correlation import ConstantCorrelation
from ntk.analytic.dynamics import TrainingDynamics, training_dynamics
from ntk.analytic.fixed_point import BatchNormFixedPoint, batch_norm_fixed_point, gradient_growth
from ntk.analytic.kernels import AnalyticKernels
from ntk.analytic.last_batch_norm import NormalizedKernel, normalized_ntk
from ntk.analytic.maps import CorrelationMap, FixedPoint, correlation_map
from ntk.analytic.norms import stable_weight_variance
from ntk.analytic.phases import PhaseDiagram, phase_diagram
from ntk.analytic.propagation import propagate
from ntk.analytic.residual import ResidualKernels, propagate_residual
from ntk.analytic.trajectory import Trajectory
from ntk.analytic.two_batches import propagate_two_batches
from ntk.analytic.variance import VarianceFixedPoint, VarianceMap, variance_map

if TYPE_CHECKING:
    from ntk.analytic import layers
    from ntk.analytic.bridge import AnalyticNetwork, from_torch, missing_counterparts
    from ntk.analytic.networks import convolutional, fully_connected, pre_activation_resnet

__all__ = [
    "AnalyticKernels",
    "AnalyticNetwork",
    "BatchNormFixedPoint",
    "ConstantCorrelation",
    "CorrelationMap",
    "DualActivation",
    "FixedPoint",
    "NormalizedKernel",
    "PhaseDiagram",
    "ResidualKernels",
    "TrainingDynamics",
    "Trajectory",
    "VarianceFixedPoint",
    "VarianceMap",
    "batch_norm_fixed_point",
    "convolutional",
    "correlation_map",
    "dual_activation",
    "from_torch",
    "fully_connected",
    "gradient_growth",
    "layers",
    "leaky_relu",
    "missing_counterparts",
    "normalized_ntk",
    "phase_diagram",
    "polynomial",
    "pre_activation_resnet",
    "propagate",
    "propagate_residual",
    "propagate_two_batches",
    "sine",
    "stable_weight_variance",
    "training_dynamics",
    "variance_map",
]


def __getattr__(name: str) -> Any:
    """Load what needs neural-tangents when it is first asked for.

    Args:
        name: Attribute that is not there.

    Raises:
        AttributeError: There is none of that name.
    """
    match name:
        case "layers":
            return importlib.import_module("ntk.analytic.layers")
        case "convolutional" | "fully_connected" | "pre_activation_resnet":
            return getattr(importlib.import_module("ntk.analytic.networks"), name)
        case "AnalyticNetwork" | "from_torch" | "missing_counterparts":
            return getattr(importlib.import_module("ntk.analytic.bridge"), name)
    raise AttributeError(f"module 'ntk.analytic' has no attribute {name!r}; it exports {', '.join(__all__)}.")
