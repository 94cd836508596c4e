"""What a probe returns: an estimate on labelled axes, its standard error, and how many replications are behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import xarray


@dataclass(frozen=True, eq=False)
class Measurement:
    """A measured quantity on labelled axes.

    Attributes:
        probe: Name of the probe that measured.
        quantity: What was measured, in words.
        unit: Unit of the estimate ("1" for a pure number).
        estimate: The values, one axis per entry of ``axes``; read-only float64.
        axes: Axis name to coordinate values, in the order of the array's axes.
        n: Independent replications (initializations) behind the estimate.
        standard_error: Standard error of ``estimate`` over the replications; None when there is one replication only.
        seeds: Seeds of the replications.

    Raises:
        ValueError: If the axes do not fit the arrays, or several replications come without a standard error.
    """

    probe: str
    quantity: str
    unit: str
    estimate: np.ndarray
    axes: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    n: int = 1
    standard_error: np.ndarray | None = None
    seeds: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Freezes the arrays and holds them against the axes.

        Raises:
            ValueError: If they do not fit, or several replications come without a standard error.
        """
        axes = {name: tuple(np.asarray(coordinates).tolist()) for name, coordinates in self.axes.items()}
        shape = tuple(len(coordinates) for coordinates in axes.values())
        object.__setattr__(self, "axes", MappingProxyType(axes))
        object.__setattr__(self, "estimate", _read_only(self.estimate))
        if self.estimate.shape != shape:
            raise ValueError(
                f"estimate must have the shape {shape} that its axes {list(axes)} give, got {self.estimate.shape}"
            )
        if self.standard_error is not None:
            object.__setattr__(self, "standard_error", _read_only(self.standard_error))
            if self.standard_error.shape != shape:
                raise ValueError(f"standard_error must have the shape {shape}, got {self.standard_error.shape}")
        elif self.n > 1:
            raise ValueError(f"standard_error must be given when n > 1, got None with n={self.n}")

    def select(self, **coordinates: Any) -> Measurement:
        """The measurement at the named coordinates; the axes that are named disappear.

        Raises:
            KeyError: If an axis or a coordinate does not exist.
        """
        index: list[Any] = [slice(None)] * len(self.axes)
        for name, value in coordinates.items():
            if name not in self.axes:
                raise KeyError(f"axis must be one of {list(self.axes)}, got {name!r}")
            if value not in self.axes[name]:
                raise KeyError(f"{name} must be one of {list(self.axes[name])}, got {value!r}")
            index[list(self.axes).index(name)] = self.axes[name].index(value)
        error = self.standard_error
        return replace(
            self,
            estimate=self.estimate[tuple(index)],
            standard_error=None if error is None else error[tuple(index)],
            axes={name: values for name, values in self.axes.items() if name not in coordinates},
        )

    def value(self, **coordinates: Any) -> float:
        """The single number at the named coordinates."""
        return float(self.select(**coordinates).estimate)

    def to_dataset(self) -> xarray.Dataset:
        """The measurement as an xarray dataset: ``estimate`` and, where there is one, ``standard_error``."""
        import xarray

        variables = {"estimate": (tuple(self.axes), self.estimate)}
        if self.standard_error is not None:
            variables["standard_error"] = (tuple(self.axes), self.standard_error)
        attributes = {
            "probe": self.probe,
            "quantity": self.quantity,
            "unit": self.unit,
            "n": self.n,
            "seeds": list(self.seeds),
        }
        return xarray.Dataset(
            variables, coords={name: list(values) for name, values in self.axes.items()}, attrs=attributes
        )

    def _repr_html_(self) -> str:
        from diagnostics.plots import measurement_html

        return measurement_html(self)


def stack(measurements: Sequence[Measurement], axis: str, values: Sequence[Any]) -> Measurement:
    """Puts measurements of one quantity side by side along a new first axis.

    Args:
        measurements: Measurements with the same axes, one per value.
        axis: Name of the new axis.
        values: Its coordinates.

    Raises:
        ValueError: If the measurements do not share their axes.
    """
    first = measurements[0]
    for other in measurements:
        if other.axes != first.axes:
            raise ValueError(f"measurements must share their axes, got {dict(first.axes)} and {dict(other.axes)}")
    errors = [m.standard_error for m in measurements]
    return replace(
        first,
        estimate=np.stack([m.estimate for m in measurements]),
        standard_error=None if any(e is None for e in errors) else np.stack([e for e in errors if e is not None]),
        axes={axis: values, **first.axes},
    )


def pool(measurements: Sequence[Measurement]) -> Measurement:
    """Averages independent replications: the mean, and its standard error over the replications.

    Args:
        measurements: One measurement per replication, with the same axes and n = 1 each.

    Raises:
        ValueError: If there are none, one is pooled already, or they do not share their axes.
    """
    if not measurements or any(m.n != 1 for m in measurements):
        raise ValueError(f"measurements must be one or more with n = 1 each, got n = {[m.n for m in measurements]}")
    stacked = stack(measurements, "replication", range(len(measurements)))
    n = len(measurements)
    return replace(
        measurements[0],
        estimate=stacked.estimate.mean(axis=0),
        standard_error=stacked.estimate.std(axis=0, ddof=1) / np.sqrt(n) if n > 1 else None,
        n=n,
        seeds=tuple(seed for m in measurements for seed in m.seeds),
    )


def _read_only(values: Any) -> np.ndarray:
    array = np.array(values, dtype=np.float64)
    array.setflags(write=False)
    return array
