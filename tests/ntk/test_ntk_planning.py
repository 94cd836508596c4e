"""Plans: what they say is what is done, and what it costs."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ntk
from ntk import blocks, errors, structured, tiles
from tests.ntk.modules import MODULES, Apply
from tests.ntk.modules import build as build_module
from tests.ntk.oracle import jacobian, kernel, least_memory, state_hash

IN_PLACE = {torch.ops.aten.addmm_: lambda to, first, second, **rest: 2 * first[0] * first[1] * second[1]}
"""What torch does not count."""


def mlp(*widths: int) -> nn.Module:
    layers = [layer for pair in itertools.pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def convolutional() -> nn.Module:
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)]
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2), nn.ReLU(), *head)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", MODULES)
def test_every_module_has_a_plan_and_stays_as_it_was(name: str) -> None:
    model, x1, x2 = build_module(name)
    before = state_hash(model)
    plan = ntk.plan(model, x1, x2)
    assert state_hash(model) == before
    assert 0 <= plan.total("structured").operations < float("inf")
    assert {layer.name for layer in plan.layers} <= set(dict(model.named_parameters()))
    assert repr(plan).count("\n") == len(plan.layers) + 2


@pytest.mark.parametrize(
    ("model", "shape"),
    [(mlp(30, 40, 40, 5), (20, 30)), (convolutional(), (6, 3, 12, 12))],
    ids=["mlp", "convolutional"],
)
@pytest.mark.parametrize("reduce", ["none", "trace"])
def test_operations_are_those_that_torch_counts(
    model: nn.Module, shape: tuple[int, ...], reduce: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cross kernel, as strips of a triangle are rounded up; of the forward passes that torch counts, too, the second
    is of two examples."""
    monkeypatch.setattr(blocks, "_ranking", lambda costs: [min(("positions", "outer"), key=costs.__getitem__)])
    model.double()
    x1, x2 = (torch.randn(n, *shape[1:], dtype=torch.float64) for n in (shape[0], shape[0] - 1))
    with FlopCounterMode(display=False) as forward:
        for x in (x1, x2, x1[:2], x2[:2]):
            model(x)
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        ntk.empirical_ntk(model, x1, x2, reduce=reduce)
    counted = counter.get_total_flops() - forward.get_total_flops()
    assert ntk.plan(model, x1, x2, reduce=reduce).total("structured").operations == pytest.approx(counted, rel=0.15)


def test_the_way_of_each_layer_is_the_one_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = convolutional().double(), torch.randn(6, 3, 12, 12, dtype=torch.float64)
    taken = []
    ranking = blocks._ranking

    def note(costs: dict[str, float]) -> list[str]:
        taken.append(min(("positions", "outer"), key=costs.__getitem__))
        return ranking(costs)

    monkeypatch.setattr(blocks, "_ranking", note)
    ntk.empirical_ntk(model, x)
    planned = [layer.way for layer in ntk.plan(model, x).layers if layer.name.endswith("weight")]
    assert sorted(planned) == sorted(taken)


def test_where_examples_meet_rows_are_planned() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    ways = {layer.name: layer.way for layer in ntk.plan(model, torch.randn(8, 4)).layers}
    assert ways["0.weight"] == "rows"
    assert ways["3.weight"] in ("positions", "outer")
    frozen = ntk.plan(model, torch.randn(8, 4), batch_statistics="frozen")
    assert "rows" not in {layer.way for layer in frozen.layers}


def test_what_has_no_rule_is_planned_from_its_jacobian() -> None:
    model, x, _ = build_module("gru")
    ways = {layer.name: layer.way for layer in ntk.plan(model, x).layers}
    assert {way for name, way in ways.items() if "_ih_" in name or "_hh_" in name} == {"jacobian"}


def test_a_model_that_looks_at_values_is_run() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x if float(x.sum()) > 1e9 else -x)

    assert [layer.name for layer in ntk.plan(Branching(), torch.randn(3, 4)).layers] == ["layer.weight", "layer.bias"]


def test_refusals() -> None:
    model, x = mlp(4, 3), torch.randn(5, 4)
    with pytest.raises(errors.UnknownNameError, match="reduce: must be one of 'none', 'trace', 'sum'; received 'mean'"):
        ntk.plan(model, x, reduce="mean")
    with pytest.raises(errors.UnknownNameError, match="route: must be one of 'structured'"):
        ntk.plan(model, x).total("dense")


def test_it_draws_itself() -> None:
    plan = ntk.plan(mlp(4, 3, 2), torch.randn(5, 4), max_memory="1GiB")
    text = plan._repr_html_()
    assert text.count("<tr>") == len(plan.layers) + 2
    assert "5 examples and 2 outputs at once" in text


