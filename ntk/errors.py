"""Every way in which a kernel can be refused, by name.

All errors derive from `ValueError`, so that code which does not care for the distinction can catch that. Each message
names the parameter, what is admissible, what came, and the next step.
"""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches


class ConventionError(ValueError):
    """Two kernels of different conventions met, or a convention has no such conversion."""


class UnknownNameError(ValueError):
    """An option, parameter, layer or activation of that name does not exist."""

    def __init__(
        self, parameter: str, value: object, admissible: Iterable[str], next_step: str = "Choose one of them."
    ) -> None:
        """Write the message, with the nearest names that do exist.

        Args:
            parameter: Name of the argument that carried the value.
            value: What came.
            admissible: What would have been accepted.
            next_step: What to do instead, in a sentence.
        """
        known = list(admissible)
        near = get_close_matches(str(value), known, n=2, cutoff=0.4)
        hint = f" Nearest: {', '.join(map(repr, near))}." if near else ""
        shown = ", ".join(map(repr, known[:12])) + (f", and {len(known) - 12} more" if len(known) > 12 else "")
        super().__init__(
            f"{parameter}: must be one of {shown or 'none'}; received {value!r}.{hint} {next_step}".rstrip()
        )


class NoParametersError(ValueError):
    """No parameter is left to differentiate by, or the output depends on none of them."""


class NonFiniteWeightsError(ValueError):
    """A parameter or buffer of the model holds NaN or infinity."""


class NonFiniteKernelError(ValueError):
    """Outputs or kernel values are NaN or infinite although the weights are finite."""


class BatchOfOneError(ValueError):
    """A single example under batch statistics, where the normalized value is undefined or constant."""


class ActiveDropoutError(ValueError):
    """A dropout layer is in train mode, so the network is not a function of its weights and input."""


class NondeterministicModelError(ValueError):
    """The model gave two different outputs for the same weights, buffers and input."""


class WrappedModelError(ValueError):
    """The model is wrapped in something that cannot be taken off, or keeps its weights from being exchanged."""


class CheckpointingError(ValueError):
    """The model recomputes activations in its backward pass in a way that admits no kernel."""


class ParameterTypeError(ValueError):
    """A parameter is complex, or has no values yet."""


class StatisticsError(ValueError):
    """The statistics of a batch-normalizing layer cannot be exchanged, or examples meet in spite of it."""


class OutputShapeError(ValueError):
    """The model, or the layer asked for, does not return one row per example."""


class InputMismatchError(ValueError):
    """The inputs are no batches of one kind of example."""


class MemoryBudgetError(ValueError):
    """The memory allowed does not hold the smallest piece of work."""


class AsymmetricKernelError(ValueError):
    """A spectrum was asked of a matrix that is not symmetric."""


class NoJacobianProductError(ValueError):
    """An operation of the model has no Jacobian-vector product, or one that disagrees with its backward pass."""


class PartialSpectrumError(ValueError):
    """A figure needs all eigenvalues and only the largest were computed."""


class GramError(ValueError):
    """A Gram matrix is no covariance of inputs: of the wrong shape, not symmetric, or not positive semi-definite."""


class BatchTooSmallError(ValueError):
    """Three examples or fewer under batch statistics, where the second moment of the gradient diverges."""


class CentredRankError(ValueError):
    """A batch spans too few directions around its mean for its batch-norm kernel to be finite."""


class BatchTilingError(ValueError):
    """A kernel that depends on the whole batch was about to be computed in tiles."""


class NotGaussianError(ValueError):
    """An activation was asked for whose pre-activations are not Gaussian in the limit of infinite width."""


class MaskError(ValueError):
    """A mask came to a layer that has no meaning for one."""


class NoCounterpartError(ValueError):
    """Some layers of a network have no analytic counterpart.

    Attributes:
        layers: The reasons, by name of layer.
    """

    def __init__(self, layers: Mapping[str, str]) -> None:
        """Write the message.

        Args:
            layers: The reasons, by name of layer.
        """
        self.layers = dict(layers)
        listed = "; ".join(f"{name}: {reason}" for name, reason in self.layers.items())
        super().__init__(
            f"description: must consist of layers that have an analytic counterpart; without one: {listed}. Replace "
            "them, or measure the network with ntk.empirical_ntk."
        )


class CoincidentPointsWarning(UserWarning):
    """Two inputs are the same, or one a multiple of the other, so that kernels are singular."""


class PrecisionFloorWarning(UserWarning):
    """A reported figure is at the floor of its floating-point precision."""
