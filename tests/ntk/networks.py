"""The fully connected networks of docs/mathematics.md: bias-free, Gaussian weights, a scalar read-out."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

import ntk

CHI_1 = math.pi / (math.pi - 1)
"""Slope of the correlation map at 1 of ReLU under weight mean."""

VARIANCE = {"none": 2.0, "weight_mean": 2 * CHI_1, "batch_norm": 1.0}
"""sigma_w**2 of each network, for unit variance of the pre-activations."""


class DetachedBatchNorm(nn.Module):
    """Normalizes by the statistics of the batch without differentiating them: see docs/mathematics.md §5.2."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean(0).detach()
        return (x - mean) / x.var(0, correction=0).sqrt().detach()


@dataclass(frozen=True)
class Dense:
    """A network, and the multipliers and projection that make its kernel that of docs/mathematics.md."""

    model: nn.Module
    multipliers: dict[str, float]
    projection: dict


def dense(
    norm: str,
    depth: int,
    n_in: int,
    *,
    width: int,
    seed: int,
    detached: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Dense:
    """Network of `depth` ReLU layers and depth + 1 weights.

    Weights are N(0, sigma_w**2 / fan_in), the first N(0, 1 / n_in). Weight mean centers the rows of every weight but
    the first; BatchNorm stands before each ReLU, without affine parameters and with eps = 0 but for the smallest value
    that PyTorch admits. NumPy draws the weights: its stream is the same on every machine.
    """
    generator = np.random.default_rng(seed)
    draw = np.float64 if dtype == torch.float64 else np.float32
    sizes = [n_in, *[width] * depth, 1]
    layers: list[nn.Module] = []
    multipliers = {}
    for index, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        variance = (1.0 if index == 0 else VARIANCE[norm]) / fan_in
        weight = torch.from_numpy(generator.standard_normal((fan_out, fan_in), draw)) * math.sqrt(variance)
        layer = nn.Linear(fan_in, fan_out, bias=False, device="meta")
        layer.weight = nn.Parameter(ntk.center_rows(weight) if norm == "weight_mean" and index > 0 else weight)
        multipliers[f"{len(layers)}.weight"] = variance
        layers.append(layer)
        if index < depth:
            if norm == "batch_norm":
                batch_norm = nn.BatchNorm1d(fan_out, eps=1e-30, affine=False, track_running_stats=False)
                layers.append(DetachedBatchNorm() if detached else batch_norm)
            layers.append(nn.ReLU())
    centered = list(multipliers)[1:] if norm == "weight_mean" else []
    return Dense(nn.Sequential(*layers), multipliers, dict.fromkeys(centered, ntk.center_rows))


def constant_correlation(m: int, rho: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """m inputs [m, m] with K0 = x xᵀ / m = (1 - rho) I + rho 11ᵀ: data "const-ρ" of docs/mathematics.md §9.1."""
    gram = torch.full((m, m), rho, dtype=torch.float64) + (1 - rho) * torch.eye(m, dtype=torch.float64)
    return (math.sqrt(m) * torch.linalg.cholesky(gram)).to(dtype)
