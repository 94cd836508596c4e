"""One network in PyTorch and in JAX, by its description: the same outputs, the same empirical NTK, and its limit."""

import json
import math
from collections.abc import Callable

import jax
import numpy as np
import pytest
import torch
from torch import nn

import mimicnorm
import ntk
from mimicnorm import models
from ntk.analytic import from_torch, missing_counterparts, propagate
from ntk.analytic.compat import stax
from ntk.errors import InputMismatchError, NoCounterpartError


class Residual(nn.Module):
    """x + branch(x), the branch pre-activated."""

    def __init__(self, *branch: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.branch = nn.Sequential(*branch)
        self.shortcut = nn.Identity() if shortcut is None else shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shortcut(x) + self.branch(x)


def dense(activation: type[nn.Module] = nn.ReLU, width: int = 24) -> nn.Module:
    return nn.Sequential(
        nn.Linear(10, width), activation(), nn.Linear(width, width, bias=False), activation(), nn.Linear(width, 3)
    )


def convolutional(padding_mode: str = "zeros", stride: int = 2) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, padding_mode=padding_mode),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1, stride=stride, padding_mode=padding_mode),
        nn.ReLU(),
        nn.AvgPool2d(2, 1),
        nn.Flatten(),
        nn.Linear(8 * (3 if stride == 1 else 1) * (4 if stride == 1 else 2), 3),
    )


def batch_norm(affine: bool = True) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6, affine=affine),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1),
        nn.BatchNorm2d(6, affine=affine),
        nn.LeakyReLU(0.2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


def residual(norm: bool = False, shortcut: bool = True) -> nn.Module:
    def layer(before: int, after: int) -> list[nn.Module]:
        return [*([nn.BatchNorm2d(before)] if norm else []), nn.ReLU(), nn.Conv2d(before, after, 3, padding=1)]

    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        Residual(*layer(6, 6), *layer(6, 6)),
        Residual(*layer(6, 6), shortcut=nn.Conv2d(6, 6, 1) if shortcut else None),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


def mimic(model: nn.Module, x: torch.Tensor, exclude: tuple[str, ...] = (), **options: object) -> nn.Module:
    """The network under weight mean alone, without a last batch norm and without scalars on its branches."""
    method = mimicnorm.MimicNorm(linear=True, last_batch_norm=False, branch_scalar=False, **options)
    return mimicnorm.convert(model.double(), method, example_input=x.double(), exclude=exclude)


ROWS, IMAGES = torch.randn(7, 10, generator=torch.Generator().manual_seed(0)), torch.zeros(5, 3, 4, 5)
IMAGES = torch.randn(IMAGES.shape, generator=torch.Generator().manual_seed(1))
NETWORKS = {
    "dense": (dense, ROWS),
    "dense, GELU": (lambda: dense(nn.GELU), ROWS),
    "dense, SiLU": (lambda: dense(nn.SiLU), ROWS),
    "dense, tanh": (lambda: dense(nn.Tanh), ROWS),
    "dense, batch norm": (lambda: models.fcnn(10, 24, 2, 3, bias=True), ROWS),
    "dense, batch norm without gain": (lambda: models.fcnn(10, 24, 2, 3, affine=False), ROWS),
    "dense, weight mean": (lambda: mimic(dense(), ROWS), ROWS),
    "dense, weight mean as parametrization": (lambda: mimic(dense(), ROWS, projection="parametrization"), ROWS),
    "dense, weight mean, GELU": (lambda: mimic(dense(nn.GELU), ROWS), ROWS),
    "last batch norm": (
        lambda: mimicnorm.convert(
            models.fcnn(10, 24, 2, 3).double(), mimicnorm.MimicNorm(linear=True), example_input=ROWS.double()
        ),
        ROWS,
    ),
    "conv": (convolutional, IMAGES),
    "conv, circular": (lambda: convolutional("circular", 1), IMAGES),
    "conv, even filter": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 4, padding="same"), nn.ReLU(), nn.Flatten(), nn.Linear(80, 2)),
        IMAGES,
    ),
    "conv, batch norm": (batch_norm, IMAGES),
    "conv, batch norm without gain": (lambda: batch_norm(affine=False), IMAGES),
    "conv, weight mean": (lambda: mimic(convolutional(), IMAGES, ("0", "6")), IMAGES),
    "conv, circular, weight mean": (lambda: mimic(convolutional("circular", 1), IMAGES, ("0", "6")), IMAGES),
    "conv, centred stem, weight mean": (lambda: mimic(convolutional(), IMAGES, ("6",)), IMAGES),
    "conv, centred circular stem, weight mean": (lambda: mimic(convolutional("circular", 1), IMAGES, ("6",)), IMAGES),
    "residual": (residual, IMAGES),
    "residual, weight mean": (lambda: mimic(residual(shortcut=False), IMAGES, ("0",)), IMAGES),
    "residual, batch norm": (lambda: residual(norm=True), IMAGES),
}


