"""The catalogue of methods."""

from collections.abc import Mapping
from types import MappingProxyType

from mimicnorm.methods.base import Method
from mimicnorm.methods.batch_norm import BatchNorm
from mimicnorm.methods.mimicnorm import MimicNorm
from mimicnorm.methods.none import NoNorm

METHODS: Mapping[str, type[Method]] = MappingProxyType({cls.name: cls for cls in (MimicNorm, BatchNorm, NoNorm)})
"""Name to config class."""
