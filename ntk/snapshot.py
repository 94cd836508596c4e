"""A model as it stands now, to be called again later whatever becomes of the model meanwhile."""

import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ntk.forward import cast
from ntk.state import preserve_state


class Snapshot:
    """Copies of the weights and buffers of a model, and its train and eval flags.

    Calls leave the model as they find it. Attention is computed by plain products, the only form of it that has
    derivatives of every kind.
    """

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype | None) -> None:
        """Copy what the output depends on.

        Args:
            model: The network; its structure is not copied.
            dtype: Floating-point type to compute in, or None for that of the model.
        """
        self.model = model
        self.dtype = dtype
        self.flags = [(module, module.training) for module in model.modules()]
        self.parameters = {name: cast(value.detach(), dtype).clone() for name, value in model.named_parameters()}
        self.buffers = {name: cast(value.detach(), dtype).clone() for name, value in model.named_buffers()}

    @contextmanager
    def active(self) -> Generator[None, None, None]:
        """Set the flags of the snapshot; calls must happen inside.

        Two warnings of torch that a user can do nothing about are silenced: that an operation is differentiated in a
        loop, and that forward mode compiles its rules by a deprecated function when first used.

        Yields:
            Nothing.
        """
        with preserve_state(self.model), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)
            warnings.filterwarnings("ignore", message="`torch.jit", category=DeprecationWarning)
            for module, training in self.flags:
                module.training = training
            yield

    def __call__(self, x: torch.Tensor, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Run one whole batch.

        Args:
            x: [n, ...]
            parameters: Name -> tensor that stands in for the copy.

        Returns:
            What the model returns.
        """
        buffers = {name: value.clone() for name, value in self.buffers.items()}
        state = {**self.parameters, **parameters, **buffers}
        return torch.func.functional_call(self.model, state, (cast(x, self.dtype),))
