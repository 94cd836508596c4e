"""float32 derivatives, multiplied and summed in float64: their Gram matrix, whose small eigenvalues mean something."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import ntk
from ntk import blocks, examples_apart, structured
from ntk.errors import MemoryBudgetError, PrecisionFloorWarning
from ntk.spectrum import condition_limit, precision_floor
from tests.ntk.modules import build

DEFICIENT = (
    "linear in place",
    "conv1d valid",
    "called twice",
    "matrix product",
    "weight norm",
    "batch norm",
    "batch norm last",
    "layer norm",
    "prelu",
    "embedding",
    "attention",
    "rnn cell",
)
"""Modules with fewer parameters than 24 examples have outputs."""

WAYS = ("positions", "outer", "separable")


def dense() -> tuple[nn.Module, torch.Tensor]:
    layers = [nn.Linear(30, 48), nn.ReLU(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 3)]
    return nn.Sequential(*layers), in_pairs(30)


def convolutional() -> tuple[nn.Module, torch.Tensor]:
    layers = [nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 16, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(16, 3)), in_pairs(3, 8, 8)


def in_pairs(*shape: int, distance: float = 2e-4) -> torch.Tensor:
    """12 examples, and 12 that almost equal them: half of the eigenvalues are of the order of the square."""
    x = torch.randn(12, *shape)
    return torch.cat([x, x + distance * torch.randn(12, *shape)])


def eigenvalues(kernel: ntk.KernelResult) -> np.ndarray:
    return np.linalg.eigvalsh(kernel.flatten().astype(np.float64))


@pytest.mark.parametrize("route", ["structured", "jacobian_contraction"])
@pytest.mark.parametrize("name", DEFICIENT)
def test_the_null_space_is_that_of_a_gram_matrix(name: str, route: str) -> None:
    """Eigenvalues that are zero are so to rounding of float64, and not to that of float32 without `accumulate`."""
    model, x, _ = build(name, n=24)
    model, x = model.float(), x.float() if x.is_floating_point() else x
    result = ntk.empirical_ntk(model, x, implementation=route, accumulate=torch.float64)
    assert (result.dtype, result.computed_in) == (np.float64, np.float32)
    smallest, *_, largest = eigenvalues(result)
    assert abs(smallest) < len(x) * np.finfo(np.float64).eps * largest
    plain = ntk.empirical_ntk(model, x, implementation=route)
    assert plain.computed_in is None
    assert np.abs(result.values - plain.values).max() < 1e-6 * largest
    smallest, *_, largest = eigenvalues(plain)
    assert smallest < -1e-10 * largest


@pytest.mark.parametrize("reduce", ["none", "trace", "sum"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("network", [dense, convolutional])
def test_small_eigenvalues(network, way: str, reduce: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the bound of float64 ones, in whatever way products are summed; those of a float32 sum are not."""
    monkeypatch.setattr(blocks, "_ranking", lambda costs: [way, "outer"])
    torch.manual_seed(0)
    model, x = network()
    exact = ntk.spectrum(ntk.empirical_ntk(model, x, reduce=reduce, dtype=torch.float64)).eigenvalues
    for outputs, in_flight in ((3, 3), (3, 1), (2, 1)):
        portions = examples_apart.Portions(outputs, in_flight, entries=2**12, sums=math.inf)
        monkeypatch.setattr(structured, "choose_portions", lambda *arguments, portions=portions: portions)
        found = ntk.spectrum(ntk.empirical_ntk(model, x, reduce=reduce, accumulate=torch.float64))
        assert (np.abs(found.eigenvalues - exact) <= found.errors).all()
        assert abs(found.eigenvalues[-1] / exact[-1] - 1) < 1e-3
        plain = ntk.spectrum(ntk.empirical_ntk(model, x, reduce=reduce))
        assert abs(plain.eigenvalues[-1] / exact[-1] - 1) > 1


def test_errors_of_a_spectrum() -> None:
    """2 sqrt(λ) δ + δ² with δ = eps sqrt(size λmax), from the definition; the floor is where λ equals it."""
    model, x = dense()
    kernel = ntk.empirical_ntk(model, x, reduce="trace", accumulate=torch.float64)
    found = ntk.spectrum(kernel)
    moved = float(np.finfo(np.float32).eps) * math.sqrt(24 * found.eigenvalues[0])
    np.testing.assert_allclose(found.errors, 2 * np.sqrt(found.eigenvalues) * moved + moved**2, rtol=1e-12)
    floor = precision_floor(found.eigenvalues[0], 24, np.dtype(np.float64), np.dtype(np.float32))
    assert found.error_estimate == floor
    np.testing.assert_allclose(2 * math.sqrt(floor) * moved + moved**2, floor, rtol=1e-12)
    assert found.computed_in == np.float32
    assert ntk.spectrum(kernel, k=(1, 1)).positive == (found.eigenvalues[-1], found.errors[-1])
    assert "float64 from derivatives in float32" in found.source


