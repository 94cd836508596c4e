"""Reports as HTML: one self-contained page, or a fragment for a notebook."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

from diagnostics.report import words

if TYPE_CHECKING:
    from jinja2 import Environment

    from diagnostics.claims.claim import Verdict
    from diagnostics.diagnosis import Report
    from diagnostics.measurement import Measurement
    from diagnostics.verification import Finding, VerificationReport


@dataclass(frozen=True, eq=False)
class Section:
    """One claim as the page shows it.

    Attributes:
        finding: The finding.
        anchor: Identifier of the section in the page.
        picture: The claim's picture as SVG; empty when the claim was not run.
        decision: The measured interval against the prediction, as SVG; empty when the claim was not run.
    """

    finding: Finding
    anchor: str
    picture: str
    decision: str


@dataclass(frozen=True)
class Drawing:
    """One probe of a diagnosis as the page shows it.

    Attributes:
        name: Name of the probe.
        anchor: Identifier of the section in the page.
        fragments: Variant to a drawing with its line of description, as HTML; one entry without a name when the
            variants share a drawing.
    """

    name: str
    anchor: str
    fragments: dict[str, str]


def verification_html(report: VerificationReport) -> str:
    """The report as one page: no script, nothing loaded, light and dark, on a phone and on paper."""
    sections = [_section(finding) for finding in report.findings]
    return _render(
        "verification.html.j2",
        report=report,
        sections=sections,
        departing=[section for section in sections if not section.finding.as_catalogued],
        summary=words.summary(report),
        command=words.command(report),
        words=words.BADGES,
    )


def verdict_table_html(report: VerificationReport) -> str:
    """The verdicts of a run as a table, for a notebook."""
    return _render("fragment.html.j2", report=report, section=None, verdict=None, summary=words.summary(report))


def finding_html(finding: Finding) -> str:
    """One claim with its picture and its verdict, for a notebook."""
    return _render("fragment.html.j2", report=None, section=_section(finding), verdict=None, summary="")


def verdict_html(verdict: Verdict) -> str:
    """One verdict, for a notebook."""
    return _render("fragment.html.j2", report=None, section=None, verdict=verdict, summary="")


def diagnosis_html(report: Report) -> str:
    """The diagnosis of a network as one page, with the properties of :func:`verification_html`."""
    from diagnostics.plots.svg import slug
    from diagnostics.report.store import versions

    drawings = [
        Drawing(probe, f"probe-{slug(probe)}", _fragments(slug(probe), variants))
        for probe, variants in report.measurements.items()
    ]
    return _render("diagnosis.html.j2", report=report, drawings=drawings, versions=versions())


def _section(finding: Finding) -> Section:
    """Draws the two figures of a claim."""
    from diagnostics.plots import interval_figure, to_svg
    from diagnostics.plots.svg import slug

    name, verdict = slug(finding.claim.name), finding.verdict
    picture = decision = ""
    if finding.measurement is not None and finding.theory is not None:
        figure = finding.claim.picture(finding.measurement, finding.theory)
        picture = to_svg(figure, name=f"picture-{name}", title=f"{finding.claim.title}: measurement and theory")
    if verdict.estimate is not None and math.isfinite(verdict.estimate.value):
        control = None if finding.control is None else finding.control.estimate
        theory = math.nan if finding.theory is None else finding.theory.value
        figure = interval_figure(verdict.prediction, verdict.estimate, control, theory)
        decision = to_svg(
            figure, name=f"decision-{name}", title=f"{finding.claim.title}: measured interval and prediction"
        )
    return Section(finding, f"claim-{name}", picture, decision)


def _fragments(probe: str, variants: Mapping[str, Measurement]) -> dict[str, str]:
    """One drawing with the variants side by side where their axes allow it, else one drawing per variant."""
    from diagnostics.measurement import stack
    from diagnostics.plots import measurement_html

    measurements = list(variants.values())
    first = measurements[0]
    comparable = all(
        (m.axes, m.quantity, m.unit, m.n) == (first.axes, first.quantity, first.unit, first.n) for m in measurements
    )
    if len(measurements) > 1 and comparable and len(first.axes) <= 1:
        return {"": measurement_html(stack(measurements, "network", list(variants)), name=f"drawing-{probe}")}
    return {
        variant: measurement_html(measurement, name=f"drawing-{probe}-{index}")
        for index, (variant, measurement) in enumerate(variants.items())
    }


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("diagnostics", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        number=words.number,
        measured=words.measured,
        interval=words.interval,
        predicted=words.predicted,
        badge=words.badge,
        sentence=words.sentence,
    )
    return environment


def _render(template: str, **values: object) -> str:
    from markupsafe import Markup

    styles = {
        name: Markup(resources.files("diagnostics.report").joinpath(f"{name}.css").read_text("utf-8"))
        for name in ("page", "parts")
    }
    return _environment().get_template(template).render(styles=styles, **values)
