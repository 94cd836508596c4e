"""From a measurement on labelled axes to the rows that a figure draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diagnostics.measurement import Measurement
from diagnostics.plots.style import short
from diagnostics.statistics import STANDARD_ERRORS


@dataclass(frozen=True, eq=False)
class Series:
    """One row of points.

    Attributes:
        label: What the legend says; empty for the only series.
        names: Every spelling under which a curve of theory may refer to it.
        y: The estimates.
        half: Half-widths of the intervals; None for a quantity without an error.
    """

    label: str
    names: frozenset[str]
    y: np.ndarray
    half: np.ndarray | None


def series(measurement: Measurement, axis: str, series_axis: str | None, select: Mapping[str, Any]) -> list[Series]:
    """The measurement as rows along ``axis``, one per coordinate of ``series_axis``.

    Args:
        measurement: The measurement.
        axis: The axis along which a row runs.
        series_axis: The axis that tells the rows apart; None for a single row.
        select: Coordinates at which the remaining axes are held.

    Raises:
        ValueError: If the axes named do not account for every axis of the measurement.
    """
    drawn = [axis] if series_axis is None else [axis, series_axis]
    named = [*drawn, *select]
    if sorted(named) != sorted(measurement.axes):
        raise ValueError(
            f"the axis, the series axis and select must name each axis of the measurement once, "
            f"{list(measurement.axes)}; got {named}. Hold an axis that is not drawn with select={{axis: coordinate}}"
        )
    held = measurement.select(**select)
    if series_axis is None:
        return [_row(held, "", frozenset())]
    rows = []
    for value in held.axes[series_axis]:
        label = short(value) if isinstance(value, str) else f"{series_axis} {short(value)}"
        rows.append(_row(held.select(**{series_axis: value}), label, frozenset({label, short(value), str(value)})))
    return rows


def numbers(measurement: Measurement, axis: str) -> np.ndarray:
    """The coordinates of a numeric axis.

    Raises:
        ValueError: If the coordinates are not numbers.
    """
    coordinates = measurement.axes[axis]
    if not is_numeric(coordinates):
        raise ValueError(
            f"the axis of a curve must have numbers for coordinates, got {axis!r} with {list(coordinates)}; use bars"
        )
    return np.array(coordinates, dtype=np.float64)


def is_numeric(coordinates: Sequence[Any]) -> bool:
    """Whether all coordinates are numbers."""
    return all(isinstance(c, (int, float)) and not isinstance(c, bool) for c in coordinates)


def _row(measurement: Measurement, label: str, names: frozenset[str]) -> Series:
    error = measurement.standard_error
    return Series(label, names, measurement.estimate, None if error is None else STANDARD_ERRORS * error)
