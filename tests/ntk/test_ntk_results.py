"""A kernel states its convention, and refuses to be mixed with another."""

import dataclasses
import subprocess
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from torch import nn

import ntk
from ntk.errors import ConventionError
from tests.ntk.oracle import build


@pytest.fixture
def net() -> nn.Module:
    return build("conv with BatchNorm")[0]


@pytest.fixture
def x() -> torch.Tensor:
    return build("conv with BatchNorm")[1]


@pytest.fixture
def kernel(net: nn.Module, x: torch.Tensor) -> ntk.KernelResult:
    return ntk.empirical_ntk(net, x)


def test_the_convention_is_stated(net: nn.Module, x: torch.Tensor, kernel: ntk.KernelResult) -> None:
    assert kernel.axes == ("example", "example", "output", "output")
    assert (kernel.kind, kernel.reduce, kernel.parametrization, kernel.projection) == ("ntk", "none", "standard", None)
    assert (kernel.mode, kernel.statistics) == ("train", "differentiated, one batch")
    assert kernel.versions["torch"] == torch.__version__
    cross = ntk.empirical_ntk(net, x, x, reduce="sum")
    assert (cross.axes, cross.statistics) == (("example", "example"), "differentiated, two batches")
    assert (kernel.symmetric, cross.symmetric) == (True, False)
    net[1].eval()
    assert ntk.empirical_ntk(net, x).mode == "mixed"
    net.eval()
    evaluated = ntk.empirical_ntk(net, x)
    assert (evaluated.mode, evaluated.statistics) == ("eval", "running")
    plain = ntk.empirical_ntk(nn.Sequential(nn.InstanceNorm2d(3), nn.Flatten(), nn.Linear(108, 2)).double(), x)
    assert (plain.mode, plain.statistics) == ("no batch statistics", None)


def test_values_are_frozen(kernel: ntk.KernelResult) -> None:
    with pytest.raises(ValueError, match="read-only"):
        kernel.values[0, 0] = 1
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign"):
        kernel.reduce = "sum"
    source = np.eye(2)
    result = dataclasses.replace(kernel, values=source, axes=("example", "example"), reduce="sum")
    source[0, 0] = 7
    assert result.values[0, 0] == 1


def test_two_kernels_compare_by_identity(kernel: ntk.KernelResult) -> None:
    assert kernel == kernel
    assert kernel != dataclasses.replace(kernel)
    assert len({kernel, kernel}) == 1


def test_flatten_is_example_major(kernel: ntk.KernelResult) -> None:
    matrix = kernel.flatten()
    assert matrix.shape == (15, 15)
    assert matrix[1 * 3 + 2, 4 * 3 + 0] == kernel.values[1, 4, 2, 0]


def test_arithmetic_within_a_convention(kernel: ntk.KernelResult) -> None:
    assert np.array_equal((kernel + kernel).values, (2 * kernel).values)
    assert np.array_equal((np.float64(2) * kernel).values, (kernel * 2).values)
    assert isinstance(np.float64(2) * kernel, ntk.KernelResult)
    assert not (kernel - kernel).values.any()
    assert np.asarray(kernel).shape == kernel.shape
    assert np.asarray(kernel, dtype=np.float32).dtype == np.float32
    with pytest.raises(ValueError, match="needs a copy"):
        np.array(kernel, dtype=np.float32, copy=False)
    with pytest.raises(TypeError, match="unsupported operand"):
        kernel + 1


@pytest.mark.parametrize(
    ("other", "field"),
    [
        (lambda net, x: ntk.empirical_ntk(net, x, reduce="trace"), "axes, reduce"),
        (lambda net, x: ntk.empirical_ntk(net, x, projection=ntk.center_rows), "projection"),
        (lambda net, x: ntk.empirical_ntk(net.eval(), x), "mode, statistics"),
        (lambda net, x: ntk.empirical_ntk(net, x, x), "statistics"),
        (lambda net, x: ntk.empirical_ntk(net, x, params={"0.weight": 2.0}), "parametrization, multipliers"),
        (lambda net, x: ntk.empirical_nngp(net, x), "kind, axes, reduce"),
    ],
)
def test_arithmetic_between_conventions(
    net: nn.Module, x: torch.Tensor, kernel: ntk.KernelResult, other: object, field: str
) -> None:
    second = other(net, x)
    with pytest.raises(ConventionError, match=f"{field} differ") as caught:
        kernel - second
    assert kernel.describe() in str(caught.value)
    assert second.describe() in str(caught.value)


def test_two_multipliers_are_two_conventions(net: nn.Module, x: torch.Tensor) -> None:
    a, b = (ntk.empirical_ntk(net, x, params={"0.weight": c}) for c in (1.0, 2.0))
    with pytest.raises(ConventionError, match="multipliers differ"):
        a + b


