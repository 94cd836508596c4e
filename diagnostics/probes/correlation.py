"""Correlation of activations between examples, against depth (MimicNorm, Figure 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from diagnostics.anatomy import activation_record
from diagnostics.measurement import Measurement
from diagnostics.subject import Subject


def correlation_matrix(units: Tensor) -> Tensor:
    """The cosines between examples over the units of a layer.

    Args:
        units: Activations [n, ...]; everything behind the first axis counts as a unit.

    Returns:
        Matrix [n, n] with ones on the diagonal, float64.
    """
    flat = torch.nn.functional.normalize(units.flatten(1).double(), dim=1)
    return flat @ flat.T


def off_diagonal(matrix: Tensor) -> Tensor:
    """The entries of a square matrix above its diagonal, as a vector."""
    rows, columns = torch.triu_indices(matrix.shape[0], matrix.shape[1], offset=1)
    return matrix[rows, columns]


@dataclass(frozen=True)
class Correlation:
    """Mean, spread and root mean square of the pair correlations at every activation.

    Depth counts the activations that an example has already passed: the input of the first activation has depth 0
    (theory's K⁰).

    Attributes:
        where: "pre" looks at the input of each activation (behind its normalization), "post" at its output.
    """

    where: Literal["pre", "post"] = "pre"

    @property
    def name(self) -> str:
        """Name in the registry."""
        return "correlation"

    def measure(self, subject: Subject) -> Measurement:
        """Measures one network; axes depth and statistic (mean, std, rms over pairs of examples).

        Raises:
            UsageError: If the network or its inputs cannot be probed.
        """
        network = subject.network()
        record = activation_record(network, subject.x)
        rows = []
        for units in record.inputs if self.where == "pre" else record.outputs:
            pairs = off_diagonal(correlation_matrix(units))
            rows.append(
                [
                    pairs.mean().item(),
                    pairs.std(correction=min(1, len(pairs) - 1)).item(),
                    pairs.square().mean().sqrt().item(),
                ]
            )
        return Measurement(
            probe=self.name,
            quantity=f"correlation between examples, {self.where}-activation",
            unit="1",
            estimate=np.array(rows),
            axes={"depth": range(len(rows)), "statistic": ("mean", "std", "rms")},
            seeds=(subject.seed,),
        )
