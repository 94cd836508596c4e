"""A measurement holds what it says: axes that fit, arrays that stay, a standard error behind every average."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest

from diagnostics.measurement import Measurement, pool, stack

DEPTHS = (1, 2, 4)
STATISTICS = ("mean", "std")


def measurement(estimate: Any = None, **changes: Any) -> Measurement:
    """A measurement [depth, statistic] with the fields named replaced."""
    fields: dict[str, Any] = {
        "probe": "made_up",
        "quantity": "something",
        "unit": "1",
        "estimate": np.arange(6.0).reshape(3, 2) if estimate is None else estimate,
        "axes": {"depth": DEPTHS, "statistic": STATISTICS},
        "seeds": (7,),
    }
    return Measurement(**{**fields, **changes})


def replications(n: int) -> list[Measurement]:
    values = np.random.default_rng(0).normal(size=(n, 3, 2))
    return [measurement(values[seed], seeds=(seed,)) for seed in range(n)]


@pytest.mark.parametrize("shape", [(2, 3), (3,), (3, 2, 1), ()])
def test_an_estimate_that_does_not_fit_its_axes_is_refused(shape):
    with pytest.raises(ValueError, match=r"estimate must have the shape \(3, 2\) that its axes \['depth', 'stat") as e:
        measurement(np.zeros(shape))
    assert str(e.value).endswith(f"got {shape}")


def test_a_standard_error_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"standard_error must have the shape \(3, 2\), got \(2, 3\)"):
        measurement(standard_error=np.zeros((2, 3)), n=4)


def test_an_average_without_a_standard_error_is_refused():
    with pytest.raises(ValueError, match="standard_error must be given when n > 1, got None with n=4"):
        measurement(n=4)
    assert measurement(n=4, standard_error=np.ones((3, 2))).n == 4


def test_a_number_needs_no_axes():
    assert Measurement("p", "q", "MiB", np.array(2.5)).value() == 2.5


def test_arrays_are_read_only_copies_in_float64():
    source, error = np.ones((3, 2), dtype=np.float32), np.ones((3, 2), dtype=int)
    held = measurement(source, standard_error=error, n=2)
    for array in (held.estimate, held.standard_error, held.select(depth=2).estimate, pool(replications(3)).estimate):
        assert array.dtype == np.float64
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 3.0
    source[0, 0] = 5.0
    assert held.estimate[0, 0] == 1.0
    assert source.flags.writeable


def test_fields_cannot_be_replaced():
    with pytest.raises(FrozenInstanceError):
        measurement().unit = "%"


def test_axes_become_tuples_of_plain_values_in_the_order_given():
    held = measurement(np.zeros((3, 2)), axes={"b": np.array([1, 2, 3]), "a": ["x", "y"]})
    assert held.axes == {"b": (1, 2, 3), "a": ("x", "y")}
    assert list(held.axes) == ["b", "a"]
    assert [type(value) for value in held.axes["b"]] == [int] * 3


def test_selecting_takes_axes_away():
    held = measurement(standard_error=np.arange(6.0).reshape(3, 2) / 10, n=3)
    row = held.select(depth=2)
    assert row.axes == {"statistic": STATISTICS}
    assert row.estimate.tolist() == [2.0, 3.0]
    assert row.standard_error.tolist() == [0.2, 0.3]
    column = held.select(statistic="std")
    assert column.axes == {"depth": DEPTHS}
    assert column.estimate.tolist() == [1.0, 3.0, 5.0]
    both = held.select(statistic="std", depth=4)
    assert both.axes == {}
    assert both.estimate.shape == ()
    assert (both.n, both.seeds, both.unit) == (3, (7,), "1")
    assert held.select().estimate.tolist() == held.estimate.tolist()


def test_value_is_a_plain_number():
    value = measurement().value(depth=4, statistic="mean")
    assert value == 4.0
    assert type(value) is float


def test_value_of_more_than_one_number_is_refused():
    with pytest.raises(TypeError):
        measurement().value(depth=4)


def test_unknown_axes_and_coordinates_are_named_with_what_there_is():
    with pytest.raises(KeyError, match=r"axis must be one of \['depth', 'statistic'\], got 'width'"):
        measurement().select(width=3)
    with pytest.raises(KeyError, match=r"depth must be one of \[1, 2, 4\], got 3"):
        measurement().select(depth=3)
    with pytest.raises(KeyError, match=r"statistic must be one of \['mean', 'std'\], got 'rms'"):
        measurement().value(depth=1, statistic="rms")


def test_stacking_adds_a_first_axis():
    parts = replications(2)
    stacked = stack(parts, "network", ["a", "b"])
    assert list(stacked.axes) == ["network", "depth", "statistic"]
    for name, part in zip("ab", parts, strict=True):
        assert np.array_equal(stacked.select(network=name).estimate, part.estimate)
    assert stacked.standard_error is None
    assert stacked.n == 1


def test_stacking_keeps_standard_errors_where_all_have_one():
    parts = [measurement(standard_error=np.full((3, 2), e), n=5) for e in (0.1, 0.2)]
    assert stack(parts, "network", ["a", "b"]).select(network="b").standard_error.max() == 0.2


def test_stacking_refuses_other_axes_and_another_number_of_coordinates():
    other = measurement(axes={"depth": (1, 2, 8), "statistic": STATISTICS})
    with pytest.raises(ValueError, match=r"measurements must share their axes, got .*\(1, 2, 4\).* and .*\(1, 2, 8\)"):
        stack([measurement(), other], "network", ["a", "b"])
    with pytest.raises(ValueError, match=r"estimate must have the shape \(3, 3, 2\).*got \(2, 3, 2\)"):
        stack(replications(2), "network", ["a", "b", "c"])


@pytest.mark.parametrize("n", [2, 3, 17])
def test_pooling_gives_the_mean_and_its_standard_error(n):
    parts = replications(n)
    pooled = pool(parts)
    values = np.array([part.estimate for part in parts])
    assert np.allclose(pooled.estimate, values.sum(axis=0) / n, rtol=1e-14, atol=1e-15)
    variance = ((values - values.sum(axis=0) / n) ** 2).sum(axis=0) / (n - 1)
    assert np.allclose(pooled.standard_error, np.sqrt(variance / n), rtol=1e-12, atol=0)
    assert not np.allclose(pooled.standard_error, np.sqrt(variance * (n - 1)) / n, rtol=1e-12), "the biased variance"
    assert pooled.n == n
    assert pooled.seeds == tuple(range(n))
    assert pooled.axes == parts[0].axes


def test_pooling_one_replication_leaves_its_uncertainty_open():
    pooled = pool(replications(1))
    assert pooled.n == 1
    assert pooled.standard_error is None


def test_pooling_other_axes_is_refused():
    with pytest.raises(ValueError, match="measurements must share their axes"):
        pool([measurement(), measurement(np.zeros(3), axes={"depth": DEPTHS})])


@pytest.mark.parametrize("held", [measurement(), pool(replications(4)), measurement(np.array(1.5), axes={})])
def test_a_dataset_holds_the_whole_measurement(held):
    dataset = held.to_dataset()
    error = dataset.get("standard_error")
    restored = Measurement(
        probe=dataset.attrs["probe"],
        quantity=dataset.attrs["quantity"],
        unit=dataset.attrs["unit"],
        estimate=dataset["estimate"].values,
        axes={str(name): dataset[name].values for name in dataset["estimate"].dims},
        n=dataset.attrs["n"],
        standard_error=None if error is None else error.values,
        seeds=tuple(dataset.attrs["seeds"]),
    )
    assert restored.axes == held.axes
    assert list(restored.axes) == list(held.axes)
    assert np.array_equal(restored.estimate, held.estimate)
    assert (restored.standard_error is None) == (held.standard_error is None)
    if held.standard_error is not None:
        assert np.array_equal(restored.standard_error, held.standard_error)
    for name in ("probe", "quantity", "unit", "n", "seeds"):
        assert getattr(restored, name) == getattr(held, name)


def test_a_dataset_is_selected_by_name():
    held = measurement()
    assert float(held.to_dataset()["estimate"].sel(depth=4, statistic="std")) == held.value(depth=4, statistic="std")
