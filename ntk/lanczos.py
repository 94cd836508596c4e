"""The Lanczos process with full reorthogonalization, and the ends of a spectrum from it.

Every new vector is made orthogonal to all earlier ones twice, so that no eigenvalue is found twice by rounding and none
is lost. Source: G. H. Golub and C. F. Van Loan, Matrix Computations, 4th edition, chapter 10. Where the basis would
outgrow its memory the process is restarted from the Ritz vectors at both ends and goes on as if it had kept all of
their space. Source: K. Wu and H. Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems", SIAM J.
Matrix Anal. Appl. 22 (2000).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import scipy.linalg

Product = Callable[[np.ndarray], np.ndarray]
"""[n, k] to the kernel times it, [n, k]."""

PATIENCE = 2
"""Steps, over those in which all else converged, to wait for the first eigenvalue above a null space (chosen)."""

MAX_STEPS = 1000
"""Steps of one process at most, each one product (chosen, not tuned)."""


@dataclass(frozen=True, eq=False)
class Tridiagonal:
    """A kernel in an orthonormal basis of its Krylov space, for each of p starting vectors.

    Attributes:
        diagonal: [p, steps]
        off_diagonal: [p, steps]; the last one is the norm of what the basis does not reach. It is 0 from the step on at
            which the Krylov space is exhausted, and so is the diagonal beyond.
        basis: [steps, n, p]
        following: [n, p], the direction that the next step adds, or 0.
    """

    diagonal: np.ndarray
    off_diagonal: np.ndarray
    basis: np.ndarray
    following: np.ndarray

    def exhausted(self, start: int = 0) -> bool:
        """Whether the Krylov space of a starting vector is invariant."""
        return bool((self.off_diagonal[start] == 0).any())

    def eigh(self, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Eigenvalues [m], ascending, and eigenvectors [m, m] of the m steps before the space was exhausted."""
        zero = np.flatnonzero(self.off_diagonal[start] == 0)
        m = int(zero[0]) + 1 if len(zero) else self.diagonal.shape[1]
        return scipy.linalg.eigh_tridiagonal(self.diagonal[start, :m], self.off_diagonal[start, : m - 1])


def lanczos(
    product: Product, starts: np.ndarray, eps: float, steps: int, against: np.ndarray | None = None
) -> Iterator[Tridiagonal]:
    """Run the process from several vectors side by side, a step at a time.

    Args:
        product: The kernel.
        starts: [n, p], columns of norm 1, orthogonal to `against`.
        eps: Relative rounding error of a product; a new direction shorter than eps * n * max ‖Θ v‖ is rounding.
        steps: At most.
        against: [n, q] orthonormal vectors that are kept out of the basis, or None.

    Yields:
        The state after each step, up to `steps`, to n - q, or until every Krylov space is exhausted. Arrays are
        overwritten as the process goes on.
    """
    n, p = starts.shape
    limit = min(steps, n - (0 if against is None else against.shape[1]))
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
        yield Tridiagonal(alpha[:, : step + 1], beta[:, : step + 1], basis[: step + 1], vector)
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


@dataclass(frozen=True, eq=False)
class _Kept:
    """Ritz pairs that a restart begins with: Θ Y = Y diag(θ) + r bᵀ, with r the vector that it starts from.

    Attributes:
        vectors: Y [n, k]
        values: θ [k]
        coupling: b [k]
    """

    vectors: np.ndarray
    values: np.ndarray
    coupling: np.ndarray

    def eigh(self, state: Tridiagonal) -> tuple[np.ndarray, np.ndarray]:
        """Eigenvalues, ascending, and eigenvectors of the kernel in the space of Y and of the basis since."""
        k = len(self.values)
        if not k:
            return state.eigh()
        theta, coefficients = state.eigh()
        matrix = np.diag(np.concatenate([self.values, theta]))
        matrix[k:, :k] = np.outer(coefficients[0], self.coupling)
        values, vectors = scipy.linalg.eigh(matrix)  # of the lower triangle
        return values, np.concatenate([vectors[:k], coefficients @ vectors[k:]])

    def lift(self, state: Tridiagonal, coefficients: np.ndarray) -> np.ndarray:
        """Vectors [n, k] with these coefficients [., k]."""
        k = len(self.values)
        return self.vectors @ coefficients[:k] + state.basis[: len(coefficients) - k, :, 0].T @ coefficients[k:]


def ends(
    product: Product,
    n: int,
    counts: tuple[int, int],
    eps: float,
    tolerance: float,
    capacity: int,
    exact: Product | None = None,
) -> Ends:
    """Find the eigenvalues at both ends, copies of multiple ones included.

    A Krylov space holds one vector of each eigenspace. Where more than one eigenvalue of an end is asked for, the
    process is run again orthogonal to what was found, until nothing new appears among those asked for.

    Args:
        product: The kernel.
        n: Its size.
        counts: How many from the upper end, and from the lower.
        eps: Relative rounding error of a product; eps * n * λmax is the floor below which an eigenvalue is zero.
        tolerance: Residual norm over the eigenvalue at which an eigenpair counts as found.
        capacity: Vectors that a basis may hold, beyond which it is restarted.
        exact: The same kernel to more digits, from which the values and residuals are, or None.

    Returns:
        The eigenpairs, those that did not converge with the residual that they have.
    """
    search = _Search(product, n, counts, eps, tolerance, min(capacity, MAX_STEPS))
    while search.run():
        pass
    return search.result(exact)


