"""Batch norm and its activation as one neural-tangents layer, exact at the size of the batch.

Behind batch norm of a finite batch, units are uniform on a sphere and not Gaussian, so that the activation cannot be a
layer of its own (docs/mathematics.md §5). Every entry of the kernel depends on the whole batch: rows are one batch, and
a kernel that is computed in tiles is another network's.
"""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntk.analytic.activations import leaky_relu
from ntk.analytic.batch_norm import STATISTICS, batch_norm_layer, traced_batch_norm_layer
from ntk.analytic.batch_requirements import require_batch, require_batch_size
from ntk.analytic.compat import stax
from ntk.analytic.gram import rounding
from ntk.analytic.layers.activation import require_gaussian
from ntk.analytic.messages import require_choice
from ntk.analytic.norms import require_variance
from ntk.analytic.precision import double_precision
from ntk.analytic.two_batches import two_batch_layer
from ntk.errors import BatchOfOneError, BatchTilingError, MaskError

_WHOLE = stax.Diagonal(input=stax.Bool.NO)
_BATCHING = "neural_tangents._src.batching"
_TILING = frozenset({"serial_fn_x1", "serial_fn_kernel", "parallel_fn_x1", "parallel_fn_kernel"})


@stax.layer
def BatchNormRelu(
    negative_slope: float = 0.0,
    *,
    epsilon: float = 0.0,
    affine: bool = False,
    n_statistics: int | None = None,
    statistics: str = "differentiated",
    channel_axis: int = -1,
) -> Any:
    """Batch norm in train mode, then a ReLU or another activation that is linear on both sides of zero.

    Statistics are taken over the batch and, in images, over positions. ``kernel_fn(x)`` is the kernel of one batch
    (docs/mathematics.md §5.1, §5.2), ``kernel_fn(x1, x2)`` that of two batches, each normalized by its own statistics
    (§5.6).

    Args:
        negative_slope: Slope below zero: 0 for ReLU, −1 for the absolute value, 1 for batch norm alone.
        epsilon: Added to the variance by ``apply_fn``; the kernel is that of 0.
        affine: Whether there are a trainable gain and shift per channel, one and zero at initialization.
        n_statistics: Number of leading samples whose statistics all samples are normalized with (§5.3); None for all.
        statistics: What is differentiated: "differentiated" (mean and variance), "mean_differentiated", "constant".
        channel_axis: Axis of the channels; the batch comes first.

    Returns:
        (init_fn, apply_fn, kernel_fn).

    Raises:
        ValueError: If ``statistics`` is none of these, ``n_statistics`` is below 4, or a number is not admissible.
    """
    require_choice("statistics", statistics, STATISTICS, "Take 'differentiated' for train mode.")
    require_variance("epsilon", epsilon, positive=False)
    leaky_relu(negative_slope)
    if n_statistics is not None:
        require_batch_size("n_statistics", n_statistics)

    def init_fn(rng: jax.Array, input_shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple]:
        shape = [1] * len(input_shape)
        shape[channel_axis] = input_shape[channel_axis]
        return input_shape, (jnp.ones(shape), jnp.zeros(shape)) if affine else ()

    def apply_fn(params: tuple, inputs: jax.Array, **kwargs: object) -> jax.Array:
        _refuse_tiles(_TILING)
        axes = tuple(axis for axis in range(inputs.ndim) if axis != channel_axis % inputs.ndim)
        batch = inputs[:n_statistics]
        if batch.size == batch.shape[channel_axis]:
            raise BatchOfOneError(
                "inputs: must hold two values or more per channel under BatchNormRelu; received shape "
                f"{inputs.shape}, whose variance is zero. Pass a batch, and vmap_axes=None to nt.empirical_ntk_fn, "
                "which otherwise takes the samples one by one."
            )
        mean, variance = batch.mean(axes, keepdims=True), batch.var(axes, keepdims=True)
        if statistics == "constant":
            mean = jax.lax.stop_gradient(mean)
        if statistics != "differentiated":
            variance = jax.lax.stop_gradient(variance)
        normalized = (inputs - mean) / jnp.sqrt(variance + epsilon)
        if affine:
            gain, shift = params
            normalized = gain * normalized + shift
        return jnp.where(normalized > 0, normalized, negative_slope * normalized)

    options = {"negative_slope": negative_slope, "affine": affine}

    @stax.requires(batch_axis=0, channel_axis=channel_axis, diagonal_batch=False, diagonal_spatial=_WHOLE)
    def kernel_fn(k: Any, **kwargs: object) -> Any:
        _refuse_tiles(None)
        require_gaussian(k, "BatchNormRelu")
        _refuse_masks(k)
        size = None if n_statistics is None else n_statistics * _positions(k.nngp)
        one = lambda nngp, ntk: _one_batch(nngp, ntk, n_statistics=size, statistics=statistics, **options)
        alone = lambda covariance: one(covariance, None)[0]
        if k.cov2 is None or _is_true(k.x1_is_x2):
            nngp, ntk = one(k.nngp, k.ntk)
            changed = {"cov1": nngp, "cov2": None if k.cov2 is None else nngp}
        else:
            _require_all_rows(n_statistics)
            across = lambda: _two_batches(k.cov1, k.cov2, k.nngp, k.ntk, statistics=statistics, **options)
            nngp, ntk = _unless_same(k, across, lambda: one(k.nngp, k.ntk))
            changed = {"cov1": alone(k.cov1), "cov2": alone(k.cov2)}
        return k.replace(nngp=nngp, ntk=ntk, is_gaussian=False, **changed)

    return init_fn, apply_fn, kernel_fn


