"""The evidence for a claim about a study: comparisons of two cells by a rule, with intervals, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from zebra.report.series import Span, number, percent, span_name
from zebra.results import Result
from zebra.study.results import Study, StudyCell
from zebra.study.spread import Difference, Losses, Scores, half_width, loss_difference, losses, spread

HOLDS, FAILS, UNTESTED = "holds", "does not hold", "not tested here"
BEATS, AS_GOOD = 0.0, 0.02
"""The limits of rules: how far one cell's loss may be above another's, in nats per token; 0.02 is 2 % of perplexity."""


@dataclass(frozen=True)
class Evidence:
    """A comparison of two things, each with its number, the change, and whether it supports the claim.

    Attributes:
        compared: the name and the number of each of the two.
        gates: whether it only says that the claim can be tested, or is part of another comparison.
        difference: the difference of the losses with its interval; None where there is no interval.
        limit: the limit of the rule for `difference`.
    """

    compared: Sequence[tuple[str, str]]
    where: str
    change: str
    interval: str
    holds: bool | None
    results: Sequence[Result] = ()
    gates: bool = False
    difference: Difference | None = None
    limit: float = 0.0

    @property
    def distance(self) -> float:
        """How far the limit lies outside the interval, in nats: negative if inside, inf without an interval."""
        if self.difference is None:
            return math.inf
        return max(self.limit - self.difference.high, self.difference.low - self.limit)

    @property
    def seeds(self) -> float:
        """How many seeds per cell would decide the comparison; inf if it is decided, or if 30 would not do."""
        return (self.difference and seeds_to_decide(self.difference, self.limit)) or math.inf


def within(difference: Difference, limit: float) -> bool | None:
    """Whether a difference is at most a limit; None where the interval includes both outcomes."""
    return True if difference.high <= limit else False if difference.low > limit else None


def seeds_to_decide(difference: Difference, limit: float) -> int | None:
    """How many seeds would put the limit outside Student's t interval, with the present mean and deviation.

    None if it is outside already, or if 30 seeds would not do.
    """
    if within(difference, limit) is not None:
        return None
    return next((n for n in range(3, 31) if half_width(difference.deviation, n) < abs(difference.mean - limit)), None)


@dataclass
class Claim:
    """A claim about a study, its rule, the verdict and its evidence.

    Attributes:
        in_paper: whether the Zebra paper makes it.
        of_text_alone: whether it is about text only, so that it is not tested on recall.
    """

    text: str
    rule: str
    in_paper: bool = True
    of_text_alone: bool = False
    verdict: str = UNTESTED
    evidence: list[Evidence] = field(default_factory=list)

    @property
    def results(self) -> list[Result]:
        """The results behind its evidence, each once."""
        return list({id(one): one for part in self.evidence for one in part.results}.values())

    @property
    def deciding(self) -> Evidence | None:
        """The comparison that decides the verdict: the clearest failure, or without one the least clear comparison.

        Of an open claim the one by which more seeds would decide it: the first to fail, or else the last to hold.
        """
        own = [part for part in self.evidence if not part.gates]
        if undecided := [part for part in own if part.holds is None and self.verdict == UNTESTED]:
            failing = [part for part in undecided if part.difference and part.difference.mean > part.limit]
            choose = min if failing else max
            return choose(failing or undecided, key=lambda part: (part.seeds, -part.distance))
        parts = [part for part in own if part.holds is (self.verdict == HOLDS)] or own
        choose = max if self.verdict == FAILS else min
        return choose(parts, key=lambda part: part.distance, default=None)

    def compare(
        self, study: Study, one: StudyCell | None, limit: float, other: StudyCell | None, span: Span | None = None,
        at: int | None = None, gates: bool = False,
    ) -> bool | None:  # fmt: skip
        """Compare two cells by a rule's limit, at a span of a context; by default at all of the second's length."""
        if one is None or other is None:
            return None
        context = at or other.length
        span = span or (0, context)
        scores = [(study.title(cell), study.scores(cell, context, span)) for cell in (one, other)]
        of_all = [losses(study.scores(cell, context, span)) for cell in study.runs]
        return self.decide(scores, limit, of_all, place(span, context), gates)

    def decide(
        self,
        scores: Sequence[tuple[str, Scores]],
        limit: float,
        of_all: Sequence[Losses],
        where: str,
        gates: bool = False,
    ) -> bool | None:
        """Compare two named scores by a rule's limit; `of_all`, the losses of all cells, show the noise of seeds."""
        names, of_two = zip(*scores, strict=True)
        first, second = shared(*of_two)
        if not first or not second:
            return None
        compared, results = [*zip(names, map(mean_text, (first, second)), strict=True)], results_of(first, second)
        change = loss_difference(losses(first), losses(second), of_all)
        if isinstance(change, str):
            self.evidence.append(Evidence(compared, where, "–", change, None, results, gates))
            return None
        low, mean, high = (change_text(nats) for nats in (change.low, change.mean, change.high))
        interval, holds = f"{low} to {high}; {change.method}", within(change, limit)
        self.evidence.append(Evidence(compared, where, mean, interval, holds, results, gates, change, limit))
        return holds


def mean_text(scores: Scores) -> str:
    """The mean over seeds as text, with the deviation where there are several."""
    of = spread(scores)
    return number(of.mean) + (f" ± {number(of.deviation)}" if of.deviation is not None else "")


def shared(a: Scores, b: Scores) -> tuple[Scores, Scores]:
    """The scores of the seeds that both have; all scores where they share no seed."""
    both = [seed for seed in a if seed in b]
    return ({seed: a[seed] for seed in both}, {seed: b[seed] for seed in both}) if both else (a, b)


def results_of(*scores: Scores) -> list[Result]:
    """The results of all seeds in some scores."""
    return [result for by_seed in scores for result in by_seed.values()]


def place(span: Span, context: int) -> str:
    """A bucket of positions and its context as text."""
    return f"{span_name(span)} of {context:,}"


def change_text(nats: float) -> str:
    """A difference of losses as a change of perplexity in percent."""
    return percent(math.expm1(min(nats, 50.0)), sign="+")
