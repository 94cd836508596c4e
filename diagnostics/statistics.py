"""From replications to an interval: the only place where uncertainty is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from diagnostics.measurement import Measurement, pool

STANDARD_ERRORS = 4.0
"""Half-width of every interval, in standard errors, fixed before measuring.

Two-sided level by Student's t: 0.03 with 4 initializations, 0.005 with 8, 0.001 with 16; 6e-5 in the limit.
"""


@dataclass(frozen=True)
class Estimate:
    """A number with its uncertainty.

    Attributes:
        value: The point estimate.
        standard_error: Its standard error; None for a quantity without randomness (bytes, exact identities).
        n: Independent replications behind it.
    """

    value: float
    standard_error: float | None
    n: int

    @property
    def interval(self) -> tuple[float, float]:
        """The value plus and minus four standard errors; the value itself when there is no randomness."""
        half = 0.0 if self.standard_error is None else STANDARD_ERRORS * self.standard_error
        return self.value - half, self.value + half


def jackknife(statistic: Callable[[Measurement], float], replications: Sequence[Measurement]) -> Estimate:
    """Evaluates a statistic of the pooled measurement, with its standard error by leaving one replication out.

    For a statistic linear in the measurement this is the ordinary standard error of the mean; for a nonlinear one (a
    condition number of an averaged kernel, a slope of logarithms) it is correct to first order (Efron and Stein 1981).

    Args:
        statistic: Maps a pooled measurement to a number.
        replications: One measurement per independent replication.
    """
    n = len(replications)
    value = float(statistic(pool(replications)))
    if n == 1:
        return Estimate(value, None, 1)
    left_out = np.array([statistic(pool([*replications[:i], *replications[i + 1 :]])) for i in range(n)])
    return Estimate(value, float(np.sqrt((n - 1) / n * np.sum((left_out - left_out.mean()) ** 2))), n)
