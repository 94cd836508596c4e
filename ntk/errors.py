"""Every way in which a kernel can be refused, by name.

All errors derive from `ValueError`, so that code which does not care for the distinction can catch that. Each message
names the parameter, what is admissible, what came, and the next step.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class ConventionError(ValueError):
    """Two kernels of different conventions met, or a convention has no such conversion."""


class UnknownNameError(ValueError):
    """An option, parameter or layer of that name does not exist."""

    def __init__(self, parameter: str, value: object, admissible: Iterable[str]) -> None:
        """Write the message, with the nearest names that do exist.

        Args:
            parameter: Name of the argument that carried the value.
            value: What came.
            admissible: What would have been accepted.
        """
        known = sorted(admissible)
        near = get_close_matches(str(value), known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "choose one of them."
        shown = ", ".join(map(repr, known[:12])) + (f", and {len(known) - 12} more" if len(known) > 12 else "")
        super().__init__(f"{parameter} has no {value!r}: admissible are {shown or 'none'}; {hint}")


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


class OutputShapeError(ValueError):
    """The model, or the layer asked for, does not return one row per example."""


class InputMismatchError(ValueError):
    """The inputs are no batches of one kind of example."""


class MemoryBudgetError(ValueError):
    """The memory allowed does not hold the smallest piece of work."""


class AsymmetricKernelError(ValueError):
    """A spectrum was asked of a matrix that is not symmetric."""


class PartialSpectrumError(ValueError):
    """A figure needs all eigenvalues and only the largest were computed."""


class PrecisionFloorWarning(UserWarning):
    """A reported figure is at the floor of its floating-point precision."""
