"""What the factories share: building without touching the global generator, and He initialization."""

import contextlib
import math
from collections.abc import Generator

import torch
from torch import nn

from mimicnorm._validation import check_number
from mimicnorm.initialization import HE, fan_in, normal_


@contextlib.contextmanager
def isolated(generator: torch.Generator | None) -> Generator[None, None, None]:
    """Hide from the global generator what layer constructors draw, if an explicit generator is in charge."""
    if generator is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        yield


def he_initialize_(model: nn.Module, generator: torch.Generator | None) -> None:
    """Draw every weight from N(0, sigma_w^2 / fan-in) and zero every bias.

    sigma_w^2 is 2 (He et al. 2015, arXiv 1502.01852), but 1 for a Linear that is the first layer: its input is not
    rectified (MimicNorm, arXiv 2010.09278, eq. (1)).

    Args:
        model: A network that registers its layers in execution order.
        generator: Source of randomness, None for PyTorch's global one.
    """
    first = True
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            variance = 1.0 if first and isinstance(module, nn.Linear) else HE
            normal_(module.weight, math.sqrt(variance / fan_in(module.weight)), generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            first = False


def scaled(channels: int, width: float) -> int:
    """A channel count under a width multiplier, rounded, at least 1.

    Raises:
        ValueError: If the multiplier is not a positive number.
    """
    check_number("width", width, minimum=0.0, strict=True)
    return max(1, round(channels * width))
