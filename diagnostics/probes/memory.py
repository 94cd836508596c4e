"""Bytes that a network keeps for its backward pass (MimicNorm, Tables 1 and 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

import ntk
from diagnostics.anatomy import check_network
from diagnostics.measurement import Measurement
from diagnostics.subject import Subject


def saved_bytes(network: nn.Module, x: Tensor) -> int:
    """Bytes that autograd saves for the backward pass of one forward pass, each storage counted once.

    Parameters, buffers and the input are there anyway and do not count.

    Args:
        network: The network; left as it was.
        x: Inputs [n, ...].
    """
    there: Sequence[Tensor] = [*network.parameters(), *network.buffers(), x]
    present = {tensor.untyped_storage().data_ptr() for tensor in there}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in present:
            kept[pointer] = tensor
        return tensor

    with (
        ntk.preserve_state(network),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        output = network(x)
        total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        del output
    return total


@dataclass(frozen=True)
class ActivationMemory:
    """Bytes per example that autograd saves for the backward pass, in train mode."""

    @property
    def name(self) -> str:
        """Name in the registry."""
        return "memory"

    def measure(self, subject: Subject) -> Measurement:
        """Measures one network; no axes, mebibytes per example.

        Raises:
            UsageError: If the network or its inputs cannot be probed.
        """
        network = subject.network().train()
        check_network(network, subject.x, dropout=True)
        return Measurement(
            probe=self.name,
            quantity="saved for the backward pass per example",
            unit="MiB",
            estimate=np.array(saved_bytes(network, subject.x) / len(subject.x) / 2**20),
            seeds=(subject.seed,),
        )