def test_shapes_must_agree(net: nn.Module, x: torch.Tensor, kernel: ntk.KernelResult) -> None:
    with pytest.raises(ConventionError, match=r"one shape to add; got \(5, 5, 3, 3\) and \(4, 4, 3, 3\)"):
        kernel + ntk.empirical_ntk(net, x[:4])


def test_trace_mean_of_a_sum_does_not_exist(net: nn.Module, x: torch.Tensor) -> None:
    with pytest.raises(ConventionError, match=r"trace_mean needs reduce='none' or 'trace'.*'sum'"):
        ntk.empirical_ntk(net, x, reduce="sum").trace_mean()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": np.zeros((3, 3))}, r"axes must be \('example', 'example', 'output', 'output'\)"),
        ({"axes": ("output", "example", "output", "example")}, "axes must be"),
        ({"values": np.zeros((3, 3, 2, 1))}, "two equal output axes"),
        ({"values": np.zeros((3, 4, 2, 2))}, "symmetric=True needs values equal to their transpose"),
        ({"values": np.arange(36.0).reshape(3, 3, 2, 2)}, "Pass symmetric=False for a cross kernel"),
        ({"values": np.zeros((3, 3, 2, 2), int)}, "float32 or float64, got int64"),
        ({"standard_error": np.zeros((3, 3))}, "standard_error must have the shape"),
        ({"kind": "hessian"}, "kind must be one of"),
        ({"reduce": "max"}, "reduce must be one of"),
        ({"mode": "test"}, "mode must be one of"),
        ({"parametrization": "mup"}, "parametrization must be one of"),
    ],
)
def test_the_constructor_checks(kernel: ntk.KernelResult, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(kernel, **changes)


def test_monte_carlo_errors_do_not_add_up_silently(kernel: ntk.KernelResult) -> None:
    noisy = dataclasses.replace(kernel, standard_error=np.ones(kernel.shape), seed=3)
    assert np.array_equal((noisy * -2).standard_error, 2 * np.ones(kernel.shape))
    with pytest.raises(ConventionError, match="no standard error without their covariance"):
        noisy + kernel
    with pytest.raises(ConventionError, match="no standard error without the covariance between outputs"):
        noisy.trace_mean()
    dataset = noisy.to_dataset()
    assert dataset["standard_error"].shape == kernel.shape
    assert dataset.attrs["seed"] == 3


def test_dataset(kernel: ntk.KernelResult, net: nn.Module, x: torch.Tensor) -> None:
    dataset = kernel.to_dataset()
    assert dataset["kernel"].dims == ("example", "example_2", "output", "output_2")
    assert np.array_equal(dataset["kernel"].values, kernel.values)
    assert dataset.attrs["statistics"] == "differentiated, one batch"
    scaled = ntk.empirical_ntk(net, x, params={"0.weight": 0.5}, reduce="trace").to_dataset()
    assert scaled.attrs["multipliers"] == "0.weight: 0.5"


def svg_of(html: str) -> ET.Element:
    return ET.fromstring(html[html.index("<svg") : html.index("</svg>") + 6])


@pytest.mark.parametrize("reduce", ["none", "sum"])
def test_a_kernel_draws_itself(net: nn.Module, x: torch.Tensor, reduce: str) -> None:
    kernel = ntk.empirical_ntk(net, x, reduce=reduce)
    html = kernel._repr_html_()
    assert svg_of(html).find(".//{http://www.w3.org/2000/svg}image") is not None
    assert f"reduce {reduce}" in html
    assert "differentiated, one batch" in html
    assert html == kernel._repr_html_()
    assert repr(kernel).startswith("KernelResult(5x5")


def test_a_spectrum_draws_itself(kernel: ntk.KernelResult) -> None:
    html = ntk.spectrum(kernel)._repr_html_()
    svg_of(html)
    assert "condition number" in html
    assert "effective rank" in html
    svg_of(ntk.spectrum(np.zeros((2, 2)))._repr_html_())
    svg_of(ntk.spectrum(np.diag([1.0, -1e-3]))._repr_html_())


HEAVY = ("jax", "neural_tangents", "tensorflow", "matplotlib", "pandas", "xarray", "seaborn", "sklearn")


def loaded_after(code: str) -> set[str]:
    script = f"{code}\nimport sys\nprint(*(name for name in {HEAVY} if name in sys.modules))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_import_loads_nothing_heavy() -> None:
    assert loaded_after("import ntk") == set()


def test_the_import_test_can_fail() -> None:
    assert loaded_after("import ntk, xarray") >= {"xarray"}


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'empirical_hessian'.*empirical_ntk.*analytic"):
        _ = ntk.empirical_hessian


def test_analytic_is_loaded_on_first_use() -> None:
    script = "import sys, ntk; print('ntk.analytic' in sys.modules, ntk.analytic.__name__ in sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "True"]
