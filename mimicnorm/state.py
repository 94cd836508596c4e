"""What a converted network remembers: its method and the weights under projection."""

from dataclasses import dataclass

from torch import Tensor, nn

from mimicnorm.methods.base import Method

STATE = "_mimicnorm"


@dataclass(frozen=True)
class ConversionState:
    """Set on a converted network as a plain attribute: copied with it, absent from its state_dict.

    Attributes:
        method: The method the network was converted to.
        projected: Names of the parameters under weight mean.
    """

    method: Method
    projected: tuple[str, ...] = ()


def state_of(model: nn.Module) -> ConversionState:
    """The state of a converted network.

    Args:
        model: A network that `convert` returned.

    Raises:
        ValueError: If the network was not converted.
    """
    state = getattr(model, STATE, None)
    if not isinstance(state, ConversionState):
        raise ValueError(
            f"model must come from mimicnorm.convert; got an unconverted {type(model).__name__}: "
            "call model = mimicnorm.convert(model, 'mimicnorm') first."
        )
    return state


def projected_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights under projection, by name; empty where the method has none.

    Args:
        model: A converted network.

    Raises:
        ValueError: If the network was not converted.
    """
    return {name: model.get_parameter(name) for name in state_of(model).projected}
