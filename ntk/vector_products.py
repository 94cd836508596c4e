"""Products with the Jacobian of a network on one batch, and the kernel from nothing but such products.

Θ v = J1 C Pᵀ P J2ᵀ v takes one vector-Jacobian product, u = J2ᵀ v, and one Jacobian-vector product, J1 w. The first is
a backward pass through a graph that is kept. The second is, for one vector, the derivative of a vector-Jacobian product
by v, a backward pass through the graph of that; for several at once it is forward-mode differentiation, whose cost per
vector is lower in a block. Where an operation has no rule for the one, the other serves.

Source: R. Novak, J. Sohl-Dickstein and S. S. Schoenholz, "Fast finite width neural tangent kernel", ICML 2022, arXiv
2206.08720, section 3.3.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ntk.contraction import CHUNK_BYTES, MAX_CHUNK, Contraction, Gradients
from ntk.errors import MemoryBudgetError, NoJacobianProductError, NoParametersError
from ntk.forward import Evaluation, check_exchanged, run_batch
from ntk.projection import Projection, apply_projection
from ntk.snapshot import Snapshot

_REFUSALS = (RuntimeError, NotImplementedError)
"""What autograd raises where an operation has no rule of the kind asked for."""

HELD = 5
"""Copies of a vector that are held at once: pulled, projected, weighed, and two within autograd (counted)."""

Rows = dict[str, torch.Tensor]
"""Parameter name -> [k, *shape]."""


class JacobianProducts:
    """Products with the Jacobian of one batch from either side, for several vectors at once.

    The graph of the batch, and that of its vector-Jacobian product, are kept.

    Attributes:
        output: [n, o]
        names: The parameters that the output depends on.
        row_bytes: Bytes of one pulled vector.
    """

    def __init__(self, snapshot: Snapshot, x: torch.Tensor, names: Sequence[str]) -> None:
        """Run the batch and build the graphs.

        Args:
            snapshot: The network.
            x: [n, ...]
            names: Parameters to differentiate by.

        Raises:
            NoParametersError: The output is not connected to any of them.
            WrappedModelError: The model used a parameter itself in place of what stands in for it.
        """
        self._snapshot, self._x = snapshot, x
        self._refused: dict[str, str] = {}
        leaves = {name: snapshot.parameters[name].detach().requires_grad_(True) for name in names}
        with snapshot.active(), torch.enable_grad():
            output = snapshot(x, leaves)
            self.output = output.reshape(len(output), -1)
            if not self.output.requires_grad:
                raise NoParametersError(
                    f"the model output depends on none of the selected parameters {sorted(leaves)[:4]}; select "
                    "parameters that the forward pass uses, and remove .detach(), .data and torch.no_grad() from it."
                )
            check_exchanged(snapshot.plain, self.output, names)
            self._seed = torch.zeros_like(self.output, requires_grad=True)
            pulled = torch.autograd.grad(
                self.output, list(leaves.values()), self._seed, create_graph=True, allow_unused=True
            )
            self._pulled = {name: u for name, u in zip(leaves, pulled, strict=True) if u is not None}
            self._leaves = {name: leaves[name] for name in self._pulled}
            self._gradients = Gradients(self.output, list(self._leaves.values()))
        self.names = tuple(self._leaves)
        self.row_bytes = self.output.element_size() * sum(u.numel() for u in self._pulled.values())

    def pull(self, cotangents: torch.Tensor) -> Rows:
        """Jᵀ v of each vector.

        Args:
            cotangents: [k, n, o]

        Raises:
            OutOfMemoryError: The vectors do not fit the device at once.
        """
        pulled = self._gradients(cotangents)
        return {name: u for name, u in zip(self.names, pulled, strict=True) if u is not None}

    def push(self, tangents: Rows, count: int) -> torch.Tensor:
        """J w of each vector.

        Args:
            tangents: Of some parameters; the others do not move. Names that the output does not depend on are passed
                over.
            count: Number k of vectors.

        Returns:
            [k, n, o]

        Raises:
            OutOfMemoryError: The vectors do not fit the device at once.
            NoJacobianProductError: An operation has no rule in either form.
        """
        tangents = {name: value for name, value in tangents.items() if name in self._leaves}
        if not tangents:
            return self.output.new_zeros(count, *self.output.shape)
        ways = (self._push_forward, self._push_double) if count > 1 else (self._push_double, self._push_forward)
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

    def _push_double(self, tangents: Rows) -> torch.Tensor:
        """Derivative of Jᵀ v by v, one vector at a time."""
        chosen = [name for name in tangents if self._pulled[name].requires_grad]
        pulled = [self._pulled[name] for name in chosen]
        return torch.stack(
            [
                torch.autograd.grad(pulled, self._seed, w, retain_graph=True)[0]
                for w in zip(*(tangents[name] for name in chosen), strict=True)
            ]
        )

    def _push_forward(self, tangents: Rows) -> torch.Tensor:
        """Forward-mode differentiation of the whole batch, all vectors at once."""
        primals = {name: self._leaves[name].detach() for name in tangents}

        def along(tangent: dict[str, torch.Tensor]) -> torch.Tensor:
            return torch.func.jvp(lambda p: self._snapshot(self._x, p), (primals,), (tangent,))[1]

        with self._snapshot.active(), torch.no_grad():
            return torch.func.vmap(along)(tangents).reshape(-1, *self.output.shape)


class Metric:
    """C Pᵀ P: what stands between the two Jacobians of a kernel."""

    def __init__(self, multipliers: Mapping[str, float], projections: Mapping[str, Projection]) -> None:
        """Hold the two maps.

        Args:
            multipliers: Parameter name -> c.
            projections: Parameter name -> linear map of one weight.
        """
        self.multipliers, self.projections = multipliers, projections

    def __call__(self, rows: Rows) -> tuple[Rows, torch.Tensor]:
        """C Pᵀ P u, and uᵀ C Pᵀ P u [k] in float64, on the CPU.

        Raises:
            ValueError: A projection cannot be differentiated.
        """
        weighed = {}
        square = torch.zeros(len(next(iter(rows.values()))), dtype=torch.float64)
        for name, value in rows.items():
            half = value
            if name in self.projections:
                value = value.detach().requires_grad_(True)
                with torch.enable_grad():
                    half = apply_projection(self.projections[name], value, name)
                if not half.requires_grad:
                    raise ValueError(
                        f"projection of parameter {name!r} must be differentiable, as a product needs its transpose; "
                        'write it in torch operations, or compute the matrix with implementation="structured".'
                    )
                half, value = half.detach(), torch.autograd.grad(half, value, half.detach())[0]
            square += self.multipliers[name] * half.reshape(len(half), -1).square().sum(1).to("cpu", torch.float64)
            weighed[name] = self.multipliers[name] * value
        return weighed, square


def check_adjoint(products: JacobianProducts, metric: Metric) -> None:
    """Hold v·(J C PᵀP Jᵀ v) against ‖C^½ P Jᵀ v‖² for one v.

    Args:
        products: Of one batch.
        metric: C PᵀP.

    Raises:
        NoJacobianProductError: They differ, because a backward pass was cut off from the graph.
    """
    draw = np.random.default_rng(0).standard_normal(products.output.shape)
    v = torch.as_tensor(draw, dtype=products.output.dtype, device=products.output.device)[None]
    weighed, square = metric(products.pull(v))
    product, expected = float((v * products.push(weighed, 1)).sum()), float(square)
    if abs(product - expected) > torch.finfo(products.output.dtype).eps ** 0.5 * expected:
        raise NoJacobianProductError(
            f"model must have a backward pass that is itself differentiable; v·(J Jᵀv) = {product:.6g} differs "
            f"from ‖Jᵀv‖² = {expected:.6g}. A custom backward works on detached values: write it in torch "
            "operations, or compute the matrix with ntk.empirical_ntk."
        )


def vectors_at_once(largest: int, products: Sequence[JacobianProducts], max_memory: int | None) -> int:
    """How many vectors to multiply at once.

    Args:
        largest: Bytes of the largest activation of one forward pass.
        products: Of the batches.
        max_memory: Bytes that the vectors in flight may take, or None for no bound.

    Raises:
        MemoryBudgetError: They do not hold one vector.
    """
    row_bytes = max(part.row_bytes for part in products)
    if max_memory is None:
        return max(1, min(MAX_CHUNK, CHUNK_BYTES // max(4 * largest, 2 * row_bytes)))
    vector_bytes = HELD * (largest + row_bytes)
    if max_memory < vector_bytes:
        raise MemoryBudgetError(
            f"max_memory must hold what one vector takes in flight, {vector_bytes} bytes; got {max_memory} bytes. "
            f"max_memory={vector_bytes} would do; or take fewer params, a smaller batch, or float32."
        )
    return min(MAX_CHUNK, max_memory // vector_bytes)


def contract_products(
    model: torch.nn.Module, inputs: Sequence[tuple[str, torch.Tensor]], evaluation: Evaluation, plan: Contraction
) -> dict[str, np.ndarray]:
    """The kernel column by column, one pair of products each; the Jacobian is never held.

    Args:
        model: The network.
        inputs: (name of the argument, batch), one or two.
        evaluation: Type to compute in, statistics and outputs.
        plan: Reduction, multipliers, projections, groups and memory.

    Returns:
        Group -> kernel as `ntk.contraction.contract` gives it.
    """
    largest = max(
        run_batch(model, x, plan.multipliers, evaluation, argument).activation_bytes for argument, x in inputs
    )
    snapshot, metric = Snapshot(model, evaluation), Metric(plan.multipliers, plan.projections)
    sides = [JacobianProducts(snapshot, x, tuple(plan.multipliers)) for _, x in inputs]
    for side in sides:
        check_adjoint(side, metric)
    left, right = sides[0], sides[-1]
    chunk = vectors_at_once(largest, sides, plan.max_memory)
    groups: dict[str, list[str]] = {group: [] for group in plan.groups.values()}
    for name in right.names:
        groups[plan.groups[name]].append(name)
    n, o = right.output.shape
    total = n if plan.reduce == "sum" else n * o
    columns: dict[str, list[np.ndarray]] = {group: [] for group in groups}
    for start in range(0, total, chunk):
        stop = min(start + chunk, total)
        weighed, _ = metric(right.pull(_units(right.output, start, stop, plan.reduce)))
        for group, names in groups.items():
            pushed = left.push({name: weighed[name] for name in names}, stop - start)
            columns[group].append(_reduced(pushed, start, plan.reduce))
        plan.report(stop, total)
    return {group: _assembled(np.concatenate(parts), n, plan.reduce) for group, parts in columns.items()}


def _units(output: torch.Tensor, start: int, stop: int, reduce: str) -> torch.Tensor:
    """Cotangents [stop - start, n, o] of columns of the kernel."""
    o = output.shape[1]
    seeds = output.new_zeros(stop - start, *output.shape)
    local, column = torch.arange(stop - start), torch.arange(start, stop)
    if reduce == "sum":
        seeds[local, column] = 1
    else:
        seeds[local, column // o, column % o] = 1
    return seeds


def _reduced(pushed: torch.Tensor, start: int, reduce: str) -> np.ndarray:
    """What a kernel needs of the columns [k, n1, o] from `start` on: [k, n1, o], or [k, n1] if reduced."""
    if reduce == "sum":
        pushed = pushed.sum(-1)
    elif reduce == "trace":
        local = torch.arange(len(pushed))
        pushed = pushed[local, :, (start + local) % pushed.shape[2]]
    return pushed.cpu().numpy()


def _assembled(columns: np.ndarray, n: int, reduce: str) -> np.ndarray:
    """Kernel from the columns of all n examples."""
    if reduce == "sum":
        return columns.T
    columns = columns.reshape(n, -1, *columns.shape[1:])
    return columns.mean(1).T if reduce == "trace" else columns.transpose(2, 0, 3, 1)
