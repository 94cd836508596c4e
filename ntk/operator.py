"""The NTK as a linear operator: products with vectors, and no matrix.

Θ v = J C Pᵀ P Jᵀ v takes one vector-Jacobian product, u = Jᵀ v, and one Jacobian-vector product, J w. The first is a
backward pass through a graph that is kept. The second is, for one vector, the derivative of u by v, a backward pass
through the graph of the first; for several at once it is forward-mode differentiation, whose cost per vector is lower
in a block. Where an operation has no rule for the one, the other serves.
"""

import warnings
from collections.abc import Mapping

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator

from ntk.checks import check_inputs, check_model, describe_mode
from ntk.contraction import CHUNK_BYTES, MAX_CHUNK
from ntk.errors import NoJacobianProductError, NonFiniteKernelError, NoParametersError, UnknownNameError
from ntk.forward import Evaluation, run_batch
from ntk.outputs import OutputChoice
from ntk.parameters import ParameterChoice, select_parameters
from ntk.projection import Projection, apply_projection, resolve_projection
from ntk.snapshot import Snapshot
from ntk.statistics import Statistics

REDUCTIONS = ("none", "trace", "sum")

_REFUSALS = (RuntimeError, NotImplementedError)
"""What autograd raises where an operation has no rule of the kind asked for."""


