"""Kernels of pre-activation residual networks of infinite width: their growth with the number of blocks."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from ntk.analytic.activations import DualActivation, dual_activation
from ntk.analytic.batch_requirements import require_homogeneous
from ntk.analytic.messages import require_choice, require_integer
from ntk.analytic.precision import Array, read_only
from ntk.analytic.propagation import propagate
from ntk.analytic.recursion import BatchNormLayer, GaussianLayer, Layer, Parametrization
from ntk.display import figure_svg, html_figure

if TYPE_CHECKING:
    import xarray

BRANCH_SCALES = ("inverse_sqrt", "inverse", "one", "mimicnorm")
"""α_l = 1/√l (the scalar of the MimicNorm paper), 1/l, 1, and 1.2^k/l (that of its code)."""

CODE_BASE = 1.2
"""The code's rounding of 1/√(1 − 1/π) = 1.211, once per layer of a branch; source: Kid-key/MimicNorm."""

CODE_VARIANCE = 2.0
"""Weight variance, times fan-in, of the convolutions in the code's residual networks; source: as above."""


@dataclass(frozen=True, eq=False)
class ResidualKernels:
    """Kernels of x_l = x_{l−1} + α_l F(x_{l−1}) at infinite width, and what they assume.

    NTK parametrization; weights alone are trained, the scalars α_l are constants. The kernels are those of the stream
    x_l, read out by a linear layer of gain one that is not trained.

    Attributes:
        nngp: K of the stream behind the last block [n, n].
        ntk: Θ of the stream behind the last block [n, n].
        norm: "none", "weight_mean" or "batch_norm".
        activation: Name of the activation.
        branch_depth: Number k of (activation, linear) layers in a branch.
        branch_scale: Name of the rule for α_l, "callable" for one of the caller's.
        sigma_w2: Weight variance of the layers in the branches.
        projected: Whether the NTK is that of training in the subspace that the norm allows (docs/mathematics.md §4.3).
        statistics: What the NTK differentiates under batch norm; None without.
        scales: α_l of blocks 1 … L [L].
        nngp_by_block: K behind blocks 0 … L [L + 1, n, n]; behind the last alone [1, n, n] unless all were kept.
        ntk_by_block: Θ behind blocks 0 … L [L + 1, n, n]; behind the last alone [1, n, n] unless all were kept.
    """

    nngp: Array = field(repr=False)
    ntk: Array = field(repr=False)
    norm: str
    activation: str
    branch_depth: int
    branch_scale: str
    sigma_w2: float
    projected: bool
    statistics: str | None
    scales: Array = field(repr=False)
    nngp_by_block: Array = field(repr=False)
    ntk_by_block: Array = field(repr=False)

    def __post_init__(self) -> None:
        """Make every array a read-only float64 copy."""
        for name in ("nngp", "ntk", "scales", "nngp_by_block", "ntk_by_block"):
            object.__setattr__(self, name, read_only(getattr(self, name)))

    @property
    def blocks(self) -> int:
        """Number L of blocks."""
        return len(self.scales)

    @property
    def variance(self) -> Array:
        """Variances q_l of the stream, by block and input [blocks kept, n]."""
        return np.diagonal(self.nngp_by_block, axis1=1, axis2=2)

    @property
    def correlation(self) -> Array:
        """Correlations of the stream, by block [blocks kept, n, n]."""
        scale = np.sqrt(self.variance)
        return self.nngp_by_block / (scale[:, :, None] * scale[:, None, :])

    def correlation_exponent(self) -> float:
        """Return e in c_l ~ l^−e, from the mean correlation of two inputs over the last decade of blocks.

        For weight mean and α_l² = 1/l it tends to 1 − t^k, t the slope of the correlation map at 0
        (docs/mathematics.md §8), with a correction of the order of c_l itself.

        Raises:
            ValueError: If there is no such decade, a single input, or a mean correlation that is not positive.
        """
        pairs = ~np.eye(self.nngp.shape[0], dtype=bool)
        if not pairs.any():
            raise ValueError("correlation_exponent: requires two inputs or more; received one. Pass a larger gram.")
        return -self._exponent("correlation_exponent", self.correlation[:, pairs].mean(axis=1))

    def ntk_exponent(self) -> float:
        """Return e in Θ_ii ~ l^e, from the mean over inputs over the last decade of blocks.

        For weight mean and α_l² = 1/l it tends to χ1^k (docs/mathematics.md §8).

        Raises:
            ValueError: If there is no such decade.
        """
        return self._exponent("ntk_exponent", np.diagonal(self.ntk_by_block, axis1=1, axis2=2).mean(axis=1))

    def _exponent(self, figure: str, values: Array) -> float:
        """Return the slope of ln values in ln l between blocks L/10 and L.

        Raises:
            ValueError: If those blocks were not kept, or the values there are not positive.
        """
        first = self.blocks // 10
        if first < 1 or len(values) == 1:
            raise ValueError(
                f"{figure}: requires the kernels of 10 blocks or more; there are {self.blocks}, {len(values)} of which "
                "(with the input) were kept. Propagate through more, with every_block=True."
            )
        if min(values[first], values[-1]) <= 0:
            raise ValueError(
                f"{figure}: requires a positive mean over the last decade, as it is a slope of logarithms; received "
                f"{values[first]:.3g} at block {first} and {values[-1]:.3g} at block {self.blocks}. Start from "
                "positively correlated inputs, or read nngp_by_block itself."
            )
        return math.log(values[-1] / values[first]) / math.log(self.blocks / first)

    def describe(self) -> str:
        """The convention in one line."""
        norm = self.norm if self.statistics is None else f"{self.norm}, statistics {self.statistics}"
        return (
            f"pre-activation residual network of {self.blocks} blocks; branch of {self.branch_depth} ({norm}, "
            f"{self.activation}, linear) of weight variance {self.sigma_w2:.6g}; branch scale {self.branch_scale}; "
            f"NTK parametrization, {'projected' if self.projected else 'raw'}, scales constant"
        )

    def to_dataset(self) -> "xarray.Dataset":
        """The kernels by block as an xarray dataset, their convention in the attributes."""
        import xarray

        dims = ("block", "example", "example_2")
        first = 0 if len(self.nngp_by_block) > 1 else self.blocks
        return xarray.Dataset(
            {"nngp": (dims, self.nngp_by_block), "ntk": (dims, self.ntk_by_block), "scale": ("scaled", self.scales)},
            coords={"block": np.arange(first, self.blocks + 1), "scaled": np.arange(1, self.blocks + 1)},
            attrs={"convention": self.describe()},
        )

    def _repr_html_(self) -> str:
        """Growth of the kernels with the blocks, on logarithmic axes, with the convention."""
        return html_figure(_growth_svg(self), self.describe())


