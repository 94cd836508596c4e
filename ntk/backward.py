"""Derivatives by the outputs of recorded calls, for a few outputs of the network at a time.

What one backward pass writes then stays in the cache, and the next one writes over it. Where the gradients of a weight
will be written out, the passes are joined in the order in which that is one product for each example.
"""

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from ntk.capture import Site
from ntk.contraction import Gradients

IN_CACHE = 2**22
"""Bytes of the largest derivative that one backward pass writes (chosen by trial on 2 cores)."""

Rights = Mapping[int, Callable[[Tensor], Tensor]]
"""Number of a call -> its derivatives as a factor, [u, M, g, Q, P]."""


class Backward:
    """Derivatives of the outputs of one batch by those of its recorded calls."""

    def __init__(self, output: Tensor, sites: Sequence[Site], used: Sequence[int]) -> None:
        """Say what is differentiated.

        Args:
            output: Of the model, [n, o], attached to the graph.
            sites: Recorded calls.
            used: Numbers of those whose derivatives are wanted.
        """
        self.output = output
        self.shapes = [site.shape for site in sites]
        self.used = used
        self.gradients = Gradients(output, [sites[number].edge for number in used])

    def __call__(self, units: slice, reduce: str) -> list[Tensor]:
        """For each call [units, *output]; those not used get no memory.

        Args:
            units: Outputs of the network.
            reduce: "sum" for their sum in place of each.
        """
        n, o = self.output.shape
        if reduce == "sum":
            seeds = self.output.new_ones(1, n, o)
        else:
            seeds = torch.eye(o, dtype=self.output.dtype, device=self.output.device)[units, None, :].expand(-1, n, o)
        zero = self.output.new_zeros(())
        derivatives = [zero.expand(len(seeds), *shape) for shape in self.shapes]
        for number, gradient in zip(self.used, self.gradients(seeds), strict=True):
            if gradient is not None:
                derivatives[number] = gradient
        return derivatives


class Joined:
    """Derivatives of a range of outputs, put together from pieces of it."""

    def __init__(self, units: slice, kept: Collection[int], written: Rights) -> None:
        """Hold nothing yet.

        Args:
            units: Outputs of the network.
            kept: Numbers of the calls whose derivatives are kept.
            written: Of the calls by whose derivatives the gradients of a weight will be written out.
        """
        self.units, self.kept, self.written = units, kept, written
        self.derivatives: list[Tensor] = []

    def put(self, piece: slice, derivatives: list[Tensor]) -> None:
        """Add the derivatives of some outputs.

        Args:
            piece: Outputs of the network.
            derivatives: Of each call, [units, *output].
        """
        if piece == self.units:
            self.derivatives = derivatives
            return
        length = self.units.stop - self.units.start
        if not self.derivatives:
            self.derivatives = [
                self._room(number, derivative, length)
                if number in self.kept
                else derivative.new_zeros(()).expand(length, *derivative.shape[1:])
                for number, derivative in enumerate(derivatives)
            ]
        place = slice(piece.start - self.units.start, piece.stop - self.units.start)
        for number in self.kept:
            self.derivatives[number][place] = derivatives[number]

    def _room(self, number: int, like: Tensor, length: int) -> Tensor:
        """Memory for all pieces, in the order of a piece but for the place of the outputs."""
        order = sorted(range(1, like.ndim), key=like.stride, reverse=True)
        place = 0
        if number in self.written and order[0] == 1:  # outputs inside examples, and next to the entries of a factor
            right = self.written[number](like)
            place = len(order) - 1 if right.stride(3) < right.stride(4) else 1
        order.insert(place, 0)
        shape = (length, *like.shape[1:])
        return like.new_empty([shape[axis] for axis in order]).permute([order.index(axis) for axis in range(like.ndim)])
