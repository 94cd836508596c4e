"""NNGP and NTK of an infinitely wide network, propagated from the Gram matrix of its inputs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ntk.analytic.activations import DualActivation, dual_activation
from ntk.analytic.batch_norm import STATISTICS, batch_geometry, batch_norm_layer
from ntk.analytic.fixed_point import require_batch_size
from ntk.analytic.gram import correlations, require_gram, rounding
from ntk.analytic.kernels import AnalyticKernels
from ntk.analytic.messages import require_choice, require_integer
from ntk.analytic.norms import layer_moment, require_norm, require_variance, stable_weight_variance
from ntk.analytic.precision import Array

Layer = Callable[[Array, Array, int], tuple[Array, Array]]
"""One activation and one linear layer: (K, Θ, index of the linear layer) to the next (K, Θ), all [n, n]."""

_DEPTH_REASON = "It counts activations: a network with D of them has D + 1 weight matrices. Pass the kernel's depth."


@dataclass(frozen=True, eq=False)
class GaussianLayer:
    """One layer of a plain or weight-mean network (docs/mathematics.md §3.1, §4.1, §4.3).

    Attributes:
        dual: The activation.
        norm: "none" or "weight_mean".
        sigma_w2: Weight variance.
        sigma_b2: Bias variance.
        projected: Whether the weight term of the NTK is that of the centred weights.
        fan_in: Fan-in of each linear layer, for the standard parametrization; None for the NTK parametrization.
        bias_trained: Whether the standard parametrization trains biases, each adding one to the NTK.
    """

    dual: DualActivation
    norm: str
    sigma_w2: float
    sigma_b2: float
    projected: bool
    fan_in: tuple[int, ...] | None
    bias_trained: bool

    def start(self, gram: Array) -> Array:
        """Return Θ⁰ of the first linear layer, whose gain is one and whose bias variance is zero."""
        if self.fan_in is None:
            return gram
        return self.fan_in[0] * gram + float(self.bias_trained)

    def __call__(self, nngp: Array, ntk: Array, index: int) -> tuple[Array, Array]:
        """Return K' and Θ' = (gradient with respect to this layer) + σw² E[φ'φ'] Θ, each [n, n]."""
        variance, rho = correlations(nngp)
        q1, q2 = variance[:, None], variance[None, :]
        moment = layer_moment(self.dual, self.norm, rho, q1, q2)
        weights_seen = moment if self.projected else self.dual.value(rho, q1, q2)
        if self.fan_in is None:
            own = self.sigma_w2 * weights_seen + self.sigma_b2
        else:
            own = self.fan_in[index] * weights_seen + float(self.bias_trained)
        slope = self.sigma_w2 * self.dual.derivative(rho, q1, q2)
        return self.sigma_w2 * moment + self.sigma_b2, own + slope * ntk


@dataclass(frozen=True, eq=False)
class BatchNormLayer:
    """One BatchNorm-ReLU layer and the linear layer after it (docs/mathematics.md §5.1–5.3).

    Attributes:
        n_statistics: Number of leading rows that define the statistics.
        statistics: What the NTK differentiates.
        sigma_w2: Weight variance; it scales K and Θ alike.
    """

    n_statistics: int
    statistics: str
    sigma_w2: float

    def start(self, gram: Array) -> Array:
        """Return Θ⁰ = K⁰."""
        return gram

    def __call__(self, nngp: Array, ntk: Array, index: int) -> tuple[Array, Array]:
        """Return K' = σw² V(K) and Θ' = σw² (V(K) + F_K(Θ)), each [n, n]."""
        value, tangent = batch_norm_layer(nngp, ntk, self.n_statistics, self.statistics)
        return self.sigma_w2 * value, self.sigma_w2 * (value + tangent)


def propagate(
    gram: ArrayLike,
    depth: int,
    norm: str = "none",
    activation: str = "relu",
    sigma_w2: float | None = None,
    sigma_b2: float = 0.0,
    parametrization: str = "ntk",
    n_statistics: int | None = None,
    *,
    projected: bool = True,
    statistics: str = "differentiated",
    width: int | Sequence[int] | None = None,
    bias_trained: bool = False,
    every_depth: bool = True,
) -> AnalyticKernels:
    """Propagate a Gram matrix through an infinitely wide network of ``depth`` activations.

    K⁰ is the covariance of the first pre-activations: the first linear layer has gain one and no bias variance
    (docs/mathematics.md §1.1). Plain and weight mean follow §3.1 and §4.3 there (Jacot et al. 2018 for the NTK;
    MimicNorm, arXiv 2010.09278, for weight mean); batch norm is exact at the batch size of the rows, §5.

    Args:
        gram: K⁰ [n, n], symmetric positive semi-definite.
        depth: Number of activations D, at least 1.
        norm: "none", "weight_mean" or "batch_norm"; under the last the rows are one batch in train mode.
        activation: Name of the activation; "relu" under "batch_norm".
        sigma_w2: Weight variance; None for the one that keeps unit variance, or 1 under "batch_norm".
        sigma_b2: Bias variance; 0 under "batch_norm", which subtracts every bias.
        parametrization: "ntk", or "standard" for a plain network with ``width``.
        n_statistics: Under "batch_norm", the number of leading rows that are the batch; the others are test points that
            borrow its statistics (§5.3). None for all rows.
        projected: Under "weight_mean", whether the NTK is that of the centred weights. False gives what autograd with
            respect to the raw weights yields, 1/(π−1) more per layer (§4.3).
        statistics: Under "batch_norm", what the NTK differentiates: "differentiated" (mean and variance),
            "mean_differentiated", or "constant" (running statistics).
        width: Under the standard parametrization, the fan-in of the D + 1 linear layers, input first; an int for all.
        bias_trained: Under the standard parametrization, whether biases are trained, which adds one to the NTK per
            layer; neural-tangents counts them at b_std=0.0, and not at b_std=None.
        every_depth: Whether to keep the kernels of all depths; False saves 16(D + 1)n² bytes.

    Returns:
        The kernels, in float64, with the conventions under which they hold.

    Raises:
        ValueError: If an argument is out of its range, or the kernel asked for does not exist.
    """
    start = require_gram(gram)
    last = require_integer("depth", depth, 1, _DEPTH_REASON)
    require_norm(norm)
    dual = dual_activation(activation)
    bias = require_variance("sigma_b2", sigma_b2, positive=False)
    require_choice("parametrization", parametrization, ("ntk", "standard"), "Take 'ntk', or 'standard' with width=.")
    require_choice(
        "statistics", statistics, STATISTICS, "Take 'differentiated' for train mode, 'constant' for eval mode."
    )
    _require_meaning(norm, parametrization, n_statistics, projected, statistics, width, bias_trained)
    layer: GaussianLayer | BatchNormLayer
    if norm == "batch_norm":
        size = _require_batch(start, rounding(gram), n_statistics, statistics)
        _require_batch_norm_layer(activation, bias)
        weight = 1.0 if sigma_w2 is None else require_variance("sigma_w2", sigma_w2, positive=True)
        layer = BatchNormLayer(size, statistics, weight)
    else:
        weight = _weight_variance(activation, norm, sigma_w2, bias)
        fan_in = _require_width(width, last) if parametrization == "standard" else None
        layer = GaussianLayer(dual, norm, weight, bias, projected, fan_in, bias_trained)
    nngp, ntk = _run(layer, start, last, every_depth=every_depth)
    return AnalyticKernels(
        nngp=nngp[-1],
        ntk=ntk[-1],
        depth=last,
        norm=norm,
        activation=activation,
        sigma_w2=weight,
        sigma_b2=bias,
        parametrization=parametrization,
        projected=projected,
        n_statistics=layer.n_statistics if isinstance(layer, BatchNormLayer) else None,
        statistics=layer.statistics if isinstance(layer, BatchNormLayer) else None,
        nngp_by_depth=np.stack(nngp),
        ntk_by_depth=np.stack(ntk),
    )


def _run(
    layer: GaussianLayer | BatchNormLayer, gram: Array, depth: int, *, every_depth: bool
) -> tuple[list[Array], list[Array]]:
    """Apply a layer ``depth`` times; return the kernels [n, n] of all depths, or of the last alone.

    Raises:
        ValueError: If a kernel overflows or vanishes on the way.
    """
    nngp, ntk = [gram], [layer.start(gram)]
    for index in range(1, depth + 1):
        with np.errstate(over="ignore", invalid="ignore"):
            new_nngp, new_ntk = layer(nngp[-1], ntk[-1], index)
        usable = np.all(np.isfinite(new_ntk)) and np.all(np.isfinite(new_nngp)) and new_nngp.diagonal().min() > 0
        if not usable:
            raise ValueError(
                f"depth: must keep the kernels within float64; at depth {index} of {depth} they overflow or vanish "
                "(weight mean multiplies the NTK by 1.46694 per layer, BatchNorm by 1.788 at B = 8). Lower depth, "
                "or take sigma_w2=None for the stable weight variance."
            )
        if not every_depth:
            nngp.clear()
            ntk.clear()
        nngp.append(new_nngp)
        ntk.append(new_ntk)
    return nngp, ntk


def _weight_variance(activation: str, norm: str, sigma_w2: float | None, sigma_b2: float) -> float:
    """Return the given weight variance, or the stable one."""
    if sigma_w2 is None:
        return stable_weight_variance(activation, norm, sigma_b2)
    return require_variance("sigma_w2", sigma_w2, positive=True)


def _require_meaning(
    norm: str,
    parametrization: str,
    n_statistics: int | None,
    projected: bool,
    statistics: str,
    width: int | Sequence[int] | None,
    bias_trained: bool,
) -> None:
    """Refuse options that would be silently without effect.

    Raises:
        ValueError: If an option is given to a network that it does not concern.
    """
    if norm != "batch_norm" and (n_statistics is not None or statistics != "differentiated"):
        raise ValueError(
            f"n_statistics, statistics: require norm='batch_norm', the only one with batch statistics; received "
            f"norm={norm!r}, n_statistics={n_statistics!r}, statistics={statistics!r}. Leave them out."
        )
    if norm != "weight_mean" and not projected:
        raise ValueError(
            f"projected: must be True unless norm='weight_mean', as no other norm constrains the weights; received "
            f"norm={norm!r}, projected=False. Leave it out."
        )
    if parametrization == "standard" and norm != "none":
        raise ValueError(
            f"parametrization: 'standard' requires norm='none', the only one for which it is derived; received "
            f"norm={norm!r}. Take parametrization='ntk'."
        )
    if parametrization == "ntk" and (width is not None or bias_trained):
        raise ValueError(
            "width, bias_trained: require parametrization='standard'; the NTK parametrization knows no width, and "
            "trains the biases of variance sigma_b2. Leave them out, or pass parametrization='standard'."
        )


def _require_width(width: int | Sequence[int] | None, depth: int) -> tuple[int, ...]:
    """Return the fan-in of the depth + 1 linear layers.

    Raises:
        ValueError: If there is none, or not one per linear layer, or one is not a positive integer.
    """
    reason = "The standard parametrization multiplies each layer's part of the NTK by its fan-in."
    next_step = f"Pass one int, or {depth + 1} ints (input dimension first, then the hidden widths)."
    if width is None:
        raise ValueError(f"width: required by parametrization='standard'; received None. {reason} {next_step}")
    widths = list(width) if isinstance(width, Sequence) else [width] * (depth + 1)
    if len(widths) != depth + 1:
        raise ValueError(
            f"width: must hold depth + 1 = {depth + 1} fan-ins; received {len(widths)}. {reason} {next_step}"
        )
    return tuple(require_integer("width", item, 1, f"{reason} {next_step}") for item in widths)


def _require_batch(gram: Array, relative: float, n_statistics: int | None, statistics: str) -> int:
    """Return the number of rows that define the batch statistics.

    Raises:
        ValueError: If they are too few, too many, or of too low a rank for the kernel to exist.
    """
    n = gram.shape[0]
    if n_statistics is None:
        size = require_batch_size("gram (number of rows)", n)
    else:
        size = require_batch_size("n_statistics", n_statistics)
    if size > n:
        raise ValueError(
            f"n_statistics: must be at most the number of rows, {n}; received {size}. The batch comes first in gram, "
            "the test points after it."
        )
    beyond = size < n and statistics == "differentiated"
    needed = 5 if beyond else 3
    rank = batch_geometry(gram, size, relative).eigenvalues.size
    if rank < needed:
        between = " between test points (B of 6 or more)" if beyond else ""
        raise ValueError(
            f"gram: must have a centred rank of at least {needed} over the batch under norm='batch_norm'; found {rank} "
            f"over {size} rows. The first layer's NTK{between} is infinite below it: points on a circle or 2-D inputs "
            "have a centred rank of 2. Use inputs of more dimensions, more examples"
            + (", or statistics='constant'." if beyond else ", or norm='weight_mean'.")
        )
    return size


def _require_batch_norm_layer(activation: str, sigma_b2: float) -> None:
    """Refuse what the BatchNorm kernels do not cover.

    Raises:
        ValueError: If the activation is not ReLU or there is a bias variance.
    """
    if activation != "relu":
        raise ValueError(
            f"activation: must be 'relu' under norm='batch_norm', whose kernels rest on its homogeneity; received "
            f"{activation!r}. Take 'relu', or measure the network with ntk.empirical_ntk."
        )
    if sigma_b2 != 0:
        raise ValueError(
            f"sigma_b2: must be 0 under norm='batch_norm', which subtracts every bias with the batch mean; received "
            f"{sigma_b2}. Leave it out."
        )
