"""Derivatives in which outputs differ by one factor for each channel: D[a, n, q, p] = U[a, q] V[n, q, p].

So it is in front of the last nonlinearity of a network that ends in a mean over positions and a linear map. The
gradients of all outputs of an example are then multiples of one, and the share of the layer in the kernel is
Σ_q U[a, q] U[b, q] (Σ_pp' V[n, q, p] V[m, q, p'] k_pp'), at the cost of a single output.
"""

import torch
from torch import Tensor

ROUNDING = 8
"""Multiple of the machine precision up to which two derivatives count as multiples of each other (chosen)."""


def separate(derivatives: Tensor) -> tuple[Tensor, Tensor] | None:
    """Find U and V, or None where there are none. One example is looked at before all are.

    Args:
        derivatives: [u, n, g, Q, P]

    Returns:
        U [u, g, Q] and V [n, g, Q, P], equal to rounding.
    """
    return None if _factors(derivatives[:, :1]) is None else _factors(derivatives)


def _factors(derivatives: Tensor) -> tuple[Tensor, Tensor] | None:
    u, _, g, q, p = derivatives.shape
    group, channel = torch.meshgrid(*(torch.arange(size, device=derivatives.device) for size in (g, q)), indexing="ij")
    largest = torch.stack([unit.abs().amax((0, 3)) for unit in derivatives])  # faster than a vector norm
    reference = derivatives[largest.argmax(0), :, group, channel]
    place = reference.flatten(2).abs().argmax(2)
    at_place = derivatives[:, place // p, group, channel, place % p]
    pivot = reference.flatten(2).gather(2, place.unsqueeze(2)).squeeze(2)
    factors = torch.where(pivot == 0, 0.0, at_place / pivot)
    values = reference.movedim(2, 0)
    allowed = ROUNDING * torch.finfo(derivatives.dtype).eps * largest.amax(0)
    for unit in range(u):
        rest = torch.addcmul(derivatives[unit], factors[unit].unsqueeze(-1), values, value=-1)
        if not bool((rest.abs_().amax((0, 3)) <= allowed).all()):
            return None
    return factors, values


class Multiples:
    """Derivatives of one output after the other, without positions, as multiples of those of the first."""

    def __init__(self, reference: Tensor) -> None:
        """Hold those of the first output.

        Args:
            reference: V [n, Q]
        """
        self.reference = reference.clone()  # of a pass over several outputs, which is not to be held
        self._place = reference.abs().argmax(0, keepdim=True)
        self._pivot = reference.gather(0, self._place)

    def factors(self, derivatives: Tensor) -> Tensor | None:
        """Find U, or None where there is none. One example is looked at before all are.

        Args:
            derivatives: Of another output, [n, Q].

        Returns:
            U [Q] with derivatives equal to U V, to rounding.
        """
        at_place = derivatives.gather(0, self._place)
        factors = torch.where(self._pivot == 0, 0.0, at_place / self._pivot)
        allowed = ROUNDING * torch.finfo(derivatives.dtype).eps * at_place.abs().squeeze(0)
        for examples in (slice(1), slice(None)):
            rest = torch.addcmul(derivatives[examples], factors, self.reference[examples], value=-1)
            if not bool((rest.abs_().amax(0) <= allowed).all()):  # nor if a factor overflows
                return None
        return factors.squeeze(0)
