"""The recursion by which kernels go from one layer to the next, and the layers that it goes through."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ntk.analytic.activations import DualActivation
from ntk.analytic.batch_norm import batch_norm_layer
from ntk.analytic.gram import correlations
from ntk.analytic.norms import layer_moment
from ntk.analytic.precision import Array

DEPTH_REASON = "It counts activations: a network with D of them has D + 1 weight matrices. Pass the kernel's depth."
"""Why a depth is at least one, for messages."""


class Layer(Protocol):
    """One activation and one linear layer."""

    def start(self, gram: Array) -> Array:
        """Return Θ⁰ [n, n] of the first linear layer, whose gain is one."""

    def __call__(self, nngp: Array, ntk: Array, index: int) -> tuple[Array, Array]:
        """Return the next K and Θ, all [n, n], behind the linear layer of that index."""


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


def run_recursion(layer: Layer, gram: Array, depth: int, *, every_depth: bool) -> tuple[list[Array], list[Array]]:
    """Apply a layer again and again.

    Args:
        layer: The layer.
        gram: K⁰ [n, n].
        depth: How often.
        every_depth: Whether to keep the kernels of all depths.

    Returns:
        The NNGP kernels and the NTKs, each [n, n], of depths 0 … D, or of D alone.

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
                "(weight-mean ReLU multiplies the NTK by 1.46694 per layer, BatchNorm by 1.788 at B = 8, a polynomial "
                "by more and more). Lower depth, or take the stable weight variance, sigma_w2=None."
            )
        if not every_depth:
            nngp.clear()
            ntk.clear()
        nngp.append(new_nngp)
        ntk.append(new_ntk)
    return nngp, ntk
