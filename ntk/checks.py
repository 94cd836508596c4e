"""What is checked before a kernel is computed: the model, its mode, and the inputs."""

import torch

from ntk.errors import (
    ActiveDropoutError,
    BatchOfOneError,
    InputMismatchError,
    NonFiniteWeightsError,
    ParameterTypeError,
)


def batch_norm_modules(model: torch.nn.Module) -> dict[str, bool]:
    """Name of every batch-normalizing module -> whether it uses the statistics of the batch now.

    A module counts when it keeps `running_mean` and `running_var`, the PyTorch protocol, and normalizes over examples.
    It uses the batch in train mode, and in eval mode too when it keeps no running values.

    Args:
        model: The network.
    """
    found = {}
    for name, module in model.named_modules():
        instance = isinstance(module, torch.nn.modules.instancenorm._InstanceNorm)
        if hasattr(module, "running_mean") and hasattr(module, "running_var") and not instance:
            found[name] = module.training or module.running_mean is None
    return found


def describe_mode(
    model: torch.nn.Module, *, two_batches: bool, statistics: str | None = None
) -> tuple[str, str | None]:
    """In which mode the model normalizes, and what that does to the kernel.

    Args:
        model: The network, with the train and eval flags as they are now.
        two_batches: Whether the kernel is a cross kernel between separately run batches.
        statistics: How batch statistics enter where they do; None where those of each batch are differentiated.

    Returns:
        mode ("train", "eval", "mixed" or "no batch statistics") and how the statistics enter (None without any).
    """
    uses = batch_norm_modules(model).values()
    if not uses:
        return "no batch statistics", None
    if not any(uses):
        return "eval", "running"
    if statistics is None:
        statistics = "differentiated, two batches" if two_batches else "differentiated, one batch"
    return ("train", statistics) if all(uses) else ("mixed", f"{statistics}; running in some layers")


def check_model(model: torch.nn.Module, n_examples: int) -> None:
    """Refuse a model for which no kernel exists.

    Args:
        model: The network, with the train and eval flags as they are now.
        n_examples: Size of the smallest batch that will be run.

    Raises:
        ParameterTypeError: A parameter is complex or has no values yet.
        NonFiniteWeightsError: A parameter or a buffer is not finite.
        ActiveDropoutError: A dropout layer is in train mode.
        BatchOfOneError: One example under batch statistics.
    """
    _check_parameter_types(model)
    entries = [("parameter", name, value.detach()) for name, value in model.named_parameters()]
    entries += [("buffer", *item) for item in model.named_buffers()]
    for what, name, value in entries:
        if (value.is_floating_point() or value.is_complex()) and not _all_finite(value):
            bad = int((~torch.isfinite(value)).sum())
            raise NonFiniteWeightsError(
                f"model has {bad} non-finite of {value.numel()} values in {what} {name!r}; all must be finite. "
                "Reload the last good checkpoint, or find the step at which training diverged."
            )
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise ActiveDropoutError(
                f"model has active dropout in module {name!r} (p={module.p}, train mode), so it is random and has "
                "no kernel; call .eval() on that module, which leaves batch normalization in train mode."
            )
    if n_examples == 1:
        for name, uses_batch in batch_norm_modules(model).items():
            if uses_batch:
                raise BatchOfOneError(
                    f"a batch needs at least 2 examples where module {name!r} normalizes by batch statistics; got 1. "
                    "Give more examples at once, or call model.eval() for the kernel under running statistics."
                )


def _all_finite(value: torch.Tensor) -> bool:
    """Look at the sum first, which one pass computes; it may overflow where no entry has."""
    return bool(torch.isfinite(value.sum()) or torch.isfinite(value).all())


def _check_parameter_types(model: torch.nn.Module) -> None:
    """Refuse parameters without real values.

    Raises:
        ParameterTypeError: A parameter is complex or has no values yet.
    """
    for name, value in model.named_parameters():
        if torch.nn.parameter.is_lazy(value):
            raise ParameterTypeError(
                f"model has no values yet in the lazy parameter {name!r}; call it once on a batch, so that the layer "
                "takes its shape."
            )
        if value.is_complex():
            raise ParameterTypeError(
                f"model must have real parameters, as the kernel is a sum of products of real gradients; {name!r} is "
                f"{value.dtype}. Hold it as real and imaginary part, and use torch.view_as_complex in forward."
            )


def check_inputs(
    x1: torch.Tensor, x2: torch.Tensor | None, dtype: torch.dtype | None, reference: torch.Tensor | None = None
) -> None:
    """Refuse inputs that are no batches of one kind of example.

    Args:
        x1: [n1, ...]
        x2: [n2, ...] or None
        dtype: The `dtype` argument: None, torch.float32 or torch.float64.
        reference: [B, ...] or None

    Raises:
        TypeError: An input is not a tensor.
        InputMismatchError: An input has no examples, or two differ in shape beyond the first axis, dtype or device.
        ValueError: The dtype is neither float32 nor float64.
    """
    for name, value in (("x1", x1), ("x2", x2), ("reference", reference)):
        if value is None and name != "x1":
            continue
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor [n, ...], got {type(value).__name__}; use torch.as_tensor.")
        if value.ndim == 0 or value.shape[0] == 0:
            raise InputMismatchError(
                f"{name} must hold at least one example, [n, ...]; got shape {tuple(value.shape)}."
            )
        for what, a, b in (
            ("shape of one example", tuple(x1.shape[1:]), tuple(value.shape[1:])),
            ("dtype", x1.dtype, value.dtype),
            ("device", x1.device, value.device),
        ):
            if a != b:
                raise InputMismatchError(
                    f"x1 and {name} must agree in {what}: x1 has {a}, {name} has {b}; bring {name} into the form of x1."
                )
    if dtype not in (None, torch.float32, torch.float64):
        raise ValueError(f"dtype must be None, torch.float32 or torch.float64; got {dtype}. Use float64 for spectra.")


def check_accumulation(accumulate: torch.dtype | None, implementation: str = "auto") -> None:
    """Refuse a type that products are not summed in.

    Args:
        accumulate: The `accumulate` argument.
        implementation: The `implementation` argument.

    Raises:
        ValueError: It is neither None nor torch.float64, or sums run where it does not reach them.
    """
    if accumulate not in (None, torch.float64):
        raise ValueError(
            f"accumulate must be torch.float64, or None for the type of the derivatives; got {accumulate}. What they "
            "are computed in is set by dtype."
        )
    if accumulate is not None and implementation == "ntk_vector_products":
        raise ValueError(
            "accumulate must be None for implementation='ntk_vector_products', whose sums run inside autograd in the "
            f"type of the model; got {accumulate}. Take another implementation, or dtype={accumulate}."
        )
