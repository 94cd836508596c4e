"""Looks names up in registries."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

from diagnostics.errors import UsageError

T = TypeVar("T")

LISTS = {"claim": "claims", "data": "data", "method": "methods", "model": "models", "probe": "probes"}
"""What ``mimicnorm list`` can list, by its singular."""


def resolve(kind: str, name: str, registry: Mapping[str, T]) -> T:
    """The entry of that name.

    Args:
        kind: What the registry holds, in the singular ("claim", "method", "model").
        name: The name that was asked for.
        registry: Name to entry.

    Raises:
        UsageError: If there is none, with the nearest valid names.
    """
    if name not in registry:
        raise UsageError(unknown(kind, name, registry))
    return registry[name]


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that does not exist: what is admissible, what came, the nearest names, the next step.

    Args:
        kind: What the name should have named.
        name: The name.
        known: The names that exist.
    """
    known = sorted(known)
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f" Did you mean {' or '.join(map(repr, nearest))}?" if nearest else ""
    listing = f" List them with: mimicnorm list {LISTS[kind]}" if kind in LISTS else ""
    return f"{kind} must be one of {', '.join(known)}; got {name!r}.{hint}{listing}"
