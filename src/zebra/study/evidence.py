"""What a claim about a study rests on: comparisons of two cells by a rule, each with its interval, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from zebra.report.series import Span, number, percent, span_name
from zebra.results import Result
from zebra.study.results import Study, StudyCell
from zebra.study.spread import Difference, Losses, Scores, loss_difference, losses, spread

HOLDS, FAILS, UNTESTED = "holds", "does not hold", "not tested here"
EQUAL = 0.02
"""The difference of two losses in nats per token below which they count as equal: 2 % of perplexity."""


@dataclass(frozen=True)
class Evidence:
    """Two things that were compared, each with its number, the change, and whether it supports the claim.

    Attributes:
        seeds: of each cell, for the interval of so large a change to decide; None where it does, or there is none.
        margin: how far the interval's upper end lies below the rule's limit, in nats.
    """

    compared: Sequence[tuple[str, str]]
    where: str
    change: str
    interval: str
    holds: bool | None
    results: Sequence[Result] = ()
    seeds: int | None = None
    margin: float = math.inf


BEATS, AS_GOOD = 0.0, EQUAL
"""The rules: the largest loss of the first cell above that of the second, in nats per token."""


def within(change: Difference, limit: float) -> bool | None:
    """Whether a difference is at most a limit; None where the interval leaves it open."""
    return True if change.high <= limit else False if change.low > limit else None


def seeds_to_decide(change: Difference, limit: float, seeds: int) -> int | None:
    """How many seeds would leave the limit outside the interval; None where it is outside.

    The width of an interval falls with the square root of their number.
    """
    if within(change, limit) is not None or change.mean == limit:
        return None
    return math.ceil(seeds * (change.half / (change.mean - limit)) ** 2)


@dataclass
class Claim:
    """A claim about a study, its rule, the verdict and its evidence.

    Attributes:
        in_paper: whether the paper makes it; otherwise it checks our set-up.
    """

    text: str
    rule: str
    in_paper: bool = True
    verdict: str = UNTESTED
    evidence: list[Evidence] = field(default_factory=list)

    @property
    def results(self) -> list[Result]:
        """What it rests on, each result once."""
        return list({id(one): one for part in self.evidence for one in part.results}.values())

    @property
    def deciding(self) -> Evidence | None:
        """Of the comparisons that have the outcome of the verdict, the one that is farthest from any other outcome."""
        outcome = {HOLDS: True, FAILS: False, UNTESTED: None}[self.verdict]
        parts = [part for part in self.evidence if part.holds is outcome] or self.evidence
        return min(parts, key=lambda part: part.margin, default=None)

    def compare(
        self, study: Study, one: StudyCell | None, limit: float, other: StudyCell | None, span: Span | None = None,
        at: int | None = None,
    ) -> bool | None:  # fmt: skip
        """Compare two cells by a rule's limit, at a span of a context (by default the second cell's whole length)."""
        if one is None or other is None:
            return None
        context = at or other.length
        span = span or (0, context)
        a, b = study.scores(one, context, span), study.scores(other, context, span)
        of_all = [losses(study.scores(cell, context, span)) for cell in study.runs]
        return self.decide([(study.title(one), a), (study.title(other), b)], limit, of_all, place(span, context))

    def decide(
        self, scores: Sequence[tuple[str, Scores]], limit: float, of_all: Sequence[Losses], where: str
    ) -> bool | None:
        """Compare two named scores by a rule's limit, beside the losses of all cells."""
        (one, first), (other, second) = scores
        a, b = shared(first, second)
        if not a or not b:
            return None
        names, results = [(one, mean_text(a)), (other, mean_text(b))], results_of(a, b)
        change = loss_difference(losses(a), losses(b), of_all)
        if change is None:
            self.evidence.append(Evidence(names, where, "–", "no spread to compare it with", None, results))
            return None
        low, mean, high = (change_text(nats) for nats in (change.low, change.mean, change.high))
        interval, held = f"{low} to {high}; {change.method}", within(change, limit)
        seeds, margin = seeds_to_decide(change, limit, min(len(a), len(b))), limit - change.high
        self.evidence.append(Evidence(names, where, mean, interval, held, results, seeds, margin))
        return held


def mean_text(scores: Scores) -> str:
    """A mean, with the deviation over seeds where there are several."""
    of = spread(scores)
    return number(of.mean) + (f" ± {number(of.deviation)}" if of.deviation is not None else "")


def shared(a: Scores, b: Scores) -> tuple[Scores, Scores]:
    """The scores of the seeds that both have; all where there are none."""
    both = [seed for seed in a if seed in b]
    return ({seed: a[seed] for seed in both}, {seed: b[seed] for seed in both}) if both else (a, b)


def results_of(*scores: Scores) -> list[Result]:
    """The results of all seeds."""
    return [result for by_seed in scores for result in by_seed.values()]


def place(span: Span, context: int) -> str:
    """A bucket of positions and its context, for people."""
    return f"{span_name(span)} of {context:,}"


def change_text(nats: float) -> str:
    """A difference of losses as a change of perplexity."""
    return percent(math.expm1(min(nats, 50.0)), sign="+")