def propagate_residual(
    gram: ArrayLike,
    blocks: int,
    norm: str = "none",
    activation: str | DualActivation = "relu",
    *,
    branch_depth: int = 1,
    branch_scale: str | Callable[[int], float] = "inverse_sqrt",
    sigma_w2: float | None = None,
    projected: bool = True,
    statistics: str = "differentiated",
    every_block: bool = True,
) -> ResidualKernels:
    """Propagate a Gram matrix through an infinitely wide pre-activation residual network.

    x_l = x_{l−1} + α_l F(x_{l−1}), the branch F of k layers, each normalization, activation, linear. The branch ends in
    independent weights, so that K_l = K_{l−1} + α_l² K_F and Θ_l = Θ_{l−1} + α_l² Θ_F with the kernels K_F, Θ_F that
    :func:`ntk.analytic.propagate` finds behind k layers started from K_{l−1}, Θ_{l−1} (docs/mathematics.md §8).

    Args:
        gram: K_0 = Θ_0 [n, n], symmetric positive semi-definite.
        blocks: Number of blocks L, at least 1.
        norm: "none", "weight_mean" or "batch_norm"; under the last the rows are one batch in train mode.
        activation: Name of the activation, or the dual activation; under "batch_norm" one that is linear on both sides
            of zero.
        branch_depth: Number k of layers in a branch, at least 1.
        branch_scale: α_l: "inverse_sqrt" for 1/√l (MimicNorm, arXiv 2010.09278), "inverse" for 1/l, "one" for 1 (what
            a BatchNorm network without scalars has), "mimicnorm" for the 1.2^k/l of that paper's code, or a function
            of the block's number l = 1 … L.
        sigma_w2: Weight variance; None for unit gain at unit variance, under "batch_norm" 2, but under
            ``branch_scale="mimicnorm"`` for the 2 of that code: with weight mean and k = 2 its branches add
            1.44²·0.4648/l² = 0.964/l² of the variance.
        projected: Under "weight_mean", whether the NTK is that of the centred weights.
        statistics: Under "batch_norm", what the NTK differentiates, as in :func:`ntk.analytic.propagate`.
        every_block: Whether to keep the kernels behind all blocks; False saves 16 (L + 1) n² bytes.

    Returns:
        The kernels, in float64, with the conventions under which they hold.

    Raises:
        ValueError: If an argument is out of its range, or a kernel asked for does not exist.
    """
    last = require_integer("blocks", blocks, 1, "Pass the number of residual additions.")
    depth = require_integer("branch_depth", branch_depth, 1, "Pass the number of (activation, linear) layers of F.")
    scales = branch_scales(branch_scale, last, depth)
    unit = branch_variance(sigma_w2, norm, branch_scale)
    # One layer of the plain network refuses what a branch cannot take.
    first = propagate(gram, 1, norm, activation, unit, projected=projected, statistics=statistics)
    dual, linear, weight = dual_activation(activation), Parametrization("ntk", None, False), first.sigma_w2
    layer: Layer
    if norm == "batch_norm":
        layer = BatchNormLayer(require_homogeneous(dual, 0.0), len(first.nngp), statistics, weight, linear)
    else:
        layer = GaussianLayer(dual, norm, weight, 0.0, linear, projected)
    nngp, ntk = _run(layer, first.nngp_by_depth[0], scales, depth, every_block=every_block)
    return ResidualKernels(
        nngp=nngp[-1],
        ntk=ntk[-1],
        norm=norm,
        activation=dual.name,
        branch_depth=depth,
        branch_scale=branch_scale if isinstance(branch_scale, str) else "callable",
        sigma_w2=weight,
        projected=projected,
        statistics=first.statistics,
        scales=scales,
        nngp_by_block=nngp,
        ntk_by_block=ntk,
    )


