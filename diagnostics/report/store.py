"""Reports on disk: written atomically, never over anything, resumable claim by claim."""

from __future__ import annotations

import contextlib
import json
import platform
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnostics.errors import UsageError

if TYPE_CHECKING:
    from diagnostics.claims.claim import Claim
    from diagnostics.verification import Finding, VerificationReport

PACKAGES = ("mimicnorm", "torch", "jax", "neural-tangents", "numpy", "scipy")
RUN = "run.json"


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Python and the packages that numbers depend on, with their versions; "absent" for one that is not installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def write_atomically(path: Path, content: str | bytes) -> Path:
    """Writes a file so that a reader sees the old content or the new one, never a part.

    Args:
        path: The file; its folder is made when missing.
        content: Text (UTF-8) or bytes.

    Raises:
        UsageError: If the file cannot be written.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(data)
        temporary.replace(path)
    except OSError as problem:
        reason = problem.strerror or str(problem)
        raise UsageError(
            f"out must be a folder that can be written to, got {path.parent}: {reason}. Choose another --out"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path


def reserve(path: Path) -> Path:
    """Makes a folder for a report that is written in one go.

    Args:
        path: The folder; it may exist when it is empty.

    Raises:
        UsageError: If the folder holds anything, or cannot be made.
    """
    contents = _contents(path)
    _require_empty(path, contents)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UsageError(
            f"out must be a folder that can be made, got {path}: {problem.strerror}. Choose another --out"
        ) from None
    return path


@dataclass(frozen=True)
class ReportFolder:
    """The folder of one run.

    Attributes:
        path: The folder. It holds run.json (the settings), claims/ (one file per finished claim) and, once the run is
            complete, index.html, report.json and figures/.
    """

    path: Path

    @classmethod
    def open(cls, path: Path, run: dict[str, Any], *, resume: bool) -> ReportFolder:
        """Takes the folder for a run: a new one, or the one of the same run that was interrupted.

        Args:
            path: The folder; made when missing.
            run: The settings of the run, as plain values.
            resume: Take up what an interrupted run of the same settings and versions has finished.

        Raises:
            UsageError: If the folder holds anything but that run, or cannot be written to.
        """
        settings = {**run, "versions": versions()}
        contents = _contents(path)
        if contents:
            if RUN not in contents:
                _require_empty(path, contents)
            _same_run(path, settings, resume=resume)
        elif resume:
            raise UsageError(
                f"resume must find an interrupted run, but {path} holds none. Leave out --resume to begin one"
            )
        else:
            document = {"schema_version": 1, "settings": settings, "timing": {"started": now()}}
            write_atomically(path / RUN, json.dumps(document, indent=2) + "\n")
        return cls(path)

    def finished(self, claim: Claim) -> Finding | None:
        """What an interrupted run found out about the claim; None when it had not come so far.

        Raises:
            UsageError: If the record cannot be read, or the claim has changed since.
        """
        from diagnostics.report.codec import finding_from_json

        path = _place(self.path, claim)
        if not path.exists():
            return None
        try:
            return finding_from_json(json.loads(path.read_text("utf-8")), claim)
        except UsageError:
            raise
        except (ValueError, KeyError, TypeError, OSError) as problem:
            raise UsageError(
                f"the finished claim in {path} must be readable JSON of this version, got {problem!r}. "
                "Remove the file to examine the claim anew"
            ) from None

    def keep(self, finding: Finding) -> None:
        """Records a finished claim."""
        from diagnostics.report.codec import dumps, finding_to_json

        write_atomically(_place(self.path, finding.claim), dumps(finding_to_json(finding)))

    def write(self, report: VerificationReport) -> None:
        """Writes the figures, report.json and, last, index.html."""
        from diagnostics.plots import to_png, to_svg
        from diagnostics.plots.svg import slug
        from diagnostics.report.codec import dumps, report_to_json
        from diagnostics.report.html import verification_html

        for finding in report.findings:
            if finding.measurement is None or finding.theory is None:
                continue
            figure = finding.claim.picture(finding.measurement, finding.theory)
            name = slug(finding.claim.name)
            svg = to_svg(figure, name=name, title=finding.claim.title)
            write_atomically(self.path / "figures" / f"{name}.svg", svg)
            write_atomically(self.path / "figures" / f"{name}.png", to_png(figure))
        write_atomically(self.path / "report.json", dumps(report_to_json(report)))
        write_atomically(self.path / "index.html", verification_html(report))


def _same_run(path: Path, settings: dict[str, Any], *, resume: bool) -> None:
    """Holds the settings against those of the run in the folder.

    Raises:
        UsageError: If they differ, or the run is not to be resumed.
    """
    try:
        document = json.loads((path / RUN).read_text("utf-8"))
        recorded, started = document["settings"], document["timing"]["started"]
    except (ValueError, KeyError, TypeError, OSError):
        raise UsageError(f"out must hold a readable {RUN} to be resumed, got {path}. Choose another --out") from None
    if not resume:
        raise UsageError(
            f"out must be a new or empty folder, got {path}, which holds the run begun at {started}. "
            "Choose another --out, or add --resume if it is the same run"
        )
    differences = [
        f"{name} was {there!r} and is now {here!r}"
        for name, there, here in _differences(recorded, settings)
    ]  # fmt: skip
    if differences:
        raise UsageError(
            f"a resumed run must have the settings of the one it takes up, but in {path} {'; '.join(differences)}. "
            "Use the same settings and versions, or choose another --out"
        )


def _differences(recorded: dict[str, Any], settings: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """The names of what differs, with both values; versions one by one."""
    pairs = []
    for name in sorted({*recorded, *settings}):
        there, here = recorded.get(name), settings.get(name)
        if isinstance(there, dict) and isinstance(here, dict):
            pairs += _differences(there, here)
        elif there != here:
            pairs.append((name, there, here))
    return pairs


def _place(folder: Path, claim: Claim) -> Path:
    from diagnostics.plots.svg import slug

    return folder / "claims" / f"{slug(claim.name)}.json"


def _require_empty(path: Path, contents: list[str]) -> None:
    """Refuses a folder that holds something.

    Raises:
        UsageError: If it does.
    """
    if contents:
        raise UsageError(
            f"out must be a new or empty folder, got {path}, which holds {', '.join(contents[:3])}. "
            "Nothing was overwritten; choose another --out"
        )


def _contents(path: Path) -> list[str]:
    """The names in the folder; none when it does not exist yet.

    Raises:
        UsageError: If there is something that is not a folder, or it cannot be read.
    """
    try:
        return sorted(entry.name for entry in path.iterdir())
    except FileNotFoundError:
        return []
    except OSError as problem:
        raise UsageError(f"out must be a folder, got {path}: {problem.strerror}. Choose another --out") from None
