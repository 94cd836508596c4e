"""The catalogue: every claim is complete, its numbers are those of theory, and its picture can be drawn."""

from __future__ import annotations

import math
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, replace
from itertools import pairwise

import numpy as np
import pytest

from diagnostics.claims import CLAIMS, Claim, Outcome, Prediction, Size
from diagnostics.claims.claim import decide
from diagnostics.claims.mimicnorm.networks import CHI_1
from diagnostics.measurement import Measurement, pool
from diagnostics.plots import to_svg
from diagnostics.probes import PROBES, LearningRateRange, Probe, RateStability
from diagnostics.statistics import Estimate
from diagnostics.verification import PROFILES, examine, replicate
from ntk.analytic import correlation_map, gradient_growth, propagate
from tests.diagnostics import synthetic_claims

EVERY_CLAIM = pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
PAIR = np.array([[1.0, 0.5], [0.5, 1.0]])


def exchangeable(m: int) -> np.ndarray:
    return 0.5 * np.eye(m) + 0.5


def sentences(text: str) -> int:
    return len(re.findall(r"[.!?](?=\s|$)", text))


def test_sentences_are_counted_by_their_ends():
    assert sentences("One is 1.5 at B = 8, and Θ too. Two?") == 2
    assert sentences("None") == 0


def faults(claim: Claim) -> set[str]:
    """What is missing from a claim, by name."""
    texts = (claim.title, claim.source, claim.locator, claim.scope, claim.statistic_name, claim.prediction.source)
    checks = {
        "a name that can be typed and can name a file": bool(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", claim.name)),
        "texts": all(text.strip() == text and text for text in texts),
        "a title that fits a table": len(claim.title) <= 60 and not claim.title.endswith("."),
        "a statement in one sentence": sentences(claim.statement) == 1 and claim.statement.endswith("."),
        "an explanation in two sentences": sentences(claim.explanation) == 2 and claim.explanation.endswith("."),
        "an expectation": claim.expected in (Outcome.SUPPORTED, Outcome.REFUTED),
        "a control": claim.control is not None,
        "a control that is described": claim.control is not None and bool(claim.control.description.strip()),
        "a control that differs": claim.control is not None
        and claim.control.expected in (Outcome.SUPPORTED, Outcome.REFUTED)
        and claim.control.expected is not claim.expected,
        "a control that changes a field of the claim": claim.control is not None
        and bool(claim.control.changes)
        and set(claim.control.changes) <= {"subjects", "probe", "statistic"},
        "a size for each profile": set(claim.sizes) == set(PROFILES),
        "enough seeds": all(size.seeds >= claim.minimum_n for size in claim.sizes.values()),
        "a full profile that does not shrink": all(
            getattr(small, f.name) <= getattr(large, f.name)
            for small, large in pairwise(claim.sizes[profile] for profile in PROFILES if profile in claim.sizes)
            for f in fields(Size)
        ),
        "a probe": isinstance(claim.probe, Probe) and claim.probe.name in PROBES,
        "an ordered prediction": claim.prediction.low <= claim.prediction.high,
        "a resolution for a point": claim.prediction.low != claim.prediction.high
        or 0 < claim.prediction.resolution < math.inf,
        "more than one replication behind an interval": claim.minimum_n >= 3 or claim.probe.name == "memory",
    }
    return {what for what, there in checks.items() if not there}


@EVERY_CLAIM
def test_every_claim_is_complete(claim):
    assert faults(claim) == set()


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"name": "Two Words"}, "a name that can be typed and can name a file"),
        ({"locator": ""}, "texts"),
        ({"title": "x" * 61}, "a title that fits a table"),
        ({"statement": "It halves"}, "a statement in one sentence"),
        ({"statement": "It halves. It does."}, "a statement in one sentence"),
        ({"explanation": "Because."}, "an explanation in two sentences"),
        ({"expected": Outcome.INCONCLUSIVE}, "an expectation"),
        ({"control": replace(CLAIMS["whitening"].control, expected=Outcome.SUPPORTED)}, "a control that differs"),
        ({"control": replace(CLAIMS["whitening"].control, changes={})}, "a control that changes a field of the claim"),
        (
            {"control": replace(CLAIMS["whitening"].control, changes={"prediction": None})},
            "a control that changes a field of the claim",
        ),
        ({"sizes": {"quick": Size(5, 8)}}, "a size for each profile"),
        ({"minimum_n": 11}, "enough seeds"),
        ({"sizes": {"quick": Size(9, 8), "full": Size(9, 7)}}, "a full profile that does not shrink"),
        ({"prediction": Prediction(1.0, -1.0, "a table")}, "an ordered prediction"),
        ({"prediction": Prediction(1.0, 1.0, "a table")}, "a resolution for a point"),
        ({"minimum_n": 1}, "more than one replication behind an interval"),
    ],
)
def test_an_incomplete_claim_is_noticed(changes, fault):
    assert faults(replace(CLAIMS["whitening"], **changes)) == {fault}


