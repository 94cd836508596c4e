"""The operations that a task needs by the layer-wise structured algorithm, whoever computes it.

A product [a, b] x [b, c] counts 2abc; a Gram matrix counts half of that, as it is symmetric. Counted are, for each
linear and convolutional layer with inputs A and derivatives G of all outputs by its pre-activations: the backward pass
that gives G to the layer before, and the cheaper of

- the Gram matrix of the per-sample weight gradients, and the products that give these;
- the product A Aᵀ and G Gᵀ over pairs of positions, one position for a linear layer. Under batch statistics every
  example is a position and A is the same for all outputs: A Aᵀ is multiplied into G.

The last layer's G is the identity and needs no product. Forward passes and elementwise work are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.empirical_ntk.tasks import OUTPUTS, Task


@dataclass(frozen=True)
class Layer:
    """A weight as a matrix [fan_out, fan_in] that acts at each of some positions."""

    fan_in: int
    fan_out: int
    positions: int

    @property
    def weight(self) -> int:
        """Numbers in the weight."""
        return self.fan_in * self.fan_out


def layers(model: nn.Module, shape: tuple[int, ...]) -> list[Layer]:
    """Linear and convolutional layers of a network in the order of their calls, seen by one example."""
    found: list[Layer] = []

    def note(module: nn.Module, _: object, output: torch.Tensor) -> None:
        fan_out = module.weight.shape[0]
        found.append(Layer(module.weight[0].numel(), fan_out, output[0].numel() // fan_out))

    handles = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    training = model.training
    with torch.no_grad():
        model.eval()(torch.zeros(1, *shape))
    model.train(training)
    for handle in handles:
        handle.remove()
    return found


def operations(task: Task, found: list[Layer], examples: int) -> dict[str, float]:
    """Operations of a task by kind: "gram", "gradients" and "backward"."""
    count = {"gram": 0.0, "gradients": 0.0, "backward": 0.0}
    for index, layer in enumerate(found):
        last = index == len(found) - 1
        for kind, number in _share(task, layer, examples, last=last).items():
            count[kind] += number
        if index > 0 and not last:
            mixed = examples if task.mixes else 1
            count["backward"] += 2 * examples * OUTPUTS * mixed * layer.positions * layer.weight
    return count


def _share(task: Task, layer: Layer, n: int, *, last: bool) -> dict[str, float]:
    """Gram matrix of one layer, with the per-sample gradients where they cost less."""
    rows = n * OUTPUTS
    if last:
        return {"gram": n**2 * layer.fan_in}
    positions = layer.positions * (n if task.mixes else 1)
    pairs = n**2 * OUTPUTS if task.reduce == "trace" else rows**2
    gradients = {"gradients": 2.0 * rows * positions * layer.weight, "gram": pairs * layer.weight}
    if task.mixes:
        by_position = {"gram": n**2 * layer.fan_in + 2 * rows * n**2 * layer.fan_out + pairs * n * layer.fan_out}
    else:
        by_position = {"gram": layer.positions**2 * (n**2 * layer.fan_in + pairs * layer.fan_out)}
    return min(gradients, by_position, key=lambda share: sum(share.values()))
