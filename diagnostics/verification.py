"""Runs claims: measure every replication, pool, judge, and do the same to the negative control."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diagnostics.claims.claim import Claim, Outcome, Theory, Verdict
from diagnostics.errors import UsageError
from diagnostics.measurement import Measurement, pool, stack
from diagnostics.names import resolve, unknown
from diagnostics.statistics import Estimate, jackknife

if TYPE_CHECKING:
    from diagnostics.report.store import ReportFolder

PROFILES = ("quick", "full")

Progress = Callable[[Claim, int, int], None]
"""Called with the claim, the replications finished (of the claim and its control), and how many there will be."""


@dataclass(frozen=True, eq=False)
class Finding:
    """Everything that was found out about one claim.

    Attributes:
        claim: The claim.
        measurement: What was measured, pooled over seeds; None when it could not be run.
        theory: What the mathematics says; None when it could not be run.
        verdict: The outcome, with its estimate.
        control: The verdict on the negative control; None when it could not be run.
        seconds: Time it took.
    """

    claim: Claim
    measurement: Measurement | None
    theory: Theory | None
    verdict: Verdict
    control: Verdict | None
    seconds: float

    @property
    def as_catalogued(self) -> bool:
        """Whether the verdict and the control's verdict are the expected ones."""
        control = self.claim.control
        return self.verdict.outcome is self.claim.expected and (
            control is None or (self.control is not None and self.control.outcome is control.expected)
        )

    def _repr_html_(self) -> str:
        from diagnostics.report.html import finding_html

        return finding_html(self)


@dataclass(frozen=True, eq=False)
class VerificationReport:
    """The findings of one run.

    Attributes:
        findings: One per claim, in the order of the catalogue.
        profile: Name of the profile.
        seeds: The seeds asked for; None means each claim's own number, counted from 0.
        versions: Packages and their versions.
        started: When the run began (ISO 8601, UTC).
        seconds: Time it took.
    """

    findings: tuple[Finding, ...]
    profile: str
    seeds: tuple[int, ...] | None
    versions: dict[str, str]
    started: str
    seconds: float

    @property
    def exit_code(self) -> int:
        """0 when all is as catalogued, 1 when a verdict departs from it, 3 when something was not decided."""
        undecided = (Outcome.INCONCLUSIVE, Outcome.NOT_RUN)
        outcomes = [v.outcome for f in self.findings for v in (f.verdict, f.control) if v is not None]
        if any(outcome in undecided for outcome in outcomes):
            return 3
        return 0 if all(f.as_catalogued for f in self.findings) else 1

    def to_html(self, path: str | Path) -> Path:
        """Writes the report as one self-contained page and returns its path."""
        from diagnostics.report.html import verification_html
        from diagnostics.report.store import write_atomically

        return write_atomically(Path(path), verification_html(self))

    def _repr_html_(self) -> str:
        from diagnostics.report.html import verdict_table_html

        return verdict_table_html(self)


def replicate(
    claim: Claim, seeds: Sequence[int], width: int, done: Callable[[], None] = lambda: None
) -> list[Measurement]:
    """Measures the claim's subjects once per seed.

    Args:
        claim: The claim.
        seeds: Seeds of the replications.
        width: Width of the networks.
        done: Called after each replication.
    """
    replications = []
    for seed in seeds:
        subjects = claim.subjects(seed, width)
        measured = [claim.probe.measure(subject) for subject in subjects.values()]
        replications.append(stack(measured, claim.axis, list(subjects)))
        done()
    return replications


def examine(
    claim: Claim, *, profile: str = "quick", seeds: Sequence[int] | None = None, progress: Progress | None = None
) -> Finding:
    """Measures one claim and its negative control, and judges both.

    PyTorch computes on one thread meanwhile, so that the sums, and with them the report, do not depend on the cores.

    Args:
        claim: The claim.
        profile: "quick" or "full": how many seeds, how wide.
        seeds: Seeds to use in place of the profile's.
        progress: Called after each replication.

    Raises:
        UsageError: If there are no seeds, or one twice.
    """
    _check_seeds(seeds)
    started = time.monotonic()
    size = claim.sizes[profile]
    chosen = tuple(range(size.seeds)) if seeds is None else tuple(seeds)
    total = len(chosen) * (1 if claim.control is None else 2)
    finished = 0

    def done() -> None:
        nonlocal finished
        finished += 1
        if progress is not None:
            progress(claim, finished, total)

    def measured(one: Claim) -> tuple[Measurement, Estimate]:
        replications = replicate(one, chosen, size.width, done)
        return pool(replications), jackknife(one.statistic, replications)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        measurement, estimate = measured(claim)
        theory = claim.theory(measurement)
        control = None if claim.control is None else claim.controlled().judge(measured(claim.controlled())[1])
    except ImportError as missing:
        verdict = Verdict(Outcome.NOT_RUN, f"{missing}. Install it and run this claim again.", None, claim.prediction)
        return Finding(claim, None, None, verdict, None, time.monotonic() - started)
    finally:
        torch.set_num_threads(threads)
    return Finding(claim, measurement, theory, claim.judge(estimate), control, time.monotonic() - started)