def test_claims_are_listed_under_their_names():
    assert all(claim.name == name for name, claim in CLAIMS.items())
    for what in ("title", "statement", "explanation"):
        assert len({getattr(claim, what) for claim in CLAIMS.values()}) == len(CLAIMS)
    assert len(CLAIMS) == 16


@EVERY_CLAIM
def test_a_claim_cannot_be_edited(claim):
    with pytest.raises(FrozenInstanceError):
        claim.expected = Outcome.NOT_RUN


# Numbers.


def mode_ratio(kernel: np.ndarray) -> float:
    return float((kernel[0, 0] + (len(kernel) - 1) * kernel[0, 1]) / (kernel[0, 0] - kernel[0, 1]))


def scatter() -> float:
    """The standard deviation of pair correlations times √width, in theory."""
    return math.sqrt(1 + 1 / (1 - float(correlation_map("weight_mean").derivative(0.0)) ** 2))


PREDICTED: dict[str, Callable[[], float]] = {
    "correlation-map": lambda: float(correlation_map("weight_mean")(0.5)),
    "chaotic-regime": lambda: correlation_map("weight_mean").chi_1,
    "weight-mean-ntk": lambda: float(propagate(PAIR, 5, "weight_mean").ntk[0, 1]),
    "batch-norm-growth": lambda: gradient_growth("weight_mean"),
    "same-ntk": lambda: mode_ratio(propagate(np.eye(16), 4, "weight_mean").ntk),
    "perfect-conditioning": lambda: float(np.linalg.cond(propagate(exchangeable(10), 20, "weight_mean").ntk)),
}
"""Predictions that a formula gives; the others are a zero or a figure of the paper."""

FIGURES = {
    "whitening": (-0.2, 0.2),
    "correlation-scatter": (0.15 / 2 * math.sqrt(300), 0.25 / 2 * math.sqrt(300)),
    "batch-norm-nngp": (0.0, 0.0),
    "plain-ntk-singular": (0.0, math.inf),
    "last-batch-norm-sharpness": (-math.inf, 0.0),
    "large-learning-rates": (-math.inf, 0.0),
    "scale-invariance": (-math.inf, -10.0),
    "projection-equivalence": (-math.inf, -12.0),
    "learning-rate-range": (8.8, math.inf),
    "memory-saving": (20.0, math.inf),
}

DIGITS: dict[str, float] = {}
"""Relative error that the printed digits of a constant admit, where that is not 1e-6."""


@pytest.mark.parametrize("name", PREDICTED)
def test_a_predicted_point_is_the_analytic_value(name):
    prediction = CLAIMS[name].prediction
    assert prediction.low == prediction.high
    assert prediction.low == pytest.approx(PREDICTED[name](), rel=DIGITS.get(name, 1e-6))


def test_every_prediction_is_a_formula_or_a_figure():
    assert set(PREDICTED) | set(FIGURES) == set(CLAIMS)
    assert set(PREDICTED).isdisjoint(FIGURES)
    for name, bounds in FIGURES.items():
        assert (CLAIMS[name].prediction.low, CLAIMS[name].prediction.high) == bounds


def test_chi_1_is_one_number_everywhere():
    assert gradient_growth("weight_mean") == pytest.approx(CHI_1, rel=1e-14)
    assert 1 / (1 - 1 / math.pi) == pytest.approx(CHI_1, rel=1e-14)


