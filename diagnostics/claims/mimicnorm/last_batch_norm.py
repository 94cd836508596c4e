"""What the paper says that the last BatchNorm does: it tunes the learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import torch

import mimicnorm
from diagnostics.claims.claim import Claim, Control, Outcome, Prediction, Size, Theory
from diagnostics.claims.mimicnorm.networks import (
    MIMICNORM,
    PAPER,
    PLAIN_WITH_LAST_BATCH_NORM,
    chain,
    correlated_inputs,
)
from diagnostics.data import digits_images, digits_vectors
from diagnostics.measurement import Measurement
from diagnostics.plots import Curve
from diagnostics.probes import RateStability, ScaleInvariance, Sharpness
from diagnostics.subject import Subject

M = 10
DEPTHS = (1, 5, 10, 20)
DRAWS = 4000
WIDE = 10**6
"""Width of the network in theory; the probe takes weights as stored, where the first layer's share vanishes with it."""


def _by_depth(seed: int, width: int, *, depths: tuple[int, ...] = DEPTHS) -> Mapping[int, Subject]:
    x = correlated_inputs(M, dtype=torch.float64)
    return {depth: chain(seed, width, depth, PLAIN_WITH_LAST_BATCH_NORM, x) for depth in depths}


def _sharpness_theory(measurement: Measurement) -> Theory:
    """Mean of log10 λ_max(J Θ Jᵀ)/λ_max(Θ) over outputs f ~ N(0, K), with J the Jacobian of BatchNorm at f."""
    from ntk.analytic import propagate

    generator = np.random.default_rng(0)
    mean = []
    for depth in DEPTHS:
        widths = (M, *[WIDE] * depth)
        kernels = propagate(0.5 * np.eye(M) + 0.5, depth, "none", parametrization="standard", width=widths)
        factor = np.linalg.cholesky(kernels.nngp)
        f = generator.standard_normal((DRAWS, M)) @ factor.T
        f -= f.mean(axis=1, keepdims=True)
        sigma = np.sqrt((f**2).mean(axis=1))
        z = f / sigma[:, None]
        jacobian = (np.eye(M) - 1 / M - z[:, :, None] * z[:, None, :] / M) / sigma[:, None, None]
        largest = np.linalg.eigvalsh(jacobian @ kernels.ntk @ jacobian)[:, -1]
        mean.append(np.log10(largest / np.linalg.eigvalsh(kernels.ntk)[-1]).mean())
    depths = np.array(DEPTHS, dtype=float)
    return Theory(
        float(mean[-1]), f"mathematics §7.3, over {DRAWS} draws", {"infinite width": (depths, np.array(mean))}
    )


LOWERS_SHARPNESS = Claim(
    name="last-batch-norm-sharpness",
    title="The last BatchNorm lowers sharpness",
    statement="One BatchNorm before the loss tunes the learning rate because it shrinks the gradient from the start.",
    source=PAPER,
    locator="Section on the last BatchNorm",
    scope="Deep fully connected ReLU chains at initialization, one batch of ten with correlation 0.5",
    probe=Sharpness(),
    axis="depth",
    subjects=_by_depth,
    statistic=lambda m: m.value(depth=DEPTHS[-1]),
    statistic_name="log10 of λ_max with the last BatchNorm over λ_max without, depth 20",
    prediction=Prediction.at_most(0.0, "a smaller gradient at the same weights means a smaller λ_max"),
    theory=_sharpness_theory,
    expected=Outcome.REFUTED,
    explanation=(
        "The last BatchNorm divides by the logits' standard deviation σ over the batch, so the kernel grows by "
        "1/σ², and in a deep network, whose logits are almost equal, σ is far below 1: at initialization the "
        "loss becomes sharper, not flatter. At depth 1, the control, it also removes the constant mode, the "
        "outlier of the kernel, which outweighs 1/σ²."
    ),
    control=Control(
        "depth 1 in place of 20",
        {"subjects": partial(_by_depth, depths=(1,)), "statistic": lambda m: m.value(depth=1)},
        Outcome.SUPPORTED,
    ),
    picture=Curve(
        "depth",
        xlabel="depth (activations)",
        ylabel="log10 of the sharpness ratio",
        reference=0.0,
        reference_label="unchanged",
    ),
    sizes={"quick": Size(16, 256), "full": Size(60, 512)},
    minimum_n=10,
)


