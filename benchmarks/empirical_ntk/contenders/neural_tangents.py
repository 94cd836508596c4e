"""neural-tangents: its three implementations, compiled beforehand, on the same weights in the layout of its stax."""

from __future__ import annotations

import importlib.util
import os
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core
import numpy as np
from jax import lax
from jax import numpy as jnp
from jax._src.interpreters import ad

from benchmarks.empirical_ntk.contenders.blocks import block_size, budget, in_blocks
from benchmarks.empirical_ntk.problem import ROOT, Problem
from benchmarks.empirical_ntk.tasks import OUTPUTS, RESIDUAL_UNITS

Params = dict[str, Any]

# XLA takes as many threads as there are processors that it may use, whatever OMP_NUM_THREADS says.
if "OMP_NUM_THREADS" in os.environ:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(os.environ["OMP_NUM_THREADS"])])

# The door of `ntk` to neural-tangents, without `ntk` and with it torch: the memory is to be that of JAX alone.
_specification = importlib.util.spec_from_file_location("compat", ROOT / "ntk" / "analytic" / "compat.py")
_compat = importlib.util.module_from_spec(_specification)
_specification.loader.exec_module(_compat)
nt = _compat.nt


def jacobian_contraction(problem: Problem, device: str) -> Callable[[], np.ndarray]:
    """`NtkImplementation.JACOBIAN_CONTRACTION`."""
    implementation = nt.NtkImplementation.JACOBIAN_CONTRACTION
    return _kernel(problem, implementation, lambda b: 4 * b * OUTPUTS * problem.parameters)


def ntk_vector_products(problem: Problem, device: str) -> Callable[[], np.ndarray]:
    """`NtkImplementation.NTK_VECTOR_PRODUCTS`."""
    implementation = nt.NtkImplementation.NTK_VECTOR_PRODUCTS
    row = lambda b: problem.parameters + 3 * b * problem.activations
    return _kernel(problem, implementation, lambda b: 4 * b * OUTPUTS * row(b))


def structured_derivatives(problem: Problem, device: str) -> Callable[[], np.ndarray]:
    """`NtkImplementation.STRUCTURED_DERIVATIVES`."""
    _supply_former_jax()
    return _kernel(problem, nt.NtkImplementation.STRUCTURED_DERIVATIVES, lambda b: 0)


def _kernel(problem: Problem, implementation: Any, bytes_of: Callable[[int], float]) -> Callable[[], np.ndarray]:
    """Compiled work, in blocks where the whole does not fit."""
    apply, params, x = _network(problem)
    n = len(x)
    size = block_size(n, bytes_of, budget())
    axes = (-1,) if problem.task.reduce == "trace" else ()
    function = nt.empirical_ntk_fn(apply, trace_axes=axes, diagonal_axes=(), vmap_axes=0, implementation=implementation)
    if size == n:
        compiled = jax.jit(lambda x, w: function(x, None, w)).lower(x, params).compile()
        return lambda: np.asarray(compiled(x, params))
    compiled = jax.jit(function).lower(x[:size], x[:size], params).compile()
    block = lambda i, j: np.asarray(compiled(x[i : i + size], x[j : j + size], params))
    return lambda: in_blocks(block, n, size)


def _network(problem: Problem) -> tuple[Callable[[Params, jax.Array], jax.Array], Params, jax.Array]:
    """The network as a function, its weights [fan_in, fan_out] or [h, w, in, out], and the batch, channels last."""
    layout = {2: (1, 0), 4: (2, 3, 1, 0), 1: (0,)}
    params = {name: jnp.asarray(w.transpose(layout[w.ndim])) for name, w in problem.weights.items()}
    x = problem.x.transpose(0, 2, 3, 1) if problem.x.ndim == 4 else problem.x
    return {"conv": _conv_net, "resnet20": _resnet20}.get(problem.task.network, _mlp), params, jnp.asarray(x)


def _relu(x: jax.Array) -> jax.Array:
    return jnp.maximum(x, 0)


def _dense(params: Params, name: str, x: jax.Array) -> jax.Array:
    return x @ params[f"{name}.weight"] + params[f"{name}.bias"]


def _conv(params: Params, name: str, x: jax.Array, stride: int = 1) -> jax.Array:
    weight = params[f"{name}.weight"]
    padding = [(weight.shape[0] // 2,) * 2] * 2
    y = lax.conv_general_dilated(x, weight, (stride,) * 2, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return y + params[f"{name}.bias"]


def _mlp(params: Params, x: jax.Array) -> jax.Array:
    """Layers of nn.Sequential: 0, 2, 4 and so on, with ReLU between them."""
    names = sorted({int(name.partition(".")[0]) for name in params})
    for name in names[:-1]:
        x = _relu(_dense(params, str(name), x))
    return _dense(params, str(names[-1]), x)


def _conv_net(params: Params, x: jax.Array) -> jax.Array:
    for name, stride in (("0", 1), ("2", 2), ("4", 2)):
        x = _relu(_conv(params, name, x, stride))
    return _dense(params, "8", x.mean((1, 2)))


def _resnet20(params: Params, x: jax.Array) -> jax.Array:
    x = _relu(_conv(params, "0", x))
    for number, (fan_in, fan_out, stride) in enumerate(RESIDUAL_UNITS, start=2):
        inner = _relu(_conv(params, f"{number}.first", x, stride))
        skip = _conv(params, f"{number}.shortcut", x, stride) if fan_in != fan_out else x
        x = _relu(_conv(params, f"{number}.second", inner) + skip)
    return _dense(params, "13", x.mean((1, 2)))


class _Unknown:
    """A value of the linear part, which partial evaluation does not know."""

    def is_known(self) -> bool:
        """Never."""
        return False


def _linearize(function: Any, *primals: Any, has_aux: bool) -> tuple[Any, list[_Unknown], Any, Any]:
    """What `ad.linearize` returned to neural-tangents 0.6.5: outputs, their tangents, the linear part."""
    outputs, linear = jax.linearize(lambda *args: function.call_wrapped(*args), *primals)
    closed = jax.make_jaxpr(linear)(*primals)
    return outputs, [_Unknown() for _ in outputs], closed.jaxpr, closed.consts


def _supply_former_jax() -> None:
    """Give the structured derivatives the five names of a former JAX that they use when they are called.

    `ntk.analytic.compat` supplies those that the import needs. This process does nothing else afterwards.
    """
    module = importlib.import_module("neural_tangents._src.empirical")
    former = {
        "linearize": _linearize,
        "reducing_transposes": {},
        "config": types.SimpleNamespace(jax_enable_checks=False),
    }
    module.ad = types.SimpleNamespace(**{**vars(ad), **former})
    module.core = types.SimpleNamespace(**{**vars(module.core), "DShapedArray": type(None)})
    jax.extend.core.Primitive.map_primitive = False
