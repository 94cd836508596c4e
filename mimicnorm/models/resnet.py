"""ResNet for 3 x 32 x 32 images, in its BatchNorm form.

Source: He et al. 2016 (arXiv 1512.03385), section 3; CIFAR form of MimicNorm's code (Kid-key/MimicNorm at d64fb51):
3 x 3 stem with stride 1, no max pooling, four stages of 64 to 512 channels.
"""

import torch
from torch import Tensor, nn

from mimicnorm._validation import check_count
from mimicnorm.models._build import he_initialize_, isolated, scaled


class BasicBlock(nn.Module):
    """y = ReLU(branch(x) + shortcut(x)): two 3 x 3 convolutions, and a 1 x 1 one where the shape changes.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Stride of the first convolution and of the shortcut.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        """Build the block; see the class."""
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
            )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Features [N, in_channels, H, W] to [N, out_channels, H / stride, W / stride]."""
        return self.relu(self.branch(x) + self.shortcut(x))


class ResNet(nn.Module):
    """Stem, stages of blocks, global average pooling, Linear.

    Args:
        blocks: Number of blocks in each stage.
        channels: Output channels of each stage.
        num_classes: Number of classes.
        in_channels: Channels of the image.
    """

    def __init__(self, blocks: tuple[int, ...], channels: tuple[int, ...], num_classes: int, in_channels: int) -> None:
        """Build the network; see the class."""
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, channels[0], 3, padding=1, bias=False), nn.BatchNorm2d(channels[0]), nn.ReLU()
        )
        stages: list[nn.Module] = []
        before = channels[0]
        for stage, (count, after) in enumerate(zip(blocks, channels, strict=True)):
            strides = [1 if stage == 0 else 2] + [1] * (count - 1)
            inputs = [before] + [after] * (count - 1)
            stages.append(nn.Sequential(*(BasicBlock(i, after, s) for i, s in zip(inputs, strides, strict=True))))
            before = after
        self.stages = nn.Sequential(*stages)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, in_channels, H, W] to logits [N, num_classes]."""
        return self.head(self.stages(self.stem(x)))


def resnet18(
    num_classes: int = 100,
    *,
    width: float = 1.0,
    in_channels: int = 3,
    generator: torch.Generator | None = None,
) -> ResNet:
    """ResNet-18: 8 basic blocks, 20 convolutions of which 3 in shortcuts, He-initialized.

    Args:
        num_classes: Number of classes.
        width: Multiplier of every channel count.
        in_channels: Channels of the image.
        generator: Source of randomness; the global one is then left alone. None for the global one.

    Returns:
        The network, in train mode.

    Raises:
        ValueError: If an argument is out of range.
    """
    check_count("num_classes", num_classes)
    check_count("in_channels", in_channels)
    channels = tuple(scaled(count, width) for count in (64, 128, 256, 512))
    with isolated(generator):
        network = ResNet((2, 2, 2, 2), channels, num_classes, in_channels)
    he_initialize_(network, generator)
    return network
