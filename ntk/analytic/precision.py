"""Double precision without touching the global JAX setting."""

from contextlib import AbstractContextManager

import jax
import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
"""What every function of :mod:`ntk.analytic` returns: a NumPy array in double precision."""


def double_precision() -> AbstractContextManager[object]:
    """Return a context in which JAX computes in float64, whatever the global flag says.

    The flag is a thread-local override: nothing is left behind. Why float64: docs/mathematics.md §1.3.
    """
    return jax.enable_x64(True)


def read_only(values: ArrayLike) -> Array:
    """Return a float64 copy of ``values``, of the same shape, that cannot be written to."""
    copy = np.array(values, dtype=np.float64)
    copy.flags.writeable = False
    return copy
