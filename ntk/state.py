"""Leave a model exactly as it was found."""

from collections.abc import Generator
from contextlib import contextmanager

import torch


@contextmanager
def preserve_state(model: torch.nn.Module) -> Generator[torch.nn.Module, None, None]:
    """Restore the state of a model, and the random generators, whatever happens inside.

    Restored are: the train or eval flag of every submodule; every buffer, in place and bitwise; the `.grad` of each
    parameter, both the object and its values; the `requires_grad` flags; the global torch generator of the CPU and,
    where CUDA is initialized, of each CUDA device. The values of the parameters are not copied: code inside must not
    change them.

    Args:
        model: The network to guard.

    Yields:
        The same model.
    """
    flags = [(module, module.training) for module in model.modules()]
    buffers = [
        (
            module,
            {name: (buffer, None if buffer is None else buffer.clone()) for name, buffer in module._buffers.items()},
        )
        for module in model.modules()
    ]
    parameters = [
        (p, p.requires_grad, p.grad, None if p.grad is None else p.grad.detach().clone()) for p in model.parameters()
    ]
    cpu_generator = torch.get_rng_state()
    cuda_generators = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield model
    finally:
        for module, training in flags:
            module.training = training
        with torch.no_grad():
            for module, saved in buffers:
                _restore_buffers(module, saved)
            for parameter, requires_grad, grad, values in parameters:
                parameter.requires_grad_(requires_grad)
                parameter.grad = grad
                if grad is not None and values is not None:
                    grad.copy_(values)
        torch.set_rng_state(cpu_generator)
        if cuda_generators is not None:
            torch.cuda.set_rng_state_all(cuda_generators)


def _restore_buffers(
    module: torch.nn.Module, saved: dict[str, tuple[torch.Tensor | None, torch.Tensor | None]]
) -> None:
    """Put the buffer objects of one module back, and their values into them."""
    for name in set(module._buffers) - set(saved):
        del module._buffers[name]
    for name, (buffer, values) in saved.items():
        module._buffers[name] = buffer
        if buffer is not None and values is not None:
            buffer.copy_(values)
