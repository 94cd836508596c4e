"""How the gradient of a parameter factors at a call of a PyTorch function.

Where a function is linear in a weight, the gradient of an output by it is a sum of outer products over positions:
∂f/∂W = Σ_p g_p ⊗ a_p, with a_p a patch of the layer's input, known after one forward pass, and g_p the derivative of f
by the layer's output (Novak et al. 2022, arXiv 2206.08720, §3.4 and 4). A rule says what a and g are for one function.
Biases, and gains of normalization layers, have gradients no larger than the layer's output: theirs are written out.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Named = Callable[[object], str | None]
"""The name of a tensor that is a parameter of the kernel, else None."""


@dataclass(frozen=True, eq=False)
class Product:
    """A parameter whose gradient is a sum of outer products over positions.

    Shapes: M, the leading axis of the layer's output; u, rows of the Jacobian; g groups; P positions; K entries on the
    side of the input, Q on the side of the derivatives.

    Attributes:
        name: Of the parameter.
        left: Side of the input, [M, g, K, P]; of an embedding, one-hot over the tokens given, or over all for None.
        right: Side of the derivatives, [u, *output] -> [u, M, g, Q, P].
        sizes: (g, K, P, Q).
        derivative_first: Whether the axes of the parameter are (g Q, K), as in a linear layer, or (g K, Q).
        tokens: Of an embedding, else None.
        order: Of a convolution, where the K entries of the parameter stand on the side of the input; else None.
    """

    name: str
    left: Callable[[Tensor | None], Tensor]
    right: Callable[[Tensor], Tensor]
    sizes: tuple[int, int, int, int]
    derivative_first: bool = True
    tokens: Tensor | None = None
    order: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Written:
    """A parameter whose gradient is written out.

    Attributes:
        name: Of the parameter.
        rows: [u, *output] -> [u, M, *parameter].
        bias_of: Weight of the same call whose derivative side, summed over positions, is this gradient; or None.
    """

    name: str
    rows: Callable[[Tensor], Tensor]
    bias_of: str | None = None


Factor = Product | Written
Rule = Callable[..., list[Factor]]


@dataclass(frozen=True, eq=False)
class Computed:
    """A parameter that a weight is computed from.

    Attributes:
        name: Of the parameter.
        weight: What the gradient of the weight is made of.
        shape: Of the weight.
        pull: Gradients by the weight [r, *shape] -> by the parameter [r, *parameter].
    """

    name: str
    weight: Factor
    shape: tuple[int, ...]
    pull: Callable[[Tensor], Tensor]


Use = Factor | Computed
"""What the gradient of a parameter is made of at one call, be it applied there or enter a weight that is."""
