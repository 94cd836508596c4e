"""What residual networks need beside the layers of ``stax``: a scale, a padding, and sums that do not warn."""

import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ntk.analytic.compat import stax
from ntk.analytic.layers.covariances import layouts


@stax.layer
def Scale(factor: float) -> Any:
    """Multiply by a constant that is not trained.

    Args:
        factor: The constant.

    Returns:
        (init_fn, apply_fn, kernel_fn).
    """

    def init_fn(rng: jax.Array, input_shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple]:
        return input_shape, ()

    def apply_fn(params: tuple, inputs: jax.Array, **kwargs: object) -> jax.Array:
        return factor * inputs

    def kernel_fn(k: Any, **kwargs: object) -> Any:
        scaled = {name: getattr(k, name) for name in ("cov1", "nngp", "cov2", "ntk")}
        return k.replace(**{name: None if value is None else factor**2 * value for name, value in scaled.items()})

    return init_fn, apply_fn, kernel_fn


@stax.layer
def Pad(widths: Sequence[tuple[int, int]], channel_axis: int = -1) -> Any:
    """Surround images with zeros; before a "VALID" convolution it gives any padding, whatever the stride.

    Args:
        widths: Zeros before and after, for each spatial dimension.
        channel_axis: Axis of the channels; the batch comes first.

    Returns:
        (init_fn, apply_fn, kernel_fn).
    """
    pairs = [(before, after) for before, after in widths]

    def padding(ndim: int) -> list[tuple[int, ...]]:
        spatial = iter(pairs)
        return [(0, 0) if axis in (0, channel_axis % ndim) else next(spatial) for axis in range(ndim)]

    def init_fn(rng: jax.Array, input_shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple]:
        widened = zip(input_shape, padding(len(input_shape)), strict=True)
        return tuple(size + before + after for size, (before, after) in widened), ()

    def apply_fn(params: tuple, inputs: jax.Array, **kwargs: object) -> jax.Array:
        return jnp.pad(inputs, padding(inputs.ndim))

    def kernel_fn(k: Any, **kwargs: object) -> Any:
        own, cross = layouts(k)
        axes = 1 if k.diagonal_spatial else 2

        def widen(covariance: jax.Array | None, batch_axes: int) -> jax.Array | None:
            if covariance is None or covariance.ndim == 0:
                return covariance
            return pad_positions(covariance, pairs, k, batch_axes=batch_axes, axes=axes)

        return k.replace(
            cov1=widen(k.cov1, own.batch_axes),
            cov2=widen(k.cov2, own.batch_axes),
            nngp=widen(k.nngp, cross.batch_axes),
            ntk=widen(k.ntk, cross.batch_axes),
        )

    return init_fn, apply_fn, kernel_fn


def pad_positions(
    values: jax.Array, widths: Sequence[tuple[int, int]], kernel: Any, *, batch_axes: int = 1, axes: int = 1
) -> jax.Array:
    """Surround what belongs to a Kernel with zeros.

    Args:
        values: Array [*batch axes, *spatial axes], in the order of spatial dimensions that the Kernel has.
        widths: Zeros before and after, for each spatial dimension of the image.
        kernel: The Kernel.
        batch_axes: Number of batch axes.
        axes: Number of adjacent axes of each spatial dimension.

    Returns:
        The larger array.
    """
    ordered = list(widths)[::-1] if kernel.is_reversed else widths
    return jnp.pad(values, [(0, 0)] * batch_axes + [pair for pair in ordered for _ in range(axes)])


def sum_branches(*branches: Any) -> Any:
    """Apply layers to one input and add their outputs, which must be independent given the input.

    The warning of ``stax.FanInSum``, that independence is not verified, is not repeated: it is stated here.

    Args:
        *branches: Triples; ``stax.Identity()`` for a shortcut.

    Returns:
        (init_fn, apply_fn, kernel_fn).
    """
    init_fn, apply_fn, sum_kernels = stax.serial(stax.FanOut(len(branches)), stax.parallel(*branches), stax.FanInSum())

    @stax.layer
    def SumBranches() -> Any:
        @stax.requires(**sum_kernels.input_req)
        def kernel_fn(k: Any, **kwargs: object) -> Any:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="`FanIn` layers assume independent inputs")
                return sum_kernels(k, **kwargs)

        return init_fn, apply_fn, kernel_fn

    return SumBranches()
