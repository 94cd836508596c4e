"""A network in, the same network under another method out."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mimicnorm._validation import check_choice
from mimicnorm.methods import METHODS
from mimicnorm.methods.base import Method
from mimicnorm.state import projected_weights, state_of
from mimicnorm.weight_mean import center_weights_


def convert(
    model: nn.Module,
    method: Method | str,
    *,
    example_input: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """A converted, re-initialized copy of a network; the original is untouched.

    Args:
        model: A network in its BatchNorm form that torch.fx can trace. Its dtype, device and train flag carry over.
        method: A method, or a name from `METHODS` for its defaults.
        example_input: A batch to run through the network as a check, or None.
        generator: Source of randomness, None for PyTorch's global one.

    Returns:
        The copy, with `conversion_report` on it.

    Raises:
        ValueError: If the method is unknown or the network cannot be converted.
    """
    return convert_(copy.deepcopy(model), method, example_input=example_input, generator=generator)


def convert_(
    model: nn.Module,
    method: Method | str,
    *,
    example_input: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Convert and re-initialize a network in place; arguments and errors as for `convert`.

    Args:
        model: A network in its BatchNorm form that torch.fx can trace.
        method: A method, or a name from `METHODS` for its defaults.
        example_input: A batch to run through the network as a check, or None.
        generator: Source of randomness, None for PyTorch's global one.

    Returns:
        The same network, with `conversion_report` on it.

    Raises:
        ValueError: If the method is unknown or the network cannot be converted; it is then unchanged.
    """
    _resolve(method).apply_(model, example_input=example_input, generator=generator)
    return model


def attach(model: nn.Module, optimizer: torch.optim.Optimizer) -> RemovableHandle:
    """Install what the network's method needs around an optimizer step.

    Args:
        model: A converted network.
        optimizer: The optimizer of its parameters.

    Returns:
        A handle with `remove()`, also a context manager.

    Raises:
        ValueError: If the network was not converted, or the optimizer belongs to another network.
    """
    return state_of(model).method.attach(model, optimizer)


def param_groups(model: nn.Module, *, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """The optimizer's parameter groups under the network's method.

    Args:
        model: A converted network.
        lr: Learning rate.
        weight_decay: Weight decay.

    Returns:
        A list of groups in PyTorch's form.

    Raises:
        ValueError: If the network was not converted, or a rate is negative or not finite.
    """
    return state_of(model).method.param_groups(model, lr=lr, weight_decay=weight_decay)


def project_weights(model: nn.Module) -> None:
    """Do once what `attach` does after each step; nothing for a method without projection.

    Args:
        model: A converted network.

    Raises:
        ValueError: If the network was not converted.
    """
    center_weights_(list(projected_weights(model).values()))


def row_projections(model: nn.Module) -> dict[str, Callable[[Tensor], Tensor]]:
    """The projections under which a converted network trains: those that its kernel must be taken with.

    Args:
        model: A converted network.

    Returns:
        Parameter name to a callable on tensors of shape [..., *parameter.shape]; empty where training moves freely.

    Raises:
        ValueError: If the network was not converted.
    """
    return state_of(model).method.row_projections(model)


def _resolve(method: Method | str) -> Method:
    if isinstance(method, Method):
        return method
    check_choice("method", method, METHODS)
    return METHODS[method]()
