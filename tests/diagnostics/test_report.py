"""The report: its JSON, its page, and what it says."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser

import jsonschema
import numpy as np
import pytest

from diagnostics.claims.claim import Outcome, Prediction, Verdict
from diagnostics.errors import UsageError
from diagnostics.measurement import Measurement
from diagnostics.report import words
from diagnostics.report.codec import (
    dumps,
    measurement_from_json,
    measurement_to_json,
    report_from_json,
    report_to_json,
    schema,
)
from diagnostics.report.html import diagnosis_html, verdict_html, verdict_table_html, verification_html
from diagnostics.statistics import Estimate
from diagnostics.verification import VerificationReport, verify
from tests.diagnostics import synthetic_claims


@pytest.fixture(scope="module")
def report() -> VerificationReport:
    return verify(synthetic_claims.catalogue().values())


@pytest.fixture(scope="module")
def page(report) -> str:
    return verification_html(report)


def without_timing(value):
    if isinstance(value, dict):
        return {k: without_timing(v) for k, v in value.items() if k != "timing"}
    return [without_timing(v) for v in value] if isinstance(value, list) else value


class Elements(HTMLParser):
    """Collects the elements of a page, and checks that they nest."""

    VOID = frozenset({"meta", "br", "link", "img", "input", "hr"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "style" not in self._open:
            self.text.append(data)

    def plain(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.text))


def loaded(page: str) -> list[str]:
    """Everything that a browser would load for the page."""
    loads = []
    for tag, attributes in Elements(page).found:
        for name, value in attributes.items():
            if name in ("src", "srcset", "data", "poster", "action", "background") or (
                name in ("href", "xlink:href") and tag != "a"
            ):
                loads.append(value or "")
            loads += re.findall(r"url\(([^)]*)\)", value or "") if name != "d" else []
    for style in re.findall(r"<style>(.*?)</style>", page, flags=re.DOTALL):
        loads += re.findall(r"url\(([^)]*)\)", style) + re.findall(r"@import[^;]*", style)
    return [target for target in loads if not target.strip("'\"").startswith(("#", "data:image/png;base64,"))]


def test_json_follows_its_schema(report):
    document = json.loads(dumps(report_to_json(report)))
    jsonschema.Draft202012Validator.check_schema(schema())
    jsonschema.validate(document, schema(), jsonschema.Draft202012Validator)


def test_schema_refuses_what_it_does_not_describe(report):
    document = report_to_json(report)
    document["findings"][0]["verdict"]["outcome"] = "TRUE"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, schema(), jsonschema.Draft202012Validator)


def test_json_round_trip_keeps_everything(report):
    text = dumps(report_to_json(report))
    again = report_from_json(json.loads(text), synthetic_claims.catalogue())
    assert dumps(report_to_json(again)) == text
    assert again.exit_code == report.exit_code
    assert verification_html(again) == verification_html(report)


def test_two_runs_differ_in_timing_only(report):
    other = verify(synthetic_claims.catalogue().values())
    first, second = report_to_json(report), report_to_json(other)
    assert without_timing(first) == without_timing(second)
    assert first != second


def test_other_seeds_give_another_report(report):
    other = verify(synthetic_claims.catalogue().values(), seeds=(5, 6, 7))
    assert without_timing(report_to_json(other)) != without_timing(report_to_json(report))


def test_numbers_that_are_not_finite_survive():
    estimate = np.array([[np.inf, -np.inf], [np.nan, 1.0]])
    axes = {"rate": [0.1, float("inf")], "name": ["NaN", "b"]}
    measurement = Measurement("p", "q", "1", estimate, axes, 2, np.full((2, 2), np.nan), (0, 1))
    document = json.loads(dumps(measurement_to_json(measurement)))
    assert document["estimate"] == [["Infinity", "-Infinity"], ["NaN", 1.0]]
    again = measurement_from_json(document)
    np.testing.assert_array_equal(again.estimate, estimate)
    np.testing.assert_array_equal(again.standard_error, measurement.standard_error)
    assert dict(again.axes) == dict(measurement.axes)
    assert again.seeds == (0, 1)


@pytest.mark.parametrize("axes", [{}, {"empty": []}], ids=["none", "empty"])
def test_shapes_without_values_survive(axes):
    estimate = np.array(1.5) if not axes else np.zeros(0)
    again = measurement_from_json(json.loads(dumps(measurement_to_json(Measurement("p", "q", "1", estimate, axes)))))
    np.testing.assert_array_equal(again.estimate, estimate)


def test_report_of_another_schema_version_is_refused(report):
    with pytest.raises(
        UsageError, match=r"schema_version must be 1, got 7\. Read the report with the mimicnorm that wrote it"
    ):
        report_from_json({**report_to_json(report), "schema_version": 7}, {})


def test_report_on_an_unknown_claim_names_the_nearest(report):
    known = {"halve": synthetic_claims.claim("halve")}
    with pytest.raises(UsageError, match=r"got 'halves'\. Did you mean 'halve'\?"):
        report_from_json(report_to_json(report), known)


def test_page_loads_nothing(page):
    assert loaded(page) == []
    assert "<script" not in page


@pytest.mark.parametrize(
    "intruder",
    [
        '<img src="https://example.org/a.png">',
        '<link rel="stylesheet" href="https://example.org/a.css">',
        "<style>@import 'https://example.org/a.css';</style>",
        "<style>p { background: url(https://example.org/a.png) }</style>",
        '<p style="background: url(a.png)"></p>',
    ],
)
def test_a_page_that_loads_something_would_be_caught(page, intruder):
    assert loaded(page.replace("</main>", f"</main>{intruder}")) != []


def test_page_has_every_section(page, report):
    elements = Elements(page)
    sections = [attributes["id"] for tag, attributes in elements.found if tag == "section"]
    assert sections == ["verdicts", *(f"claim-{f.claim.name}" for f in report.findings), "rule", "reproduce"]
    links = {a["href"] for tag, a in elements.found if tag == "a"}
    assert links <= {f"#{section}" for section in sections}
    assert {f"#claim-{f.claim.name}" for f in report.findings} <= links


def test_page_says_everything_about_a_claim(page, report):
    text = Elements(page).plain()
    for finding in report.findings:
        claim = finding.claim
        for said in (claim.title, claim.statement, claim.source, claim.locator, claim.scope, claim.statistic_name):
            assert said in text
        assert claim.prediction.source in text
        assert finding.verdict.explanation in text
        assert claim.control.description in text
        assert words.measured(finding.verdict.estimate) in text
    assert "closed form, by hand" in text
    assert "n = 4, seeds 0, 1, 2, 3" in text
    for package, version in report.versions.items():
        assert f"{package}{version}" in text
    assert "mimicnorm verify halves vanishes departs noisy missing --profile quick" in text


def test_page_opens_with_a_summary_in_words(page):
    assert (
        "Five claims of the literature were set against measurements: one is supported, two are refuted, one is "
        "inconclusive and one is not run. Three depart from the catalogue"
    ) in Elements(page).plain()


def test_run_as_catalogued_says_so():
    text = words.summary(verify([synthetic_claims.claim()]))
    assert text.startswith("One claim of the literature was set against measurements: one is supported.")
    assert "Every verdict, and that of every negative control, is the one that the catalogue expects." in text


def test_each_claim_that_was_run_has_two_drawings(page):
    titles = [attributes for tag, attributes in Elements(page).found if tag == "svg"]
    assert len(titles) == 2 * 4
    assert all(attributes["role"] == "img" for attributes in titles)


def test_identifiers_of_the_page_are_unique_and_references_resolve(page):
    identifiers = [a["id"] for _, a in Elements(page).found if "id" in a]
    assert len(identifiers) == len(set(identifiers))
    assert set(re.findall(r'(?:href="#|url\(#|labelledby=")([^")]+)', page)) <= set(identifiers)


def test_everything_is_escaped():
    hostile = "<script>alert('x')</script>&"
    control = synthetic_claims.claim().control
    claim = synthetic_claims.claim(
        title=hostile,
        statement=hostile,
        source=hostile,
        locator=hostile,
        scope=hostile,
        statistic_name=hostile,
        explanation=hostile,
        prediction=Prediction.point(0.5, 0.05, hostile),
        control=replace(control, description=hostile),
    )
    report = verify([claim])
    for html in (verification_html(report), verdict_table_html(report), verdict_html(report.findings[0].verdict)):
        assert "<script" not in html
        assert "alert(" in html


def test_fragments_for_a_notebook_are_elements_not_pages(report):
    table = report._repr_html_()
    assert Elements(table).found[0] == ("div", {"class": "mimicnorm fragment"})
    assert all(finding.claim.title in table for finding in report.findings)
    assert "Theory leads us to expect SUPPORTED" in report.findings[2].verdict._repr_html_()
    not_run = report.findings[4].verdict._repr_html_()
    assert "not measured" in not_run
    assert "jaxlib is not installed" in not_run
    assert loaded(table) == []


def test_report_writes_its_page(report, tmp_path):
    path = report.to_html(tmp_path / "report.html")
    assert path.read_text("utf-8") == verification_html(report)


def test_command_with_seeds_that_count_from_zero():
    report = verify([synthetic_claims.claim()], seeds=range(3))
    assert words.command(report) == "mimicnorm verify halves --profile quick --seeds 3"


def test_seeds_that_the_command_line_cannot_say_are_said_in_python():
    report = verify([synthetic_claims.claim()], seeds=(7, 9))
    assert words.command(report).endswith("diagnostics.verify(['halves'], profile='quick', seeds=(7, 9))")


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(1.46694, 0.001, 8), "1.4669 ± 0.0040"),
        (Estimate(-0.5, 0.1, 8), "−0.50 ± 0.40"),
        (Estimate(123.4, 20.0, 8), "123 ± 80"),
        (Estimate(6.57e8, 1e6, 8), "6.57 · 10⁸ ± 4.0 · 10⁶"),
        (Estimate(1048576.0, None, 1), "1.049 · 10⁶"),
        (Estimate(0.25, None, 1), "0.25"),
        (Estimate(float("nan"), 0.1, 2), "—"),
        (Estimate(float("inf"), None, 1), "∞"),
        (None, "not measured"),
    ],
)
def test_estimates_are_written_to_the_digits_they_justify(estimate, text):
    assert words.measured(estimate) == text


@pytest.mark.parametrize("outcome", Outcome)
def test_every_outcome_has_a_badge_of_its_own(outcome):
    html = verdict_html(Verdict(outcome, "because", Estimate(1.0, 0.1, 4), Prediction.at_least(0.0, "x")))
    assert f'class="badge {words.BADGES[outcome].replace(" ", "-")}"' in html
    assert f".mimicnorm .{words.BADGES[outcome].replace(' ', '-')}" in html


@dataclass(frozen=True)
class Diagnosis:
    """What the page asks of a diagnosis."""

    title: str
    measurements: Mapping[str, Mapping[str, Measurement]]
    findings: Sequence[str] = field(default_factory=tuple)


def test_diagnosis_shows_variants_side_by_side():
    curve = {
        name: Measurement("correlation", "correlation", "1", np.ones(3), {"depth": [1, 2, 3]})
        for name in ("as given", "mimicnorm")
    }
    table = {
        name: Measurement("kernel", "kernel", "1", np.eye(3), {"i": [0, 1, 2], "j": [0, 1, 2]})
        for name in ("as given", "mimicnorm")
    }
    page = diagnosis_html(
        Diagnosis("resnet18 <on digits>", {"correlation": curve, "kernel": table}, ["Gradients & more explode."])
    )
    elements = Elements(page)
    assert loaded(page) == []
    assert [a["id"] for tag, a in elements.found if tag == "section"] == [
        "remarks",
        "probe-correlation",
        "probe-kernel",
        "reproduce",
    ]
    assert sum(tag == "svg" for tag, _ in elements.found) == 1 + 2
    identifiers = [a["id"] for _, a in elements.found if "id" in a]
    assert len(identifiers) == len(set(identifiers))
    assert "Gradients & more explode." in elements.plain()
    assert "resnet18 &lt;on digits&gt;" in page
