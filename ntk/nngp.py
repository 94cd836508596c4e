"""Empirical NNGP kernel: the second moment of a layer over its units."""

import numpy as np
import torch

from ntk.checks import check_inputs, check_model, describe_mode
from ntk.errors import NonFiniteKernelError, OutputShapeError, UnknownNameError
from ntk.forward import call, cast
from ntk.results import AXES, KernelResult
from ntk.wrappers import measured


def empirical_nngp(
    model: torch.nn.Module,
    x1: torch.Tensor,
    x2: torch.Tensor | None = None,
    *,
    layer: str | None = None,
    dtype: torch.dtype | None = None,
) -> KernelResult:
    """Average over units of the product of a layer's outputs (Lee et al. 2018, arXiv 1711.00165).

    K[i, j] = mean_u h_u(x1)_i h_u(x2)_j, where u runs over channels and positions, and over the calls of a module that
    is called more than once. The model is run as it stands, and left as it was. With BatchNorm in train mode x1 is one
    batch and x2 another.

    Args:
        model: The network.
        x1: [n1, ...]
        x2: [n2, ...]; None stands for x1 and gives a Gram matrix.
        layer: Name of the module whose output is meant, as in `model.named_modules()`; None for the output of the
            network.
        dtype: torch.float32 or torch.float64 to compute in, on a cast copy; None for the type of the model.

    Returns:
        Values [n1, n2], with reduce="mean".

    Raises:
        UnknownNameError: No module has that name.
        OutputShapeError: The layer does not return one row per example, or is not called.
        NonFiniteKernelError: Its outputs are not finite.
        NonFiniteWeightsError: A parameter or buffer is not finite.
        BatchOfOneError: One example under batch statistics.
        ActiveDropoutError: A dropout layer is in train mode.
        InputMismatchError: x1 and x2 are no batches of one kind of example.
    """
    check_inputs(x1, x2, dtype)
    with measured(model) as (plain, notes):
        modules = dict(plain.named_modules())
        if layer is not None and layer not in modules:
            raise UnknownNameError("layer", layer, (name for name in modules if name))
        check_model(plain, min(len(x1), len(x1 if x2 is None else x2)))
        target = plain if layer is None else modules[layer]
        first = _outputs(plain, target, x1, dtype, layer)
        second = first if x2 is None else _outputs(plain, target, x2, dtype, layer)
        mode, statistics = describe_mode(plain, two_batches=x2 is not None)
    values = (first.double() @ second.double().T / first.shape[1]).to(first.dtype).numpy()
    return KernelResult(
        values,
        kind="nngp",
        axes=AXES["mean"],
        reduce="mean",
        symmetric=x2 is None,
        mode=mode,
        statistics=statistics,
        layer=layer,
        notes=notes,
        versions={"torch": torch.__version__, "numpy": np.__version__},
    )


def _outputs(
    model: torch.nn.Module, target: torch.nn.Module, x: torch.Tensor, dtype: torch.dtype | None, layer: str | None
) -> torch.Tensor:
    """Outputs of one module on one batch, [n, units], on the CPU.

    Raises:
        OutputShapeError: They are no tensor with one row per example, or there are none.
        NonFiniteKernelError: They are not finite.
    """
    seen: list[object] = []

    def note(module: torch.nn.Module, inputs: object, output: object) -> None:
        # A clone: a following in-place activation would write into it.
        seen.append(output.detach().clone() if isinstance(output, torch.Tensor) else output)

    handle = target.register_forward_hook(note)
    try:
        with torch.no_grad():
            call(model, x, {name: cast(p.detach(), dtype).clone() for name, p in model.named_parameters()}, dtype)
    finally:
        handle.remove()
    where = "the model" if layer is None else f"layer {layer!r}"
    rows = []
    for output in seen:
        if not isinstance(output, torch.Tensor) or output.ndim == 0 or output.shape[0] != len(x):
            came = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
            raise OutputShapeError(
                f"{where} must return one tensor with a row for each of the {len(x)} examples; it returned {came}. "
                "Name a layer that keeps the example axis first."
            )
        rows.append(output.reshape(len(x), -1).cpu())
    if not rows:
        raise OutputShapeError(f"{where} was not called in the forward pass; name a layer that is.")
    joined = torch.cat(rows, dim=1)
    if joined.dtype not in (torch.float32, torch.float64):
        raise OutputShapeError(
            f"{where} must compute in float32 or float64, its output is {joined.dtype}; pass dtype=torch.float32 or "
            "dtype=torch.float64."
        )
    if not bool(torch.isfinite(joined).all()):
        raise NonFiniteKernelError(f"the output of {where} is not finite; check the input for NaN and for overflow.")
    return joined