class NtkOperator(LinearOperator):
    """Neural tangent kernel of a network on one batch, known by its products with vectors.

    The kernel is that of `ntk.empirical_ntk` with the same arguments, as `KernelResult.flatten` lays it out: row
    i * o + k belongs to output k of example i. It is taken at the weights, buffers and flags of the moment of
    construction, whatever becomes of the model later. With BatchNorm in train mode x is one batch, and the terms
    through its statistics are included. The graph of the batch is kept in memory as long as the operator.

    Attributes:
        shape: [n*o, n*o] for reduce="none", else [n, n].
        dtype: Type that products are computed and returned in.
        reduce: "none", "trace" or "sum".
        mode: As in `KernelResult`.
        statistics: As in `KernelResult`.
        parametrization: As in `KernelResult`.
        projection: As in `KernelResult`.
        chunk: Vectors that are pulled back at once at most.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        x: torch.Tensor,
        *,
        reduce: str = "none",
        projection: Projection | Mapping[str, Projection] | None = None,
        params: ParameterChoice = None,
        dtype: torch.dtype | None = None,
        chunk: int | None = None,
        batch_statistics: str = "batch",
        reference: torch.Tensor | None = None,
        output: OutputChoice = None,
    ) -> None:
        """Run the batch, and see that products with its Jacobian can be had.

        Args:
            model: Network that maps [n, ...] to [n, o], or to [n] for one output. It is left as it was.
            x: [n, ...]
            reduce: "none"; "trace", the mean over outputs, for which a product costs o pairs of passes; or "sum".
            projection: As in `ntk.empirical_ntk`; it must be differentiable, as its transpose is needed.
            params: As in `ntk.empirical_ntk`.
            dtype: torch.float32 or torch.float64 to compute in; None for the type of the model.
            chunk: Vectors to multiply at once at most; None chooses by memory.
            batch_statistics: As in `ntk.empirical_ntk`.
            reference: As in `ntk.empirical_ntk`.
            output: As in `ntk.empirical_ntk`.

        Raises:
            UnknownNameError: reduce, a parameter or a key of the projection does not exist.
            NoJacobianProductError: An operation of the model has no rule for J w, or one that disagrees with Jᵀ v.
            ValueError: chunk is not positive.
        """
        if reduce not in REDUCTIONS:
            raise UnknownNameError("reduce", reduce, REDUCTIONS)
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be at least one vector, or None; got {chunk}.")
        statistics = Statistics(batch_statistics, reference)
        check_inputs(x, None, dtype, reference)
        self._x = x.detach().clone()
        self._snapshot = Snapshot(model, Evaluation(dtype, statistics, output))
        with self._snapshot.active():
            plain = self._snapshot.plain
            check_model(plain, statistics.smallest_batch(x))
            multipliers, scaled = select_parameters(plain, params)
            own = dict(plain.named_parameters())
            chosen = {name: own[name] for name in multipliers}
            self._projections, self.projection = resolve_projection(projection, chosen)
            self.reduce, self.parametrization = reduce, "scaled" if scaled else "standard"
            self.mode, self.statistics = describe_mode(
                plain, two_batches=False, statistics=statistics.describe(two_batches=False)
            )
            largest = run_batch(plain, x, multipliers, self._snapshot.evaluation, "x").activation_bytes
        self._multipliers = multipliers
        self._refused: dict[str, str] = {}
        self._record()
        n, o = self._output.shape
        size = n * o if reduce == "none" else n
        super().__init__(np.dtype(str(self._output.dtype).removeprefix("torch.")), (size, size))
        row_bytes = self._output.element_size() * sum(p.numel() for p in self._leaves.values())
        room = max(1, min(MAX_CHUNK, CHUNK_BYTES // max(4 * largest, 2 * row_bytes)))
        self.chunk = room if chunk is None else chunk
        self._check_adjoint()

    def describe(self) -> str:
        """The convention in one line, as `KernelResult.describe` gives it."""
        norm = self.mode if self.statistics is None else f"{self.mode} mode, statistics {self.statistics}"
        return (
            f"NTK operator; reduce {self.reduce}; {self.parametrization} parametrization; "
            f"projection {self.projection or 'none'}; {norm}; {self.dtype}"
        )

    def __repr__(self) -> str:
        """Size and convention."""
        return f"NtkOperator({self.shape[0]}x{self.shape[1]}; {self.describe()})"

    def _matvec(self, vector: np.ndarray) -> np.ndarray:
        return self._matmat(vector.reshape(-1, 1))[:, 0]

    def _matmat(self, vectors: np.ndarray) -> np.ndarray:
        """Θ times the columns of [size, k].

        Raises:
            NonFiniteKernelError: A product is not finite although the vectors are.
        """
        rows = torch.as_tensor(np.ascontiguousarray(vectors.T), dtype=self._output.dtype, device=self._output.device)
        n, o = self._output.shape
        if self.reduce == "none":
            products = self._product(rows.reshape(-1, n, o)).reshape(len(rows), -1)
        elif self.reduce == "sum":
            products = self._product(rows[:, :, None].expand(-1, n, o)).sum(-1)
        else:
            seeds = torch.einsum("kn,ab->kanb", rows, torch.eye(o, dtype=rows.dtype, device=rows.device))
            products = self._product(seeds.reshape(-1, n, o)).reshape(-1, o, n, o).diagonal(dim1=1, dim2=3).mean(-1)
        result = products.cpu().numpy().T
        if not np.isfinite(result).all() and np.isfinite(vectors).all():
            raise NonFiniteKernelError(
                "a product with the kernel is not finite although the output is: a gradient overflows or is undefined. "
                "Pass dtype=torch.float64, or look for a square root or norm at zero."
            )
        return result

    def _adjoint(self) -> "NtkOperator":
        return self

    def _transpose(self) -> "NtkOperator":
        return self

    def _record(self) -> None:
        """Build the graph of the batch, and that of its vector-Jacobian product.

        Raises:
            NoParametersError: The output is not connected to any selected parameter.
        """
        leaves = {name: self._snapshot.parameters[name].detach().requires_grad_(True) for name in self._multipliers}
        with self._snapshot.active(), torch.enable_grad():
            output = self._snapshot(self._x, leaves)
            self._output = output.reshape(len(output), -1)
        if not self._output.requires_grad:
            raise NoParametersError(
                f"the model output depends on none of the selected parameters {sorted(leaves)[:4]}; select parameters "
                "that the forward pass uses, and remove .detach(), .data and torch.no_grad() from it."
            )
        self._seed = torch.zeros_like(self._output, requires_grad=True)
        with torch.enable_grad():
            pulled = torch.autograd.grad(
                self._output, list(leaves.values()), self._seed, create_graph=True, allow_unused=True
            )
        used = {name: u for name, u in zip(leaves, pulled, strict=True) if u is not None}
        self._leaves = {name: leaves[name] for name in used}
        self._pulled = used

    def _product(self, cotangents: torch.Tensor) -> torch.Tensor:
        """J C Pᵀ P Jᵀ of each of [k, n, o], in chunks."""
        products = [self._push(self._weigh(self._pull(part))[0]) for part in cotangents.split(self.chunk)]
        return torch.cat(products)

    def _pull(self, cotangents: torch.Tensor) -> dict[str, torch.Tensor]:
        """Jᵀ v: parameter name -> [k, *shape].

        Raises:
            OutOfMemoryError: A chunk of vectors does not fit the device.
        """
        inputs = list(self._leaves.values())

        def backward(seeds: torch.Tensor, *, batched: bool) -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(self._output, inputs, seeds, retain_graph=True, is_grads_batched=batched)

        if len(cotangents) > 1:
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)
                    return dict(zip(self._leaves, backward(cotangents, batched=True), strict=True))
            except torch.OutOfMemoryError:
                raise
            except _REFUSALS:  # an operation without a batching rule: one by one then
                pass
        single = [backward(seed, batched=False) for seed in cotangents]
        return {name: torch.stack(parts) for name, parts in zip(self._leaves, zip(*single, strict=True), strict=True)}

    def _weigh(self, rows: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """C Pᵀ P u, and uᵀ C Pᵀ P u [k].

        Raises:
            ValueError: A projection cannot be differentiated.
        """
        weighed = {}
        square = torch.zeros(len(next(iter(rows.values()))), dtype=torch.float64)
        for name, value in rows.items():
            half = value
            if name in self._projections:
                value = value.detach().requires_grad_(True)
                with torch.enable_grad():
                    half = apply_projection(self._projections[name], value, name)
                if not half.requires_grad:
                    raise ValueError(
                        f"projection of parameter {name!r} must be differentiable, as an operator needs its transpose; "
                        "write it in torch operations, or compute the matrix with ntk.empirical_ntk."
                    )
                half, value = half.detach(), torch.autograd.grad(half, value, half.detach())[0]
            square += self._multipliers[name] * half.reshape(len(half), -1).square().sum(1).to("cpu", torch.float64)
            weighed[name] = self._multipliers[name] * value
        return weighed, square

    def _push(self, tangents: dict[str, torch.Tensor]) -> torch.Tensor:
        """J w: [k, n, o].

        Raises:
            OutOfMemoryError: A chunk of vectors does not fit the device.
            NoJacobianProductError: An operation has no rule in either form.
        """
        many = len(next(iter(tangents.values()))) > 1
        ways = (self._push_forward, self._push_double) if many else (self._push_double, self._push_forward)
        for way in ways:
            if way.__name__ in self._refused:
                continue
            try:
                return way(tangents)
            except torch.OutOfMemoryError:
                raise
            except _REFUSALS as refusal:
                self._refused[way.__name__] = str(refusal).splitlines()[0]
        raise NoJacobianProductError(
            "model must consist of operations that can be differentiated twice, or in forward mode, for products with "
            f"its kernel; one cannot: {'; '.join(self._refused.values())} Compute the matrix with ntk.empirical_ntk."
        )

    def _push_double(self, tangents: dict[str, torch.Tensor]) -> torch.Tensor:
        """Derivative of Jᵀ v by v, one vector at a time."""
        pulled = [u for u in self._pulled.values() if u.requires_grad]
        chosen = [tangents[name] for name, u in self._pulled.items() if u.requires_grad]
        return torch.stack(
            [torch.autograd.grad(pulled, self._seed, w, retain_graph=True)[0] for w in zip(*chosen, strict=True)]
        )

    def _push_forward(self, tangents: dict[str, torch.Tensor]) -> torch.Tensor:
        """Forward-mode differentiation of the whole batch, all vectors at once."""
        primals = {name: leaf.detach() for name, leaf in self._leaves.items()}

        def along(tangent: dict[str, torch.Tensor]) -> torch.Tensor:
            return torch.func.jvp(lambda p: self._snapshot(self._x, p), (primals,), (tangent,))[1]

        with self._snapshot.active(), torch.no_grad():
            return torch.func.vmap(along)(tangents).reshape(-1, *self._output.shape)

    def _check_adjoint(self) -> None:
        """Hold v·(J C PᵀP Jᵀ v) against ‖C^½ P Jᵀ v‖² for one v.

        Raises:
            NoJacobianProductError: They differ, because a backward pass was cut off from the graph.
        """
        draw = np.random.default_rng(0).standard_normal(self._output.shape)
        v = torch.as_tensor(draw, dtype=self._output.dtype, device=self._output.device)[None]
        weighed, square = self._weigh(self._pull(v))
        product = float((v * self._push(weighed)).sum())
        expected = float(square)
        if abs(product - expected) > float(np.sqrt(np.finfo(self.dtype).eps)) * expected:
            raise NoJacobianProductError(
                f"model must have a backward pass that is itself differentiable; v·(J Jᵀv) = {product:.6g} differs "
                f"from ‖Jᵀv‖² = {expected:.6g}. A custom backward works on detached values: write it in torch "
                "operations, or compute the matrix with ntk.empirical_ntk."
            )
