"""Networks actually trained, against what the kernel predicts: docs/mathematics.md §6.2 and §7.3.

Exact: networks linearized in their weights, in float64, against their own empirical kernel. Finite width: wide networks
on 64 handwritten digits, against the kernel of infinite width.
"""

from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import nn

import ntk
from ntk.analytic import propagate
from ntk.analytic.dynamics import TrainingDynamics, training_dynamics
from ntk.analytic.last_batch_norm import normalized_ntk
from tests.ntk.networks import dense

Array = NDArray[np.float64]


def train_linearized(
    model: nn.Module, x: torch.Tensor, targets: torch.Tensor, steps: int, learning_rate: float
) -> Array:
    """Outputs [steps + 1, m] of f(θ0) + J(θ − θ0), J by autograd, while θ descends ½ Σ (f − y)² from θ0."""
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    function = lambda values: torch.func.functional_call(model, values, (x,)).squeeze(1)
    jacobian = {name: value.flatten(1) for name, value in torch.func.jacrev(function)(parameters).items()}
    start = function(parameters)
    moved = {name: torch.zeros(value.numel(), dtype=value.dtype) for name, value in parameters.items()}
    seen = [start]
    for _ in range(steps):
        error = seen[-1] - targets.squeeze(1)
        moved = {name: change - learning_rate * error @ jacobian[name] for name, change in moved.items()}
        seen.append(start + sum(jacobian[name] @ change for name, change in moved.items()))
    return torch.stack(seen).numpy()


