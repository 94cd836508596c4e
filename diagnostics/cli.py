"""Command line: one thin layer over the Python interface.

Exit codes: 0 done and every verdict as catalogued; 1 a verdict departs from the catalogue; 2 usage; 3 something could
not be decided; 130 interrupted.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diagnostics.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

INTERRUPTED = 130

app = typer.Typer(
    name="mimicnorm",
    help="Does a normalization method do to a network what its paper says it does?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Profile(StrEnum):
    """How much work a verification spends."""

    quick = "quick"
    full = "full"


class Kind(StrEnum):
    """What can be listed."""

    methods = "methods"
    claims = "claims"
    probes = "probes"
    models = "models"
    data = "data"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
        arguments: The words after ``mimicnorm``; None takes those of the process.

    Raises:
        SystemExit: Always, with the exit code.
    """
    try:
        app(args=None if arguments is None else list(arguments), prog_name="mimicnorm")
    except UsageError as problem:
        from diagnostics.report.terminal import plain

        plain(_console(stderr=True), f"mimicnorm: {problem}")
        raise SystemExit(2) from None


def _version(*, wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"mimicnorm {version('mimicnorm')}")
        raise typer.Exit


@app.callback()
def _root(
    *,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the version and leave.",
            is_eager=True,
            callback=lambda wanted: _version(wanted=wanted),
        ),
    ] = False,
) -> None:
    """Does a normalization method do to a network what its paper says it does?"""


@app.command(help="Decide published claims by measurement, and write an illustrated report.")
def verify(
    claims: Annotated[
        list[str] | None, typer.Argument(metavar="CLAIM", help="Names of claims; all when none is given.")
    ] = None,
    *,
    profile: Annotated[Profile, typer.Option(help="How many seeds and how wide the networks.")] = Profile.quick,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write to; a new one under reports/ when not given.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Take up the finished claims of an interrupted run in --out.")
    ] = False,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Initializations per claim; each claim's own number when not given.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes to share the claims among.")] = 2,
) -> None:
    """Decides claims, shows the progress, and ends with the verdicts.

    Raises:
        UsageError: If the folder or a name cannot be used.
        Exit: Always, with the exit code.
    """
    from diagnostics.report.terminal import ProgressLines, plain, verdict_table
    from diagnostics.verification import verify as decide

    if resume and out is None:
        raise UsageError("resume must come with the folder of the interrupted run, got no --out. Add --out DIR")
    folder = out or _fresh("verify")
    console = _console()
    try:
        with ProgressLines(console) as lines:
            report = decide(
                claims or None,
                profile=profile.value,
                seeds=None if seeds is None else range(seeds),
                out=folder,
                resume=resume,
                workers=workers,
                progress=lines.progress,
                found=lines.found,
            )
    except KeyboardInterrupt:
        words = ["mimicnorm", "verify", *(claims or []), "--profile", profile.value]
        words += [] if seeds is None else ["--seeds", str(seeds)]
        command = shlex.join([*words, "--out", str(folder), "--resume"])
        plain(_console(stderr=True), f"Interrupted. The finished claims are kept; go on with:\n{command}")
        raise typer.Exit(INTERRUPTED) from None
    console.print()
    console.print(verdict_table(report))
    console.print()
    plain(console, str(folder / "index.html"))
    raise typer.Exit(report.exit_code)


@app.command(help="Measure what a network does at initialization, and write an illustrated report.")
def diagnose(
    target: Annotated[str, typer.Argument(help="The network: builtin:NAME, with a name of: mimicnorm list models.")],
    more: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    *,
    data: Annotated[str, typer.Option(metavar="SPEC", help="Inputs; see: mimicnorm list data.")] = "digits",
    compare: Annotated[
        list[str] | None, typer.Option(metavar="METHOD ...", help="Methods to put the network under, besides as given.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write to; a new one under reports/ when not given.")
    ] = None,
) -> None:
    """Diagnoses a network and writes the page.

    Raises:
        UsageError: If the target, a method, the data or the folder cannot be used.
    """
    import mimicnorm
    from diagnostics.diagnosis import diagnose_builtin
    from diagnostics.names import resolve
    from diagnostics.report.html import diagnosis_html
    from diagnostics.report.store import reserve, write_atomically
    from diagnostics.report.terminal import plain
    from mimicnorm.models import MODELS

    if more and not compare:
        raise UsageError(f"target must be one word, got {shlex.join([target, *more])}. Name methods after --compare")
    scheme, _, name = target.partition(":")
    if scheme != "builtin" or not name:
        known = ", ".join(f"builtin:{model}" for model in sorted(MODELS))
        raise UsageError(
            f"target must be one of {known} in this version, got {target!r}. List them with: mimicnorm list models"
        )
    resolve("model", name, MODELS)
    methods = [*(compare or []), *(more or [])]
    for method in methods:
        resolve("method", method, mimicnorm.METHODS)
    folder = reserve(out or _fresh(f"diagnose-{name}"))
    console = _console()
    with console.status(f"Measuring {name}"):
        report = diagnose_builtin(name, data=data, methods=methods)
    page = write_atomically(folder / "index.html", diagnosis_html(report))
    plain(console, report.title)
    for remark in report.findings:
        plain(console, f"· {remark}")
    console.print()
    plain(console, str(page))


@app.command("list")
def list_names(kind: Annotated[Kind, typer.Argument(help="What to list.")]) -> None:
    """List what there is, with a line on each."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column("name", no_wrap=True, style="bold")
    table.add_column("description")
    for name, description in _described(kind).items():
        table.add_row(Text(name), Text(description))
    _console().print(table)


def _described(kind: Kind) -> Mapping[str, str]:
    """Name to a line on each."""
    if kind is Kind.methods:
        import mimicnorm

        return _first_lines(mimicnorm.METHODS)
    if kind is Kind.models:
        from mimicnorm.models import MODELS

        return _first_lines(MODELS)
    if kind is Kind.probes:
        from diagnostics.probes import PROBES

        return _first_lines(PROBES)
    if kind is Kind.claims:
        from diagnostics.claims import CLAIMS

        return {name: f"{claim.title} ({claim.source}, {claim.locator})" for name, claim in CLAIMS.items()}
    from diagnostics.data import DATA

    return dict(DATA)


def _first_lines(registry: Mapping[str, Any]) -> dict[str, str]:
    """The first line of the documentation of each entry: a class, a function, or an object of a documented class."""
    return {name: (entry.__doc__ or "").strip().partition("\n")[0] for name, entry in registry.items()}


def _fresh(stem: str) -> Path:
    """A folder under reports/ named after the time."""
    return Path("reports") / f"{stem}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"


def _console(*, stderr: bool = False) -> Console:
    """A console; where nobody looks at a terminal, lines are wide enough not to be folded."""
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=140)
