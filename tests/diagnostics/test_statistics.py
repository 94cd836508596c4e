"""Uncertainty, and the rule that turns it into an outcome."""

from __future__ import annotations

import math

import numpy as np
import pytest

from diagnostics.claims.claim import Outcome, Prediction, decide
from diagnostics.measurement import Measurement
from diagnostics.statistics import STANDARD_ERRORS, Estimate, jackknife
from tests.diagnostics import synthetic_claims

SUPPORTED, REFUTED, INCONCLUSIVE = Outcome.SUPPORTED, Outcome.REFUTED, Outcome.INCONCLUSIVE


def replications(values: np.ndarray) -> list[Measurement]:
    """One measurement per row of values [n, k]."""
    axes = {"entry": range(values.shape[1])}
    return [Measurement("p", "q", "1", row, axes, seeds=(seed,)) for seed, row in enumerate(values)]


def first(measurement: Measurement) -> float:
    return measurement.value(entry=0)


def ratio(measurement: Measurement) -> float:
    return measurement.value(entry=0) / measurement.value(entry=1)


def logarithm(measurement: Measurement) -> float:
    return math.log(measurement.value(entry=0))


def standard_error(values: np.ndarray) -> float:
    """Standard error of the mean of values [n], written out."""
    return math.sqrt(((values - values.mean()) ** 2).sum() / (len(values) - 1) / len(values))


@pytest.mark.parametrize("n", [2, 3, 10, 40])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (2.0, -3.0)])
def test_of_a_linear_statistic_it_is_the_standard_error_of_the_mean(n, weights):
    values = np.random.default_rng(n).normal(size=(n, 2))
    estimate = jackknife(lambda m: float(np.dot(weights, m.estimate)) + 5.0, replications(values))
    combined = values @ np.array(weights)
    assert estimate.value == pytest.approx(combined.mean() + 5.0, rel=1e-12)
    assert estimate.standard_error == pytest.approx(standard_error(combined), rel=1e-12)
    assert estimate.n == n


def test_a_quantity_without_randomness_has_no_uncertainty():
    assert jackknife(first, replications(np.full((5, 1), 3.0))).standard_error == 0.0


def test_one_replication_has_no_standard_error():
    assert jackknife(first, replications(np.array([[3.0]]))) == Estimate(3.0, None, 1)


def delta_method_bound(values: np.ndarray) -> tuple[float, float]:
    """Standard error of log(mean) by the delta method, and by what fraction the jackknife may depart from it.

    Leaving out i moves the mean by the fraction e_i = (x_i − x̄)/((n − 1) x̄), and log(1 − e) = −e + r with
    |r| ≤ |e| · |e|/(2(1 − |e|)): relative to the norm of e, the remainder is at most that last factor.
    """
    largest = np.abs(values - values.mean()).max() / ((len(values) - 1) * values.mean())
    return standard_error(values) / values.mean(), largest / (2 * (1 - largest))


@pytest.mark.parametrize("n", [8, 40, 200])
def test_of_a_logarithm_it_is_the_delta_method_within_its_remainder(n):
    values = np.random.default_rng(n).gamma(20.0, size=n)
    expected, remainder = delta_method_bound(values)
    estimate = jackknife(logarithm, replications(values[:, None]))
    assert estimate.value == pytest.approx(math.log(values.mean()), rel=1e-12)
    assert estimate.standard_error == pytest.approx(expected, rel=remainder)
    assert remainder < 0.1


def test_an_average_of_logarithms_fails_the_same_bound():
    values = np.random.default_rng(0).lognormal(sigma=1.0, size=200)
    expected, remainder = delta_method_bound(values)
    wrong = standard_error(np.log(values))
    assert wrong != pytest.approx(expected, rel=remainder)


EXPERIMENTS, N = 800, 12


def experiments() -> tuple[np.ndarray, np.ndarray]:
    """Ratios of two correlated means over many experiments of N replications, and their jackknife variances."""
    generator = np.random.default_rng(3)
    common = generator.normal(size=(EXPERIMENTS, N, 1))
    values = np.array([3.0, 5.0]) + 0.4 * common + 0.3 * generator.normal(size=(EXPERIMENTS, N, 2))
    estimates = [jackknife(ratio, replications(experiment)) for experiment in values]
    return np.array([e.value for e in estimates]), np.array([e.standard_error**2 for e in estimates])


def departure(ratios: np.ndarray, variances: np.ndarray) -> float:
    """Mean of the estimated variances minus the variance that the ratios show, in standard errors."""
    squares = (ratios - ratios.mean()) ** 2 * EXPERIMENTS / (EXPERIMENTS - 1)
    difference = variances - squares
    return float(difference.mean() / (difference.std(ddof=1) / math.sqrt(EXPERIMENTS)))


def test_of_a_ratio_it_is_the_scatter_over_experiments():
    ratios, variances = experiments()
    assert abs(departure(ratios, variances)) < 4
    apart = 0.5**2 / 3.0**2 + 0.5**2 / 5.0**2
    independent = variances * apart / (apart - 2 * 0.4**2 / 15)
    assert departure(ratios, independent) > 4, "numerator and denominator taken as independent must fail"
    assert departure(ratios, variances * N / (N - 1) ** 2) < -4, "the spread of the means left out must fail"


