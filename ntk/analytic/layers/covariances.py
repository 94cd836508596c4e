"""How neural-tangents lays out covariances, and the pieces of them that an activation needs.

A covariance has one or two batch axes, then for each spatial dimension one axis (*diagonal*) or two adjacent ones:
sample and position on the left of a pair come first. Which it is, a Kernel says of itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Layout:
    """The axes of one covariance.

    Attributes:
        batch_axes: 2 for pairs of samples, 1 for each sample with itself.
        diagonal_spatial: Whether positions are only paired with themselves.
    """

    batch_axes: int
    diagonal_spatial: bool

    def left(self, values: jax.Array) -> jax.Array:
        """Values [n, *spatial] of the left of each pair, shaped to broadcast against the covariance."""
        shape = [values.shape[0]] + [1] * (self.batch_axes - 1)
        for size in values.shape[1:]:
            shape += [size] if self.diagonal_spatial else [size, 1]
        return values.reshape(shape)

    def right(self, values: jax.Array) -> jax.Array:
        """Values [n, *spatial] of the right of each pair, shaped to broadcast against the covariance."""
        shape = [1] * (self.batch_axes - 1) + [values.shape[0]]
        for size in values.shape[1:]:
            shape += [size] if self.diagonal_spatial else [1, size]
        return values.reshape(shape)

    def diagonal(self, covariance: jax.Array) -> jax.Array:
        """The variances [n, *spatial] of a covariance of samples with themselves."""
        if self.batch_axes == 2:
            covariance = jnp.moveaxis(jnp.diagonal(covariance, axis1=0, axis2=1), -1, 0)
        axis = 1
        while not self.diagonal_spatial and axis < covariance.ndim:
            covariance = jnp.moveaxis(jnp.diagonal(covariance, axis1=axis, axis2=axis + 1), -1, axis)
            axis += 1
        return covariance

    def self_pairs(self, shape: tuple[int, ...]) -> jax.Array:
        """Where a covariance of that shape pairs a sample and a position with themselves [shape]."""
        pairs = [(0, 1)] if self.batch_axes == 2 else []
        if not self.diagonal_spatial:
            pairs += [(axis, axis + 1) for axis in range(self.batch_axes, len(shape), 2)]
        same = jnp.ones(shape, bool)
        for first, second in pairs:
            index = jnp.arange(max(shape))
            rows = index[: shape[first]].reshape([-1 if axis == first else 1 for axis in range(len(shape))])
            columns = index[: shape[second]].reshape([-1 if axis == second else 1 for axis in range(len(shape))])
            same &= rows == columns
        return same


def layouts(kernel: Any) -> tuple[Layout, Layout]:
    """The layouts of a Kernel's cov1 (and cov2), and of its nngp and ntk."""
    own = Layout(1 if kernel.diagonal_batch else 2, bool(kernel.diagonal_spatial))
    return own, Layout(2, own.diagonal_spatial)


def variances(kernel: Any) -> tuple[jax.Array, jax.Array]:
    """The variances [n1, *spatial] and [n2, *spatial] of both sides of a Kernel."""
    own, _ = layouts(kernel)
    first = own.diagonal(kernel.cov1)
    return first, first if kernel.cov2 is None else own.diagonal(kernel.cov2)


@dataclass(frozen=True)
class Sides:
    """One covariance of a Kernel, and values of the left and the right of its pairs, shaped to broadcast against it.

    Attributes:
        covariance: The covariance.
        left: Values of what comes first in a pair.
        right: Values of what comes second.
        itself: Where a pair is of a sample and a position with themselves.
    """

    covariance: jax.Array
    left: jax.Array
    right: jax.Array
    itself: jax.Array


def map_covariances(kernel: Any, change: Callable[[Sides], jax.Array], first: jax.Array, second: jax.Array) -> Any:
    """Change cov1, nngp and cov2 of a Kernel, each given the values of its own two sides.

    Args:
        kernel: A Kernel.
        change: Takes a covariance with its sides, returns what replaces it.
        first: Values of the first samples [n1, *spatial].
        second: Values of the second samples [n2, *spatial].

    Returns:
        The Kernel with the three replaced; its ntk is left alone.
    """
    own, _ = layouts(kernel)

    def alone(covariance: jax.Array, values: jax.Array) -> jax.Array:
        itself = own.self_pairs(covariance.shape)
        return change(Sides(covariance, own.left(values), own.right(values), itself))

    return kernel.replace(
        cov1=alone(kernel.cov1, first),
        nngp=change(cross_sides(kernel, first, second)),
        cov2=None if kernel.cov2 is None else alone(kernel.cov2, second),
    )


def cross_sides(kernel: Any, first: jax.Array, second: jax.Array) -> Sides:
    """The nngp of a Kernel with the values of its two sides, [n1, *spatial] and [n2, *spatial]."""
    _, cross = layouts(kernel)
    same = kernel.x1_is_x2 if first.shape == second.shape else False
    itself = cross.self_pairs(kernel.nngp.shape) & same
    return Sides(kernel.nngp, cross.left(first), cross.right(second), itself)
