"""Multi-head attention with its projections taken out, so that each is a linear layer of its own.

`torch.nn.functional.multi_head_attention_forward` is one call to whoever watches functions. Between projections that
are written outside of it, it is called with identities in their place, which changes nothing, not even by rounding.
"""

import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(input [n, t, k], weight [q, k], bias [q] or None) -> [n, t, q]."""

_SIGNATURE = inspect.signature(F.multi_head_attention_forward)


def attend(linear: Linear, *args: object, **kwargs: object) -> tuple[Tensor, Tensor | None] | None:
    """Multi-head attention by another linear map, examples first.

    Args:
        linear: What projects.
        *args: Of `torch.nn.functional.multi_head_attention_forward`.
        **kwargs: The same.

    Returns:
        What that returns; None where the projections are not taken out: of one example without a batch axis, or by
        weights of their own for query, key and value.
    """
    call = _SIGNATURE.bind(*args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    inputs = {name: given[name] for name in ("query", "key", "value")}
    width = given["query"].shape[-1]
    if given["use_separate_proj_weight"] or given["query"].ndim != 3:
        return None
    project = lambda x, weight, bias: linear(x.transpose(0, 1), weight, bias).transpose(0, 1)
    once = {id(x): x for x in inputs.values()}
    packed = {number: project(x, given["in_proj_weight"], given["in_proj_bias"]) for number, x in once.items()}
    for number, (name, x) in enumerate(inputs.items()):
        given[name] = packed[id(x)][..., number * width : (number + 1) * width]
    outer = given["out_proj_weight"], given["out_proj_bias"]
    identity = torch.eye(width, dtype=outer[0].dtype, device=outer[0].device)
    given |= dict.fromkeys(("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj_weight"), identity)
    given |= {"use_separate_proj_weight": True, **dict.fromkeys(("in_proj_weight", "in_proj_bias", "out_proj_bias"))}
    attended, weights = F.multi_head_attention_forward(*call.args, **call.kwargs)
    return project(attended, *outer), weights
