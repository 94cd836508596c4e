"""VGG for 3 x 32 x 32 images, in its BatchNorm form.

Source: Simonyan and Zisserman 2015 (arXiv 1409.1556), configurations A and D; CIFAR form of MimicNorm's code
(Kid-key/MimicNorm at d64fb51): five poolings to 1 x 1, classifier 512, 4096, 4096, classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mimicnorm._validation import check_count, check_number
from mimicnorm.models._build import he_initialize_, isolated, scaled

VGG11 = ((64,), (128,), (256, 256), (512, 512), (512, 512))
VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG(nn.Module):
    """Stages of 3 x 3 convolutions, each stage ending in a 2 x 2 max pooling, then three Linear layers.

    Args:
        stages: Output channels of each convolution, by stage.
        num_classes: Number of classes.
        hidden: Units of the two hidden Linear layers.
        in_channels: Channels of the image.
        dropout: Dropout probability behind each hidden Linear layer.
    """

    def __init__(
        self, stages: Sequence[Sequence[int]], num_classes: int, *, hidden: int, in_channels: int, dropout: float
    ) -> None:
        """Build the network; see the class."""
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for stage in stages:
            for out in stage:
                layers += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
                channels = out
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.flatten = nn.Flatten()
        self.classifier = nn.Sequential(
            nn.Linear(channels, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, in_channels, 32, 32] to logits [N, num_classes]."""
        return self.classifier(self.flatten(self.features(x)))


def vgg11(
    num_classes: int = 100,
    *,
    width: float = 1.0,
    in_channels: int = 3,
    dropout: float = 0.5,
    generator: torch.Generator | None = None,
) -> VGG:
    """VGG11 (configuration A): 8 convolutions, 3 Linear layers, He-initialized.

    Args:
        num_classes: Number of classes.
        width: Multiplier of every channel and hidden unit count.
        in_channels: Channels of the image.
        dropout: Dropout probability in the classifier; 0.5 in the source.
        generator: Source of randomness; the global one is then left alone. None for the global one.

    Returns:
        The network, in train mode.

    Raises:
        ValueError: If an argument is out of range.
    """
    return _vgg(VGG11, num_classes, width, in_channels, dropout, generator)


def vgg16(
    num_classes: int = 100,
    *,
    width: float = 1.0,
    in_channels: int = 3,
    dropout: float = 0.5,
    generator: torch.Generator | None = None,
) -> VGG:
    """VGG16 (configuration D): 13 convolutions, 3 Linear layers, He-initialized; arguments as for `vgg11`.

    Args:
        num_classes: Number of classes.
        width: Multiplier of every channel and hidden unit count.
        in_channels: Channels of the image.
        dropout: Dropout probability in the classifier; 0.5 in the source.
        generator: Source of randomness; the global one is then left alone. None for the global one.

    Returns:
        The network, in train mode.

    Raises:
        ValueError: If an argument is out of range.
    """
    return _vgg(VGG16, num_classes, width, in_channels, dropout, generator)


def _vgg(
    stages: Sequence[Sequence[int]],
    num_classes: int,
    width: float,
    in_channels: int,
    dropout: float,
    generator: torch.Generator | None,
) -> VGG:
    check_count("num_classes", num_classes)
    check_count("in_channels", in_channels)
    check_number("dropout", dropout, minimum=0.0)
    if dropout > 1:
        raise ValueError(f"dropout must be a probability between 0 and 1; got {dropout!r}: pass such a number.")
    plan = [[scaled(channels, width) for channels in stage] for stage in stages]
    with isolated(generator):
        network = VGG(plan, num_classes, hidden=scaled(4096, width), in_channels=in_channels, dropout=dropout)
    he_initialize_(network, generator)
    return network
