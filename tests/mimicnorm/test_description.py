"""Networks as plain data: what is understood is exact, what is not is named."""

import copy
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

import mimicnorm
from mimicnorm import MimicNorm, describe, models
from mimicnorm.branch import BranchAffine, BranchScalar, ConstantScale
from mimicnorm.normalization import ExactBatchNorm1d, LastBatchNorm1d

Layers = list[dict[str, Any]]


class Forward(nn.Module):
    """A network whose forward is a function of itself and x."""

    def __init__(self, forward: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.function = forward
        self.anchor = nn.Sequential()  # a module with a child is not taken as one operation
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class Opaque(nn.Module):
    """What torch.fx cannot read: it asks its input for a value."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Any:
        return self.network(x) if x.isfinite().all() else x


def layers(model: nn.Module, x: Any = None, **options: Any) -> Layers:
    description = describe(model, x, **options)
    if not options:
        assert json.loads(json.dumps(description)) == description
    return description["layers"]


def one(module: nn.Module, x: Tensor | None = None) -> dict[str, Any]:
    """The description of a module, without its name and inputs."""
    (layer,) = layers(nn.Sequential(module), x)
    assert (layer.pop("name"), layer.pop("inputs")) == ("0", ["input"])
    return layer


def of(forward: Callable[..., Any], x: Tensor | None = None, **modules: nn.Module) -> dict[str, Any]:
    """The last layer of a network given by its forward."""
    return layers(Forward(forward, **modules), x)[-1]


IMAGE = torch.ones(2, 3, 8, 8)
LEAKY = {"activation": "leaky_relu"}


def test_a_chain() -> None:
    network = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2, bias=False))
    description = describe(network, torch.ones(4, 3))
    assert (description["format"], description["input_shape"], description["training"]) == (1, [3], True)
    first, relu, last = description["layers"]
    assert relu == {"name": "1", "kind": "activation", "inputs": ["0"], "activation": "relu"}
    assert (first["inputs"], last["inputs"]) == (["input"], ["1"])
    assert (last["in_features"], last["out_features"], last["bias"], last["weight_mean"]) == (5, 2, False, False)
    assert (first["bias"], first["trainable"]) == (True, True)
    assert first["weight_variance"] == pytest.approx(network[0].weight.square().mean().item(), rel=1e-6)
    assert first["bias_variance"] == pytest.approx(network[0].bias.square().mean().item(), rel=1e-6)
    assert last["bias_variance"] is None
    assert describe(network.eval())["input_shape"] is None
    assert not describe(network)["training"]


def test_a_single_module() -> None:
    assert layers(nn.Linear(3, 5))[0]["kind"] == "linear"


def test_convolutions() -> None:
    conv = one(nn.Conv2d(4, 8, 3, stride=(1, 2), padding=1, padding_mode="circular", dilation=2, groups=2, bias=False))
    for key in ("weight_variance", "bias_variance"):
        conv.pop(key)
    assert conv == {
        "kind": "conv2d", "in_channels": 4, "out_channels": 8, "kernel_size": [3, 3], "stride": [1, 2],
        "padding": [1, 1], "padding_mode": "circular", "dilation": [2, 2], "groups": 2, "bias": False,
        "weight_mean": False, "trainable": True,
    }  # fmt: skip
    assert one(nn.Conv2d(4, 8, 3, padding="same"))["padding"] == "same"
    assert one(nn.Conv2d(4, 8, 3, padding="valid"))["padding"] == [0, 0]
    line = one(nn.Conv1d(4, 8, 3, padding=2))
    assert (line["kind"], line["kernel_size"], line["padding"]) == ("conv1d", [3], [2])
    frozen = nn.Conv2d(4, 8, 3).requires_grad_(False)
    assert not one(frozen)["trainable"]


def test_batch_norms() -> None:
    expected = {
        "kind": "batch_norm",
        "features": 4,
        "eps": 1e-5,
        "affine": True,
        "neutral": True,
        "momentum": 0.1,
        "track": True,
    }
    assert one(nn.BatchNorm2d(4)) == expected
    assert one(LastBatchNorm1d(4)) == expected | {"affine": False}
    assert one(ExactBatchNorm1d(4, eps=0.0, momentum=None)) == expected | {"eps": 0.0, "momentum": None}
    assert one(nn.BatchNorm1d(4, affine=False, track_running_stats=False))["track"] is False
    neutral = nn.BatchNorm1d(4).requires_grad_(False)
    assert one(neutral)["affine"] is False
    nn.init.constant_(neutral.weight, 2.0)
    assert "frozen gain" in one(neutral)["reason"]
    network = nn.Sequential(nn.BatchNorm1d(4).eval(), nn.BatchNorm1d(4))
    assert "not in the mode" in layers(network)[0]["reason"]
    assert {layer["kind"] for layer in layers(network.eval())} == {"batch_norm"}


@pytest.mark.parametrize(
    ("module", "call", "expected"),
    [
        (nn.ReLU(), functional.relu, {"activation": "relu"}),
        (nn.ReLU(inplace=True), torch.relu, {"activation": "relu"}),
        (
            nn.LeakyReLU(0.2),
            lambda x: functional.leaky_relu(x, 0.2),
            {"activation": "leaky_relu", "negative_slope": 0.2},
        ),
        (nn.LeakyReLU(), functional.leaky_relu, {"activation": "leaky_relu", "negative_slope": 0.01}),
        (nn.GELU(), functional.gelu, {"activation": "gelu"}),
        (nn.GELU("tanh"), lambda x: functional.gelu(x, approximate="tanh"), {"activation": "gelu_tanh"}),
        (nn.SiLU(), functional.silu, {"activation": "silu"}),
        (nn.Tanh(), torch.tanh, {"activation": "tanh"}),
        (nn.Tanh(), lambda x: x.tanh(), {"activation": "tanh"}),
        (None, torch.erf, {"activation": "erf"}),
        (None, torch.sin, {"activation": "sine"}),
        (None, lambda x: x.abs(), {"activation": "abs"}),
        (None, lambda x: x.relu_(), {"activation": "relu"}),
    ],
)
def test_activations(module: nn.Module | None, call: Callable[[Tensor], Tensor], expected: dict) -> None:
    wanted = {"kind": "activation"} | expected
    if module is not None:
        assert one(module) == wanted
    called = of(lambda self, x: call(x))
    assert called["inputs"] == ["input"]
    assert {key: called[key] for key in wanted} == wanted


def test_pooling() -> None:
    pool = {"kind": "avg_pool", "kernel_size": [2, 2], "stride": [2, 2], "padding": [0, 0], "count_include_pad": True}
    assert one(nn.AvgPool2d(2)) == pool
    assert one(nn.AvgPool1d(3, stride=1, padding=1))["padding"] == [1]
    assert "ceil_mode" in one(nn.AvgPool2d(2, ceil_mode=True))["reason"]
    assert one(nn.AdaptiveAvgPool2d((1, 1))) == {"kind": "global_avg_pool", "keepdim": True}
    assert "pools to 2 positions" in one(nn.AdaptiveAvgPool2d(2))["reason"]


@pytest.mark.parametrize(
    "pool",
    [
        lambda x: x.mean((2, 3)),
        lambda x: x.mean(dim=[-1, -2]),
        lambda x: torch.mean(x, (3, 2)),
    ],
)
def test_mean_over_positions(pool: Callable[[Tensor], Tensor]) -> None:
    expected = {"name": "mean_1", "kind": "global_avg_pool", "inputs": ["conv"], "keepdim": False}
    assert of(lambda self, x: pool(self.conv(x)), conv=nn.Conv2d(3, 4, 3)) == expected
    assert of(lambda self, x: pool(x), IMAGE)["kind"] == "global_avg_pool"
    assert "unknown number of axes" in of(lambda self, x: pool(x))["reason"]


def test_other_means_are_not_guessed() -> None:
    assert "not over all positions" in of(lambda self, x: x.mean(1), IMAGE)["reason"]
    assert "not over all positions" in of(lambda self, x: x.mean(), IMAGE)["reason"]
    assert of(lambda self, x: functional.adaptive_avg_pool2d(x, 1))["keepdim"] is True
    assert of(lambda self, x: x.mean((2, 3), keepdim=True), IMAGE)["keepdim"] is True


@pytest.mark.parametrize(
    "flatten",
    [
        lambda x: x.flatten(1),
        lambda x: torch.flatten(x, start_dim=1),
        lambda x: x.view(x.size(0), -1),
        lambda x: x.reshape(x.shape[0], -1),
        lambda x: x.reshape((x.size()[0], -1)),
    ],
)
def test_flattening(flatten: Callable[[Tensor], Tensor]) -> None:
    assert of(lambda self, x: flatten(x), IMAGE)["kind"] == "flatten"


def test_other_reshapes_are_not_guessed() -> None:
    assert "flattens axes 0" in of(lambda self, x: x.flatten())["reason"]
    assert "reshapes to another shape" in of(lambda self, x: x.view(-1, x.size(1)))["reason"]
    assert "reshapes to another shape" in of(lambda self, x: x.view(2, -1))["reason"]
    assert one(nn.Flatten(1, 3), IMAGE)["kind"] == "flatten"
    assert one(nn.Flatten(1, 2), IMAGE)["kind"] == "unsupported"


def test_scales() -> None:
    assert one(ConstantScale(0.5)) == {"kind": "scale", "factor": 0.5, "trainable": False}
    assert one(BranchScalar(0.25)) == {"kind": "scale", "factor": 0.25, "trainable": True}
    assert one(BranchAffine())["kind"] == "unsupported"
    for call, factor in ((lambda x: 3 * x, 3.0), (lambda x: x * 0.5, 0.5), (lambda x: x / 4, 0.25)):
        scaled = of(lambda self, x, call=call: call(x))
        assert (scaled["factor"], scaled["trainable"]) == (factor, False)
    network = Forward(lambda self, x: self.gain * x)
    network.gain = nn.Parameter(torch.tensor([0.7], dtype=torch.float64))
    assert layers(network)[-1] == {
        "name": "mul_1", "kind": "scale", "inputs": ["input"], "factor": 0.7, "trainable": True
    }  # fmt: skip
    network.gain = nn.Parameter(torch.ones(3))
    assert layers(network)[-1]["reason"] == "multiplies by a tensor"


def test_additions() -> None:
    linear = nn.Linear(3, 3)
    for call in (lambda self, x: x + self.f(x), lambda self, x: torch.add(x, self.f(x))):
        assert of(call, f=linear) == {"name": "add_1", "kind": "add", "inputs": ["input", "f"]}
    inplace = of(lambda self, x: self.f(x).add_(x), f=linear)
    assert (inplace["kind"], inplace["inputs"]) == ("add", ["f", "input"])
    assert of(lambda self, x: x + x)["inputs"] == ["input", "input"]
    assert of(lambda self, x: sum([self.f(x), x]), f=linear)["kind"] == "add"
    assert of(lambda self, x: torch.add(x, self.f(x), alpha=2), f=linear)["reason"] == "adds a multiple"
    assert of(lambda self, x: x + 1.0)["reason"] == "adds a constant"


def test_dropout() -> None:
    assert one(nn.Dropout(0.0)) == {"kind": "identity"}
    assert "drops at random with p = 0.3" in one(nn.Dropout(0.3))["reason"]
    network = nn.Sequential(nn.Dropout(0.3), nn.Identity())
    assert [layer["kind"] for layer in layers(network.eval())] == ["identity", "identity"]
    called = Forward(lambda self, x: functional.dropout(x, 0.3, self.training))
    assert layers(called)[-1]["kind"] == "unsupported"
    assert layers(called.eval())[-1]["kind"] == "identity"


class Doubled(nn.Linear):
    """A layer with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    ("module", "kind", "reason"),
    [
        (nn.MaxPool2d(2), "MaxPool2d", "largest"),
        (nn.Softmax(1), "Softmax", "couples"),
        (nn.GroupNorm(1, 3), "GroupNorm", "normalizes each example"),
        (nn.LayerNorm(3), "LayerNorm", "normalizes each example"),
        (nn.ELU(), "ELU", "none of the operations"),
        (nn.PReLU(), "PReLU", "none of the operations"),
        (Doubled(3, 3), "Doubled", "none of the operations"),
        (nn.ConvTranspose2d(3, 3, 3), "ConvTranspose2d", "none of the operations"),
        (nn.Conv3d(3, 3, 3), "Conv3d", "none of the operations"),
        (parametrizations.weight_norm(nn.Linear(3, 3)), "ParametrizedLinear", "computes its weight by _WeightNorm"),
        (nn.TransformerEncoderLayer(4, 2, 4).self_attn, "MultiheadAttention", "products of inputs"),
    ],
)
def test_unsupported_modules(module: nn.Module, kind: str, reason: str) -> None:
    if isinstance(module, nn.MultiheadAttention):
        found = layers(Forward(lambda self, x: self.a(x, x, x)[0] + x, a=module))[0]
    else:
        found = one(module)
    assert (found["kind"], found["type"]) == ("unsupported", kind)
    assert reason in found["reason"]


