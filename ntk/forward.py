"""One whole batch through a model, leaving the model untouched."""

import contextlib
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field

import torch

from ntk.capture import Capture, ancestors
from ntk.errors import CheckpointingError, NondeterministicModelError, StatisticsError, WrappedModelError
from ntk.outputs import OutputChoice, as_rows, check_output_choice, select_output
from ntk.state import forget_attributes, random_state
from ntk.statistics import Moments, Statistics, noting, using


@dataclass(frozen=True, eq=False)
class Evaluation:
    """How a model is evaluated.

    Attributes:
        dtype: Type to compute in, or None for the type of the model.
        statistics: Whose statistics batch-normalizing layers use.
        output: Which part of what the model returns is meant.

    Raises:
        TypeError: output is of the wrong type.
    """

    dtype: torch.dtype | None = None
    statistics: Statistics = field(default_factory=Statistics)
    output: OutputChoice = None

    def __post_init__(self) -> None:
        """Check the choice of outputs."""
        check_output_choice(self.output)

    def moments(
        self,
        model: torch.nn.Module,
        x: torch.Tensor,
        parameters: Mapping[str, torch.Tensor],
        origin: Mapping[str, torch.Tensor],
        buffers: Mapping[str, torch.Tensor] | None = None,
    ) -> Moments | None:
        """The statistics that the examples are normalized by, or None for their own.

        Args:
            model: The network.
            x: [n, ...], the examples.
            parameters: Name -> tensor that stands in for the parameter.
            origin: The same where statistics are constants.
            buffers: As in `call`.
        """
        if not self.statistics.two_passes:
            return None
        source = x if self.statistics.reference is None else self.statistics.reference
        constant = self.statistics.constant
        with torch.no_grad() if constant else contextlib.nullcontext(), noting(model) as moments:
            call(model, source, origin if constant else parameters, self.dtype, buffers)
        return moments

    def outputs(
        self,
        model: torch.nn.Module,
        x: torch.Tensor,
        parameters: Mapping[str, torch.Tensor],
        moments: Moments | None,
        argument: str,
        buffers: Mapping[str, torch.Tensor] | None = None,
    ) -> object:
        """Run the model on examples and select from what it returns.

        Args:
            model: The network.
            x: [n, ...]
            parameters: Name -> tensor that stands in for the parameter.
            moments: Statistics to normalize by, or None for those of the examples.
            argument: Name of x, for the errors.
            buffers: As in `call`.
        """
        if moments is None:
            return select_output(call(model, x, parameters, self.dtype, buffers), self.output)
        with using(moments, constant=self.statistics.constant, argument=argument):
            returned = call(model, x, parameters, self.dtype, buffers)
        return select_output(returned, self.output)


@dataclass(frozen=True, eq=False)
class Batch:
    """The result of one forward pass, ready to be differentiated.

    Attributes:
        output: [n, o], attached to the graph.
        parameters: Name -> leaf tensor in the graph, a copy of that of the model.
        sizes: Bytes of the output of each module that has no children, in one forward pass.
    """

    output: torch.Tensor
    parameters: dict[str, torch.Tensor]
    sizes: list[int]

    @property
    def activation_bytes(self) -> int:
        """Size of the largest output of a module."""
        return max(self.sizes, default=1)

    @property
    def graph_bytes(self) -> int:
        """About what the graph of the batch holds: the outputs of all modules."""
        return sum(self.sizes)

    @property
    def copied_bytes(self) -> int:
        """Size of the copies of parameters."""
        return sum(value.numel() * value.element_size() for value in self.parameters.values())


def call(
    model: torch.nn.Module,
    x: torch.Tensor,
    parameters: Mapping[str, torch.Tensor],
    dtype: torch.dtype | None,
    buffers: Mapping[str, torch.Tensor] | None = None,
) -> object:
    """Run the model with the given parameters and with clones of its buffers, as one batch.

    BatchNorm in train mode therefore sees all of x, and writes its running statistics into the clones.

    Args:
        model: The network.
        x: [n, ...]
        parameters: Name -> tensor that stands in for the parameter; tied weights follow.
        dtype: Floating-point type that buffers and input are cast to, or None.
        buffers: Name -> tensor that stands in for the buffer; None for those of the model.

    Returns:
        Whatever the model returns.
    """
    held = {id(value): parameters[name] for name, value in model.named_parameters()}
    held |= {
        id(value): cast(value if buffers is None else buffers[name], dtype).clone()
        for name, value in model.named_buffers()
    }
    # Each module once: torch would put a stand-in back as the parameter of a module that goes by two names.
    slots = {
        f"{path}.{name}" if path else name: held[id(value)]
        for path, module in model.named_modules()
        for name, value in (*module._parameters.items(), *module._buffers.items())
        if value is not None
    }
    return torch.func.functional_call(model, slots, (cast(x, dtype),), tie_weights=False)


