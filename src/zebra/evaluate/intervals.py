"""Values that are measured on a sample, with their 95 % intervals."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_RESAMPLES = 1000


class Estimate(NamedTuple):
    """A value and its 95 % interval, named as the columns of a result; None where there is no interval."""

    value: float
    low: float | None
    high: float | None


def wilson(mean: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a mean of n values between 0 and 1.

        (m + z²/2n ± z √(m (1 - m) / n + z²/4n²)) / (1 + z²/n),   z = 1.96

    Exact in its variance for values of 0 and 1; values between vary less, so that it is too wide for them.
    """
    z = 1.959964
    middle = mean + z * z / (2 * n)
    half = z * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    whole = 1 + z * z / n
    return max(0.0, (middle - half) / whole), min(1.0, (middle + half) / whole)


def bootstrap(sums: NDArray[Any], counts: NDArray[Any], seed: int) -> Estimate:
    """A mean, sum of `sums` (n,) / sum of `counts` (n,), with its bootstrap interval over n independent documents.

    One document has no interval.
    """
    value, n = float(sums.sum() / counts.sum()), len(sums)
    if n < 2:
        return Estimate(value, None, None)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), _RESAMPLES)
    low, high = np.quantile((draws @ sums) / (draws @ counts), [0.025, 0.975]).tolist()
    return Estimate(value, low, high)