@pytest.mark.parametrize(
    ("name", "figure"),
    [
        ("chaotic-regime", lambda: f"{CHI_1:.3f}"),
        ("batch-norm-growth", lambda: f"{gradient_growth('batch_norm', 8):.3f} at B = 8"),
        ("batch-norm-growth", lambda: f"{gradient_growth('batch_norm', 64):.3f} at B = 64"),
        ("batch-norm-nngp", lambda: f"J = {float(correlation_map('none')(-1 / 7)):.3f} at B = 8"),
        ("perfect-conditioning", lambda: f"{1e5 * (PREDICTED['perfect-conditioning']() - 1):.0f}·10⁻⁵"),
        ("whitening", lambda: f"T̄'(0) = {float(correlation_map('weight_mean').derivative(0.0)):.4f}"),
        ("whitening", lambda: f"about {propagate(PAIR, 15, 'weight_mean').nngp[0, 1]:.2f} after fifteen"),
        ("correlation-scatter", lambda: f"{scatter() ** 2:.3f}/n"),
        ("correlation-scatter", lambda: f"{scatter() / math.sqrt(300):.3f} at width 300"),
    ],
)
def test_figures_in_explanations_are_those_of_theory(name, figure):
    assert figure() in CLAIMS[name].explanation


# Theory and pictures, on one cheap measurement of each claim.

CHEAP: dict[str, Size] = {
    "correlation-scatter": Size(2, 32),
    "perfect-conditioning": Size(2, 128),
    "scale-invariance": Size(2, 4),
    "learning-rate-range": Size(1, 8),
    "memory-saving": Size(1, 4),
}


@pytest.fixture(scope="module")
def cheaply() -> Callable[[str], tuple[Claim, Measurement]]:
    """The claim of that name with fewer steps, and a pooled measurement of small networks."""
    done: dict[str, tuple[Claim, Measurement]] = {}

    def measured(name: str) -> tuple[Claim, Measurement]:
        if name not in done:
            claim, size = CLAIMS[name], CHEAP.get(name, Size(2, 16))
            if isinstance(claim.probe, LearningRateRange):
                claim = replace(claim, probe=replace(claim.probe, epochs=1))
            if isinstance(claim.probe, RateStability):
                claim = replace(claim, probe=replace(claim.probe, steps=5))
            done[name] = claim, pool(replicate(claim, range(size.seeds), size.width))
        return done[name]

    return measured


@pytest.mark.parametrize("name", CLAIMS)
def test_every_measurement_has_the_axes_that_its_statistic_reads(cheaply, name):
    claim, measurement = cheaply(name)
    assert next(iter(measurement.axes)) == claim.axis
    assert math.isfinite(claim.statistic(measurement))
    assert measurement.seeds == tuple(range(measurement.n))


FINITE_WIDTH = {"perfect-conditioning": "theory speaks of infinite width, and the claim of networks one can train"}
"""Claims whose expected outcome is not that of the theory drawn beside them, and why."""


@pytest.mark.parametrize("name", CLAIMS)
def test_theory_itself_gives_the_expected_outcome(cheaply, name):
    claim, measurement = cheaply(name)
    theory = claim.theory(measurement)
    assert theory.source.strip()
    if math.isnan(theory.value):
        assert name not in FINITE_WIDTH
        return
    error = claim.prediction.resolution / 8 if math.isfinite(claim.prediction.resolution) else None
    outcome = decide(claim.prediction, Estimate(theory.value, error, claim.minimum_n), claim.minimum_n)
    assert (outcome is claim.expected) is (name not in FINITE_WIDTH)


@pytest.mark.parametrize("name", PREDICTED)
def test_theory_is_silent_or_says_its_number_from_the_formula(cheaply, name):
    claim, measurement = cheaply(name)
    value = claim.theory(measurement).value
    if claim.expected is Outcome.SUPPORTED or name in FINITE_WIDTH:
        assert value == pytest.approx(PREDICTED[name](), rel=1e-9)
    else:
        assert math.isnan(value) or value != pytest.approx(PREDICTED[name](), rel=0.1)


@pytest.mark.parametrize("name", CLAIMS)
def test_every_curve_of_theory_is_drawable(cheaply, name):
    claim, measurement = cheaply(name)
    for label, (x, y) in claim.theory(measurement).curves.items():
        assert label.strip()
        assert x.shape == y.shape
        assert x.ndim == 1
        assert len(x) >= 2
        assert np.isfinite(x).all()
        assert np.isfinite(y).all()


