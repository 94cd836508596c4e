"""Kernels between two independent batches, each normalized by its own statistics in train mode.

With r₁ and r₂ the norms of the two centred batches, x = √B₁ φ(z)/r₁ and x' = √B₂ φ(z')/r₂; each 1/r is π^(−1/2) times
∫ s^(−1/2) e^(−s r²) ds, so that every expectation is an integral over (s, t) of the closed forms of one batch. The
weights act one after the other: batch 1 splits the joint covariance once, batch 2 what is left of it at each s.
Derivation: docs/mathematics.md §5.6.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from ntk.analytic.activations import DualActivation, dual_activation
from ntk.analytic.batch_norm import (
    STATISTICS,
    Forms,
    activation_forms,
    batch_geometry,
    batch_norm_layer,
    centring,
    split_covariance,
)
from ntk.analytic.batch_requirements import require_batch, require_batch_size, require_homogeneous
from ntk.analytic.closed_forms import Homogeneous
from ntk.analytic.gram import require_gram, rounding, warn_of_gram
from ntk.analytic.kernels import AnalyticKernels
from ntk.analytic.messages import require_choice, require_integer
from ntk.analytic.norms import require_variance
from ntk.analytic.precision import Array, double_precision
from ntk.analytic.quadrature import laplace_rule, node_count
from ntk.analytic.recursion import DEPTH_REASON, run_recursion

NODES = 64
"""Nodes of each of the two integrals where their number may not depend on the eigenvalues: errs by 1e−11 at most."""


@dataclass(frozen=True, eq=False)
class TwoBatchLayer:
    """One layer of batch norm and activation over two batches, and the linear layer behind (docs/mathematics.md §5.6).

    Attributes:
        size: Number of rows of the first batch; the others are the second.
        statistics: What the NTK differentiates.
        negative_slope: Slope of the activation below zero.
        sigma_w2: Weight variance; it scales K and Θ alike.
        affine: Whether a gain and a shift per channel are trained.
    """

    size: int
    statistics: str
    negative_slope: float
    sigma_w2: float
    affine: bool

    def start(self, gram: Array) -> Array:
        """Return Θ⁰ = K⁰."""
        return gram

    def __call__(self, nngp: Array, ntk: Array, index: int) -> tuple[Array, Array]:
        """Return K' = σw² V and Θ' = σw² (V + F), each [n, n], whatever the ``index`` of the linear layer."""
        first, second = slice(None, self.size), slice(self.size, None)
        options = (self.statistics, self.negative_slope, self.affine)
        own = [_one_batch(nngp[rows, rows], ntk[rows, rows], *options) for rows in (first, second)]
        across = _across(nngp[first, first], nngp[second, second], nngp[first, second], ntk[first, second], *options)
        value, tangent = (
            np.block([[one, between], [between.T, other]])
            for one, between, other in zip(own[0], across, own[1], strict=True)
        )
        return self.sigma_w2 * value, self.sigma_w2 * (value + tangent)


def propagate_two_batches(
    gram: ArrayLike,
    sizes: Sequence[int],
    depth: int,
    *,
    activation: str | DualActivation = "relu",
    statistics: str = "differentiated",
    sigma_w2: float | None = None,
    affine: bool = False,
    every_depth: bool = True,
) -> AnalyticKernels:
    """Propagate two independent batches through an infinitely wide BatchNorm network of ``depth`` activations.

    The same network sees one batch after the other in train mode. Diagonal blocks are the kernels of each batch alone
    (:func:`ntk.analytic.propagate`), the others those between examples of different batches (docs/mathematics.md §5.6).

    Args:
        gram: K⁰ [n, n] of both batches, symmetric positive semi-definite: the first batch, then the second.
        sizes: Numbers of rows of the two batches.
        depth: Number of activations D, at least 1.
        activation: Name of the activation, or the dual activation; one that is linear on both sides of zero.
        statistics: What the NTK differentiates: "differentiated", "mean_differentiated" or "constant".
        sigma_w2: Weight variance; None for 1. It scales both kernels.
        affine: Whether a gain and a shift per channel, one and zero at initialization, are trained.
        every_depth: Whether to keep the kernels of all depths; False saves 16(D + 1)n² bytes.

    Returns:
        The kernels, in float64, with the conventions under which they hold.

    Raises:
        GramError: If the Gram matrix is not the covariance of inputs.
        BatchTooSmallError: If a batch has 3 rows or fewer.
        CentredRankError: If a batch spans too few directions.
        UnknownNameError: If a name is not admissible.
        ValueError: If another argument is out of its range.
    """
    start = require_gram(gram)
    last = require_integer("depth", depth, 1, DEPTH_REASON)
    dual = dual_activation(activation)
    require_choice(
        "statistics", statistics, STATISTICS, "Take 'differentiated' for train mode, 'constant' for eval mode."
    )
    weight = 1.0 if sigma_w2 is None else require_variance("sigma_w2", sigma_w2, positive=True)
    batches = _require_sizes(sizes, len(start))
    for rows in (slice(None, batches[0]), slice(batches[0], None)):
        require_batch(start[rows, rows], rounding(gram), None, statistics)
    layer = TwoBatchLayer(batches[0], statistics, require_homogeneous(dual, 0.0), weight, affine)
    warn_of_gram(start, rounding(gram))
    nngp, ntk = run_recursion(layer, start, last, every_depth=every_depth)
    return AnalyticKernels(
        nngp=nngp[-1],
        ntk=ntk[-1],
        depth=last,
        norm="batch_norm",
        activation=dual.name,
        sigma_w2=weight,
        sigma_b2=0.0,
        parametrization="ntk",
        projected=True,
        n_statistics=None,
        statistics=statistics,
        affine=affine,
        batch_sizes=batches,
        nngp_by_depth=np.stack(nngp),
        ntk_by_depth=np.stack(ntk),
    )


def _require_sizes(sizes: Sequence[int], n: int) -> tuple[int, int]:
    """Return the sizes of the two batches.

    Raises:
        BatchTooSmallError: If a batch has 3 rows or fewer.
        ValueError: If they are not two, or do not add up to the rows.
    """
    values = tuple(sizes) if isinstance(sizes, Iterable) else (sizes,)
    if len(values) == 2:
        first, second = (require_batch_size(f"sizes[{index}]", size) for index, size in enumerate(values))
        if first + second == n:
            return first, second
    raise ValueError(
        f"sizes: must be the sizes of two batches that add up to the {n} rows of gram; received {values!r}. Pass (B, "
        f"{n} - B), the rows of the first batch coming first; for a single batch take ntk.analytic.propagate."
    )


def _one_batch(sigma: Array, theta: Array, statistics: str, negative_slope: float, affine: bool) -> tuple[Array, Array]:
    """Return V and F of a batch alone."""
    return batch_norm_layer(sigma, theta, None, statistics, negative_slope=negative_slope, affine=affine)


def _across(
    sigma_11: Array,
    sigma_22: Array,
    sigma_12: Array,
    theta_12: Array,
    statistics: str,
    negative_slope: float,
    affine: bool,
) -> tuple[Array, Array]:
    """Return V and F between two batches, with as many nodes as their spectra ask for."""
    spectra = (batch_geometry(sigma, len(sigma)).eigenvalues for sigma in (sigma_11, sigma_22))
    first, second = (node_count(eigenvalues, order=0.5) for eigenvalues in spectra)
    with double_precision():
        value, tangent = two_batch_layer(
            *(jnp.asarray(part) for part in (sigma_11, sigma_22, sigma_12, theta_12)),
            statistics=statistics,
            negative_slope=negative_slope,
            affine=affine,
            nodes=(first, second),
        )
        return np.array(value), np.array(tangent)


def _cross_tangent(
    theta: jax.Array, c11: jax.Array, c22: jax.Array, c12: jax.Array, forms: Forms, mirrored: jax.Array
) -> jax.Array:
    """Return the integrand of the NTK map between the batches, at the covariance scaled by √s and √t.

    Args:
        theta: Centred tangent kernel [n1, n2].
        c11: Covariance of the first batch [n1, n1].
        c22: Covariance of the second [n2, n2].
        c12: Covariance between them [n1, n2].
        forms: E[φφ], E[φ'φ'] and E[φ(z_i)φ''(z'_j)] between them.
        mirrored: E[φ''(z_i)φ(z'_j)].

    Returns:
        The integrand [n1, n2].
    """
    value, step, point = forms
    left, right, along = c11 @ theta, theta @ c22, theta * c12
    once = (left + right) * step + along.sum(0)[None, :] * point + along.sum(1)[:, None] * mirrored
    twice = (left @ c22 + c12 @ theta.T @ c12) * step + along.sum() * value
    ends = (right * c12).sum(0)[None, :] * point + (left * c12).sum(1)[:, None] * mirrored
    return theta * step - 2 * once + 4 * (twice + ends)


@partial(jax.jit, static_argnames=("statistics", "affine", "nodes"))
def two_batch_layer(
    sigma_11: jax.Array,
    sigma_22: jax.Array,
    sigma_12: jax.Array,
    theta_12: jax.Array | None,
    *,
    statistics: str = "differentiated",
    negative_slope: float = 0.0,
    affine: bool = False,
    nodes: tuple[int, int] = (NODES, NODES),
) -> tuple[jax.Array, jax.Array | None]:
    """Return V and F between two batches, each normalized by its own statistics; traced by JAX, in the dtype given.

    Of the tangent kernel only the block between the batches enters. O(nodes²·n³) operations and O(n²) memory.

    Args:
        sigma_11: Covariance of the pre-activations of the first batch [n1, n1].
        sigma_22: Covariance of those of the second [n2, n2].
        sigma_12: Covariance between them [n1, n2].
        theta_12: Tangent kernel between them [n1, n2]; None for V alone.
        statistics: What the NTK differentiates, one of :data:`ntk.analytic.batch_norm.STATISTICS`.
        negative_slope: Slope a of the activation below zero.
        affine: Whether F includes what a gain and a shift per channel add, at one and zero.
        nodes: Number of nodes of the integrals over s and over t.

    Returns:
        V [n1, n2], and F [n1, n2] or None.
    """
    n1, n2 = sigma_12.shape
    activation = Homogeneous(negative_slope)
    g1, g2 = (jnp.asarray(centring(n, n), sigma_12.dtype) for n in (n1, n2))
    seen = theta_12 if theta_12 is None or statistics == "constant" else g1 @ theta_12 @ g2
    cross = g1 @ sigma_12 @ g2
    centred = jnp.block([[g1 @ sigma_11 @ g1, cross], [cross.T, g2 @ sigma_22 @ g2]])
    rounding = [jnp.finfo(cross.dtype).eps * jnp.abs(sigma).max() for sigma in (sigma_11, sigma_22)]
    first = split_covariance(centred, n1, rounding[0])

    def integrands(s: jax.Array, t: jax.Array, c: jax.Array) -> tuple[jax.Array, ...]:
        c11, c22, c12 = s * c[n2:, n2:], t * c[:n2, :n2], jnp.sqrt(s * t) * c[n2:, :n2]
        forms = activation_forms(c12, c11.diagonal(), c22.diagonal(), activation, same=False)
        if seen is None:
            return (forms[0] / jnp.sqrt(s * t),)
        tangent = seen * forms[1]
        if statistics == "differentiated":
            mirrored = activation_forms(c12.T, c22.diagonal(), c11.diagonal(), activation, same=False)[2].T
            tangent = _cross_tangent(seen, c11, c22, c12, forms, mirrored)
        return forms[0] / jnp.sqrt(s * t), tangent

    def over_t(s: jax.Array) -> tuple[jax.Array, ...]:
        rest = jnp.roll(first.reweighted(s), n2, axis=(0, 1))  # the second batch leads
        second = split_covariance(rest, n2, rounding[1])
        rule = laplace_rule(second.eigenvalues, nodes[1], order=0.5)
        return _weighted_sum(lambda t: integrands(s, t, second.reweighted(t)), rule)

    kernels = _weighted_sum(over_t, laplace_rule(first.eigenvalues, nodes[0], order=0.5))
    value, *tangents = (np.sqrt(n1 * n2) * kernel for kernel in kernels)
    if not tangents:
        return value, None
    if affine:
        signs = activation_forms(cross, centred.diagonal()[:n1], centred.diagonal()[n1:], activation, same=False)[1]
        tangents[0] = tangents[0] + value + signs
    return value, tangents[0]


def _weighted_sum(
    function: Callable[[jax.Array], tuple[jax.Array, ...]], rule: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, ...]:
    """Return Σ weight·function(node), node by node."""

    def add(total: tuple[jax.Array, ...], node: tuple[jax.Array, jax.Array]) -> tuple[tuple[jax.Array, ...], None]:
        return jax.tree.map(lambda sum_, part: sum_ + node[1] * part, total, function(node[0])), None

    start = jax.tree.map(jnp.zeros_like, jax.eval_shape(function, rule[0][0]))
    return jax.lax.scan(add, start, rule)[0]
