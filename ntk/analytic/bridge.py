"""The analytic counterpart of a PyTorch network, from a description of it as plain data.

Nothing here imports torch. A description is what ``mimicnorm.describe(model)`` returns: the layers in execution order,
each a dictionary with its name, its kind and its inputs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from ntk.analytic import layers
from ntk.analytic.compat import stax
from ntk.analytic.counterparts import INPUT, WEIGHTED, Counterpart, Step, counterpart
from ntk.analytic.messages import require_choice
from ntk.analytic.norms import require_variance
from ntk.errors import InputMismatchError, NoCounterpartError

FORMAT = 1
"""Version of the descriptions that are read."""


@dataclass(frozen=True, eq=False)
class AnalyticNetwork:
    """The counterpart of a PyTorch network: a finite network in JAX, and its kernel at infinite width.

    Images are [n, C, H, W], as in PyTorch, and parameters those of PyTorch: the standard parametrization.

    Attributes:
        init_fn: (key, shape of the inputs) to (shape of the outputs, parameters).
        apply_fn: (parameters, inputs) to outputs.
        kernel_fn: (x1, x2=None, get=None) to kernels, as in neural-tangents.
        params: The weights of the PyTorch network, for ``apply_fn``; None if the description has none.
        notes: In what the kernel differs from that of the network.
    """

    init_fn: Callable[..., Any] = field(repr=False)
    apply_fn: Callable[..., Any] = field(repr=False)
    kernel_fn: Callable[..., Any] = field(repr=False)
    params: Any = field(repr=False)
    notes: tuple[str, ...]

    @property
    def layer(self) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
        """The triple that ``stax.serial`` takes; first in it, and not where the network centres its first layer."""
        return self.init_fn, self.apply_fn, self.kernel_fn


def from_torch(
    description: Mapping[str, Any], *, weight_variance: Mapping[str, float] | None = None
) -> AnalyticNetwork:
    """Return the analytic counterpart of a described network.

    Weights are taken to be independent Gaussians; their variances are those measured on the described network, unless
    given.

    Args:
        description: The network as plain data, see ``mimicnorm.describe``; with weights, the result carries them.
        weight_variance: σw² (fan-in times the variance of a weight) by name of layer, in place of the measured ones.

    Returns:
        The counterpart.

    Raises:
        NoCounterpartError: If some layers have none; its ``layers`` maps their names to the reasons.
        ValueError: If the description is of another format, or a variance is given for a layer that there is not.
    """
    graph = _Graph(description, weight_variance or {})
    step = graph.way(graph.output, INPUT)
    if graph.missing:
        raise NoCounterpartError(graph.missing)
    init_fn, apply_fn, kernel_fn = _network(step.layer, graph.prepare, description.get("input_shape"))
    return AnalyticNetwork(init_fn, apply_fn, kernel_fn, step.params if graph.has_weights else None, graph.notes)


def missing_counterparts(description: Mapping[str, Any]) -> dict[str, str]:
    """Return the layers of a described network that have no analytic counterpart.

    Args:
        description: The network as plain data, see ``mimicnorm.describe``.

    Returns:
        The reasons by name of layer; empty if :func:`from_torch` takes the network.

    Raises:
        ValueError: If the description is of another format.
    """
    graph = _Graph(description, {})
    graph.way(graph.output, INPUT)
    return graph.missing


def _network(
    layer: Any, prepare: Callable[[Any], Any] | None, input_shape: Sequence[int] | None
) -> tuple[Callable[..., Any], ...]:
    """A network whose inputs are checked, and prepared where its first layer is centred: that takes no Kernel."""
    init, apply, kernel = layer

    def ready(x: Any) -> Any:
        shape = getattr(x, "shape", None)
        if input_shape is not None and shape is not None and list(shape[1:]) != list(input_shape):
            raise InputMismatchError(
                f"x: must have the shape [n, {', '.join(map(str, input_shape))}] that the network was described with; "
                f"received {list(shape)}. Images are [n, C, H, W], as in PyTorch."
            )
        if prepare is not None and shape is None:
            raise TypeError(
                "x: must be the network's input where its first layer is centred, as the mean of a patch follows "
                f"from no covariance; received {type(x).__name__}. Call kernel_fn on inputs, outside of stax.serial."
            )
        return x if prepare is None else prepare(x)

    def init_fn(rng: jax.Array, input_shape: tuple[int, ...]) -> Any:
        return init(rng, jax.eval_shape(ready, jax.ShapeDtypeStruct(input_shape, jnp.float32)).shape)

    def apply_fn(params: Any, inputs: jax.Array, **kwargs: Any) -> jax.Array:
        if params is None:
            raise ValueError(
                "params: must be those of the network; None came, as the description has no weights. Describe it with "
                "weights=True, or draw them by init_fn."
            )
        return apply(params, ready(inputs), **kwargs)

    def kernel_fn(x1: jax.Array, x2: jax.Array | None = None, get: Any = None, **kwargs: Any) -> Any:
        return kernel(ready(x1), None if x2 is None else ready(x2), get, **kwargs)

    kernel_fn.input_req = kernel.input_req  # type: ignore[attr-defined] # what serial and nt.batch read
    return init_fn, apply_fn, kernel_fn


class _Graph:
    """A described network, being turned into triples from its output backwards.

    Args:
        description: The network.
        weight_variance: σw² by name of layer.
    """

    def __init__(self, description: Mapping[str, Any], weight_variance: Mapping[str, float]) -> None:
        """Find the counterpart of each layer by itself.

        Raises:
            TypeError: If it is no description.
            ValueError: If the description is of another format, or a variance is given for a layer that there is not.
        """
        if not isinstance(description, Mapping):
            raise TypeError(
                f"description: must be a network as plain data; received {type(description).__name__}. Pass "
                "mimicnorm.describe(model, example_input, weights=True)."
            )
        if description.get("format") != FORMAT or not description.get("layers"):
            raise ValueError(
                f"description: must be of format {FORMAT} with at least one layer, as mimicnorm.describe(model) "
                f"returns; received format {description.get('format')!r}. Describe the network again with this "
                "version."
            )
        self.nodes: dict[str, Mapping[str, Any]] = {layer["name"]: layer for layer in description["layers"]}
        weighted = [name for name, node in self.nodes.items() if node["kind"] in WEIGHTED]
        for name, variance in weight_variance.items():
            require_choice("weight_variance", name, weighted, "Name layers that have weights.")
            require_variance(f"weight_variance[{name!r}]", variance, positive=True)
        self.order = {name: position for position, name in enumerate([INPUT, *self.nodes])}
        self.output = description["layers"][-1]["name"]
        self.missing: dict[str, str] = {}
        self.emitted: set[str] = set()
        self.counterparts: dict[str, Counterpart] = {}
        for name in self.nodes:
            found = counterpart(name, self.nodes, self.counterparts, description, weight_variance)
            self.counterparts[name] = found
            if found.missing:
                self.missing[name] = found.missing

    @property
    def prepare(self) -> Callable[[Any], Any] | None:
        """What is done to the input first, if anything."""
        return next((found.prepare for found in self.counterparts.values() if found.prepare is not None), None)

    @property
    def notes(self) -> tuple[str, ...]:
        """What all layers have to note, each once."""
        return tuple(dict.fromkeys(found.note for found in self.counterparts.values() if found.note))

    @property
    def has_weights(self) -> bool:
        """Whether the description carries the weights of every layer that has some."""
        weighted = [node for node in self.nodes.values() if node["kind"] in WEIGHTED]
        return all("weight" in node for node in weighted)

    def way(self, end: str, start: str) -> Step:
        """What lies between the outputs of two layers, as one layer."""
        steps: list[Step] = []
        name = end
        while name != start:
            if name == INPUT:
                self.missing.setdefault(end, f"not all of what it is computed from passes through {start!r}")
                break
            if name in self.emitted:
                self.missing.setdefault(name, "its output is used in two places that do not meet in one sum")
                break
            self.emitted.add(name)
            inputs = self.nodes[name]["inputs"]
            if len(inputs) == 1:
                steps[:0] = self.counterparts[name].steps
                name = inputs[0]
            else:
                fork = self._fork(inputs)
                branches = [self.way(branch, fork) for branch in inputs]
                if sum(not branch.weighted for branch in branches) > 1:
                    self.missing.setdefault(name, "the sum's inputs are not independent: two have no weights")
                summed = layers.sum_branches(*(branch.layer for branch in branches))
                params = ((), tuple(branch.params for branch in branches), ())
                steps.insert(0, Step(summed, params, weighted=any(branch.weighted for branch in branches)))
                name = fork
        if len(steps) == 1:
            return steps[0]
        if not steps:
            return Step(stax.Identity(), ())
        joined = stax.serial(*(step.layer for step in steps))
        return Step(joined, tuple(step.params for step in steps), weighted=any(step.weighted for step in steps))

    def _fork(self, names: Sequence[str]) -> str:
        """The last layer that all of some layers come from."""
        common = set.intersection(*(self._ancestors(name) for name in names))
        return max(common, key=self.order.__getitem__)

    def _ancestors(self, name: str) -> set[str]:
        """A layer and all that it comes from."""
        found, waiting = set(), [name]
        while waiting:
            current = waiting.pop()
            if current not in found:
                found.add(current)
                waiting += self.nodes[current]["inputs"] if current != INPUT else []
        return found
