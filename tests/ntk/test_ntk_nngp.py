"""The empirical NNGP kernel against activations caught by hand."""

import numpy as np
import pytest
import torch
from torch import nn

import ntk
from tests.ntk.oracle import build


def by_hand(model: nn.Module, upto: int, x: torch.Tensor) -> torch.Tensor:
    """Units of the first layers of a Sequential, computed without touching its buffers."""
    saved = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        rows = nn.Sequential(*model[:upto])(x.clone()).clone().flatten(1)
    model.load_state_dict(saved)
    return rows


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("layer", [None, *range(9)])
def test_every_layer(mode: str, layer: int | None) -> None:
    """Layer 1 is followed by an in-place ReLU, which must not write into what was caught."""
    model, x1, x2 = build("conv with BatchNorm")
    model.train(mode == "train")
    upto = len(model) if layer is None else layer + 1
    a, b = by_hand(model, upto, x1), by_hand(model, upto, x2)
    name = None if layer is None else str(layer)
    for x, other in ((None, a), (x2, b)):
        result = ntk.empirical_nngp(model, x1, x, layer=name)
        expected = (a @ other.T / a.shape[1]).numpy()
        assert np.abs(result.values - expected).max() <= 1e-12 * np.abs(expected).max()
        assert (result.kind, result.reduce, result.layer) == ("nngp", "mean", name)
        assert result.mode == mode


def test_post_batch_norm_kernel_is_singular() -> None:
    """docs/mathematics.md §5.4: after BatchNorm the constant vector is a null vector of the kernel, with trace B."""
    model = nn.Sequential(nn.Linear(4, 50), nn.BatchNorm1d(50, eps=1e-300)).double()
    values = ntk.empirical_nngp(model, torch.randn(6, 4, dtype=torch.float64)).values
    assert np.abs(values.sum(1)).max() < 1e-12
    assert np.trace(values) == pytest.approx(6, rel=1e-12)


def test_a_module_called_twice_averages_over_both_calls() -> None:
    model, x, _ = build("tied and called twice")
    calls = []
    handle = model.inner.register_forward_hook(lambda module, inputs, output: calls.append(output.detach()))
    model(x)
    handle.remove()
    rows = torch.cat(calls, 1)
    result = ntk.empirical_nngp(model, x, layer="inner")
    assert np.abs(result.values - (rows @ rows.T / rows.shape[1]).numpy()).max() < 1e-14


def test_dtype() -> None:
    model, x, _ = build("mlp")
    single = ntk.empirical_nngp(model, x, dtype=torch.float32)
    double = ntk.empirical_nngp(model, x)
    assert (single.dtype, double.dtype) == (np.float32, np.float64)
    assert 0 < np.abs(single.values - double.values).max() < 1e-5 * np.abs(double.values).max()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
