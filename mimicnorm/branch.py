"""The learnable scalar at the end of a residual branch."""

import torch
from torch import Tensor, nn


class BranchScalar(nn.Module):
    """Multiplies its input by one learnable scalar.

    Source: MimicNorm (arXiv 2010.09278), section on residual networks: y = ReLU(s_l F_l(x) + shortcut(x)).

    Args:
        value: Initial value of the scalar.
        device: Device of the parameter.
        dtype: Type of the parameter.
    """

    def __init__(
        self, value: float, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Build the layer; see the class."""
        super().__init__()
        self.scalar = nn.Parameter(torch.full((1,), value, device=device, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        """Scale a tensor of any shape."""
        return input * self.scalar

    def extra_repr(self) -> str:
        """The current value."""
        return f"{self.scalar.item():.4g}"
