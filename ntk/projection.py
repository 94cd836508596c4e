"""Projections onto the subspace in which a constrained weight trains.

Weight mean (MimicNorm, arXiv 2010.09278) and its relatives keep every row of a weight in a linear subspace. The kernel
that governs such a network is J P Jᵀ with P the projector onto that subspace; the plain J Jᵀ of the stored weights
carries 1/(π-1) too much in every entry and for every ReLU layer.
"""

from collections.abc import Callable, Mapping

import torch

from ntk.errors import UnknownNameError

Projection = Callable[[torch.Tensor], torch.Tensor]
"""Linear map of a weight to a weight of the same shape."""


def center_rows(weight: torch.Tensor, *, ndim: int | None = None) -> torch.Tensor:
    """Subtract from each output row its mean over the fan-in: the weight mean of MimicNorm, section 3.

    It is the orthogonal projector I - 11ᵀ/n on the n fan-in entries of each row.

    Args:
        weight: [..., out, *fan_in], for instance [out, in] or [out, in, kh, kw], with any leading axes.
        ndim: How many trailing axes make up the weight; the default takes all of them.

    Returns:
        The centered weight, of the same shape.

    Raises:
        ValueError: The weight has fewer than two axes.
    """
    axes = weight.ndim if ndim is None else ndim
    if not 2 <= axes <= weight.ndim:
        raise ValueError(
            f"center_rows needs a weight of at least two axes, [out, *fan_in], within the {weight.ndim} axes given; "
            f"got ndim={axes} for shape {tuple(weight.shape)}. Leave biases and gains unprojected."
        )
    return weight - weight.mean(dim=tuple(range(-axes + 1, 0)), keepdim=True)


def resolve_projection(
    projection: Projection | Mapping[str, Projection] | None, parameters: Mapping[str, torch.Tensor]
) -> tuple[dict[str, Projection], str | None]:
    """Say which projection applies to which parameter.

    Args:
        projection: One callable for every parameter of two or more axes, or parameter name -> callable, or None.
        parameters: The parameters that the kernel is taken over.

    Returns:
        Parameter name -> callable, and the name that goes into the result (None where nothing is projected).

    Raises:
        UnknownNameError: The mapping names a parameter that the kernel is not taken over.
        TypeError: A projection is not callable.
    """
    if projection is None:
        return {}, None
    if isinstance(projection, Mapping):
        for name in projection:
            if name not in parameters:
                raise UnknownNameError("projection", name, parameters)
        chosen = dict(projection)
    else:
        chosen = {name: projection for name, value in parameters.items() if value.ndim >= 2 and value.numel()}
    for name, function in chosen.items():
        if not callable(function):
            raise TypeError(
                f"projection for parameter {name!r} must be a callable weight -> weight, such as ntk.center_rows; "
                f"got {function!r}"
            )
    if isinstance(projection, Mapping):
        return chosen, "; ".join(f"{name}: {_name(function)}" for name, function in sorted(chosen.items())) or None
    return chosen, _name(projection)


def acts_on_rows(projection: Projection, weight: torch.Tensor) -> bool:
    """Whether a map acts on each row of a weight alone, and on all alike, as found out on random weights.

    Args:
        projection: Linear map of the weight.
        weight: Of which shape, type and device are used.
    """
    if projection is center_rows:
        return True
    if weight.ndim < 2:
        return False
    generator = torch.Generator().manual_seed(0)  # any numbers will do, and the global generator is left alone
    trial = torch.randn(weight.shape, generator=generator).to(weight.dtype).to(weight.device)
    try:
        whole = projection(trial)
        alone = torch.func.vmap(projection)(trial.unsqueeze(1)).squeeze(1)
    except (RuntimeError, ValueError, IndexError):  # it wants the whole weight, or looks at values
        return False
    rounding = 200 * torch.finfo(weight.dtype).eps * float(trial.abs().max())
    return whole.shape == alone.shape == trial.shape and float((whole - alone).abs().max()) <= rounding


def apply_projection(projection: Projection, rows: torch.Tensor, name: str) -> torch.Tensor:
    """Project every row of a Jacobian.

    Args:
        projection: Linear map of one weight.
        rows: [rows, *weight.shape]
        name: Of the parameter, for the error.

    Returns:
        The projected rows, of the same shape.

    Raises:
        ValueError: The projection changes the shape.
    """
    try:
        projected = torch.func.vmap(projection)(rows)
    except RuntimeError:  # it looks at values, or draws numbers, which vmap cannot: row by row then
        projected = torch.stack([projection(row) for row in rows])
    if projected.shape != rows.shape:
        raise ValueError(
            f"projection of parameter {name!r} must keep the shape {tuple(rows.shape[1:])}; it returned "
            f"{tuple(projected.shape[1:])}. Return the projected weight itself, in its own coordinates."
        )
    return projected


def _name(function: Projection) -> str:
    return getattr(function, "__name__", None) or repr(function)
