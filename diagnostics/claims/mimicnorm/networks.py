"""The networks on which MimicNorm's claims are decided: bias-free chains for which theory has closed forms."""

from __future__ import annotations

import math

import torch
from torch import Tensor

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


def chain(
    seed: int, width: int, depth: int, method: mimicnorm.Method, x: Tensor, *, y: Tensor | None = None, outputs: int = 1
) -> Subject:
    """A fully connected ReLU network under a method, in float64.

    Args:
        seed: Seed of its weights.
        width: Units per layer.
        depth: Activations; there are depth + 1 weight matrices.
        method: The method; BatchNorm is without affine part and ε, as in theory.
        x: Inputs [n, n0].
        y: Labels [n].
        outputs: Output units.
    """
    generator = torch.Generator().manual_seed(seed)
    model = mimicnorm.models.fcnn(x.shape[1], width, depth, outputs, affine=False, eps=0.0, generator=generator)
    return Subject(model.double(), x, y, method, seed, f"{method.name}, depth {depth}, width {width}")


def correlated_inputs(m: int, rho: float = 0.5) -> Tensor:
    """Inputs [m, m] of which every pair has correlation ρ: data set A ("const-ρ") of the theory."""
    return inputs_of_gram(constant_correlation(m, rho))
