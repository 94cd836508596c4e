"""Exact kernels of BatchNorm followed by a homogeneous activation, at finite batch size and infinite width.

Per unit h ~ N(0, Σ) over the batch; z = h centred, r = ‖z‖, y = √B z/r (ε = 0, biased variance) and x = φ(y), with
φ(z) = z above zero and az below. φ is homogeneous, so x = √B φ(z)/r, and 1/r² = ∫₀^∞ e^{−s r²} ds re-weights the
Gaussian into another Gaussian: every expectation is one integral over s of closed forms. Derivation:
docs/mathematics.md §5.1 (V), §5.2 (F), §5.3 (points beyond the batch), §5.5 (population); mean-field setting of Yang et
al. (2019), arXiv 1902.08129.
"""

from dataclasses import dataclass
from functools import partial
from typing import overload

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from ntk.analytic.closed_forms import AnyArray, Homogeneous, namespace
from ntk.analytic.precision import Array, double_precision
from ntk.analytic.quadrature import NODES, laplace_rule, node_count

STATISTICS = ("differentiated", "mean_differentiated", "constant")
"""What the NTK differentiates: mean and variance of the batch, the mean alone, or neither (running statistics)."""

Forms = tuple[AnyArray, AnyArray, AnyArray]
"""E[φ(u)φ(v)], E[φ'(u)φ'(v)] and E[φ(u)φ''(v)] of pairs, of one shape."""

_EPS = float(np.finfo(np.float64).eps)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class BatchGeometry:
    """The covariance of points centred by the mean of a batch, split by the eigenvectors of the batch.

    Attributes:
        eigenvalues: Eigenvalues λ [d] of the centred Gram of the batch; zero, or left out, where they are rounding.
        loadings: Eigenvectors on the rows of the batch, regression coefficients on the others [n, d].
        residual: What the batch does not explain of the other points [n, n]; zero on the rows of the batch.
    """

    eigenvalues: AnyArray
    loadings: AnyArray
    residual: AnyArray

    def reweighted(self, s: AnyArray) -> AnyArray:
        """Return the covariance C(s) [n, n] under the weight e^{−s r²}.

        A sum of positive terms (docs/mathematics.md §5.3); the equal S − 2sSQ(I+2sΣ)⁻¹QS cancels at large s.
        """
        return self.residual + (self.loadings * (self.eigenvalues / (1 + 2 * s * self.eigenvalues))) @ self.loadings.T


def centring(n: int, n_statistics: int) -> Array:
    """Return A = I − 1[1ᵀ/B, 0] [n, n], which subtracts the mean of the first B points from all."""
    matrix = np.eye(n)
    matrix[:, :n_statistics] -= 1 / n_statistics
    return matrix


def centre(matrix: AnyArray, n_statistics: int) -> AnyArray:
    """Return AMAᵀ [n, n], in the dtype of the matrix."""
    operator = namespace(matrix).asarray(centring(matrix.shape[0], n_statistics), dtype=matrix.dtype)
    return operator @ matrix @ operator.T


def split_covariance(centred: AnyArray, size: int, rounding: AnyArray) -> BatchGeometry:
    """Split a centred covariance by the eigenvectors of its leading rows.

    Args:
        centred: Covariance of centred points [n, n], NumPy's or JAX's.
        size: Number B of leading rows that are the batch.
        rounding: Rounding of an entry: that of Σ, which centring passes on to smaller entries.

    Returns:
        The geometry, with all B eigenvalues, zero where they are rounding.
    """
    xp = namespace(centred)
    batch, across = centred[:size, :size], centred[size:, :size]
    values, vectors = xp.linalg.eigh((batch + batch.T) / 2)
    kept = values > 4 * size * xp.maximum(rounding, xp.finfo(values.dtype).eps * values[-1])
    beyond = xp.where(kept, across @ vectors / xp.where(kept, values, 1.0), 0.0)
    values = xp.where(kept, values, 0.0)
    unexplained = centred[size:, size:] - (beyond * values) @ beyond.T
    return BatchGeometry(values, xp.concatenate([vectors, beyond]), xp.pad(unexplained, ((size, 0), (size, 0))))


