"""The Lanczos process with full reorthogonalization, and the ends of a spectrum from it.

Every new vector is made orthogonal to all earlier ones twice, so that no eigenvalue is found twice by rounding and none
is lost. Source: G. H. Golub and C. F. Van Loan, Matrix Computations, 4th edition, chapter 10.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import scipy.linalg

Product = Callable[[np.ndarray], np.ndarray]
"""[n, k] to the kernel times it, [n, k]."""

MAX_STEPS = 1000
"""Steps of one process at most, each one product and one vector kept (chosen, not tuned)."""

RESIDUAL = 1e-6
"""Residual norm over the eigenvalue at which an eigenpair counts as found (chosen, not tuned)."""


@dataclass(frozen=True, eq=False)
class Tridiagonal:
    """A kernel in an orthonormal basis of its Krylov space, for each of p starting vectors.

    Attributes:
        diagonal: [p, steps]
        off_diagonal: [p, steps]; the last one is the norm of what the basis does not reach. It is 0 from the step on at
            which the Krylov space is exhausted, and so is the diagonal beyond.
        basis: [steps, n, p]
    """

    diagonal: np.ndarray
    off_diagonal: np.ndarray
    basis: np.ndarray

    def exhausted(self, start: int = 0) -> bool:
        """Whether the Krylov space of a starting vector is invariant."""
        return bool((self.off_diagonal[start] == 0).any())

    def eigh(self, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Eigenvalues [m], ascending, and eigenvectors [m, m] of the m steps before the space was exhausted."""
        zero = np.flatnonzero(self.off_diagonal[start] == 0)
        m = int(zero[0]) + 1 if len(zero) else self.diagonal.shape[1]
        return scipy.linalg.eigh_tridiagonal(self.diagonal[start, :m], self.off_diagonal[start, : m - 1])


def lanczos(
    product: Product, starts: np.ndarray, eps: float, against: np.ndarray | None = None
) -> Iterator[Tridiagonal]:
    """Run the process from several vectors side by side, a step at a time.

    Args:
        product: The kernel.
        starts: [n, p], columns of norm 1, orthogonal to `against`.
        eps: Relative rounding error of a product; a new direction shorter than eps * n * max ‖Θ v‖ is rounding.
        against: [n, q] orthonormal eigenvectors that are kept out of the basis, or None.

    Yields:
        The state after each step, up to n - q steps or until every Krylov space is exhausted. Arrays are overwritten
        as the process goes on.
    """
    n, p = starts.shape
    limit = n - (0 if against is None else against.shape[1])
    capacity = 0
    basis, alpha, beta = np.empty((0, n, p)), np.empty((p, 0)), np.empty((p, 0))
    vector, scale = starts, np.zeros(p)
    for step in range(limit):
        if step == capacity:
            capacity = min(limit, max(16, 2 * capacity))
            basis = np.concatenate([basis, np.empty((capacity - step, n, p))])
            alpha, beta = (np.concatenate([a, np.zeros((p, capacity - step))], axis=1) for a in (alpha, beta))
        basis[step] = vector
        image = np.asarray(product(vector), dtype=np.float64)
        alpha[:, step] = (image * vector).sum(0)
        size = np.sqrt((image * image).sum(0))
        for _ in range(2):
            for column in range(p):
                known = basis[: step + 1, :, column]
                image[:, column] -= known.T @ (known @ image[:, column])
            if against is not None:
                image -= against @ (against.T @ image)
        scale = np.maximum(scale, size)
        norm = np.sqrt((image * image).sum(0))
        going = norm > n * eps * scale
        beta[:, step] = np.where(going, norm, 0.0)
        vector = np.where(going, image / np.where(going, norm, 1.0), 0.0)
        yield Tridiagonal(alpha[:, : step + 1], beta[:, : step + 1], basis[: step + 1])
        if not going.any():
            return


@dataclass(frozen=True, eq=False)
class Ends:
    """Eigenpairs at both ends of a positive semi-definite kernel.

    Attributes:
        values: [k], descending: the largest, then the smallest.
        vectors: [n, k]
        residuals: [k], ‖Θ v − λ v‖, each from a product of its own.
        positive: Smallest eigenvalue above the floor, with its residual; None where the process met none.
        nullity: Dimension of the null space where an exhausted Krylov space gives it, else None.
        products: Vectors that the kernel was multiplied by.
    """

    values: np.ndarray
    vectors: np.ndarray
    residuals: np.ndarray
    positive: tuple[float, float] | None
    nullity: int | None
    products: int


def ends(product: Product, n: int, largest: int, smallest: int, eps: float) -> Ends:
    """Find the eigenvalues at both ends, copies of multiple ones included.

    A Krylov space holds one vector of each eigenspace. Where more than one eigenvalue of an end is asked for, the
    process is run again orthogonal to what was found, until nothing new appears among those asked for.

    Args:
        product: The kernel.
        n: Its size.
        largest: How many from the upper end.
        smallest: How many from the lower end.
        eps: Relative rounding error of a product; eps * n * λmax is the floor below which an eigenvalue is zero.

    Returns:
        The eigenpairs, those that did not converge with the residual that they have.
    """
    search = _Search(product, n, largest, smallest, eps)
    while search.run():
        pass
    return search.result()


