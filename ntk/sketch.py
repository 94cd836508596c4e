"""A forward pass on shapes alone: what a batch would record, at the cost of no memory and little time."""

from collections.abc import Iterable

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ntk.capture import Capture
from ntk.forward import Batch, Evaluation, cast, module_outputs
from ntk.state import forget_attributes


def sketch_batch(
    model: torch.nn.Module,
    x: torch.Tensor,
    names: Iterable[str],
    evaluation: Evaluation,
    argument: str,
    capture: Capture,
) -> Batch:
    """Run one batch on tensors that have a shape and no values; for `ntk.structured.record`.

    Args:
        model: The network.
        x: [n, ...]
        names: Parameters to differentiate by.
        evaluation: Type to compute in, statistics and outputs.
        argument: Name of x, for the errors.
        capture: Records the calls.

    Returns:
        The batch, its tensors without values.

    Raises:
        RuntimeError: The model cannot be run without values, because it looks at them.
    """
    selected = set(names)
    # The mode is not entered: what the model makes itself, and may keep somewhere, is then a tensor like any other.
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.enable_grad():
        shape = lambda value: mode.from_tensor(cast(value.detach(), evaluation.dtype))
        parameters = {name: shape(value) for name, value in model.named_parameters()}
        for name in selected:
            parameters[name].requires_grad_(True)
        examples = mode.from_tensor(x)
        capture.watch({name: parameters[name] for name in parameters if name in selected}, [x, examples])
        with forget_attributes(model), capture, module_outputs(model) as sizes:
            moments = evaluation.moments(model, x, parameters, parameters)
            returned = evaluation.outputs(model, examples, parameters, moments, argument)
        if not isinstance(returned, torch.Tensor) or returned.shape[:1] != x.shape[:1]:
            raise RuntimeError(f"the output on {argument} is no tensor [n, o].")
        output = returned.reshape(len(x), -1)
        if moments is not None:
            capture.prune(output)
    return Batch(output, {name: parameters[name] for name in parameters if name in selected}, sizes)
