"""Order and chaos: what one layer does to the correlation of a pair, and what it does to a gradient."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

import ntk
from diagnostics.anatomy import ACTIVATIONS, LINEAR, check_network, forward_record, recording
from diagnostics.errors import UsageError
from diagnostics.measurement import Measurement
from diagnostics.subject import Subject


@dataclass(frozen=True)
class TransitionOperator:
    """The measured correlation map of one layer of a real network, T(ρ) (MimicNorm, Figure 3).

    Gaussian pre-activations of chosen correlation are put in place of the input of one activation; what arrives at the
    next one is read off. The pairs of one correlation make one batch, so that BatchNorm sees a batch in which all other
    pairs are uncorrelated.

    Attributes:
        correlations: Correlations ρ of the pairs that go in.
        pairs: Pairs per correlation.
    """

    correlations: tuple[float, ...] = (-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
    pairs: int = 128

    @property
    def name(self) -> str:
        """Name in the registry."""
        return "transition"

    def measure(self, subject: Subject) -> Measurement:
        """Measures one network; axes rho and statistic.

        The statistics are the "correlation" and the "variance" that come out, where variance 1 went in.

        Raises:
            UsageError: If the network has fewer than two activations or cannot be probed.
        """
        network = subject.network()
        check_network(network, subject.x)
        record = forward_record(network, subject.x, ACTIVATIONS)
        if len(set(record.names)) < len(record.names):
            raise UsageError(
                "model must run each activation module once, for a transition to have ends; got one reused"
            )
        activations = [network.get_submodule(name) for name in record.names]
        if len(activations) < 2:
            raise UsageError(f"model must have at least 2 activation modules for a transition, got {len(activations)}")
        into, out_of = activations[len(activations) // 2 - 1 : len(activations) // 2 + 1]
        generator = subject.generator(1)
        rows = []
        for rho in self.correlations:
            u, v = self._push(network, subject.x, rho, into, out_of, generator)
            products = (u * u).mean(), (v * v).mean(), (u * v).mean()
            rows.append(
                [float(products[2] / (products[0] * products[1]).sqrt()), float((products[0] + products[1]) / 2)]
            )
        return Measurement(
            probe=self.name,
            quantity="correlation and variance behind one layer",
            unit="1",
            estimate=np.array(rows),
            axes={"rho": self.correlations, "statistic": ("correlation", "variance")},
            seeds=(subject.seed,),
        )

    def _push(
        self, network: nn.Module, x: Tensor, rho: float, into: nn.Module, out_of: nn.Module, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Two halves [pairs, units] of what arrives at ``out_of``."""
        arrived: list[Tensor] = []

        def substitute(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
            shape = (self.pairs, *inputs[0].shape[1:])
            first = torch.randn(shape, generator=generator, dtype=inputs[0].dtype)
            second = torch.randn(shape, generator=generator, dtype=inputs[0].dtype)
            return (torch.cat([first, rho * first + (1 - rho**2) ** 0.5 * second]),)

        def read(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            arrived.append(inputs[0].detach().flatten(1).double())

        batch = x[torch.arange(2 * self.pairs) % len(x)]
        handles = [into.register_forward_pre_hook(substitute), out_of.register_forward_pre_hook(read)]
        try:
            with ntk.preserve_state(network), torch.no_grad():
                network(batch)
        finally:
            for handle in handles:
                handle.remove()
        return arrived[0][: self.pairs], arrived[0][self.pairs :]


@dataclass(frozen=True)
class GradientGrowth:
    """Growth of the squared gradient norm per layer, over interior layers: the network's χ₁.

    The gradient of a random projection of the outputs is taken with respect to the output of every linear or
    convolutional layer. Layers at both ends are left out: at the input the data's own correlation is still felt, at the
    output the gradient is not yet centred by BatchNorm.

    Attributes:
        skip: Ratios left out at either end.
    """

    skip: int = 2

    @property
    def name(self) -> str:
        """Name in the registry."""
        return "gradient_growth"

    def measure(self, subject: Subject) -> Measurement:
        """Measures one network; axis layer, counted from the input.

        Raises:
            UsageError: If the network has too few layers or cannot be probed.
        """
        network = subject.network()
        check_network(network, subject.x)
        with ntk.preserve_state(network), torch.enable_grad(), recording(network, LINEAR) as record:
            output = network(subject.x.clone().requires_grad_(subject.x.is_floating_point()))
            cotangent = torch.randn(output.shape, generator=subject.generator(2), dtype=output.dtype)
            gradients = torch.autograd.grad(output, record.outputs, cotangent, allow_unused=True)
        norms = [gradient.double().square().sum().item() for gradient in gradients if gradient is not None]
        if 0.0 in norms:
            raise UsageError(
                f"model must pass gradients to every layer; layer {norms.index(0.0) + 1} gets exactly zero. Its "
                "activations are dead: initialize it anew, or make it wider"
            )
        growth = [earlier / later for earlier, later in pairwise(norms)]
        if len(growth) <= 2 * self.skip:
            need = 2 * self.skip + 2
            raise UsageError(f"model must have at least {need} linear or convolutional layers, got {len(norms)}")
        layers = range(self.skip, len(growth) - self.skip)
        return Measurement(
            probe=self.name,
            quantity="growth of the squared gradient norm per layer",
            unit="1",
            estimate=np.array([growth[layer] for layer in layers]),
            axes={"layer": [layer + 1 for layer in layers]},
            seeds=(subject.seed,),
        )
