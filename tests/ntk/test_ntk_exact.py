"""The empirical NTK against a loop of whole-batch gradients."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import ntk
from ntk import contraction
from tests.ntk.oracle import CASES, build, jacobian, kernel, least_memory, mlp

RELATIVE = 1e-10
"""Exact identity in float64 (style.md, tolerance policy)."""


def assert_same(result: object, expected: object, relative: float = RELATIVE) -> None:
    result, expected = np.asarray(result), np.asarray(expected)
    assert result.shape == expected.shape
    assert np.abs(result - expected).max() <= relative * np.abs(expected).max()


def per_sample_oracle(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The well-known wrong recipe: every example normalized alone."""
    model = nn.Sequential(*model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.track_running_stats = False
    rows = [jacobian(model, x[i : i + 1]) for i in range(len(x))]
    joined = {k: torch.cat([row[k] for row in rows]) for k in rows[0]}
    return kernel(joined, joined)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_gram_and_cross_kernel(case: str, mode: str) -> None:
    model, x1, x2 = build(case)
    model.train(mode == "train")
    first, second = jacobian(model, x1), jacobian(model, x2)
    assert_same(ntk.empirical_ntk(model, x1), kernel(first, first))
    assert_same(ntk.empirical_ntk(model, x1, x2), kernel(first, second))


def test_oracle_by_torch_jacobian() -> None:
    """A second oracle: torch's own Jacobian of the whole batch."""
    model, x, _ = build("conv with BatchNorm")
    names = [name for name, _ in model.named_parameters()]
    buffers = {name: value.clone() for name, value in model.named_buffers()}

    def output(*values: torch.Tensor) -> torch.Tensor:
        state = dict(zip(names, values, strict=True)) | {name: value.clone() for name, value in buffers.items()}
        return torch.func.functional_call(model, state, (x,))

    parts = torch.autograd.functional.jacobian(output, tuple(model.parameters()))
    expected = sum(torch.einsum("iap,jbp->ijab", part.flatten(2), part.flatten(2)) for part in parts)
    assert_same(ntk.empirical_ntk(model, x), expected)


def test_the_whole_batch_is_differentiated() -> None:
    """Negative control: the per-sample kernel under train-mode BatchNorm is another one, and not by a little."""
    model, x, _ = build("conv with BatchNorm")
    wrong = per_sample_oracle(model, x).numpy()
    right = ntk.empirical_ntk(model, x).values
    assert np.linalg.norm(right - wrong) > 0.05 * np.linalg.norm(right)


@pytest.mark.parametrize("case", CASES)
def test_reductions_are_those_of_the_full_kernel(case: str) -> None:
    model, x1, x2 = build(case)
    full = kernel(jacobian(model, x1), jacobian(model, x2))
    outputs = full.shape[-1]
    trace = ntk.empirical_ntk(model, x1, x2, reduce="trace")
    assert_same(trace, torch.einsum("ijkk->ij", full) / outputs)
    assert_same(ntk.empirical_ntk(model, x1, x2, reduce="sum"), full.sum((-1, -2)))
    assert_same(ntk.empirical_ntk(model, x1, x2).trace_mean(), trace.values)


def test_trace_is_the_sum_of_squared_gradients() -> None:
    model, x, _ = build("conv with BatchNorm")
    squares = sum(float((part**2).sum()) for part in jacobian(model, x).values())
    assert np.trace(ntk.empirical_ntk(model, x).flatten()) == pytest.approx(squares, rel=RELATIVE)


def test_projection_applies_to_every_parameter_of_two_axes() -> None:
    model, x, _ = build("conv with BatchNorm")
    rows = jacobian(model, x)
    for name, part in rows.items():
        if part.ndim >= 4:
            rows[name] = part - part.mean(tuple(range(3, part.ndim)), keepdim=True)
    result = ntk.empirical_ntk(model, x, projection=ntk.center_rows)
    assert_same(result, kernel(rows, rows))
    assert result.projection == "center_rows"


def test_projection_by_name() -> None:
    model, x, _ = build("mlp")
    rows = jacobian(model, x)
    rows["2.weight"] = rows["2.weight"] - rows["2.weight"].mean(3, keepdim=True)
    result = ntk.empirical_ntk(model, x, projection={"2.weight": ntk.center_rows})
    assert_same(result, kernel(rows, rows))
    assert result.projection == "2.weight: center_rows"


def test_a_projection_that_looks_at_values_is_applied_row_by_row() -> None:
    model, x, _ = build("mlp")

    def center_unless_zero(weight: torch.Tensor) -> torch.Tensor:
        return ntk.center_rows(weight) if float(weight.abs().sum()) > 0 else weight

    result = ntk.empirical_ntk(model, x, projection=center_unless_zero)
    assert_same(result, ntk.empirical_ntk(model, x, projection=ntk.center_rows).values)
    assert result.projection == "center_unless_zero"


def test_projected_kernel_is_that_of_the_network_that_projects() -> None:
    """J P Jᵀ equals the kernel of a network whose weight passes through P."""
    model, x, _ = build("mlp")
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.copy_(ntk.center_rows(layer.weight))

    class Center(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight - weight.mean(1, keepdim=True)

    result = ntk.empirical_ntk(model, x, projection=ntk.center_rows)
    for layer in (model[0], model[2]):
        nn.utils.parametrize.register_parametrization(layer, "weight", Center())
    assert_same(result, ntk.empirical_ntk(model, x).values)


def test_multipliers_and_subsets() -> None:
    model, x, _ = build("mlp")
    rows = jacobian(model, x)
    chosen = {"0.weight": 0.25, "2.bias": 3.0}
    expected = sum(c * kernel({k: rows[k]}, {k: rows[k]}) for k, c in chosen.items())
    result = ntk.empirical_ntk(model, x, params=chosen)
    assert_same(result, expected)
    assert (result.parametrization, result.multipliers) == ("scaled", (("0.weight", 0.25), ("2.bias", 3.0)))
    assert_same(
        ntk.empirical_ntk(model, x, params=["2.bias"]), kernel({"2.bias": rows["2.bias"]}, {"2.bias": rows["2.bias"]})
    )


def test_a_tied_weight_goes_by_any_of_its_names() -> None:
    model, x, _ = build("tied and called twice")
    a = ntk.empirical_ntk(model, x, params=["first.weight"])
    b = ntk.empirical_ntk(model, x, params=["second.weight"])
    assert_same(a, b.values)
    rows = {"w": jacobian(model, x)["first.weight"]}
    assert_same(a, kernel(rows, rows))


def test_frozen_parameters_count_only_when_named() -> None:
    model, x, _ = build("mlp")
    model[0].weight.requires_grad_(False)
    rows = jacobian_of_all(model, x)
    trained = {k: v for k, v in rows.items() if k != "0.weight"}
    assert_same(ntk.empirical_ntk(model, x), kernel(trained, trained))
    assert_same(ntk.empirical_ntk(model, x, params=list(rows)), kernel(rows, rows))


def jacobian_of_all(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    twin = mlp().double()
    twin.load_state_dict(model.state_dict())
    return jacobian(twin, x)


@pytest.mark.parametrize("reduce", ["none", "trace", "sum"])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("rows", [3, 5, 9, 14, 40])
def test_tiles_do_not_change_the_kernel(reduce: str, cross: bool, rows: int) -> None:
    model, x1, x2 = build("conv with BatchNorm")
    other = x2 if cross else None
    expected = ntk.empirical_ntk(model, x1, other, reduce=reduce)
    tiled = partial(ntk.empirical_ntk, model, x1, other, reduce=reduce, implementation="jacobian_contraction")
    budget = least_memory(tiled) + 8 * (rows - 3) * sum(p.numel() for p in model.parameters())
    assert_same(tiled(max_memory=budget), expected.values, 1e-13)


@pytest.mark.parametrize("counts", [(7, 0), (7, 5), (1, 0), (300, 0)])
@pytest.mark.parametrize("capacity", [3, 4, 8, 12, 100, 1000])
def test_tiles_stay_within_the_budget(counts: tuple[int, int], capacity: int) -> None:
    tile, chunk = contraction.tile_rows(counts, 10, 10 * capacity + 9)
    held = sum(counts) if tile >= max(counts) else 2 * tile
    assert tile >= 1
    assert chunk >= 1
    assert held + min(chunk, tile) <= capacity


class NoBatching(torch.autograd.Function):
    """A square whose backward pass looks at a value, which no batching rule can."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grad if float(grad.abs().sum()) > 0 else torch.zeros_like(x)


class Square(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return NoBatching.apply(x)


def test_an_operator_without_batching_rule_is_differentiated_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), Square(), nn.Linear(6, 2)).double()
    x = torch.randn(5, 4).double()
    rows = jacobian(model, x)
    calls = []
    original = contraction.Gradients._grad

    def counting(self: object, seeds: torch.Tensor, *, batched: bool) -> list:
        calls.append(batched)
        return original(self, seeds, batched=batched)

    monkeypatch.setattr(contraction.Gradients, "_grad", counting)
    result = ntk.empirical_ntk(model, x, implementation="jacobian_contraction")
    assert_same(result, kernel(rows, rows))
    assert calls == [True] + [False] * 10


def test_permuting_the_batch_permutes_the_kernel() -> None:
    model, x, _ = build("conv with BatchNorm")
    order = torch.tensor([3, 0, 4, 1, 2])
    assert_same(ntk.empirical_ntk(model, x[order]), ntk.empirical_ntk(model, x).values[order][:, order])


def test_duplicated_examples_have_equal_rows() -> None:
    model, x, _ = build("conv with BatchNorm")
    values = ntk.empirical_ntk(model, torch.cat([x, x[:1]])).values
    assert_same(values[-1], values[0])
    assert_same(values[-1, 0], values[0, 0])


def test_two_batches_are_normalized_apart() -> None:
    """x2 is a second batch: the cross kernel of x with itself equals the Gram matrix, a split batch does not."""
    model, x, _ = build("conv with BatchNorm", n1=6)
    gram = ntk.empirical_ntk(model, x).values
    assert_same(ntk.empirical_ntk(model, x, x), gram)
    split = ntk.empirical_ntk(model, x[:3], x[3:]).values
    assert np.abs(split - gram[:3, 3:]).max() > 0.01 * np.abs(gram).max()


@pytest.mark.parametrize("reduce", ["none", "trace", "sum"])
def test_layers_add_up_to_the_kernel(reduce: str) -> None:
    model, x, _ = build("tied and called twice")
    layers = ntk.layerwise_ntk(model, x, reduce=reduce, projection=ntk.center_rows)
    assert list(layers) == ["", "inner", "first", "head"]
    total = sum(list(layers.values())[1:], start=layers[""])
    assert_same(total, ntk.empirical_ntk(model, x, reduce=reduce, projection=ntk.center_rows).values, 1e-13)
    assert (total.layer, layers["inner"].layer) == (None, "inner")
    rows = {k: v for k, v in jacobian(model, x).items() if k.startswith("gain")}
    if reduce == "none":
        assert_same(layers[""], kernel(rows, rows))


def test_layerwise_cross_kernel() -> None:
    model, x1, x2 = build("conv with BatchNorm")
    layers = ntk.layerwise_ntk(model, x1, x2)
    first, second = jacobian(model, x1), jacobian(model, x2)
    for name, layer in layers.items():
        keys = [k for k in first if k.rpartition(".")[0] == name]
        assert_same(layer, kernel({k: first[k] for k in keys}, {k: second[k] for k in keys}))


def test_float32_is_what_its_dtype_explains() -> None:
    """Twice the error of the naive loop run in float32, over 12 networks: a maximum of few roundings scatters."""
    ratios = []
    for seed in range(12):
        model, x, _ = build("conv with BatchNorm", n1=6, seed=seed)
        rows = jacobian(model, x)
        exact = kernel(rows, rows).numpy()
        single = model.float()
        rows = jacobian(single, x.float())
        result = ntk.empirical_ntk(single, x.float())
        assert result.dtype == np.float32
        ratios.append(np.abs(result.values - exact).max() / np.abs(kernel(rows, rows).numpy() - exact).max())
    assert 0 < np.sqrt(np.mean(np.square(ratios))) <= 2


def test_dtype_computes_on_a_cast_copy() -> None:
    model, x, _ = build("conv with BatchNorm")
    model.float()
    result = ntk.empirical_ntk(model, x.float(), dtype=torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    rows = jacobian(model.double(), x.float().double())
    assert result.dtype == np.float64
    assert_same(result, kernel(rows, rows))


def test_no_grad_around_the_call_does_not_matter() -> None:
    model, x, _ = build("mlp")
    with torch.no_grad():
        result = ntk.empirical_ntk(model, x)
    rows = jacobian(model, x)
    assert_same(result, kernel(rows, rows))


def test_a_single_example_without_batch_statistics() -> None:
    model, x, _ = build("mlp", n1=1)
    rows = jacobian(model, x)
    assert_same(ntk.empirical_ntk(model, x), kernel(rows, rows))


def test_progress_counts_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    model, x, _ = build("mlp")
    compute = partial(ntk.empirical_ntk, model, x, implementation="jacobian_contraction")
    budget = least_memory(compute) + 8 * 2 * sum(p.numel() for p in model.parameters())
    compute(progress=True, max_memory=budget)
    last = capsys.readouterr().err.strip().split("\r")[-1].split()
    assert last[2] == last[4]
    assert int(last[2]) > 10