PROJECTED_AFTER_STEPS = {
    name for name in NETWORKS if name.endswith(("weight mean", "weight mean, GELU", "last batch norm"))
}
"""Networks whose stored weights are centred and trained with a projection, which autograd does not see."""


FAST_TO_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Options of a program that runs once: it compiles in a fifth of the time, and computes the same."""


def outputs_and_kernel(apply_fn: Callable, params: object, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Outputs [n, o], and the mean over them of the NTK [n, n], from the Jacobian of the whole batch."""

    def twice(params: object) -> tuple[jax.Array, jax.Array]:
        outputs = apply_fn(params, x)
        return outputs, outputs

    jacobian, outputs = jax.jit(jax.jacrev(twice, has_aux=True), compiler_options=FAST_TO_COMPILE)(params)
    leaves = jax.tree.leaves(jacobian)  # each [n, o, *parameter]
    rows = np.concatenate([np.asarray(leaf, np.float64).reshape(*leaf.shape[:2], -1) for leaf in leaves], axis=2)
    return np.asarray(outputs), np.einsum("iop,jop->ij", rows, rows) / rows.shape[1]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", NETWORKS)
def test_same_weights_same_network(name: str, dtype: torch.dtype) -> None:
    build, x = NETWORKS[name]
    torch.manual_seed(3)
    model, x = build().double().train(), x.double()
    projection = mimicnorm.row_projections(model) if name in PROJECTED_AFTER_STEPS else None
    kernel = ntk.empirical_ntk(model, x, reduce="trace", projection=projection).values
    outputs = model(x).detach().numpy()
    exact = dtype == torch.float64
    model, x = model.to(dtype), x.to(dtype)
    with jax.enable_x64(exact):
        twin = from_torch(mimicnorm.describe(model, x, weights=True))
        found, found_kernel = outputs_and_kernel(twin.apply_fn, twin.params, x.numpy())
    tolerance = 1e-10 if exact else 1e-5
    assert found.dtype == (np.float64 if exact else np.float32)
    np.testing.assert_allclose(found, outputs, rtol=0, atol=tolerance * np.abs(outputs).max())
    np.testing.assert_allclose(found_kernel, kernel, rtol=0, atol=tolerance * np.abs(kernel).max())


def test_another_weight_another_network() -> None:
    # The comparison above sees a thousandth of one weight.
    model, x = dense().double(), ROWS.double()
    description = mimicnorm.describe(model, x, weights=True)
    description["layers"][2]["weight"] = description["layers"][2]["weight"] * 1.001
    with jax.enable_x64(True):
        twin = from_torch(description)
        found = np.asarray(twin.apply_fn(twin.params, x.numpy()))
    assert np.abs(found - model(x).detach().numpy()).max() > 1e-6


@pytest.mark.parametrize("norm", ["none", "weight_mean", "batch_norm"])
def test_kernel_of_a_described_network(norm: str) -> None:
    # The standard parametrization at the variances that the network was built with (He, first layer 1).
    width, x = 32, ROWS.double()
    model = models.fcnn(10, width, 2, 3, affine=False).double()
    variances = {"linear1": 1.0, "linear2": 2.0, "linear3": 2.0}
    if norm == "weight_mean":
        model = mimic(model, x)
    elif norm == "none":
        model = mimicnorm.convert(model, mimicnorm.NoNorm(), example_input=x)
    description = json.loads(json.dumps(mimicnorm.describe(model, x)))
    with jax.enable_x64(True):
        twin = from_torch(description, weight_variance=variances)
        found = twin.kernel_fn(x.numpy(), None, ("nngp", "ntk"))
    assert twin.params is None
    gram = (x @ x.T / 10).numpy()
    expected = propagate(gram, 2, norm, sigma_w2=2.0, parametrization="standard", width=(10, width, width))
    np.testing.assert_allclose(found.nngp, expected.nngp, rtol=1e-11)
    np.testing.assert_allclose(found.ntk, expected.ntk, rtol=0, atol=1e-11 * np.abs(expected.ntk).max())


