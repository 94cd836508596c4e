"""Weight mean as an operation (arXiv 2010.09278, section on weight mean). Oracles loop over rows in Python."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import mimicnorm
from mimicnorm.weight_mean import RowCentering, center_weight_, center_weights_

SHAPES = [(3, 5), (4, 2, 3), (5, 3, 3, 3), (2, 2, 2, 3, 2)]


def centered_row_by_row(weight: Tensor) -> Tensor:
    """The definition: each output unit minus the mean of its own numbers."""
    rows = []
    for row in weight:
        numbers = row.flatten().tolist()
        rows.append(row - sum(numbers) / len(numbers))
    return torch.stack(rows)


def row_means(weight: Tensor) -> Tensor:
    return torch.stack([row.double().mean() for row in weight.detach()])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_centering_equals_the_definition(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = centered_row_by_row(weight)
    assert not torch.allclose(weight, expected, atol=1e-3)
    torch.testing.assert_close(RowCentering(weight.ndim)(weight), expected, rtol=0, atol=1e-14)
    returned = center_weight_(weight)
    assert returned is weight
    torch.testing.assert_close(weight, expected, rtol=0, atol=1e-14)


def test_many_weights_at_once_equal_one_by_one() -> None:
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    expected = [centered_row_by_row(weight) for weight in weights]
    center_weights_(weights)
    for weight, target in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight, target, rtol=0, atol=1e-14)
    center_weights_([])


def test_centering_a_parameter_leaves_no_trace_in_autograd() -> None:
    layer = nn.Linear(5, 3)
    center_weight_(layer.weight)
    assert layer.weight.is_leaf
    assert layer.weight.requires_grad
    layer(torch.ones(1, 5)).sum().backward()
    torch.testing.assert_close(layer.weight.grad, torch.ones(3, 5), rtol=0, atol=0)


def test_row_centering_acts_on_batches_of_gradients() -> None:
    batch = torch.randn(2, 6, 4, 3, 3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    projected = RowCentering(4)(batch)
    assert projected.shape == batch.shape
    for i in range(2):
        for j in range(6):
            torch.testing.assert_close(projected[i, j], centered_row_by_row(batch[i, j]), rtol=0, atol=1e-14)


def test_row_centering_is_a_named_value() -> None:
    projection = RowCentering(2)
    assert str(projection) == projection.__name__ == "weight_mean"
    assert projection == RowCentering(2) != RowCentering(4)
    assert hash(projection) == hash(RowCentering(2))


def test_row_centering_is_self_adjoint() -> None:
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(4, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    projection = RowCentering(2)
    torch.testing.assert_close((projection(a) * b).sum(), (a * projection(b)).sum(), rtol=0, atol=1e-13)


def test_weights_without_a_fan_in_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"weight must have an output axis and at least one fan-in axis; got shape \[3\]"
    ):
        center_weight_(torch.zeros(3))
    with pytest.raises(ValueError, match=r"tensor must have at least 4 axes .* got shape \[2, 3\]"):
        RowCentering(4)(torch.zeros(2, 3))


@pytest.mark.parametrize("variant", ["paper", "cifar_code", "imagenet_code"])
def test_projected_rows_have_zero_mean_in_float32(variant: str) -> None:
    network = mimicnorm.models.resnet18(10, width=0.25, generator=torch.Generator().manual_seed(0))
    method = mimicnorm.MimicNorm(variant)
    network = mimicnorm.convert(network, method, generator=torch.Generator().manual_seed(1))
    names = list(method.row_projections(network))
    assert len(names) == network.conversion_report.projected > 0
    for name, parameter in network.named_parameters():
        if name in names:
            assert row_means(parameter).abs().max() < 1e-7, name
        elif parameter.ndim > 1:
            assert row_means(parameter).abs().max() > 1e-4, name


def test_projecting_twice_is_projecting_once() -> None:
    weight = torch.randn(64, 576, generator=torch.Generator().manual_seed(4)) * 0.06
    center_weight_(weight)
    once = weight.clone()
    center_weight_(weight)
    ulp = torch.finfo(torch.float32).eps * once.abs().max()
    assert (weight - once).abs().max() <= ulp


def converted_conv() -> Tensor:
    """A projected 3 x 3 convolution weight in float64, as the converter leaves it."""
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5), nn.ReLU(),
        nn.Flatten(), nn.Linear(5 * 16, 4),
    ).double()  # fmt: skip
    converted = mimicnorm.convert(network, "mimicnorm", generator=torch.Generator().manual_seed(5))
    return converted[3].weight.detach()


def test_a_constant_input_is_rejected_except_at_zero_padding() -> None:
    weight = converted_conv()
    constant = torch.full((1, 6, 8, 8), 3.7, dtype=torch.float64)
    assert functional.conv2d(constant, weight).abs().max() < 1e-12
    padded = functional.conv2d(constant, weight, padding=1)
    assert padded[..., 1:-1, 1:-1].abs().max() < 1e-12
    assert padded[..., 0, :].abs().max() > 1e-2


def test_an_unprojected_convolution_does_not_reject_a_constant() -> None:
    weight = torch.randn(5, 6, 3, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    assert functional.conv2d(torch.full((1, 6, 8, 8), 3.7, dtype=torch.float64), weight).abs().max() > 1e-2


def test_a_shift_shared_by_all_channels_changes_the_border_only() -> None:
    weight = converted_conv()
    x = torch.randn(2, 6, 8, 8, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    change = functional.conv2d(x + 2.5, weight, padding=1) - functional.conv2d(x, weight, padding=1)
    assert change[..., 1:-1, 1:-1].abs().max() < 1e-12
    assert change[..., :, 0].abs().max() > 1e-2
    per_channel = x + torch.arange(6.0, dtype=torch.float64).view(1, 6, 1, 1)
    assert (functional.conv2d(per_channel, weight) - functional.conv2d(x, weight)).abs().max() > 1e-2
