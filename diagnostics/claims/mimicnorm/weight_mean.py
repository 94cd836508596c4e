"""What the paper says that the weight mean does: Lemma 1, Theorem 3, Figures 2 and 3."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np

import mimicnorm
from diagnostics.claims.claim import Claim, Control, Outcome, Prediction, Size, Theory
from diagnostics.claims.mimicnorm.networks import (
    BATCH_NORM,
    CHI_1,
    PAPER,
    PLAIN,
    WEIGHT_MEAN,
    chain,
    correlated_inputs,
)
from diagnostics.measurement import Measurement
from diagnostics.plots import Curve
from diagnostics.probes import Correlation, GradientGrowth, KernelEntries, TransitionOperator
from diagnostics.subject import Subject

WHITENING_DEPTH, WHITENING_BATCH = 16, 16


JUDGED = "weight mean"
SIDE_BY_SIDE: dict[str, mimicnorm.Method] = {JUDGED: WEIGHT_MEAN, "plain": PLAIN, "BatchNorm": BATCH_NORM}
"""The judged network and, for the picture, those it is compared with."""
SWITCHED_OFF: dict[str, mimicnorm.Method] = {JUDGED: PLAIN}


def _networks(
    seed: int, width: int, *, methods: Mapping[str, mimicnorm.Method], depth: int, m: int
) -> Mapping[str, Subject]:
    x = correlated_inputs(m)
    return {name: chain(seed, width, depth, method, x) for name, method in methods.items()}


def _map_theory(measurement: Measurement) -> Theory:
    from ntk.analytic import correlation_map

    rho = np.linspace(-1, 1, 201)
    curves = {
        JUDGED: (rho, correlation_map("weight_mean")(rho)),
        "plain": (rho, correlation_map("none")(rho)),
    }
    return Theory(float(correlation_map("weight_mean")(0.5)), "mathematics §4.2, T̄(0.5)", curves)


CORRELATION_MAP = Claim(
    name="correlation-map",
    title="Weight mean changes the correlation map",
    statement="Subtracting the mean of each unit's weights turns the ReLU correlation map T into T̄, which tends to 0.",
    source=PAPER,
    locator="Lemma 1, Theorem 3, Figure 3",
    scope="Layers fed by a ReLU, initialization of Theorem 3, wide layers; pairs of equal norm",
    probe=TransitionOperator(),
    axis="network",
    subjects=partial(_networks, methods=SIDE_BY_SIDE, depth=4, m=4),
    statistic=lambda m: m.value(network=JUDGED, rho=0.5, statistic="correlation"),
    statistic_name="correlation behind one layer of a pair that enters with 0.5",
    prediction=Prediction.point(0.426422342012739, 0.02, "Theorem 3: T̄(0.5)"),
    theory=_map_theory,
    expected=Outcome.SUPPORTED,
    explanation=(
        "W(I − 11ᵀ/n)a = W(a − ā): weight mean subtracts from each example its mean activation, so the layer "
        "passes on the covariance of the ReLU instead of its second moment. Divided by its value at 1 that is "
        "T̄(ρ), and the pairs pushed through one real layer fall on that curve at every ρ, not on the plain one."
    ),
    control=Control(
        "weight mean switched off",
        {"subjects": partial(_networks, methods=SWITCHED_OFF, depth=4, m=4)},
        Outcome.REFUTED,
    ),
    picture=Curve(
        "rho",
        "network",
        {"statistic": "correlation"},
        xlabel="correlation in",
        ylabel="correlation out",
    ),
    sizes={"quick": Size(8, 512), "full": Size(24, 1024)},
    minimum_n=5,
)


GROWTH_BATCH = 8


def _growth_theory(measurement: Measurement) -> Theory:
    from ntk.analytic import gradient_growth

    layers = np.array([min(measurement.axes["layer"]), max(measurement.axes["layer"])], dtype=float)
    curves = {
        JUDGED: (layers, np.full(2, gradient_growth("weight_mean"))),
        "plain": (layers, np.full(2, gradient_growth("none"))),
        "BatchNorm": (layers, np.full(2, gradient_growth("batch_norm", GROWTH_BATCH))),
    }
    return Theory(gradient_growth("weight_mean"), "mathematics §4.2, χ₁ = π/(π − 1)", curves)


CHAOTIC_REGIME = Claim(
    name="chaotic-regime",
    title="Weight mean makes the network chaotic",
    statement="Weight mean moves a ReLU network into the chaotic regime: χ₁ rises from 1 to 1/(1 − 1/π) ≈ 1.467.",
    source=PAPER,
    locator="Theorem 3",
    scope="Fully connected chains at the initialization of Theorem 3; interior layers",
    probe=GradientGrowth(),
    axis="network",
    subjects=partial(_networks, methods=SIDE_BY_SIDE, depth=12, m=GROWTH_BATCH),
    statistic=lambda m: float(m.select(network=JUDGED).estimate.mean()),
    statistic_name="growth of the squared gradient per layer",
    prediction=Prediction.point(CHI_1, 0.04, "Theorem 3: χ₁ = 1/(1 − 1/π)"),
    theory=_growth_theory,
    expected=Outcome.SUPPORTED,
    explanation=(
        "A gradient passes a layer with the factor σ_w²E[φ'²] = σ_w²/2, and keeping the variance under weight mean "
        "takes σ_w² = 2π/(π − 1) in place of 2. So the price of decorrelation is a gradient that grows by 1.467 "
        "per layer, and the growth measured in real layers is that number."
    ),
    control=Control(
        "weight mean switched off",
        {"subjects": partial(_networks, methods=SWITCHED_OFF, depth=12, m=GROWTH_BATCH)},
        Outcome.REFUTED,
    ),
    picture=Curve("layer", "network", xlabel="layer", ylabel="growth of the squared gradient"),
    sizes={"quick": Size(16, 384), "full": Size(24, 1024)},
    minimum_n=5,
)


def _ntk_theory(measurement: Measurement) -> Theory:
    from ntk.analytic import propagate

    gram = 0.5 * np.eye(10) + 0.5
    depths = measurement.axes["depth"]
    curves = {}
    for label, projected in (("projected, J P Jᵀ", True), ("raw, J Jᵀ", False)):
        kernels = [propagate(gram, depth, "weight_mean", projected=projected).ntk for depth in depths]
        curves[label] = (np.array(depths, dtype=float), np.array([kernel[0, 1] for kernel in kernels]))
    return Theory(
        float(curves["projected, J P Jᵀ"][1][-1]), "mathematics §4.3 and §9.2: Θ off the diagonal, D = 5", curves
    )


def _by_depth(
    seed: int, width: int, *, method: mimicnorm.Method, depths: tuple[int, ...], m: int = 10
) -> Mapping[int, Subject]:
    return {depth: chain(seed, width, depth, method, correlated_inputs(m)) for depth in depths}


WEIGHT_MEAN_NTK = Claim(
    name="weight-mean-ntk",
    title="NTK recursion of a weight-mean network",
    statement="The NTK of a weight-mean network follows the plain recursion with T̄ in place of T.",
    source=PAPER,
    locator="Theorem 3 with equation (7)",
    scope="Fully connected chains, NTK parametrization, kernel of the weights that training can reach (J P Jᵀ)",
    probe=KernelEntries(),
    axis="depth",
    subjects=partial(_by_depth, method=WEIGHT_MEAN, depths=(1, 3, 5)),
    statistic=lambda m: m.value(depth=5, statistic="off_diagonal"),
    statistic_name="NTK of a pair with input correlation 0.5, five activations deep",
    prediction=Prediction.point(1.40151285448796, 0.3, "Θ₅ from the recursion with T̄ (mathematics §9.2)"),
    theory=_ntk_theory,
    expected=Outcome.SUPPORTED,
    explanation=(
        "Training with weight mean moves the weights only within rows of zero mean, so the kernel that governs it "
        "is J P Jᵀ, and its entries follow the recursion. The kernel of the raw weights, J Jᵀ, that automatic "
        "differentiation returns by default does not: every layer adds a spurious 1/(π − 1) to each entry."
    ),
    control=Control(
        "the projection left out of the kernel", {"probe": KernelEntries(projected=False)}, Outcome.REFUTED
    ),
    picture=Curve(
        "depth", select={"statistic": "off_diagonal"}, xlabel="depth (activations)", ylabel="NTK of a pair, Θ(x, x')"
    ),
    sizes={"quick": Size(64, 256), "full": Size(64, 512)},
    minimum_n=8,
)


def _whitening_theory(measurement: Measurement) -> Theory:
    from ntk.analytic import propagate

    pair = np.array([[1.0, 0.5], [0.5, 1.0]])
    depths = np.arange(WHITENING_DEPTH)
    curves = {
        label: (depths.astype(float), propagate(pair, WHITENING_DEPTH - 1, norm).nngp_by_depth[:, 0, 1])
        for label, norm in ((JUDGED, "weight_mean"), ("plain", "none"))
    }
    curves["BatchNorm"] = (depths.astype(float), np.full(len(depths), -1 / (WHITENING_BATCH - 1)))
    return Theory(
        float(curves[JUDGED][1][-1]),
        f"mathematics §4.2: K off the diagonal at depth {WHITENING_DEPTH - 1}",
        curves,
    )


WHITENING = Claim(
    name="whitening",
    title="Weight mean whitens activations",
    statement="In a weight-mean network the correlation of activations between examples converges to 0 with depth.",
    source=PAPER,
    locator="Section on weight mean, Figure 2",
    scope="Fully connected chains at initialization, examples with input correlation 0.5",
    probe=Correlation(),
    axis="network",
    subjects=partial(_networks, methods=SIDE_BY_SIDE, depth=WHITENING_DEPTH, m=WHITENING_BATCH),
    statistic=lambda m: m.value(network=JUDGED, statistic="mean", depth=WHITENING_DEPTH - 1),
    statistic_name="mean correlation of pairs, 15 activations deep",
    prediction=Prediction(-0.2, 0.2, "Figure 2: deep correlations lie within ±0.2 of 0"),
    theory=_whitening_theory,
    expected=Outcome.SUPPORTED,
    explanation=(
        "Near 0 the map T̄ contracts by T̄'(0) = 0.7335 per layer, so a correlation of 0.5 has fallen to about "
        "0.01 after fifteen. Without weight mean the only fixed point of T is 1, and the same inputs end almost "
        "identical."
    ),
    control=Control(
        "weight mean switched off",
        {"subjects": partial(_networks, methods=SWITCHED_OFF, depth=WHITENING_DEPTH, m=WHITENING_BATCH)},
        Outcome.REFUTED,
    ),
    picture=Curve(
        "depth",
        "network",
        {"statistic": "mean"},
        xlabel="depth (activations)",
        ylabel="mean correlation",
    ),
    sizes={"quick": Size(10, 512), "full": Size(24, 1024)},
    minimum_n=5,
)


SCATTER_DEPTH = 10


def _scatter_subjects(seed: int, width: int, *, method: mimicnorm.Method) -> Mapping[int, Subject]:
    x = correlated_inputs(40, 0.0)
    return {n: chain(seed, n, SCATTER_DEPTH, method, x) for n in (width // 4, width // 2, width)}


def _scatter_theory(measurement: Measurement) -> Theory:
    widths = np.geomspace(min(measurement.axes["width"]), max(measurement.axes["width"]), 50)
    constant = np.sqrt(1 + 1 / (1 - (CHI_1 / 2) ** 2))
    return Theory(
        float(constant), "mathematics §4.4: √(1 + 1/(1 − T̄'(0)²))", {"√(3.164/n)": (widths, constant / np.sqrt(widths))}
    )


def _scatter(measurement: Measurement) -> float:
    deep = measurement.select(depth=SCATTER_DEPTH - 1, statistic="std")
    return float(np.mean(deep.estimate * np.sqrt(np.asarray(deep.axes["width"]))))


CORRELATION_SCATTER = Claim(
    name="correlation-scatter",
    title="Correlations scatter by ±0.2 at width 300",
    statement="Deep activations of a weight-mean network of width 300 have correlations within about ±0.2.",
    source=PAPER,
    locator="Supplement, comparison at width 300",
    scope="Fully connected chains at initialization; correlation over the units of one layer",
    probe=Correlation(),
    axis="width",
    subjects=partial(_scatter_subjects, method=WEIGHT_MEAN),
    statistic=_scatter,
    statistic_name="standard deviation of the pair correlations times √width",
    prediction=Prediction(
        0.075 * np.sqrt(300),
        0.125 * np.sqrt(300),
        "Supplement: two standard deviations are 0.2, to one digit, at width 300",
    ),
    theory=_scatter_theory,
    expected=Outcome.SUPPORTED,
    explanation=(
        "Each layer adds noise of variance 1/n to a correlation and passes the old one on with factor T̄'(0), "
        "which sums to 3.164/n: a standard deviation of 0.103 at width 300. The scatter is therefore finite width, "
        "not a failure of mean field, and it falls as 1/√n as measured."
    ),
    control=Control(
        "weight mean switched off", {"subjects": partial(_scatter_subjects, method=PLAIN)}, Outcome.REFUTED
    ),
    picture=Curve(
        "width",
        select={"depth": SCATTER_DEPTH - 1, "statistic": "std"},
        xlabel="width",
        ylabel="standard deviation of correlations",
        xscale="log",
        yscale="log",
    ),
    sizes={"quick": Size(8, 600), "full": Size(24, 1200)},
    minimum_n=5,
)

CLAIMS = (CORRELATION_MAP, CHAOTIC_REGIME, WEIGHT_MEAN_NTK, WHITENING, CORRELATION_SCATTER)
