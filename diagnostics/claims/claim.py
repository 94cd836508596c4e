"""A claim of a paper, what it predicts, and the rule by which a measurement decides it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np

from diagnostics.measurement import Measurement
from diagnostics.probes.base import Probe
from diagnostics.statistics import Estimate
from diagnostics.subject import Subject

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Outcome(Enum):
    """How a claim fared; each value says what it means for the reader."""

    SUPPORTED = "the measurement lies where the claim says"
    REFUTED = "the measurement excludes what the claim says"
    INCONCLUSIVE = "the measurement is too uncertain to decide; use more seeds or profile='full'"
    NOT_APPLICABLE = "the claim says nothing about this subject"
    NOT_RUN = "the claim was not measured; the explanation names what was missing"


@dataclass(frozen=True)
class Prediction:
    """Where the claim says that the statistic lies: a closed interval, a point being one of width zero.

    Attributes:
        low: Smallest admissible value.
        high: Largest admissible value.
        resolution: For a point: the widest half-interval that may still support it.
        source: Where the bound comes from.
    """

    low: float
    high: float
    source: str
    resolution: float = math.inf

    @classmethod
    def point(cls, value: float, resolution: float, source: str) -> Prediction:
        """The statistic equals ``value``; a half-interval wider than ``resolution`` cannot support it."""
        return cls(value, value, source, resolution)

    @classmethod
    def at_least(cls, value: float, source: str) -> Prediction:
        """The statistic is ``value`` or more."""
        return cls(value, math.inf, source)

    @classmethod
    def at_most(cls, value: float, source: str) -> Prediction:
        """The statistic is ``value`` or less."""
        return cls(-math.inf, value, source)

    def __str__(self) -> str:
        """The prediction in a few characters, for tables."""
        if self.low == self.high:
            return f"= {self.low:.5g}"
        if math.isinf(self.high):
            return f"≥ {self.low:.5g}"
        if math.isinf(self.low):
            return f"≤ {self.high:.5g}"
        return f"{self.low:.5g} to {self.high:.5g}"


@dataclass(frozen=True)
class Theory:
    """What the mathematics says about the same statistic, and the curves to draw over the measurement.

    Attributes:
        value: The statistic in theory; NaN where theory is silent.
        source: The formula's home.
        curves: Label to (x, y) arrays, in the coordinates of the claim's picture.
    """

    value: float
    source: str
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """The outcome for one claim, with everything a reader needs to check it.

    Attributes:
        outcome: The outcome.
        explanation: Why, in sentences that a reader can check.
        estimate: The measured statistic; None when the claim was not run.
        prediction: What the claim predicts for it.
    """

    outcome: Outcome
    explanation: str
    estimate: Estimate | None
    prediction: Prediction

    def _repr_html_(self) -> str:
        from diagnostics.report.html import verdict_html

        return verdict_html(self)


@dataclass(frozen=True)
class Size:
    """How much work a profile spends on a claim.

    Attributes:
        seeds: Independent initializations.
        width: Units per layer of fully connected networks, or an equivalent that the claim documents.
    """

    seeds: int
    width: int


@dataclass(frozen=True)
class Control:
    """A negative control: the same claim about a subject for which the verdict must differ.

    Attributes:
        description: What is changed, in words.
        changes: Fields of the claim that are replaced.
        expected: The outcome that the control must have.
    """

    description: str
    changes: Mapping[str, Any]
    expected: Outcome


@dataclass(frozen=True)
class Claim:
    """What a paper says, and how it is decided.

    Attributes:
        name: Identifier, as typed on the command line.
        title: A few words for tables.
        statement: The claim in one sentence.
        source: The paper.
        locator: Theorem, figure or table.
        scope: For which networks and data the verdict holds.
        probe: What measures it.
        axis: Name of the axis along which ``subjects`` differ.
        subjects: (seed, width) to the subjects of one replication, by their coordinate on ``axis``.
        statistic: The number that decides, from the pooled measurement.
        statistic_name: That number in words, with its unit.
        prediction: What the claim predicts for it.
        theory: What the mathematics says; called only when the claim is run (it may load JAX).
        expected: The outcome that theory leads us to expect.
        explanation: Why, in two sentences that a reader can check.
        control: The negative control; None only for a control itself.
        picture: (measurement, theory) to a figure.
        sizes: Profile name to the work it spends.
        minimum_n: Fewest replications that may decide.
    """

    name: str
    title: str
    statement: str
    source: str
    locator: str
    scope: str
    probe: Probe
    axis: str
    subjects: Callable[[int, int], Mapping[Any, Subject]]
    statistic: Callable[[Measurement], float]
    statistic_name: str
    prediction: Prediction
    theory: Callable[[Measurement], Theory]
    expected: Outcome
    explanation: str
    control: Control | None
    picture: Callable[[Measurement, Theory], Figure]
    sizes: Mapping[str, Size]
    minimum_n: int = 1

    def controlled(self) -> Claim:
        """The negative control as a claim of its own, with the same prediction and rule.

        Raises:
            ValueError: If this claim is a control itself.
        """
        if self.control is None:
            raise ValueError(f"claim must have a negative control, got {self.name!r}, which is one itself")
        return replace(
            self, name=f"{self.name}/control", expected=self.control.expected, control=None, **self.control.changes
        )

    def judge(self, estimate: Estimate) -> Verdict:
        """Decides the claim from the measured statistic."""
        outcome = decide(self.prediction, estimate, self.minimum_n)
        if outcome is self.expected:
            return Verdict(outcome, self.explanation, estimate, self.prediction)
        return Verdict(
            outcome,
            f"Theory leads us to expect {self.expected.name}, but {outcome.value}. "
            "Check the measurement before the theory.",
            estimate,
            self.prediction,
        )


def decide(prediction: Prediction, estimate: Estimate, minimum_n: int = 1) -> Outcome:
    """Compares an interval with a prediction.

    An interval that misses the predicted one refutes; an interval inside it supports; for a point prediction, an
    interval that contains the point supports when it is no wider than the prediction's resolution. Anything else is
    inconclusive, as are fewer than ``minimum_n`` replications.
    """
    low, high = estimate.interval
    if estimate.n < minimum_n or math.isnan(estimate.value):
        return Outcome.INCONCLUSIVE
    if high < prediction.low or low > prediction.high:
        return Outcome.REFUTED
    if prediction.low == prediction.high:
        return Outcome.SUPPORTED if (high - low) / 2 <= prediction.resolution else Outcome.INCONCLUSIVE
    return Outcome.SUPPORTED if prediction.low <= low and high <= prediction.high else Outcome.INCONCLUSIVE
