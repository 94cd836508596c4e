"""The first-order Taylor expansion of a network in its weights: the model whose training the NTK describes."""

from collections.abc import Iterable

import torch

from ntk.checks import check_inputs, check_model
from ntk.errors import NoJacobianProductError
from ntk.forward import Evaluation, check_exchanged
from ntk.outputs import OutputChoice
from ntk.parameters import select_parameters
from ntk.snapshot import Snapshot
from ntk.statistics import Statistics

_NO_RULE = ("forward AD", "forward mode AD", "jvp", "autograd.Function")
"""Words by which torch says that an operation has no forward-mode derivative."""


class LinearizedModel(torch.nn.Module):
    """f(x; θ0) + J(x; θ0) (θ − θ0), a module whose parameters are θ.

    It begins at θ = θ0, where it equals the network. As f is a function of the whole batch, the terms through batch
    statistics are in J. Any optimizer trains it, and gradients by θ are those of the network at θ0, J(x)ᵀ v. The
    expansion point, buffers and flags are those of the moment of construction: neither training the network nor
    `.train()` and `.eval()` changes it.
    """

    def __init__(self, snapshot: Snapshot, names: list[str]) -> None:
        """Begin at the expansion point.

        Args:
            snapshot: The network.
            names: Parameters that θ consists of; the others are constants.
        """
        super().__init__()
        self._snapshot = snapshot
        self._names = tuple(names)
        self.values = torch.nn.ParameterList(snapshot.parameters[name].clone() for name in names)

    @property
    def params(self) -> dict[str, torch.nn.Parameter]:
        """θ: name in the network -> parameter of this module, to be changed in place."""
        return dict(zip(self._names, self.values, strict=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Output at the present θ, by one forward pass that carries its derivative along.

        Args:
            x: [n, ...], one batch.

        Returns:
            What the network returns, [n, o].

        Raises:
            RuntimeError: The network refuses the input.
            NoJacobianProductError: An operation of the network cannot be differentiated in forward mode.
            WrappedModelError: The network used a parameter itself in place of what stands in for it.
        """
        check_inputs(x, None, None)
        origin = {name: self._snapshot.parameters[name] for name in self._names}
        step = {name: value - origin[name] for name, value in self.params.items()}
        with self._snapshot.active():
            statistics = self._snapshot.evaluation.statistics
            check_model(self._snapshot.plain, statistics.smallest_batch(x))
            try:
                value_and_change = torch.func.jvp(lambda p: self._snapshot(x, p), (origin,), (step,))
            except (NotImplementedError, RuntimeError) as refusal:
                if isinstance(refusal, torch.OutOfMemoryError) or not any(w in str(refusal) for w in _NO_RULE):
                    raise
                raise NoJacobianProductError(
                    "model must consist of operations with a forward-mode derivative to be linearized; one has none: "
                    f"{str(refusal).splitlines()[0]} Write it in torch operations."
                ) from refusal
            check_exchanged(self._snapshot.plain, value_and_change[0], self._names)
        return value_and_change[0] + value_and_change[1]


def linearize(
    model: torch.nn.Module,
    *,
    params: Iterable[str] | None = None,
    dtype: torch.dtype | None = None,
    batch_statistics: str = "batch",
    reference: torch.Tensor | None = None,
    output: OutputChoice = None,
) -> LinearizedModel:
    """First-order Taylor model at the present weights (Lee et al. 2019, arXiv 1902.06720).

    Args:
        model: Network that maps [n, ...] to one tensor. It is left as it was.
        params: Names of the parameters to expand in; None for all that require a gradient.
        dtype: torch.float32 or torch.float64 to compute in; None for the type of the model.
        batch_statistics: As in `ntk.empirical_ntk`; constant statistics are those at the expansion point.
        reference: As in `ntk.empirical_ntk`.
        output: As in `ntk.empirical_ntk`.

    Returns:
        A module that begins as the network, and is linear in its parameters.

    Raises:
        UnknownNameError: A parameter does not exist.
        NoParametersError: No parameter is selected.
        NonFiniteWeightsError: A parameter or buffer is not finite.
        ActiveDropoutError: A dropout layer is in train mode.
        ValueError: The dtype is neither float32 nor float64.
    """
    if dtype not in (None, torch.float32, torch.float64):
        raise ValueError(f"dtype must be None, torch.float32 or torch.float64; got {dtype}.")
    snapshot = Snapshot(model, Evaluation(dtype, Statistics(batch_statistics, reference), output))
    with snapshot.active():
        check_model(snapshot.plain, 2)
        names, _ = select_parameters(snapshot.plain, params)
    return LinearizedModel(snapshot, list(names))
