"""What the layer-wise route saves itself: tests of independence, copies of layouts, gradients that are multiples."""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import ntk
from ntk import blocks, examples_apart, structured
from ntk.capture import Capture
from ntk.contraction import Contraction
from ntk.convolution import convolve
from ntk.forward import Evaluation
from ntk.recording import record, shares_of
from ntk.separable import Multiples, separate
from tests.ntk.modules import Apply, with_buffers
from tests.ntk.oracle import jacobian, kernel


def pooled(read_out: Callable[[int], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=2), nn.ReLU()]
    return nn.Sequential(*convolutions, read_out(12)).double()


def averaged(channels: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 7))


def flattened(channels: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * 9, 7))


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Calls of the separable form."""
    made: list[object] = []
    add = blocks._add_separable
    monkeypatch.setattr(blocks, "_add_separable", lambda *given: (made.append(given), add(*given))[1])
    return made


@pytest.mark.parametrize("reduce", ["none", "trace"])
@pytest.mark.parametrize("cross", [False, True])
def test_behind_global_pooling_gradients_of_outputs_are_multiples(reduce: str, cross: bool, sums: list[object]) -> None:
    model = pooled(averaged)
    x1, x2 = torch.randn(6, 3, 12, 12).double(), torch.randn(5, 3, 12, 12).double()
    first, second = jacobian(model, x1), jacobian(model, x2)
    expected = kernel(first, second if cross else first)
    expected = expected.diagonal(dim1=2, dim2=3).mean(-1) if reduce == "trace" else expected
    result = ntk.empirical_ntk(model, x1, x2 if cross else None, reduce=reduce)
    np.testing.assert_allclose(result.values, expected.numpy(), rtol=0, atol=1e-10 * float(expected.abs().max()))
    assert sums


class Products(TorchDispatchMode):
    """Entries of the largest matrix product made."""

    largest = 0

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        output = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            self.largest = max(self.largest, output.numel())
        return output


@pytest.mark.parametrize("reduce", ["none", "trace"])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize(("way", "entries"), [("positions", 4000), ("separable", 500)])
def test_temporaries_keep_within_their_entries(
    way: str, entries: int, cross: bool, reduce: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As what is multiplied for one example, or one channel, does here, and what is for all does not."""
    model = pooled(averaged)
    x1, x2 = torch.randn(6, 3, 12, 12).double(), torch.randn(5, 3, 12, 12).double()
    compute = partial(ntk.empirical_ntk, model, x1, x2 if cross else None, reduce=reduce)
    expected, largest = compute().values, {}
    monkeypatch.setattr(blocks, "_ranking", lambda costs: [way, "outer"])
    add = getattr(blocks, f"_add_{way}")
    for allowed in (10**9, entries):
        portions = examples_apart.Portions(7, 7, entries=allowed, sums=math.inf)
        monkeypatch.setattr(structured, "choose_portions", lambda *arguments, portions=portions: portions)
        products = Products()

        def adding(*given: object, products: Products = products) -> None:
            with products:
                add(*given)

        monkeypatch.setattr(blocks, f"_add_{way}", adding)
        values = compute().values
        largest[allowed] = products.largest
        np.testing.assert_allclose(values, expected, rtol=0, atol=1e-10 * np.abs(expected).max())
    assert largest[entries] <= entries < largest[10**9]


def test_behind_a_read_out_of_positions_they_are_not(sums: list[object]) -> None:
    model, x = pooled(flattened), torch.randn(6, 3, 12, 12).double()
    rows = jacobian(model, x)
    np.testing.assert_allclose(ntk.empirical_ntk(model, x).values, kernel(rows, rows).numpy(), rtol=0, atol=1e-10)
    assert not sums


def test_factors_are_found_and_multiply_back() -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)
    units, values = draw(4, 2, 3), draw(5, 2, 3, 6)
    units[:, 1, 1] = 0.0
    values[:, 0, 2] = 0.0
    derivatives = units[:, None, :, :, None] * values
    found = separate(derivatives)
    torch.testing.assert_close(found[0][:, None, :, :, None] * found[1], derivatives, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("example", [0, 4])
def test_one_entry_that_does_not_fit_is_seen(example: int) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)
    derivatives = draw(4, 1, 2, 3, 1) * draw(5, 2, 3, 6)
    derivatives[2, example, 1, 1, 5] *= 1 + 1e-12
    assert separate(derivatives) is None


