"""What the paper promises to those who train: equivalent projections, a wider range of learning rates, less memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
from torch import nn

import mimicnorm
from diagnostics.claims.claim import Claim, Control, Outcome, Prediction, Size, Theory
from diagnostics.claims.mimicnorm.networks import PAPER, WEIGHT_MEAN, chain
from diagnostics.data import digits_images, digits_vectors, split
from diagnostics.measurement import Measurement
from diagnostics.plots import Bars, Curve
from diagnostics.probes import ActivationMemory, LearningRateRange, ProjectionEquivalence
from diagnostics.subject import Subject


def _digits_chain(seed: int, width: int) -> Mapping[str, Subject]:
    x, y = digits_vectors(dtype=torch.float64)
    return {"measured": chain(seed, width, 3, WEIGHT_MEAN, x[:64], y=y[:64], outputs=10)}


PROJECTION = Claim(
    name="projection-equivalence",
    title="Projecting in the forward or after the step is the same",
    statement="It does not matter whether the weight mean is taken off in the forward pass or after each step.",
    source=PAPER,
    locator="Supplement C",
    scope="SGD with Nesterov momentum and L2 weight decay; weights that start with zero mean",
    probe=ProjectionEquivalence(),
    axis="network",
    subjects=_digits_chain,
    statistic=lambda m: float(m.estimate.mean()),
    statistic_name="log10 of the largest weight difference after 30 steps",
    prediction=Prediction.at_most(-12.0, "equal up to float64 rounding over 30 steps"),
    theory=lambda m: Theory(-np.inf, "mathematics §4.5: identical trajectories"),
    expected=Outcome.SUPPORTED,
    explanation=(
        "P = I − 11ᵀ/n is idempotent and linear, and so are the recursions of SGD, momentum and L2 decay, so P "
        "commutes with them and both ways give the same weights to rounding. Adam divides entry by entry, which "
        "does not commute with P, and under it, in the control, the weights part by about 0.2 in thirty steps."
    ),
    control=Control("Adam in place of SGD", {"probe": ProjectionEquivalence("adam")}, Outcome.REFUTED),
    picture=Bars("network", label="log10 of the largest weight difference"),
    sizes={"quick": Size(4, 64), "full": Size(8, 128)},
    minimum_n=3,
)

RATES = (0.05, 0.2, 0.5, 1.0)
LARGE = RATES[1:]
METHODS: dict[str, mimicnorm.Method] = {
    "none": mimicnorm.NoNorm(),
    "weight mean only": mimicnorm.MimicNorm(last_batch_norm=False),
    "MimicNorm": mimicnorm.MimicNorm(),
    "BatchNorm": mimicnorm.BatchNorm(),
}


def _vgg(seed: int, width: int, *, methods: Mapping[str, mimicnorm.Method]) -> Mapping[str, Subject]:
    x, y, *_ = split(*digits_images(), train=640, seed=0)
    model = mimicnorm.models.vgg11(10, width=width / 512, generator=torch.Generator().manual_seed(seed))
    return {name: Subject(model, x, y, method, seed, f"VGG11 {name}") for name, method in methods.items()}


def _without_last_batch_norm(seed: int, width: int) -> Mapping[str, Subject]:
    """The network without its last BatchNorm in the place of MimicNorm, against another initialization of itself."""
    only = "weight mean only"
    return {
        "MimicNorm": _vgg(seed + 1000, width, methods={only: METHODS[only]})[only],
        **_vgg(seed, width, methods={only: METHODS[only]}),
    }


def _advantage(measurement: Measurement) -> float:
    """Mean accuracy at the large rates, MimicNorm's minus that of weight mean only, in percentage points."""
    return float(
        np.mean(
            [
                measurement.value(method="MimicNorm", rate=rate)
                - measurement.value(method="weight mean only", rate=rate)
                for rate in LARGE
            ]
        )
    )


