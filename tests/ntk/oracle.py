"""Networks under test, and the kernel as a beginner would write it: a loop of whole-batch gradients."""

import hashlib
import io
import random
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from ntk.errors import MemoryBudgetError


class TiedTwice(nn.Module):
    """One module called twice, and one weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 5)
        self.first = nn.Linear(5, 5, bias=False)
        self.second = nn.Linear(5, 5, bias=False)
        self.second.weight = self.first.weight
        self.gain = nn.Parameter(torch.tensor(0.7))
        self.head = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.inner(torch.tanh(self.inner(x))))
        return self.head(self.gain * self.second(torch.tanh(self.first(x))))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        h = self.embed(tokens)
        return self.head(self.norm(h + self.attention(h, h, h)[0]).mean(1))


def conv_batch_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 5, 3, stride=2),
        nn.BatchNorm2d(5, affine=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 3),
    )


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 2))


def scalar_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1), nn.Flatten(0))


CASES = {
    "conv with BatchNorm": (conv_batch_norm, lambda n: torch.randn(n, 3, 6, 6)),
    "mlp": (mlp, lambda n: torch.randn(n, 4)),
    "1-d output": (scalar_mlp, lambda n: torch.randn(n, 4)),
    "tied and called twice": (TiedTwice, lambda n: torch.randn(n, 5)),
    "attention on tokens": (Attention, lambda n: torch.randint(0, 11, (n, 4))),
}


def build(case: str, n1: int = 5, n2: int = 4, seed: int = 0) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Network in float64 and train mode, with two batches."""
    torch.manual_seed(seed)
    make, data = CASES[case]
    model, x1, x2 = make().double(), data(n1), data(n2)
    return (model, x1.double(), x2.double()) if x1.is_floating_point() else (model, x1, x2)


def jacobian(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Parameter name -> [n, o, *shape], one gradient of one output of the whole batch at a time."""
    saved = {name: buffer.clone() for name, buffer in model.named_buffers()}
    output = model(x).reshape(len(x), -1)
    own = {name: value for name, value in model.named_parameters() if value.requires_grad}
    names, parameters = zip(*own.items(), strict=True)
    gradients = [
        torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        for entry in output.flatten()
    ]
    for name, buffer in model.named_buffers():
        buffer.copy_(saved[name])
    return {
        name: torch.stack([row[k] for row in gradients]).reshape(*output.shape, *parameters[k].shape)
        for k, name in enumerate(names)
    }


def rows(part: torch.Tensor) -> torch.Tensor:
    """[n, o, parameter.numel()]"""
    return part.reshape(*part.shape[:2], -1)


def kernel(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> torch.Tensor:
    """[n1, n2, o, o] from two Jacobians."""
    return sum(torch.einsum("iap,jbp->ijab", rows(first[k]), rows(second[k])) for k in first)


def least_memory(compute: Callable[..., object]) -> int:
    """Smallest max_memory that is enough, as the error about less than that names it."""
    with pytest.raises(MemoryBudgetError) as refusal:
        compute(max_memory=1)
    return int(re.search(r"max_memory=(\d+) would do", str(refusal.value))[1])


def state_hash(model: nn.Module) -> str:
    """Digest of everything that a measurement must leave alone."""
    digest = hashlib.sha256()
    stream = io.BytesIO()
    torch.save({k: v.clone() for k, v in model.state_dict().items()}, stream)
    digest.update(stream.getvalue())
    for module in model.modules():
        for name, value in module.__dict__.items():
            digest.update(f"{name} {_identity(value)}".encode())
    for parameter in model.parameters():
        digest.update(bytes([parameter.requires_grad]))
        digest.update(b"no grad" if parameter.grad is None else parameter.grad.numpy().tobytes() + b"grad")
        digest.update(f"{id(parameter.grad)} {_identity(parameter._backward_hooks)}".encode())
    digest.update(repr((random.getstate(), np.random.get_state()[1:3])).encode())  # ruff: ignore[numpy-legacy-random]
    digest.update(np.random.get_state()[1].tobytes())  # ruff: ignore[numpy-legacy-random]
    digest.update(torch.get_rng_state().numpy().tobytes())
    return digest.hexdigest()


def _identity(value: object) -> str:
    """Which object it is; the objects in it, if it is a container; and its values, if it is a tensor."""
    inside = (*value.keys(), *value.values()) if isinstance(value, dict) else value
    entries = [str(id(entry)) for entry in inside] if isinstance(value, dict | list | set) else []
    bits = value.detach().numpy().tobytes().hex() if isinstance(value, torch.Tensor) else ""
    return f"{id(value)} {entries} {bits}"