def small_network(norm: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A network of width 24 in float64, 8 inputs [8, 6] and their targets [8, 1]."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    return dense(norm, 2, 6, width=24, seed=0, dtype=torch.float64).model, draw(8, 6), draw(8, 1)


def with_last_batch_norm(model: nn.Module, epsilon: float) -> nn.Module:
    last = nn.BatchNorm1d(1, eps=epsilon, affine=False, track_running_stats=False)
    return nn.Sequential(model, last).double()


def separates(dynamics: TrainingDynamics, model: nn.Module, x: torch.Tensor, targets: torch.Tensor) -> None:
    """The linearized model, as trained, is the predicted one, and 2/λmax parts decay from growth of its first mode."""
    for share, grows in ((0.999, False), (1.001, True)):
        rate = share * dynamics.largest_stable_learning_rate
        trained = train_linearized(model, x, targets, 60, rate)
        predicted = dynamics.gradient_descent(np.arange(61), rate)
        assert np.abs(trained - predicted.train).max() < 1e-10 * np.abs(trained).max()
        leading = np.abs((trained - targets.squeeze(1).numpy()) @ dynamics.eigenvectors[..., 0].reshape(-1))
        assert np.all((np.diff(leading) > 0) == grows)
        assert leading[-1] / leading[0] == pytest.approx((2 * share - 1) ** 60, rel=1e-9)


@pytest.mark.parametrize("norm", ["none", "batch_norm"])
def test_the_bound_of_a_linearized_network(norm: str) -> None:
    model, x, targets = small_network(norm)
    kernel = ntk.empirical_ntk(model, x, reduce="sum")
    with torch.no_grad():
        start = model(x).squeeze(1).numpy()
    separates(training_dynamics(kernel, targets.squeeze(1), initial=start), model, x, targets)


@pytest.mark.parametrize("epsilon", [1e-30, 1e-2])
def test_the_bound_behind_a_last_batch_norm(epsilon: float) -> None:
    inner, x, targets = small_network("none")
    model = with_last_batch_norm(inner, epsilon)
    with torch.no_grad():
        logits, start = inner(x).squeeze(1).numpy(), model(x).squeeze(1).numpy()
    ours = normalized_ntk(ntk.empirical_ntk(inner, x, reduce="sum"), logits, 0.0 if epsilon < 1e-20 else epsilon)
    measured = ntk.empirical_ntk(model, x, reduce="sum").values
    assert np.abs(ours.ntk - measured).max() < 1e-10 * np.abs(measured).max()
    assert np.abs(ours.outputs - start).max() < 1e-10
    separates(ours.dynamics(targets.squeeze(1)), model, x, targets)


@pytest.mark.parametrize("epsilon", [1e-5, 0.3])
def test_jacobian_of_batch_norm(epsilon: float) -> None:
    """JΘJᵀ with J by PyTorch's autograd, several outputs at once."""
    generator = np.random.default_rng(2)
    logits, factor = 5 + generator.standard_normal((7, 3)), generator.standard_normal((7, 9))
    layer = nn.BatchNorm1d(3, eps=epsilon, affine=False, track_running_stats=False).double()
    jacobian = torch.autograd.functional.jacobian(layer, torch.from_numpy(logits)).numpy()
    ours = normalized_ntk(factor @ factor.T, logits, epsilon)
    for column in range(3):
        block = jacobian[:, column, :, column]
        expected = block @ factor @ factor.T @ block.T
        assert np.abs(ours.ntk[column] - expected).max() < 1e-10 * np.abs(expected).max()
        assert not jacobian[:, column, :, (column + 1) % 3].any()


def test_no_gradient_in_a_batch_of_two() -> None:
    layer = nn.BatchNorm1d(1, eps=1e-30, affine=False, track_running_stats=False).double()
    logits = torch.tensor([[0.3], [-1.2]], dtype=torch.float64, requires_grad=True)
    ((layer(logits) - torch.tensor([[0.1], [2.0]])) ** 2).sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-15
    with pytest.raises(ValueError, match="at B = 2 the gradient is exactly zero"):
        normalized_ntk(np.eye(2), [0.3, -1.2])


WIDTHS = {128: 32, 2048: 8}
"""Width -> number of seeds."""

DEPTH, MODES, STEPS, SHARE = 2, 5, 24, 0.25
"""Two ReLU layers; five modes over 24 steps of a quarter of the largest stable learning rate."""


@cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """The first 64 digits, each of norm √64 so that K0 has a unit diagonal; targets +1 for odd, −1 for even."""
    data = load_digits()
    images = data.data[:64] / np.linalg.norm(data.data[:64], axis=1, keepdims=True) * 8
    targets = np.where(data.target[:64] % 2 == 1, 1.0, -1.0)
    return torch.from_numpy(images).float(), torch.from_numpy(targets).float()


def infinite(norm: str, kernel: str = "ntk", start: Array | None = None) -> TrainingDynamics:
    """Training of the infinitely wide network from given outputs; by the wrong kernel "raw" or "nngp" on request."""
    x, targets = digits()
    gram = x.double().numpy() @ x.double().numpy().T / 64
    kernels = propagate(gram, DEPTH, norm, projected=kernel != "raw")
    return training_dynamics(kernels.nngp if kernel == "nngp" else kernels.ntk, targets, initial=start)


@cache
def learning_rate(norm: str) -> float:
    return SHARE * infinite(norm).largest_stable_learning_rate


@cache
def trained(norm: str, width: int, seed: int) -> Array:
    """Outputs [STEPS + 1, 64] of a network under full-batch gradient descent on ½ Σ (f − y)², float32."""
    x, targets = digits()
    net = dense(norm, DEPTH, 64, width=width, seed=1000 * width + seed)
    rate = learning_rate(norm)
    groups = [{"params": [p], "lr": rate * net.multipliers[name]} for name, p in net.model.named_parameters()]
    optimizer = torch.optim.SGD(groups, lr=rate)
    seen = []
    for step in range(STEPS + 1):
        outputs = net.model(x).squeeze(1)
        seen.append(outputs.detach().double().numpy())
        if step < STEPS:
            optimizer.zero_grad()
            (0.5 * ((outputs - targets) ** 2).sum()).backward()
            optimizer.step()
            with torch.no_grad():  # after a step of SGD, the same as projected gradients: docs/mathematics.md §4.5
                for name, project in net.projection.items():
                    weight = net.model.get_parameter(name)
                    weight.copy_(project(weight))
    return np.stack(seen)


@cache
def residuals(norm: str, width: int, kernel: str = "ntk") -> tuple[Array, Array]:
    """Measured and predicted ⟨u_k, f − y⟩ [seeds, STEPS + 1, MODES], u_k the eigenvectors of the infinite kernel.

    The outputs at the start are random, of order one at any width: each seed is predicted from those it has drawn.
    """
    measured, predicted = [], []
    for seed in range(WIDTHS[width]):
        outputs = trained(norm, width, seed)
        dynamics = infinite(norm, kernel, outputs[0])
        descent = dynamics.gradient_descent(np.arange(STEPS + 1), learning_rate(norm))
        predicted.append(descent.mode_residuals[:, :MODES])
        measured.append(((outputs - dynamics.targets) @ dynamics.eigenvectors)[:, :MODES])
    return np.stack(measured), np.stack(predicted)


def curves(sample: Array) -> Array:
    """Training curve of each mode over the seeds [STEPS, MODES]: the factor left of what there was at the start.

    Least squares of the residuals on those at the start. What leaks in from other modes through the kernel's
    fluctuation is independent of them, as the sign of the last layer's weights turns outputs around and leaves the
    kernel.
    """
    return (sample[:, 1:] * sample[:, :1]).sum(axis=0) / (sample[:, :1] ** 2).sum(axis=0)


def difference(norm: str, width: int, kernel: str = "ntk") -> tuple[Array, Array]:
    """Measured minus predicted curves [STEPS, MODES], and four standard errors of it by the jackknife over seeds."""
    measured, predicted = residuals(norm, width, kernel)
    n = len(measured)
    of = lambda keep: curves(measured[keep]) - curves(predicted[keep])
    left_out = np.stack([of(np.arange(n) != seed) for seed in range(n)])
    return of(np.arange(n)), 4 * np.sqrt((n - 1) * left_out.var(axis=0))


def outside(norm: str, kernel: str = "ntk") -> Array:
    """Distance [MODES] of the measured from the predicted curve at width 2048, in units of the finite-width band.

    Above 1 a curve is outside at some step. The band is four standard errors, and the bias: it falls as 1/width, and is
    at most a sixteenth of what width 128 shows against the kernel of infinite width, with four standard errors of that.
    """
    (distance, error), (narrow, narrow_error) = difference(norm, 2048, kernel), difference(norm, 128)
    return (np.abs(distance) / (error + (np.abs(narrow) + narrow_error) / 16)).max(axis=0)


NORMS = ("none", "weight_mean")


@pytest.mark.parametrize("norm", NORMS)
def test_every_leading_mode_trains_within_the_finite_width_band(norm: str) -> None:
    assert outside(norm).max() < 1


@pytest.mark.parametrize("norm", NORMS)
def test_the_nngp_kernel_lies_outside(norm: str) -> None:
    """Negative control: it is wrong in every mode, and every mode shows it."""
    assert outside(norm, "nngp").min() > 1


def test_the_raw_kernel_of_weight_mean_lies_outside() -> None:
    """Negative control: the missing projection adds a constant to the kernel, and so is seen in the leading mode."""
    assert outside("weight_mean", "raw")[0] > 1


@pytest.mark.parametrize("norm", NORMS)
def test_deviations_fall_as_the_root_of_the_width(norm: str) -> None:
    """Slope −1/2 of the deviation of single seeds, relative to the error at the start, in root mean square.

    Within four standard errors of a jackknife, which also tell it from a deviation that stays.
    """
    logs, errors = [], []
    for width, n in WIDTHS.items():
        measured, predicted = residuals(norm, width)
        squares = ((measured - predicted) ** 2).mean(axis=(1, 2)) / (measured[:, 0] ** 2).mean(axis=1)
        left_out = np.array([np.log(np.delete(squares, seed).mean()) / 2 for seed in range(n)])
        logs.append(np.log(squares.mean()) / 2)
        errors.append(np.sqrt((n - 1) * left_out.var()))
    slope, error = (logs[1] - logs[0]) / np.log(2048 / 128), np.hypot(*errors) / np.log(2048 / 128)
    assert abs(slope + 0.5) < 4 * error
    assert slope < -4 * error
