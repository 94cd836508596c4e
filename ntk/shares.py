"""The share of one parameter in a kernel, from the factors of its gradient.

Shapes: n examples, u rows of the Jacobian per example, g groups, K and Q entries of the two factors, P positions.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ntk.contraction import Contraction
from ntk.factors import Computed, Product, Use, Written
from ntk.projection import Projection, apply_projection, center_rows

PULLED = 3
"""Copies of the gradient by a computed weight while it is pulled back: itself, and two within autograd (estimated)."""

Derivatives = Sequence[Tensor] | Mapping[int, Tensor]
"""For each recorded call, [u, *output]."""


@dataclass(frozen=True, eq=False)
class Share:
    """The uses of one parameter.

    Attributes:
        name: Of the parameter.
        shape: Of the parameter.
        uses: For each batch, (number of the call, factor).
        projection: Of its gradients, or None.
        by_rows: Whether the projection acts on each row of the parameter, and on all alike.
    """

    name: str
    shape: tuple[int, ...]
    uses: tuple[list[tuple[int, Use]], ...]
    projection: Projection | None
    by_rows: bool = True

    @property
    def factored(self) -> bool:
        """Whether all uses are products of one form, and the projection acts on one side of them."""
        factors = [factor for uses in self.uses for _, factor in uses]
        if not self.by_rows:
            return False
        forms = {
            (factor.derivative_first, *factor.sizes[:2], factor.sizes[3], factor.tokens is None, factor.order is None)
            for factor in factors
            if isinstance(factor, Product)
        }
        return len(forms) == 1 and all(isinstance(factor, Product) for factor in factors)

    @property
    def without_positions(self) -> bool:
        """Whether all gradients of an example are one outer product."""
        return self.factored and all(
            self.total_sizes(side)[0] == self.total_sizes(side)[2] == 1 for side in range(len(self.uses))
        )

    @property
    def projects_derivatives(self) -> bool:
        """Whether a projection acts on the side of the derivatives."""
        return self.projection is not None and self.factored and not self._first.derivative_first

    def tokens_used(self) -> Tensor | None:
        """The tokens that an embedding meets in either batch."""
        factors = [factor for uses in self.uses for _, factor in uses if isinstance(factor, Product)]
        tokens = [factor.tokens.flatten() for factor in factors if factor.tokens is not None]
        return torch.cat(tokens).unique() if tokens else None

    def left(self, side: int, n: int) -> Tensor:
        """Sides of the input of all uses, one after the other: [n, g, K, P].

        Args:
            side: Number of the batch.
            n: What the leading axis is cut into; 1 for the whole batch.
        """
        tokens = self.tokens_used()
        parts = [_cut(factor.left(tokens), n) for _, factor in self.uses[side] if isinstance(factor, Product)]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return self._projected(joined, 2) if self._first.derivative_first else joined

    def right(self, side: int, derivatives: Derivatives, n: int) -> Tensor:
        """Sides of the derivatives of all uses, one after the other: [u, n, g, Q, P].

        Args:
            side: Number of the batch.
            derivatives: By the outputs of the calls.
            n: What the leading axis is cut into; 1 for the whole batch.
        """
        parts = [
            _cut(factor.right(derivatives[number]), n, axis=1)
            for number, factor in self.uses[side]
            if isinstance(factor, Product)
        ]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return joined if self._first.derivative_first else self._projected(joined, 3)

    def _projected(self, side: Tensor, axis: int) -> Tensor:
        """A side of the outer products along which the rows of the parameter lie, each projected."""
        if self.projection is None:
            return side
        if self.projection is center_rows:
            return side - side.mean(axis, keepdim=True)
        rows = side.movedim(axis, -1)
        if self._first.order is not None:
            rows = rows[..., self._first.order]
        return self.projection(rows.reshape(-1, *self.shape[1:])).reshape(rows.shape).movedim(-1, axis)

    @property
    def _first(self) -> Product:
        return next(f for uses in self.uses for _, f in uses if isinstance(f, Product))

    def fixed_entries(self, side: int, n: int) -> int:
        """Entries of the sides of the input of one batch."""
        factors = [factor.weight if isinstance(factor, Computed) else factor for _, factor in self.uses[side]]
        return sum(math.prod(factor.sizes[:3]) for factor in factors if isinstance(factor, Product)) * n

    def temporary_entries(self, n: int, m: int | None = None) -> int:
        """Entries of what is written for one output of all examples, and cannot be written in parts.

        Args:
            n: Examples of the first batch.
            m: Of the second, if there is one.
        """
        m = n if m is None else m
        if not self.factored:
            return max(n, m) * self.row_entries()
        g, _, p, q = self._first.sizes
        return max(n, m) * g * q * p + min(max(n, m) * g * q, m * p * p)

    def row_entries(self) -> int:
        """Entries that are held while one row is written out."""
        factors = [factor for uses in self.uses for _, factor in uses]
        computed = [math.prod(factor.shape) for factor in factors if isinstance(factor, Computed)]
        return math.prod(self.shape) + PULLED * max(computed, default=0)

    def total_sizes(self, side: int) -> tuple[int, int, int, int]:
        """(g, K, P, Q) of all uses in one batch, one after the other.

        Args:
            side: Number of the batch.
        """
        g, k, _, q = self._first.sizes
        return g, k, sum(factor.sizes[2] for _, factor in self.uses[side] if isinstance(factor, Product)), q

    def features(self, k: int) -> int:
        """Entries of a row over the whole batch, with k entries on the side of the input."""
        return self._first.sizes[0] * k * self._first.sizes[3]

    def written(self, side: int, derivatives: Derivatives, n: int) -> Tensor:
        """Gradients by the parameter itself, projected: [u, n, parameter.numel()].

        Args:
            side: Number of the batch.
            derivatives: By the outputs of the calls.
            n: What the leading axis is cut into; 1 for the whole batch.
        """
        parts = [self._gradient(factor, derivatives[number], n) for number, factor in self.uses[side]]
        total = torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
        if self.projection is None:
            return total
        rows = total.reshape(-1, *self.shape)
        return apply_projection(self.projection, rows, self.name).reshape(total.shape)

    @staticmethod
    def _gradient(factor: Use, derivative: Tensor, n: int) -> Tensor:
        """[u, n, parameter.numel()] of one use."""
        if isinstance(factor, Computed):
            rows = Share._gradient(factor.weight, derivative, n)
            return factor.pull(rows.reshape(-1, *factor.shape)).reshape(*rows.shape[:2], -1)
        if isinstance(factor, Written):
            rows = factor.rows(derivative)
            rows = rows.reshape(len(rows), n, rows.shape[1] // n, -1)
            return rows.squeeze(2) if rows.shape[2] == 1 else rows.sum(2)
        left = _cut(factor.left(None), n).conj()  # a weight that is computed may be complex
        rows = outer(left, fold(_cut(factor.right(derivative), n, axis=1)), len(derivative))
        if factor.order is not None:
            rows = rows[..., factor.order]
        rows = rows.movedim(2, 0)
        return (rows if factor.derivative_first else rows.mT).reshape(*rows.shape[:2], -1)


def fold(right: Tensor) -> Tensor:
    """Rows and entries of the derivatives' side as one axis, without a copy where they lie so in memory.

    Args:
        right: [u, n, g, Q, P]

    Returns:
        [n, g, u Q, P]
    """
    u, n, g, q, p = right.shape
    if right.stride(3) < right.stride(4):
        return right.permute(1, 2, 4, 0, 3).reshape(n, g, p, u * q).mT
    return right.permute(1, 2, 0, 3, 4).reshape(n, g, u * q, p)


def outer(left: Tensor, folded: Tensor, u: int) -> Tensor:
    """Sum over positions of the outer products.

    Args:
        left: [n, g, K, P]
        folded: [n, g, u Q, P], from `fold`.
        u: Rows of the Jacobian per example.

    Returns:
        [n, g, u, Q, K]
    """
    return (folded @ left.mT).unflatten(2, (u, -1))


def bias_shares(shares: Sequence[Share], plan: Contraction) -> dict[str, str]:
    """Weight -> the bias of exactly the same calls, where both belong to one kernel.

    Args:
        shares: All shares.
        plan: Groups and projections.
    """
    calls = {share.name: [[number for number, _ in uses] for uses in share.uses] for share in shares}
    turned = {share.name for share in shares if share.projects_derivatives}  # whose derivatives' side is another
    found = {}
    for share in shares:
        weights = {factor.bias_of for uses in share.uses for _, factor in uses if isinstance(factor, Written)}
        weight = weights.pop() if len(weights) == 1 else None
        if (
            weight not in calls
            or weight in turned
            or share.projection is not None
            or calls[weight] != calls[share.name]
        ):
            continue
        if plan.groups[weight] == plan.groups[share.name]:
            found[weight] = share.name
    return found


def row_spans(share: Share, dtype: torch.dtype) -> list[Tensor] | None:
    """Sides of the input over the whole batch, in an orthonormal basis of their span where that is shorter.

    Args:
        share: Of one parameter.
        dtype: Of the rows that are made of them.

    Returns:
        [g, K', M P] for each batch, with one K' for all; None where the gradient is written in full.
    """
    if not share.factored:
        return None
    lefts = [share.left(side, 1)[0].to(dtype) for side in range(len(share.uses))]
    positions = [left.shape[-1] for left in lefts]
    if sum(positions) >= lefts[0].shape[1]:
        return lefts
    return list(torch.linalg.qr(torch.cat(lefts, -1)).R.split(positions, -1))


def _cut(value: Tensor, n: int, axis: int = 0) -> Tensor:
    """Cut the axis M of a factor into n parts, and move what is left of it to the positions, the last axis."""
    length = value.shape[axis] // n
    if length == 1:
        return value
    moved = value.unflatten(axis, (n, length)).movedim(axis + 1, -2)
    return moved.flatten(-2)