def _rate_subjects(seed: int, width: int, *, method: mimicnorm.Method) -> Mapping[str, Subject]:
    return {"measured": chain(seed, width, 5, method, correlated_inputs(M, dtype=torch.float64))}


LARGE_RATES = Claim(
    name="large-learning-rates",
    title="The last BatchNorm survives large learning rates",
    statement="One BatchNorm before the loss keeps training stable at learning rates that are fatal without it.",
    source=PAPER,
    locator="Section on the last BatchNorm, Table 2",
    scope="Weight-mean chains of depth 5, full-batch gradient descent on ten examples",
    probe=RateStability(),
    axis="network",
    subjects=partial(_rate_subjects, method=MIMICNORM),
    statistic=lambda m: m.value(network="measured", multiple=10.0, statistic="loss"),
    statistic_name="log10 of final over initial loss at ten times the critical rate 2/λ_max",
    prediction=Prediction.at_most(0.0, "stable training does not raise the loss"),
    theory=lambda m: Theory(
        float("nan"), "mathematics §7.4: norms grow until ηλ_max falls below 2; no value is predicted"
    ),
    expected=Outcome.SUPPORTED,
    explanation=(
        "The mechanism is not a smaller gradient at the start: the loss ignores the scale of the weights, a "
        "gradient step orthogonal to them makes their norm grow, and a larger norm means a smaller effective "
        "rate, until the step is stable. The picture shows it: the norm grows with the rate while the loss still falls."
    ),
    control=Control(
        "last BatchNorm dropped",
        {"subjects": partial(_rate_subjects, method=replace(MIMICNORM, last_batch_norm=False))},
        Outcome.REFUTED,
    ),
    picture=Curve(
        "multiple",
        "statistic",
        {"network": "measured"},
        xlabel="learning rate in units of 2/λ_max",
        ylabel="log10, final over initial",
        xscale="log",
    ),
    sizes={"quick": Size(6, 256), "full": Size(16, 512)},
    minimum_n=5,
)


def _residual(seed: int, width: int) -> Mapping[str, Subject]:
    x, y = digits_images(dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    model = mimicnorm.models.resnet18(10, width=width / 64, generator=generator).double()
    return {"measured": Subject(model, x[:32, :, ::2, ::2], y[:32], mimicnorm.MimicNorm(), seed, "residual network")}


def _bias_free_chain(seed: int, width: int) -> Mapping[str, Subject]:
    x, y = digits_vectors(dtype=torch.float64)
    return {"measured": chain(seed, 8 * width, 5, MIMICNORM, x[:32], y=y[:32], outputs=10)}


SCALE_INVARIANCE = Claim(
    name="scale-invariance",
    title="The loss ignores the scale of each layer",
    statement="Behind the last BatchNorm the loss is invariant to the scale of every layer's weights.",
    source=PAPER,
    locator="Section on the last BatchNorm",
    scope="Residual networks as published: convolutions with biases, branch scalars, ε = 1e-5",
    probe=ScaleInvariance(),
    axis="network",
    subjects=_residual,
    statistic=lambda m: float(np.log10(m.estimate.max())),
    statistic_name="log10 of the mean |cosine| of a weight and its gradient, in the layer where it is largest",
    prediction=Prediction.at_most(
        -10.0, "exact invariance makes each gradient orthogonal to its weight, up to rounding"
    ),
    theory=lambda m: Theory(float("nan"), "mathematics §7.2: no invariance, hence no value"),
    expected=Outcome.REFUTED,
    explanation=(
        "Scaling a branch changes its weight relative to the shortcut, and scaling a layer leaves its bias behind, "
        "so only the rows of the last layer and joint scalings are free. The invariance is exact for bias-free "
        "chains without ε, where the control finds every cosine at rounding level."
    ),
    control=Control(
        "a bias-free chain with ε = 0 in place of the residual network",
        {"subjects": _bias_free_chain},
        Outcome.SUPPORTED,
    ),
    picture=Curve(
        "layer", select={"network": "measured"}, xlabel="layer", ylabel="|cosine| of weight and gradient", reference=0.0
    ),
    sizes={"quick": Size(5, 8), "full": Size(10, 16)},
    minimum_n=3,
)

CLAIMS = (LOWERS_SHARPNESS, LARGE_RATES, SCALE_INVARIANCE)