@pytest.mark.parametrize(
    ("call", "kind", "reason"),
    [
        (lambda self, x: torch.cat([x, x], 1), "cat", "joins tensors"),
        (lambda self, x: x.chunk(2, 1)[0], "getitem", "takes a part"),
        (lambda self, x: x * torch.relu(x), "mul", "multiplies by a tensor"),
        (lambda self, x: functional.max_pool2d(x, 2), "boolean_dispatch", "none of the operations"),
        (lambda self, x: functional.softmax(x, 1), "softmax", "couples"),
        (lambda self, x: x - torch.relu(x), "sub", "none of the operations"),
        (lambda self, x: functional.scaled_dot_product_attention(x, x, x), "scaled_dot_product_attention", "products"),
    ],
)
def test_unsupported_calls(call: Callable[..., Tensor], kind: str, reason: str) -> None:
    found = of(call)
    assert found["kind"] == "unsupported"
    assert reason in found["reason"] or kind == "boolean_dispatch"
    assert found["type"] == kind or kind == "boolean_dispatch"


@torch.fx.wrap
def relu(x: Tensor) -> Tensor:
    return x.exp()


def test_an_impostor_is_not_taken_by_its_name() -> None:
    assert of(lambda self, x: relu(x)) == {
        "name": "call_1", "kind": "unsupported", "inputs": ["input"], "type": "relu",
        "reason": "is none of the operations that have a kind",
    }  # fmt: skip


