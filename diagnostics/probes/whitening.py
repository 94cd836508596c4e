"""How far the activations of a batch are from white: the distance of their correlation matrix from the identity."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from diagnostics.anatomy import activation_record
from diagnostics.measurement import Measurement
from diagnostics.probes.correlation import correlation_matrix, off_diagonal
from diagnostics.subject import Subject


@dataclass(frozen=True)
class Whitening:
    """Departure from the identity of the examples' correlation matrix at every activation, before and behind it.

    The statistics are the mean off-diagonal entry ("off_diagonal"), the smallest eigenvalue, which is 0 for a singular
    kernel and 1 for white activations ("smallest"), and the effective rank over the number of examples ("rank": the
    exponential of the entropy of the normalized eigenvalues; Roy and Vetterli 2007).
    """

    @property
    def name(self) -> str:
        """Name in the registry."""
        return "whitening"

    def measure(self, subject: Subject) -> Measurement:
        """Measures one network; axes depth, where ("pre", "post") and statistic.

        Raises:
            UsageError: If the network or its inputs cannot be probed.
        """
        network = subject.network()
        record = activation_record(network, subject.x)
        rows = [
            [self._summary(inputs), self._summary(outputs)]
            for inputs, outputs in zip(record.inputs, record.outputs, strict=True)
        ]
        return Measurement(
            probe=self.name,
            quantity="departure of the activations' correlation matrix from the identity",
            unit="1",
            estimate=np.array(rows),
            axes={
                "depth": range(len(rows)),
                "where": ("pre", "post"),
                "statistic": ("off_diagonal", "smallest", "rank"),
            },
            seeds=(subject.seed,),
        )

    @staticmethod
    def _summary(units: torch.Tensor) -> list[float]:
        matrix = correlation_matrix(units)
        eigenvalues = torch.linalg.eigvalsh(matrix).clamp(min=0.0)
        weights = eigenvalues / eigenvalues.sum()
        rank = torch.special.entr(weights).sum().exp() / len(matrix)
        return [off_diagonal(matrix).mean().item(), eigenvalues[0].item(), rank.item()]
