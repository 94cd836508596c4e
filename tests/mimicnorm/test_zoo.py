"""The networks: shapes, layer counts, initialization, randomness."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mimicnorm import models


def build(name: str, generator: torch.Generator | None = None) -> tuple[nn.Module, torch.Tensor]:
    if name == "fcnn":
        return models.fcnn(6, 16, 3, 10, generator=generator), torch.randn(4, 6)
    return models.MODELS[name](10, width=0.125, generator=generator), torch.randn(4, 3, 32, 32)


def count(network: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in network.modules())


@pytest.mark.parametrize(
    ("name", "convs", "linears", "norms", "relus"),
    [("fcnn", 0, 4, 3, 3), ("resnet18", 20, 1, 20, 17), ("vgg11", 8, 3, 8, 10), ("vgg16", 13, 3, 13, 15)],
)
def test_layers_and_shapes(name: str, convs: int, linears: int, norms: int, relus: int) -> None:
    network, x = build(name)
    assert network.training
    assert network(x).shape == (4, 10)
    assert (count(network, nn.Conv2d), count(network, nn.Linear)) == (convs, linears)
    assert (count(network, _BatchNorm), count(network, nn.ReLU)) == (norms, relus)
    assert not any(module.inplace for module in network.modules() if isinstance(module, nn.ReLU))


def test_full_size_parameter_counts() -> None:
    """11,220,132 is the published CIFAR-100 ResNet-18; VGG's classifier is 512, 4096, 4096, classes."""
    assert sum(p.numel() for p in models.resnet18().parameters()) == 11_220_132
    shapes = [tuple(layer.weight.shape) for layer in models.vgg11(width=1.0).classifier if isinstance(layer, nn.Linear)]
    assert shapes == [(4096, 512), (4096, 4096), (100, 4096)]


@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_weights_come_from_the_generator_and_nothing_else_moves(name: str) -> None:
    state = torch.get_rng_state()
    one = models.MODELS[name](*_arguments(name), generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), state)
    other = models.MODELS[name](*_arguments(name), generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    models.MODELS[name](*_arguments(name))
    assert not torch.equal(torch.get_rng_state(), state)


def _arguments(name: str) -> tuple[int, ...]:
    return (6, 16, 3, 10) if name == "fcnn" else (2,)


@pytest.mark.parametrize("name", ["fcnn", "resnet18"])
def test_he_initialization(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    network = models.fcnn(200, 300, 2, 100, generator=generator) if name == "fcnn" else build(name, generator)[0]
    layers = [module for module in network.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    for layer in layers:
        n, size = layer.weight[0].numel(), layer.weight.numel()
        expected = 1.0 if name == "fcnn" and layer is layers[0] else 2.0
        estimate = n * layer.weight.detach().double().square().mean().item()
        assert abs(estimate - expected) < 4 * expected * math.sqrt(2 / size)
        assert layer.bias is None or not layer.bias.any()


@pytest.mark.parametrize("training", [True, False])
def test_fcnn_without_epsilon_is_exactly_scale_invariant(training: bool) -> None:
    network = models.fcnn(5, 12, 2, 3, eps=0.0, generator=torch.Generator().manual_seed(2)).double().train(training)
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    before = network(x).detach()
    assert torch.isfinite(before).all()
    with torch.no_grad():
        network.linear2.weight.mul_(7.0)
    change = (network(x) - before).abs().max().item()
    assert (change < 1e-12) is training


def test_fcnn_options() -> None:
    network = models.fcnn(5, 12, 2, 3, affine=False, bias=True, activation="gelu", eps=1e-3)
    assert [type(module).__name__ for module in network] == [
        "Linear", "BatchNorm1d", "GELU", "Linear", "BatchNorm1d", "GELU", "Linear"
    ]  # fmt: skip
    assert network.norm1.weight is None
    assert network.norm1.eps == 1e-3
    assert network.linear1.bias is None
    assert network.linear3.bias is not None
    assert [type(module) for module in models.fcnn(5, 12, 0, 3)] == [nn.Linear]


def test_channels_and_dropout() -> None:
    network = models.vgg11(4, width=0.0625, in_channels=1, dropout=0.25)
    assert network.features[0].in_channels == 1
    assert {module.p for module in network.modules() if isinstance(module, nn.Dropout)} == {0.25}
    assert models.resnet18(4, width=0.0625, in_channels=1).eval()(torch.zeros(1, 1, 8, 8)).shape == (1, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: models.fcnn(0, 4, 1, 2), "in_features must be an integer >= 1; got 0"),
        (lambda: models.fcnn(4, 4, -1, 2), "depth must be an integer >= 0; got -1"),
        (lambda: models.fcnn(4, 4, 1, 2, eps=-1e-5), "eps must be a finite number >= 0"),
        (lambda: models.fcnn(4, 4, 1, 2, activation="Relu"), "activation must be one of .* did you mean 'relu'"),
        (lambda: models.resnet18(0), "num_classes must be an integer >= 1; got 0"),
        (lambda: models.resnet18(5, width=0.0), "width must be a finite number > 0"),
        (lambda: models.vgg11(5, dropout=1.5), "dropout must be a probability between 0 and 1; got 1.5"),
        (lambda: models.vgg16(5, in_channels=True), "in_channels must be an integer >= 1; got True"),
    ],
)
def test_arguments_out_of_range_are_refused(call: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