def test_hooks_and_shared_weights() -> None:
    hooked = nn.Linear(3, 3)
    hooked.register_forward_hook(lambda module, args, output: 2 * output)
    assert "forward hooks" in one(hooked)["reason"]
    shared = nn.Linear(3, 3)
    first, _, second, again = layers(nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU()))
    assert (first["kind"], second["reason"]) == ("linear", "shares its weight with '0'")
    assert (second["name"], again["kind"]) == ("0_2", "activation")
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    assert layers(tied)[1]["reason"] == "shares its weight with '0'"
    twice = layers(Forward(lambda self, x: self.act(self.act(x)), act=nn.ReLU()))
    assert [layer["name"] for layer in twice] == ["act", "act_2"]
    linear_twice = layers(Forward(lambda self, x: self.f(self.f(x)), f=nn.Linear(3, 3)))
    assert linear_twice[1]["reason"] == "shares its weight with 'f'"


def test_writing_over_an_input_that_is_read_again() -> None:
    spoiled = of(lambda self, x: self.f(self.act(x)) + x, f=nn.Linear(3, 3), act=nn.ReLU(inplace=True))
    assert spoiled["reason"] == "reads a tensor that 'act' has written over"
    lost = layers(Forward(lambda self, x: (functional.relu_(x), self.f(x))[1], f=nn.Linear(3, 3)))
    assert "written over" in lost[-1]["reason"]
    assert of(lambda self, x: self.f(self.act(x)) + x, f=nn.Linear(3, 3), act=nn.ReLU())["kind"] == "add"
    sound = of(lambda self, x: self.act(self.f(x)) + x, f=nn.Linear(3, 3), act=nn.ReLU(inplace=True))
    assert sound["kind"] == "add"


