"""The paper's qualitative claims as a checklist, each compared with the results by a rule that is written beside it.

The claims are recalled, not read in the paper (arXiv 2312.08618, section 3). A difference is one of loss; it is shown
as a change of perplexity in percent, with its 95 % interval. A missing cell leaves its claim untested.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from zebra.report.series import Span, number, percent, span_name
from zebra.results import Result
from zebra.study.results import ATTENTIONS, POSITIONS, Study, StudyCell
from zebra.study.spread import Difference, Losses, Scores, gain, level, loss_difference, losses, spread

HOLDS, FAILS, UNTESTED = "holds", "does not hold", "not tested here"
EQUAL = 0.02
"""The difference of two losses in nats per token below which they count as equal: 2 % of perplexity."""
_SHARE = percent(math.expm1(EQUAL), 0)
METHOD = (
    "The claims are recalled from the paper, not read in it. The evidence is a change of perplexity with its 95 % "
    "interval, over runs paired by seed. With three seeds or more it is Student's t interval of the differences. With "
    "fewer, the noise is the residual of the cells with several seeds, without their own means and those of the seeds.",
    "One cell beats another where the interval lies below 0, and does not where it lies above. It is as good where the "
    f"interval lies below {_SHARE}, and is not where it lies above {_SHARE}. Where the interval decides neither, or a "
    "cell is missing, the claim is not tested here. The intervals cover other seeds, not other texts.",
)
"""How the checklist is to be read, in paragraphs."""


@dataclass(frozen=True)
class Evidence:
    """Two things that were compared, each with its number, the change, and whether it supports the claim."""

    compared: Sequence[tuple[str, str]]
    where: str
    change: str
    interval: str
    holds: bool | None
    results: Sequence[Result] = ()


Rule = Callable[[Difference], bool | None]


def beats(change: Difference) -> bool | None:
    """Whether the first cell is better; None where the interval leaves it open."""
    return True if change.high < 0 else False if change.low >= 0 else None


def as_good(change: Difference) -> bool | None:
    """Whether the first cell is no worse; None where the interval leaves it open."""
    return True if change.high <= EQUAL else False if change.low > EQUAL else None


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

    def compare(
        self, study: Study, one: StudyCell | None, rule: Rule, other: StudyCell | None, span: Span | None = None,
        at: int | None = None,
    ) -> bool | None:  # fmt: skip
        """Compare two cells by a rule, at a span of a context (by default the second cell's whole length)."""
        if one is None or other is None:
            return None
        context = at or other.length
        span = span or (0, context)
        a, b = _shared(study.scores(one, context, span), study.scores(other, context, span))
        if not a or not b:
            return None
        of_all = [losses(study.scores(cell, context, span)) for cell in study.runs]
        change = loss_difference(losses(a), losses(b), of_all)
        names, where = _named(study, (one, a), (other, b)), _where(span, context)
        if change is None:
            self.evidence.append(Evidence(names, where, "–", "no spread to compare it with", None, _results(a, b)))
            return None
        low, mean, high = (_percent(nats) for nats in (change.low, change.mean, change.high))
        interval = f"{low} to {high}; {change.method}"
        self.evidence.append(Evidence(names, where, mean, interval, rule(change), _results(a, b)))
        return rule(change)


def claims(study: Study) -> list[Claim]:
    """All claims, in the order of the page."""
    checked = []
    for (text, rule), check in _CLAIMS.items():
        claim = Claim(text, rule, in_paper=check is not _context_helps)
        holds = check(claim, study)
        claim.verdict = UNTESTED if holds is None else HOLDS if holds else FAILS
        checked.append(claim)
    return checked


def mean_text(scores: Scores) -> str:
    """A mean, with the deviation over seeds where there are several."""
    of = spread(scores)
    return number(of.mean) + (f" ± {number(of.deviation)}" if of.deviation is not None else "")


def _all(*holds: bool | None) -> bool | None:
    """False where one part fails, None where one is open or there is none."""
    return False if False in holds else None if None in holds or not holds else True


def _shared(a: Scores, b: Scores) -> tuple[Scores, Scores]:
    """The scores of the seeds that both have; all where there are none."""
    both = [seed for seed in a if seed in b]
    return ({seed: a[seed] for seed in both}, {seed: b[seed] for seed in both}) if both else (a, b)


def _named(study: Study, *cells: tuple[StudyCell, Scores]) -> list[tuple[str, str]]:
    return [(study.title(cell), mean_text(scores)) for cell, scores in cells]


def _results(*scores: Scores) -> list[Result]:
    return [result for by_seed in scores for result in by_seed.values()]


def _where(span: Span, context: int) -> str:
    return f"{span_name(span)} of {context:,}"


def _percent(nats: float) -> str:
    return percent(math.expm1(min(nats, 50.0)), sign="+")


def _nats(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")


def _context_helps(claim: Claim, study: Study) -> bool | None:
    local = study.cell("local")
    wide = [cell for kind in ("global", "grouped") if (cell := study.cell(kind)) is not None]
    holds = [claim.compare(study, cell, beats, local, span=study.far(cell)) for cell in wide]
    return True if True in holds else _all(*holds)


def _grouped_is_global(claim: Claim, study: Study) -> bool | None:
    grouped, wide = study.cell("grouped"), study.cell("global")
    holds = claim.compare(study, grouped, as_good, wide)
    if wide is not None:
        uses_context = claim.compare(study, wide, beats, study.cell("local"), span=study.far(wide))
        holds = holds if uses_context or holds is False else None
    if grouped is None or wide is None:
        return holds
    fewer, more = (study.cost(cell, "attention_pairs") for cell in (grouped, wide))
    if fewer is None or more is None or not more.value > 0:
        return _all(holds, None)
    names = [(study.title(cell), f"{cost.value:,.0f} pairs") for cell, cost in ((grouped, fewer), (wide, more))]
    change, cheaper = percent(fewer.value / more.value - 1, sign="+"), fewer.value < more.value
    claim.evidence.append(Evidence(names, f"a text of {study.length:,}", change, "counted", cheaper, [fewer, more]))
    return _all(holds, cheaper)


def _local_is_worse(claim: Claim, study: Study) -> bool | None:
    local = study.cell("local")
    return _all(*(claim.compare(study, study.cell(kind), beats, local) for kind in ("global", "grouped")))


def _summary_between(claim: Claim, study: Study) -> bool | None:
    summary, local, wide = (study.cell(kind) for kind in ("summary", "local", "global"))
    return _all(claim.compare(study, summary, beats, local), claim.compare(study, wide, as_good, summary))


def _rotary_is_best(claim: Claim, study: Study) -> bool | None:
    pairs = [(study.cell(kind), study.cell(kind, position)) for kind in ATTENTIONS for position in POSITIONS[1:]]
    holds = [claim.compare(study, rotary, as_good, other) for rotary, other in pairs if rotary and other]
    tried = study.cell("global", "absolute") and study.cell("global", "alibi")
    return _all(*holds, *([] if tried else [None]))


def _rotary_extrapolates(claim: Claim, study: Study) -> bool | None:
    rotary, absolute = study.cell("global"), study.cell("global", "absolute")
    context = max(study.contexts(rotary), default=0) if rotary else 0
    if rotary is None or context <= rotary.length:
        return None
    spans = study.spans(context, [rotary])
    last = spans[-2] if len(spans) > 1 else spans[0]
    holds = claim.compare(study, rotary, beats, absolute, last, context)
    if holds is None and not claim.evidence:
        near_span, far = study.far(rotary), study.scores(rotary, context, last)
        near = study.scores(rotary, rotary.length, near_span)
        names = [*_named(study, (rotary, far)), (f"the same at {_where(near_span, rotary.length)}", mean_text(near))]
        change, where = _percent(level(far) - level(near)), _where(last, context)
        claim.evidence.append(Evidence(names, where, change, "other positions", None, _results(far, near)))
    return holds


def _alibi_is_near_sighted(claim: Claim, study: Study) -> bool | None:
    rotary, alibi = study.cell("global"), study.cell("global", "alibi")
    fine = claim.compare(study, alibi, as_good, rotary)
    if rotary is None or alibi is None or len(spans := study.spans(rotary.length, [rotary])) < 3:
        return _all(fine, None)
    near, far = spans[0], study.far(rotary)

    def gains(cell: StudyCell) -> Losses:
        return gain(study.scores(cell, cell.length, near), study.scores(cell, cell.length, far))

    one, two = gains(alibi), gains(rotary)
    change = loss_difference(one, two, [gains(cell) for cell in study.runs if cell.length == rotary.length])
    if change is None:
        return _all(fine, None)
    falls = [statistics.mean(of[seed] for seed in one.keys() & two.keys()) for of in (one, two)]
    cells = alibi, rotary
    names = [(study.title(cell), f"falls by {fall:.4f} nats") for cell, fall in zip(cells, falls, strict=True)]
    interval = f"{_nats(change.low)} to {_nats(change.high)}; {change.method}"
    results = _results(*(study.scores(cell, cell.length, span) for cell in cells for span in (near, far)))
    where = f"{span_name(near)} to {_where(far, rotary.length)}"
    claim.evidence.append(Evidence(names, where, f"{_nats(change.mean)} nats", interval, beats(change), results))
    return _all(fine, beats(change))


def _length_matters_more(claim: Claim, study: Study) -> bool | None:
    longest = max(cell.length for cell in study.runs)
    pairs = {cell._replace(length=study.length): cell for cell in study.runs if cell.length == longest > study.length}
    contexts = [c for short in pairs if short in study.runs for c in study.contexts(short) if c >= longest]
    context, span = max(contexts, default=0), (longest // 2, longest)
    costs, after = [], []
    for short, long in pairs.items():
        a, b = _shared(study.scores(short, context, span), study.scores(long, context, span))
        cost = level(a) - level(b)
        if math.isnan(cost):
            continue
        costs.append(cost)
        after.append(level(b))
        names = _named(study, (short, a), (long, b))
        claim.evidence.append(Evidence(names, _where(span, context), _percent(cost), "means", None, _results(a, b)))
    if len(costs) < 2:
        return None
    least, range_after = min(costs), max(after) - min(after)
    names = [("length, the least cost", _percent(least)), ("variants, worst against best", _percent(range_after))]
    holds = True if least > range_after else False if max(costs) <= range_after else None
    change = f"{_nats(least - range_after)} nats"
    claim.evidence.append(Evidence(names, _where(span, context), change, "means", holds))
    return holds


_CLAIMS: dict[tuple[str, str], Callable[[Claim, Study], bool | None]] = {
    (
        "Context beyond the reach of local layers helps in this data (a check of the set-up, not of the paper)",
        "at the last positions of the trained length global or grouped beats local, which sees no farther back than "
        "its layers times its window",
    ): _context_helps,
    (
        "Grouped attention is about as good as global, at a fraction of the cost",
        "grouped is as good as global, and computes fewer attention pairs. A global model that does not beat local at "
        "the last positions of the trained length has not learned to use its context and leaves the claim untested",
    ): _grouped_is_global,
    ("Local attention alone is worse than global and than grouped", "both beat local"): _local_is_worse,
    (
        "Local attention with global approximation lies between local and global",
        "summary beats local, and global is as good as summary",
    ): _summary_between,
    (
        "Rotary positions are the best, or as good as any",
        "in each kind of attention rotary is as good as every other position embedding, and absolute and ALiBi were "
        "tried under global attention",
    ): _rotary_is_best,
    (
        "Rotary positions extrapolate better than absolute ones",
        "beyond the trained length rotary beats absolute. A table of learned positions ends there, so the evidence is "
        "rotary alone: far positions against the last of its own length",
    ): _rotary_extrapolates,
    (
        "ALiBi is fine within its length, yet weak at using far context",
        "under global attention ALiBi is as good as rotary over the trained length, and its loss falls less than "
        "rotary's from the first positions to the last",
    ): _alibi_is_near_sighted,
    (
        "Training at the longer length matters more than the variant",
        "at the last positions of the longer length, the shorter training costs every variant more than the worst of "
        "them loses to the best after the longer training. It does not hold where it costs none more. Of means, "
        "without an interval",
    ): _length_matters_more,
}
"""Each claim and the rule that it holds by, with the function that checks it."""
