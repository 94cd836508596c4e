"""Published normalization methods, one per file."""

from mimicnorm.methods.base import Method
from mimicnorm.methods.batch_norm import BatchNorm
from mimicnorm.methods.mimicnorm import MimicNorm
from mimicnorm.methods.none import NoNorm
from mimicnorm.methods.registry import METHODS

__all__ = ["METHODS", "BatchNorm", "Method", "MimicNorm", "NoNorm"]
