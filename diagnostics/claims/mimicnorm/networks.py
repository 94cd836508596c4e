"""The networks on which MimicNorm's claims are decided: bias-free chains for which theory has closed forms."""

from __future__ import annotations

import copy
import math
from functools import lru_cache

import torch
from torch import Tensor, nn

import mimicnorm
from diagnostics.data import constant_correlation, inputs_of_gram
from diagnostics.subject import Subject

PAPER = "Fei, Dai, Li, Zou, Xiong: MimicNorm (arXiv 2010.09278)"

CHI_1 = math.pi / (math.pi - 1)
"""Slope of the weight-mean ReLU correlation map at 1, 1.46694…: the paper's 1/(1 − 1/π)."""

PLAIN = mimicnorm.NoNorm(bias=False)
WEIGHT_MEAN = mimicnorm.MimicNorm(linear=True, last_batch_norm=False, bias=False)
BATCH_NORM = mimicnorm.BatchNorm()
MIMICNORM = mimicnorm.MimicNorm(linear=True, bias=False, eps=0.0)
PLAIN_WITH_LAST_BATCH_NORM = mimicnorm.MimicNorm(linear=True, weight_mean=False, bias=False, eps=0.0)


@lru_cache(maxsize=8)
def _batch_norm_form(n0: int, width: int, depth: int, outputs: int) -> nn.Sequential:
    """A chain whose own weights do not matter, because every method draws them anew from the subject's seed."""
    generator = torch.Generator().manual_seed(0)
    return mimicnorm.models.fcnn(n0, width, depth, outputs, affine=False, eps=0.0, generator=generator)


def chain(
    seed: int, width: int, depth: int, method: mimicnorm.Method, x: Tensor, *, y: Tensor | None = None, outputs: int = 1
) -> Subject:
    """A fully connected ReLU network under a method, in the precision of its inputs.

    Args:
        seed: Seed of its weights.
        width: Units per layer.
        depth: Activations; there are depth + 1 weight matrices.
        method: The method; BatchNorm is without affine part and ε, as in theory.
        x: Inputs [n, n0].
        y: Labels [n].
        outputs: Output units.
    """
    model = copy.deepcopy(_batch_norm_form(x.shape[1], width, depth, outputs)).to(x.dtype)
    return Subject(model, x, y, method, seed, f"{method.name}, depth {depth}, width {width}")


def correlated_inputs(m: int, rho: float = 0.5, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inputs [m, m] of which every pair has correlation ρ ("const-ρ").

    Args:
        m: Number of inputs.
        rho: Correlation of every pair.
        dtype: Data type, and so the network's; identities need float64, sampled quantities do not.
    """
    return inputs_of_gram(constant_correlation(m, rho)).to(dtype)
