"""Which parameters a kernel is taken over, and with what multiplier."""

import math
from collections.abc import Iterable, Mapping

import torch

from ntk.errors import NoParametersError, UnknownNameError

ParameterChoice = Iterable[str] | Mapping[str, float] | None
"""None for all that require a gradient, names, or name -> multiplier."""


def select_parameters(model: torch.nn.Module, params: ParameterChoice) -> tuple[dict[str, float], bool]:
    """Resolve the `params` argument against a model.

    Args:
        model: The network.
        params: None takes every parameter that requires a gradient. Names take those, frozen ones included. A mapping
            takes its keys and multiplies the contribution of each by its value. A tied weight may go by any of its
            names.

    Returns:
        Parameter name -> multiplier, in the order of the model; and whether multipliers were given.

    Raises:
        NoParametersError: Nothing is selected.
        UnknownNameError: A name is not a parameter of the model.
        TypeError: A single string came instead of an iterable of names.
        ValueError: A multiplier is negative or not finite, or a tied weight has two.
    """
    own = dict(model.named_parameters())
    if params is None:
        chosen = {name: 1.0 for name, value in own.items() if value.requires_grad}
        if not chosen:
            raise NoParametersError(
                f"params=None takes every parameter that requires a gradient, and of the {len(own)} parameters of this "
                "model none does; name them in params, or call requires_grad_(True)."
            )
        return chosen, False
    if isinstance(params, str):
        raise TypeError(
            f"params must be an iterable of names or a mapping, got the string {params!r}; write [{params!r}]."
        )
    scaled = isinstance(params, Mapping)
    if isinstance(params, Mapping):
        requested = {name: _multiplier(name, value) for name, value in params.items()}
    else:
        requested = dict.fromkeys(params, 1.0)
    if not requested:
        raise NoParametersError(
            f"params is empty; admissible are names among the {len(own)} parameters of the model. "
            "Leave it None to take every one that requires a gradient."
        )
    canonical = {id(value): name for name, value in own.items()}
    every = dict(model.named_parameters(remove_duplicate=False))
    chosen = {}
    for name, multiplier in requested.items():
        if name not in every:
            raise UnknownNameError("params", name, own)
        target = canonical[id(every[name])]
        if chosen.setdefault(target, multiplier) != multiplier:
            raise ValueError(
                f"params gives the tied weight {target!r} two multipliers, {chosen[target]} and {multiplier} "
                f"(as {name!r}); give it one."
            )
    return {name: chosen[name] for name in own if name in chosen}, scaled


def _multiplier(name: str, value: float) -> float:
    if not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
        raise ValueError(
            f"params[{name!r}] must be a finite multiplier >= 0, such as sigma_w**2 / fan_in; got {value!r}."
        )
    return float(value)
