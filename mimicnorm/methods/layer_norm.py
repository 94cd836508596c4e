"""Layer normalization."""

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor, nn

from mimicnorm._validation import check_choice, check_number
from mimicnorm.methods.base import Method
from mimicnorm.methods.none import he_initialize
from mimicnorm.surgery import Surgery

Over = Literal["channels", "features"]


class ChannelLayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` over the channels at axis 1, for each example and location by itself."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize features [N, C, ...].

        Args:
            input: Features of any rank.

        Returns:
            Features of the same shape.
        """
        # Contiguous: behind a strided view the backward pass of oneDNN 3.12's convolution corrupts the heap.
        return super().forward(input.movedim(1, -1)).movedim(-1, 1).contiguous()


@dataclass(frozen=True)
class LayerNorm(Method):
    """Puts layer normalization in place of every normalization; layers are drawn after He.

    The source normalizes over all units of a layer. On images two different methods go by the name; where H W = 1, they
    agree:

    - "channels": over the channels of each location, with one gain and shift per channel, as in transformers;
    - "features": over all of an example's features (C, H, W). The gain and shift are per channel here, as in GroupNorm
      with one group, so that the network still takes images of any size.

    Works on each example by itself, alike in train and eval mode.

    Source: Ba, Kiros and Hinton 2016 (arXiv 1607.06450); PyTorch.

    Attributes:
        over: Which of the two. The default is chosen here.
        eps: Added to the variance. Default as in PyTorch.

    Raises:
        ValueError: If `over` is unknown or eps is negative or not finite.
    """

    name: ClassVar[str] = "layer_norm"
    source: ClassVar[str] = "Ba et al. 2016, arXiv 1607.06450; torch.nn.LayerNorm"

    over: Over = "channels"
    _: KW_ONLY
    eps: float = 1e-5

    def __post_init__(self) -> None:
        """Check the options."""
        check_choice("over", self.over, get_args(Over))
        check_number("eps", self.eps, minimum=0.0)

    def edit(self, surgery: Surgery) -> None:
        """Ask for the conversion; see `Method.edit`."""
        he_initialize(surgery)
        for norm in surgery.norms:
            if self.over == "channels":
                new: nn.Module = ChannelLayerNorm(norm.channels, self.eps, **surgery.placement)
                surgery.replace_norm(norm, new, reason="over the channels of each location")
            else:
                new = nn.GroupNorm(1, norm.channels, self.eps, **surgery.placement)
                surgery.replace_norm(norm, new, reason="over all features of each example: one group of channels")
