"""The weight-mean projector."""

import pytest
import torch

import ntk


def weight(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(3, 5), (3, 4, 2), (3, 4, 2, 2)])
def test_rows_have_zero_mean_over_the_fan_in(shape: tuple[int, ...]) -> None:
    centered = ntk.center_rows(weight(*shape))
    assert centered.flatten(1).mean(1).abs().max() < 1e-15
    assert torch.allclose(centered, ntk.center_rows(centered), atol=1e-15)
    flat = weight(*shape).flatten(1)
    n = flat.shape[1]
    projector = torch.eye(n, dtype=torch.float64) - torch.ones(n, n, dtype=torch.float64) / n
    assert torch.allclose(centered.flatten(1), flat @ projector, atol=1e-14)


def test_it_is_self_adjoint() -> None:
    a, b = weight(3, 4, 2, 2), weight(3, 4, 2, 2) ** 2
    assert float((ntk.center_rows(a) * b).sum()) == pytest.approx(float((a * ntk.center_rows(b)).sum()), rel=1e-12)


def test_leading_axes() -> None:
    stack = weight(6, 2, 3, 4)
    centered = ntk.center_rows(stack, ndim=2)
    for i in range(6):
        for j in range(2):
            assert torch.allclose(centered[i, j], ntk.center_rows(stack[i, j]), atol=1e-15)
    assert not torch.allclose(centered, ntk.center_rows(stack))


@pytest.mark.parametrize(("shape", "ndim"), [((3,), None), ((3, 4), 1), ((3, 4), 3)])
def test_refusals(shape: tuple[int, ...], ndim: int | None) -> None:
    with pytest.raises(ValueError, match=r"at least two axes, \[out, \*fan_in\].*got ndim="):
        ntk.center_rows(weight(*shape), ndim=ndim)
