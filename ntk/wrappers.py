"""The plain module behind what may be wrapped around it, in surroundings that do not change its kernel."""

import sys
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from operator import attrgetter

import torch
from torch.nn.utils import parametrize

from ntk.errors import WrappedModelError
from ntk.state import preserve_state

_PRODUCTS = ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")
"""In torch.backends, what has a precision of its own for float32."""

Plain = tuple[torch.nn.Module, tuple[str, ...]]
"""A module without wrappers, and what was taken off it."""


@contextmanager
def plain_surroundings(model: torch.nn.Module) -> Generator[None, None, None]:
    """Switch off inside what changes how a model computes, or would keep what it computes.

    That is autocast, inference mode, products of reduced precision (TF32, bfloat16), the cache of parametrized weights,
    and the fast path of attention, which gives other outputs where a key is masked than the path with derivatives.

    Args:
        model: The network, for its devices.

    Yields:
        Nothing.
    """
    kinds = {"cpu", *(value.device.type for value in model.parameters())}
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(mode=False))
        for kind in kinds:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(full_precision())
        stack.enter_context(_parametrizations_afresh())
        stack.enter_context(_plain_attention())
        yield


@contextmanager
def _parametrizations_afresh() -> Generator[None, None, None]:
    """Neither use nor fill the cache of `torch.nn.utils.parametrize.cached`: it belongs to the parameters outside."""
    saved = parametrize._cache_enabled, parametrize._cache
    parametrize._cache_enabled, parametrize._cache = 0, {}
    try:
        yield
    finally:
        parametrize._cache_enabled, parametrize._cache = saved


@contextmanager
def _plain_attention() -> Generator[None, None, None]:
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def full_precision() -> Generator[None, None, None]:
    """Multiply float32 as float32 inside, whatever `torch.set_float32_matmul_precision` says.

    Yields:
        Nothing.
    """
    kinds = attrgetter(*_PRODUCTS)(torch.backends)
    saved = [kind.fp32_precision for kind in kinds]
    try:
        for kind in kinds:
            kind.fp32_precision = "ieee"
        yield
    finally:
        for kind, precision in zip(kinds, saved, strict=True):
            kind.fp32_precision = precision


@contextmanager
def measured(model: torch.nn.Module) -> Generator[Plain, None, None]:
    """Take wrappers off a model, and leave everything as it was afterwards.

    `torch.compile`, `DataParallel` and `DistributedDataParallel` are taken off, of submodules too, and parameters go by
    the names in the plain module. Autocast and inference mode around the call are off inside. Forward hooks run, as
    they are part of the function, once for each pass; backward hooks do not, as they are no part of it.

    Args:
        model: The network.

    Yields:
        The plain module, and a note for each wrapper.

    Raises:
        WrappedModelError: The model is, or contains, a module that cannot be differentiated by its weights.
    """
    with ExitStack() as stack:
        stack.enter_context(plain_surroundings(model))
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))  # functions compiled inside a forward
        stack.enter_context(preserve_state(model))
        plain, notes = _unwrapped(model)
        for module in plain.modules():
            module._backward_hooks.clear()
            module._backward_pre_hooks.clear()
        yield plain, notes


def _unwrapped(model: torch.nn.Module) -> Plain:
    """Take wrappers off a model in place; `preserve_state` puts them back.

    Raises:
        WrappedModelError: A module cannot be differentiated by its weights, or a wrapper has a forward hook.
    """
    notes: list[str] = []
    plain = _inner(model, "", notes)
    seen = set()
    queue = [("", plain)]
    while queue:
        path, module = queue.pop(0)
        if id(module) in seen:
            continue
        seen.add(id(module))
        _refuse(module, path)
        if module.__dict__.get("_compiled_call_impl") is not None:
            module.__dict__["_compiled_call_impl"] = None
            notes.append(_note("torch.compile", path))
        for name, child in module._modules.items():
            if child is not None:
                where = f"{path}.{name}" if path else name
                module._modules[name] = inner = _inner(child, where, notes)
                queue.append((where, inner))
    return plain, tuple(notes)


def _inner(module: torch.nn.Module, path: str, notes: list[str]) -> torch.nn.Module:
    """What is inside one module's wrappers.

    Raises:
        WrappedModelError: A wrapper has a forward hook, which would be taken off with it.
    """
    while True:
        if isinstance(module, torch.nn.DataParallel | torch.nn.parallel.DistributedDataParallel):
            what, inner = type(module).__name__, module.module
        elif type(module).__module__.startswith("torch._dynamo") and "_orig_mod" in module._modules:
            what, inner = "torch.compile", module.get_submodule("_orig_mod")
        else:
            return module
        if module._forward_hooks or module._forward_pre_hooks:
            raise WrappedModelError(
                f"{f'module {path!r}' if path else 'model'} has a forward hook on the wrapper of {what}, which is "
                "taken off for a kernel; register the hook on the module inside."
            )
        notes.append(_note(what, path))
        module = inner


def _note(what: str, path: str) -> str:
    return f"{what} taken off {f'module {path!r}' if path else 'the model'}"


def _refuse(module: torch.nn.Module, path: str) -> None:
    """Refuse a module whose weights cannot be exchanged for others.

    Raises:
        WrappedModelError: It is a ScriptModule or shards its parameters.
    """
    where = f"module {path!r}" if path else "model"
    if isinstance(module, torch.jit.ScriptModule):
        raise WrappedModelError(
            f"{where} is a ScriptModule, whose weights cannot be exchanged for others; pass the torch.nn.Module that "
            "it was made from."
        )
    if type(module).__name__ in ("FullyShardedDataParallel", "FSDPModule") or any(
        type(value).__name__ == "DTensor" for value in module._parameters.values()
    ):
        raise WrappedModelError(
            f"{where} is {type(module).__name__} with parameters that are spread over processes; gather them into a "
            "plain copy of the network and pass that."
        )
