"""The networks of the papers, each in its BatchNorm form."""

from mimicnorm.models.fcnn import fcnn
from mimicnorm.models.registry import MODELS
from mimicnorm.models.resnet import resnet18
from mimicnorm.models.vgg import vgg11, vgg16

__all__ = ["MODELS", "fcnn", "resnet18", "vgg11", "vgg16"]
