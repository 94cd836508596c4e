"""Looks names up in registries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from diagnostics.errors import UsageError

T = TypeVar("T")


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
        raise UsageError.unknown(kind, name, registry)
    return registry[name]
