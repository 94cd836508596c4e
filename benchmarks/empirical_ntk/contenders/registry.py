"""Who takes part. A contender is a function from a `Problem` and a device to a piece of work that returns values.

Work is a function without arguments; what it returns is a NumPy kernel, or, where eigenvalues are asked for, the
largest, the smallest, and the error stated for each. Compiling happens before, in the contender. No library is imported
here: each contender's process imports the one it needs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_DENSE = ("T1", "T2", "T3", "T4", "T5")


@dataclass(frozen=True)
class Contender:
    """Somebody who computes kernels.

    Attributes:
        name: Short name.
        says: The same in words.
        function: "module:function" in this package.
        distributions: Whose versions the report states.
        tasks: Names of the tasks it takes part in.
        cuda: Whether it takes part on a GPU.
        peer: Whether it is somebody else's library.
    """

    name: str
    says: str
    function: str
    distributions: tuple[str, ...]
    tasks: tuple[str, ...] = _DENSE
    cuda: bool = False
    peer: bool = True

    def load(self) -> Callable[..., Callable[[], Any]]:
        """Import it."""
        module, _, function = self.function.partition(":")
        return getattr(importlib.import_module(f"benchmarks.empirical_ntk.contenders.{module}"), function)


OURS = "ours"
GEMM = "gemm"

CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender(
            OURS,
            "ntk.empirical_ntk",
            "ours:kernel",
            ("torch",),
            (*_DENSE, "T6", "T6-float64", "T7", "T1-1GiB"),
            cuda=True,
            peer=False,
        ),
        Contender(
            GEMM,
            "one matrix product",
            "gemm:product",
            ("torch",),
            (*_DENSE, "T6", "T6-float64"),
            cuda=True,
            peer=False,
        ),
        Contender(
            "hand-written",
            "written out for linear layers and ReLU alone",
            "hand_written:linear_relu",
            ("torch",),
            ("T1", "T2", "T3"),
            cuda=True,
            peer=False,
        ),
        Contender(
            "nt-structured",
            "neural-tangents, structured derivatives",
            "neural_tangents:structured_derivatives",
            ("neural-tangents", "jax"),
        ),
        Contender(
            "nt-jacobian",
            "neural-tangents, Jacobian contraction",
            "neural_tangents:jacobian_contraction",
            ("neural-tangents", "jax"),
        ),
        Contender(
            "nt-products",
            "neural-tangents, NTK-vector products",
            "neural_tangents:ntk_vector_products",
            ("neural-tangents", "jax"),
        ),
        Contender(
            "torch-jacobian",
            "torch.func, Jacobian contraction (PyTorch's tutorial)",
            "torch_func:jacobian_contraction",
            ("torch",),
            (*_DENSE, "T6"),
            cuda=True,
        ),
        Contender(
            "torch-products",
            "torch.func, NTK-vector products (PyTorch's tutorial)",
            "torch_func:ntk_vector_products",
            ("torch",),
            cuda=True,
        ),
        Contender(
            "torch-whole-batch",
            "torch.func, jacrev of the whole batch",
            "torch_func:whole_batch",
            ("torch",),
            ("T6", "T6-float64"),
            cuda=True,
        ),
        Contender("nngeometry", "nngeometry, GramMatrix", "nngeometry:gram_matrix", ("nngeometry",), (*_DENSE, "T6")),
        Contender(
            "curvlinops",
            "curvlinops, Jacobian operators composed",
            "curvlinops:composed_jacobians",
            ("curvlinops-for-pytorch",),
            ("T1", "T3", "T4", "T5", "T6"),
        ),
        Contender("naive", "a loop of autograd.grad", "naive:loop", ("torch",), (*_DENSE, "T6"), cuda=True),
        Contender("ours-operator", "ntk.NtkOperator", "ours:operator", ("torch",), ("T7",), cuda=True, peer=False),
        Contender(
            "torch-eigenvalues", "torch.func, then eigvalsh", "torch_func:eigenvalues", ("torch",), ("T7",), cuda=True
        ),
        Contender(
            "ours-bounded",
            "ntk.empirical_ntk, max_memory",
            "ours:bounded",
            ("torch",),
            ("T1-1GiB",),
            cuda=True,
            peer=False,
        ),
    )
}