@pytest.mark.parametrize("name", CLAIMS)
def test_every_picture_draws(cheaply, name):
    claim, measurement = cheaply(name)
    figure = claim.picture(measurement, claim.theory(measurement))
    svg = ElementTree.fromstring(to_svg(figure, name=name, title=claim.title))
    drawn = [node for node in svg.iter() if node.tag.endswith(("}path", "}use", "}rect")) and node.attrib]
    texts = ["".join(node.itertext()) for node in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert len(drawn) > 10
    assert len([text for text in texts if text.strip()]) > 4
    for axes in figure.axes:
        assert axes.lines or axes.patches or axes.collections


# What a control changes.


@EVERY_CLAIM
def test_a_control_keeps_the_rule(claim):
    control = claim.controlled()
    for name in ("prediction", "minimum_n", "sizes", "axis", "theory"):
        assert getattr(control, name) is getattr(claim, name)
    for name in claim.control.changes:
        assert getattr(control, name) is claim.control.changes[name]
        assert getattr(control, name) is not getattr(claim, name)


def test_a_chain_is_the_network_of_the_theory():
    claim = CLAIMS["whitening"]
    subject = next(iter(claim.subjects(3, 8).values()))
    network = subject.network()
    assert [p.shape[0] for p in network.parameters()] == [8] * 16 + [1]
    assert {p.ndim for p in network.parameters()} == {2}, "no biases"
    assert subject.seed == 3
    assert subject.x.dtype is next(network.parameters()).dtype
    gram = subject.x @ subject.x.T / subject.x.shape[1]
    assert np.allclose(gram.numpy(), exchangeable(16))


@EVERY_CLAIM
def test_subjects_differ_by_seed_and_not_by_call(claim):
    width = CHEAP.get(claim.name, Size(1, 16)).width
    first, again, other = (claim.subjects(seed, width) for seed in (3, 3, 4))
    assert list(first) == list(again) == list(other)
    for coordinate, subject in first.items():
        weights, same, different = (next(s[coordinate].network().parameters()) for s in (first, again, other))
        assert bool((weights == same).all())
        assert not bool((weights == different).all())
        assert (subject.seed, other[coordinate].seed) == (3, 4)
        assert bool((subject.x == other[coordinate].x).all()), "the data are those of the claim, whatever the seed"


# What happens without the analytic kernels.


def small(name: str) -> Claim:
    return replace(CLAIMS[name], sizes={"quick": Size(2, 8)})


def test_without_the_analytic_kernels_a_claim_that_needs_them_is_not_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "ntk.analytic", None)
    finding = examine(small("whitening"))
    assert finding.verdict.outcome is Outcome.NOT_RUN
    assert "ntk.analytic" in finding.verdict.explanation
    assert finding.verdict.explanation.endswith("Install it and run this claim again.")
    assert finding.measurement is None
    assert finding.theory is None
    assert finding.control is None
    assert finding.verdict.estimate is None
    assert finding.verdict.prediction is CLAIMS["whitening"].prediction
    assert not finding.as_catalogued


def test_a_claim_that_does_not_need_them_is_still_decided(monkeypatch):
    monkeypatch.setitem(sys.modules, "ntk.analytic", None)
    finding = examine(replace(CLAIMS["projection-equivalence"], sizes={"quick": Size(3, 16)}))
    assert finding.verdict.outcome is Outcome.SUPPORTED
    assert finding.as_catalogued


def test_with_them_the_same_claim_is_run():
    assert examine(small("whitening")).verdict.outcome is not Outcome.NOT_RUN


def test_the_message_of_a_missing_package_reaches_the_reader():
    finding = examine(synthetic_claims.claim(theory=synthetic_claims.without_library))
    assert finding.verdict.explanation == "jaxlib is not installed. Install it and run this claim again."


def test_a_finding_holds_what_was_measured_and_judged():
    calls: list[tuple[int, int]] = []
    claim = replace(CLAIMS["projection-equivalence"], sizes={"quick": Size(9, 16)})
    finding = examine(claim, seeds=(4, 6, 8), progress=lambda c, done, total: calls.append((done, total)))
    assert finding.measurement.seeds == (4, 6, 8)
    assert finding.measurement.n == 3
    assert finding.verdict.estimate.n == 3
    assert finding.verdict.estimate.value == pytest.approx(claim.statistic(finding.measurement))
    assert finding.control.outcome is Outcome.REFUTED
    assert calls == [(done, 6) for done in range(1, 7)]
    assert finding.seconds >= 0


def test_a_departure_is_not_as_catalogued():
    claim = replace(CLAIMS["projection-equivalence"], sizes={"quick": Size(3, 16)}, expected=Outcome.REFUTED)
    assert not examine(claim).as_catalogued
    unchanged = replace(claim, expected=Outcome.SUPPORTED, control=replace(claim.control, changes={"axis": "network"}))
    finding = examine(unchanged)
    assert finding.verdict.outcome is Outcome.SUPPORTED
    assert not finding.as_catalogued, "a control that comes out like its claim proves nothing"
