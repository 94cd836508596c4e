"""Which part of what a model returns the kernel is of."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ntk.errors import NonFiniteKernelError, OutputShapeError, UnknownNameError

OutputChoice = str | int | tuple[str | int, ...] | Callable[[Any], torch.Tensor] | None
"""None, a key, index or attribute, a path of them, or a function of what the model returns."""


def check_output_choice(choice: OutputChoice) -> None:
    """Refuse an `output` argument of the wrong type.

    Args:
        choice: The argument.

    Raises:
        TypeError: It is no key, index, path or function.
    """
    path = choice if isinstance(choice, tuple) else (choice,)
    if not (choice is None or callable(choice) or (path and all(isinstance(step, str | int) for step in path))):
        raise TypeError(
            "output must be None, a key, index or attribute, a tuple of them, or a function of what the model returns; "
            f"got {choice!r}. Write, say, output='logits' or output=lambda y: y[0]."
        )


def select_output(returned: object, choice: OutputChoice) -> object:
    """Take the part that is meant.

    Args:
        returned: What the model returned.
        choice: A key of a mapping, an index of a sequence or an attribute of a dataclass or named tuple, a path of
            them, as a tuple or joined by dots; a function; or None for all.

    Returns:
        The part.

    Raises:
        UnknownNameError: There is no such part.
    """
    if choice is None or isinstance(choice, str | int | tuple):
        path = () if choice is None else choice if isinstance(choice, tuple) else (choice,)
        for step in path:
            returned = _step(returned, step, choice)
        return returned
    return choice(returned)


def _step(value: object, step: str | int, choice: OutputChoice) -> object:
    """One key, index or attribute; a dotted string that is none of them is a path.

    Raises:
        UnknownNameError: There is no such part.
    """
    parts = _parts(value)
    if step in parts:
        return parts[step]
    if isinstance(step, int) and isinstance(value, Sequence) and -len(value) <= step < len(value):
        return value[step]
    if isinstance(step, str) and step.isdigit() and int(step) in parts:
        return parts[int(step)]
    if isinstance(step, str) and "." in step:
        for name in step.split("."):
            value = _step(value, name, choice)
        return value
    where = f"where the model returns {type(value).__name__}"
    raise UnknownNameError(f"output ({where})", choice, map(str, parts), "Choose one of them, or give a function.")


def _parts(value: object) -> dict[str | int, object]:
    """Key, attribute or index -> part, of a mapping, dataclass, named tuple or sequence."""
    if isinstance(value, Mapping):
        return dict(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=True))
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    return {}


def as_rows(output: object, n: int, argument: str) -> torch.Tensor:
    """Check that a model output is [n, o] or [n], and make it [n, o].

    Args:
        output: Of the model.
        n: Examples.
        argument: Name of the batch, for the errors.

    Returns:
        [n, o]

    Raises:
        OutputShapeError: It has another shape, type or dtype.
        NonFiniteKernelError: It is not finite.
    """
    if not isinstance(output, torch.Tensor):
        parts = ", ".join(map(repr, _parts(output)))
        raise OutputShapeError(
            f"the model must return one tensor [n, o]; on {argument} it returned {type(output).__name__}"
            f"{f' of {parts}' if parts else ''}. Choose a part by output=, such as output='logits', output=0, or a "
            "function of what the model returns."
        )
    if output.ndim not in (1, 2) or output.shape[0] != n:
        raise OutputShapeError(
            f"the model must return [n, o], one row for each of the {n} examples of {argument}; it returned "
            f"{tuple(output.shape)}. Append torch.nn.Flatten(), say output=lambda y: y.flatten(1), or select the "
            "outputs you mean."
        )
    if output.is_complex():
        raise OutputShapeError(
            f"the model must have real outputs for its kernel to be real; on {argument} they are {output.dtype}. Pass "
            "output=lambda y: torch.view_as_real(y).flatten(1), real and imaginary parts as separate outputs."
        )
    if output.dtype not in (torch.float32, torch.float64):
        raise OutputShapeError(
            f"the model must compute in float32 or float64 for its kernel to have digits; its output on {argument} is "
            f"{output.dtype}. Pass dtype=torch.float32 or dtype=torch.float64."
        )
    if not bool(torch.isfinite(output).all()):
        raise NonFiniteKernelError(
            f"the model output on {argument} is not finite although every weight is; check the input for NaN or "
            "infinity, and the activations for overflow, or pass dtype=torch.float64."
        )
    return output.reshape(n, -1)
