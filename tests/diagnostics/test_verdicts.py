"""Verdicts come out as catalogued, and breaking a method on purpose flips those that depend on what was broken.

Every claim keeps its prediction and its rule. Sizes are small ones at which the verdict is decided with room to spare;
the range of learning rates is cut to the rates and methods that its statistic reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

import mimicnorm
from diagnostics.claims import CLAIMS, Claim, Outcome, Size
from diagnostics.claims.mimicnorm.networks import (
    BATCH_NORM,
    MIMICNORM,
    PLAIN,
    PLAIN_WITH_LAST_BATCH_NORM,
    WEIGHT_MEAN,
)
from diagnostics.errors import UsageError
from diagnostics.measurement import Measurement
from diagnostics.probes import LearningRateRange
from diagnostics.statistics import Estimate, jackknife
from diagnostics.subject import Subject
from diagnostics.verification import examine, replicate
from ntk.analytic import gradient_growth, propagate

SUPPORTED, REFUTED = Outcome.SUPPORTED, Outcome.REFUTED

SIZES: dict[str, Size] = {
    "correlation-map": Size(16, 192),
    "chaotic-regime": Size(16, 384),
    "weight-mean-ntk": Size(64, 256),
    "whitening": Size(5, 128),
    "correlation-scatter": Size(5, 200),
    "batch-norm-growth": Size(8, 256),
    "batch-norm-nngp": Size(5, 128),
    "same-ntk": Size(12, 256),
    "plain-ntk-singular": Size(32, 128),
    "perfect-conditioning": Size(10, 128),
    "last-batch-norm-sharpness": Size(16, 128),
    "large-learning-rates": Size(5, 64),
    "scale-invariance": Size(3, 8),
    "projection-equivalence": Size(3, 32),
    "learning-rate-range": Size(4, 32),
    "memory-saving": Size(1, 8),
}


def reduced(name: str) -> Claim:
    """The claim at a size at which it is decided, without the subjects and rates that only its picture shows."""
    claim = replace(CLAIMS[name], sizes={"quick": SIZES[name]})
    if "subjects" not in claim.control.changes or "statistic" in claim.control.changes:
        return claim
    judged = list(claim.control.changes["subjects"](0, SIZES[name].width))

    def subjects(seed: int, width: int) -> Mapping[Any, Subject]:
        everything = claim.subjects(seed, width)
        return {coordinate: everything[coordinate] for coordinate in judged}

    if not isinstance(claim.probe, LearningRateRange):
        return replace(claim, subjects=subjects)
    probe = claim.control.changes["probe"]
    shorter = {**claim.control.changes, "probe": replace(probe, epochs=1, batch_size=320)}
    return replace(claim, subjects=subjects, probe=probe, control=replace(claim.control, changes=shorter))


def measured(claim: Claim, seeds: int) -> Sequence[Measurement]:
    return replicate(claim, range(seeds), claim.sizes["quick"].width)


@cache
def replications(name: str) -> Sequence[Measurement]:
    return measured(reduced(name), SIZES[name].seeds)


Mutation = Mapping[mimicnorm.Method, mimicnorm.Method]
"""Methods, and what each is replaced by."""


def mutated(claim: Claim, mutation: Mutation) -> Estimate:
    """The claim's statistic with methods replaced; sixteen replications are enough to see that it moved."""

    def subjects(seed: int, width: int) -> Mapping[Any, Subject]:
        given = claim.subjects(seed, width)
        assert any(subject.method in mutation for subject in given.values()), "nothing to break"
        return {key: replace(one, method=mutation.get(one.method, one.method)) for key, one in given.items()}

    seeds = min(claim.sizes["quick"].seeds, 16)
    return jackknife(claim.statistic, measured(replace(claim, subjects=subjects), seeds))


@pytest.mark.parametrize("name", CLAIMS)
def test_the_verdict_is_the_catalogued_one(name):
    claim = reduced(name)
    verdict = claim.judge(jackknife(claim.statistic, replications(name)))
    assert verdict.outcome is claim.expected, verdict
    assert verdict.explanation == claim.explanation