def test_what_is_beyond_the_derivatives_is_said() -> None:
    torch.manual_seed(0)
    model, x = dense()
    kernel = ntk.empirical_ntk(model, x, accumulate=torch.float64)
    with pytest.warns(PrecisionFloorWarning, match=r"floor of derivatives in float32: above 2.5e\+07 it is noise"):
        assert ntk.spectrum(kernel).condition_number > condition_limit(np.float64, np.dtype(np.float32))
    with pytest.warns(PrecisionFloorWarning, match="of a kernel of float32 derivatives"):
        ntk.predict(kernel, torch.ones(24, 3), kernel)
    resolved = ntk.empirical_ntk(model, x[:12], accumulate=torch.float64)
    assert not ntk.spectrum(resolved).at_precision_floor


def test_shares_and_plan_take_it() -> None:
    model, x = convolutional()
    whole = ntk.empirical_ntk(model, x, accumulate=torch.float64)
    shares = ntk.layerwise_ntk(model, x, accumulate=torch.float64)
    total = sum(share.values for share in shares.values())
    np.testing.assert_allclose(total, whole.values, rtol=1e-12, atol=1e-12 * whole.values.max())
    assert {share.computed_in for share in shares.values()} == {np.dtype(np.float32)}
    assert ntk.plan(model, x, accumulate=torch.float64).held > ntk.plan(model, x).held


def test_examples_are_not_taken_in_tiles() -> None:
    """A tile rounds in its own way: what is left where memory is short is the Jacobian, in rows, or an error."""
    torch.manual_seed(0)
    model, x = convolutional()
    assert ntk.empirical_ntk(model, x, max_memory="200kB", implementation="structured").dtype == np.float32
    with pytest.raises(MemoryBudgetError, match="would do"):
        ntk.empirical_ntk(model, x, max_memory="200kB", accumulate=torch.float64)
    exact = ntk.spectrum(ntk.empirical_ntk(model, x, dtype=torch.float64)).eigenvalues
    routes = set()
    for memory in ("300kB", "500kB", "2MB"):
        result = ntk.empirical_ntk(model, x, max_memory=memory, accumulate=torch.float64)
        found = ntk.spectrum(result)
        routes.add(result.implementation)
        assert (np.abs(found.eigenvalues - exact) <= found.errors).all()
    assert len(routes) == 2


def test_sums_and_differences() -> None:
    """A sum of Gram matrices is one; a difference is not, and has the errors of the derivatives' type."""
    model, x = dense()
    kernel = ntk.empirical_ntk(model, x, reduce="trace", accumulate=torch.float64)
    single, double = (ntk.empirical_ntk(model, x, reduce="trace", dtype=t) for t in (torch.float32, torch.float64))
    for combined, dtype, computed_in in (
        (kernel + kernel, np.float64, np.float32),
        (2 * kernel, np.float64, np.float32),
        (double + kernel, np.float64, np.float32),
        (double + double, np.float64, None),
        (kernel + single, np.float32, None),
        (double - single, np.float32, None),
        (kernel - double, np.float32, None),
        (double - kernel, np.float32, None),
        (-1 * kernel, np.float32, None),
    ):
        assert (combined.dtype, combined.computed_in) == (dtype, computed_in)
    assert kernel.trace_mean().to_dataset().attrs["computed_in"] == "float32"
    assert double.to_dataset().attrs["computed_in"] == "float64"


def test_nothing_to_widen() -> None:
    model, x, _ = build("linear")
    assert ntk.empirical_ntk(model, x, accumulate=torch.float64).computed_in is None
    assert ntk.empirical_ntk(model, x.float(), dtype=torch.float32, accumulate=torch.float64).computed_in == np.float32


def test_refusals() -> None:
    model, x = dense()
    for function in (ntk.empirical_ntk, ntk.layerwise_ntk, ntk.plan):
        with pytest.raises(ValueError, match=r"accumulate must be torch\.float64.*got torch\.float32.*set by dtype"):
            function(model, x, accumulate=torch.float32)
    with pytest.raises(ValueError, match=r"accumulate must be None for implementation='ntk_vector_products'.*dtype="):
        ntk.empirical_ntk(model, x, accumulate=torch.float64, implementation="ntk_vector_products")
