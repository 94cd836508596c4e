"""Whose statistics batch-normalizing layers use, and whether they are differentiated.

Statistics other than those of the batch itself take two passes: one over the batch they come from, which notes the mean
and variance of every call of `torch.nn.functional.batch_norm`, and one over the examples, in which the calls get them
in the same order. The second pass treats every example alone, and through the first the weights act on all of them: a
function of two points remains, the empirical side of docs/mathematics.md §5.3.
"""

import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ntk.checks import batch_norm_modules
from ntk.errors import StatisticsError, UnknownNameError

BATCH_STATISTICS = ("batch", "frozen", "reference", "frozen_reference")

Moments = list[tuple[Tensor, Tensor] | None]
"""Mean and biased variance [channels] of each call; None for a call that does not normalize over examples."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """Whose statistics are used.

    Attributes:
        choice: "batch", those of the batch, differentiated; "frozen", those of the batch as constants; "reference",
            those of the reference batch, differentiated; or "frozen_reference", those as constants.
        reference: [B, ...], the reference batch, or None.

    Raises:
        UnknownNameError: There is no such choice.
        ValueError: A reference batch is missing, or has no use.
    """

    choice: str = "batch"
    reference: Tensor | None = None

    def __post_init__(self) -> None:
        """Check that choice and reference fit each other.

        Raises:
            UnknownNameError: There is no such choice.
            ValueError: A reference batch is missing, or has no use.
        """
        if self.choice not in BATCH_STATISTICS:
            raise UnknownNameError("batch_statistics", self.choice, BATCH_STATISTICS)
        if self.borrowed != (self.reference is not None):
            need = "needs a batch [B, ...] in reference=" if self.borrowed else "has no use for reference="
            raise ValueError(
                f"batch_statistics={self.choice!r} {need}. Give both, as in batch_statistics='reference', reference=x."
            )

    @property
    def borrowed(self) -> bool:
        """Whether they are those of a reference batch."""
        return self.choice in ("reference", "frozen_reference")

    @property
    def constant(self) -> bool:
        """Whether they enter as constants."""
        return self.choice in ("frozen", "frozen_reference")

    @property
    def two_passes(self) -> bool:
        """Whether a pass that notes them precedes that over the examples."""
        return self.choice != "batch"

    def smallest_batch(self, *batches: Tensor) -> int:
        """Size of the smallest batch that gives statistics.

        Args:
            batches: The examples.
        """
        return min(len(x) for x in (batches if self.reference is None else (self.reference,)))

    def describe(self, *, two_batches: bool) -> str:
        """How they enter, in words.

        Args:
            two_batches: Whether rows and columns of the kernel are separate batches.
        """
        if self.reference is not None:
            whose = f"reference batch of {len(self.reference)}"
        else:
            whose = "two batches" if two_batches else "one batch"
        return f"{'constant' if self.constant else 'differentiated'}, {whose}"


@contextmanager
def noting(model: torch.nn.Module) -> Generator[Moments, None, None]:
    """Note mean and variance of each batch normalization in the one forward pass inside.

    Args:
        model: The network.

    Yields:
        What is noted, filled by the forward pass.

    Raises:
        StatisticsError: A batch-normalizing module does not go through `torch.nn.functional.batch_norm`.
    """
    moments: Moments = []
    entered: list[int] = []
    own = [(name, model.get_submodule(name)) for name, uses in batch_norm_modules(model).items() if uses]

    def enter(module: torch.nn.Module, args: object) -> None:
        entered.append(len(moments))

    def leave(name: str) -> Callable:
        def check(module: torch.nn.Module, args: object, output: object) -> None:
            if entered.pop() == len(moments):
                raise StatisticsError(
                    f"batch_statistics: module {name!r} ({type(module).__name__}) normalizes in train mode without "
                    "torch.nn.functional.batch_norm, so that its statistics cannot be exchanged. Write it with that "
                    "function, call .eval() on it, or take batch_statistics='batch', which is exact for any module."
                )

        return check

    handles = [module.register_forward_pre_hook(enter) for _, module in own]
    handles += [module.register_forward_hook(leave(name)) for name, module in own]
    try:
        with _Noting(moments):
            yield moments
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def using(moments: Moments, *, constant: bool, argument: str) -> Generator[None, None, None]:
    """Give the batch normalizations of the one forward pass inside these statistics.

    Args:
        moments: As noted.
        constant: Whether they have no derivatives.
        argument: Name of the examples, for the error.

    Yields:
        Nothing.

    Raises:
        StatisticsError: The forward pass does not call what was noted.
    """
    mode = _Using(moments, constant=constant, argument=argument)
    with mode:
        yield
    mode.check(agrees=mode.used == len(moments))


_BATCH_NORM = inspect.signature(F.batch_norm)
_BUILTIN = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled")


def _arguments(function: Callable, args: Sequence, kwargs: Mapping | None) -> dict | None:
    """Arguments of a call that normalizes by the statistics of its input, else None."""
    if function is F.batch_norm:
        bound = _BATCH_NORM.bind(*args, **(kwargs or {}))
        bound.apply_defaults()
        found = dict(bound.arguments)
    elif function is torch.batch_norm:
        found = dict(zip(_BUILTIN, args, strict=False)) | dict(kwargs or {})
    else:
        return None
    return found if found["training"] else None


class _Noting(TorchFunctionMode):
    """Appends the statistics of each call."""

    def __init__(self, moments: Moments) -> None:
        super().__init__()
        self.moments = moments

    def __torch_function__(
        self, func: Callable, types: object, args: Sequence = (), kwargs: dict | None = None
    ) -> object:
        call = _arguments(func, args, kwargs)
        if call is not None:
            self.moments.append(_moments(call["input"]))
        return func(*args, **(kwargs or {}))


def _moments(value: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean and variance over examples and positions; None where the leading axis is one, and holds no examples."""
    if value.shape[0] == 1:
        return None
    variance, mean = torch.var_mean(value, [0, *range(2, value.ndim)], correction=0)
    return mean, variance


class _Using(TorchFunctionMode):
    """Replaces the statistics of each call."""

    def __init__(self, moments: Moments, *, constant: bool, argument: str) -> None:
        super().__init__()
        self.moments, self.constant, self.argument = moments, constant, argument
        self.used = 0

    def check(self, *, agrees: bool) -> None:
        if not agrees:
            raise StatisticsError(
                f"batch_statistics: the model normalizes otherwise on {self.argument} than on the batch its "
                f"statistics come from ({len(self.moments)} calls of batch_norm there), so that they have no place to "
                "go. Its calls must not depend on the size of the batch; or take batch_statistics='batch'."
            )

    def __torch_function__(
        self, func: Callable, types: object, args: Sequence = (), kwargs: dict | None = None
    ) -> object:
        call = _arguments(func, args, kwargs)
        if call is None:
            return func(*args, **(kwargs or {}))
        self.check(agrees=self.used < len(self.moments))
        moments = self.moments[self.used]
        self.used += 1
        if moments is None:
            return func(*args, **(kwargs or {}))
        value, (mean, variance), eps = call["input"], moments, call["eps"]
        self.check(agrees=mean.shape == value.shape[1:2])
        if not self.constant:  # torch has no derivatives by running statistics, but knows the gain and shift behind
            shape = (1, -1) + (1,) * (value.ndim - 2)
            value = (value - mean.reshape(shape)) * torch.rsqrt(variance + eps).reshape(shape)
            mean, variance, eps = torch.zeros_like(mean), torch.ones_like(variance), 0.0
        return F.batch_norm(value, mean.detach(), variance.detach(), call["weight"], call["bias"], eps=eps)