class _Search:
    """Eigenpairs found so far, and the processes that bring more."""

    def __init__(self, product: Product, n: int, largest: int, smallest: int, eps: float) -> None:
        self.product, self.n, self.counts, self.eps = product, n, (largest, smallest), eps
        self.values, self.vectors = np.empty(0), np.empty((n, 0))
        self.top = 0.0
        self.products = 0
        self.positive: tuple[float, np.ndarray] | None = None
        self.nullity: int | None = None
        self.generator = np.random.default_rng(0)

    @property
    def floor(self) -> float:
        """Below it an eigenvalue is zero."""
        return self.n * self.eps * self.top

    def run(self) -> bool:
        """One process, orthogonal to what is known; whether another one may bring more."""
        limit = min(self.n - self.vectors.shape[1], MAX_STEPS)
        look = 1
        for step, state in enumerate(lanczos(self.product, self._start(self.vectors), self.eps, self.vectors), 1):
            self.products += 1
            if step in (look, limit) or state.exhausted():
                look = step + max(5, step // 10)
                theta, coefficients = state.eigh()
                self.top = max(self.top, float(np.abs(theta).max()))
                if step == limit or state.exhausted() or self._settled(state, theta, coefficients):
                    break
        return self._take(state, theta, coefficients)

    def _start(self, against: np.ndarray) -> np.ndarray:
        """Random vector [n, 1] of norm 1, orthogonal to the columns given."""
        start = self.generator.standard_normal((self.n, 1))
        for _ in range(2):
            start -= against @ (against.T @ start)
        return start / np.linalg.norm(start)

    def _wanted(self, size: int) -> np.ndarray:
        """Which of `size` ascending Ritz values are asked for."""
        index = np.arange(size)
        return (index >= size - self.counts[0]) | (index < self.counts[1])

    def _settled(self, state: Tridiagonal, theta: np.ndarray, coefficients: np.ndarray) -> bool:
        """Whether all that is asked for has converged, and with the lower end the first value above the floor.

        Where there is a null space, a kernel that the first process can exhaust is exhausted, for its dimension.
        """
        first = not len(self.values)
        if len(theta) < sum(self.counts):
            return False
        if first and self.counts[1] and theta[0] <= self.floor and self.n <= MAX_STEPS:
            return False
        bound = state.off_diagonal[0, -1] * np.abs(coefficients[-1])
        wanted = self._wanted(len(theta))
        above = np.flatnonzero(theta > self.floor)
        if first and self.counts[1]:
            wanted[above[:1]] = True
        return bool((bound <= np.maximum(RESIDUAL * np.abs(theta), self.floor / self.n))[wanted].all())

    def _take(self, state: Tridiagonal, theta: np.ndarray, coefficients: np.ndarray) -> bool:
        """Take over what a process found, and say whether another one may bring more."""
        basis = state.basis[: len(theta), :, 0].T
        above = np.flatnonzero(theta > self.floor)
        if not len(self.values):
            if len(above):
                self.positive = float(theta[above[0]]), basis @ coefficients[:, above[0]]
            if state.exhausted():
                self._count_null_space(basis, len(above))
        wanted = self._wanted(len(theta))
        values = np.concatenate([self.values, theta[wanted]])
        vectors = np.concatenate([self.vectors, basis @ coefficients[:, wanted]], axis=1)
        keep = np.argsort(values)
        keep = keep[self._wanted(len(values))]
        new = bool((keep >= len(self.values)).any())
        self.values, self.vectors = values[keep], vectors[:, keep]
        missing = len(self.values) < sum(self.counts)
        return (missing or (new and max(self.counts) > 1)) and self.vectors.shape[1] < self.n

    def _count_null_space(self, basis: np.ndarray, positive: int) -> None:
        """What lies beyond an invariant space is null if a random vector from there is annihilated."""
        if basis.shape[1] < self.n:
            beyond = self._start(basis)
            self.products += 1
            if np.linalg.norm(self.product(beyond)) > self.floor:
                return
        self.nullity = self.n - positive

    def result(self) -> Ends:
        """The eigenpairs, each with the residual of a product of its own."""
        positive = [] if self.positive is None else [self.positive[1]]
        vectors = np.column_stack([self.vectors, *positive])
        values = np.array([*self.values, *([] if self.positive is None else [self.positive[0]])])
        residuals = np.linalg.norm(np.asarray(self.product(vectors), dtype=np.float64) - vectors * values, axis=0)
        k = len(self.values)
        return Ends(
            values[:k][::-1],
            vectors[:, :k][:, ::-1],
            residuals[:k][::-1],
            (float(values[k]), float(residuals[k])) if positive else None,
            self.nullity,
            self.products + len(values),
        )
