"""Numbers and counts as a reader wants them."""

from __future__ import annotations

import math
import shlex
from typing import TYPE_CHECKING

from diagnostics.claims.claim import Outcome, Prediction

if TYPE_CHECKING:
    from diagnostics.claims.claim import Verdict
    from diagnostics.statistics import Estimate
    from diagnostics.verification import VerificationReport

BADGES = {
    Outcome.SUPPORTED: "supported",
    Outcome.REFUTED: "refuted",
    Outcome.INCONCLUSIVE: "inconclusive",
    Outcome.NOT_APPLICABLE: "not applicable",
    Outcome.NOT_RUN: "not run",
}
"""What a reader is told for each outcome."""

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_NUMERALS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def number(value: float, digits: int = 5) -> str:
    """A number with so many significant digits, in powers of ten when very large or small."""
    if math.isnan(value):
        return "—"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value != 0 and not 1e-4 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.{max(min(digits, 4) - 1, 0)}e}".split("e")
        return f"{mantissa} · 10{str(int(exponent)).translate(_SUPERSCRIPTS)}".replace("-", "−")
    return f"{value:.{digits}g}".replace("-", "−") if abs(value) < 1e5 else f"{value:,.0f}".replace("-", "−")


def measured(estimate: Estimate | None) -> str:
    """An estimate with its half-interval, to the digits that the interval justifies."""
    if estimate is None:
        return "not measured"
    low, high = estimate.interval
    half = (high - low) / 2
    if not math.isfinite(half) or half <= 0 or not math.isfinite(estimate.value):
        return number(estimate.value, 6)
    if abs(estimate.value) >= 1e5 or half >= 1e4 or half < 1e-6:
        return f"{number(estimate.value, 3)} ± {number(half, 2)}"
    decimals = max(0, 1 - math.floor(math.log10(half)))
    return f"{estimate.value:.{decimals}f} ± {half:.{decimals}f}".replace("-", "−")


def interval(estimate: Estimate | None) -> str:
    """The interval of an estimate, in words; empty for a quantity without randomness."""
    if estimate is None or estimate.standard_error is None:
        return ""
    low, high = estimate.interval
    half = (high - low) / 2
    if not math.isfinite(half) or half <= 0 or half < 1e-6 or max(abs(low), abs(high)) >= 1e5:
        return f"{number(low, 4)} to {number(high, 4)}"
    decimals = max(0, 1 - math.floor(math.log10(half)))
    return f"{low:.{decimals}f} to {high:.{decimals}f}".replace("-", "−")


def predicted(prediction: Prediction) -> str:
    """The prediction in a few characters, with the house minus."""
    return str(prediction).replace("-", "−")


def sentence(text: str) -> str:
    """The text with its first letter raised and the rest as it is."""
    return text[:1].upper() + text[1:]


def badge(verdict: Verdict | None) -> str:
    """The outcome in words; "not run" where there is no verdict."""
    return BADGES[Outcome.NOT_RUN if verdict is None else verdict.outcome]


def count(n: int, noun: str = "") -> str:
    """A count in words up to twelve, with its noun in the right number."""
    numeral = _NUMERALS[n] if n < len(_NUMERALS) else str(n)
    return f"{numeral} {noun}{'' if n == 1 else 's'}".strip() if noun else numeral


def summary(report: VerificationReport) -> str:
    """What a run found, in one paragraph."""
    total = len(report.findings)
    if total == 0:
        return "No claim was examined."
    tally = {outcome: sum(f.verdict.outcome is outcome for f in report.findings) for outcome in Outcome}
    parts = [f"{count(n)} {'is' if n == 1 else 'are'} {BADGES[outcome]}" for outcome, n in tally.items() if n]
    listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    opening = sentence(count(total, "claim"))
    first = f"{opening} of the literature {'was' if total == 1 else 'were'} set against measurements: {listed}."
    departing = sum(not f.as_catalogued for f in report.findings)
    if departing == 0:
        return f"{first} Every verdict, and that of every negative control, is the one that the catalogue expects."
    verb = "departs" if departing == 1 else "depart"
    return f"{first} {sentence(count(departing))} {verb} from the catalogue, in the verdict or in the negative control:"


def command(report: VerificationReport) -> str:
    """The command, or the lines of Python, that repeat a run."""
    names = [f.claim.name for f in report.findings]
    if report.seeds is None or report.seeds == tuple(range(len(report.seeds))):
        seeds = "" if report.seeds is None else f" --seeds {len(report.seeds)}"
        return f"mimicnorm verify {shlex.join(names)} --profile {report.profile}{seeds}"
    return f"import diagnostics\n\ndiagnostics.verify({names!r}, profile={report.profile!r}, seeds={report.seeds!r})"
