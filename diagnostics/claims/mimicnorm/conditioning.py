"""What the paper says of condition numbers: plain networks become singular, chaotic ones perfectly conditioned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

import mimicnorm
from diagnostics.claims.claim import Claim, Control, Outcome, Prediction, Size, Theory
from diagnostics.claims.mimicnorm.networks import PAPER, PLAIN, WEIGHT_MEAN, chain, correlated_inputs
from diagnostics.measurement import Measurement
from diagnostics.plots import Curve, spectrum_plot
from diagnostics.probes import KernelEntries, KernelSpectrum
from diagnostics.probes.kernel import constant_mode_ratio, exchangeable_condition_number
from diagnostics.subject import Subject

if TYPE_CHECKING:
    from matplotlib.figure import Figure

M = 10
DEPTHS = (1, 2, 5, 10)


def _by_depth(seed: int, width: int, *, wide_output: bool) -> Mapping[int, Subject]:
    x = correlated_inputs(M)
    return {depth: chain(seed, width, depth, PLAIN, x, outputs=width if wide_output else 1) for depth in DEPTHS}


def _condition_numbers(measurement: Measurement) -> np.ndarray:
    """κ at each depth of the kernel averaged over initializations and over the examples, which are exchangeable."""
    p, o = (measurement.select(statistic=s).estimate for s in ("diagonal", "off_diagonal"))
    return np.array([exchangeable_condition_number(*entries, M) for entries in zip(p, o, strict=True)])


def _slope(measurement: Measurement) -> float:
    depths = np.log(np.asarray(measurement.axes["depth"], dtype=float))
    return float(np.polyfit(depths, np.log(_condition_numbers(measurement)), 1)[0])


def _singular_theory(measurement: Measurement) -> Theory:
    from ntk.analytic import propagate

    kernels = propagate(0.5 * np.eye(M) + 0.5, max(DEPTHS), "none")
    depths = np.arange(1, max(DEPTHS) + 1)
    curves = {}
    for label, by_depth in (("NTK", kernels.ntk_by_depth), ("NNGP", kernels.nngp_by_depth)):
        curves[label] = depths.astype(float), np.linalg.cond(by_depth[1:])
    chosen = [depth - 1 for depth in DEPTHS]
    slope = np.polyfit(np.log(DEPTHS), np.log(curves["NTK"][1][chosen]), 1)[0]
    return Theory(float(slope), "mathematics §6.1 and §9.3", curves)


def _singular_picture(measurement: Measurement, theory: Theory) -> Figure:
    kappa = _condition_numbers(measurement)
    drawn = replace(measurement.select(statistic="diagonal"), estimate=kappa, standard_error=None, n=1, quantity="κ")
    return Curve("depth", xlabel="depth (activations)", ylabel="condition number", xscale="log", yscale="log")(
        drawn, theory
    )


PLAIN_NTK_SINGULAR = Claim(
    name="plain-ntk-singular",
    title="Plain deep networks have a singular NTK",
    statement="Without normalization the NTK of a deep ReLU network becomes nearly singular, which stops training.",
    source=PAPER,
    locator="Section on the frozen regime, Proposition 1",
    scope="Fully connected He-initialized ReLU chains, ten examples with pairwise correlation 0.5",
    probe=KernelEntries(),
    axis="depth",
    subjects=partial(_by_depth, wide_output=False),
    statistic=_slope,
    statistic_name="slope of log κ(NTK) against log depth",
    prediction=Prediction.at_least(0.0, "a kernel that becomes singular has a condition number that grows with depth"),
    theory=_singular_theory,
    expected=Outcome.REFUTED,
    explanation=(
        "The condition number of the plain NTK falls with depth, towards (m + 3)/3 for m examples: one outlier, "
        "the constant mode, while all other eigenvalues grow together. The kernel that does become singular is the "
        "NNGP, whose κ grows like the square of depth; the control shows it."
    ),
    control=Control(
        "the NNGP of the same networks in place of the NTK",
        {"probe": KernelEntries(kind="nngp"), "subjects": partial(_by_depth, wide_output=True)},
        Outcome.SUPPORTED,
    ),
    picture=_singular_picture,
    sizes={"quick": Size(16, 512), "full": Size(24, 1024)},
    minimum_n=8,
)

DEEP = 20


def _by_width(seed: int, width: int, *, method: mimicnorm.Method) -> Mapping[int, Subject]:
    return {n: chain(seed, n, DEEP, method, correlated_inputs(M)) for n in (width // 4, width // 2, width)}


def _kappa_theory(measurement: Measurement) -> Theory:
    from ntk.analytic import propagate

    eigenvalues = np.linalg.eigvalsh(propagate(0.5 * np.eye(M) + 0.5, DEEP, "weight_mean").ntk)[::-1]
    ranks = np.arange(1.0, M + 1)
    return Theory(
        float(eigenvalues[0] / eigenvalues[-1]),
        "mathematics §9.3, at infinite width only",
        {"infinite width": (ranks, eigenvalues / eigenvalues.mean())},
    )


def _ordered_ratio(measurement: Measurement) -> float:
    """κ of the widest network from its averaged ordered spectrum."""
    spectrum = measurement.select(width=measurement.axes["width"][-1]).estimate
    return float(spectrum[0] / spectrum[-1])


def _mean_kernel_ratio(measurement: Measurement) -> float:
    """Constant mode over the rest, of the kernel averaged before any eigenvalue is taken."""
    widest = measurement.select(width=measurement.axes["width"][-1])
    p, o = widest.value(statistic="diagonal"), widest.value(statistic="off_diagonal")
    return constant_mode_ratio(p, o, M)


PERFECT_CONDITIONING = Claim(
    name="perfect-conditioning",
    title="Deep weight-mean networks have κ = 1",
    statement="In the chaotic regime the condition number of the NTK converges to 1 with depth in real networks.",
    source=PAPER,
    locator="Theorem 1 and the section on the chaotic regime",
    scope="Fully connected weight-mean chains of depth 20 and width in the hundreds, ten examples with correlation 0.5",
    probe=KernelSpectrum(KernelEntries()),
    axis="width",
    subjects=partial(_by_width, method=WEIGHT_MEAN),
    statistic=_ordered_ratio,
    statistic_name="largest over smallest NTK eigenvalue of the widest network, each averaged over initializations",
    prediction=Prediction.point(1.000084197, 0.5, "the weight-mean recursion at depth 20 (mathematics §9.3)"),
    theory=_kappa_theory,
    expected=Outcome.REFUTED,
    explanation=(
        "At infinite width κ − 1 is indeed 8·10⁻⁵ at this depth. But a chaotic network amplifies the fluctuations "
        "of each layer: the diagonal entries of its kernel differ from example to example, and at widths in the "
        "hundreds its eigenvalues spread by a factor of several, narrowing only slowly with width."
    ),
    control=Control(
        "the same kernels averaged over initializations, which stand in for infinite width, before κ is taken",
        {"probe": KernelEntries(), "statistic": _mean_kernel_ratio},
        Outcome.SUPPORTED,
    ),
    picture=spectrum_plot("rank", "width", ylabel="eigenvalue of the NTK over their mean"),
    sizes={"quick": Size(10, 384), "full": Size(20, 1024)},
    minimum_n=8,
)

CLAIMS = (PLAIN_NTK_SINGULAR, PERFECT_CONDITIONING)