@pytest.mark.parametrize("name", CLAIMS)
def test_the_control_flips_the_verdict(name):
    control = reduced(name).controlled()
    verdict = control.judge(jackknife(control.statistic, measured(control, SIZES[name].seeds)))
    assert verdict.outcome is CLAIMS[name].control.expected, verdict
    assert verdict.outcome is not CLAIMS[name].expected


@pytest.mark.parametrize("name", CLAIMS)
def test_the_size_is_large_enough_and_the_rule_is_the_claim_s_own(name):
    claim = reduced(name)
    assert set(SIZES) == set(CLAIMS)
    assert claim.sizes["quick"].seeds >= claim.minimum_n
    for kept in ("prediction", "minimum_n", "statistic", "expected", "theory"):
        assert getattr(claim, kept) is getattr(CLAIMS[name], kept)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch-norm-growth", lambda: gradient_growth("batch_norm", 8)),
        ("batch-norm-nngp", lambda: -1 / 7),
        ("same-ntk", lambda: constant_mode(propagate(0.5 * np.eye(16) + 0.5, 4, "batch_norm").ntk)),
        ("whitening", lambda: float(propagate(np.array([[1, 0.5], [0.5, 1]]), 15, "weight_mean").nngp[0, 1])),
    ],
)
def test_where_theory_says_another_number_the_measurement_is_that_number(name, value):
    claim = reduced(name)
    low, high = jackknife(claim.statistic, replications(name)).interval
    # Terms of order 1/width are left out of theory; at these widths they stay below a hundredth.
    assert low - 0.01 <= value() <= high + 0.01
    assert high - low < 0.25


def constant_mode(kernel: np.ndarray) -> float:
    return float((kernel[0, 0] + (len(kernel) - 1) * kernel[0, 1]) / (kernel[0, 0] - kernel[0, 1]))


WITHOUT_LAST_BATCH_NORM = replace(MIMICNORM, last_batch_norm=False)
AS_PUBLISHED = mimicnorm.MimicNorm()

OFF: Mutation = {WEIGHT_MEAN: PLAIN, MIMICNORM: PLAIN_WITH_LAST_BATCH_NORM}
BATCH_NORM_INSTEAD: Mutation = {WEIGHT_MEAN: BATCH_NORM, AS_PUBLISHED: BATCH_NORM}
WEIGHT_MEAN_INSTEAD: Mutation = {BATCH_NORM: WEIGHT_MEAN}
NOTHING_INSTEAD: Mutation = {BATCH_NORM: PLAIN}
ADDED: Mutation = {WEIGHT_MEAN: MIMICNORM}
DROPPED: Mutation = {
    MIMICNORM: WITHOUT_LAST_BATCH_NORM,
    AS_PUBLISHED: replace(AS_PUBLISHED, last_batch_norm=False),
}

FLIPPED = [
    ("correlation-map", "weight mean switched off", OFF),
    ("chaotic-regime", "weight mean switched off", OFF),
    ("chaotic-regime", "BatchNorm in place of weight mean", BATCH_NORM_INSTEAD),
    ("weight-mean-ntk", "weight mean switched off", OFF),
    ("weight-mean-ntk", "BatchNorm in place of weight mean", BATCH_NORM_INSTEAD),
    ("whitening", "weight mean switched off", OFF),
    ("correlation-scatter", "weight mean switched off", OFF),
    ("batch-norm-growth", "weight mean in place of BatchNorm", WEIGHT_MEAN_INSTEAD),
    ("batch-norm-nngp", "weight mean in place of BatchNorm", WEIGHT_MEAN_INSTEAD),
    ("same-ntk", "weight mean in place of BatchNorm", WEIGHT_MEAN_INSTEAD),
    ("large-learning-rates", "last BatchNorm dropped", DROPPED),
    ("memory-saving", "BatchNorm in place of MimicNorm", BATCH_NORM_INSTEAD),
]

