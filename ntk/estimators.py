"""Traces and spectral densities of a kernel known by its products, estimated from random vectors.

Every figure comes with its standard error over the random vectors, which are signs, ±1 with equal odds: for them the
diagonal of the kernel adds no variance.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from ntk.display import figure_svg, html_figure
from ntk.errors import AsymmetricKernelError, UnknownNameError
from ntk.lanczos import lanczos
from ntk.operator import NtkOperator
from ntk.results import KernelResult
from ntk.spectrum import float_dtype

METHODS = {"hutch++": 3, "xtrace": 2}
"""Ways to estimate a trace, and into how many parts they divide the products."""


class Estimate(NamedTuple):
    """A figure from random vectors.

    Attributes:
        value: The figure.
        standard_error: Of the figure, over the random vectors; 0 where it does not depend on them.
    """

    value: float
    standard_error: float


def estimate_trace(kernel: Any, *, products: int = 96, method: str = "hutch++", seed: int = 0) -> Estimate:
    """Trace of a positive semi-definite kernel from products with random vectors.

    "hutch++": a third of the products spans a basis Q of what is large in Θ, a third gives tr QᵀΘQ exactly, and a third
    estimates the trace of the rest, (I − QQᵀ) Θ (I − QQᵀ), without bias. The standard error is that of the last part:
    given Q, its samples are independent. Source: R. A. Meyer, C. Musco, C. Musco and D. P. Woodruff, "Hutch++: optimal
    stochastic trace estimation", SOSA 2021, arXiv 2010.09649, algorithm 1.

    "xtrace": half of the products with vectors ω_i, half with the basis of their images. Each ω_i estimates the rest
    that a basis from all other vectors leaves, so that every vector serves both ends; where eigenvalues fall fast it is
    the sharper one. No bias either. The scatter of these estimates, which the source reports, is too small, as they are
    correlated; the standard error is a jackknife over the vectors, which on average is not too small (B. Efron and C.
    Stein, Ann. Statist. 9 (1981)), but too large: two to five times on four spectra, and larger than that of Hutch++.
    Source: E. N. Epperly, J. A. Tropp and R. J. Webber, "XTrace: making the most of every sample in stochastic trace
    estimation", SIAM J. Matrix Anal. Appl. 45 (2024), arXiv 2301.07825.

    Args:
        kernel: A `LinearOperator`, `KernelResult` of one batch, or array [n, n].
        products: Products with the kernel that may be spent, 6 at least; a kernel with no more rows than one part of
            them is summed exactly.
        method: "hutch++" or "xtrace".
        seed: Of the random vectors.

    Raises:
        UnknownNameError: method does not exist.
        ValueError: products is less than 6.
    """
    if method not in METHODS:
        raise UnknownNameError("method", method, METHODS)
    if products < 6:
        raise ValueError(f"products must be at least 6, two for each part of Hutch++; got {products}.")
    operator, _ = _as_operator(kernel)
    n, part = operator.shape[0], products // METHODS[method]
    generator = np.random.default_rng(seed)
    if n <= part:
        return Estimate(float(np.trace(operator @ np.eye(n))), 0.0)
    vectors = _signs(generator, n, part)
    images = _multiply(operator, vectors)
    if method == "xtrace":
        return _xtrace(operator, vectors, images)
    basis = np.linalg.qr(images)[0]
    exact = float((basis * _multiply(operator, basis)).sum())
    rest = _signs(generator, n, products - 2 * part)
    rest -= basis @ (basis.T @ rest)
    samples = (rest * _multiply(operator, rest)).sum(0)
    return Estimate(exact + float(samples.mean()), _standard_error(samples))


def _xtrace(operator: LinearOperator, vectors: np.ndarray, images: np.ndarray) -> Estimate:
    """XTrace of the vectors [n, m], with the jackknife over them.

    All that it takes are products of m numbers in the basis Q of the images; without one vector, in that of the others.
    """
    eps = float(np.finfo(float_dtype(operator.dtype)).eps)
    basis, triangle = np.linalg.qr(images)
    inner, overlaps, forms = basis.T @ _multiply(operator, basis), basis.T @ vectors, (vectors * images).sum(0)
    value = _leave_one_out(inner, overlaps, triangle, forms, eps)
    m = len(forms)
    without = []
    for vector in range(m):
        others = np.arange(m) != vector
        rotation, rest = np.linalg.qr(triangle[:, others])
        reduced = rotation.T @ inner @ rotation, rotation.T @ overlaps[:, others]
        without.append(_leave_one_out(*reduced, rest, forms[others], eps))
    return Estimate(value, float(np.sqrt((m - 1) * np.var(without))))


def _leave_one_out(
    inner: np.ndarray, overlaps: np.ndarray, triangle: np.ndarray, forms: np.ndarray, eps: float
) -> float:
    """Mean over i of tr Q_iᵀΘQ_i + ω_iᵀ (I − Q_iQ_iᵀ) Θ (I − Q_iQ_iᵀ) ω_i, Q_i the basis of the images but the i-th.

    Q_i Q_iᵀ = Q (I − s sᵀ) Qᵀ with s the normalized column i of R⁻ᵀ, orthogonal to the other columns of R.

    Args:
        inner: QᵀΘQ [m, m]
        overlaps: QᵀΩ [m, m]
        triangle: R of ΘΩ = QR [m, m]
        forms: ω_iᵀΘω_i [m]
        eps: Relative rounding of a product.
    """
    diagonal = np.diagonal(triangle)
    least = max(eps * float(np.abs(diagonal).max()), float(np.finfo(np.float64).tiny))
    # An image that the others span already leaves nothing on the diagonal; any s orthogonal to the others will do.
    full = triangle + np.diag(np.where(np.abs(diagonal) < least, least, 0.0))
    left_out = scipy.linalg.solve_triangular(full / np.abs(np.diagonal(full)), np.eye(len(diagonal)), trans="T")
    left_out /= np.linalg.norm(left_out, axis=0)
    inside = overlaps - left_out * (left_out * overlaps).sum(0)
    rest = forms - 2 * (inside * triangle).sum(0) + (inside * (inner @ inside)).sum(0)
    return float(np.trace(inner) + (rest - (left_out * (inner @ left_out)).sum(0)).mean())


@dataclass(frozen=True, eq=False, repr=False)
class SpectralDensity:
    """Distribution of the eigenvalues of a kernel, by Gaussian quadrature from p random vectors.

    Each vector has its own quadrature, nodes θ and weights τ that sum to 1; the mean over vectors of Σ τ f(θ)
    estimates tr f(Θ) / size, without bias but for the error of the quadrature, which is none where f is a polynomial of
    degree below 2 * steps or the Krylov space is exhausted.

    Attributes:
        nodes: [p, steps], read-only.
        weights: [p, steps], read-only; 0 where a Krylov space was exhausted before.
        size: Number of eigenvalues.
        seed: Of the random vectors.
        source: Convention of the kernel in one line.
    """

    nodes: np.ndarray
    weights: np.ndarray
    size: int
    seed: int
    source: str = "array"

    def __post_init__(self) -> None:
        """Make the arrays read-only copies."""
        for name in ("nodes", "weights"):
            array = np.array(getattr(self, name), dtype=np.float64)
            array.setflags(write=False)
            object.__setattr__(self, name, array)

    def mean(self, function: Callable[[np.ndarray], np.ndarray]) -> Estimate:
        """Mean of f(λ) over all eigenvalues, tr f(Θ) / size.

        Args:
            function: Elementwise function of an array.
        """
        samples = (self.weights * function(self.nodes)).sum(1)
        return Estimate(float(samples.mean()), _standard_error(samples))

    def fraction_below(self, threshold: float) -> Estimate:
        """Fraction of the eigenvalues that are at most this large.

        Args:
            threshold: In the units of the kernel.
        """
        return self.mean(lambda nodes: (nodes <= threshold).astype(np.float64))

    def density(self, points: np.ndarray, width: float) -> tuple[np.ndarray, np.ndarray]:
        """Density of the eigenvalues, smoothed by a Gaussian.

        Args:
            points: [g]
            width: Standard deviation of the Gaussian.

        Returns:
            Density [g], of integral 1, and its standard error [g].
        """
        z = (np.asarray(points)[:, None, None] - self.nodes) / width
        samples = (self.weights * np.exp(-(z**2) / 2)).sum(-1) / (width * np.sqrt(2 * np.pi))
        return samples.mean(1), samples.std(1, ddof=1) / np.sqrt(samples.shape[1])

    @cached_property
    def effective_rank(self) -> Estimate:
        """Exponential of the entropy of the normalized eigenvalues, as `Spectrum.effective_rank` defines it.

        With T = tr Θ the entropy is ln T − tr(Θ ln Θ) / T; both traces come from the same vectors, and the value and
        its standard error from a jackknife over them, which removes the bias of first order. A zero kernel has rank 0.
        """
        nodes = np.clip(self.nodes, 0.0, None)
        logarithm = np.log(np.where(nodes > 0, nodes, 1.0))
        moments = self.size * np.stack([(self.weights * f).sum(1) for f in (nodes, nodes * logarithm)])
        p = moments.shape[1]
        if not moments[0].sum() > 0:
            return Estimate(0.0, 0.0)
        left_out = _rank((moments.sum(1, keepdims=True) - moments) / (p - 1))
        value = p * _rank(moments.mean(1)) - (p - 1) * left_out.mean()
        error = np.sqrt((p - 1) / p * ((left_out - left_out.mean()) ** 2).sum())
        return Estimate(float(value), float(error))

    def summary(self) -> str:
        """The figures in one line."""
        rank, mean = self.effective_rank, self.mean(lambda nodes: nodes)
        return (
            f"{self.size} eigenvalues by {self.nodes.shape[0]} vectors of {self.nodes.shape[1]} steps; "
            f"mean {mean.value:.4g} ± {mean.standard_error:.1g}; "
            f"effective rank {rank.value:.4g} ± {rank.standard_error:.1g} (s.e.); "
            f"nodes from {self.nodes[self.weights > 0].min():.3g} to {self.nodes.max():.3g}"
        )

    def __repr__(self) -> str:
        """The figures in one line."""
        return f"SpectralDensity({self.summary()})"

    def _repr_html_(self) -> str:
        """Fraction of the eigenvalues below each value, with a band of two standard errors."""
        return html_figure(_cumulative_svg(self), f"{self.summary()}. {self.source}")


def spectral_density(kernel: Any, *, probes: int = 16, steps: int = 64, seed: int = 0) -> SpectralDensity:
    """Distribution of the eigenvalues of a kernel by stochastic Lanczos quadrature, fully reorthogonalized.

    Source: S. Ubaru, J. Chen and Y. Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature", SIAM J.
    Matrix Anal. Appl. 38 (2017). The cost is probes * steps products, and as many vectors in memory.

    Args:
        kernel: A `LinearOperator`, `KernelResult` of one batch, or array [n, n].
        probes: Random vectors, two at least for a standard error.
        steps: Steps of each process, cut to the size.
        seed: Of the random vectors.

    Raises:
        ValueError: probes is less than 2, or steps less than 1.
    """
    if probes < 2 or steps < 1:
        raise ValueError(
            f"spectral_density needs probes >= 2, for a standard error, and steps >= 1; got {probes} and {steps}."
        )
    operator, source = _as_operator(kernel)
    n = operator.shape[0]
    starts = _signs(np.random.default_rng(seed), n, probes) / np.sqrt(n)
    eps = float(np.finfo(float_dtype(operator.dtype)).eps)
    (state,) = deque(lanczos(lambda v: _multiply(operator, v), starts, eps, steps), maxlen=1)
    nodes, weights = np.zeros((2, *state.diagonal.shape))
    for probe in range(probes):
        theta, vectors = state.eigh(probe)
        nodes[probe, : len(theta)], weights[probe, : len(theta)] = theta, vectors[0] ** 2
    return SpectralDensity(nodes, weights, n, seed, source)


def _as_operator(kernel: Any) -> tuple[LinearOperator, str]:
    """The kernel as an operator, and its convention.

    Raises:
        AsymmetricKernelError: It is not square, or of two batches.
    """
    if isinstance(kernel, NtkOperator) and kernel.symmetric:
        return kernel, kernel.describe()
    if isinstance(kernel, KernelResult):
        matrix, source = kernel.flatten(), kernel.describe()
    else:
        matrix, source = kernel if isinstance(kernel, LinearOperator) else np.asarray(kernel), "array"
    cross = isinstance(kernel, KernelResult | NtkOperator) and not kernel.symmetric
    if cross or len(matrix.shape) != 2 or matrix.shape[0] != matrix.shape[1] or matrix.shape[0] == 0:
        raise AsymmetricKernelError(
            f"an estimate needs a symmetric kernel [n, n]; got {'a cross kernel of ' if cross else ''}shape "
            f"{matrix.shape}. Compute it with x2=None, and flatten [n, n, o, o] values with KernelResult.flatten()."
        )
    return aslinearoperator(matrix), source


def _multiply(operator: LinearOperator, vectors: np.ndarray) -> np.ndarray:
    """Product in the type of the operator, as float64."""
    return np.asarray(operator @ vectors.astype(float_dtype(operator.dtype)), dtype=np.float64)


def _signs(generator: np.random.Generator, n: int, k: int) -> np.ndarray:
    return generator.choice([-1.0, 1.0], size=(n, k))


def _standard_error(samples: np.ndarray) -> float:
    return float(samples.std(ddof=1) / np.sqrt(len(samples)))


def _rank(moments: np.ndarray) -> np.ndarray:
    """Effective rank from tr Θ and tr Θ ln Θ, [2, ...]."""
    trace, entropy = moments
    return np.exp(np.log(trace) - entropy / trace)


def _cumulative_svg(density: SpectralDensity) -> str:
    """Cumulative distribution of the eigenvalues, as SVG."""
    from matplotlib.figure import Figure

    nodes = np.sort(density.nodes[density.weights > 0])
    floor = max(float(nodes[-1]), 0.0) * np.finfo(np.float64).eps * density.size
    positive = nodes[nodes > floor]
    figure = Figure(figsize=(4.0, 3.0), layout="constrained")
    axes = figure.subplots()
    if len(positive):
        points = np.geomspace(positive[0] * 0.8, positive[-1] * 1.25, 200)
        value, error = np.array([density.fraction_below(point) for point in points]).T
        axes.fill_between(points, value - 2 * error, value + 2 * error, alpha=0.3, linewidth=0, label="± 2 s.e.")
        axes.plot(points, value, linewidth=1, label="fraction below")
        axes.set_xscale("log")
        axes.legend(frameon=False)
    axes.set(xlabel="eigenvalue", ylabel="fraction of eigenvalues", ylim=(-0.02, 1.02))
    return figure_svg(figure)
