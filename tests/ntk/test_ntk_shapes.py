"""Every route to an empirical kernel against whole-batch gradients, over shapes and settings of every layer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ntk
from tests.ntk.conformance import assert_same, each_route_with, reduced
from tests.ntk.oracle import jacobian, kernel
from tests.ntk.shapes import FEW, LAYERS, in_context


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel lengths:UserWarning")
@each_route_with("kind", LAYERS, every=3)
@given(data=st.data())
@FEW
def test_layers_of_any_shape(route: str, kind: str, data: st.DataObject) -> None:
    layer = data.draw(LAYERS[kind])
    before, after, cross = (data.draw(st.booleans()) for _ in range(3))
    outputs = data.draw(st.sampled_from([None, 1, 2]))
    reduce = data.draw(st.sampled_from(["none", "trace", "sum"]))
    projection = data.draw(st.sampled_from([None, ntk.center_rows]))
    torch.manual_seed(0)
    model = in_context(layer, before, after, outputs)
    x1, x2 = layer.input(data.draw(st.integers(2, 4))), layer.input(data.draw(st.integers(2, 4)))
    model(x1)  # lazy layers take their shape
    first, second = ({k: centered(v, projection) for k, v in jacobian(model, x).items()} for x in (x1, x2))
    settings = {"reduce": reduce, "implementation": route, "projection": projection}
    result = ntk.empirical_ntk(model, x1, x2 if cross else None, **settings)
    assert_same(result, reduced(kernel(first, second if cross else first), reduce))


def centered(rows: torch.Tensor, projection: object) -> torch.Tensor:
    if projection is None or rows.ndim < 4:
        return rows
    return rows - rows.mean(tuple(range(3, rows.ndim)), keepdim=True)