LEARNING_RATE_RANGE = Claim(
    name="learning-rate-range",
    title="MimicNorm trains at large learning rates",
    statement="At learning rates of 0.2 and above MimicNorm trains a VGG that fails to train under weight mean alone.",
    source=PAPER,
    locator="Table 2",
    scope="Narrow VGG11 on handwritten digits as 3×32×32 images, SGD with momentum 0.9, no warm-up, first epochs",
    probe=LearningRateRange(rates=RATES, epochs=4, batch_size=64),
    axis="method",
    subjects=partial(_vgg, methods=METHODS),
    statistic=_advantage,
    statistic_name="accuracy at rates 0.2, 0.5 and 1.0, MimicNorm minus weight mean only, in points",
    prediction=Prediction.at_least(
        8.8, "Table 2: 38.4, 21.0 and 8.8 points at rates 0.2, 0.5 and 1.0; their smallest, for another data set"
    ),
    theory=lambda m: Theory(float("nan"), "mathematics §7.4 explains the mechanism; no accuracy is predicted"),
    expected=Outcome.SUPPORTED,
    explanation=(
        "Without the last BatchNorm the network diverges or stays near chance, 10%, at the large rates. With it the "
        "same network, from the same weights, learns at each of them."
    ),
    control=Control(
        "last BatchNorm dropped from MimicNorm",
        {
            "subjects": _without_last_batch_norm,
            "probe": LearningRateRange(rates=LARGE, epochs=4, batch_size=64),
        },
        Outcome.REFUTED,
    ),
    picture=Curve("rate", "method", xlabel="learning rate", ylabel="best test accuracy, %", xscale="log"),
    sizes={"quick": Size(6, 32), "full": Size(8, 64)},
    minimum_n=3,
)


def _networks(seed: int, width: int, *, mimicnorm_is: mimicnorm.Method) -> Mapping[str, Subject]:
    x = digits_images()[0][:8]
    methods = {"BatchNorm": mimicnorm.BatchNorm(), "MimicNorm": mimicnorm_is}
    models: dict[str, Callable[..., nn.Module]] = {
        "VGG11": mimicnorm.models.vgg11,
        "VGG16": mimicnorm.models.vgg16,
        "ResNet-18": mimicnorm.models.resnet18,
    }
    return {
        f"{model}, {name}": Subject(
            build(100, width=width / 64, generator=torch.Generator().manual_seed(seed)), x, None, method, seed
        )
        for model, build in models.items()
        for name, method in methods.items()
    }


def _saving(measurement: Measurement) -> float:
    """Smallest saving over the networks, in percent of BatchNorm."""
    bytes_of = dict(zip(measurement.axes["network"], measurement.estimate.tolist(), strict=True))
    models = {name.split(",")[0] for name in bytes_of}
    return min(100 * (1 - bytes_of[f"{model}, MimicNorm"] / bytes_of[f"{model}, BatchNorm"]) for model in models)


MEMORY_SAVING = Claim(
    name="memory-saving",
    title="MimicNorm saves memory",
    statement="MimicNorm keeps at least 20% less in memory for the backward pass than BatchNorm in the same network.",
    source=PAPER,
    locator="Tables 1 and 3, abstract",
    scope="Bytes saved for the backward pass (each storage once) in train mode at 3×32×32",
    probe=ActivationMemory(),
    axis="network",
    subjects=partial(_networks, mimicnorm_is=mimicnorm.MimicNorm()),
    statistic=_saving,
    statistic_name="smallest saving over the networks, in percent",
    prediction=Prediction.at_least(20.0, "abstract: about 20% less memory"),
    theory=lambda m: Theory(float("nan"), "none: memory is a question of implementation"),
    expected=Outcome.SUPPORTED,
    explanation=(
        "Each BatchNorm keeps its input for the backward pass besides what convolution and ReLU keep, and MimicNorm "
        "keeps one such tensor per residual branch at most. The paper read the driver's total, in which weights, "
        "gradients, momentum, workspace and the allocator's slack do not shrink: for these three networks its Table 1 "
        "gives savings of 4 to 7%, and 20% only for networks on ImageNet."
    ),
    control=Control(
        "BatchNorm in place of MimicNorm",
        {"subjects": partial(_networks, mimicnorm_is=mimicnorm.BatchNorm())},
        Outcome.REFUTED,
    ),
    picture=Bars("network", label="MiB saved for backward per example"),
    sizes={"quick": Size(1, 32), "full": Size(1, 64)},
)

CLAIMS = (PROJECTION, LEARNING_RATE_RANGE, MEMORY_SAVING)
