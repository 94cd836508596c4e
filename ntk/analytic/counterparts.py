"""The analytic counterpart of each kind of layer that a description of a PyTorch network may hold."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntk.analytic import layers
from ntk.analytic.activations import DualActivation, dual_activation, leaky_relu, sine
from ntk.analytic.compat import stax
from ntk.errors import UnknownNameError

INPUT = "input"
"""Name of the network's input among the inputs of its layers."""

WEIGHTED = ("linear", "conv1d", "conv2d")
_NUMBERS = {1: ("NCH", "OIH", "NCH"), 2: ("NCHW", "OIHW", "NCHW")}
_EPSILON_NOTE = "The kernel is that of batch norm without the small number that is added to its variance."
_OUTPUT_NOTE = (
    "The output is that of a batch norm, whose kernel stays random at infinite width: this is its mean over "
    "initializations. For one initialization, see ntk.analytic.normalized_ntk."
)
_UNCENTRED = "its weight has zero row means but does not stand directly behind an activation"
_FROZEN = "its parameters are not trained, and the tangent kernel would count them"
_NOT_GAUSSIAN = "acts on what is not Gaussian at infinite width"


@dataclass(frozen=True, eq=False)
class Step:
    """A neural-tangents layer and the parameters of the PyTorch layer that it stands for.

    Attributes:
        layer: The triple.
        params: Parameters for its apply_fn; None where the description has no weights.
        weighted: Whether it draws weights, which make what comes out independent of other branches.
    """

    layer: Any
    params: Any
    weighted: bool = False


@dataclass(frozen=True, eq=False)
class Counterpart:
    """What stands for one layer.

    Attributes:
        steps: The layers; none for what needs none.
        spatial: Number of spatial dimensions of what comes out.
        gaussian: Whether what comes out is Gaussian at infinite width.
        rectified: Whether what comes out is that of a ReLU, directly.
        centred: Whether the mean over channels has been subtracted already.
        pending: An activation that is left to the convolution behind it, which centres by patches.
        fused: Whether what comes out has been through the activation behind it already.
        prepare: What is done to the network's input before these layers, for a centred weight that sees it.
        missing: Why there is no counterpart; empty if there is.
        note: In what the kernel differs from that of the layer.
    """

    steps: tuple[Step, ...] = ()
    spatial: int = 0
    gaussian: bool = False
    rectified: bool = False
    centred: bool = False
    pending: DualActivation | None = None
    fused: bool = False
    prepare: Callable[[Any], Any] | None = None
    missing: str = ""
    note: str = ""


@dataclass(frozen=True, eq=False)
class Site:
    """One layer in its place.

    Attributes:
        name: Its name.
        node: Its description.
        nodes: All layers by name, in execution order.
        source: The counterpart of its (first) input.
        sources: The counterparts of all its inputs.
        training: Whether the network is in train mode.
        weight_variance: σw² by name of layer, in place of the measured ones.
    """

    name: str
    node: Mapping[str, Any]
    nodes: Mapping[str, Mapping[str, Any]]
    source: Counterpart
    sources: tuple[Counterpart, ...]
    training: bool
    weight_variance: Mapping[str, float]

    @property
    def users(self) -> list[str]:
        """Names of the layers that take its output."""
        return _users(self.name, self.nodes)

    @property
    def sees_input(self) -> bool:
        """Whether it alone takes the network's input."""
        return self.node["inputs"] == [INPUT] and len(_users(INPUT, self.nodes)) == 1

    @property
    def channel_axis(self) -> int:
        """Axis of the channels, as in PyTorch."""
        return 1 if self.source.spatial else -1


def counterpart(
    name: str,
    nodes: Mapping[str, Mapping[str, Any]],
    known: Mapping[str, Counterpart],
    description: Mapping[str, Any],
    weight_variance: Mapping[str, float],
) -> Counterpart:
    """Return what stands for one layer.

    Args:
        name: Its name.
        nodes: All layers by name, in execution order.
        known: The counterparts of the layers before it.
        description: The description of the network.
        weight_variance: σw² by name of layer, in place of the measured ones.

    Returns:
        The counterpart; its ``missing`` says why there is none.
    """
    node = nodes[name]
    start = Counterpart(spatial=_input_spatial(description))
    sources = tuple(known.get(source, start) for source in node["inputs"]) or (start,)
    site = Site(name, node, nodes, sources[0], sources, bool(description.get("training", True)), weight_variance)
    rule = _RULES.get(node["kind"])
    if rule is None:
        what = node.get("type") or node["kind"]
        return Counterpart(spatial=site.source.spatial, gaussian=True, missing=node.get("reason") or f"{what}: unknown")
    if len(node["inputs"]) > 1 and node["kind"] != "add":
        return _missing(site, "it has several inputs")
    return rule(site)


