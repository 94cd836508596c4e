"""A plain training loop: SGD on cross-entropy, with whatever a method must do around a step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

import mimicnorm
import ntk


def train(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    method: mimicnorm.Method | None,
    lr: float,
    epochs: int,
    batch_size: int,
    momentum: float,
    weight_decay: float,
    generator: torch.Generator,
) -> Iterator[nn.Module]:
    """Trains in place and yields the network after each epoch; a loss that is no longer finite ends the epoch early.

    Args:
        network: The network, in train mode.
        x: Inputs [n, ...].
        y: Class indices [n].
        method: The method that the network was converted to; its step hook is attached.
        lr: Learning rate.
        epochs: Passes over the data.
        batch_size: Examples per step; a smaller last batch is dropped.
        momentum: Of SGD.
        weight_decay: On all parameters.
        generator: Shuffles, and seeds the dropout masks.

    Yields:
        The network.
    """
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    if method is not None:
        method.attach(network, optimizer)
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=generator)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            for batch in order.split(batch_size):
                if len(batch) < batch_size:
                    continue
                loss = torch.nn.functional.cross_entropy(network(x[batch]), y[batch])
                if not torch.isfinite(loss):
                    break
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        yield network


def accuracy(network: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of examples classified correctly, in percent, in eval mode; a network that outputs NaN is right on none.

    Args:
        network: The network; left as it was.
        x: Inputs [n, ...].
        y: Class indices [n].
    """
    with ntk.preserve_state(network), torch.no_grad():
        logits = network.eval()(x)
    right = (logits.argmax(dim=1) == y) & torch.isfinite(logits).all(dim=1)
    return 100 * right.double().mean().item()
