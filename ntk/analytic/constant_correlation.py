"""Kernels of inputs that all have one norm and one correlation, in closed form for any number of them."""

import math
from dataclasses import dataclass

import numpy as np

from ntk.analytic.messages import require_integer
from ntk.analytic.precision import Array


@dataclass(frozen=True)
class ConstantCorrelation:
    """The kernel (p − o) I + o 11ᵀ over m inputs (docs/mathematics.md §1.2, §6.1–6.3).

    p and o are what `propagate` makes of two such inputs: any depth and any m cost a Gram matrix of two.

    Attributes:
        diagonal: p, of every input with itself.
        off_diagonal: o, of every pair.
        m: Number of inputs, at least 2.

    Raises:
        ValueError: If m is too small, or the kernel is not positive semi-definite, or zero.
    """

    diagonal: float
    off_diagonal: float
    m: int

    def __post_init__(self) -> None:
        """Refuse what is no covariance of m inputs.

        Raises:
            ValueError: As stated for the class.
        """
        require_integer("m", self.m, 2, "A correlation needs two inputs. Pass the number of inputs.")
        lowest = -self.diagonal / (self.m - 1)
        if not (math.isfinite(self.diagonal) and self.diagonal > 0 and lowest <= self.off_diagonal <= self.diagonal):
            raise ValueError(
                f"off_diagonal: must lie between −diagonal/(m − 1) and a positive, finite diagonal, here {lowest:.6g} "
                f"and {self.diagonal:.6g}; received {self.off_diagonal!r}. Pass ntk[0, 0] and ntk[0, 1] of two inputs."
            )

    @property
    def outlier(self) -> float:
        """Eigenvalue of the constant vector, p + (m − 1) o."""
        return self.diagonal + (self.m - 1) * self.off_diagonal

    @property
    def bulk(self) -> float:
        """The other m − 1 eigenvalues, p − o."""
        return self.diagonal - self.off_diagonal

    @property
    def condition_number(self) -> float:
        """Larger over smaller of the two eigenvalues; infinite if the kernel is singular."""
        low, high = sorted((self.outlier, self.bulk))
        return high / low if low > 0 else math.inf

    @property
    def largest_stable_learning_rate(self) -> float:
        """2/λmax, for the loss ½ Σ (f − y)²; m times that for its average over examples."""
        return 2 / max(self.outlier, self.bulk)

    @property
    def label_weight(self) -> float:
        """o/(p + (m − 1) o): what each of the m labels counts for in the mean predictor of one more such input."""
        return self.off_diagonal / self.outlier

    @property
    def total_label_weight(self) -> float:
        """Of all labels together, m times one: 1 if the mean predictor repeats a common label, 0 if it says nothing."""
        return self.m * self.label_weight

    def matrix(self) -> Array:
        """The kernel itself [m, m]."""
        return self.bulk * np.eye(self.m) + self.off_diagonal