def _check_seeds(seeds: Sequence[int] | None) -> None:
    """Refuses no seeds, and a seed twice, whose replications would not be independent.

    Raises:
        UsageError: If there are none, or one stands twice.
    """
    if seeds is not None and not seeds:
        raise UsageError("seeds must hold at least one seed, got none. Leave it out to take each claim's own number")
    if seeds is not None and len(set(seeds)) < len(seeds):
        raise UsageError(f"seeds must differ, for replications to be independent, got {list(seeds)}. Name each once")


def _examined(
    claims: Sequence[Claim], profile: str, seeds: Sequence[int] | None, workers: int, progress: Progress | None
) -> Generator[Finding]:
    """The findings as they are made, by this process or by several."""
    if min(workers, len(claims)) > 1:
        from diagnostics.workers import examine_in_processes

        return examine_in_processes(
            claims, profile=profile, seeds=seeds, workers=min(workers, len(claims)), progress=progress
        )
    return (examine(claim, profile=profile, seeds=seeds, progress=progress) for claim in claims)


def verify(
    claims: Iterable[str | Claim] | None = None,
    *,
    profile: str = "quick",
    seeds: Sequence[int] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    workers: int = 1,
    progress: Progress | None = None,
    found: Callable[[Finding], None] | None = None,
) -> VerificationReport:
    """Decides claims by measurement, and writes an illustrated report.

    Args:
        claims: Names or claims; None takes the whole catalogue.
        profile: "quick" or "full": how many seeds, how wide.
        seeds: Seeds of the initializations; None takes 0, 1, … up to each claim's own number.
        out: Folder to write index.html, report.json and the figures to; None writes nothing.
        resume: Take up the finished claims of an interrupted run in ``out``.
        workers: Processes to share the claims among.
        progress: Called after each replication.
        found: Called with each finding, once it is kept.

    Raises:
        UsageError: If a claim or the profile does not exist, ``out`` cannot be used, or there is no worker.
    """
    from diagnostics.claims import CLAIMS
    from diagnostics.report.store import ReportFolder, now, versions

    if profile not in PROFILES:
        raise UsageError(unknown("profile", profile, PROFILES))
    if workers < 1:
        raise UsageError(f"workers must be 1 or more, got {workers}. Leave it out to take one")
    chosen = (
        list(CLAIMS.values())
        if claims is None
        else [c if isinstance(c, Claim) else resolve("claim", c, CLAIMS) for c in claims]
    )
    fixed = None if seeds is None else tuple(seeds)
    _check_seeds(fixed)
    run: dict[str, Any] = {
        "claims": [c.name for c in chosen],
        "profile": profile,
        "seeds": None if fixed is None else list(fixed),
    }
    folder: ReportFolder | None = None if out is None else ReportFolder.open(Path(out), run, resume=resume)
    started, clock = now(), time.monotonic()
    kept = [] if folder is None else [finding for claim in chosen if (finding := folder.finished(claim)) is not None]
    findings = {finding.claim.name: finding for finding in kept}
    remaining = [claim for claim in chosen if claim.name not in findings]
    with contextlib.closing(_examined(remaining, profile, fixed, workers, progress)) as examined:
        for finding in itertools.chain(kept, examined):
            findings[finding.claim.name] = finding
            if folder is not None and finding.claim in remaining:
                folder.keep(finding)
            if found is not None:
                found(finding)
    ordered = tuple(findings[claim.name] for claim in chosen)
    report = VerificationReport(ordered, profile, fixed, versions(), started, time.monotonic() - clock)
    if folder is not None:
        folder.write(report)
    return report
