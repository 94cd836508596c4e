"""Weight mean as neural-tangents layers: W(I − 11ᵀ/n)φ = W(φ − mean of φ), MimicNorm (arXiv 2010.09278), Theorem 3.

Centring the rows of a weight is the same as subtracting from what it sees its mean over the fan-in. Behind a Dense
layer's inputs that is a mean over channels, whose kernel is a covariance (docs/mathematics.md §4.1); behind those of a
convolution it is one scalar per patch, and the kernel depends on how the variance is spread over the patch (§4.6).
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntk.analytic.activations import DualActivation, dual_activation
from ntk.analytic.compat import stax
from ntk.analytic.layers.activation import activate
from ntk.analytic.layers.branch import Pad, pad_positions
from ntk.analytic.layers.covariances import Layout, cross_sides, map_covariances, variances
from ntk.analytic.norms import stable_weight_variance
from ntk.errors import NotGaussianError

_IMAGES = ("NHWC", "HWIO", "NHWC")


@stax.layer
def WeightMean(
    activation: str | DualActivation | None = None,
    channel_axis: int = -1,
    *,
    behind: str | DualActivation | None = None,
) -> Any:
    """Subtract from each sample its mean over the channels; a Dense layer behind it has weights of zero row mean.

    With ``activation`` it applies that first and then subtracts. With ``behind="relu"`` it stands directly behind a
    ReLU such as ``stax.Relu``, whose mean follows from its second moment; what stands before a layer no Kernel tells,
    so that behind a pooling, or another activation than the one named, the kernel would be wrong. The stable
    ``W_std`` of the Dense layer is the root of ``ntk.analytic.stable_weight_variance(activation, "weight_mean")``.
    Before ``stax.Conv`` or ``Flatten`` it is *not* weight mean, which takes one scalar from a patch: that is
    :func:`Conv`.

    Args:
        activation: Name of the activation to apply first, or the dual activation.
        channel_axis: Axis of the channels.
        behind: The activation that the layer stands directly behind, one that is linear on both sides of zero.

    Returns:
        (init_fn, apply_fn, kernel_fn).

    Raises:
        ValueError: If not one of ``activation`` and ``behind`` is given, or ``behind`` is of another form.
    """
    dual, before = _activations(activation, behind)

    def init_fn(rng: jax.Array, input_shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple]:
        return input_shape, ()

    def apply_fn(params: tuple, inputs: jax.Array, **kwargs: object) -> jax.Array:
        activated = inputs if dual is None else dual.forms.function(inputs)
        return activated - activated.mean(axis=channel_axis, keepdims=True)

    @stax.requires(channel_axis=channel_axis)
    def kernel_fn(k: Any, **kwargs: object) -> Any:
        if dual is not None:
            return activate(k, dual, centred=True)
        means = _means_behind(k, before)
        return map_covariances(k, lambda sides: sides.covariance - sides.left * sides.right, *means)

    return init_fn, apply_fn, kernel_fn


@stax.layer
def Conv(
    out_chan: int,
    filter_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: str | Sequence[tuple[int, int]] = "SAME",
    W_std: float | None = None,
    b_std: float | None = None,
    dimension_numbers: tuple[str, str, str] | None = None,
    parameterization: str = "ntk",
    activation: str | DualActivation | None = None,
    behind: str | DualActivation | None = None,
) -> Any:
    """A convolution whose weights have zero mean over input channels and offsets.

    The kernel is exact in the limit of many channels (docs/mathematics.md §4.6): with β over the offsets of the patch,
    the mean over β of the covariances less the product of the means over β of E[φ], zero where the padding is.

    Args:
        out_chan: Number of output channels.
        filter_shape: Size of the filter in each spatial dimension.
        strides: Stride in each spatial dimension; None for 1.
        padding: "SAME", "VALID" or "CIRCULAR" as in ``stax.Conv``, or zeros before and after each spatial dimension.
        W_std: σw, the standard deviation of the weights before centring; None for the stable one.
        b_std: σb; None without bias.
        dimension_numbers: As in ``stax.Conv``; None for channels last.
        parameterization: "ntk" or "standard".
        activation: Name of the activation to apply first, or the dual activation.
        behind: The activation that the layer stands directly behind, see :func:`WeightMean`.

    Returns:
        (init_fn, apply_fn, kernel_fn).

    Raises:
        ValueError: If not one of ``activation`` and ``behind`` is given, or ``behind`` is of another form.
    """
    dual, before = _activations(activation, behind)
    if W_std is None:
        W_std = math.sqrt(stable_weight_variance(before if dual is None else dual, "weight_mean", (b_std or 0.0) ** 2))
    numbers = dimension_numbers or _IMAGES
    channel_axis = numbers[0].index("C")
    surround = None if isinstance(padding, str) else Pad(padding, channel_axis)
    named = padding if isinstance(padding, str) else "VALID"
    arguments = {"strides": strides, "padding": named, "dimension_numbers": dimension_numbers}
    plain_init, plain_apply, plain_kernel = stax.Conv(
        out_chan, filter_shape, W_std=W_std, b_std=b_std, parameterization=parameterization, **arguments
    )
    patch_mean = stax.Conv(1, filter_shape, W_std=1.0, b_std=None, **arguments)[2]
    over = tuple(axis for axis, name in enumerate(numbers[1]) if name != "O")
    size = math.prod(filter_shape)

    def init_fn(rng: jax.Array, input_shape: tuple[int, ...]) -> tuple[tuple[int, ...], Any]:
        return plain_init(rng, input_shape if surround is None else surround[0](rng, input_shape)[0])

    def apply_fn(params: Any, inputs: jax.Array, **kwargs: object) -> jax.Array:
        weight, bias = params
        activated = inputs if dual is None else dual.forms.function(inputs)
        if surround is not None:
            activated = surround[1]((), activated)
        return plain_apply((weight - weight.mean(axis=over, keepdims=True), bias), activated, **kwargs)

    @stax.requires(
        batch_axis=numbers[0].index("N"),
        channel_axis=channel_axis,
        diagonal_spatial=stax.Diagonal(output=stax.Bool.NO),
    )
    def kernel_fn(k: Any, **kwargs: object) -> Any:
        activated = k if dual is None else activate(k, dual)
        means = _means_behind(k, before) if dual is None else tuple(map(dual.forms.mean, variances(k)))
        if surround is not None and not isinstance(padding, str):
            activated, means = surround[2](activated), tuple(pad_positions(mean, padding, k) for mean in means)
        first, second = _patch_means(activated, means, patch_mean)
        result = plain_kernel(activated)
        if result.is_reversed:
            first, second = (jnp.transpose(mean, (0, *range(mean.ndim - 1, 0, -1))) for mean in (first, second))
        variance = W_std**2
        centred = map_covariances(result, lambda s: s.covariance - variance * s.left * s.right, first, second)
        if result.ntk is None:
            return centred
        sides = cross_sides(result, first, second)
        seen = variance if parameterization == "ntk" else k.shape1[k.channel_axis] * size
        return centred.replace(ntk=result.ntk - seen * sides.left * sides.right)

    return init_fn, apply_fn, kernel_fn


def _activations(
    activation: str | DualActivation | None, behind: str | DualActivation | None
) -> tuple[DualActivation | None, DualActivation]:
    """The activation to apply, None if it has been applied, and the one that was or will be.

    Raises:
        ValueError: If not one of the two is given, or the mean of ``behind`` does not follow from its second moment.
    """
    if activation is not None and behind is None:
        dual = dual_activation(activation)
        return dual, dual
    if activation is not None or behind is None:
        raise ValueError(
            "activation, behind: one of the two must say which activation is centred, as no Kernel tells it; received "
            f"activation={activation!r}, behind={behind!r}. Pass activation='gelu' to apply it here, or behind='relu' "
            "directly behind stax.Relu."
        )
    before = dual_activation(behind)
    if before.negative_slope is None:
        raise ValueError(
            "behind: must be 'relu' or another activation that is linear on both sides of zero, whose mean follows "
            f"from its second moment; received {before.name!r}. Pass activation={before.name!r}, in place of the "
            "layer before."
        )
    return None, before


def _means_behind(kernel: Any, behind: DualActivation) -> tuple[jax.Array, jax.Array]:
    """E[φ] on both sides of a Kernel behind a homogeneous activation: a fixed multiple of the root of E[φ²].

    Raises:
        NotGaussianError: If the Kernel is that of pre-activations.
    """
    if kernel.is_gaussian:
        raise NotGaussianError(
            f"behind: the layer must stand directly behind {behind.name!r}; what came are Gaussian pre-activations. "
            f"Pass activation={behind.name!r} to apply it here, or put it before."
        )
    ratio = float(behind.mean() / np.sqrt(behind.second_moment))
    first, second = variances(kernel)
    return ratio * jnp.sqrt(first), ratio * jnp.sqrt(second)


def _patch_means(kernel: Any, means: tuple[jax.Array, ...], convolve: Any) -> tuple[jax.Array, jax.Array]:
    """Average E[φ] [n, *spatial] over each patch: [n, *spatial behind the layer], in the order of the image's axes.

    neural-tangents averages variances over patches when it keeps no pairs of positions; it is given means for
    variances.
    """
    if kernel.is_reversed:
        means = tuple(jnp.transpose(mean, (0, *range(mean.ndim - 1, 0, -1))) for mean in means)
    averaged = [
        convolve(
            kernel.replace(
                cov1=mean,
                cov2=None,
                nngp=Layout(2, True).left(mean),
                ntk=None,
                diagonal_batch=True,
                diagonal_spatial=True,
                is_reversed=False,
            )
        ).cov1
        for mean in means
    ]
    return averaged[0], averaged[1]
