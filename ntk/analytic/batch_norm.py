"""Exact kernels of BatchNorm followed by ReLU at finite batch size and infinite width.

Per unit h ~ N(0, Σ) over the batch; z = h centred, r = ‖z‖, y = √B z/r (ε = 0, biased variance, no affine part) and
x = φ(y). ReLU is homogeneous, so x = √B φ(z)/r, and 1/r² = ∫₀^∞ e^{−s r²} ds re-weights the Gaussian into another
Gaussian: every expectation is one integral over s of closed ReLU forms. Derivation: docs/mathematics.md §5.1 (V),
§5.2 (F) and §5.3 (points beyond the batch); mean-field setting of Yang et al. (2019), arXiv 1902.08129.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from ntk.analytic.precision import Array, double_precision
from ntk.analytic.quadrature import laplace_rule

STATISTICS = ("differentiated", "mean_differentiated", "constant")
"""What the NTK differentiates: mean and variance of the batch, the mean alone, or neither (running statistics)."""


_EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True, eq=False)
class BatchGeometry:
    """The covariance of points centred by the mean of a batch, split by the eigenvectors of the batch.

    Under the re-weighting by e^{−s r²} the covariance is C(s) = residual + loadings diag(λ/(1+2sλ)) loadingsᵀ, a sum of
    positive terms (docs/mathematics.md §5.3); the equal S − 2sSQ(I+2sΣ)⁻¹QS cancels at large s.

    Attributes:
        eigenvalues: Positive eigenvalues λ [d] of the centred Gram of the batch.
        loadings: Eigenvectors on the rows of the batch, regression coefficients on the others [n, d].
        residual: What the batch does not explain of the other points [n, n]; zero on the rows of the batch.
    """

    eigenvalues: Array
    loadings: Array
    residual: Array


def centring(n: int, n_statistics: int) -> Array:
    """Return A = I − 1[1ᵀ/B, 0] [n, n], which subtracts the mean of the first B points from all."""
    matrix = np.eye(n)
    matrix[:, :n_statistics] -= 1 / n_statistics
    return matrix


def batch_geometry(sigma: Array, n_statistics: int, relative: float = _EPS) -> BatchGeometry:
    """Centre and split a covariance.

    Args:
        sigma: Covariance Σ of the pre-activations [n, n].
        n_statistics: Number B of leading rows that define the statistics.
        relative: Rounding of the entries of Σ, relative to the largest.

    Returns:
        The geometry; its rank d counts eigenvalues above rounding.
    """
    n = sigma.shape[0]
    operator = centring(n, n_statistics)
    centred = operator @ sigma @ operator.T
    batch = centred[:n_statistics, :n_statistics]
    values, vectors = np.linalg.eigh((batch + batch.T) / 2)
    # Rounding of the centring is relative to the entries of Σ itself, not to those of the centred matrix.
    floor = 4 * n_statistics * relative * max(float(values[-1]), float(np.abs(sigma).max()))
    kept = values > floor
    values, vectors = values[kept], vectors[:, kept]
    beyond = centred[n_statistics:, :n_statistics] @ vectors / values
    loadings = np.concatenate([vectors, beyond])
    residual = np.zeros((n, n))
    explained = (beyond * values) @ beyond.T
    residual[n_statistics:, n_statistics:] = centred[n_statistics:, n_statistics:] - explained
    return BatchGeometry(values, loadings, residual)


def _relu_forms(c: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return E[φφ], E[φ'φ'] and E[φ(z_i)δ(z_j)] of a covariance [n, n]; zero rows give zeros, the diagonal is exact."""
    scale = jnp.sqrt(jnp.maximum(jnp.diagonal(c), 0.0))
    safe = jnp.where(scale > 0, scale, 1.0)
    rho = jnp.clip(c / jnp.outer(safe, safe), -1.0, 1.0)
    rho = jnp.where(jnp.eye(c.shape[0], dtype=bool), 1.0, rho)
    sine = jnp.sqrt((1 - rho) * (1 + rho))
    turn = (jnp.pi / 2 + jnp.arctan2(rho, sine)) / (2 * jnp.pi)
    value = jnp.outer(scale, scale) * (sine / (2 * jnp.pi) + turn * rho)
    point = jnp.outer(scale, 1 / safe) * sine / (2 * jnp.pi)
    return value, turn, point