def test_kernel_of_a_centred_stem() -> None:
    # The NTK of a network of one layer is no random matter: the empirical one is the analytic one.
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False), nn.Flatten())
    centred = mimicnorm.convert(
        nn.Sequential(model, nn.Linear(24, 2)).double(),
        mimicnorm.MimicNorm(last_batch_norm=False),
        example_input=IMAGES.double(),
    )[0]
    projection = {"0.weight": ntk.center_rows}
    description = mimicnorm.describe(centred, IMAGES.double())
    description["layers"][0]["weight_mean"] = True  # a part of a converted network does not know that it was converted
    with jax.enable_x64(True):
        twin = from_torch(description)
        shape, params = twin.init_fn(jax.random.key(0), IMAGES.shape)
        assert twin.apply_fn(params, IMAGES.double().numpy()).shape == shape == (5, 24)
        found = twin.kernel_fn(IMAGES.double().numpy(), None, "ntk")
    expected = ntk.empirical_ntk(centred, IMAGES.double(), reduce="trace", projection=projection).values
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


def test_a_frozen_bn_network_needs_train_mode() -> None:
    missing = missing_counterparts(mimicnorm.describe(batch_norm().eval(), IMAGES))
    assert set(missing) == {"1", "4"}
    assert "eval mode" in missing["1"]


@pytest.mark.parametrize(
    ("model", "x", "expected"),
    [
        (nn.Sequential(nn.ReLU(), nn.Linear(10, 3)), ROWS, {"0": "not Gaussian"}),
        (nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)), ROWS, {"2": "drops"}),
        (nn.Sequential(nn.Linear(10, 8), nn.ELU(), nn.Linear(8, 3)), ROWS, {"1": ""}),
        (nn.Sequential(nn.Linear(10, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3)), ROWS, {"1": ""}),
        (
            nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6, 3)),
            IMAGES,
            {"2": ""},
        ),
        (nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.Flatten(), nn.Linear(36, 3)), IMAGES, {"0": "grouped"}),
        (
            nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"), nn.Flatten(), nn.Linear(120, 3)),
            IMAGES,
            {"0": "padding .*'reflect'"},
        ),
        (nn.Sequential(nn.Linear(10, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)), ROWS, {"2": "not Gaussian"}),
        (nn.Sequential(nn.Linear(10, 8), Residual(nn.ReLU())), ROWS, {"1.": "not Gaussian"}),
        (nn.Sequential(nn.Linear(10, 8), Residual(nn.Identity())), ROWS, {"": "not independent"}),
        (
            nn.Sequential(nn.Conv2d(3, 6, 3), nn.AvgPool2d(2, padding=1, count_include_pad=False), nn.Flatten()),
            IMAGES,
            {"1": "leaves the padding out"},
        ),
    ],
)
def test_what_has_no_counterpart(model: nn.Module, x: torch.Tensor, expected: dict[str, str]) -> None:
    description = mimicnorm.describe(model, x)
    missing = missing_counterparts(description)
    assert len(missing) == 1
    ((name, reason),) = missing.items()
    ((start, pattern),) = expected.items()
    assert name.startswith(start) or name.startswith("add")
    with pytest.raises(NoCounterpartError, match=f"description: .*{name}.*{pattern}") as caught:
        from_torch(description)
    assert caught.value.layers == missing
    assert reason in str(caught.value)


def test_networks_of_the_papers() -> None:
    # ReLU behind the addition, max-pooling, concatenation: named, layer by layer.
    named = {"resnet18": "Gaussian", "vgg11": "largest", "squeezenet": "joins"}
    for name, reason in named.items():
        model = getattr(models, name)(num_classes=10)
        missing = missing_counterparts(mimicnorm.describe(model, torch.zeros(2, 3, 32, 32)))
        assert any(reason in why for why in missing.values())


