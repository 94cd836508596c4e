"""Whole networks as neural-tangents triples, under each of the three norms.

Conventions are those of :func:`ntk.analytic.propagate` and :func:`ntk.analytic.propagate_residual`: the first linear
layer has gain one and no bias, depth counts activations, and σw² defaults to what keeps unit variance (1 under batch
norm).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from ntk.analytic import layers
from ntk.analytic.activations import DualActivation, dual_activation
from ntk.analytic.batch_requirements import require_homogeneous
from ntk.analytic.compat import stax
from ntk.analytic.messages import require_choice, require_integer
from ntk.analytic.norms import require_norm, require_variance, stable_weight_variance
from ntk.analytic.recursion import DEPTH_REASON
from ntk.analytic.residual import branch_scales, branch_variance

READOUTS = ("pool", "flatten")


def fully_connected(
    depth: int,
    width: int = 512,
    out_features: int = 1,
    *,
    norm: str = "none",
    activation: str | DualActivation = "relu",
    sigma_w2: float | None = None,
    sigma_b2: float = 0.0,
    parametrization: str = "ntk",
    affine: bool = False,
) -> Any:
    """Return a fully connected network, whose kernel is :func:`ntk.analytic.propagate` of x xᵀ/d.

    Args:
        depth: Number of activations D.
        width: Units per hidden layer of the finite network.
        out_features: Outputs of the finite network.
        norm: "none", "weight_mean" or "batch_norm".
        activation: Name of the activation, or the dual activation.
        sigma_w2: Weight variance of the layers after the first; None for the stable one.
        sigma_b2: Bias variance of the layers after the first; at 0 they have no biases.
        parametrization: "ntk" or "standard".
        affine: Whether batch norm has a trainable gain and shift.

    Returns:
        (init_fn, apply_fn, kernel_fn), for inputs [n, d].

    Raises:
        ValueError: If an argument is out of its range, or a name is unknown.
    """
    require_integer("depth", depth, 1, DEPTH_REASON)
    kind = _Kind(norm, activation, sigma_w2, sigma_b2, parametrization, affine)
    chain = [kind.dense(width, first=True)]
    for out in [width] * (depth - 1) + [out_features]:
        chain += [kind.activation(), kind.dense(out)]
    return stax.serial(*chain)


def convolutional(
    depth: int,
    channels: int = 128,
    out_features: int = 1,
    *,
    norm: str = "none",
    activation: str | DualActivation = "relu",
    filter_shape: Sequence[int] = (3, 3),
    padding: str = "SAME",
    readout: str = "pool",
    sigma_w2: float | None = None,
    sigma_b2: float = 0.0,
    parametrization: str = "ntk",
    affine: bool = False,
) -> Any:
    """Return a convolutional network of ``depth`` convolutions, each with an activation, and a linear readout.

    Args:
        depth: Number of activations D.
        channels: Channels of the finite network.
        out_features: Outputs of the finite network.
        norm: "none", "weight_mean" or "batch_norm"; the first convolution, which sees the image, is never centred.
        activation: Name of the activation, or the dual activation.
        filter_shape: Size of the filters.
        padding: "SAME", "VALID" or "CIRCULAR".
        readout: "pool" for global average pooling, "flatten" for a readout of every position by itself, which is not
            centred under weight mean.
        sigma_w2: Weight variance of the layers after the first; None for the stable one.
        sigma_b2: Bias variance of the layers after the first; at 0 they have no biases.
        parametrization: "ntk" or "standard".
        affine: Whether batch norm has a trainable gain and shift.

    Returns:
        (init_fn, apply_fn, kernel_fn), for images [n, H, W, C].

    Raises:
        ValueError: If an argument is out of its range, or a name is unknown.
    """
    require_integer("depth", depth, 1, DEPTH_REASON)
    require_choice("readout", readout, READOUTS, "Take 'pool' for an average over positions.")
    kind = _Kind(norm, activation, sigma_w2, sigma_b2, parametrization, affine)
    chain = [kind.conv(channels, filter_shape, padding, first=True)]
    for _ in range(depth - 1):
        chain += kind.activated_conv(channels, filter_shape, padding)
    if readout == "pool":
        return stax.serial(*chain, kind.activation(), stax.GlobalAvgPool(), kind.dense(out_features))
    last = layers.Activation(kind.dual) if norm == "weight_mean" else kind.activation()
    return stax.serial(*chain, last, stax.Flatten(), kind.dense(out_features, centred=False))


def pre_activation_resnet(
    blocks: int,
    width: int = 256,
    out_features: int | None = 1,
    *,
    norm: str = "none",
    activation: str | DualActivation = "relu",
    branch_depth: int = 1,
    branch_scale: str | Callable[[int], float] = "inverse_sqrt",
    filter_shape: Sequence[int] | None = None,
    padding: str = "SAME",
    sigma_w2: float | None = None,
    affine: bool = False,
) -> Any:
    """Return a pre-activation residual network x_l = x_{l−1} + α_l F(x_{l−1}) (docs/mathematics.md §8).

    Args:
        blocks: Number of blocks L.
        width: Units, or channels, of the stream of the finite network.
        out_features: Outputs behind a last activation (and global average pooling); None to return the stream
            itself, whose kernel is :func:`ntk.analytic.propagate_residual`.
        norm: "none", "weight_mean" or "batch_norm".
        activation: Name of the activation, or the dual activation.
        branch_depth: Number k of (activation, linear) layers in a branch.
        branch_scale: α_l: a name that :func:`ntk.analytic.propagate_residual` knows, or a function of the block's
            number.
        filter_shape: Size of the filters of a convolutional network; None for a fully connected one.
        padding: "SAME" or "CIRCULAR".
        sigma_w2: Weight variance in the branches; None for the stable one, 2 under batch norm and
            with ``branch_scale="mimicnorm"``.
        affine: Whether batch norm has a trainable gain and shift.

    Returns:
        (init_fn, apply_fn, kernel_fn) in the NTK parametrization, for inputs [n, d] or images [n, H, W, C].

    Raises:
        ValueError: If an argument is out of its range, or a name is unknown.
    """
    require_integer("blocks", blocks, 1, "Pass the number of residual additions.")
    require_integer("branch_depth", branch_depth, 1, "Pass the number of (activation, linear) layers of F.")
    scales = branch_scales(branch_scale, blocks, branch_depth)
    kind = _Kind(norm, activation, branch_variance(sigma_w2, norm, branch_scale), 0.0, "ntk", affine)

    def layer(gain: float) -> list[Any]:
        if filter_shape is None:
            return [kind.activation(), kind.dense(width, gain=gain)]
        return kind.activated_conv(width, filter_shape, padding, gain=gain)

    stem = (
        kind.dense(width, first=True) if filter_shape is None else kind.conv(width, filter_shape, padding, first=True)
    )
    chain = [stem]
    for scale in scales:
        gains = [1.0] * (branch_depth - 1) + [float(scale)]
        branch = stax.serial(*(part for gain in gains for part in layer(gain)))
        chain.append(layers.sum_branches(stax.Identity(), branch))
    if out_features is not None:
        pooling = [] if filter_shape is None else [stax.GlobalAvgPool()]
        chain += [kind.activation(), *pooling, kind.dense(out_features)]
    return stax.serial(*chain)


class _Kind:
    """The layers of which networks under one norm are made.

    Args:
        norm: "none", "weight_mean" or "batch_norm".
        activation: Name of the activation, or the dual activation.
        sigma_w2: Weight variance behind activations; None for the stable one.
        sigma_b2: Bias variance there.
        parametrization: "ntk" or "standard".
        affine: Whether batch norm has a gain and a shift.
    """

    def __init__(
        self,
        norm: str,
        activation: str | DualActivation,
        sigma_w2: float | None,
        sigma_b2: float,
        parametrization: str,
        affine: bool,
    ) -> None:
        """Check the arguments; see the class.

        Raises:
            ValueError: If a gain and a shift are asked for without batch norm.
        """
        self.norm = require_norm(norm)
        self.dual = dual_activation(activation)
        require_choice("parametrization", parametrization, ("ntk", "standard"), "Take 'ntk'.")
        bias = require_variance("sigma_b2", sigma_b2, positive=False)
        if norm == "batch_norm":
            self.slope = require_homogeneous(self.dual, bias)
            weight = 1.0 if sigma_w2 is None else sigma_w2
        else:
            weight = stable_weight_variance(self.dual, norm, bias) if sigma_w2 is None else sigma_w2
        if affine and norm != "batch_norm":
            raise ValueError(
                f"affine: requires norm='batch_norm', the only one with a gain and a shift; received norm={norm!r}. "
                "Leave it out."
            )
        self.affine = affine
        self.deviation = math.sqrt(require_variance("sigma_w2", weight, positive=True))
        self.bias = math.sqrt(bias) if bias else None
        self.parametrization = parametrization

    def _weights(self, *, first: bool = False, gain: float = 1.0) -> dict[str, Any]:
        """Standard deviations of a layer of weights; the first has gain one and no bias."""
        deviations = {"W_std": 1.0, "b_std": None} if first else {"W_std": gain * self.deviation, "b_std": self.bias}
        return {**deviations, "parameterization": self.parametrization}

    def dense(self, width: int, *, first: bool = False, gain: float = 1.0, centred: bool = True) -> Any:
        """A dense layer; whether it is centred is the business of the activation before it."""
        if self.norm == "weight_mean" and not centred:
            weights = self._weights() | {"W_std": math.sqrt(stable_weight_variance(self.dual))}
            return stax.Dense(width, **weights)
        return stax.Dense(width, **self._weights(first=first, gain=gain))

    def conv(self, channels: int, filter_shape: Sequence[int], padding: str, *, first: bool = False) -> Any:
        """A convolution that is not centred."""
        return stax.Conv(channels, tuple(filter_shape), padding=padding, **self._weights(first=first))

    def activation(self) -> Any:
        """The activation before a dense layer, with its norm or its centring."""
        if self.norm == "batch_norm":
            return layers.BatchNormRelu(self.slope, affine=self.affine)
        return layers.WeightMean(self.dual) if self.norm == "weight_mean" else layers.Activation(self.dual)

    def activated_conv(
        self, channels: int, filter_shape: Sequence[int], padding: str, *, gain: float = 1.0
    ) -> list[Any]:
        """The activation and a convolution behind it."""
        shape, weights = tuple(filter_shape), self._weights(gain=gain)
        if self.norm == "weight_mean":
            return [layers.Conv(channels, shape, padding=padding, activation=self.dual, **weights)]
        return [self.activation(), stax.Conv(channels, shape, padding=padding, **weights)]