UNMOVED = [
    ("correlation-map", "BatchNorm in place of weight mean: in a large batch it has the same map", BATCH_NORM_INSTEAD),
    ("correlation-map", "a last BatchNorm added: it lies behind the layer", ADDED),
    ("chaotic-regime", "a last BatchNorm added: interior layers do not see it", ADDED),
    ("whitening", "BatchNorm in place of weight mean: -1/15 is small too", BATCH_NORM_INSTEAD),
    ("large-learning-rates", "weight mean switched off: the last BatchNorm does it", OFF),
    ("memory-saving", "last BatchNorm dropped: it is small", DROPPED),
]


def named(cases: Sequence[tuple[str, str, Mutation]]) -> list[Any]:
    return [pytest.param(name, mutation, id=f"{name}: {what}") for name, what, mutation in cases]


@pytest.mark.parametrize(("name", "mutation"), named(FLIPPED))
def test_breaking_what_a_claim_depends_on_flips_its_verdict(name, mutation):
    claim = reduced(name)
    outcome = claim.judge(mutated(claim, mutation)).outcome
    assert outcome in (SUPPORTED, REFUTED)
    assert outcome is not claim.expected


@pytest.mark.parametrize(("name", "mutation"), named(UNMOVED))
def test_breaking_what_a_claim_does_not_depend_on_leaves_its_verdict(name, mutation):
    claim = reduced(name)
    assert claim.judge(mutated(claim, mutation)).outcome is claim.expected


@pytest.mark.parametrize("name", ["batch-norm-growth", "batch-norm-nngp", "same-ntk"])
def test_a_plain_network_is_refuted_where_batch_norm_is_and_differs_from_it(name):
    claim = reduced(name)
    plain = mutated(claim, NOTHING_INSTEAD)
    assert claim.judge(plain).outcome is REFUTED
    low, high = jackknife(claim.statistic, replications(name)).interval
    assert plain.interval[0] > high or plain.interval[1] < low


def chain_control(**changes: Any) -> Outcome:
    """The verdict of scale invariance on the bias-free chain of its control, with its method changed."""
    control = reduced("scale-invariance").controlled()
    return control.judge(mutated(control, {MIMICNORM: replace(MIMICNORM, **changes)})).outcome


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, SUPPORTED),
        ({"weight_mean": False}, SUPPORTED),
        ({"last_batch_norm": False}, REFUTED),
        ({"eps": 1e-5}, REFUTED),
        ({"bias": True}, REFUTED),
    ],
    ids=["as it is", "weight mean switched off", "last BatchNorm dropped", "with epsilon", "with biases"],
)
def test_scale_invariance_of_a_chain_hangs_on_the_last_batch_norm_alone(changes, expected):
    assert chain_control(**changes) is expected


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("projection-equivalence", {"method": PLAIN}),
        ("projection-equivalence", {"method": BATCH_NORM}),
        ("last-batch-norm-sharpness", {"method": WEIGHT_MEAN}),
        ("last-batch-norm-sharpness", {"method": BATCH_NORM}),
    ],
)
def test_a_claim_about_what_is_not_there_is_refused_rather_than_judged(name, changes):
    claim = reduced(name)
    subject = next(iter(claim.subjects(0, 16).values()))
    with pytest.raises(UsageError, match=r"method that projects weights|must end in a BatchNorm"):
        claim.probe.measure(replace(subject, **changes))


def test_examine_comes_to_the_same_verdicts():
    for name in ("whitening", "projection-equivalence"):
        finding = examine(reduced(name))
        estimate = jackknife(CLAIMS[name].statistic, replications(name))
        assert finding.as_catalogued
        assert finding.verdict.estimate == estimate
        assert finding.theory.source
        assert finding.control.outcome is CLAIMS[name].control.expected


def test_fewer_replications_than_the_minimum_decide_nothing():
    claim = reduced("whitening")
    few = replications("whitening")[: claim.minimum_n - 1]
    verdict = claim.judge(jackknife(claim.statistic, few))
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert math.isfinite(verdict.estimate.value)