def _refuse_tiles(functions: frozenset[str] | None) -> None:
    """Refuse to be computed in tiles by ``nt.batch``, which calls a network on pieces of the batch.

    A tile does not know of the others: only the call stack tells. A kernel function is refused under ``nt.batch``
    whatever its batch size, because compiled tiles are cached and not seen again.

    Args:
        functions: Names of the functions of neural-tangents that tile; None for all of its module for batching.

    Raises:
        BatchTilingError: If one of them is being executed.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == _BATCHING and (functions is None or frame.f_code.co_name in functions):
            raise BatchTilingError(
                "kernel_fn: must not be computed in tiles by nt.batch (or the batch_size of "
                "nt.monte_carlo_kernel_fn) with a BatchNormRelu layer: each tile would be normalized by its own "
                "statistics, which is another network and silently wrong. Call kernel_fn on the whole batch: its "
                "cost is O(nodes·B³), and B = 1024 fits in 4 GiB."
            )
        frame = frame.f_back


def _refuse_masks(kernel: Any) -> None:
    """Refuse masked inputs.

    Raises:
        MaskError: If the Kernel has a mask.
    """
    if kernel.mask1 is not None or kernel.mask2 is not None:
        raise MaskError(
            "mask_constant: must be None with a BatchNormRelu layer, whose statistics would run over what is masked. "
            "Leave it out."
        )


def _require_all_rows(n_statistics: int | None) -> None:
    """Refuse what is derived for one batch only.

    Raises:
        ValueError: If some rows borrow the statistics of others.
    """
    if n_statistics is not None:
        raise ValueError(
            f"x2: must be None under n_statistics={n_statistics!r}, as each of two batches is normalized by its own "
            "statistics. For test points under the statistics of a batch, pass the concatenation of both as x1, the "
            "batch first, and slice."
        )


def _is_true(flag: Any) -> bool:
    """Whether a flag is known to be true; one that is being traced is not known."""
    return not isinstance(flag, jax.core.Tracer) and bool(flag)


def _unless_same(kernel: Any, across: Callable[[], Any], within: Callable[[], Any]) -> Any:
    """The kernels of two batches, or of one where a Kernel turns out to pair a batch with itself."""
    if not isinstance(kernel.x1_is_x2, jax.core.Tracer):
        return across()
    if kernel.nngp.shape[0] != kernel.nngp.shape[1]:
        return across()
    return jax.lax.cond(kernel.x1_is_x2, within, across)


def _positions(covariance: jax.Array) -> int:
    """Number of positions in an image, 1 without spatial dimensions."""
    return int(np.prod(covariance.shape[2::2]))


def _matrix(covariance: jax.Array) -> jax.Array:
    """[n1, n2, H, H, W, W, …] to [n1·H·W…, n2·H·W…]."""
    left, right = range(0, covariance.ndim, 2), range(1, covariance.ndim, 2)
    rows, columns = (int(np.prod([covariance.shape[axis] for axis in side])) for side in (left, right))
    return covariance.transpose(*left, *right).reshape(rows, columns)


def _tensor(matrix: jax.Array, like: jax.Array) -> jax.Array:
    """Undo :func:`_matrix`, in the shape and dtype of the covariance that came."""
    half = like.ndim // 2
    axes = [axis for index in range(half) for axis in (index, half + index)]
    return jnp.asarray(matrix, like.dtype).reshape(like.shape[::2] + like.shape[1::2]).transpose(axes)


def _one_batch(
    nngp: jax.Array, ntk: jax.Array | None, *, n_statistics: int | None, statistics: str, **options: Any
) -> tuple[jax.Array, jax.Array | None]:
    """V and F of one batch (docs/mathematics.md §5.1, §5.2), in the layout of a Kernel."""
    sigma = _matrix(nngp)
    require_batch_size("x1 (samples times positions)", sigma.shape[0])
    theta = None if ntk is None else _matrix(jnp.broadcast_to(ntk, nngp.shape))
    if isinstance(nngp, jax.core.Tracer):
        value, tangent = traced_batch_norm_layer(
            sigma, theta, n_statistics=n_statistics, statistics=statistics, **options
        )
    else:
        require_batch(np.asarray(sigma, np.float64), rounding(sigma), n_statistics, statistics)
        value, tangent = batch_norm_layer(sigma, theta, n_statistics, statistics, **options)
    return _tensor(value, nngp), None if ntk is None else _tensor(tangent, nngp)


def _two_batches(
    cov1: jax.Array, cov2: jax.Array, nngp: jax.Array, ntk: jax.Array | None, **options: Any
) -> tuple[jax.Array, jax.Array | None]:
    """V and F between two batches (docs/mathematics.md §5.6), in the layout of a Kernel."""
    parts = [_matrix(part) for part in (cov1, cov2, nngp)]
    theta = None if ntk is None else _matrix(jnp.broadcast_to(ntk, nngp.shape))
    for rows in (parts[0].shape[0], parts[1].shape[0]):
        require_batch_size("x1, x2 (samples times positions)", rows)
    if isinstance(nngp, jax.core.Tracer):
        value, tangent = two_batch_layer(*parts, theta, **options)
    else:
        with double_precision():
            exact = (None if part is None else np.asarray(part, np.float64) for part in (*parts, theta))
            value, tangent = (None if part is None else np.asarray(part) for part in two_batch_layer(*exact, **options))
    return _tensor(value, nngp), None if ntk is None else _tensor(tangent, nngp)
