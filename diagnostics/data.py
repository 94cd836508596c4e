"""Inputs for networks: embedded data, and Gram matrices for which theory has closed forms."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from diagnostics.errors import UsageError
from diagnostics.names import unknown

DATA = {
    "digits": "scikit-learn's 1,797 handwritten digits (embedded), standardized: 64-vectors or 3×32×32 images",
    "gaussian:N,D": "N standard normal vectors of D entries",
}


@cache
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return torch.from_numpy(digits.images), torch.from_numpy(digits.target)


def digits_vectors(*, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The digits as standardized vectors.

    Args:
        dtype: Data type of the inputs.

    Returns:
        Inputs [1797, 64] whose every pixel is centred and scaled by the data set's one standard deviation (some pixels
        never vary), and labels [1797].
    """
    images, labels = _digits()
    x = images.flatten(1)
    x = x - x.mean(dim=0)
    return (x / x.std()).to(dtype), labels


def digits_images(*, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The digits as standardized color images of the size that the papers' CIFAR networks take.

    Args:
        dtype: Data type of the inputs.

    Returns:
        Inputs [1797, 3, 32, 32]: the 8×8 images enlarged bilinearly, standardized over the data set, repeated over
        three channels; and labels [1797].
    """
    images, labels = _digits()
    x = torch.nn.functional.interpolate(images[:, None], size=(32, 32), mode="bilinear", align_corners=False)
    x = (x - x.mean()) / x.std()
    return x.expand(-1, 3, -1, -1).to(dtype).contiguous(), labels


def split(x: Tensor, y: Tensor, *, train: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shuffles and splits into train inputs, train labels, test inputs, test labels.

    Args:
        x: Inputs [n, ...].
        y: Labels [n].
        train: Examples in the training part.
        seed: Seed of the shuffle.

    Raises:
        UsageError: If the training part leaves no test examples.
    """
    if not 0 < train < len(x):
        raise UsageError(f"train must lie between 1 and {len(x) - 1}, the examples there are less one; got {train}")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return x[order[:train]], y[order[:train]], x[order[train:]], y[order[train:]]


def inputs_of_gram(gram: Tensor) -> Tensor:
    """Inputs whose normalized inner products x·x'/n0 are the given Gram matrix.

    Args:
        gram: Positive definite matrix [m, m].

    Returns:
        Inputs [m, n0] with n0 = m: √n0 times the rows of the Cholesky factor.
    """
    return len(gram) ** 0.5 * torch.linalg.cholesky(gram)


def constant_correlation(m: int, rho: float, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """The Gram matrix ρ off and 1 on the diagonal ("const-ρ").

    Args:
        m: Number of points.
        rho: Correlation of every pair.
        dtype: Data type.
    """
    return rho * torch.ones(m, m, dtype=dtype) + (1 - rho) * torch.eye(m, dtype=dtype)


def load(spec: str, *, images: bool = False) -> tuple[Tensor, Tensor]:
    """The data set that a command line names.

    Args:
        spec: "digits" or "gaussian:N,D".
        images: Whether the network takes images.

    Returns:
        Inputs [n, ...] and labels [n].

    Raises:
        UsageError: If there is no such data set, or its parameters do not parse.
    """
    kind, _, parameters = spec.partition(":")
    loaders: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "digits": digits_images if images else digits_vectors,
        "gaussian": lambda: _gaussian(parameters, images=images),
    }
    if kind not in loaders:
        raise UsageError(unknown("data", spec, DATA))
    return loaders[kind]()


def _gaussian(parameters: str, *, images: bool) -> tuple[Tensor, Tensor]:
    try:
        n, d = (int(p) for p in parameters.split(","))
        if n < 1 or d < 1:
            raise ValueError
    except ValueError:
        message = (
            f"data gaussian:N,D takes two positive whole numbers, as in gaussian:256,64; got gaussian:{parameters}"
        )
        raise UsageError(message) from None
    shape = (n, 3, 32, 32) if images else (n, d)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator), torch.randint(10, (n,), generator=generator)
