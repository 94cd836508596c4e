"""The only door to neural-tangents: imports 0.6.5 under a current JAX, without TensorFlow.

Two things stand between the released package and a current JAX. It imports eight names from places that JAX has since
emptied (``jax.core``, ``jax.util``, ``jax.interpreters.ad``), and its root imports ``neural_tangents.experimental``,
which needs TensorFlow. Both are supplied while the package is being imported and taken away afterwards: JAX and the
module table are left as they were found.

Importing this module imports neural-tangents; importing :mod:`ntk.analytic` does not.
"""

import importlib
import sys
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import jax.core
import jax.extend.core
import jax.interpreters.ad

INSTALL_COMMAND = "pip install --no-deps neural-tangents==0.6.5"
"""How to install neural-tangents without the TensorFlow that its metadata asks for."""

_PACKAGE = "neural_tangents"
_TENSORFLOW_PART = "neural_tangents.experimental"
_MOVED_TO_EXTEND = ("Jaxpr", "JaxprEqn", "Literal", "Primitive", "Var")


def _strict_map(function: Callable[..., Any], *sequences: Iterable[Any]) -> list[Any]:
    """``map`` over sequences of equal length, as a list (what ``jax.util.safe_map`` was)."""
    return [function(*items) for items in zip(*sequences, strict=True)]


def _strict_zip(*sequences: Iterable[Any]) -> list[Any]:
    """``zip`` of sequences of equal length, as a list (what ``jax.util.safe_zip`` was)."""
    return list(zip(*sequences, strict=True))


@contextmanager
def _attribute(module: ModuleType, name: str, value: object) -> Generator[None]:
    """Set a missing attribute of a module for a while; leave a present one alone."""
    if name in vars(module):
        yield
        return
    setattr(module, name, value)
    try:
        yield
    finally:
        delattr(module, name)


@contextmanager
def _module(name: str, module: ModuleType) -> Generator[None]:
    """Enter a module in the module table for a while; leave a present one alone."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = module
    try:
        yield
    finally:
        del sys.modules[name]


def _former_util() -> ModuleType:
    """Build what ``jax.util`` held of the names that neural-tangents imports."""
    util = ModuleType("jax.util", "The two names that neural-tangents imports from the former jax.util.")
    util.__dict__.update(safe_map=_strict_map, safe_zip=_strict_zip)
    return util


@contextmanager
def _former_jax() -> Generator[None]:
    """Supply, for the length of the import, the names that JAX moved or dropped."""
    with ExitStack() as stack:
        for name in _MOVED_TO_EXTEND:
            stack.enter_context(_attribute(jax.core, name, getattr(jax.extend.core, name)))
        # A primitive that JAX never binds any more; neural-tangents only uses it as a key of its table of rules.
        dead_primitive = jax.extend.core.Primitive("zeros_like")
        stack.enter_context(_attribute(jax.interpreters.ad, "zeros_like_p", dead_primitive))
        stack.enter_context(_module("jax.util", _former_util()))
        yield


def _import_neural_tangents() -> ModuleType:
    """Import neural-tangents, or return it if something else imported it before.

    Raises:
        ImportError: If neural-tangents is not installed; states the install command.
        ModuleNotFoundError: If something that neural-tangents needs is not installed.
    """
    loaded = sys.modules.get(_PACKAGE)
    if loaded is not None:
        return loaded
    placeholder = ModuleType(_TENSORFLOW_PART, "Stands in for the TensorFlow part while neural-tangents is imported.")
    try:
        with _former_jax(), _module(_TENSORFLOW_PART, placeholder):
            package = importlib.import_module(_PACKAGE)
    except ModuleNotFoundError as error:
        if error.name != _PACKAGE:
            raise
        message = (
            "neural_tangents: must be installed for ntk.analytic.compat, and is not (the closed-form kernels of "
            f"ntk.analytic do not need it). Install it, without the TensorFlow it asks for, by: {INSTALL_COMMAND}"
        )
        raise ImportError(message) from error
    if getattr(package, "experimental", None) is placeholder:
        del (
            package.experimental
        )  # a later `import neural_tangents.experimental` finds the real one, TensorFlow permitting
    return package


neural_tangents: ModuleType = _import_neural_tangents()
nt: ModuleType = neural_tangents
stax: ModuleType = neural_tangents.stax

__all__ = ["INSTALL_COMMAND", "neural_tangents", "nt", "stax"]
