"""The interface of a probe."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from diagnostics.measurement import Measurement
from diagnostics.subject import Subject


@runtime_checkable
class Probe(Protocol):
    """Measures one phenomenon of one subject.

    An implementation is a frozen dataclass whose fields are its settings. It never judges, prints, plots, mutates the
    subject's model or touches a global random generator.
    """

    @property
    def name(self) -> str:
        """Name under which :data:`diagnostics.PROBES` lists the probe."""
        ...

    def measure(self, subject: Subject) -> Measurement:
        """Measures the subject: one replication, n = 1."""
        ...
