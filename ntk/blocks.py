"""Blocks of a kernel, and how the share of a parameter is added to one.

A block holds outputs a of the first batch against outputs b of the second. Of a Gram matrix only the lower triangle is
computed, in strips, and mirrored when everything has been added.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ntk.costs import factored
from ntk.memory import pieces
from ntk.separable import Multiples, separate
from ntk.shares import Derivatives, Share, fold, outer

STRIP = 128
"""Rows of the lower triangle that are multiplied at once (chosen, not tuned)."""

ENTRIES = 2**25
"""Entries that a temporary may have (chosen, not tuned)."""

WRITTEN = 2**22
"""Entries of gradients that are written out at once (chosen by trial on 2 cores)."""

PRODUCTS = 2**20
"""Entries of a product of pairs of positions (chosen, not tuned)."""

SEPARABLE = 0.5
"""What the separable form must save before derivatives are searched for it, a fraction of the cheaper other way."""


@dataclass(frozen=True, eq=False)
class Block:
    """Part of a kernel that is being summed.

    Attributes:
        target: [u n, v m], output-major, of all pairs of outputs; or [n, m] of equal outputs, summed over them; in
            the type of the products.
        sizes: (n, m), the examples of each batch.
        paired: Whether only equal outputs count.
        lower: Whether the block is its own transpose, so that the lower triangle is enough.
        entries: That a temporary may have.
    """

    target: Tensor
    sizes: tuple[int, int]
    paired: bool
    lower: bool
    entries: int = ENTRIES

    def add_rows(self, first: Tensor, second: Tensor, factor: float) -> None:
        """Add the products of written gradients.

        Args:
            first: [u, n, features]
            second: [v, m, features]
            factor: Multiplier of the parameter.
        """
        pairs = zip(first, second, strict=True) if self.paired else [(first.flatten(0, 1), second.flatten(0, 1))]
        for one, other in pairs:
            for rows, columns in self.strips(len(one), len(other)):
                self.target[rows, columns].addmm_(one[rows], other[columns].T, alpha=factor)

    def add_examples(self, first: Tensor, second: Tensor, factor: float) -> None:
        """Add the products of written gradients that lie example after example.

        Args:
            first: [n, u, features]
            second: [m, v, features]
            factor: Multiplier of the parameter.
        """
        if self.paired:
            self.add_rows(first.flatten(1).unsqueeze(0), second.flatten(1).unsqueeze(0), factor)
            return
        (n, m), (u, v) = self.sizes, (first.shape[1], second.shape[1])
        target = self.target.unflatten(1, (v, m)).unflatten(0, (u, n))
        for rows, columns in self.strips(n, m, max(1, STRIP // u), u * v):
            one, other = first[rows], second[columns]
            products = one.flatten(0, 1) @ other.flatten(0, 1).T
            products = products.reshape(len(one), u, len(other), v).permute(1, 0, 3, 2)
            target[:, rows, :, columns].add_(products, alpha=factor)
            if self.lower:  # of the examples; the target is to hold that of outputs and examples
                before = slice(0, rows.start)
                target[:, before, :, rows].add_(products[..., before].permute(2, 3, 0, 1), alpha=factor)

    def strips(self, rows: int, columns: int, most: int = STRIP, size: int = 1) -> list[tuple[slice, slice]]:
        """Ranges of rows and columns that cover the target, or its lower triangle.

        Args:
            rows: Of what is covered.
            columns: Of what is covered.
            most: Rows of a strip.
            size: Entries of the target for each row and column.
        """
        if not self.lower:
            fits = self.entries // size
            most = max(most, rows if rows * columns <= fits else fits // columns)
        return strips(rows, columns, max(1, most), lower=self.lower)


def strips(rows: int, columns: int, most: int, *, lower: bool) -> list[tuple[slice, slice]]:
    """Ranges of rows and columns that cover a matrix, or its lower triangle.

    Args:
        rows: Of the matrix.
        columns: Of the matrix.
        most: Rows of a strip.
        lower: Whether the lower triangle is enough.
    """
    starts = range(0, rows, most)
    ends = [min(start + most, rows) for start in starts]
    return [(slice(a, b), slice(0, b if lower else columns)) for a, b in zip(starts, ends, strict=True)]


def add_share(
    block: Block,
    share: Share,
    derivatives: tuple[Derivatives, Derivatives],
    multipliers: tuple[float, float],
) -> bool:
    """Add the share of one parameter to a block.

    Args:
        block: To be added to.
        share: Of a parameter whose examples do not meet.
        derivatives: Of both batches.
        multipliers: Of the parameter, and of the bias at the same calls that is to be added with it; 0 for none.

    Returns:
        Whether the bias was added.
    """
    (n, m), dtype = block.sizes, block.target.dtype
    if not share.factored:
        one = share.written(0, derivatives[0], n).to(dtype)
        other = one if block.lower else share.written(-1, derivatives[1], m).to(dtype)
        block.add_rows(one, other, multipliers[0])
        return False
    rights = [share.right(0, derivatives[0], n)]
    rights.append(rights[0] if block.lower else share.right(-1, derivatives[1], m))
    lefts = [share.left(0, n).to(dtype)]
    lefts.append(lefts[0] if len(share.uses) == 1 else share.left(1, m).to(dtype))
    for way in _ranking(_costs(block, lefts, rights)):
        if way == "positions":
            _add_positions(block, lefts, [right.to(dtype) for right in rights], multipliers)
            return True
        if way == "outer":
            break
        first = separate(rights[0])
        second = first if block.lower or first is None else separate(rights[1])
        if first is not None and second is not None:
            _add_separable(block, lefts, (first, second), multipliers[0])
            return False
    _add_outer(block, lefts, [right.to(dtype) for right in rights], multipliers[0])
    return False


def _ranking(costs: dict[str, float]) -> list[str]:
    """Ways to add a share, the cheapest first; the separable one must save something before it is looked for."""
    return sorted(costs, key=lambda way: costs[way] / (SEPARABLE if way == "separable" else 1))


def _costs(block: Block, lefts: list[Tensor], rights: list[Tensor]) -> dict[str, float]:
    (n, g, k, p), (m, _, _, p2) = lefts[0].shape, lefts[1].shape
    outputs, q = (len(rights[0]), len(rights[1])), rights[0].shape[3]
    return factored((g, k, q, p, p2), outputs, (n, m), paired=block.paired, lower=block.lower)


def _add_outer(block: Block, lefts: list[Tensor], rights: list[Tensor], factor: float) -> None:
    """Write the gradients out, some entries of the input's side at a time."""
    (n, g, k, _), (u, _, _, q, _) = lefts[0].shape, rights[0].shape
    folded = [fold(right) for right in rights[: 1 if block.lower else 2]]
    step = max(1, min(block.entries, WRITTEN) // (n * g * u * q))
    for start in range(0, k, step):
        rows = [
            outer(left[:, :, start : start + step], side, len(right)).movedim(2, 1).flatten(2)
            for left, side, right in zip(lefts, folded, rights, strict=False)
        ]
        block.add_examples(rows[0], rows[-1], factor)


def _add_separable(
    block: Block, lefts: list[Tensor], separated: tuple[tuple[Tensor, Tensor], ...], factor: float
) -> None:
    """Write the gradients of one output out, some channels at a time, and weigh their products for each channel."""
    (n, m), dtype = block.sizes, block.target.dtype
    (one, other), values = zip(*((units.flatten(1).to(dtype), v.to(dtype)) for units, v in separated), strict=True)
    if block.paired:
        one, other = (one * other).sum(0, keepdim=True), torch.ones_like(one[:1])
    g, k, q = *lefts[0].shape[1:3], values[0].shape[2]
    channels = torch.arange(g * q, device=one.device).reshape(g, q)
    step = max(1, block.entries // (g * max(n * m, n * k, m * k)))
    for start in range(0, q, step):
        part = slice(start, start + step)
        rows = [(value[:, :, part] @ left.mT).flatten(1, 2) for left, value in zip(lefts, values, strict=True)]
        products = (rows[0].transpose(0, 1) @ rows[1].permute(1, 2, 0)).flatten(1)
        numbers = channels[:, part].flatten()
        target = block.target.unflatten(1, (-1, m)).unflatten(0, (-1, n))
        for unit, weights in zip(target, one[:, numbers], strict=True):
            summed = weights * other[:, numbers] @ products
            unit.add_(summed.unflatten(1, (n, m)).transpose(0, 1), alpha=factor)


def _add_positions(block: Block, lefts: list[Tensor], rights: list[Tensor], multipliers: tuple[float, float]) -> None:
    """Sum over pairs of positions, for some examples of the first batch at a time."""
    (n, g, k, p), (m, _, _, p2) = lefts[0].shape, lefts[1].shape
    a, b = (left.permute(1, 0, 3, 2).reshape(g, -1, k) for left in lefts)
    c = _by_group(rights[0])
    d = c if block.lower else _by_group(rights[1])
    u, v = len(rights[0]), len(rights[1])
    most = max(1, block.entries // (m * p2 * p * (1 if block.paired else max(g, v))))
    if block.paired:
        for rows, columns in block.strips(n, m, min(most, max(STRIP, n // 8)), p * p2):
            i, j = slice(rows.start * p, rows.stop * p), slice(0, columns.stop * p2)
            for group in range(g):
                products = c[group, 0, i] @ d[group, 0, j].T
                for unit in range(1, u):
                    products.addmm_(c[group, unit, i], d[group, unit, j].T)
                products *= _left_products(a[group, i], b[group, j], multipliers)
                block.target[rows, columns] += _sum_positions(products, p, p2)
        return
    for start in range(0, n, most):
        stop = min(start + most, n)
        i = slice(start * p, stop * p)
        inputs = [_left_products(a[group, i], b[group], multipliers) for group in range(g)]
        at_once = max(1, min(block.entries, PRODUCTS) // ((stop - start) * p * m * p2))
        for unit in range(u):
            target = block.target[unit * n + start : unit * n + stop].unflatten(1, (v, m))
            for units in pieces(slice(0, unit + 1 if block.lower else v), at_once):
                part, length = target[:, units], units.stop - units.start
                for group in range(g):
                    products = (c[group, unit, i] @ d[group, units].flatten(0, 1).T).unflatten(1, (length, -1))
                    if g == p == p2 == 1:
                        part.addcmul_(products, inputs[0].unsqueeze(1))
                        continue
                    products *= inputs[group].unsqueeze(1)
                    part += products.reshape(stop - start, p, length, m, p2).sum((1, 4))


class OutputSum:
    """The derivatives' side of a weight without positions, multiplied and summed over outputs as these come.

    While outputs are multiples of the first one, channel by channel, their products are one product, and are left for
    the end.
    """

    def __init__(self, share: Share, sizes: tuple[int, int], dtype: torch.dtype) -> None:
        """Sum nothing yet.

        Args:
            share: Of the weight.
            sizes: (n, m), the examples of each batch.
            dtype: Of the products.
        """
        self.share, self.sizes, self.dtype = share, sizes, dtype
        self.products = torch.zeros(())
        self._of_first: list[Multiples] = []
        self._weights = torch.zeros(())

    def take(self, first: Derivatives, second: Derivatives) -> None:
        """Add the products of some outputs.

        Args:
            first: Derivatives of the first batch.
            second: Of the second, or the same.
        """
        batches = (first, second)[: len(self.share.uses)]
        rights = [
            self.share.right(side, derivatives, n)[:, :, 0, :, 0]
            for side, (derivatives, n) in enumerate(zip(batches, self.sizes, strict=False))
        ]
        for output in zip(*rights, strict=True):
            self._take(output)

    def _take(self, output: Sequence[Tensor]) -> None:
        """Weigh the products of the first output once more, or add those of another."""
        if self.products.ndim == 0:
            self.products = output[0].new_zeros(self.sizes, dtype=self.dtype)
            self._of_first = [Multiples(side) for side in output]
            self._weights = output[0].new_ones(output[0].shape[1])
            return
        found = (first.factors(side) for first, side in zip(self._of_first, output, strict=False))
        factors = [factor for factor in found if factor is not None]
        if self._of_first and len(factors) == len(output):
            self._weights += factors[0] * factors[-1]
            return
        self._add_first()
        self._multiply(output[0], output[-1])

    def _add_first(self) -> None:
        if self._of_first:
            one, other = self._of_first[0].reference, self._of_first[-1].reference
            self._multiply(self._weights * one.to(self.dtype), other)
            self._of_first = []

    def _multiply(self, one: Tensor, other: Tensor) -> None:
        one, other = one.to(self.dtype), other.to(self.dtype)
        for rows, columns in strips(*self.sizes, 2 * STRIP, lower=len(self.share.uses) == 1):
            self.products[rows, columns].addmm_(one[rows], other[columns].T)

    def add_to(self, block: Block, multipliers: tuple[float, float]) -> None:
        """Add the share to a block.

        Args:
            block: Of equal outputs.
            multipliers: Of the weight, and of the bias at the same calls; 0 for none.
        """
        self._add_first()
        sides = range(len(self.share.uses))
        lefts = [self.share.left(side, self.sizes[side])[:, 0, :, 0].to(self.dtype) for side in sides]
        for rows, columns in block.strips(*self.sizes, 2 * STRIP):
            inputs = _left_products(lefts[0][rows], lefts[-1][columns], multipliers)
            block.target[rows, columns].addcmul_(inputs, self.products[rows, columns])


def _by_group(right: Tensor) -> Tensor:
    """[u, n, g, Q, P] -> [g, u, n P, Q]."""
    u, n, g, q, p = right.shape
    return right.permute(2, 0, 1, 4, 3).reshape(g, u, n * p, q)


def _left_products(a: Tensor, b: Tensor, multipliers: tuple[float, float]) -> Tensor:
    products = a @ b.T
    if multipliers[0] != 1:
        products *= multipliers[0]
    return products.add_(multipliers[1]) if multipliers[1] else products


def _sum_positions(products: Tensor, p: int, p2: int) -> Tensor:
    """[n P, m P'] -> [n, m]."""
    if p == p2 == 1:
        return products
    return products.unflatten(0, (-1, p)).unflatten(2, (-1, p2)).sum((1, 3))


def mirror(kernel: Tensor) -> None:
    """Fill the upper triangle of a Gram matrix from the lower one.

    Args:
        kernel: [r, r], changed in place.
    """
    for start in range(0, len(kernel), STRIP):
        stop = min(start + STRIP, len(kernel))
        corner = kernel[start:stop, start:stop].tril()
        kernel[start:stop, start:stop] = corner + corner.tril(-1).T
        kernel[:start, start:stop] = kernel[start:stop, :start].T
