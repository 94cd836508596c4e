"""The networks of the tasks, in torch. Every ReLU is a module, so that what enters it can be watched."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from benchmarks.empirical_ntk.tasks import OUTPUTS, RESIDUAL_UNITS


def mlp(widths: list[int], *, batch_norm: bool = False) -> nn.Sequential:
    """Linear layers with ReLU between them, and batch norm before each ReLU."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), *([nn.BatchNorm1d(fan_out)] if batch_norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], OUTPUTS))


def deep_mlp() -> nn.Sequential:
    """Twenty hidden layers in He's initialization, by which the signal keeps its size."""
    model = mlp([784, *[256] * 20])
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return model


def conv() -> nn.Sequential:
    """Three convolutions, the last two of stride 2, and global average pooling."""
    layers: list[nn.Module] = []
    for fan_in, fan_out, stride in ((3, 32, 1), (32, 64, 2), (64, 64, 2)):
        layers += [nn.Conv2d(fan_in, fan_out, 3, stride=stride, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, OUTPUTS))


class Unit(nn.Module):
    """Residual unit without normalization."""

    def __init__(self, fan_in: int, fan_out: int, stride: int) -> None:
        """Two convolutions, and a 1 x 1 shortcut where the shape changes."""
        super().__init__()
        self.first = nn.Conv2d(fan_in, fan_out, 3, stride=stride, padding=1)
        self.second = nn.Conv2d(fan_out, fan_out, 3, padding=1)
        self.shortcut = nn.Identity() if fan_in == fan_out else nn.Conv2d(fan_in, fan_out, 1, stride=stride)
        self.inner, self.outer = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """[n, fan_in, h, w] -> [n, fan_out, h / stride, w / stride]."""
        return self.outer(self.second(self.inner(self.first(x))) + self.shortcut(x))


def resnet20() -> nn.Sequential:
    """One convolution and nine units without normalization."""
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, OUTPUTS)]
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), *itertools.starmap(Unit, RESIDUAL_UNITS), *head)


NETWORKS = {
    "mlp": lambda: mlp([784, 512, 512, 512]),
    "deep_mlp": deep_mlp,
    "conv": conv,
    "resnet20": resnet20,
    "batch_norm_mlp": lambda: mlp([784, 256, 256], batch_norm=True),
}


def build(network: str) -> nn.Module:
    """The network in train mode, the same weights each time, the global generator left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return NETWORKS[network]()


def forget_running_statistics(model: nn.Module) -> None:
    """Take the running statistics out of every batch norm: in train mode no output depends on them."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
