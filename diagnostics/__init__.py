"""Probes, claims and reports: what a normalization method does, measured and judged; everything loads on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diagnostics.claims import CLAIMS, Claim, Outcome, Verdict
    from diagnostics.diagnosis import Report, diagnose
    from diagnostics.measurement import Measurement
    from diagnostics.probes import PROBES, Probe
    from diagnostics.subject import Subject
    from diagnostics.verification import VerificationReport, verify

__all__ = [
    "CLAIMS",
    "PROBES",
    "Claim",
    "Measurement",
    "Outcome",
    "Probe",
    "Report",
    "Subject",
    "Verdict",
    "VerificationReport",
    "diagnose",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Loads the module that defines a public name when the name is first asked for.

    Args:
        name: Attribute that is not there yet.

    Raises:
        AttributeError: If it is not a public name.
    """
    homes = {
        "diagnostics.claims": ("CLAIMS", "Claim", "Outcome", "Verdict"),
        "diagnostics.diagnosis": ("Report", "diagnose"),
        "diagnostics.measurement": ("Measurement",),
        "diagnostics.probes": ("PROBES", "Probe"),
        "diagnostics.subject": ("Subject",),
        "diagnostics.verification": ("VerificationReport", "verify"),
    }
    for module, names in homes.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'diagnostics' has no attribute {name!r}; it exports {', '.join(__all__)}.")
