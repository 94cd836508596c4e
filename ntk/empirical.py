"""Empirical neural tangent kernels of PyTorch modules."""

import sys
from collections.abc import Mapping

import numpy as np
import torch

from ntk.checks import check_accumulation, check_inputs, check_model, describe_mode
from ntk.contraction import Contraction, contract
from ntk.errors import MemoryBudgetError, NonFiniteKernelError, UnknownNameError
from ntk.forward import Evaluation, run_batch
from ntk.memory import parse_memory
from ntk.outputs import OutputChoice
from ntk.parameters import ParameterChoice, select_parameters
from ntk.projection import Projection, resolve_projection
from ntk.results import AXES, REDUCTIONS, KernelResult
from ntk.statistics import Statistics
from ntk.tiles import contract_by_examples
from ntk.vector_products import contract_products
from ntk.wrappers import measured

IMPLEMENTATIONS = ("auto", "structured", "jacobian_contraction", "ntk_vector_products")


def empirical_ntk(
    model: torch.nn.Module,
    x1: torch.Tensor,
    x2: torch.Tensor | None = None,
    *,
    reduce: str = "none",
    implementation: str = "auto",
    projection: Projection | Mapping[str, Projection] | None = None,
    params: ParameterChoice = None,
    max_memory: int | str | None = None,
    dtype: torch.dtype | None = None,
    accumulate: torch.dtype | None = None,
    progress: bool = False,
    batch_statistics: str = "batch",
    reference: torch.Tensor | None = None,
    output: OutputChoice = None,
) -> KernelResult:
    """Neural tangent kernel of a network at its present weights (Jacot et al. 2018, arXiv 1806.07572).

    Θ[i, j, a, b] = Σ_p c_p <P_p ∂f_a(x1)_i/∂p, P_p ∂f_b(x2)_j/∂p>, exact to rounding for any module: conv, attention,
    tied weights, modules called twice. The model is run as it stands, forward hooks included, and left as it was;
    backward hooks do not run, and autocast is off. With BatchNorm in train mode x1 is one batch, the terms through its
    mean and variance are included, and x2 is a second, separately normalized batch; `batch_statistics` takes others.

    Args:
        model: Network that maps [n, ...] to [n, o], or to [n] for one output. `torch.compile` and data-parallel
            wrappers are taken off, which `notes` of the result says, and parameters go by their names inside.
        x1: [n1, ...]
        x2: [n2, ...]; None stands for x1 and gives a Gram matrix.
        reduce: "none"; "trace", the mean over outputs of the diagonal (the default of neural-tangents); or "sum", the
            kernel of the summed output. Each is computed directly.
        implementation: "structured", by layers, with the Jacobian of those parameters that no rule knows (`by_jacobian`
            of the result names them); "jacobian_contraction" for all; or "ntk_vector_products", a column at a time by a
            pair of products, with no Jacobian. All are exact. "auto" is the first, unless only the second keeps within
            max_memory.
        projection: Linear map of a weight, such as `ntk.center_rows`, applied to the rows of every parameter of two or
            more axes; or parameter name -> map.
        params: Parameters the kernel is taken over: None for all that require a gradient, names, or name -> multiplier
            c. Multipliers are per-parameter learning rates: sigma_w**2 / fan_in for a weight drawn with that variance
            gives the NTK parametrization.
        max_memory: Bytes that the work may take beyond the model and its inputs, the kernel included: a number, or a
            string such as "1GiB". Examples and outputs are taken in tiles, and derivatives computed again, never
            approximated.
        dtype: torch.float32 or torch.float64 to compute in, on a cast copy; None for the type of the model.
        accumulate: torch.float64 to multiply and sum float32 derivatives in float64, so that the kernel is their exact
            Gram matrix: eigenvalues of 1e-9 of the largest, which sums in float32 turn into noise, keep their leading
            digits. Examples are not taken in tiles then. None for the type of the derivatives.
        progress: Report on the standard error stream.
        batch_statistics: What BatchNorm layers in train mode normalize by. "batch": each batch by its own mean and
            variance, functions of the weights. "frozen": the same values as constants, so that examples do not meet.
            "reference": all examples by the statistics of the batch `reference`, functions of the weights; K(x1, x2)
            is then one kernel function of two points, the finite counterpart of `n_statistics` in
            `ntk.analytic.propagate`. "frozen_reference": those as constants. Layers in eval mode keep their running
            statistics. `statistics` of the result says which.
        reference: [B, ...], for the latter two.
        output: Part of what the model returns: a key, index or attribute, several of them as a tuple or joined by
            dots, or a function that returns [n, o].

    Returns:
        Values [n1, n2, o, o] for reduce="none", else [n1, n2], with their convention.

    Raises:
        UnknownNameError: reduce, implementation, batch_statistics, a parameter, a key of the projection or an output
            does not exist.
        NoParametersError: No parameter is selected, or the output depends on none.
        ParameterTypeError: A parameter is complex or has no values yet.
        NonFiniteWeightsError: A parameter or buffer is not finite.
        NonFiniteKernelError: The output or the kernel is not finite.
        BatchOfOneError: One example under batch statistics.
        ActiveDropoutError: A dropout layer is in train mode.
        NondeterministicModelError: Two runs of the model differ.
        StatisticsError: Statistics cannot be exchanged, or examples meet in another way than by them.
        WrappedModelError: The model is a ScriptModule, has parameters spread over processes, or uses some of them by
            another way than from its modules.
        CheckpointingError: The model recomputes activations in a way that does not see the weights in use.
        OutputShapeError: The output is not [n, o].
        InputMismatchError: x1, x2 and reference are no batches of one kind of example.
        MemoryBudgetError: max_memory does not hold the smallest tiles; the message names what would.
        ValueError: max_memory, dtype or accumulate is not admissible, or "ntk_vector_products" is to accumulate.
        NoJacobianProductError: "ntk_vector_products" of a model with an operation that has no rule for J w.
    """
    how = Evaluation(dtype, Statistics(batch_statistics, reference), output)
    kernels, convention = _kernels(
        model,
        x1,
        x2,
        reduce,
        implementation,
        projection,
        params,
        max_memory,
        how,
        accumulate=accumulate,
        progress=progress,
        by_layer=False,
    )
    return KernelResult(kernels[""], **convention)


