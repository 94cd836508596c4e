"""One whole batch through a model, leaving the model untouched."""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ntk.capture import Capture
from ntk.errors import NondeterministicModelError, NonFiniteKernelError, OutputShapeError


@dataclass(frozen=True, eq=False)
class Batch:
    """The result of one forward pass, ready to be differentiated.

    Attributes:
        output: [n, o], attached to the graph.
        parameters: Name -> leaf tensor in the graph, sharing the storage of the model unless cast.
        activation_bytes: Size of the largest output of any module, per forward pass.
    """

    output: torch.Tensor
    parameters: dict[str, torch.Tensor]
    activation_bytes: int


def call(
    model: torch.nn.Module, x: torch.Tensor, parameters: dict[str, torch.Tensor], dtype: torch.dtype | None
) -> object:
    """Run the model with the given parameters and with clones of its buffers, as one batch.

    BatchNorm in train mode therefore sees all of x, and writes its running statistics into the clones.

    Args:
        model: The network.
        x: [n, ...]
        parameters: Name -> tensor that stands in for the parameter; tied weights follow.
        dtype: Floating-point type that buffers and input are cast to, or None.

    Returns:
        Whatever the model returns.
    """
    held = {id(value): parameters[name] for name, value in model.named_parameters()}
    held |= {id(value): cast(value, dtype).clone() for _, value in model.named_buffers()}
    # Each module once: torch would put a stand-in back as the parameter of a module that goes by two names.
    slots = {
        f"{path}.{name}" if path else name: held[id(value)]
        for path, module in model.named_modules()
        for name, value in (*module._parameters.items(), *module._buffers.items())
        if value is not None
    }
    return torch.func.functional_call(model, slots, (cast(x, dtype),), tie_weights=False)


def cast(value: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """The tensor in another floating-point type; integers, and everything at None, pass unchanged."""
    return value.to(dtype) if dtype is not None and value.is_floating_point() else value


def run_batch(
    model: torch.nn.Module,
    x: torch.Tensor,
    names: Iterable[str],
    dtype: torch.dtype | None,
    argument: str,
    capture: Capture | None = None,
) -> Batch:
    """Run one batch and keep the graph to the named parameters.

    The batch is run a second time, without a graph, to see that the model is a function of weights, buffers and input.

    Args:
        model: The network.
        x: [n, ...]
        names: Parameters to differentiate by.
        dtype: Type to compute in, or None for the type of the model.
        argument: Name of x, for the errors.
        capture: Records the calls of the first run, or None.

    Returns:
        The batch.

    Raises:
        NondeterministicModelError: The second run gave another output.
    """
    selected = set(names)
    parameters = {name: cast(p.detach(), dtype).detach() for name, p in model.named_parameters()}
    with torch.enable_grad():
        for name in selected:
            parameters[name].requires_grad_(True)
        if capture is not None:
            capture.watch({name: value for name, value in parameters.items() if name in selected})
        with capture or contextlib.nullcontext():
            returned = call(model, x, parameters, dtype)
        output = _as_rows(returned, x.shape[0], argument)
    with torch.enable_grad():  # a model may differentiate inside its forward pass
        constants = {name: value.detach() for name, value in parameters.items()}
        largest, again = _probe(model, x, constants, dtype)
    with torch.no_grad():
        second = _as_rows(again, x.shape[0], argument)
        difference = float((second - output).abs().max())
        scale = float(output.abs().max())
    if difference > torch.finfo(output.dtype).eps ** 0.5 * scale:
        raise NondeterministicModelError(
            f"model must give one output for one input, and two runs on {argument} differ by up to {difference:.3g} "
            f"(outputs up to {scale:.3g}): it is random, or it changes itself when called. "
            "Switch functional dropout off, fix its noise, or call .eval() on the module that does it."
        )
    return Batch(output, {name: parameters[name] for name in parameters if name in selected}, largest)


def _probe(
    model: torch.nn.Module, x: torch.Tensor, parameters: dict[str, torch.Tensor], dtype: torch.dtype | None
) -> tuple[int, object]:
    """Run once more and note the size in bytes of the largest module output."""
    sizes = [1]

    def note(module: torch.nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, torch.Tensor):
            sizes.append(output.numel() * output.element_size())

    handles = [module.register_forward_hook(note) for module in model.modules()]
    try:
        return max(sizes), call(model, x, parameters, dtype)
    finally:
        for handle in handles:
            handle.remove()


def _as_rows(output: object, n: int, argument: str) -> torch.Tensor:
    """Check that a model output is [n, o] or [n], and make it [n, o].

    Raises:
        OutputShapeError: It has another shape, type or dtype.
        NonFiniteKernelError: It is not finite.
    """
    if not isinstance(output, torch.Tensor):
        raise OutputShapeError(
            f"the model must return one tensor [n, o]; on {argument} it returned {type(output).__name__}. "
            "Wrap it in a module whose forward returns the logits alone."
        )
    if output.ndim not in (1, 2) or output.shape[0] != n:
        raise OutputShapeError(
            f"the model must return [n, o], one row for each of the {n} examples of {argument}; it returned "
            f"{tuple(output.shape)}. Append torch.nn.Flatten(), or select the outputs you mean."
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
