"""Whether projecting a weight after each step trains it as projecting it in the forward pass does (Supplement C)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from diagnostics.anatomy import check_network
from diagnostics.errors import UsageError
from diagnostics.measurement import Measurement
from diagnostics.subject import Subject

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda network: torch.optim.SGD(network.parameters(), lr=0.01),
    "momentum": lambda network: torch.optim.SGD(
        network.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4
    ),
    "adam": lambda network: torch.optim.Adam(network.parameters(), lr=0.01),
}


class _Projected(nn.Module):
    """A parametrization that puts the projection into the forward and so into the backward pass."""

    def __init__(self, projection: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.projection = projection

    def forward(self, weight: Tensor) -> Tensor:
        return self.projection(weight)


@dataclass(frozen=True)
class ProjectionEquivalence:
    """Largest difference between projected weights after training the two ways, as a base-10 logarithm.

    Attributes:
        optimizer: "sgd", "momentum" (Nesterov, with L2 weight decay) or "adam".
        steps: Full-batch steps on cross-entropy.
    """

    optimizer: Literal["sgd", "momentum", "adam"] = "momentum"
    steps: int = 30

    @property
    def name(self) -> str:
        """Name in the registry."""
        return "weight_projection"

    def measure(self, subject: Subject) -> Measurement:
        """Measures one network; no axes.

        Raises:
            UsageError: If the method projects no weight, the subject has no labels, or the network cannot be probed.
        """
        after_step, in_forward = subject.network().train(), subject.network().train()
        check_network(after_step, subject.x)
        projections = subject.projections(after_step)
        if subject.method is None or not projections or subject.y is None:
            raise UsageError("subject must have labels and a method that projects weights; use method='mimicnorm'")
        for name, projection in projections.items():
            owner, _, leaf = name.rpartition(".")
            nn.utils.parametrize.register_parametrization(in_forward.get_submodule(owner), leaf, _Projected(projection))
        optimizers = [OPTIMIZERS[self.optimizer](network) for network in (after_step, in_forward)]
        subject.method.attach(after_step, optimizers[0])
        for _ in range(self.steps):
            for network, optimizer in zip((after_step, in_forward), optimizers, strict=True):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(network(subject.x), subject.y).backward()
                optimizer.step()
        difference = max(
            (_weight(after_step, name) - _weight(in_forward, name)).abs().max().item() for name in projections
        )
        return Measurement(
            probe=self.name,
            quantity=f"largest difference of the projected weights after {self.steps} steps of {self.optimizer}",
            unit="log10",
            estimate=np.array(math.log10(max(difference, torch.finfo(subject.x.dtype).tiny))),
            seeds=(subject.seed,),
        )


def _weight(network: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    return getattr(network.get_submodule(owner), leaf).detach()
