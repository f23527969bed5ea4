"""95 % intervals of what is measured on a sample."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

_RESAMPLES = 1000


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


def bootstrapped(sums: NDArray[Any], counts: NDArray[Any], seed: int) -> NDArray[np.float64]:
    """The bootstrap interval of sum / count over independent documents, each with its sum and its count, by a seed."""
    draws = np.random.default_rng(seed).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), _RESAMPLES)
    return np.asarray(np.quantile((draws @ sums) / (draws @ counts), [0.025, 0.975]))