def test_linear_on_tokens() -> None:
    assert one(nn.Linear(3, 3), torch.ones(2, 5, 3))["reason"] == "acts on the last of 3 axes"
    assert one(nn.Linear(3, 3), torch.ones(2, 3))["kind"] == "linear"


@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_models(name: str) -> None:
    if name == "fcnn":
        network, x = models.fcnn(4, 6, 3, 5), torch.ones(2, 4)
    else:
        network, x = models.MODELS[name](5, width=0.125), torch.ones(2, 3, 32, 32)
    found = layers(network, x)
    assert found == layers(network)
    names = ["input", *(layer["name"] for layer in found)]
    assert len(set(names)) == len(names)
    for index, layer in enumerate(found, start=1):
        assert set(layer["inputs"]) <= set(names[:index])
    weighted = [m for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert sum(layer["kind"] in ("linear", "conv2d") for layer in found) == len(weighted)
    strange = {layer["type"] for layer in found if layer["kind"] == "unsupported"}
    known = {
        "vgg": {"MaxPool2d", "Dropout"}, "squeezenet": {"MaxPool2d", "cat"}, "densenet121": {"cat"},
        "mobilenet_v2": {"ReLU6"}, "shufflenet_v2": {"ChannelShuffle", "getitem", "chunk", "cat"},
    }  # fmt: skip
    assert strange == known.get(name.rstrip("0123456789") if name.startswith("vgg") else name, set())


@pytest.mark.parametrize("projection", ["step", "parametrization"])
def test_converted_networks(projection: str) -> None:
    method = MimicNorm(linear=True, projection=projection)
    network = mimicnorm.convert(models.fcnn(4, 6, 2, 5), method)
    found = {layer["name"]: layer for layer in layers(network)}
    means = {name: layer["weight_mean"] for name, layer in found.items() if layer["kind"] == "linear"}
    assert means == {"linear1": False, "linear2": True, "linear3": True}
    assert found["norm1"]["kind"] == "identity"
    assert list(found)[-1] == "last_batch_norm"
    weight = network.linear2.weight.detach().double()  # what it computes with: centred
    assert found["linear2"]["weight_variance"] == pytest.approx(float((weight**2).sum() / (6 * 5)), rel=1e-6)


def test_weight_variance_is_that_before_centring() -> None:
    network = mimicnorm.convert(models.fcnn(300, 400, 2, 5), MimicNorm(linear=True))
    layer = layers(network)[3]
    assert layer["name"] == "linear2"
    theorem_3 = 2 * 400 / (399 * (1 - 1 / np.pi)) / 400
    # Of 400 x 399 draws the mean square has a relative standard error of √(2/159600).
    assert layer["weight_variance"] == pytest.approx(theorem_3, rel=4 * np.sqrt(2 / 159600))
    assert layer["weight_variance"] != pytest.approx(2 / 400, rel=4 * np.sqrt(2 / 159600))  # the control: He's


def test_branch_scalars_and_other_methods() -> None:
    network = mimicnorm.convert(models.preact_resnet18(5, width=0.125), MimicNorm())
    found = layers(network)
    scales = [layer for layer in found if layer["kind"] == "scale"]
    assert [layer["factor"] for layer in scales] == pytest.approx([n**-0.5 for n in range(1, 9)], rel=1e-6)
    assert all(layer["trainable"] for layer in scales)
    additions = [layer for layer in found if layer["kind"] == "add"]
    assert [layer["inputs"][0] for layer in additions] == [layer["name"] for layer in scales]
    assert all(layer["weight_mean"] for layer in found if layer["kind"] == "conv2d")
    standardized = mimicnorm.convert(models.preact_resnet18(5, width=0.125), "weight_standardization")
    reasons = {layer["reason"] for layer in layers(standardized) if layer.get("type", "").startswith("Parametrized")}
    assert reasons == {"computes its weight by StandardizedWeight"}
    rejected = mimicnorm.convert(models.preact_resnet18(5, width=0.125), mimicnorm.MeanShiftRejection(scaling="none"))
    assert any("trains under the projection" in layer.get("reason", "") for layer in layers(rejected))


def test_a_converted_part_keeps_its_projection() -> None:
    inner = mimicnorm.convert(models.fcnn(4, 6, 1, 5), MimicNorm(linear=True, last_batch_norm=False))
    found = {layer["name"]: layer for layer in layers(nn.Sequential(inner, nn.ReLU(), nn.Linear(5, 2)))}
    assert found["0.linear2"]["weight_mean"]
    assert not found["2"]["weight_mean"]


def test_weights() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2, bias=False)).double()
    first, norm, _, last = layers(network, weights=True)
    np.testing.assert_array_equal(first["weight"], network[0].weight.detach().numpy())
    np.testing.assert_array_equal(first["bias_values"], network[0].bias.detach().numpy())
    assert first["weight"].dtype == np.float64
    assert last["bias_values"] is None
    assert [norm[key].tolist() for key in ("weight", "bias_values", "running_mean", "running_var")] == [
        [1.0] * 4, [0.0] * 4, [0.0] * 4, [1.0] * 4
    ]  # fmt: skip
    first["weight"][:] = 7  # a copy
    assert not (network[0].weight == 7).any()
    centred = mimicnorm.convert(models.fcnn(4, 6, 1, 5), MimicNorm(linear=True, projection="parametrization"))
    stored = layers(centred, weights=True)[3]["weight"]
    np.testing.assert_array_equal(stored, centred.linear2.parametrizations.weight.original.detach().numpy())