def cast(value: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """The tensor in another floating-point type, complex ones in that of the same precision; integers pass unchanged.

    A tensor made in inference mode is copied, as autograd does not take it.
    """
    if value.is_inference():
        value = value.clone()
    if dtype is None or not (value.is_floating_point() or value.is_complex()):
        return value
    return value.to(dtype.to_complex() if value.is_complex() else dtype)


def run_batch(
    model: torch.nn.Module,
    x: torch.Tensor,
    names: Iterable[str],
    evaluation: Evaluation,
    argument: str,
    capture: Capture | None = None,
) -> Batch:
    """Run one batch and keep the graph to the named parameters.

    It is run a second time, without a graph, to see that the model is a function of weights, buffers and input: on some
    of the examples, where they are known not to meet and agree. What the model keeps of these runs does not stay.

    Args:
        model: The network.
        x: [n, ...]
        names: Parameters to differentiate by.
        evaluation: Type to compute in, statistics and outputs.
        argument: Name of x, for the errors.
        capture: Records the calls of the first run, or None.

    Returns:
        The batch.

    Raises:
        NondeterministicModelError: The second run gave another output.
        WrappedModelError: The model used a parameter itself in place of what stands in for it.
        CheckpointingError: The model recomputes activations without regard to the weights in use.
        StatisticsError: Examples meet although the statistics are not those of the batch.
    """
    with forget_attributes(model):
        return _run_twice(model, x, set(names), evaluation, argument, capture)


def _run_twice(
    model: torch.nn.Module,
    x: torch.Tensor,
    selected: set[str],
    evaluation: Evaluation,
    argument: str,
    capture: Capture | None,
) -> Batch:
    # Copies, for a model may write into them: torch.nn.Embedding with max_norm does.
    parameters = {name: cast(p.detach(), evaluation.dtype).clone() for name, p in model.named_parameters()}
    with torch.enable_grad():
        for name in selected:
            parameters[name].requires_grad_(True)
        if capture is not None:
            examples = [value for value in (x, evaluation.statistics.reference) if value is not None]
            capture.watch({name: value for name, value in parameters.items() if name in selected}, examples)
        same = all(value.dtype == parameters[name].dtype for name, value in model.named_parameters())
        kept = contextlib.nullcontext() if same and not evaluation.statistics.two_passes else no_recomputation()
        drawn = random_state()
        watching = capture or Capture(set(), rearrange=False)  # of no parameter: it passes over retain_grad alone
        with module_outputs(model) as sizes, watching, kept:
            moments = evaluation.moments(model, x, parameters, parameters)
            returned = evaluation.outputs(model, x, parameters, moments, argument)
        output = as_rows(returned, x.shape[0], argument)
    if any(type(node).__name__ == "CheckpointFunctionBackward" for node in ancestors(output)):
        raise CheckpointingError(_RECOMPUTES)
    check_exchanged(model, output, selected)
    if capture is not None and moments is not None:
        capture.prune(output)
    with torch.enable_grad():  # a model may differentiate inside its forward pass
        constants = {name: value.detach() for name, value in parameters.items()}

        def again(examples: torch.Tensor, moments: Moments | None) -> torch.Tensor:
            try:
                returned = evaluation.outputs(model, examples, constants, moments, argument)
            except RuntimeError as error:
                if "does not require grad" not in str(error):  # as when a model differentiates by its parameters
                    raise
                leaves = {name: value.clone().requires_grad_(name in selected) for name, value in constants.items()}
                returned = evaluation.outputs(model, examples, leaves, moments, argument)
            return as_rows(returned, len(examples), argument)

        apart = capture is not None and moments is None and capture.apart(output)
        in_part = apart and random_state() == drawn
        if not (in_part and _repeats_in_part(again, x, output)):
            for _ in range(2 if in_part else 1):  # a model may change to and fro
                _check_repeats(again(x, evaluation.moments(model, x, constants, constants)), output, argument)
        if moments is not None and len(x) > 1:
            half = x[: len(x) // 2]
            _check_apart(again(half, moments), output, argument, evaluation.statistics.choice)
    return Batch(output, {name: parameters[name] for name in parameters if name in selected}, sizes)


def check_exchanged(model: torch.nn.Module, output: torch.Tensor, names: Iterable[str]) -> None:
    """See that the output depends on what stood in for parameters, and not on these themselves.

    Args:
        model: The network.
        output: Attached to the graph.
        names: Of the parameters of the kernel.

    Raises:
        WrappedModelError: It does depend on one of these.
    """
    reached = {id(getattr(node, "variable", None)) for node in ancestors(output)}
    own = dict(model.named_parameters())
    for name in names:
        if id(own[name]) in reached:
            raise WrappedModelError(
                f"model must take its parameters from its modules whenever it is called, as others stand in for them; "
                f"{name!r} entered the output by another way: held in a list or a closure, or in what was computed "
                "from it in an earlier call and kept. Write self.name in forward, and clear what is kept."
            )


@contextlib.contextmanager
def module_outputs(model: torch.nn.Module) -> Generator[list[int], None, None]:
    """Note what the modules of a model return while it runs.

    Args:
        model: The network.

    Yields:
        Bytes of each tensor returned by a module without children, filled as the model runs.
    """
    sizes: list[int] = []

    def note(module: torch.nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, torch.Tensor):
            sizes.append(output.numel() * output.element_size())

    handles = [module.register_forward_hook(note) for module in model.modules() if not any(module.children())]
    try:
        yield sizes
    finally:
        for handle in handles:
            handle.remove()


_RECOMPUTES = (
    "model must keep its activations: its weights are exchanged for copies, which a recomputation in the backward "
    "pass would not see. It uses torch.utils.checkpoint, or other hooks on saved tensors. Switch that off, say by "
    "model.gradient_checkpointing_disable()."
)


@contextlib.contextmanager
def no_recomputation() -> Generator[None, None, None]:
    """Refuse what keeps something else than the activations for the backward pass.

    Yields:
        Nothing.

    Raises:
        CheckpointingError: The model does.
        RuntimeError: As raised inside.
    """
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(_RECOMPUTES):
            yield
    except RuntimeError as error:
        if _RECOMPUTES not in str(error):
            raise
        raise CheckpointingError(_RECOMPUTES) from error


def _repeats_in_part(
    again: Callable[[torch.Tensor, None], torch.Tensor], x: torch.Tensor, output: torch.Tensor
) -> bool:
    """Whether the first few examples, run alone, have the outputs that they had among all."""
    part = x[: max(2, len(x) // 8)]
    try:
        difference, _, allowed = compare(again(part, None), output[: len(part)])
    except Exception:  # whatever a model says of so few; all of them it has taken
        return False
    return difference <= allowed


def _check_repeats(repeated: torch.Tensor, output: torch.Tensor, argument: str) -> None:
    """See that a second run gave the output of the first.

    Raises:
        NondeterministicModelError: It did not.
    """
    difference, scale, allowed = compare(repeated, output)
    if difference > allowed:
        raise NondeterministicModelError(
            f"model must give one output for one input, and two runs on {argument} differ by up to {difference:.3g} "
            f"(outputs up to {scale:.3g}): it is random, or it changes itself when called. "
            "Switch functional dropout off, fix its noise, or call .eval() on the module that does it."
        )


def _check_apart(alone: torch.Tensor, output: torch.Tensor, argument: str, choice: str) -> None:
    """See that some examples have the outputs alone that they have among all.

    Raises:
        StatisticsError: They have not.
    """
    difference, scale, allowed = compare(alone, output[: len(alone)])
    if difference > allowed:
        raise StatisticsError(
            f"batch_statistics={choice!r} makes a kernel of two examples, but an output on {argument} changes by up to "
            f"{difference:.3g} (outputs up to {scale:.3g}) with the other examples of the batch: they meet somewhere "
            "else than in torch.nn.functional.batch_norm. Take batch_statistics='batch'."
        )


def compare(first: torch.Tensor, second: torch.Tensor) -> tuple[float, float, float]:
    """Largest difference of two outputs, largest output, and what rounding may make the difference.

    Args:
        first: [n, o]
        second: [n, o]
    """
    first, second = first.detach(), second.detach()
    scale = float(second.abs().max())
    return float((first - second).abs().max()), scale, torch.finfo(second.dtype).eps ** 0.5 * scale