def layerwise_ntk(
    model: torch.nn.Module,
    x1: torch.Tensor,
    x2: torch.Tensor | None = None,
    *,
    reduce: str = "none",
    implementation: str = "auto",
    projection: Projection | Mapping[str, Projection] | None = None,
    params: ParameterChoice = None,
    max_memory: int | str | None = None,
    dtype: torch.dtype | None = None,
    accumulate: torch.dtype | None = None,
    progress: bool = False,
    batch_statistics: str = "batch",
    reference: torch.Tensor | None = None,
    output: OutputChoice = None,
) -> dict[str, KernelResult]:
    """Share of each layer in the neural tangent kernel; the sum of the shares is `empirical_ntk`.

    A parameter belongs to the module that holds it, a tied one to the first. Arguments and errors are those of
    `empirical_ntk`, and so is the cost: one pass serves all layers.

    Args:
        model: As in `empirical_ntk`.
        x1: [n1, ...]
        x2: [n2, ...] or None.
        reduce: As in `empirical_ntk`.
        implementation: As in `empirical_ntk`.
        projection: As in `empirical_ntk`.
        params: As in `empirical_ntk`.
        max_memory: As in `empirical_ntk`.
        dtype: As in `empirical_ntk`.
        accumulate: As in `empirical_ntk`.
        progress: As in `empirical_ntk`.
        batch_statistics: As in `empirical_ntk`.
        reference: As in `empirical_ntk`.
        output: As in `empirical_ntk`.

    Returns:
        Module name -> its share, in the order of the model; parameters of the model itself go by "".
    """
    how = Evaluation(dtype, Statistics(batch_statistics, reference), output)
    kernels, convention = _kernels(
        model,
        x1,
        x2,
        reduce,
        implementation,
        projection,
        params,
        max_memory,
        how,
        accumulate=accumulate,
        progress=progress,
        by_layer=True,
    )
    return {name: KernelResult(values, layer=name, **convention) for name, values in kernels.items()}


