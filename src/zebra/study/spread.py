"""Statistics over seeds: means, standard deviations, and differences of losses with their intervals."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from zebra.evaluate.intervals import students_t
from zebra.results import Result

Scores = Mapping[int | None, Result]
"""A cell's perplexity by seed."""
Losses = Mapping[int | None, float]
"""A cell's loss by seed, in nats per token."""


class Spread(NamedTuple):
    """exp(mean loss over seeds), and this times the standard deviation of the losses; None below two seeds.

    Both are of losses, as the differences are: the worst seed would dominate a mean of perplexities.
    """

    mean: float
    deviation: float | None


class Difference(NamedTuple):
    """The loss of the first of two minus that of the second, in nats per token, and half its 95 % interval.

    `deviation` is the standard deviation of the difference for one seed.
    """

    mean: float
    half: float
    method: str
    deviation: float

    @property
    def low(self) -> float:
        """The lower bound of the interval."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """The upper bound of the interval."""
        return self.mean + self.half


def spread(scores: Scores) -> Spread:
    """The mean and the standard deviation over seeds, see `Spread`."""
    values = [*losses(scores).values()]
    mean = math.exp(math.fsum(values) / len(values))
    several = len(values) > 1 and all(map(math.isfinite, values))
    return Spread(mean, mean * statistics.stdev(values) if several else None)


def losses(scores: Scores) -> Losses:
    """The losses in nats per token: ln of each perplexity; NaN where that is not positive."""
    return {seed: math.log(one.value) if one.value > 0 else math.nan for seed, one in scores.items()}


def level(scores: Scores) -> float:
    """The mean loss over seeds; NaN without seeds, or if a loss is not finite."""
    values = losses(scores).values()
    return statistics.mean(values) if values and all(map(math.isfinite, values)) else math.nan


def gain(near: Scores, far: Scores) -> Losses:
    """How much lower a cell's loss is at far positions than at near ones, by seed."""
    one, two = losses(near), losses(far)
    return {seed: one[seed] - two[seed] for seed in one if seed in two}


def loss_difference(one: Losses, two: Losses, others: Iterable[Losses]) -> Difference | str:
    """The loss of `one` minus that of `two`, over the seeds that both have; without an interval, the reason as text.

    With three shared seeds or more, the interval is Student's t of their differences. With fewer, the noise is the
    residual of the losses of all cells with several seeds, after subtracting the means of cells and of seeds.

    Args:
        others: the losses of all cells at the same positions.
    """
    shared = [one[seed] - two[seed] for seed in one if seed in two]
    if not shared:
        return "no common seed"
    if not all(map(math.isfinite, shared)):
        return "a loss is not finite"
    mean, n = statistics.mean(shared), len(shared)
    if n > 2:
        deviation = statistics.stdev(shared)
        return Difference(mean, half_width(deviation, n), f"{n} seeds, paired", deviation)
    noise, freedom = _noise(others)
    if not freedom:
        return "no spread to compare it with"
    method = f"{n} seed{'s' if n > 1 else ''}, paired; the other cells' noise"
    deviation = noise * math.sqrt(2)
    return Difference(mean, half_width(deviation, n, freedom), method, deviation)


def half_width(deviation: float, n: int, freedom: int | None = None) -> float:
    """Half the width of Student's 95 % t interval for the mean of n values; n - 1 degrees of freedom by default."""
    return students_t(freedom or n - 1) * deviation / math.sqrt(n)


def _noise(others: Iterable[Losses]) -> tuple[float, int]:
    """The residual standard deviation over the largest set of cells with the same seeds, and its degrees of freedom."""
    sets: dict[frozenset[int | None], list[Losses]] = defaultdict(list)
    for cell in others:
        if all(map(math.isfinite, cell.values())):
            sets[frozenset(cell)].append(cell)
    seeds, cells = max(sets.items(), key=lambda item: (len(item[0]) - 1) * (len(item[1]) - 1), default=((), []))
    freedom = (len(seeds) - 1) * (len(cells) - 1)
    if not cells or freedom < 1:
        return 0.0, 0
    of_cell = [statistics.mean(cell.values()) for cell in cells]
    of_seed = {seed: statistics.mean(cell[seed] for cell in cells) for seed in seeds}
    overall = statistics.mean(of_cell)
    residuals = (
        cell[seed] - mean - of_seed[seed] + overall for cell, mean in zip(cells, of_cell, strict=True) for seed in seeds
    )
    return math.sqrt(sum(value**2 for value in residuals) / freedom), freedom