def batch_geometry(sigma: Array, n_statistics: int, relative: float = _EPS) -> BatchGeometry:
    """Centre and split a covariance.

    Args:
        sigma: Covariance Σ of the pre-activations [n, n].
        n_statistics: Number B of leading rows that define the statistics.
        relative: Rounding of the entries of Σ, relative to the largest.

    Returns:
        The geometry; its rank d counts eigenvalues above rounding.
    """
    split = split_covariance(centre(sigma, n_statistics), n_statistics, relative * np.abs(sigma).max())
    kept = split.eigenvalues > 0
    return BatchGeometry(split.eigenvalues[kept], split.loadings[:, kept], split.residual)


def activation_forms(c: AnyArray, q1: AnyArray, q2: AnyArray, activation: Homogeneous, *, same: bool) -> Forms:
    """Return the expectations over pairs of points.

    Args:
        c: Covariances [n1, n2].
        q1: Variances [n1].
        q2: Variances [n2].
        activation: The activation.
        same: Whether the points are the same, so that their correlations are one on the diagonal, exactly.

    Returns:
        The three expectations, each [n1, n2].
    """
    xp = namespace(c)
    q1, q2 = xp.maximum(q1, 0.0)[:, None], xp.maximum(q2, 0.0)[None, :]
    safe1, safe2 = xp.where(q1 > 0, q1, 1.0), xp.where(q2 > 0, q2, 1.0)
    rho = xp.clip(c / xp.sqrt(safe1) / xp.sqrt(safe2), -1.0, 1.0)
    if same:
        rho = xp.where(xp.eye(len(c), dtype=bool), 1.0, rho)
    point = activation.curvature(rho, safe2, q1)
    return activation.value(rho, q1, q2), activation.derivative(rho, q1, q2), point


def _integrands(
    c: AnyArray, theta: AnyArray | None, size: int, activation: Homogeneous, differentiated: bool, third: float
) -> tuple[AnyArray, ...]:
    """Return sV and, with a Θ, the integrand of F at the covariance sC(s), see docs/mathematics.md §5.2, §5.3.

    With all statistics differentiated the latter is Θ∘S − (M + Mᵀ) + third·N.
    """
    variance = c.diagonal()
    value, step, point = activation_forms(c, variance, variance, activation, same=True)
    if theta is None:
        return (value,)
    if not differentiated:
        return value, theta * step
    once = theta[:, :size] @ c[:size, :]  # Θ Q C
    twice = c[:, :size] @ once[:size, :]  # C Q Θ Q C
    m = once.T * step + once.diagonal()[None, :] * point
    cross = twice.diagonal()[None, :] * point
    n = once[:size, :size].trace() * value + 2 * twice * step + cross + cross.T
    return value, theta * step - m - m.T + third * n


@partial(jax.jit, static_argnames=("size", "differentiated"))
def _integrate(
    rule: tuple[AnyArray, AnyArray],
    geometry: BatchGeometry,
    theta: AnyArray | None,
    negative_slope: float,
    *,
    size: int,
    differentiated: bool,
) -> tuple[jax.Array, ...]:
    """Integrate node by node: O(nodes·n³) operations, O(n²) memory."""
    integrands = lambda c: _integrands(c, theta, size, Homogeneous(negative_slope), differentiated, 0.5)

    def add(total: tuple[jax.Array, ...], node: tuple[jax.Array, jax.Array]) -> tuple[tuple[jax.Array, ...], None]:
        s, weight = node
        parts = zip(total, (weight / s, weight), integrands(s * geometry.reweighted(s)), strict=False)
        return tuple(sum_ + factor * part for sum_, factor, part in parts), None

    start = jax.tree.map(jnp.zeros_like, jax.eval_shape(integrands, geometry.residual))
    return jax.lax.scan(add, start, rule)[0]


def _layer(
    sigma: AnyArray,
    theta: AnyArray | None,
    size: int,
    statistics: str,
    slope: float,
    affine: bool,
    population: bool,
    nodes: int | None,
) -> tuple[AnyArray, AnyArray | None]:
    """Return V and F; as many nodes as the spectrum asks for where None is given."""
    activation = Homogeneous(slope)
    differentiated = statistics == "differentiated"
    growth = int(size < len(sigma) and differentiated)
    centred = centre(sigma, size)
    seen = theta if theta is None or statistics == "constant" else centre(theta, size)
    if population:
        scale = 1 / centred[:size, :size].trace()  # in place of 1/r², and its powers in place of their means
        value, *tangents = _integrands(scale * centred, seen, size, activation, differentiated, 1.0)
        tangents = [scale * tangent for tangent in tangents]
    else:
        xp = namespace(sigma)
        geometry = split_covariance(centred, size, xp.finfo(sigma.dtype).eps * abs(sigma).max())
        if nodes is None:
            nodes = node_count(geometry.eigenvalues, growth=growth)
        rule = laplace_rule(geometry.eigenvalues, nodes, growth=growth)
        kernels = _integrate(rule, geometry, seen, slope, size=size, differentiated=differentiated)
        value, *tangents = (xp.asarray(kernel) for kernel in kernels)
        exists = xp.count_nonzero(geometry.eigenvalues) > 2 + 2 * growth
        tangents = [xp.where(exists, tangent, xp.nan) for tangent in tangents]
    value, *tangents = (size * kernel for kernel in (value, *tangents))
    if tangents and affine:
        signs = activation_forms(centred, centred.diagonal(), centred.diagonal(), activation, same=True)[1]
        tangents[0] = tangents[0] + value + signs
    value, *tangents = ((kernel + kernel.T) / 2 for kernel in (value, *tangents))
    return value, tangents[0] if tangents else None