def _kernels(
    model: torch.nn.Module,
    x1: torch.Tensor,
    x2: torch.Tensor | None,
    reduce: str,
    implementation: str,
    projection: Projection | Mapping[str, Projection] | None,
    params: ParameterChoice,
    max_memory: int | str | None,
    evaluation: Evaluation,
    *,
    accumulate: torch.dtype | None,
    progress: bool,
    by_layer: bool,
) -> tuple[dict[str, np.ndarray], dict]:
    """Kernel of each group of parameters, and the fields of `KernelResult` that they share.

    Raises:
        UnknownNameError: reduce or implementation does not exist.
        NonFiniteKernelError: A kernel is not finite.
    """
    for argument, value, admissible in (
        ("reduce", reduce, REDUCTIONS),
        ("implementation", implementation, IMPLEMENTATIONS),
    ):
        if value not in admissible:
            raise UnknownNameError(argument, value, admissible)
    statistics = evaluation.statistics
    check_inputs(x1, x2, evaluation.dtype, statistics.reference)
    check_accumulation(accumulate, implementation)
    inputs = [("x1", x1)] if x2 is None else [("x1", x1), ("x2", x2)]
    with measured(model) as (plain, notes):
        check_model(plain, statistics.smallest_batch(*(x for _, x in inputs)))
        multipliers, scaled = select_parameters(plain, params)
        own = dict(plain.named_parameters())
        projections, projection_name = resolve_projection(projection, {name: own[name] for name in multipliers})
        plan = Contraction(
            reduce=reduce,
            multipliers=multipliers,
            projections=projections,
            groups={name: name.rpartition(".")[0] if by_layer else "" for name in multipliers},
            max_memory=parse_memory(max_memory),
            report=_report if progress else lambda done, total: None,
            accumulate=accumulate,
        )
        whose = statistics.describe(two_batches=x2 is not None)
        mode, entering = describe_mode(plain, two_batches=x2 is not None, statistics=whose)
        kernels, by_jacobian, route = _contract(plain, inputs, evaluation, implementation, plan)
    for name, values in kernels.items():
        values.setflags(write=False)
        flat = values.ravel(order="K")  # in the order of memory, without a copy
        if not np.isfinite((flat.min(), flat.max())).all():
            raise NonFiniteKernelError(
                f"the kernel{f' of layer {name!r}' if name else ''} is not finite although the output is: a gradient "
                "overflows or is undefined. Pass dtype=torch.float64, or look for a square root or norm at zero."
            )
    convention = {
        "kind": "ntk",
        "axes": AXES[reduce],
        "reduce": reduce,
        "symmetric": x2 is None,
        "mode": mode,
        "parametrization": "scaled" if scaled else "standard",
        "multipliers": tuple(multipliers.items()) if scaled else None,
        "projection": projection_name,
        "statistics": entering,
        "by_jacobian": by_jacobian,
        "implementation": route,
        "computed_in": _computed_in([evaluation.dtype or own[name].dtype for name in multipliers], accumulate),
        "notes": notes,
        "verified": route != "ntk_vector_products",  # the others mirror a triangle
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
    }
    return kernels, convention


def _contract(
    model: torch.nn.Module,
    inputs: list[tuple[str, torch.Tensor]],
    evaluation: Evaluation,
    implementation: str,
    plan: Contraction,
) -> tuple[dict[str, np.ndarray], tuple[str, ...], str]:
    """Kernel of each group, the parameters that went through the Jacobian ("auto" where memory says so, all), and how.

    Raises:
        MemoryBudgetError: max_memory does not hold what must be held.
    """
    if implementation == "ntk_vector_products":
        return contract_products(model, inputs, evaluation, plan), (), implementation
    names = tuple(plan.multipliers)
    if implementation != "jacobian_contraction":
        try:
            return *contract_by_examples(model, inputs, names, evaluation, plan), "structured"
        except MemoryBudgetError:
            if implementation == "structured":
                raise
    batches = [run_batch(model, x, names, evaluation, argument) for argument, x in inputs]
    return contract(batches[0], batches[1] if len(batches) == 2 else None, plan), names, "jacobian_contraction"


def _computed_in(types: list[torch.dtype], accumulate: torch.dtype | None) -> np.dtype | None:
    """Type of the derivatives, if they are summed in a wider one."""
    return np.dtype(np.float32) if accumulate is not None and torch.float32 in types else None


def _report(done: int, total: int) -> None:
    sys.stderr.write(f"\rempirical NTK: {done} of {total} Jacobian rows" + ("\n" if done == total else ""))
    sys.stderr.flush()