class _Search:
    """Eigenpairs found so far, and the processes that bring more."""

    def __init__(
        self, product: Product, n: int, counts: tuple[int, int], eps: float, tolerance: float, capacity: int
    ) -> None:
        self.product, self.n, self.counts, self.eps = product, n, counts, eps
        self.tolerance, self.capacity = tolerance, capacity
        self.values, self.vectors = np.empty(0), np.empty((n, 0))
        self.top = 0.0
        self.products = 0
        self.positive: tuple[float, np.ndarray] | None = None
        self.nullity: int | None = None
        self.patience = MAX_STEPS
        self.generator = np.random.default_rng(0)

    @property
    def floor(self) -> float:
        """Below it an eigenvalue is zero."""
        return self.n * self.eps * self.top

    def run(self) -> bool:
        """One process, orthogonal to what is known; whether another one may bring more."""
        whole = self.n - self.vectors.shape[1]
        taken, left = 0, min(whole, MAX_STEPS) if self.capacity >= whole else MAX_STEPS
        start = self._start(self.vectors)
        kept = _Kept(np.empty((self.n, 0)), np.empty(0), np.empty(0))
        while True:
            against = np.concatenate([self.vectors, kept.vectors], axis=1) if len(self.values) else kept.vectors
            room, look = min(left, self.capacity - len(kept.values), self.n - against.shape[1]), 1
            for step, state in enumerate(lanczos(self.product, start, self.eps, room, against), 1):
                done = step == room or state.exhausted()
                if step == look or done:
                    look = step + max(5, step // 10)
                    theta, coefficients = kept.eigh(state)
                    self.top = max(self.top, float(np.abs(theta).max()))
                    settled = self._settled(state, theta, coefficients, taken + step)
                    if done or settled:
                        break
            self.products, taken, left = self.products + step, taken + step, left - step
            if settled or not left or state.exhausted():
                return self._take(kept, state, theta, coefficients)
            kept, start = self._restart(kept, state, theta, coefficients), state.following.copy()

    def _restart(self, kept: _Kept, state: Tridiagonal, theta: np.ndarray, coefficients: np.ndarray) -> _Kept:
        """Half of the Ritz pairs, from the ends that are asked for."""
        size, half = len(theta), len(theta) // 2
        low = half // 2 if self.counts[1] else 0
        chosen = np.r_[:low, size - half + low : size]
        vectors = kept.lift(state, coefficients[:, chosen])
        return _Kept(vectors, theta[chosen], state.off_diagonal[0, -1] * coefficients[-1, chosen])

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

    def _settled(self, state: Tridiagonal, theta: np.ndarray, coefficients: np.ndarray, steps: int) -> bool:
        """Whether all that is asked for has converged, and with the lower end the first value above the floor.

        The latter may lie inside the spectrum and not converge at all; it is waited for within reason. Where there is a
        null space, a kernel that the first process can exhaust is exhausted, for its dimension.
        """
        first = not len(self.values)
        if len(theta) < sum(self.counts):
            return False
        if first and self.counts[1] and theta[0] <= self.floor and self.n <= self.capacity:
            return False
        bound = state.off_diagonal[0, -1] * np.abs(coefficients[-1])
        converged = bound <= np.maximum(self.tolerance * np.abs(theta), self.floor / self.n)
        if not converged[self._wanted(len(theta))].all():
            return False
        above = np.flatnonzero(theta > self.floor)
        self.patience = min(self.patience, PATIENCE * steps)
        return not (first and self.counts[1] and len(above)) or bool(converged[above[0]]) or steps >= self.patience

    def _take(self, kept: _Kept, state: Tridiagonal, theta: np.ndarray, coefficients: np.ndarray) -> bool:
        """Take over what a process found, and say whether another one may bring more."""
        above = np.flatnonzero(theta > self.floor)
        if not len(self.values):
            if len(above):
                self.positive = float(theta[above[0]]), kept.lift(state, coefficients[:, above[0]])
            if state.exhausted() and not len(kept.values):
                self._count_null_space(state.basis[: len(theta), :, 0].T, len(above))
        wanted = self._wanted(len(theta))
        values = np.concatenate([self.values, theta[wanted]])
        vectors = np.concatenate([self.vectors, kept.lift(state, coefficients[:, wanted])], axis=1)
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

    def result(self, exact: Product | None) -> Ends:
        """The eigenpairs, each with the residual of a product of its own; of the exact kernel where there is one."""
        found = [] if self.positive is None else [self.positive]
        vectors = np.column_stack([self.vectors, *(vector for _, vector in found)])
        values = np.array([*self.values, *(value for value, _ in found)])
        images = np.asarray((exact or self.product)(vectors), dtype=np.float64)
        if exact is not None:
            values = (vectors * images).sum(0) / (vectors * vectors).sum(0)
        residuals = np.linalg.norm(images - vectors * values, axis=0)
        k = len(self.values)
        return Ends(
            values[:k][::-1],
            vectors[:, :k][:, ::-1],
            residuals[:k][::-1],
            (float(values[k]), float(residuals[k])) if found else None,
            self.nullity,
            self.products + len(values),
        )