@pytest.mark.parametrize("reduce", ["none", "trace", "sum"])
@pytest.mark.parametrize("cross", [False, True])
def test_tiles_of_examples(reduce: str, cross: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = convolutional().double()
    x1, x2 = (torch.randn(n, 3, 12, 12, dtype=torch.float64) for n in (21, 13))
    first, second = jacobian(model, x1), jacobian(model, x2)
    expected = kernel(first, second if cross else first)
    if reduce != "none":
        expected = expected.diagonal(dim1=2, dim2=3).mean(-1) if reduce == "trace" else expected.sum((2, 3))
    runs = []
    contract = tiles.contract_structured
    monkeypatch.setattr(tiles, "contract_structured", lambda *given: (runs.append(given), contract(*given))[1])
    compute = partial(ntk.empirical_ntk, model, x1, x2 if cross else None, reduce=reduce, implementation="structured")
    compute()
    assert len(runs) == 1
    plan = ntk.plan(model, x1, x2 if cross else None, reduce=reduce, max_memory=350_000)
    runs.clear()
    result = compute(max_memory=350_000)
    count = plan.tiling.tiles
    assert count > 1
    assert len(runs) == (
        -(-21 // plan.tiling.examples) * -(-13 // plan.tiling.examples) if cross else count * (count + 1) // 2
    )
    np.testing.assert_allclose(result.values, expected.numpy(), atol=1e-10 * float(expected.abs().max()), rtol=0)


def without_graph(h: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return h.mean(0)


def meeting_in_derivatives(s: Apply, x: torch.Tensor) -> torch.Tensor:
    """Before the first call that has a rule, and without a trace in the output."""
    h = torch.einsum("ni,io->no", x, s.w)
    total = h.sum(0)
    return s.net(h + total - total.detach())


NOT_DIVISIBLE = {
    "batch norm first": lambda: nn.Sequential(nn.BatchNorm1d(4), *mlp(4, 40, 3)),
    "batch norm first, no affine": lambda: nn.Sequential(nn.BatchNorm1d(4, affine=False), *mlp(4, 40, 3)),
    "centred inputs": lambda: Apply(lambda s, x: s.net(x - x.mean(0)), net=mlp(4, 40, 3)),
    "mean without a graph": lambda: Apply(lambda s, x: s.net(x - without_graph(x)), net=mlp(4, 40, 3)),
    "place in the batch": lambda: Apply(lambda s, x: s.net(x + torch.arange(len(x))[:, None]), net=mlp(4, 40, 3)),
    "meeting in derivatives": lambda: Apply(meeting_in_derivatives, net=mlp(4, 40, 3), w=(4, 4)),
    "number of examples": lambda: Apply(lambda s, x: s.net(x * (24 / len(x))), net=mlp(4, 40, 3)),
    "share of each example": lambda: Apply(lambda s, x: s.net(x / len(x)), net=mlp(4, 40, 3)),
    "largest of all": lambda: Apply(lambda s, x: s.net(x / x.square().sum(1).max()), net=mlp(4, 40, 3)),
    "24 examples or none": lambda: Apply(lambda s, x: s.net(x * {24: 1.0}[len(x)]), net=mlp(4, 40, 3)),
}


@pytest.mark.parametrize("name", NOT_DIVISIBLE)
def test_examples_that_meet_without_derivatives_are_not_tiled(name: str) -> None:
    torch.manual_seed(0)
    model, x = NOT_DIVISIBLE[name]().double(), torch.randn(24, 4, dtype=torch.float64)
    x[7] *= 10  # in the middle of a tile
    whole = ntk.empirical_ntk(model, x, reduce="trace").values
    result = ntk.empirical_ntk(model, x, reduce="trace", max_memory=40_000)
    np.testing.assert_allclose(result.values, whole, rtol=0, atol=1e-10 * np.abs(whole).max())
    alike = mlp(4, 40, 3).double()
    assert ntk.plan(alike, x, reduce="trace", max_memory=40_000).tiling.tiles > 1


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("reduce", ["none", "trace"])
def test_what_fits_in_tiles_needs_no_rows(cross: bool, reduce: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of two batches of different sizes, at every budget at which a tiling is found."""
    model = convolutional().double()
    x1, x2 = torch.randn(12, 3, 8, 8).double(), torch.randn(7, 3, 8, 8).double() if cross else None
    monkeypatch.setattr(structured, "_contract_rows", None)
    expected = ntk.empirical_ntk(model, x1, x2, reduce=reduce).values
    tilings = set()
    for budget in range(40_000, 400_000, 30_000):
        tiling = ntk.plan(model, x1, x2, reduce=reduce, max_memory=budget).tiling
        if tiling is not None:
            tilings.add(tiling.examples)
            values = ntk.empirical_ntk(model, x1, x2, reduce=reduce, max_memory=budget).values
            np.testing.assert_allclose(values, expected, rtol=0, atol=1e-10 * np.abs(expected).max())
    assert len(tilings) > 2


def test_constant_statistics_are_those_of_the_whole_batch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 3)).double()
    x = torch.randn(24, 4, dtype=torch.float64)
    compute = partial(ntk.empirical_ntk, model, x, reduce="trace", batch_statistics="frozen")
    np.testing.assert_allclose(compute(max_memory=70_000).values, compute().values, rtol=1e-10, atol=1e-12)


def test_what_a_model_keeps_from_a_plan_can_be_used_afterwards() -> None:
    kept = {}

    def forward(s: Apply, x: torch.Tensor) -> torch.Tensor:
        if "positions" not in kept:
            kept["positions"] = torch.arange(4, dtype=x.dtype)
        return s.layer(x + kept["positions"])

    model, x = Apply(forward, layer=nn.Linear(4, 2)), torch.randn(3, 4)
    ntk.plan(model, x)
    assert type(kept["positions"]) is torch.Tensor
    assert torch.isfinite(model(x)).all()


def test_examples_that_meet_are_not_tiled() -> None:
    """Negative control: taken apart, a batch-normalized network has another kernel."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)).double()
    x = torch.randn(12, 4, dtype=torch.float64)
    whole = ntk.empirical_ntk(model, x).values
    least = least_memory(partial(ntk.empirical_ntk, model, x))
    assert ntk.plan(model, x, max_memory=least).tiling is None
    np.testing.assert_allclose(ntk.empirical_ntk(model, x, max_memory=least).values, whole, rtol=1e-10, atol=1e-12)
    assert np.abs(ntk.empirical_ntk(model, x[:6]).values - whole[:6, :6]).max() > 0.01
