"""Reports on disk: atomic, never over anything, resumable."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from diagnostics.claims.claim import Outcome
from diagnostics.errors import UsageError
from diagnostics.report import store
from diagnostics.report.store import ReportFolder, reserve, versions, write_atomically
from diagnostics.verification import examine, verify
from tests.diagnostics import synthetic_claims

RUN = {"claims": ["halves"], "profile": "quick", "seeds": None}


def contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


class Interrupting:
    """Interrupts the run at the first replication of one claim."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.seen: list[str] = []

    def __call__(self, claim, finished, total):
        self.seen.append(claim.name)
        if claim.name == self.name:
            raise KeyboardInterrupt


def test_interrupted_run_is_resumed_without_measuring_a_finished_claim_again(tmp_path):
    claims = list(synthetic_claims.catalogue().values())
    uninterrupted = verify(claims, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        verify(claims, out=tmp_path / "run", progress=Interrupting("departs"))
    assert contents(tmp_path / "run") == {"run.json", "claims/halves.json", "claims/vanishes.json"}

    calls: list[tuple[str, int, int]] = []
    resumed = verify(claims, out=tmp_path / "run", resume=True, progress=lambda c, k, n: calls.append((c.name, k, n)))
    assert not {"halves", "vanishes"} & {name for name, *_ in calls}
    assert [f.verdict.outcome for f in resumed.findings] == [f.verdict.outcome for f in uninterrupted.findings]
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
    for figure in (tmp_path / "whole" / "figures").iterdir():
        assert (tmp_path / "run" / "figures" / figure.name).read_bytes() == figure.read_bytes()


def test_complete_folder_holds_the_page_the_json_and_a_figure_of_each_claim_that_was_run(tmp_path):
    claims = synthetic_claims.catalogue()
    verify(claims.values(), out=tmp_path)
    run = [name for name in claims if name != "missing"]
    figures = {f"figures/{name}.{kind}" for name in run for kind in ("svg", "png")}
    records = {f"claims/{name}.json" for name in claims}
    assert contents(tmp_path) == {"run.json", "report.json", "index.html"} | figures | records


def test_folder_of_a_run_is_not_taken_again(tmp_path):
    ReportFolder.open(tmp_path / "r", RUN, resume=False)
    with pytest.raises(UsageError, match=r"holds the run begun at .*\. Choose another --out, or add --resume"):
        ReportFolder.open(tmp_path / "r", RUN, resume=False)


def test_resuming_under_other_settings_names_the_difference(tmp_path):
    ReportFolder.open(tmp_path / "r", RUN, resume=False)
    with pytest.raises(UsageError, match=r"profile was 'quick' and is now 'full'.*Use the same settings"):
        ReportFolder.open(tmp_path / "r", {**RUN, "profile": "full"}, resume=True)
    with pytest.raises(UsageError, match=r"seeds was None and is now \[0, 1\]"):
        ReportFolder.open(tmp_path / "r", {**RUN, "seeds": [0, 1]}, resume=True)


def test_resuming_under_other_versions_names_the_package(tmp_path, monkeypatch):
    ReportFolder.open(tmp_path / "r", RUN, resume=False)
    current = versions()
    monkeypatch.setattr(store, "versions", lambda: {**current, "torch": "0.1"})
    with pytest.raises(UsageError, match=re.escape(f"torch was '{current['torch']}' and is now '0.1'")):
        ReportFolder.open(tmp_path / "r", RUN, resume=True)


def test_resuming_where_nothing_was_begun_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"resume must find an interrupted run, but .* holds none\. Leave out"):
        ReportFolder.open(tmp_path / "r", RUN, resume=True)


def test_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for take in (lambda: ReportFolder.open(tmp_path, RUN, resume=False), lambda: reserve(tmp_path)):
        with pytest.raises(
            UsageError, match=r"new or empty folder, got .*which holds thesis\.tex\. Nothing was overwritten"
        ):
            take()
    assert contents(tmp_path) == {"thesis.tex"}


def test_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for take in (lambda p: ReportFolder.open(p, RUN, resume=False), reserve):
        with pytest.raises(
            UsageError, match=r"out must be a folder, got .*file: Not a directory\. Choose another --out"
        ):
            take(tmp_path / "file")
        with pytest.raises(UsageError, match="Not a directory"):
            take(tmp_path / "file" / "below")


def test_place_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch):
    def deny(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", deny)
    with pytest.raises(UsageError, match=r"can be written to, got .*r: Permission denied\. Choose another --out"):
        ReportFolder.open(tmp_path / "r", RUN, resume=False)
    with pytest.raises(UsageError, match=r"can be made, got .*r: Permission denied\. Choose another --out"):
        reserve(tmp_path / "r")


def test_empty_folder_is_taken(tmp_path):
    assert ReportFolder.open(tmp_path, RUN, resume=False).path == tmp_path
    assert contents(tmp_path) == {"run.json"}


def test_broken_record_of_a_run_is_named(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UsageError, match=r"out must hold a readable run\.json to be resumed"):
        ReportFolder.open(tmp_path, RUN, resume=True)


def test_broken_record_of_a_claim_is_named_with_the_remedy(tmp_path):
    claim = synthetic_claims.claim()
    folder = ReportFolder.open(tmp_path, RUN, resume=False)
    assert folder.finished(claim) is None
    folder.keep(examine(claim))
    assert folder.finished(claim).verdict.outcome is Outcome.SUPPORTED
    path = tmp_path / "claims" / "halves.json"
    path.write_text(path.read_text()[:200])
    with pytest.raises(
        UsageError, match=r"halves\.json must be readable JSON.*Remove the file to examine the claim anew"
    ):
        folder.finished(claim)


def test_claim_that_changed_since_is_not_taken_up(tmp_path):
    folder = ReportFolder.open(tmp_path, RUN, resume=False)
    folder.keep(examine(synthetic_claims.claim()))
    with pytest.raises(UsageError, match=r"its statement changed since: 'The correlation .*' became 'Another one.'"):
        folder.finished(synthetic_claims.claim(statement="Another one."))


def test_a_write_that_fails_leaves_the_old_content_and_no_debris(tmp_path, monkeypatch):
    path = write_atomically(tmp_path / "file", "old")

    def fail(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(UsageError, match="No space left on device"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert contents(tmp_path) == {"file"}


def test_write_takes_text_and_bytes_and_makes_the_folder(tmp_path):
    assert write_atomically(tmp_path / "a" / "b", "ρ → 0").read_text("utf-8") == "ρ → 0"
    assert write_atomically(tmp_path / "a" / "b", b"\x00\xff").read_bytes() == b"\x00\xff"


def test_run_records_settings_and_versions(tmp_path):
    ReportFolder.open(tmp_path, RUN, resume=False)
    document = json.loads((tmp_path / "run.json").read_text())
    assert document["settings"] == {**RUN, "versions": versions()}
    assert {"python", "torch", "jax", "numpy", "scipy", "neural-tangents", "mimicnorm"} == set(
        document["settings"]["versions"]
    )
    assert document["timing"]["started"].endswith("+00:00")


def test_package_that_is_not_installed_is_absent(monkeypatch):
    monkeypatch.setattr(store, "PACKAGES", ("no-such-package",))
    assert versions()["no-such-package"] == "absent"