def _tangent(
    theta: jax.Array, c: jax.Array, s: jax.Array, size: int, forms: tuple[jax.Array, jax.Array, jax.Array]
) -> jax.Array:
    """Return the integrand Θc∘Step − s(M+Mᵀ) + ½s²N of the NTK map, statistics differentiated.

    See docs/mathematics.md §5.2, and §5.3 for points beyond the batch.
    """
    value, step, point = forms
    once = theta[:, :size] @ c[:size, :]  # Θ Q C
    twice = c[:, :size] @ once[:size, :]  # C Q Θ Q C
    m = once.T * step + jnp.diagonal(once)[None, :] * point
    cross = jnp.diagonal(twice)[None, :] * point
    trace = jnp.trace(once[:size, :size])
    n = trace * value + 2 * twice * step + cross + cross.T
    return theta * step - s * (m + m.T) + 0.5 * s**2 * n


@jax.jit(static_argnames=("size", "differentiated"))
def _integrate(
    nodes: tuple[jax.Array, jax.Array],
    geometry: tuple[jax.Array, jax.Array, jax.Array],
    theta: jax.Array,
    *,
    size: int,
    differentiated: bool,
) -> tuple[jax.Array, jax.Array]:
    """Sum both integrands over the nodes: O(nodes·n³)."""
    eigenvalues, loadings, residual = geometry

    def add(total: tuple[jax.Array, jax.Array], node: tuple[jax.Array, jax.Array]) -> tuple[tuple, None]:
        s, weight = node
        c = residual + (loadings * (eigenvalues / (1 + 2 * s * eigenvalues))) @ loadings.T
        forms = _relu_forms(c)
        tangent = _tangent(theta, c, s, size, forms) if differentiated else theta * forms[1]
        return (total[0] + weight * forms[0], total[1] + weight * tangent), None

    start = (jnp.zeros_like(theta), jnp.zeros_like(theta))
    (value, tangent), _ = jax.lax.scan(add, start, nodes)
    return size * value, size * tangent


def batch_norm_layer(
    sigma: Array, theta: Array, n_statistics: int | None = None, statistics: str = "differentiated"
) -> tuple[Array, Array]:
    """Return V(Σ) and F_Σ(Θ) of one BatchNorm-ReLU layer; the next kernels are K' = V, Θ' = V + F.

    See docs/mathematics.md §5.

    Args:
        sigma: Covariance Σ of the pre-activations [n, n]; the centred Gram of the batch must have rank 3 or more.
        theta: Tangent kernel Θ of the pre-activations [n, n].
        n_statistics: Number B of leading rows that define the statistics; None for all.
        statistics: One of :data:`STATISTICS`.

    Returns:
        V [n, n] and F [n, n].
    """
    n = sigma.shape[0]
    size = n if n_statistics is None else n_statistics
    geometry = batch_geometry(sigma, size)
    operator = centring(n, size)
    centred = theta if statistics == "constant" else operator @ theta @ operator.T
    differentiated = statistics == "differentiated"
    beyond = size < n
    rule = laplace_rule(geometry.eigenvalues, beyond_batch=beyond, growth=int(beyond and differentiated))
    with double_precision():
        parts = (geometry.eigenvalues, geometry.loadings, geometry.residual)
        value, tangent = _integrate(rule, parts, centred, size=size, differentiated=differentiated)
        result = np.array(value), np.array(tangent)
    return (result[0] + result[0].T) / 2, (result[1] + result[1].T) / 2