def test_descriptions_that_are_refused() -> None:
    description = mimicnorm.describe(dense(), ROWS)
    with pytest.raises(
        ValueError, match=r"description: must be of format 1 .* received format 7. Describe the network"
    ):
        from_torch(description | {"format": 7})
    with pytest.raises(TypeError, match=r"description: must be a network .* received Sequential. Pass mimic"):
        from_torch(dense())
    with pytest.raises(ValueError, match=r"weight_variance: must be one of '0', '2', '4'; received '1'"):
        from_torch(description, weight_variance={"1": 1.0})
    with pytest.raises(ValueError, match=r"weight_variance\['2'\]: must be a finite, positive variance; received -2"):
        from_torch(description, weight_variance={"2": -2.0})
    with pytest.raises(ValueError, match=r"description: must have the weight_variance of layer '0'.*meta device"):
        from_torch(mimicnorm.describe(dense().to("meta")))
    twin = from_torch(description)
    with pytest.raises(InputMismatchError, match=r"x: must have the shape \[n, 10\] .* received \[4, 7\]"):
        twin.kernel_fn(np.zeros((4, 7)))
    with pytest.raises(ValueError, match=r"params: must be those of the network; None came.*weights=True"):
        twin.apply_fn(twin.params, ROWS.numpy())


def test_a_trained_gain_has_no_counterpart_whether_weights_are_there_or_not() -> None:
    model = models.fcnn(10, 8, 1, 2)
    model.norm1.weight.data.fill_(3.0)
    for weights in (False, True):
        missing = missing_counterparts(mimicnorm.describe(model, ROWS, weights=weights))
        assert missing == {"norm1": "batch norm with another gain than 1, or another shift than 0"}


def test_an_output_that_is_normalized_says_that_its_kernel_is_a_mean() -> None:
    model = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 2), nn.BatchNorm1d(2, affine=False, eps=1e-30))
    (note,) = from_torch(mimicnorm.describe(model, ROWS)).notes
    assert "stays random at infinite width" in note
    assert "normalized_ntk" in note


def test_measured_variances() -> None:
    # Without weight_variance the variances are those measured: 1/3 of what uniform He initialization is named after.
    model = dense(width=400)
    with jax.enable_x64(True):
        found = from_torch(mimicnorm.describe(model, ROWS)).kernel_fn(ROWS.double().numpy(), None, "nngp")
    # nn.Linear draws uniformly within ±1/√fan-in: σw² = 1/3, and biases of variance 1/(3 fan-in).
    gram = (ROWS.double() @ ROWS.double().T / 10).numpy() / 3 + 1 / 30
    once = propagate(gram, 1, sigma_w2=1 / 3).nngp
    expected = propagate(once, 1, sigma_w2=1 / 3, sigma_b2=1 / 1200).nngp
    # 400 × 400 and 400 × 10 uniform weights: their mean squares err by √(4/5)/√count.
    tolerance = 4 * math.sqrt(0.8 * (1 / 4000 + 1 / 160000 + 1 / 1200))
    np.testing.assert_allclose(found, expected, rtol=tolerance)


def test_frozen_parts_have_no_counterpart() -> None:
    for path in ("0.bias", "2.weight"):
        model = dense()
        model.get_parameter(path).requires_grad_(False)
        assert missing_counterparts(mimicnorm.describe(model, ROWS)) == {
            path[0]: "its parameters are not trained, and the tangent kernel would count them"
        }
    model = models.fcnn(10, 8, 1, 2)
    model.norm1.bias.requires_grad_(False)
    assert "not both" in missing_counterparts(mimicnorm.describe(model, ROWS))["norm1"]


def test_a_centred_layer_behind_a_pooling_has_no_counterpart() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AvgPool2d((2, 2), 1), nn.Conv2d(6, 4, (1, 2)), nn.Flatten(), nn.Linear(4, 2)
    )
    centred = mimic(model, IMAGES, ("0", "5"))
    assert "directly behind an activation" in missing_counterparts(mimicnorm.describe(centred, IMAGES.double()))["3"]


def test_a_centred_stem_takes_inputs_only() -> None:
    twin = from_torch(mimicnorm.describe(mimic(convolutional(), IMAGES, ("6",)), IMAGES.double()))
    with pytest.raises(TypeError, match=r"x: must be the network's input where its first layer is centred"):
        stax.serial(stax.Identity(), twin.layer)[2](IMAGES.numpy())
