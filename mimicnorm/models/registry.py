"""The catalogue of networks."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import nn

from mimicnorm.models.fcnn import fcnn
from mimicnorm.models.resnet import resnet18
from mimicnorm.models.vgg import vgg11, vgg16

MODELS: Mapping[str, Callable[..., nn.Module]] = MappingProxyType(
    {"fcnn": fcnn, "resnet18": resnet18, "vgg11": vgg11, "vgg16": vgg16}
)
"""Name to factory."""
