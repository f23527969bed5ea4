"""What seeds tell apart: means, deviations, and differences with their intervals."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from zebra.results import Result

Scores = Mapping[int | None, Result]
"""One number of a cell for each seed."""
Losses = Mapping[int | None, float]
"""The same in nats a token."""
_TWO_SIDED = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t at 97.5 % for 1 to 10 degrees of freedom; for more, that of 10."""


class Spread(NamedTuple):
    """A mean over seeds, and the standard deviation where there are two or more."""

    mean: float
    deviation: float | None
    n: int


class Difference(NamedTuple):
    """What the first of two adds to the loss, in nats a token, and half its 95 % interval."""

    mean: float
    half: float
    how: str

    @property
    def low(self) -> float:
        """The interval's lower end."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """The interval's upper end."""
        return self.mean + self.half


def spread(scores: Scores) -> Spread:
    """Of perplexities."""
    values = [row.value for row in scores.values()]
    several = len(values) > 1 and all(map(math.isfinite, values))
    return Spread(math.fsum(values) / len(values), statistics.stdev(values) if several else None, len(values))


def level(scores: Scores) -> float:
    """The mean loss over seeds; NaN without a finite value."""
    losses = _losses(scores)
    return statistics.mean(losses.values()) if losses else math.nan


def difference(a: Scores, b: Scores, alike: Iterable[Scores]) -> Difference | None:
    """The loss of `a` less that of `b`, over the seeds that both have; None without one, or without a spread.

    With three shared seeds or more, the interval is Student's t of their differences. With fewer, the noise is what
    remains of the losses of all cells of several seeds after their own means and those of the seeds are taken off.

    Args:
        alike: the scores of all cells at the same positions.
    """
    return between(_losses(a), _losses(b), [_losses(scores) for scores in alike])


def gain(near: Scores, far: Scores) -> Losses:
    """By how much a cell's loss is lower far than near, for each seed."""
    one, two = _losses(near), _losses(far)
    return {seed: one[seed] - two[seed] for seed in one if seed in two}


def between(one: Losses, two: Losses, alike: Iterable[Losses]) -> Difference | None:
    """As `difference`, of losses."""
    shared = [one[seed] - two[seed] for seed in one if seed in two]
    if not shared:
        return None
    mean, n = statistics.mean(shared), len(shared)
    if n > 2:
        return Difference(mean, _quantile(n - 1) * statistics.stdev(shared) / math.sqrt(n), f"{n} seeds, paired")
    noise, freedom = _noise(alike)
    if not freedom:
        return None
    how = f"{n} seed{'s' if n > 1 else ''}, paired; the other cells' noise"
    return Difference(mean, _quantile(freedom) * noise * math.sqrt(2 / n), how)


def _noise(alike: Iterable[Losses]) -> tuple[float, int]:
    """The deviation of losses beside cell and seed, of the largest set of cells with the same seeds; its freedom."""
    sets: dict[frozenset[int | None], list[Losses]] = defaultdict(list)
    for losses in alike:
        sets[frozenset(losses)].append(losses)
    seeds, cells = max(sets.items(), key=lambda item: (len(item[0]) - 1) * (len(item[1]) - 1), default=((), []))
    freedom = (len(seeds) - 1) * (len(cells) - 1)
    if freedom < 1:
        return 0.0, 0
    of_cell = [statistics.mean(losses.values()) for losses in cells]
    of_seed = {seed: statistics.mean(losses[seed] for losses in cells) for seed in seeds}
    whole = statistics.mean(of_cell)
    rest = (losses[s] - mean - of_seed[s] + whole for losses, mean in zip(cells, of_cell, strict=True) for s in seeds)
    return math.sqrt(sum(value**2 for value in rest) / freedom), freedom


def _losses(scores: Scores) -> Losses:
    return {seed: math.log(row.value) for seed, row in scores.items() if 0 < row.value < math.inf}


def _quantile(freedom: int) -> float:
    return _TWO_SIDED[min(freedom, len(_TWO_SIDED)) - 1]
