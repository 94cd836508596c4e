"""Any dual activation as a neural-tangents layer."""

from typing import Any

import jax
import jax.numpy as jnp

from ntk.analytic.activations import DualActivation, dual_activation
from ntk.analytic.compat import stax
from ntk.analytic.layers.covariances import Sides, cross_sides, map_covariances, variances
from ntk.errors import NotGaussianError


@stax.layer
def Activation(activation: str | DualActivation = "relu") -> Any:
    """An element-wise activation, with the closed forms and quadratures of :mod:`ntk.analytic.activations`.

    neural-tangents has some of them; SiLU, tanh and exact diagonals of all are here.

    Args:
        activation: Name of the activation, or the dual activation itself.

    Returns:
        (init_fn, apply_fn, kernel_fn).
    """
    dual = dual_activation(activation)

    def init_fn(rng: jax.Array, input_shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple]:
        return input_shape, ()

    def apply_fn(params: tuple, inputs: jax.Array, **kwargs: object) -> jax.Array:
        return dual.forms.function(inputs)

    def kernel_fn(k: Any, **kwargs: object) -> Any:
        return activate(k, dual)

    return init_fn, apply_fn, kernel_fn


def activate(kernel: Any, dual: DualActivation, *, centred: bool = False) -> Any:
    """Send a Kernel through an activation.

    Args:
        kernel: Kernel of Gaussian pre-activations.
        dual: The activation φ.
        centred: Whether to return covariances of φ rather than second moments: φ less its mean over channels.

    Returns:
        The Kernel of the activations; not Gaussian.

    Raises:
        NotGaussianError: If the pre-activations are not Gaussian.
    """
    require_gaussian(kernel, dual.name)
    first, second = variances(kernel)
    moment = dual.forms.covariance if centred else dual.forms.value
    result = map_covariances(kernel, lambda sides: moment(_correlation(sides), sides.left, sides.right), first, second)
    ntk = kernel.ntk
    if ntk is not None:
        sides = cross_sides(kernel, first, second)
        ntk = ntk * dual.forms.derivative(_correlation(sides), sides.left, sides.right)
    return result.replace(ntk=ntk, is_gaussian=False)


def require_gaussian(kernel: Any, activation: str) -> None:
    """Refuse a Kernel whose distribution the dual activation does not know.

    Raises:
        NotGaussianError: If the Kernel does not describe Gaussian pre-activations.
    """
    if not kernel.is_gaussian:
        raise NotGaussianError(
            f"activation: {activation!r} must act on Gaussian pre-activations, those of a Dense or Conv layer or of "
            "sums of such; what came is an input, or the output of another activation, of BatchNormRelu or of a "
            "pooling. Put a Dense or Conv layer between."
        )


def _correlation(sides: Sides) -> jax.Array:
    """Correlations of a covariance: within [−1, 1], exactly one for a sample with itself, zero without a variance."""
    scale = jnp.sqrt(sides.left * sides.right)
    positive = scale > 0
    rho = jnp.where(positive, sides.covariance / jnp.where(positive, scale, 1.0), 0.0)
    return jnp.where(sides.itself & positive, 1.0, jnp.clip(rho, -1.0, 1.0))