def test_a_network_that_fx_cannot_read() -> None:
    chain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    network = Opaque(chain)
    found = layers(network, IMAGE)
    assert [(layer["name"], layer["kind"]) for layer in found] == [
        ("network.0", "conv2d"), ("network.1", "batch_norm"), ("network.2", "activation"),
        ("network.3", "flatten"), ("network.4", "linear"),
    ]  # fmt: skip
    called = layers(Opaque(Forward(lambda self, x: torch.relu(x) + x)), IMAGE)
    assert [layer["kind"] for layer in called] == ["activation", "unsupported"]
    assert "running it does not show" in called[1]["reason"]
    with pytest.raises(ValueError, match=r"model must be traceable by torch.fx when there is no example_input"):
        describe(network)


def test_the_network_is_left_as_it_was() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    before = copy.deepcopy(network.state_dict())
    random = torch.random.get_rng_state()
    describe(network, torch.ones(5, 3), weights=True)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert torch.equal(random, torch.random.get_rng_state())
    assert network.training
    assert network[1].training


def test_what_the_output_does_not_need_is_left_out() -> None:
    found = layers(Forward(lambda self, x: (self.aside(x), self.f(x))[1], f=nn.Linear(3, 3), aside=nn.ELU()))
    assert [layer["name"] for layer in found] == ["f"]