def _run(layer: Layer, gram: Array, scales: Array, depth: int, *, every_block: bool) -> tuple[Array, Array]:
    """Return the kernels [blocks kept, n, n] of the stream.

    Raises:
        ValueError: If a kernel overflows on the way.
    """
    kept = np.empty((2, len(scales) + 1 if every_block else 1, *gram.shape))
    nngp = ntk = kept[:, 0] = gram
    with np.errstate(over="ignore", invalid="ignore"):
        for number, share in enumerate(scales**2, start=1):
            branch_nngp, branch_ntk = nngp, ntk
            for _ in range(depth):
                branch_nngp, branch_ntk = layer(branch_nngp, branch_ntk, number)
            nngp, ntk = nngp + share * branch_nngp, ntk + share * branch_ntk
            if not (np.isfinite(nngp).all() and np.isfinite(ntk).all()):
                raise ValueError(
                    f"blocks: must keep the kernels within float64; they overflow at block {number} of {len(scales)}. "
                    "Take fewer, a branch_scale that falls with l such as 'inverse_sqrt', or sigma_w2=None."
                )
            if every_block:
                kept[:, number] = nngp, ntk
    if not every_block:
        kept[:, 0] = nngp, ntk
    return kept[0], kept[1]


def branch_variance(sigma_w2: float | None, norm: str, branch_scale: str | Callable[[int], float]) -> float | None:
    """Return the weight variance in the branches, where it is not the stable one.

    Args:
        sigma_w2: What was asked for; None for the default.
        norm: Normalization.
        branch_scale: The rule for α_l.

    Returns:
        The variance: 2 under batch norm, for unit gain, and with the scale of MimicNorm's code; None if it is stable.
    """
    if sigma_w2 is None and (norm == "batch_norm" or branch_scale == "mimicnorm"):
        return CODE_VARIANCE
    return sigma_w2


def branch_scales(branch_scale: str | Callable[[int], float], blocks: int, branch_depth: int) -> Array:
    """Return α_l of blocks 1 … L [L].

    Args:
        branch_scale: One of :data:`BRANCH_SCALES`, or a function of the block's number.
        blocks: Number of blocks L.
        branch_depth: Number of layers in a branch.

    Returns:
        The scales [L].

    Raises:
        ValueError: If the name is unknown, or a function returns what is not finite.
    """
    numbers = np.arange(1, blocks + 1, dtype=np.float64)
    if callable(branch_scale):
        scales = np.array([float(branch_scale(number)) for number in range(1, blocks + 1)])
        if not np.isfinite(scales).all():
            number = int(np.flatnonzero(~np.isfinite(scales))[0]) + 1
            raise ValueError(
                f"branch_scale: must return a finite number for each block 1 … {blocks}; received "
                f"{scales[number - 1]} for block {number}. Blocks are numbered from 1."
            )
        return scales
    step = "Take 'inverse_sqrt' for 1/√l, or pass a function of the block's number."
    rules = {
        "inverse_sqrt": lambda: 1 / np.sqrt(numbers),
        "inverse": lambda: 1 / numbers,
        "one": lambda: np.ones(blocks),
        "mimicnorm": lambda: CODE_BASE**branch_depth / numbers,
    }
    return rules[require_choice("branch_scale", branch_scale, BRANCH_SCALES, step)]()


def _growth_svg(kernels: ResidualKernels) -> str:
    """Draw the means of q_l, Θ_ii and |c_l| against the block's number."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 3.2), layout="constrained")
    axes = figure.subplots()
    first = 1 if len(kernels.nngp_by_block) > 1 else 0
    numbers = np.arange(1, kernels.blocks + 1) if first else np.array([kernels.blocks])
    pairs = ~np.eye(kernels.nngp.shape[0], dtype=bool)
    series = {
        "variance $q_l$": kernels.variance.mean(axis=1),
        r"NTK $\Theta_{ii}$": np.diagonal(kernels.ntk_by_block, axis1=1, axis2=2).mean(axis=1),
    }
    if pairs.any():
        series["correlation $|c_l|$"] = np.abs(kernels.correlation[:, pairs]).mean(axis=1)
    marker = "o" if len(numbers) == 1 else ""
    for label, values in series.items():
        axes.plot(numbers, values[first:], marker=marker, label=label)
    axes.set(xscale="log", yscale="log", xlabel="block $l$")
    axes.legend(frameon=False)
    return figure_svg(figure)
