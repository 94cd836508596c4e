"""Progress and verdicts in a terminal."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from diagnostics.claims.claim import Claim, Outcome
from diagnostics.report import words

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID
    from rich.table import Table

    from diagnostics.verification import Finding, VerificationReport

STYLES = {
    Outcome.SUPPORTED: ("✓", "green"),
    Outcome.REFUTED: ("✕", "red"),
    Outcome.INCONCLUSIVE: ("?", "yellow"),
    Outcome.NOT_APPLICABLE: ("–", "dim"),
    Outcome.NOT_RUN: ("–", "dim"),
}
"""Mark and colour of each outcome."""


class ProgressLines:
    """One line per claim: a bar while it is examined, then a mark and the verdict.

    Where the console is not a terminal, each claim is written once, when it is finished. :meth:`progress` and
    :meth:`found` are what :func:`diagnostics.verification.verify` calls; the object is a context manager around that.
    """

    def __init__(self, console: Console) -> None:
        """Prepares the lines.

        Args:
            console: Where to write.
        """
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._console = console
        self._tasks: dict[str, TaskID] = {}
        self._live = Progress(
            TextColumn("{task.fields[mark]}"),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[verdict]}"),
            console=console,
        )

    def __enter__(self) -> ProgressLines:
        """Starts the display."""
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the display."""
        if self._console.is_terminal:
            self._live.stop()

    def progress(self, claim: Claim, finished: int, total: int) -> None:
        """Notes that so many of the replications of a claim are finished."""
        if self._console.is_terminal:
            self._live.update(self._task(claim, total), completed=finished, total=total)

    def found(self, finding: Finding) -> None:
        """Writes the verdict on a claim."""
        outcome = finding.verdict.outcome
        mark, style = STYLES[outcome]
        if self._console.is_terminal:
            verdict = f"[{style}]{words.BADGES[outcome]}[/]"
            self._live.update(self._task(finding.claim, 1), mark=f"[{style}]{mark}[/]", verdict=verdict)
        else:
            plain(self._console, f"{mark} {finding.claim.name}: {words.BADGES[outcome]}")

    def _task(self, claim: Claim, total: int) -> TaskID:
        """The line of a claim, which a resumed run may meet finished."""
        if claim.name not in self._tasks:
            self._tasks[claim.name] = self._live.add_task(claim.title, total=total, mark=" ", verdict="")
        return self._tasks[claim.name]


def plain(console: Console, text: str) -> None:
    """Writes a line as it is: no markup, no highlighting, no wrapping, so that it can be copied."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def verdict_table(report: VerificationReport) -> Table:
    """The verdicts of a run."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("claim", overflow="fold")
    for heading in ("measured", "predicted", "theory"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("", no_wrap=True)
    for finding in report.findings:
        mark, style = STYLES[finding.verdict.outcome]
        table.add_row(
            Text(finding.claim.name),
            Text(words.measured(finding.verdict.estimate)),
            Text(words.predicted(finding.claim.prediction)),
            Text("—" if finding.theory is None else words.number(finding.theory.value)),
            Text(f"{mark} {words.badge(finding.verdict)}", style=style),
            Text("" if finding.as_catalogued else "departs", style="magenta"),
        )
    return table
