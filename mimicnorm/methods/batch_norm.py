"""Batch normalization: the baseline every method is measured against."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mimicnorm.methods.base import Method
from mimicnorm.methods.none import he_std
from mimicnorm.report import ConversionReport
from mimicnorm.surgery import Surgery


@dataclass(frozen=True)
class BatchNorm(Method):
    """Keeps the network in its BatchNorm form, re-initialized after He; gain 1, shift 0, fresh running statistics.

    Source: Ioffe and Szegedy 2015 (arXiv 1502.03167), Algorithm 1.
    """

    name: ClassVar[str] = "batch_norm"
    source: ClassVar[str] = "Ioffe and Szegedy 2015, arXiv 1502.03167, Algorithm 1"
    keeps_batch_norm: ClassVar[bool] = True

    def apply_(
        self, model: nn.Module, *, example_input: Tensor | None = None, generator: torch.Generator | None = None
    ) -> ConversionReport:
        """Convert in place; see `Method.apply_`."""
        surgery = Surgery(model, example_input=example_input, generator=generator)
        for layer in surgery.structure.layers:
            surgery.initialize(layer, he_std(layer), project=False, reason="He initialization")
        for path, module in model.named_modules():
            if isinstance(module, _BatchNorm):
                module.reset_parameters()
                surgery.record(path, "kept", "statistics and affine parameters reset")
        return surgery.finish(self)
