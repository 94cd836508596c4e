"""The fully connected network of docs/mathematics.md §1.1."""

from collections import OrderedDict

import torch
from torch import nn

from mimicnorm._validation import check_choice, check_count, check_number
from mimicnorm.models._build import he_initialize_, isolated
from mimicnorm.normalization import ExactBatchNorm1d

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


def fcnn(
    in_features: int,
    width: int,
    depth: int,
    out_features: int,
    *,
    affine: bool = True,
    bias: bool = False,
    eps: float = 1e-5,
    activation: str = "relu",
    generator: torch.Generator | None = None,
) -> nn.Sequential:
    """A fully connected network in its BatchNorm form: (Linear, BatchNorm1d, activation) x depth, Linear.

    Source: MimicNorm (arXiv 2010.09278), section on the mean-field analysis. `depth` counts activations, so there are
    depth + 1 weight matrices. Weights are drawn after He (variance 2 / fan-in, 1 / fan-in for the first), whatever the
    activation.

    Args:
        in_features: Input size d; the network takes [N, d].
        width: Units per hidden layer.
        depth: Number of activations; 0 gives a linear network.
        out_features: Output size C; the network returns [N, C].
        affine: Whether BatchNorm has a learnable gain and shift.
        bias: Whether the last Linear has a bias. Hidden ones have none: BatchNorm would cancel it.
        eps: Added to BatchNorm's variance; 0 is admitted.
        activation: "relu", "tanh" or "gelu".
        generator: Source of randomness; the global one is then left alone. None for the global one.

    Returns:
        The network, in train mode.

    Raises:
        ValueError: If a size is not a positive integer, eps is negative, or the activation is unknown.
    """
    for parameter, value in (("in_features", in_features), ("width", width), ("out_features", out_features)):
        check_count(parameter, value)
    check_count("depth", depth, minimum=0)
    check_number("eps", eps, minimum=0.0)
    check_choice("activation", activation, ACTIVATIONS)
    norm = nn.BatchNorm1d if eps > 0 else ExactBatchNorm1d
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    features = in_features
    with isolated(generator):
        for index in range(1, depth + 1):
            layers[f"linear{index}"] = nn.Linear(features, width, bias=False)
            layers[f"norm{index}"] = norm(width, eps=eps, affine=affine)
            layers[f"{activation}{index}"] = ACTIVATIONS[activation]()
            features = width
        layers[f"linear{depth + 1}"] = nn.Linear(features, out_features, bias=bias)
        network = nn.Sequential(layers)
    he_initialize_(network, generator)
    return network
