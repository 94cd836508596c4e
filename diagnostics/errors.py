"""Errors that a user can act on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """Something was asked for that does not exist or cannot be done; the message names the remedy. Exit code 2."""

    @classmethod
    def unknown(cls, kind: str, name: str, known: Iterable[str]) -> UsageError:
        """The error for a name that is not registered, with the nearest valid ones."""
        known = sorted(known)
        nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, nearest))}? " if nearest else ""
        return cls(
            f"{kind} must be one of {', '.join(known)}; got {name!r}. {hint}List them with: mimicnorm list {kind}s"
        )
