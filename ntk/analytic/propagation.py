"""NNGP and NTK of an infinitely wide network, propagated from the Gram matrix of its inputs."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from ntk.analytic.activations import DualActivation, dual_activation
from ntk.analytic.batch_norm import STATISTICS
from ntk.analytic.batch_requirements import require_batch, require_homogeneous
from ntk.analytic.gram import require_gram, rounding, warn_of_gram
from ntk.analytic.kernels import AnalyticKernels
from ntk.analytic.messages import require_choice, require_integer
from ntk.analytic.norms import require_norm, require_variance, stable_weight_variance
from ntk.analytic.recursion import DEPTH_REASON, BatchNormLayer, GaussianLayer, Layer, Parametrization, run_recursion


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
    last = require_integer("depth", depth, 1, DEPTH_REASON)
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
    layer: Layer
    if norm == "batch_norm":
        slope = require_homogeneous(dual, bias)
        size = require_batch(start, rounding(gram), n_statistics, statistics, population=population)
        weight = 1.0 if sigma_w2 is None else require_variance("sigma_w2", sigma_w2, positive=True)
        layer = BatchNormLayer(slope, size, statistics, weight, linear, affine, population)
    else:
        weight = _weight_variance(dual, norm, sigma_w2, bias)
        layer = GaussianLayer(dual, norm, weight, bias, linear, projected, mean_correction)
    warn_of_gram(start, rounding(gram))
    nngp, ntk = run_recursion(layer, start, last, every_depth=every_depth)
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
                f"{', '.join(named)}: only for norm={owner!r}, without effect elsewhere; received norm={norm!r}. Leave "
                "out what has no effect."
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
    widths = list(width) if isinstance(width, Sequence | np.ndarray) else [width] * (depth + 1)
    if len(widths) != depth + 1:
        raise ValueError(
            f"width: must hold depth + 1 = {depth + 1} fan-ins; received {len(widths)}. {reason} {next_step}"
        )
    return tuple(require_integer("width", item, 1, f"{reason} {next_step}") for item in widths)