@partial(jax.jit, static_argnames=("n_statistics", "statistics", "affine", "population", "nodes"))
def traced_batch_norm_layer(
    sigma: jax.Array,
    theta: jax.Array | None,
    *,
    n_statistics: int | None = None,
    statistics: str = "differentiated",
    negative_slope: float = 0.0,
    affine: bool = False,
    population: bool = False,
    nodes: int = NODES,
) -> tuple[jax.Array, jax.Array | None]:
    """Return what :func:`batch_norm_layer` does, traced by JAX and in the dtype of ``sigma``.

    Args:
        sigma: Covariance Σ of the pre-activations [n, n].
        theta: Tangent kernel Θ of the pre-activations [n, n]; None for V alone.
        n_statistics: Number B of leading rows that define the statistics; None for all.
        statistics: One of :data:`STATISTICS`.
        negative_slope: Slope a of the activation below zero.
        affine: Whether F includes a trainable gain and shift.
        population: Whether the batch stands for an infinitely large one.
        nodes: Number of nodes of the integral, whatever the spectrum.

    Returns:
        V [n, n], and F [n, n] or None. F is NaN where the centred Gram is of too low a rank for it to exist.
    """
    size = sigma.shape[0] if n_statistics is None else n_statistics
    return _layer(sigma, theta, size, statistics, negative_slope, affine, population, nodes)


@overload
def batch_norm_layer(
    sigma: ArrayLike,
    theta: None,
    n_statistics: int | None = None,
    statistics: str = "differentiated",
    *,
    negative_slope: float = 0.0,
    affine: bool = False,
    population: bool = False,
) -> tuple[Array, None]: ...


@overload
def batch_norm_layer(
    sigma: ArrayLike,
    theta: ArrayLike,
    n_statistics: int | None = None,
    statistics: str = "differentiated",
    *,
    negative_slope: float = 0.0,
    affine: bool = False,
    population: bool = False,
) -> tuple[Array, Array]: ...


def batch_norm_layer(
    sigma: ArrayLike,
    theta: ArrayLike | None,
    n_statistics: int | None = None,
    statistics: str = "differentiated",
    *,
    negative_slope: float = 0.0,
    affine: bool = False,
    population: bool = False,
) -> tuple[Array, Array | None]:
    """Return V(Σ) and F_Σ(Θ) of one BatchNorm layer and its activation; the next kernels are K' = V, Θ' = V + F.

    See docs/mathematics.md §5.

    Args:
        sigma: Covariance Σ of the pre-activations [n, n]; the centred Gram of the batch must have rank 3 or more.
        theta: Tangent kernel Θ of the pre-activations [n, n]; None for V alone.
        n_statistics: Number B of leading rows that define the statistics; None for all.
        statistics: One of :data:`STATISTICS`.
        negative_slope: Slope a of the activation below zero: 0 for ReLU, −1 for the absolute value, 1 for none.
        affine: Whether F includes what a gain and a shift per channel add, at one and zero (§5.2).
        population: Whether the batch stands for an infinitely large one of many directions, of which its rows are an
            equally weighted sample (§5.5); any rank will do.

    Returns:
        V [n, n], and F [n, n] or None. F is NaN where the rank is too low for it to exist.
    """
    covariance = np.asarray(sigma, dtype=np.float64)
    tangent = None if theta is None else np.asarray(theta, dtype=np.float64)
    size = len(covariance) if n_statistics is None else n_statistics
    with double_precision():
        return _layer(covariance, tangent, size, statistics, negative_slope, affine, population, None)
