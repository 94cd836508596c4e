"""The NTK as a linear operator: products with vectors, and no matrix."""

from collections.abc import Mapping

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator

from ntk.checks import check_inputs, check_model, describe_mode
from ntk.errors import NonFiniteKernelError, UnknownNameError
from ntk.forward import Evaluation, run_batch
from ntk.memory import parse_memory
from ntk.outputs import OutputChoice
from ntk.parameters import ParameterChoice, select_parameters
from ntk.projection import Projection, resolve_projection
from ntk.results import REDUCTIONS
from ntk.snapshot import Snapshot
from ntk.statistics import Statistics
from ntk.vector_products import JacobianProducts, Metric, check_adjoint, vectors_at_once
from ntk.wrappers import plain_surroundings


class NtkOperator(LinearOperator):
    """Neural tangent kernel of a network, known by its products with vectors.

    The kernel is that of `ntk.empirical_ntk` with the same arguments, as `KernelResult.flatten` lays it out: row
    i * o + k belongs to output k of example i. It is taken at the weights, buffers and flags of the moment of
    construction, whatever becomes of the model later. With BatchNorm in train mode x1 is one batch, the terms through
    its statistics are included, and x2 is a second, separately normalized batch; `batch_statistics` takes others. The
    graph of each batch is kept in memory as long as the operator, on the device of the model; vectors come and go as
    NumPy arrays.

    Attributes:
        shape: [n1*o, n2*o] for reduce="none", else [n1, n2].
        dtype: Type that products are computed and returned in.
        reduce: "none", "trace" or "sum".
        symmetric: Whether there is one batch.
        mode: As in `KernelResult`.
        statistics: As in `KernelResult`.
        parametrization: As in `KernelResult`.
        projection: As in `KernelResult`.
        notes: As in `KernelResult`.
        chunk: Vectors that are pulled back at once at most.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        x1: torch.Tensor,
        x2: torch.Tensor | None = None,
        *,
        reduce: str = "none",
        projection: Projection | Mapping[str, Projection] | None = None,
        params: ParameterChoice = None,
        max_memory: int | str | None = None,
        dtype: torch.dtype | None = None,
        chunk: int | None = None,
        batch_statistics: str = "batch",
        reference: torch.Tensor | None = None,
        output: OutputChoice = None,
    ) -> None:
        """Run the batches, and see that products with their Jacobians can be had.

        Args:
            model: Network that maps [n, ...] to [n, o], or to [n] for one output. It is left as it was.
            x1: [n1, ...]
            x2: [n2, ...]; None stands for x1 and gives a Gram matrix.
            reduce: "none"; "trace", the mean over outputs, for which a product costs o pairs of passes; or "sum".
            projection: As in `ntk.empirical_ntk`; it must be differentiable, as its transpose is needed.
            params: As in `ntk.empirical_ntk`.
            max_memory: Bytes that the vectors in flight may take, beside the graphs; a number, or such as "1GiB".
            dtype: torch.float32 or torch.float64 to compute in; None for the type of the model. In float32 products
                carry a rounding of about 1e-7 λmax, so that small eigenvalues want float64.
            chunk: Vectors to multiply at once at most; None chooses by memory.
            batch_statistics: As in `ntk.empirical_ntk`.
            reference: As in `ntk.empirical_ntk`.
            output: As in `ntk.empirical_ntk`.

        Raises:
            UnknownNameError: reduce, a parameter or a key of the projection does not exist.
            NoJacobianProductError: An operation of the model has no rule for J w, or one that disagrees with Jᵀ v.
            MemoryBudgetError: max_memory does not hold one vector.
            ValueError: chunk is not positive.
        """
        if reduce not in REDUCTIONS:
            raise UnknownNameError("reduce", reduce, REDUCTIONS)
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be at least one vector, or None; got {chunk}.")
        statistics = Statistics(batch_statistics, reference)
        check_inputs(x1, x2, dtype, reference)
        inputs = [("x1", x1)] if x2 is None else [("x1", x1), ("x2", x2)]
        snapshot = Snapshot(model, Evaluation(dtype, statistics, output))
        self.reduce, self.symmetric, self.notes = reduce, x2 is None, snapshot.notes
        with snapshot.active():
            plain = snapshot.plain
            check_model(plain, statistics.smallest_batch(*(x for _, x in inputs)))
            multipliers, scaled = select_parameters(plain, params)
            own = dict(plain.named_parameters())
            projections, self.projection = resolve_projection(projection, {name: own[name] for name in multipliers})
            self.parametrization = "scaled" if scaled else "standard"
            whose = statistics.describe(two_batches=x2 is not None)
            self.mode, self.statistics = describe_mode(plain, two_batches=x2 is not None, statistics=whose)
            how = snapshot.evaluation
            largest = max(run_batch(plain, x, multipliers, how, name).activation_bytes for name, x in inputs)
            self._metric = Metric(multipliers, projections)
            sides = [JacobianProducts(snapshot, x.detach().clone(), tuple(multipliers)) for _, x in inputs]
            for side in sides:
                check_adjoint(side, self._metric)
        self._plain = snapshot.plain
        self._left, self._right = sides[0], sides[-1]
        n1, n2 = (side.output.numel() if reduce == "none" else len(side.output) for side in (self._left, self._right))
        super().__init__(np.dtype(str(self._left.output.dtype).removeprefix("torch.")), (n1, n2))
        self.chunk = vectors_at_once(largest, sides, parse_memory(max_memory)) if chunk is None else chunk

    def describe(self) -> str:
        """The convention in one line, as `KernelResult.describe` gives it."""
        norm = self.mode if self.statistics is None else f"{self.mode} mode, statistics {self.statistics}"
        parts = [
            "NTK operator",
            f"reduce {self.reduce}",
            f"{self.parametrization} parametrization",
            f"projection {self.projection or 'none'}",
            norm,
            str(self.dtype),
            *self.notes,
        ]
        return "; ".join(parts)

    def __repr__(self) -> str:
        """Size and convention."""
        return f"NtkOperator({self.shape[0]}x{self.shape[1]}; {self.describe()})"

    def _matvec(self, vector: np.ndarray) -> np.ndarray:
        return self._matmat(vector.reshape(-1, 1))[:, 0]

    def _rmatvec(self, vector: np.ndarray) -> np.ndarray:
        return self._rmatmat(vector.reshape(-1, 1))[:, 0]

    def _matmat(self, vectors: np.ndarray) -> np.ndarray:
        return self._multiply(vectors, self._left, self._right)

    def _rmatmat(self, vectors: np.ndarray) -> np.ndarray:
        return self._multiply(vectors, self._right, self._left)

    def _multiply(self, vectors: np.ndarray, left: JacobianProducts, right: JacobianProducts) -> np.ndarray:
        """J1 C PᵀP J2ᵀ times the columns of [size, k].

        Raises:
            NonFiniteKernelError: A product is not finite although the vectors are.
        """
        output = right.output
        rows = torch.as_tensor(np.array(vectors.T, order="C"), dtype=output.dtype, device=output.device)
        n, o = output.shape
        if self.reduce == "none":
            products = self._chunks(rows.reshape(-1, n, o), left, right).reshape(len(rows), -1)
        elif self.reduce == "sum":
            products = self._chunks(rows[:, :, None].expand(-1, n, o), left, right).sum(-1)
        else:
            seeds = torch.einsum("kn,ab->kanb", rows, torch.eye(o, dtype=rows.dtype, device=rows.device))
            pushed = self._chunks(seeds.reshape(-1, n, o), left, right)
            products = pushed.reshape(-1, o, len(left.output), o).diagonal(dim1=1, dim2=3).mean(-1)
        result = products.cpu().numpy().T
        if not np.isfinite(result).all() and np.isfinite(vectors).all():
            raise NonFiniteKernelError(
                "a product with the kernel is not finite although the output is: a gradient overflows or is undefined. "
                "Pass dtype=torch.float64, or look for a square root or norm at zero."
            )
        return result

    def _chunks(self, cotangents: torch.Tensor, left: JacobianProducts, right: JacobianProducts) -> torch.Tensor:
        """Products with [k, n, o], a chunk at a time."""
        parts = cotangents.split(self.chunk)
        with plain_surroundings(self._plain):
            return torch.cat([left.push(self._metric(right.pull(part))[0], len(part)) for part in parts])
