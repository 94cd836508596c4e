"""A model as it stands now, to be called again later whatever becomes of the model meanwhile."""

import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ntk.forward import Evaluation, cast, no_recomputation
from ntk.wrappers import measured


class Snapshot:
    """Copies of the weights and buffers of a model, and its train and eval flags.

    Calls leave the model as they find it. Attention is computed by plain products, the only form of it that has
    derivatives of every kind.
    """

    def __init__(self, model: torch.nn.Module, evaluation: Evaluation) -> None:
        """Copy what the output depends on.

        Args:
            model: The network; its structure is not copied.
            evaluation: Type to compute in, statistics and outputs.
        """
        self.model = model
        statistics = evaluation.statistics
        if statistics.reference is not None:
            statistics = replace(statistics, reference=statistics.reference.detach().clone())
        self.evaluation = replace(evaluation, statistics=statistics)
        with measured(model) as (plain, notes):
            self.plain, self.notes = plain, notes
            self.flags = [(module, module.training) for module in plain.modules()]
            self.parameters = {name: self._copy(value) for name, value in plain.named_parameters()}
            self.buffers = {name: self._copy(value) for name, value in plain.named_buffers()}

    def _copy(self, value: torch.Tensor) -> torch.Tensor:
        return cast(value.detach(), self.evaluation.dtype).clone()

    @contextmanager
    def active(self) -> Generator[None, None, None]:
        """Set the flags of the snapshot; calls must happen inside.

        Two warnings of torch that a user can do nothing about are silenced: that an operation is differentiated in a
        loop, and that forward mode compiles its rules by a deprecated function when first used.

        Yields:
            Nothing.
        """
        with measured(self.model), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)
            warnings.filterwarnings("ignore", message="`torch.jit", category=DeprecationWarning)
            for module, training in self.flags:
                module.training = training
            yield

    def __call__(self, x: torch.Tensor, parameters: Mapping[str, torch.Tensor]) -> Any:
        """Run one whole batch.

        Args:
            x: [n, ...]
            parameters: Name -> tensor that stands in for the copy.

        Returns:
            What the model returns, or the part of it that is meant.
        """
        standing = {**self.parameters, **parameters}
        with no_recomputation():
            moments = self.evaluation.moments(self.plain, x, standing, self.parameters, self.buffers)
            return self.evaluation.outputs(self.plain, x, standing, moments, "x", self.buffers)
