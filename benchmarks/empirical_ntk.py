"""The empirical NTK against torch.func, as in PyTorch's tutorial, in one run.

Run: .venv/bin/python benchmarks/empirical_ntk.py [--task mlp] [--examples 64] [--repetitions 5] [--device cpu]

The tutorial contracts per-sample Jacobians (vmap of jacrev of functional_call on one example). Under batch statistics
that raises, and the Jacobian of the whole batch is taken instead (jacrev). The two take turns, and the ratio is that of
neighbouring runs: its median, smallest and largest. Beside it stands the relative error of each against a loop of
whole-batch gradients in float64, over the block of the first examples; a ReLU whose input changes sign between float32
and float64 would show there as an error of both.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
from collections.abc import Callable
from time import perf_counter

import numpy as np
import torch
from torch import Tensor, nn

import ntk

OUTPUTS = 10


def mlp(widths: list[int], *, batch_norm: bool = False) -> nn.Module:
    """Linear layers with ReLU between them, and batch norm before each."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), *([nn.BatchNorm1d(fan_out)] if batch_norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], OUTPUTS))


def conv() -> nn.Module:
    """Three convolutions, the last two of stride 2, and global average pooling."""
    layers: list[nn.Module] = []
    for fan_in, fan_out, stride in ((3, 32, 1), (32, 64, 2), (64, 64, 2)):
        layers += [nn.Conv2d(fan_in, fan_out, 3, stride=stride, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, OUTPUTS))


class Unit(nn.Module):
    """Residual unit without normalization."""

    def __init__(self, fan_in: int, fan_out: int, stride: int) -> None:
        """Two convolutions, and a 1 x 1 shortcut where the shape changes."""
        super().__init__()
        self.first = nn.Conv2d(fan_in, fan_out, 3, stride=stride, padding=1)
        self.second = nn.Conv2d(fan_out, fan_out, 3, padding=1)
        self.shortcut = nn.Identity() if fan_in == fan_out else nn.Conv2d(fan_in, fan_out, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """[n, fan_in, h, w] -> [n, fan_out, h / stride, w / stride]."""
        return torch.relu(self.second(torch.relu(self.first(x))) + self.shortcut(x))


def resnet20() -> nn.Module:
    """ResNet-20 without normalization: three units each of 16, 32 and 64 channels."""
    units = [Unit(16, 16, 1)] + [Unit(16, 16, 1) for _ in range(2)]
    for fan_in, fan_out in ((16, 32), (32, 64)):
        units += [Unit(fan_in, fan_out, 2)] + [Unit(fan_out, fan_out, 1) for _ in range(2)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, OUTPUTS)]
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), *units, *head)


TASKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "mlp": (lambda: mlp([784, 512, 512, 512]), (256, 784), "none"),
    "mlp, trace": (lambda: mlp([784, 512, 512, 512]), (256, 784), "trace"),
    "deep mlp": (lambda: mlp([784, *[256] * 20]), (200, 784), "none"),
    "conv": (conv, (64, 3, 32, 32), "none"),
    "resnet20": (resnet20, (32, 3, 32, 32), "none"),
    "batch norm": (lambda: mlp([784, 256, 256], batch_norm=True), (128, 784), "none"),
}


def tutorial(model: nn.Module, x: Tensor, reduce: str) -> Tensor:
    """The Jacobian contraction of PyTorch's tutorial, on the whole batch where its examples meet."""
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    if buffers:
        jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(model, (p, _fresh(buffers)), (x,)))(
            parameters
        )
    else:
        single = lambda p, example: torch.func.functional_call(model, p, (example.unsqueeze(0),)).squeeze(0)
        jacobian = torch.func.vmap(torch.func.jacrev(single), (None, 0))(parameters, x)
    rows = [part.flatten(2) for part in jacobian.values()]
    if reduce == "trace":
        return sum(torch.einsum("iap,jap->ij", part, part) for part in rows) / OUTPUTS
    return sum(torch.einsum("iap,jbp->ijab", part, part) for part in rows)


def _fresh(buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Statistics that nothing captured by a transform is written to."""
    return {name: torch.empty(0) if value.ndim == 0 else value.clone() for name, value in buffers.items()}


def reference(model: nn.Module, x: Tensor, reduce: str, examples: int = 3) -> np.ndarray:
    """The first examples' block of the kernel in float64, from a loop of whole-batch gradients."""
    twin = copy.deepcopy(model).double()
    output = twin(x.double())
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(entry, list(twin.parameters()), retain_graph=True)])
        for entry in output[:examples].flatten()
    ]
    stacked = torch.stack(rows).reshape(examples, OUTPUTS, -1)
    values = torch.einsum("iap,jbp->ijab", stacked, stacked)
    return (torch.einsum("ijaa->ij", values) / OUTPUTS if reduce == "trace" else values).cpu().numpy()


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--task", choices=TASKS, action="append")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--examples", type=int, help="instead of the task's own number")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {arguments.device}, {torch.get_num_threads()} threads")
    print(f"{'task':<12}{'examples':>9}{'ours / s':>10}{'torch.func / s':>16}{'ratio':>8}   from to      errors")
    for name in arguments.task or TASKS:
        report(name, arguments.examples, arguments.repetitions, arguments.device)


def report(name: str, examples: int | None, repetitions: int, device: torch.device) -> None:
    """Times one task and prints its line."""
    make, shape, reduce = TASKS[name]
    torch.manual_seed(0)
    model, x = make().to(device), torch.randn(examples or shape[0], *shape[1:]).to(device)
    ours = lambda: ntk.empirical_ntk(model, x, reduce=reduce).values
    theirs = lambda: tutorial(model, x, reduce).detach().cpu().numpy()
    expected = reference(model, x, reduce)
    errors = [relative_error(run(), expected) for run in (ours, theirs)]  # and warms up
    rounds = [(seconds(ours, device), seconds(theirs, device)) for _ in range(repetitions)]
    ratios = sorted(other / own for own, other in rounds)
    own, other = (statistics.median(column) for column in zip(*rounds, strict=True))
    print(
        f"{name:<12}{len(x):9d}{own:10.3f}{other:16.3f}{statistics.median(ratios):8.1f}   "
        f"{ratios[0]:.1f} {ratios[-1]:.1f}   {errors[0]:.0e} {errors[1]:.0e}",
        flush=True,
    )


def relative_error(values: np.ndarray, expected: np.ndarray) -> float:
    """Of the block of the first examples, against its largest entry."""
    block = values[: len(expected), : len(expected)]
    return float(np.abs(block - expected).max() / np.abs(expected).max())


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of one piece of work, with the device's queue empty before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = perf_counter()
    work()
    return perf_counter() - start


if __name__ == "__main__":
    main()
