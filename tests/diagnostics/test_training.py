"""The training loop is SGD, step by step, with what a method adds to a step and nothing else."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import mimicnorm
from diagnostics.training import accuracy, train

SETTINGS: dict[str, Any] = {
    "method": None,
    "lr": 0.1,
    "epochs": 3,
    "batch_size": 4,
    "momentum": 0.9,
    "weight_decay": 0.01,
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def data(n: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(n, 5, generator=generator(1), dtype=torch.float64)
    return x, torch.randint(3, (n,), generator=generator(2))


def network(**options: Any) -> nn.Sequential:
    return mimicnorm.models.fcnn(5, 8, 2, 3, generator=generator(), **options).double()


def run(net: nn.Module, x: torch.Tensor, y: torch.Tensor, **changes: Any) -> list[dict[str, torch.Tensor]]:
    """The state of the network after each epoch."""
    settings = {**SETTINGS, "generator": generator(5), **changes}
    return [copy.deepcopy(trained.state_dict()) for trained in train(net, x, y, **settings)]


def by_hand(net: nn.Module, x: torch.Tensor, y: torch.Tensor, *, method: mimicnorm.Method | None = None) -> None:
    """SGD with momentum and weight decay written out, in the order of batches that the loop documents."""
    draws = generator(5)
    parameters = list(net.parameters())
    velocity = [torch.zeros_like(p) for p in parameters]
    for _ in range(3):
        order = torch.randperm(len(x), generator=draws)
        torch.randint(2**31, (), generator=draws)  # The seed of the epoch's dropout masks.
        for batch in order.split(4):
            loss = nn.functional.cross_entropy(net(x[batch]), y[batch])
            gradients = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                for p, v, g in zip(parameters, velocity, gradients, strict=True):
                    v.mul_(0.9).add_(g + 0.01 * p)
                    p.sub_(0.1 * v)
                for projection in [] if method is None else method.row_projections(net).items():
                    weight = net.get_parameter(projection[0])
                    weight.copy_(weight - weight.mean(dim=1, keepdim=True))


@pytest.mark.parametrize(
    "method",
    [None, mimicnorm.NoNorm(), mimicnorm.MimicNorm(linear=True, last_batch_norm=False), mimicnorm.BatchNorm()],
    ids=["as it stands", "none", "weight mean", "batch_norm"],
)
def test_it_is_gradient_descent_by_hand(method):
    x, y = data()
    one = network() if method is None else mimicnorm.convert(network(), method, generator=generator())
    other = copy.deepcopy(one)
    start = copy.deepcopy(one.state_dict())
    states = run(one, x, y, method=method)
    by_hand(other, x, y, method=method)
    assert len(states) == 3
    for name, value in other.state_dict().items():
        assert torch.allclose(states[-1][name], value, rtol=1e-10, atol=1e-13), name
    assert not torch.allclose(states[-1]["linear1.weight"], start["linear1.weight"])


def test_weight_mean_is_kept_only_where_the_method_is_attached():
    method = mimicnorm.MimicNorm(linear=True)
    x, y = data()
    nets = [mimicnorm.convert(network(), method, generator=generator()) for _ in range(2)]
    kept, lost = (run(net, x, y, method=m)[-1]["linear2.weight"] for net, m in zip(nets, (method, None), strict=True))
    assert kept.mean(dim=1).abs().max() < 1e-15
    assert lost.mean(dim=1).abs().max() > 1e-4


def test_a_smaller_last_batch_is_dropped():
    x, y = data(10)
    net = network()
    seen: list[int] = []
    net.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    run(net, x, y)
    assert seen == [4] * 6


def test_every_epoch_shuffles_anew_and_uses_no_example_twice():
    x, y = data(12)
    net = network()
    batches: list[torch.Tensor] = []
    net.register_forward_pre_hook(lambda module, args: batches.append(args[0]))
    run(net, x, y)
    epochs = [torch.cat(batches[i : i + 3]) for i in (0, 3, 6)]
    for epoch in epochs:
        assert torch.equal(epoch[:, 0].sort().values, x[:, 0].sort().values)
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[1], epochs[2])


def test_a_loss_that_is_not_finite_stops_the_epoch_before_the_step():
    x, y = data()
    x[:] = float("nan")
    net = network(affine=False)
    start = copy.deepcopy([p.detach() for p in net.parameters()])
    calls: list[int] = []
    net.register_forward_pre_hook(lambda module, args: calls.append(1))
    assert len(run(net, x, y)) == 3
    assert len(calls) == 3, "one forward pass per epoch finds the loss useless"
    assert all(torch.equal(p, s) for p, s in zip(net.parameters(), start, strict=True))


def test_training_is_determined_by_its_generator():
    x, y = data()
    nets = [mimicnorm.models.fcnn(5, 8, 2, 3, generator=generator()).double() for _ in range(3)]
    for net in nets:
        net.append(nn.Dropout(0.5))
    first = run(nets[0], x, y)[-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        second = run(nets[1], x, y)[-1]
    other = run(nets[2], x, y, generator=generator(6))[-1]
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["linear1.weight"], other["linear1.weight"])


def global_state() -> tuple[bytes, Any, bytes, int]:
    """Of the generators of torch, Python and numpy."""
    mersenne = np.random.get_bit_generator().state["state"]
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), mersenne["key"].tobytes(), mersenne["pos"]


def test_the_global_generators_are_as_before():
    x, y = data()
    net = network().append(nn.Dropout(0.5))
    before = global_state()
    run(net, x, y)
    assert global_state() == before


def test_an_evaluation_between_epochs_leaves_the_modes_as_they_are():
    x, y = data()
    modes: list[tuple[bool, bool]] = []
    net = network()
    frozen = next(m for m in net.modules() if isinstance(m, nn.BatchNorm1d)).eval()
    net.register_forward_pre_hook(lambda module, args: modes.append((module.training, frozen.training)))
    for trained in train(net, x, y, **SETTINGS, generator=generator(5)):
        accuracy(trained, x, y)
    assert modes == [*[(True, False)] * 3, (False, False)] * 3


class Scores(nn.Module):
    """Returns given logits, whatever comes in."""

    def __init__(self, logits: list[list[float]]) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits


def test_accuracy_is_the_share_of_right_answers_in_percent():
    scores = Scores([[2.0, 1.0], [0.0, 3.0], [5.0, 1.0], [1.0, 0.0]])
    assert accuracy(scores, torch.zeros(4, 1), torch.tensor([0, 1, 1, 1])) == 50.0


def test_nan_is_never_right():
    nan = float("nan")
    scores = Scores([[nan, nan], [nan, 1.0], [2.0, 1.0], [float("inf"), 0.0]])
    labels = torch.tensor([0, 0, 0, 0])
    assert scores.logits.argmax(dim=1).tolist() == [0, 0, 0, 0], "argmax alone takes NaN for the largest"
    assert accuracy(scores, torch.zeros(4, 1), labels) == 25.0


@pytest.mark.parametrize("training", [True, False])
def test_accuracy_is_taken_in_eval_mode_and_leaves_the_network_as_it_was(training):
    x, y = data()
    net = network().train(training)
    state = copy.deepcopy(net.state_dict())
    modes: list[bool] = []
    net[1].register_forward_pre_hook(lambda module, args: modes.append(module.training))
    accuracy(net, x, y)
    assert modes == [False]
    assert [m.training for m in net.modules()] == [training] * len(list(net.modules()))
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