class Two(nn.Module):
    """A network of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(3, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.f(x) + y


class Optional(Two):
    """One of which may be left out."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.f(x) if y is None else self.f(x) + y


def test_an_argument_that_is_left_out() -> None:
    assert [layer["name"] for layer in layers(Optional())] == ["f"]
    assert [layer["name"] for layer in layers(Optional(), torch.ones(2, 3))] == ["f"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: describe("resnet"), "model must be a torch.nn.Module; got 'resnet'"),
        (lambda: describe(Forward(lambda self, x: (x, x))), "model must return one tensor that it computes from its"),
        (lambda: describe(Forward(lambda self, x: x)), "model must return one tensor that it computes from its input"),
        (lambda: describe(Two()), "model must compute its output from one tensor.*got input, input_2: wrap it"),
        (lambda: describe(nn.Sequential(nn.Linear(3, 2)), torch.ones(2, 4)), "example_input must be a batch"),
        (lambda: describe(nn.Linear(3, 2, device="meta"), weights=True), "one on the meta device: load a state dict"),
        (lambda: describe(nn.Linear(3, 2).bfloat16(), weights=True), "one of bfloat16: .*model.float"),
        (lambda: describe(nn.Sequential(nn.LazyLinear(2))), "must have shapes; got the lazy parameter '0.weight'"),
    ],
)
def test_refusals(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