@pytest.mark.parametrize("example", [0, 4])
def test_multiples_of_the_first_output(example: int) -> None:
    generator = torch.Generator().manual_seed(0)
    reference, factors = (torch.randn(*size, generator=generator).double() for size in ((5, 3), (3,)))
    reference[:, 1], factors[2] = 0.0, 0.0
    multiples, other = Multiples(reference), factors * reference
    torch.testing.assert_close(multiples.factors(other) * reference, other, rtol=1e-14, atol=0)
    other[example, 0] *= 1 + 1e-12
    assert multiples.factors(other) is None
    assert Multiples(reference).factors(torch.ones(5, 3).double()) is None
    reference = torch.tensor([[0.0], [1e-310]], dtype=torch.float64)  # by which others overflow
    assert Multiples(reference).factors(torch.tensor([[0.0], [1.0]]).double()) is None


def unlike_heads(model: Apply, x: Tensor) -> Tensor:
    """Outputs 0 and 1 of one nonlinearity, 2 of another, 3 of the first again."""
    hidden = model.a(x)
    first, second = hidden.tanh() @ model.head, hidden.sin().mean(1, keepdim=True)
    return torch.cat([first[:, :2], second, first[:, 2:]], 1)


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize(
    ("kind", "products"), [("linear head", 1), ("silent channel", 4), ("unlike heads", 3), ("linear", 1)]
)
def test_outputs_that_are_multiples_of_the_first_are_one_product(
    kind: str, products: int, cross: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In front of the last nonlinearity, output after output; those of "linear" are constants, and multiples too."""
    torch.manual_seed(0)
    layer, last = nn.Linear(4, 6), nn.Linear(6, 4, bias=False).requires_grad_(False)
    if kind == "silent channel":
        last.weight[0, 2] = 0.0
    behind = {
        "unlike heads": lambda: with_buffers(Apply(unlike_heads, a=layer), head=torch.randn(6, 3)),
        "linear": lambda: nn.Sequential(layer, last),
    }
    model = behind.get(kind, lambda: nn.Sequential(layer, nn.Tanh(), last))().double()
    made: list[int] = []
    multiply = blocks.OutputSum._multiply
    monkeypatch.setattr(blocks.OutputSum, "_multiply", lambda *given: (made.append(1), multiply(*given))[1])
    portions = examples_apart.Portions(4, 1, entries=1000, sums=math.inf)
    monkeypatch.setattr(structured, "choose_portions", lambda *arguments: portions)
    x1, x2 = torch.randn(6, 4).double(), torch.randn(5, 4).double()
    first, second = jacobian(model, x1), jacobian(model, x2)
    expected = kernel(first, second if cross else first).diagonal(dim1=2, dim2=3).mean(-1).numpy()
    result = ntk.empirical_ntk(model, x1, x2 if cross else None, reduce="trace")
    np.testing.assert_allclose(result.values, expected, rtol=0, atol=1e-12 * np.abs(expected).max())
    assert len(made) == products


@pytest.mark.parametrize(
    ("function", "shape", "weight", "options"),
    [
        (torch.conv2d, (4, 6, 9, 8), (4, 3, 3, 2), {"stride": 2, "padding": (1, 0), "groups": 2}),
        (torch.conv2d, (4, 3, 9, 8), (5, 3, 3, 3), {"dilation": (2, 1), "padding": 2}),
        (torch.conv2d, (4, 3, 9, 8), (5, 3, 3, 3), {"padding": "same"}),
        (torch.conv2d, (3, 9, 8), (5, 3, 3, 3), {}),
        (torch.conv3d, (2, 3, 5, 6, 7), (4, 3, 2, 3, 1), {"stride": (2, 1, 3), "padding": (1, 0, 0)}),
    ],
    ids=["strided groups", "dilated", "same", "unbatched", "3d"],
)
def test_convolution_and_its_derivative(
    function: Callable, shape: tuple[int, ...], weight: tuple[int, ...], options: dict
) -> None:
    """Against torch's own in float64, to what float32 explains."""
    x, w = torch.randn(shape), torch.randn(weight)
    bias = torch.randn(len(w))
    results = []
    for call, dtype in (
        (lambda *given, **rest: convolve(function, *given, **rest), torch.float32),
        (function, torch.float64),
    ):
        input = x.to(dtype).requires_grad_()
        output = call(input, w.to(dtype), bias.to(dtype), **options)
        seed = torch.linspace(-1, 1, output.numel(), dtype=dtype).reshape(output.shape)
        results.append((output.detach().double(), torch.autograd.grad(output, input, seed)[0].double()))
    for ours, expected in zip(*results, strict=True):
        assert float((ours - expected).abs().max()) < 64 * torch.finfo(torch.float32).eps * float(expected.abs().max())


def conv_then(function: Callable[[Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(1)
    return Apply(lambda s, x: s.head(function(s.conv(x))), conv=nn.Conv2d(3, 4, 3), head=nn.LazyLinear(2))


@pytest.mark.parametrize(
    "function",
    [
        lambda h: h.view(len(h), -1),
        lambda h: h.relu_().view(len(h), -1),
        lambda h: h.as_strided((len(h), 16), (64, 2)),
        lambda h: h.mul(2).view_as(torch.empty(len(h), 4 * 4 * 4)),
        lambda h: (h.view(len(h), -1).mul_(2), h.flatten(1))[1],
        lambda h: (h.flatten(1).mul_(2), h.flatten(1))[1],
    ],
    ids=["view", "in place", "as_strided", "view_as", "in place through a view", "in place through a flat view"],
)
def test_models_that_see_the_layout(function: Callable[[Tensor], Tensor]) -> None:
    """In float32, where convolutions are run channels-last."""
    model, x = conv_then(function), torch.randn(5, 3, 6, 6)
    model(x)
    twin = conv_then(function)
    twin(x)
    twin.load_state_dict(model.state_dict())
    twin.double()
    rows = jacobian(twin, x.double())
    expected = kernel(rows, rows).numpy()
    assert np.abs(ntk.empirical_ntk(model, x).values - expected).max() < 1e-5 * np.abs(expected).max()


MEET = {
    "mean over the batch": lambda h: h - h.mean(0),
    "softmax over the batch": lambda h: h.softmax(0),
    "softmax over the batch, counted from the end": lambda h: h.softmax(-2),
    "convolution of one example made of all": lambda h: F.conv1d(h, torch.ones(7, 7, 1).to(h)),
    "layer norm over all": lambda h: F.layer_norm(h, (7, 6)),
    "transposed": lambda h: (h @ h.T) @ h,
    "sum over all": lambda h: h * h.sum(),
    "rolled": lambda h: h.roll(1, 0),
    "batch norm": lambda h: F.batch_norm(h, None, None, training=True),
    "weights made of examples": lambda h: F.linear(h, h[:6]),
    "in place": lambda h: h.index_add(0, torch.tensor([0]), h[1:2]),
    "sum over no axes named": lambda h: h * h.sum(()),
    "mean of a scalar": lambda h: h * h.mean().sum(0),
}

APART = {
    "relu": torch.relu,
    "residual": lambda h: h + 0.5 * h.tanh(),
    "layer norm": lambda h: F.layer_norm(h, (6,)),
    "reshaped": lambda h: h.view(-1, 2, 3).flatten(1),
    "mean over features": lambda h: h - h.mean(1, keepdim=True),
    "layer norm by keyword": lambda h: F.layer_norm(h, normalized_shape=(6,)),
    "product into a buffer": lambda h: h + torch.matmul(torch.ones(7, 6), torch.eye(6), out=torch.empty(7, 6)),
    "pooled": lambda h: F.avg_pool1d(h.view(-1, 2, 3), 1).flatten(1),
}


def doubtful(function: Callable[[Tensor], Tensor]) -> tuple[int, int]:
    """How many calls before a function are known to be coupled by it, and how many must be tested."""
    torch.manual_seed(0)
    model = Apply(lambda s, x: s.head(function(s.first(x))), first=nn.Linear(4, 6), head=nn.Linear(6, 2)).double()
    (part,) = record(
        model, [("x1", torch.randn(7, 4).double())], [name for name, _ in model.named_parameters()], Evaluation()
    )
    capture: Capture = part.capture
    return capture.coupled, len(capture.doubtful_sites())


@pytest.mark.parametrize("name", MEET)
def test_calls_where_examples_may_meet_are_not_taken_on_trust(name: str) -> None:
    assert doubtful(MEET[name]) in ((1, 0), (0, 1))


@pytest.mark.parametrize("name", APART)
def test_calls_that_keep_examples_apart_need_no_test(name: str) -> None:
    assert doubtful(APART[name]) == (0, 0)


def test_a_function_that_torch_does_not_see_is_not_taken_on_trust() -> None:
    class Mean(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, h: Tensor) -> Tensor:
            return h - h.mean(0)

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            return gradient - gradient.mean(0)

    assert doubtful(Mean.apply) == (0, 1)
    torch.manual_seed(0)
    model = Apply(lambda s, x: s.head(Mean.apply(s.first(x))), first=nn.Linear(4, 6), head=nn.Linear(6, 2)).double()
    x = torch.randn(5, 4).double()
    rows = jacobian(model, x)
    np.testing.assert_allclose(ntk.empirical_ntk(model, x).values, kernel(rows, rows).numpy(), rtol=0, atol=1e-12)


def into_a_transposed_view(s: Apply, x: Tensor) -> Tensor:
    h = s.first(x)
    turned = h.T
    turned.add_(s.second(x))
    return s.head(h.tanh())


def cut_by_as_many_latents_as_examples(s: Apply, x: Tensor) -> Tensor:
    latents = s.second(torch.eye(4).to(x)[[0, 1, 2, 3, 0]])
    return s.head(s.first(x.unsqueeze(1).expand(-1, 5, -1)).clamp(max=latents).sum(1))


def times_itself(s: Apply, x: Tensor) -> Tensor:
    h = s.first(x)
    return s.head((h @ h).tanh())


@pytest.mark.parametrize("forward", [into_a_transposed_view, cut_by_as_many_latents_as_examples, times_itself])
def test_axes_of_one_length_are_not_taken_for_each_other(forward: Callable[[Apply, Tensor], Tensor]) -> None:
    """Five examples, five features or latents: the leading axis of one tensor is another axis of the other."""
    torch.manual_seed(0)
    model = Apply(forward, first=nn.Linear(4, 5), second=nn.Linear(4, 5), head=nn.Linear(5, 2)).double()
    x = torch.randn(5, 4).double()
    rows = jacobian(model, x)
    np.testing.assert_allclose(ntk.empirical_ntk(model, x).values, kernel(rows, rows).numpy(), rtol=0, atol=1e-12)


def one_of_examples(s: Apply, x: Tensor) -> Tensor:
    """Filters that each example makes for itself."""
    h, filters = s.conv(x), s.filters(x.mean((2, 3)))
    return s.head(F.conv2d(h.reshape(1, -1, 4, 4), filters.reshape(-1, 1, 3, 3), groups=4 * len(x)).view(len(x), -1))


MADE_WEIGHTS = {
    "scaled": lambda s, x: s.head(F.conv2d(x, 2 * s.conv.weight, s.conv.bias)[:, :, :2, :2].flatten(1)),
    "bias scaled": lambda s, x: s.head(F.conv2d(x, s.conv.weight, 2 * s.conv.bias)[:, :, :2, :2].flatten(1)),
    "used twice": lambda s, x: s.head(s.conv(x)[:, :, :2, :2].flatten(1)) + s.conv.weight.square().sum(),
    "made of examples": one_of_examples,
}


@pytest.mark.parametrize("name", MADE_WEIGHTS)
def test_convolutions_by_computed_weights_in_float32(name: str) -> None:
    """Whose weights or biases have derivatives that are not recorded, and whose fast form would lose them."""
    torch.manual_seed(0)
    layers = {"conv": nn.Conv2d(3, 4, 3), "filters": nn.Linear(3, 36), "head": nn.Linear(16, 2)}
    model, x = Apply(MADE_WEIGHTS[name], **layers), torch.randn(5, 3, 6, 6)
    values = ntk.empirical_ntk(model, x).values
    rows = jacobian(model.double(), x.double())
    expected = kernel(rows, rows).numpy()
    assert np.abs(values - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_is_not_taken_on_trust() -> None:
    assert doubtful(torch.jit.trace(lambda h: h - h.mean(0), torch.ones(7, 6))) == (0, 1)


def spatial_mean_taken_off(weight: Tensor) -> Tensor:
    """What Mean Shift Rejection leaves of a kernel [out, in, h, w], arXiv 1911.13173."""
    return weight - weight.mean((-2, -1), keepdim=True)


def matrix(weight: Tensor) -> Tensor:
    """[k, k] for a weight of k entries in a row."""
    k = weight[0].numel()
    return torch.arange(k * k, dtype=weight.dtype).sin().reshape(k, k)


ROW_WISE = {
    "weight mean": (ntk.center_rows, True),
    "spatial mean": (spatial_mean_taken_off, True),
    "not symmetric": (lambda weight: weight.roll(1, -1) + 0.5 * weight, True),
    "rows mixed": (lambda weight: weight - weight.mean(0), False),
    "rows weighed": (lambda weight: weight * torch.arange(len(weight)).to(weight)[:, None, None, None], False),
    "rows mixed a little": (lambda weight: weight + 1e-7 * weight.flip(0), False),
    "by a matrix": (lambda weight: (weight.flatten(1) @ matrix(weight)).reshape(weight.shape), True),
    "of one shape": (lambda weight: weight.reshape(4, 27).reshape(4, 3, 3, 3), False),
}


@pytest.mark.parametrize("name", ROW_WISE)
def test_projections_of_rows_act_on_patches(name: str) -> None:
    projection, by_rows = ROW_WISE[name]
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)]
    model, x = nn.Sequential(*layers).double(), torch.randn(5, 3, 6, 6).double()
    (part,) = record(model, [("x1", x)], ["0.weight"], Evaluation())
    plan = Contraction(
        "none", {"0.weight": 1.0}, {"0.weight": projection}, {"0.weight": ""}, None, lambda *counts: None
    )
    (share,) = shares_of([part], plan)
    assert share.factored == by_rows
    rows = jacobian(model, x)
    rows["0.weight"] = torch.stack([torch.stack([projection(row) for row in rows]) for rows in rows["0.weight"]])
    result = ntk.empirical_ntk(model, x, projection={"0.weight": projection})
    np.testing.assert_allclose(result.values, kernel(rows, rows).numpy(), rtol=0, atol=1e-12)
