"""NNGP and NTK of an infinitely wide network, propagated from the Gram matrix of its inputs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ntk.analytic.activations import DualActivation, dual_activation
from ntk.analytic.batch_norm import STATISTICS, batch_geometry, batch_norm_layer
from ntk.analytic.fixed_point import require_batch_size
from ntk.analytic.gram import correlations, require_gram, rounding, warn_of_gram
from ntk.analytic.kernels import AnalyticKernels
from ntk.analytic.messages import require_choice, require_integer
from ntk.analytic.norms import layer_moment, require_norm, require_variance, stable_weight_variance
from ntk.analytic.precision import Array
from ntk.errors import CentredRankError

Layer = Callable[[Array, Array, int], tuple[Array, Array]]
"""One activation and one linear layer: (K, Θ, index of the linear layer) to the next (K, Θ), all [n, n]."""

_POPULATION_REASON = "A population has a variance from two points on. Pass more inputs."
_DEPTH_REASON = "It counts activations: a network with D of them has D + 1 weight matrices. Pass the kernel's depth."


@dataclass(frozen=True)
class Parametrization:
    """How the trained parameters of linear layers enter the function (docs/mathematics.md §3.1).

    Attributes:
        name: "ntk" or "standard".
        fan_in: Fan-in of each linear layer, input first, where the kernel depends on it; else None.
        bias_trained: Whether the standard parametrization trains biases, each adding one to the NTK.
    """

    name: str
    fan_in: tuple[int, ...] | None
    bias_trained: bool

    def own_part(self, moment: Array, index: int, sigma_w2: float, sigma_b2: float) -> Array:
        """The part of the NTK that a linear layer's own parameters give.

        Args:
            moment: Second moment of what its weights see [n, n], per unit of weight variance.
            index: Which linear layer.
            sigma_w2: Its weight variance.
            sigma_b2: Its bias variance.

        Returns:
            The part [n, n].
        """
        if self.name == "ntk" or self.fan_in is None:
            return sigma_w2 * moment + sigma_b2
        return self.fan_in[index] * moment + float(self.bias_trained)


@dataclass(frozen=True, eq=False)
class GaussianLayer:
    """One layer of a plain or weight-mean network (docs/mathematics.md §3.1, §4.1, §4.3).

    Attributes:
        dual: The activation.
        norm: "none" or "weight_mean".
        sigma_w2: Weight variance.
        sigma_b2: Bias variance.
        parametrization: Of the linear layers.
        projected: Whether the weight term of the NTK is that of the centred weights.
        mean_correction: Whether the mean is that of finitely many units, which leaves 1 − 1/n of the covariance (§4.4).
    """

    dual: DualActivation
    norm: str
    sigma_w2: float
    sigma_b2: float
    parametrization: Parametrization
    projected: bool = True
    mean_correction: bool = False

    def start(self, gram: Array) -> Array:
        """Return Θ⁰ of the first linear layer, whose gain is one and whose bias variance is zero."""
        return self.parametrization.own_part(gram, 0, 1.0, 0.0)

    def __call__(self, nngp: Array, ntk: Array, index: int) -> tuple[Array, Array]:
        """Return K' and Θ' = (gradient with respect to this layer) + σw² E[φ'φ'] Θ, each [n, n]."""
        variance, rho = correlations(nngp)
        q1, q2 = variance[:, None], variance[None, :]
        left = 1.0
        if self.mean_correction and self.parametrization.fan_in is not None:
            left -= 1 / self.parametrization.fan_in[index]
        moment = left * layer_moment(self.dual, self.norm, rho, q1, q2)
        seen = moment if self.projected else self.dual.value(rho, q1, q2)
        own = self.parametrization.own_part(seen, index, self.sigma_w2, self.sigma_b2)
        slope = self.sigma_w2 * left * self.dual.derivative(rho, q1, q2)
        return self.sigma_w2 * moment + self.sigma_b2, own + slope * ntk


@dataclass(frozen=True, eq=False)
class BatchNormLayer:
    """One layer of batch norm and activation, and the linear layer after it (docs/mathematics.md §5).

    Attributes:
        negative_slope: Slope of the activation below zero.
        n_statistics: Number of leading rows that define the statistics.
        statistics: What the NTK differentiates.
        sigma_w2: Weight variance; it scales K and Θ alike.
        parametrization: Of the linear layers.
        affine: Whether a gain and a shift per channel are trained.
        population: Whether the rows stand for an infinitely large batch.
    """

    negative_slope: float
    n_statistics: int
    statistics: str
    sigma_w2: float
    parametrization: Parametrization
    affine: bool = False
    population: bool = False

    def start(self, gram: Array) -> Array:
        """Return Θ⁰ of the first linear layer, whose gain is one."""
        return self.parametrization.own_part(gram, 0, 1.0, 0.0)

    def __call__(self, nngp: Array, ntk: Array, index: int) -> tuple[Array, Array]:
        """Return K' = σw² V(K) and Θ' = (gradient with respect to this layer) + σw² F_K(Θ), each [n, n]."""
        value, tangent = batch_norm_layer(
            nngp,
            ntk,
            self.n_statistics,
            self.statistics,
            negative_slope=self.negative_slope,
            affine=self.affine,
            population=self.population,
        )
        own = self.parametrization.own_part(value, index, self.sigma_w2, 0.0)
        return self.sigma_w2 * value, own + self.sigma_w2 * tangent


def propagate(
    gram: ArrayLike,
    depth: int,
    norm: str = "none",
    activation: str | DualActivation = "relu",
    sigma_w2: float | None = None,
    sigma_b2: float = 0.0,
    parametrization: str = "ntk",
    n_statistics: int | None = None,
    *,
    projected: bool = True,
    mean_correction: bool = False,
    statistics: str = "differentiated",
    affine: bool = False,
    population: bool = False,
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
        activation: Name of the activation, or the dual activation; under "batch_norm" one that is linear on both sides
            of zero.
        sigma_w2: Weight variance; None for the one that keeps unit variance, or 1 under "batch_norm".
        sigma_b2: Bias variance; 0 under "batch_norm", which subtracts every bias.
        parametrization: "ntk", or "standard" with ``width``.
        n_statistics: Under "batch_norm", the number of leading rows that are the batch; the others are test points that
            borrow its statistics (§5.3). None for all rows.
        projected: Under "weight_mean", whether the NTK is that of the centred weights. False gives what autograd with
            respect to the raw weights yields, 1/(π−1) more per layer (§4.3).
        mean_correction: Under "weight_mean" with ``width``, whether the mean is one of finitely many units, which
            leaves (n − 1)/n of each covariance (§4.4, MimicNorm's Lemma 1).
        statistics: Under "batch_norm", what the NTK differentiates: "differentiated" (mean and variance),
            "mean_differentiated", or "constant" (running statistics).
        affine: Under "batch_norm", whether a gain and a shift per channel, one and zero at initialization, are trained.
        population: Under "batch_norm", whether the rows stand, in equal parts, for an infinitely large batch (§5.5).
        width: The fan-in of the D + 1 linear layers, input first; an int for all. For the standard parametrization and
            ``mean_correction``.
        bias_trained: Under the standard parametrization, whether biases are trained, which adds one to the NTK per
            layer; neural-tangents counts them at b_std=0.0, and not at b_std=None.
        every_depth: Whether to keep the kernels of all depths; False saves 16(D + 1)n² bytes.

    Returns:
        The kernels, in float64, with the conventions under which they hold.

    Raises:
        GramError: If the Gram matrix is not the covariance of inputs.
        BatchTooSmallError: If a batch has 3 rows or fewer.
        CentredRankError: If a batch spans too few directions.
        UnknownNameError: If a name is not admissible.
        ValueError: If another argument is out of its range, or the kernel asked for does not exist.
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
    _require_norm_of_options(
        norm,
        batch_norm={
            "n_statistics": n_statistics is not None,
            "statistics": statistics != "differentiated",
            "affine": affine,
            "population": population,
        },
        weight_mean={"projected": not projected, "mean_correction": mean_correction},
    )
    linear = _parametrization(parametrization, width, last, bias_trained=bias_trained, finite=mean_correction)
    layer: GaussianLayer | BatchNormLayer
    if norm == "batch_norm":
        slope = require_homogeneous(dual, bias)
        size = _require_batch(start, rounding(gram), n_statistics, statistics, population=population)
        weight = 1.0 if sigma_w2 is None else require_variance("sigma_w2", sigma_w2, positive=True)
        layer = BatchNormLayer(slope, size, statistics, weight, linear, affine, population)
    else:
        weight = _weight_variance(dual, norm, sigma_w2, bias)
        layer = GaussianLayer(dual, norm, weight, bias, linear, projected, mean_correction)
    warn_of_gram(start, rounding(gram))
    nngp, ntk = _run(layer, start, last, every_depth=every_depth)
    batched = isinstance(layer, BatchNormLayer)
    return AnalyticKernels(
        nngp=nngp[-1],
        ntk=ntk[-1],
        depth=last,
        norm=norm,
        activation=dual.name,
        sigma_w2=weight,
        sigma_b2=bias,
        parametrization=parametrization,
        projected=projected,
        mean_correction=mean_correction,
        n_statistics=layer.n_statistics if isinstance(layer, BatchNormLayer) else None,
        statistics=statistics if batched else None,
        affine=affine,
        population=population,
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


def _weight_variance(dual: DualActivation, norm: str, sigma_w2: float | None, sigma_b2: float) -> float:
    """Return the given weight variance, or the stable one."""
    if sigma_w2 is None:
        return stable_weight_variance(dual, norm, sigma_b2)
    return require_variance("sigma_w2", sigma_w2, positive=True)


def _require_norm_of_options(norm: str, **options: Mapping[str, bool]) -> None:
    """Refuse options that would be silently without effect.

    Args:
        norm: The norm asked for.
        **options: For each norm, its own options, and whether each was given.

    Raises:
        ValueError: If an option is given to a network that it does not concern.
    """
    for owner, given in options.items():
        named = [name for name, is_given in given.items() if is_given]
        if named and owner != norm:
            raise ValueError(
                f"{', '.join(named)}: require norm={owner!r}, the only one that they concern; received norm={norm!r}. "
                "Leave them out."
            )


def _parametrization(
    name: str, width: int | Sequence[int] | None, depth: int, *, bias_trained: bool, finite: bool
) -> Parametrization:
    """Return the parametrization of the linear layers.

    Raises:
        ValueError: If a width is missing or without effect, or biases are, or a width is not an integer.
    """
    standard = name == "standard"
    if bias_trained and not standard:
        raise ValueError(
            "bias_trained: requires parametrization='standard'; the NTK parametrization trains the biases of variance "
            "sigma_b2. Leave it out, or pass parametrization='standard'."
        )
    if width is not None and not (standard or finite):
        raise ValueError(
            "width: requires parametrization='standard' or mean_correction=True, as nothing else depends on it; "
            f"received {width!r}. Leave it out."
        )
    fan_in = _require_width(width, depth) if standard or finite else None
    return Parametrization(name, fan_in, bias_trained)


def _require_width(width: int | Sequence[int] | None, depth: int) -> tuple[int, ...]:
    """Return the fan-in of the depth + 1 linear layers.

    Raises:
        ValueError: If there is none, or not one per linear layer, or one is not a positive integer.
    """
    reason = "The standard parametrization multiplies each layer's part by its fan-in, mean_correction by 1 − 1/fan-in."
    next_step = f"Pass one int, or {depth + 1} ints (input dimension first, then the hidden widths)."
    if width is None:
        raise ValueError(f"width: required here; received None. {reason} {next_step}")
    widths = list(width) if isinstance(width, Sequence) else [width] * (depth + 1)
    if len(widths) != depth + 1:
        raise ValueError(
            f"width: must hold depth + 1 = {depth + 1} fan-ins; received {len(widths)}. {reason} {next_step}"
        )
    return tuple(require_integer("width", item, 1, f"{reason} {next_step}") for item in widths)


def _require_batch(
    gram: Array, relative: float, n_statistics: int | None, statistics: str, *, population: bool = False
) -> int:
    """Return the number of rows that define the batch statistics.

    Raises:
        BatchTooSmallError: If they are too few.
        CentredRankError: If their rank is too low for the kernel to exist.
        ValueError: If they are too many.
    """
    n = gram.shape[0]
    named = ("gram (number of rows)", n) if n_statistics is None else ("n_statistics", n_statistics)
    size = require_integer(*named, 2, _POPULATION_REASON) if population else require_batch_size(*named)
    if size > n:
        raise ValueError(
            f"n_statistics: must be at most the number of rows, {n}; received {size}. The batch comes first in gram, "
            "the test points after it."
        )
    beyond = size < n and statistics == "differentiated"
    needed = 1 if population else 5 if beyond else 3
    rank = batch_geometry(gram, size, relative).eigenvalues.size
    if rank < needed:
        between = " between test points (B of 6 or more)" if beyond else ""
        raise CentredRankError(
            f"gram: must have a centred rank of at least {needed} over the batch under norm='batch_norm'; found {rank} "
            f"over {size} rows. The first layer's NTK{between} is infinite below it: points on a circle or 2-D inputs "
            "have a centred rank of 2. Use inputs of more dimensions, more examples"
            + (", or statistics='constant'." if beyond else ", or norm='weight_mean'.")
        )
    return size


def require_homogeneous(dual: DualActivation, sigma_b2: float) -> float:
    """Return the slope below zero of an activation that the BatchNorm kernels cover.

    Raises:
        ValueError: If the activation is not homogeneous or there is a bias variance.
    """
    if dual.negative_slope is None:
        raise ValueError(
            "activation: must be 'relu', 'leaky_relu', 'abs' or 'linear' under norm='batch_norm', whose kernels rest "
            f"on homogeneity; received {dual.name!r}. Take 'relu', or measure the network with ntk.empirical_ntk."
        )
    if sigma_b2 != 0:
        raise ValueError(
            f"sigma_b2: must be 0 under norm='batch_norm', which subtracts every bias with the batch mean; received "
            f"{sigma_b2}. Leave it out."
        )
    return dual.negative_slope