def test_the_interval_is_four_standard_errors_wide():
    assert STANDARD_ERRORS == 4.0
    assert Estimate(10.0, 0.5, 8).interval == (8.0, 12.0)
    assert Estimate(10.0, None, 1).interval == (10.0, 10.0)


POINT = Prediction.point(1.0, 0.2, "a table")
LEAST = Prediction.at_least(1.0, "a table")
MOST = Prediction.at_most(1.0, "a table")
WITHIN = Prediction(-1.0, 1.0, "a table")


@pytest.mark.parametrize(
    ("prediction", "value", "error", "expected"),
    [
        (POINT, 1.1, 0.04, SUPPORTED),
        (POINT, 1.0, None, SUPPORTED),
        (POINT, 1.0, 0.05, SUPPORTED),
        (POINT, 1.0, 0.051, INCONCLUSIVE),
        (POINT, 1.3, 0.1, INCONCLUSIVE),
        (POINT, 1.5, 0.1, REFUTED),
        (POINT, 0.5, 0.1, REFUTED),
        (POINT, 1.0001, None, REFUTED),
        (LEAST, 2.0, 0.2, SUPPORTED),
        (LEAST, 1.0, None, SUPPORTED),
        (LEAST, 1.0, 0.1, INCONCLUSIVE),
        (LEAST, 0.5, 0.1, REFUTED),
        (LEAST, 0.9, None, REFUTED),
        (MOST, 0.0, 0.2, SUPPORTED),
        (MOST, 1.0, None, SUPPORTED),
        (MOST, 1.0, 0.1, INCONCLUSIVE),
        (MOST, 1.5, 0.1, REFUTED),
        (MOST, 1.1, None, REFUTED),
        (MOST, -math.inf, None, SUPPORTED),
        (WITHIN, 0.5, 0.1, SUPPORTED),
        (WITHIN, -0.9, 0.1, INCONCLUSIVE),
        (WITHIN, 0.9, 0.1, INCONCLUSIVE),
        (WITHIN, 0.0, 1.0, INCONCLUSIVE),
        (WITHIN, -1.5, 0.1, REFUTED),
        (WITHIN, 1.5, 0.1, REFUTED),
    ],
)
def test_an_interval_is_held_against_the_predicted_one(prediction, value, error, expected):
    assert decide(prediction, Estimate(value, error, 5), minimum_n=5) is expected


@pytest.mark.parametrize("prediction", [POINT, LEAST, MOST, WITHIN], ids=str)
@pytest.mark.parametrize("value", [-100.0, 0.9, 1.0, 100.0])
def test_too_few_replications_and_no_number_decide_nothing(prediction, value):
    assert decide(prediction, Estimate(value, 0.001, 4), minimum_n=5) is INCONCLUSIVE
    assert decide(prediction, Estimate(math.nan, 0.001, 5), minimum_n=5) is INCONCLUSIVE
    assert decide(prediction, Estimate(value, math.nan, 5), minimum_n=5) is INCONCLUSIVE


@pytest.mark.parametrize(
    ("prediction", "text"), [(POINT, "= 1"), (LEAST, "≥ 1"), (MOST, "≤ 1"), (WITHIN, "-1 to 1")], ids=str
)
def test_a_prediction_is_written_in_a_few_characters(prediction, text):
    assert str(prediction) == text


def test_the_expected_outcome_is_explained_by_the_claim():
    claim = synthetic_claims.claim()
    verdict = claim.judge(Estimate(0.5, 0.001, 4))
    assert verdict.outcome is claim.expected
    assert verdict.explanation == claim.explanation
    assert verdict.prediction is claim.prediction
    assert verdict.estimate == Estimate(0.5, 0.001, 4)


@pytest.mark.parametrize(
    ("estimate", "outcome", "why"),
    [
        (Estimate(0.9, 0.001, 4), REFUTED, "the measurement excludes what the claim says"),
        (Estimate(0.5, 0.1, 4), INCONCLUSIVE, "too uncertain to decide; use more seeds or profile='full'"),
        (Estimate(0.5, 0.001, 1), INCONCLUSIVE, "too uncertain to decide"),
    ],
)
def test_another_outcome_says_what_theory_expected(estimate, outcome, why):
    verdict = synthetic_claims.claim().judge(estimate)
    assert verdict.outcome is outcome
    assert verdict.explanation.startswith("Theory leads us to expect SUPPORTED, but ")
    assert why in verdict.explanation
    assert verdict.explanation.endswith("Check the measurement before the theory.")


def test_a_control_is_the_claim_about_something_else():
    claim = synthetic_claims.claim()
    control = claim.controlled()
    assert control.name == "halves/control"
    assert control.expected is REFUTED
    assert control.subjects is not claim.subjects
    assert control.prediction is claim.prediction
    assert control.minimum_n == claim.minimum_n
    with pytest.raises(ValueError, match="claim must have a negative control, got 'halves/control', which is one"):
        control.controlled()
