"""Leave a model exactly as it was found."""

import random
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager
from operator import is_
from typing import Any

import numpy as np
import torch

Container = dict | list | set | deque


@contextmanager
def preserve_state(model: torch.nn.Module) -> Generator[torch.nn.Module, None, None]:
    """Restore the state of a model, and the random generators, whatever happens inside.

    Restored are, for every submodule: its attributes, such as the train or eval flag, with the entries of those that
    are dicts, lists or sets, which are its hooks, parameters, buffers and children too; buffers and other tensors that
    are its attributes, in place and bitwise; the `.grad` of each parameter, both the object and its values; the
    `requires_grad` flags. And the global generators of Python, NumPy and torch, the latter on the CPU and, where CUDA
    is initialized, on each CUDA device. Nothing is written that has not changed, so that graphs which hold a buffer
    stay usable. The values of the parameters are not copied: code inside must not change them.

    Args:
        model: The network to guard.

    Yields:
        The same model.
    """
    containers = _containers(model)
    tensors = {id(value): (value, value.detach().clone()) for value in _tensors(model)}
    parameters = [(value, value.requires_grad, value.grad) for value in model.parameters()]
    grads = [(grad, grad.detach().clone()) for _, _, grad in parameters if grad is not None]
    generators = random.getstate(), np.random.get_state(), torch.get_rng_state()  # ruff: ignore[numpy-legacy-random]
    cuda_generators = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield model
    finally:
        for container, entries in containers:
            _restore(container, entries)
        for tensor, values in (*tensors.values(), *grads):
            _write(tensor, values)
        for parameter, requires_grad, grad in parameters:
            if parameter.requires_grad != requires_grad:  # of one made in inference mode it cannot be set
                parameter.requires_grad_(requires_grad)
            if parameter.grad is not grad:
                parameter.grad = grad
        random.setstate(generators[0])
        np.random.set_state(generators[1])  # ruff: ignore[numpy-legacy-random]
        torch.set_rng_state(generators[2])
        if cuda_generators is not None:
            torch.cuda.set_rng_state_all(cuda_generators)


@contextmanager
def forget_attributes(model: torch.nn.Module) -> Generator[None, None, None]:
    """Undo what a model notes inside: attributes of its modules, and entries of those that are dicts, lists or sets.

    Args:
        model: The network.

    Yields:
        Nothing.
    """
    containers = _containers(model)
    try:
        yield
    finally:
        for container, entries in containers:
            _restore(container, entries)


def random_state() -> tuple:
    """The state of the generators of Python, NumPy and torch on the CPU, to be compared with another."""
    state: Any = np.random.get_state()  # ruff: ignore[numpy-legacy-random]
    of_numpy = tuple(part.tobytes() if isinstance(part, np.ndarray) else part for part in state)
    return random.getstate(), of_numpy, torch.get_rng_state().numpy().tobytes()


def _containers(model: torch.nn.Module) -> list[tuple[Container, Container | tuple[()]]]:
    """Attributes of every module, and those of them that are containers, each with a copy of its entries."""
    attributes = [module.__dict__ for module in model.modules()]
    held = [value for entries in attributes for value in entries.values() if isinstance(value, Container)]
    return [(container, container.copy() if container else ()) for container in (*attributes, *held)]


def _restore(container: Container, entries: Container | tuple[()]) -> None:
    """Put the entries of a container back, in the same object, which handles of hooks refer to."""
    if _identical(container, entries):
        return
    container.clear()
    if isinstance(container, dict | set):
        container.update(entries)
    else:
        container.extend(entries)


def _identical(a: Container, b: Container | tuple[()]) -> bool:
    if len(a) != len(b) or not all(map(is_, a, b)):
        return False
    return not (isinstance(a, dict) and isinstance(b, dict)) or all(map(is_, a.values(), b.values()))


def _tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    """Buffers, and tensors that are plain attributes of a module."""
    found = [value for module in model.modules() for value in (*module.__dict__.values(), *module._buffers.values())]
    return [value for value in found if isinstance(value, torch.Tensor) and not torch.nn.parameter.is_lazy(value)]


def _write(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Give a tensor its values back if they changed: writing what is there would invalidate graphs that hold it."""
    if not _same_bits(tensor, values):
        with torch.inference_mode(mode=tensor.is_inference()), torch.no_grad():
            tensor.copy_(values)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same bits; not a number differs from itself."""
    try:
        first, second = (value.detach().resolve_conj().reshape(-1).view(torch.uint8) for value in (a, b))
        return first.equal(second)
    except RuntimeError:  # fake, meta and sparse tensors have no bits to compare
        return False