def _users(name: str, nodes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [other for other, node in nodes.items() for source in node["inputs"] if source == name]


def _input_spatial(description: Mapping[str, Any]) -> int:
    """Number of spatial dimensions of the input: from its shape, or else from the first layer that tells."""
    shape = description.get("input_shape")
    if shape is not None:
        return len(shape) - 1
    kinds = [layer["kind"] for layer in description["layers"]]
    return next((int(kind[4]) for kind in kinds if kind in ("conv1d", "conv2d")), 0)


def _missing(site: Site, reason: str) -> Counterpart:
    """No counterpart; what follows is judged as if there were one."""
    return Counterpart(spatial=site.source.spatial, gaussian=True, missing=reason)


def _variances(site: Site, fan_in: int) -> dict[str, Any]:
    """The standard deviations of a layer's weights and biases, in the standard parametrization.

    Raises:
        ValueError: If no variance is known.
    """
    node, variance = site.node, site.weight_variance.get(site.name)
    if variance is None:
        if node["weight_variance"] is None or (node["bias"] and node["bias_variance"] is None):
            raise ValueError(
                f"description: must have the weight_variance of layer {site.name!r}; it has none, as of a network on "
                "the meta device. Give the network values, or pass weight_variance by name of layer for one without "
                "biases."
            )
        variance = node["weight_variance"] * fan_in
    bias = math.sqrt(node["bias_variance"]) if node["bias"] else None
    return {"W_std": math.sqrt(variance), "b_std": bias, "parameterization": "standard"}


def _bias(site: Site, shape: Sequence[int]) -> Any:
    return np.reshape(site.node["bias_values"], shape) if site.node["bias"] else None


def _linear(site: Site) -> Counterpart:
    node, source = site.node, site.source
    if source.spatial:
        return _missing(site, "a linear layer on positions, before the image is flattened or pooled")
    if not node["trainable"]:
        return _missing(site, _FROZEN)
    steps: list[Step] = []
    prepare = None
    if node["weight_mean"] and site.sees_input:
        prepare = lambda x: x - x.mean(axis=-1, keepdims=True)
    elif node["weight_mean"] and not source.centred:
        if not source.rectified:
            return _missing(site, _UNCENTRED)
        steps.append(Step(layers.WeightMean(behind="relu"), ()))
    dense = stax.Dense(node["out_features"], **_variances(site, node["in_features"]))
    params = (np.transpose(node["weight"]), _bias(site, (1, -1))) if "weight" in node else None
    return Counterpart((*steps, Step(dense, params, weighted=True)), gaussian=True, prepare=prepare)


def _conv(site: Site) -> Counterpart:
    node, source = site.node, site.source
    spatial = int(node["kind"][4])
    if source.spatial != spatial:
        return _missing(site, "a convolution of what is no image")
    if not node["trainable"]:
        return _missing(site, _FROZEN)
    if node["groups"] != 1 or any(dilation != 1 for dilation in node["dilation"]):
        return _missing(site, "a grouped or dilated convolution")
    zeros = _padding(site)
    if zeros is None:
        sizes = f"padding {node['padding']!r}, stride {node['stride']!r}, kernel {node['kernel_size']!r}"
        return _missing(site, f"{sizes} under padding mode {node['padding_mode']!r}")
    arguments = _variances(site, node["in_channels"] * math.prod(node["kernel_size"])) | {
        "filter_shape": tuple(node["kernel_size"]),
        "strides": tuple(node["stride"]),
        "dimension_numbers": _NUMBERS[spatial],
    }
    if node["weight_mean"] and site.sees_input:
        return _centred_stem(site, zeros, arguments)
    steps: list[Step] = []
    if not node["weight_mean"]:
        if not isinstance(zeros, str):
            steps.append(Step(layers.Pad(zeros, 1), ()))
        triple = stax.Conv(node["out_channels"], padding=zeros if isinstance(zeros, str) else "VALID", **arguments)
    elif source.rectified or source.pending is not None:
        behind = "relu" if source.pending is None else None
        triple = layers.Conv(node["out_channels"], padding=zeros, activation=source.pending, behind=behind, **arguments)
    else:
        return _missing(site, _UNCENTRED)
    params = (node["weight"], _bias(site, (1, -1) + (1,) * spatial)) if "weight" in node else None
    return Counterpart((*steps, Step(triple, params, weighted=True)), spatial=spatial, gaussian=True)


def _centred_stem(site: Site, zeros: str | list[tuple[int, int]], arguments: dict[str, Any]) -> Counterpart:
    """A centred convolution of the network's input: of size one, on its patches less their means.

    The mean of a patch follows from the input, and from no covariance of it.
    """
    node, spatial = site.node, int(site.node["kind"][4])
    shape, strides, numbers = arguments["filter_shape"], arguments["strides"], arguments["dimension_numbers"]
    around = [(size // 2, size // 2) for size in shape] if zeros == "CIRCULAR" else []
    padding = zeros if isinstance(zeros, list) else [(0, 0)] * spatial

    def prepare(x: Any) -> Any:
        if around:
            x = jnp.pad(x, [(0, 0), (0, 0), *around], mode="wrap")
        patches = jax.lax.conv_general_dilated_patches(x, shape, strides, padding, dimension_numbers=numbers)
        return patches - patches.mean(axis=1, keepdims=True)

    one = {"filter_shape": (1,) * spatial, "strides": (1,) * spatial, "padding": "VALID"}
    triple = stax.Conv(node["out_channels"], **(arguments | one))
    params = None
    if "weight" in node:
        weight = np.reshape(node["weight"], (node["out_channels"], -1) + (1,) * spatial)
        params = (weight, _bias(site, (1, -1) + (1,) * spatial))
    return Counterpart((Step(triple, params, weighted=True),), spatial=spatial, gaussian=True, prepare=prepare)


def _padding(site: Site) -> str | list[tuple[int, int]] | None:
    """The zeros around an image, or the name of a padding; None for one that there is not."""
    node = site.node
    sizes = node["kernel_size"]
    if node["padding"] == "same":
        pairs = [((size - 1) // 2, size // 2) for size in sizes]
    elif node["padding"] == "valid":
        pairs = [(0, 0)] * len(sizes)
    else:
        pairs = [(width, width) for width in node["padding"]]
    if not any(map(any, pairs)):
        return "VALID"
    if node["padding_mode"] == "zeros":
        return pairs
    halves = [(size // 2, size // 2) for size in sizes]
    unit = all(stride == 1 for stride in node["stride"]) and all(size % 2 for size in sizes)
    return "CIRCULAR" if node["padding_mode"] == "circular" and unit and pairs == halves else None


def _batch_norm(site: Site) -> Counterpart:
    node, source = site.node, site.source
    if not site.training and node["track"]:
        return _missing(site, "batch norm in eval mode, by running statistics; describe the network in train mode")
    if not source.gaussian:
        return _missing(site, _NOT_GAUSSIAN)
    if not node["neutral"]:
        return _missing(site, "batch norm with another gain than 1, or another shift than 0")
    slope = None
    if len(site.users) == 1:
        after = site.nodes[site.users[0]]
        dual = _dual(after) if after["kind"] == "activation" else None
        slope = None if dual is None else dual.negative_slope
    norm = layers.BatchNormRelu(
        1.0 if slope is None else slope, epsilon=node["eps"], affine=node["affine"], channel_axis=site.channel_axis
    )
    shape = (1, -1) + (1,) * source.spatial
    params: Any = ()
    if node["affine"]:
        gain, shift = node.get("weight"), node.get("bias_values")
        params = None if gain is None or shift is None else (np.reshape(gain, shape), np.reshape(shift, shape))
    notes = (_EPSILON_NOTE if node["eps"] else "", "" if site.users else _OUTPUT_NOTE)
    note = " ".join(filter(None, notes))
    return Counterpart((Step(norm, params),), spatial=source.spatial, fused=slope is not None, note=note)


def _dual(node: Mapping[str, Any]) -> DualActivation | None:
    """The dual activation of a layer of kind "activation"; None for an unknown one."""
    name = node["activation"]
    if name == "leaky_relu":
        return leaky_relu(node["negative_slope"])
    if name == "sine":
        return sine(node.get("frequency", 1.0))
    try:
        return dual_activation(name)
    except UnknownNameError:
        return None


def _activation(site: Site) -> Counterpart:
    source = site.source
    dual = _dual(site.node)
    if dual is None:
        return _missing(site, f"{site.node['activation']}: no dual activation")
    if source.fused:
        return Counterpart(spatial=source.spatial)
    if not source.gaussian:
        return _missing(site, _NOT_GAUSSIAN)
    rectifies = dual.name == "relu"
    behind = _next(site)
    if behind is not None and behind["kind"] == "linear" and behind["weight_mean"]:
        return Counterpart(
            (Step(layers.WeightMean(dual, site.channel_axis), ()),), spatial=source.spatial, centred=True
        )
    if not rectifies and len(site.users) == 1 and _is_centred_conv(site.nodes[site.users[0]]):
        return Counterpart(spatial=source.spatial, pending=dual)
    return Counterpart((Step(layers.Activation(dual), ()),), spatial=source.spatial, rectified=rectifies)


def _is_centred_conv(node: Mapping[str, Any]) -> bool:
    return node["kind"] in ("conv1d", "conv2d") and node["weight_mean"]


def _next(site: Site) -> Mapping[str, Any] | None:
    """The layer behind an activation, global pooling passed by; None where there are several.

    A mean over channels may be subtracted before a mean over positions is taken, and an activation is where it can be.
    """
    users, passed = site.users, {"identity", "global_avg_pool"} | (set() if site.source.spatial else {"flatten"})
    while len(users) == 1 and site.nodes[users[0]]["kind"] in passed:
        if site.nodes[users[0]]["kind"] == "global_avg_pool":
            passed.add("flatten")
        users = _users(users[0], site.nodes)
    return site.nodes[users[0]] if len(users) == 1 else None


def _pass(site: Site) -> Counterpart:
    return replace(site.source, steps=(), missing="", note="")


def _add(site: Site) -> Counterpart:
    if not all(source.gaussian for source in site.sources):
        return _missing(site, "it adds what is not Gaussian at infinite width")
    return Counterpart(spatial=site.source.spatial, gaussian=True)


def _scale(site: Site) -> Counterpart:
    if site.node["trainable"]:
        return _missing(site, "a trained scalar, whose part of the NTK stays random at infinite width")
    return replace(_pass(site), steps=(Step(layers.Scale(site.node["factor"]), ()),), rectified=False)


def _global_avg_pool(site: Site) -> Counterpart:
    pool = stax.GlobalAvgPool(batch_axis=0, channel_axis=1)
    return replace(_pass(site), steps=(Step(pool, ()),), spatial=0, rectified=False)


def _avg_pool(site: Site) -> Counterpart:
    node = site.node
    steps = []
    if any(node["padding"]) and not node["count_include_pad"]:
        return _missing(site, "an average that leaves the padding out")
    if any(node["padding"]):
        steps.append(Step(layers.Pad([(width, width) for width in node["padding"]], 1), ()))
    window, stride = tuple(node["kernel_size"]), tuple(node["stride"])
    steps.append(Step(stax.AvgPool(window, stride, "VALID", batch_axis=0, channel_axis=1), ()))
    return replace(_pass(site), steps=tuple(steps), rectified=False)


def _flatten(site: Site) -> Counterpart:
    if not site.source.spatial:
        return _pass(site)
    return Counterpart((Step(stax.Flatten(), ()),))


_RULES: dict[str, Callable[[Site], Counterpart]] = {
    "linear": _linear,
    "conv1d": _conv,
    "conv2d": _conv,
    "batch_norm": _batch_norm,
    "activation": _activation,
    "add": _add,
    "scale": _scale,
    "global_avg_pool": _global_avg_pool,
    "avg_pool": _avg_pool,
    "flatten": _flatten,
    "identity": _pass,
}
