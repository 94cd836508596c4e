"""Findings as JSON and back. ``schema.json`` beside this file describes the format.

Floats that are not finite are the strings "NaN", "Infinity" and "-Infinity". What depends on the clock stands under the
key "timing" and nowhere else: two runs of the same settings differ in nothing but that.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np

from diagnostics.claims.claim import Claim, Outcome, Prediction, Theory, Verdict
from diagnostics.errors import UsageError
from diagnostics.measurement import Measurement
from diagnostics.names import resolve
from diagnostics.statistics import Estimate
from diagnostics.verification import Finding, VerificationReport

if TYPE_CHECKING:
    JSON = dict[str, Any]

SCHEMA_VERSION = 1

_SPELLED = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def schema() -> JSON:
    """The JSON Schema of report.json."""
    return json.loads(resources.files("diagnostics.report").joinpath("schema.json").read_text("utf-8"))


def dumps(document: JSON) -> str:
    """The document as text: keys in the order given, two spaces of indentation, strict JSON."""
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def report_to_json(report: VerificationReport) -> JSON:
    """A verification report as plain values."""
    return {
        "schema_version": SCHEMA_VERSION,
        "profile": report.profile,
        "seeds": None if report.seeds is None else list(report.seeds),
        "versions": dict(report.versions),
        "exit_code": report.exit_code,
        "findings": [finding_to_json(finding) for finding in report.findings],
        "timing": {"started": report.started, "seconds": report.seconds},
    }


def report_from_json(document: JSON, claims: Mapping[str, Claim]) -> VerificationReport:
    """The report that :func:`report_to_json` wrote.

    Args:
        document: The plain values.
        claims: Name to claim, for every claim of the report (:data:`diagnostics.CLAIMS` holds the catalogue).

    Raises:
        UsageError: If the document has another schema version, or a claim is unknown or has changed since.
    """
    _check_version(document)
    findings = []
    for finding in document["findings"]:
        findings.append(finding_from_json(finding, resolve("claim", finding["claim"]["name"], claims)))
    seeds = document["seeds"]
    return VerificationReport(
        findings=tuple(findings),
        profile=document["profile"],
        seeds=None if seeds is None else tuple(seeds),
        versions=dict(document["versions"]),
        started=document["timing"]["started"],
        seconds=document["timing"]["seconds"],
    )


def finding_to_json(finding: Finding) -> JSON:
    """A finding as plain values."""
    return {
        "claim": claim_to_json(finding.claim),
        "verdict": _verdict(finding.verdict),
        "control": None if finding.control is None else _verdict(finding.control),
        "as_catalogued": finding.as_catalogued,
        "theory": None if finding.theory is None else _theory(finding.theory),
        "measurement": None if finding.measurement is None else measurement_to_json(finding.measurement),
        "timing": {"seconds": finding.seconds},
    }


def finding_from_json(document: JSON, claim: Claim) -> Finding:
    """The finding that :func:`finding_to_json` wrote.

    Args:
        document: The plain values.
        claim: The claim that it is about.

    Raises:
        UsageError: If the document is about another claim, or the claim has changed since.
    """
    recorded, current = document["claim"], claim_to_json(claim)
    changed = [key for key in current if recorded.get(key) != current[key]]
    if changed:
        raise UsageError(
            f"claim {claim.name!r} must be the one that was examined, but its {', '.join(changed)} changed since: "
            f"{recorded.get(changed[0])!r} became {current[changed[0]]!r}. Examine it anew in another folder"
        )
    return Finding(
        claim=claim,
        measurement=None if document["measurement"] is None else measurement_from_json(document["measurement"]),
        theory=None if document["theory"] is None else _read_theory(document["theory"]),
        verdict=_read_verdict(document["verdict"]),
        control=None if document["control"] is None else _read_verdict(document["control"]),
        seconds=document["timing"]["seconds"],
    )


def claim_to_json(claim: Claim) -> JSON:
    """What a claim says, without what computes it."""
    control = claim.control
    return {
        "name": claim.name,
        "title": claim.title,
        "statement": claim.statement,
        "source": claim.source,
        "locator": claim.locator,
        "scope": claim.scope,
        "probe": claim.probe.name,
        "axis": claim.axis,
        "statistic": claim.statistic_name,
        "prediction": _prediction(claim.prediction),
        "expected": claim.expected.name,
        "explanation": claim.explanation,
        "control": None if control is None else {"description": control.description, "expected": control.expected.name},
        "minimum_n": claim.minimum_n,
    }


def measurement_to_json(measurement: Measurement) -> JSON:
    """A measurement as plain values."""
    error = measurement.standard_error
    return {
        "probe": measurement.probe,
        "quantity": measurement.quantity,
        "unit": measurement.unit,
        "axes": [_axis(name, coordinates) for name, coordinates in measurement.axes.items()],
        "estimate": _floats(measurement.estimate.tolist()),
        "standard_error": None if error is None else _floats(error.tolist()),
        "n": measurement.n,
        "seeds": list(measurement.seeds),
    }


def measurement_from_json(document: JSON) -> Measurement:
    """The measurement that :func:`measurement_to_json` wrote."""
    error = document["standard_error"]
    return Measurement(
        probe=document["probe"],
        quantity=document["quantity"],
        unit=document["unit"],
        estimate=_array(document["estimate"], document["axes"]),
        axes={axis["name"]: _coordinates(axis) for axis in document["axes"]},
        n=document["n"],
        standard_error=None if error is None else _array(error, document["axes"]),
        seeds=tuple(document["seeds"]),
    )


def _verdict(verdict: Verdict) -> JSON:
    estimate = verdict.estimate
    return {
        "outcome": verdict.outcome.name,
        "explanation": verdict.explanation,
        "estimate": None
        if estimate is None
        else {
            "value": _floats(estimate.value),
            "standard_error": _floats(estimate.standard_error),
            "interval": _floats(list(estimate.interval)),
            "n": estimate.n,
        },
        "prediction": _prediction(verdict.prediction),
    }


def _read_verdict(document: JSON) -> Verdict:
    estimate, prediction = document["estimate"], document["prediction"]
    return Verdict(
        outcome=Outcome[document["outcome"]],
        explanation=document["explanation"],
        estimate=None
        if estimate is None
        else Estimate(_read(estimate["value"]), _read(estimate["standard_error"]), estimate["n"]),
        prediction=Prediction(
            low=_read(prediction["low"]),
            high=_read(prediction["high"]),
            source=prediction["source"],
            resolution=_read(prediction["resolution"]),
        ),
    )


def _prediction(prediction: Prediction) -> JSON:
    return {
        "low": _floats(float(prediction.low)),
        "high": _floats(float(prediction.high)),
        "resolution": _floats(float(prediction.resolution)),
        "source": prediction.source,
    }


def _theory(theory: Theory) -> JSON:
    curves = {label: {"x": _series(x), "y": _series(y)} for label, (x, y) in theory.curves.items()}
    return {"value": _floats(float(theory.value)), "source": theory.source, "curves": curves}


def _read_theory(document: JSON) -> Theory:
    curves = {
        label: (np.array(_read(curve["x"]), dtype=np.float64), np.array(_read(curve["y"]), dtype=np.float64))
        for label, curve in document["curves"].items()
    }
    return Theory(_read(document["value"]), document["source"], curves)


def _series(values: Any) -> Any:
    return _floats(np.asarray(values, dtype=np.float64).tolist())


def _axis(name: str, coordinates: Sequence[Any]) -> JSON:
    numeric = all(isinstance(c, (int, float)) and not isinstance(c, bool) for c in coordinates)
    values = _floats(list(coordinates)) if numeric else list(coordinates)
    return {"name": name, "kind": "number" if numeric else "label", "coordinates": values}


def _coordinates(axis: JSON) -> Sequence[Any]:
    return _read(axis["coordinates"]) if axis["kind"] == "number" else axis["coordinates"]


def _array(values: Any, axes: Sequence[JSON]) -> np.ndarray:
    # The shape comes from the axes, because nested lists lose it where an axis is empty.
    return np.array(_read(values), dtype=np.float64).reshape([len(axis["coordinates"]) for axis in axes])


def _floats(values: Any) -> Any:
    """The values with floats that are not finite spelled out."""
    if isinstance(values, list):
        return [_floats(value) for value in values]
    if isinstance(values, float) and not math.isfinite(values):
        return "NaN" if math.isnan(values) else ("Infinity" if values > 0 else "-Infinity")
    return values


def _read(values: Any) -> Any:
    """The values with spelled floats read."""
    if isinstance(values, list):
        return [_read(value) for value in values]
    return _SPELLED[values] if isinstance(values, str) else values


def _check_version(document: JSON) -> None:
    found = document.get("schema_version")
    if found != SCHEMA_VERSION:
        raise UsageError(
            f"schema_version must be {SCHEMA_VERSION}, got {found!r}. Read the report with the mimicnorm that wrote it"
        )
