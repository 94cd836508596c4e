"""What the last BatchNorm does: gradient identities, sharpness, and which learning rates training survives."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

import ntk
from diagnostics.anatomy import BATCH_NORM, LINEAR, check_network
from diagnostics.errors import UsageError
from diagnostics.measurement import Measurement
from diagnostics.subject import Subject


def last_batch_norm(network: nn.Module) -> str:
    """The qualified name of the BatchNorm that follows the last linear layer.

    Raises:
        UsageError: If the network has none.
    """
    modules = list(network.named_modules())
    last_linear = max((i for i, (_, m) in enumerate(modules) if isinstance(m, LINEAR)), default=-1)
    for name, module in modules[last_linear + 1 :]:
        if isinstance(module, BATCH_NORM):
            return name
    raise UsageError("model must end in a BatchNorm behind its last linear layer; convert it to 'mimicnorm' first")


def without_last_batch_norm(network: nn.Module) -> nn.Module:
    """A copy of the network, with the same weights, whose last BatchNorm does nothing.

    Raises:
        UsageError: If the network has none.
    """
    network = copy.deepcopy(network)
    network.set_submodule(last_batch_norm(network), nn.Identity())
    return network


@dataclass(frozen=True)
class ScaleInvariance:
    """Absolute cosine between each weight and its gradient, which is zero where the loss ignores the weight's scale.

    The loss is cross-entropy on the subject's labels, in train mode, after a few steps of SGD that bring biases and
    scalars away from their initial values.

    Attributes:
        steps: Steps of SGD before the gradient is taken.
        lr: Their learning rate.
    """

    steps: int = 3
    lr: float = 0.05

    @property
    def name(self) -> str:
        """Name in the registry."""
        return "scale_invariance"

    def measure(self, subject: Subject) -> Measurement:
        """Measures one network; axis layer, counted from the input.

        Raises:
            UsageError: If the subject has no labels or cannot be probed.
        """
        if subject.y is None:
            raise UsageError("y must be given to take the gradient of a loss, got None; pass class indices [n]")
        network = subject.network().train()
        check_network(network, subject.x)
        optimizer = torch.optim.SGD(network.parameters(), lr=self.lr)
        subject.attach(network, optimizer)
        for step in range(self.steps + 1):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(subject.x), subject.y).backward()
            if step < self.steps:
                optimizer.step()
        weights = [p for p in network.parameters() if p.ndim > 1 and p.grad is not None]
        cosines = [_cosine(weight.detach(), weight.grad) for weight in weights if weight.grad is not None]
        return Measurement(
            probe=self.name,
            quantity="absolute cosine between a weight and its gradient",
            unit="1",
            estimate=np.array(cosines),
            axes={"layer": range(1, len(cosines) + 1)},
            seeds=(subject.seed,),
        )


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(((a * b).sum() / (a.norm() * b.norm())).abs())


@dataclass(frozen=True)
class Sharpness:
    """Largest eigenvalue of the NTK with the last BatchNorm over the same without it, at the same weights.

    The inputs are one batch; the kernel goes through its statistics. Values above 1 mean that the last BatchNorm makes
    the loss sharper. The base-10 logarithm is measured, because the ratio's distribution has a heavy tail.
    """

    @property
    def name(self) -> str:
        """Name in the registry."""
        return "sharpness"

    def measure(self, subject: Subject) -> Measurement:
        """Measures one network; no axes.

        Raises:
            UsageError: If the network does not end in a BatchNorm or cannot be probed.
        """
        network = subject.network().train()
        check_network(network, subject.x)
        largest = [_largest_eigenvalue(subject, network, one) for one in (network, without_last_batch_norm(network))]
        return Measurement(
            probe=self.name,
            quantity="log10 of the largest NTK eigenvalue with the last BatchNorm over that without",
            unit="log10",
            estimate=np.array(math.log10(largest[0] / largest[1])),
            seeds=(subject.seed,),
        )


@dataclass(frozen=True)
class RateStability:
    """Full-batch gradient descent at multiples of the critical rate 2/λ_max of the network's own NTK.

    The loss is ½Σ(f − y)² on targets of zero mean and unit variance, which a network that ends in a BatchNorm can fit.

    Attributes:
        multiples: Learning rates, in units of 2/λ_max at initialization.
        steps: Steps of gradient descent.
    """

    multiples: tuple[float, ...] = (0.5, 1.0, 3.0, 10.0, 30.0)
    steps: int = 60

    DIVERGED: ClassVar[float] = 6.0
    """Recorded for a loss that grew a million times or is no longer a number; training stops there."""

    @property
    def name(self) -> str:
        """Name in the registry."""
        return "rate_stability"

    def measure(self, subject: Subject) -> Measurement:
        """Measures one network; axes multiple and statistic.

        The statistics are "loss" and "norm": log10 of the final over the initial loss, and of the norm of all weights.

        Raises:
            UsageError: If the network cannot be probed.
        """
        network = subject.network().train()
        check_network(network, subject.x)
        critical = 2 / _largest_eigenvalue(subject, network, network)
        target = torch.randn(len(subject.x), 1, generator=subject.generator(3), dtype=subject.x.dtype)
        target = (target - target.mean()) / target.std(correction=0)
        rows = [
            self._descend(subject, copy.deepcopy(network), target, multiple * critical) for multiple in self.multiples
        ]
        return Measurement(
            probe=self.name,
            quantity="loss and weight norm after gradient descent, relative to their start",
            unit="log10",
            estimate=np.array(rows),
            axes={"multiple": self.multiples, "statistic": ("loss", "norm")},
            seeds=(subject.seed,),
        )

    def _descend(self, subject: Subject, network: nn.Module, target: Tensor, lr: float) -> list[float]:
        optimizer = torch.optim.SGD(network.parameters(), lr=lr)
        subject.attach(network, optimizer)
        start_loss, start_norm = math.nan, _norm(network)
        ratio = 0.0
        for step in range(self.steps + 1):
            loss = (network(subject.x) - target).square().sum() / 2
            if step == 0:
                start_loss = loss.item()
            ratio = loss.item() / start_loss
            if not ratio < 10**self.DIVERGED:
                norm = _norm(network)
                return [self.DIVERGED, math.log10(norm / start_norm) if math.isfinite(norm) else self.DIVERGED]
            if step < self.steps:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return [max(math.log10(ratio), -16.0) if ratio > 0 else -16.0, math.log10(_norm(network) / start_norm)]


def _largest_eigenvalue(subject: Subject, network: nn.Module, one: nn.Module) -> float:
    """λ_max of the NTK in the subspace in which the method trains; ``one`` has the parameters of ``network``."""
    kernel = ntk.empirical_ntk(one, subject.x, projection=subject.projections(network) or None)
    return float(ntk.spectrum(kernel).eigenvalues[0])


def _norm(network: nn.Module) -> float:
    return math.sqrt(sum(p.detach().double().square().sum().item() for p in network.parameters()))
