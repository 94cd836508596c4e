"""What the paper says of BatchNorm networks, which weight mean is to mimic: Theorem 2 and its consequences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np

import mimicnorm
from diagnostics.claims.claim import Claim, Control, Outcome, Prediction, Size, Theory
from diagnostics.claims.mimicnorm.networks import BATCH_NORM, CHI_1, PAPER, WEIGHT_MEAN, chain, correlated_inputs
from diagnostics.measurement import Measurement
from diagnostics.plots import Curve
from diagnostics.probes import GradientGrowth, KernelEntries, Whitening
from diagnostics.probes.kernel import constant_mode_ratio
from diagnostics.subject import Subject

BATCHES = (8, 16, 64)


def _by_batch(seed: int, width: int, *, method: mimicnorm.Method) -> Mapping[int, Subject]:
    return {m: chain(seed, width, 10, method, correlated_inputs(m, 0.0)) for m in BATCHES}


def _growth_theory(measurement: Measurement) -> Theory:
    from ntk.analytic import gradient_growth

    batches = np.unique(np.geomspace(min(BATCHES), max(BATCHES), 40).round())
    curves = {
        "BatchNorm, λ_B": (batches, np.array([gradient_growth("batch_norm", int(b)) for b in batches])),
        "Theorem 2, π/(π − 1)": (batches, np.full(len(batches), CHI_1)),
    }
    return Theory(gradient_growth("batch_norm", BATCHES[0]), "mathematics §5.4, λ_B at B = 8", curves)


GRADIENT_GROWTH = Claim(
    name="batch-norm-growth",
    title="BatchNorm's χ₁ is 1/(1 − 1/π)",
    statement="A ReLU network with BatchNorm multiplies squared gradients by χ₁ = 1/(1 − 1/π) ≈ 1.467 per layer.",
    source=PAPER,
    locator="Theorem 2",
    scope="Fully connected chains, BatchNorm in train mode, finite batches; interior layers",
    probe=GradientGrowth(),
    axis="batch",
    subjects=partial(_by_batch, method=BATCH_NORM),
    statistic=lambda m: float(m.select(batch=BATCHES[0]).estimate.mean()),
    statistic_name="growth of the squared gradient per layer in a batch of 8",
    prediction=Prediction.point(CHI_1, 0.1, "Theorem 2: χ₁ = 1/(1 − 1/π), at any batch size"),
    theory=_growth_theory,
    expected=Outcome.REFUTED,
    explanation=(
        "The Jacobian of BatchNorm also runs through the batch's mean and variance, and its exact growth is "
        "λ_B = (B − 2 + J + J')/((B − 3)(1 − J)): 1.788 at B = 8, 1.493 at B = 64. Theorem 2's number is the limit of "
        "infinite batches only."
    ),
    control=Control(
        "weight mean in place of BatchNorm", {"subjects": partial(_by_batch, method=WEIGHT_MEAN)}, Outcome.SUPPORTED
    ),
    picture=Curve(
        "batch",
        select={"layer": 5},
        xlabel="batch size",
        ylabel="growth of the squared gradient, layer 5",
        xscale="log",
    ),
    sizes={"quick": Size(8, 512), "full": Size(16, 1024)},
    minimum_n=5,
)

NNGP_BATCH, NNGP_DEPTH = 8, 10


def _nngp_subjects(seed: int, width: int, *, method: mimicnorm.Method) -> Mapping[str, Subject]:
    return {"measured": chain(seed, width, NNGP_DEPTH, method, correlated_inputs(NNGP_BATCH, 0.0))}


def _nngp_theory(measurement: Measurement) -> Theory:
    from ntk.analytic import correlation_map

    depths = np.array([0.0, NNGP_DEPTH - 1.0])
    off = -1 / (NNGP_BATCH - 1)
    behind_relu = float(correlation_map("none")(off))
    curves = {
        "before ReLU, −1/(B − 1)": (depths, np.full(2, off)),
        "behind ReLU, J": (depths, np.full(2, behind_relu)),
    }
    return Theory(off, "mathematics §5.4: −1/(B − 1) at B = 8", curves)


NNGP_IDENTITY = Claim(
    name="batch-norm-nngp",
    title="BatchNorm's NNGP tends to the identity",
    statement="With depth the NNGP kernel of a BatchNorm network converges to the identity matrix.",
    source=PAPER,
    locator="Theorem 2 and its discussion",
    scope="Fully connected chains, BatchNorm in train mode, one batch of 8 uncorrelated examples",
    probe=Whitening(),
    axis="network",
    subjects=partial(_nngp_subjects, method=BATCH_NORM),
    statistic=lambda m: m.value(network="measured", depth=NNGP_DEPTH - 1, where="pre", statistic="off_diagonal"),
    statistic_name="mean correlation of pre-activations, 9 activations deep",
    prediction=Prediction.point(0.0, 0.1, "identity: no correlation between examples"),
    theory=_nngp_theory,
    expected=Outcome.REFUTED,
    explanation=(
        "BatchNorm makes each unit sum to zero over the batch, so the pre-activation kernel is (B/(B − 1))(I − "
        "11ᵀ/B): every pair is anticorrelated by −1/(B − 1) and the matrix is singular, at any depth. Behind the "
        "ReLU the correlation is J = 0.250 at B = 8 (1/π for large batches), which is not 0 either."
    ),
    control=Control(
        "weight mean in place of BatchNorm",
        {"subjects": partial(_nngp_subjects, method=WEIGHT_MEAN)},
        Outcome.SUPPORTED,
    ),
    picture=Curve(
        "depth",
        "where",
        {"network": "measured", "statistic": "off_diagonal"},
        xlabel="depth (activations)",
        ylabel="mean correlation",
    ),
    sizes={"quick": Size(10, 512), "full": Size(24, 1024)},
    minimum_n=5,
)

NTK_BATCH = 16
NTK_DEPTHS = (1, 2, 4)


def _ntk_subjects(seed: int, width: int, *, method: mimicnorm.Method) -> Mapping[int, Subject]:
    return {depth: chain(seed, width, depth, method, correlated_inputs(NTK_BATCH, 0.0)) for depth in NTK_DEPTHS}


def constant_mode(measurement: Measurement) -> float:
    """Eigenvalue of the constant mode over that of all others, at the last depth: 1 + B·o/(p − o)."""
    deep = measurement.select(depth=NTK_DEPTHS[-1])
    p, o = deep.value(statistic="diagonal"), deep.value(statistic="off_diagonal")
    return constant_mode_ratio(p, o, NTK_BATCH)


def _ntk_theory(measurement: Measurement) -> Theory:
    from ntk.analytic import propagate

    gram = np.eye(NTK_BATCH)
    depths = range(1, NTK_DEPTHS[-1] + 1)
    curves = {}
    for label, norm in (("BatchNorm", "batch_norm"), ("weight mean", "weight_mean")):
        kernels = propagate(gram, NTK_DEPTHS[-1], norm).ntk_by_depth[1:]
        curves[label] = (np.array(depths, dtype=float), kernels[:, 0, 1] / kernels[:, 0, 0])
    deep = propagate(gram, NTK_DEPTHS[-1], "batch_norm").ntk
    return Theory(
        constant_mode_ratio(float(deep[0, 0]), float(deep[0, 1]), NTK_BATCH),
        "mathematics §5.2: same-batch BatchNorm NTK, B = 16, D = 4",
        curves,
    )


def _ntk_ratio(measurement: Measurement) -> Measurement:
    """Off-diagonal over diagonal, for the picture."""
    p, o = (measurement.select(statistic=s) for s in ("diagonal", "off_diagonal"))
    relative = None if o.standard_error is None else o.standard_error / p.estimate
    return replace(
        o, estimate=o.estimate / p.estimate, standard_error=relative, quantity="off-diagonal over diagonal NTK"
    )


SAME_NTK = Claim(
    name="same-ntk",
    title="BatchNorm and weight mean share their NTK",
    statement="The NTK of a BatchNorm network has the same expression as that of a weight-mean network.",
    source=PAPER,
    locator="Theorems 2 and 3",
    scope="Fully connected chains, one batch of 16 uncorrelated examples in train mode, four activations deep",
    probe=KernelEntries(),
    axis="depth",
    subjects=partial(_ntk_subjects, method=BATCH_NORM),
    statistic=constant_mode,
    statistic_name="eigenvalue of the constant mode over that of all others",
    prediction=Prediction.point(1.0, 0.2, "the weight-mean recursion leaves uncorrelated inputs so (mathematics §4.3)"),
    theory=_ntk_theory,
    expected=Outcome.REFUTED,
    explanation=(
        "On uncorrelated inputs the weight-mean kernel is a multiple of the identity at every depth. BatchNorm's "
        "also runs through the batch's mean and variance, which leaves negative entries of the order of 1/B off "
        "the diagonal, and B of them act together on the constant vector: it is slower than all other modes, and "
        "more so with depth."
    ),
    control=Control(
        "weight mean in place of BatchNorm", {"subjects": partial(_ntk_subjects, method=WEIGHT_MEAN)}, Outcome.SUPPORTED
    ),
    picture=lambda measurement, theory: Curve("depth", xlabel="depth (activations)", ylabel="Θ(x, x')/Θ(x, x)")(
        _ntk_ratio(measurement), theory
    ),
    sizes={"quick": Size(10, 512), "full": Size(16, 1024)},
    minimum_n=8,
)

CLAIMS = (GRADIENT_GROWTH, NNGP_IDENTITY, SAME_NTK)
