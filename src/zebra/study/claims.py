"""The paper's qualitative claims as a checklist, each held against the rows by a rule that is written beside it.

The claims are recalled, not read in the paper (arXiv 2312.08618, section 3). A difference is one of loss: it is said as
a change of perplexity in percent, with its 95 % interval. A cell that is missing is not guessed at.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from zebra.report.series import Span, number, percent, span_name
from zebra.results import Result
from zebra.study.cells import ATTENTIONS, POSITIONS, Cell, Study
from zebra.study.spread import Difference, Losses, Scores, between, difference, gain, level, spread

HOLDS, FAILS, UNTESTED = "holds", "does not hold", "not tested here"
ALIKE = 0.02
"""What two losses in nats a token may differ by and still be called alike: 2 % of perplexity."""
_SHARE = percent(math.expm1(ALIKE), 0)
HOW = (
    "The claims are recalled from the paper, not read in it. Evidence is a change of perplexity with its 95 % "
    "interval, of runs paired by seed: by Student's t of the differences from three seeds on, with fewer by what the "
    "cells of several seeds scatter beside their own means and those of the seeds. One cell beats another where the "
    f"interval lies below 0, and does not where it lies above; it is as good where the interval lies below {_SHARE}, "
    f"and is not where it lies above {_SHARE}. Where the interval decides neither, or a cell is missing, the claim is "
    "not tested here. The intervals know of other seeds, not of other texts."
)
"""How the checklist is to be read."""


@dataclass(frozen=True)
class Part:
    """A line of evidence: what was compared with what, each with its number, the change, and whether the part holds."""

    one: tuple[str, str]
    other: tuple[str, str]
    where: str
    change: str
    interval: str
    held: bool | None
    rows: Sequence[Result] = ()


@dataclass
class Claim:
    """A claim (the paper's, or a check of ours), its rule, the verdict, its evidence and the cells that it rests on."""

    says: str
    rule: str
    verdict: str = UNTESTED
    papers: bool = True
    parts: list[Part] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)

    def judge(self, *held: bool | None) -> Claim:
        """Holds where all parts do, fails where one does; else it is untested."""
        self.verdict = FAILS if False in held else UNTESTED if None in held or not held else HOLDS
        return self

    @property
    def rows(self) -> list[Result]:
        """What it rests on, each row once."""
        return list({id(row): row for part in self.parts for row in part.rows}.values())

    def rest_on(self, *cells: Cell) -> None:
        """Name the cells of a part."""
        self.cells += [cell for cell in dict.fromkeys(cells) if cell not in self.cells]


def claims(study: Study) -> list[Claim]:
    """All of them, in the order of the page."""
    return [judged(study) for judged in _CLAIMS]


Rule = Callable[[Difference], bool | None]


def _beats(found: Difference) -> bool | None:
    """Whether the first is better; None where the interval leaves it open."""
    return True if found.high < 0 else False if found.low >= 0 else None


def _as_good(found: Difference) -> bool | None:
    """Whether the first is no worse; None where the interval leaves it open."""
    return True if found.high <= ALIKE else False if found.low > ALIKE else None


def _compare(
    claim: Claim, study: Study, one: Cell | None, rule: Rule, other: Cell | None, at: int | None = None,
    span: Span | None = None,
) -> bool | None:  # fmt: skip
    """Hold the first cell's perplexity against the second's at the positions of a context, and say so in the claim."""
    if one is None or other is None:
        return None
    context = at or other.length
    span = span or (0, context)
    a, b = _shared(study.scores(one, context, span), study.scores(other, context, span))
    if not a or not b:
        return None
    found = difference(a, b, [study.scores(cell, context, span) for cell in study.runs])
    held = None if found is None else rule(found)
    where = f"{span_name(span)} of {context:,}"
    rows = [*a.values(), *b.values()]
    said = ("–", "no spread to hold it against") if found is None else _said(found)
    claim.parts.append(Part(_with(study, one, a), _with(study, other, b), where, *said, held, rows))
    claim.rest_on(one, other)
    return held


def _shared(a: Scores, b: Scores) -> tuple[Scores, Scores]:
    """Of the seeds that both have, where there are such."""
    both = [seed for seed in a if seed in b]
    return ({seed: a[seed] for seed in both}, {seed: b[seed] for seed in both}) if both else (a, b)


def shown(scores: Scores) -> str:
    """A mean, with the deviation over seeds where there is one."""
    of = spread(scores)
    return number(of.mean) + (f" ± {number(of.deviation)}" if of.deviation is not None else "")


def _with(study: Study, cell: Cell, scores: Scores) -> tuple[str, str]:
    return study.title(cell), shown(scores)


def _said(found: Difference) -> tuple[str, str]:
    low, mean, high = (_percent(value) for value in (found.low, found.mean, found.high))
    return mean, f"{low} to {high}; {found.how}"


def _percent(nats: float) -> str:
    return percent(math.expm1(min(nats, 50.0)), sign="+")


def _nats(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")


def _context_helps(study: Study) -> Claim:
    claim = Claim(
        "Context beyond the reach of local layers helps in this data (a check of the set-up, not of the paper)",
        "at the last positions of the trained length global or grouped beats local, which sees no farther back than "
        "its layers times its window",
        papers=False,
    )
    local = study.cell("local")
    wide = [cell for kind in ("global", "grouped") if (cell := study.cell(kind)) is not None]
    held = [_compare(claim, study, cell, _beats, local, span=study.far(cell)) for cell in wide]
    return claim.judge(True if True in held else None if None in held or not held else False)


def _grouped_is_global(study: Study) -> Claim:
    claim = Claim(
        "Grouped attention is about as good as global, at a fraction of the cost",
        "it is as good, and computes fewer attention pairs; nothing is told by a global model that does not beat local "
        "at the last positions of the trained length, as it has not learned to use its context",
    )
    grouped, wide = study.cell("grouped"), study.cell("global")
    held = _compare(claim, study, grouped, _as_good, wide)
    if wide is not None:
        farther = _compare(claim, study, wide, _beats, study.cell("local"), span=study.far(wide))
        held = held if farther or held is False else None
    if grouped is None or wide is None:
        return claim.judge(held)
    costs = [study.rows(cell, "cost", "attention_pairs", study.length)[:1] for cell in (grouped, wide)]
    if not all(costs) or not costs[1][0].value > 0:
        return claim.judge(held, None)
    (less,), (more,) = costs
    names = [(study.title(cell), f"{row.value:,.0f} pairs") for cell, row in ((grouped, less), (wide, more))]
    change = percent(less.value / more.value - 1, sign="+")
    cheaper = less.value < more.value
    claim.parts.append(
        Part(names[0], names[1], f"a text of {study.length:,}", change, "counted", cheaper, [less, more])
    )
    return claim.judge(held, cheaper)


def _local_is_worse(study: Study) -> Claim:
    claim = Claim("Local attention alone is worse than global and than grouped", "both beat it")
    local, others = study.cell("local"), [study.cell(kind) for kind in ("global", "grouped")]
    return claim.judge(*(_compare(claim, study, other, _beats, local) for other in others))


def _summary_between(study: Study) -> Claim:
    claim = Claim(
        "Local attention with global approximation lies between local and global",
        "it beats local, and global is as good as it",
    )
    summary, local, wide = (study.cell(kind) for kind in ("summary", "local", "global"))
    better = _compare(claim, study, summary, _beats, local)
    return claim.judge(better, _compare(claim, study, wide, _as_good, summary))


def _rotary_is_best(study: Study) -> Claim:
    claim = Claim(
        "Rotary positions are the best, or as good as any",
        "in each kind of attention they are as good as every other position embedding; absolute and ALiBi are among "
        "those that were tried",
    )
    held, tried = [], {position for position in POSITIONS if study.cell("global", position)}
    for kind in ATTENTIONS:
        for position in POSITIONS[1:]:
            rotary, other = study.cell(kind), study.cell(kind, position)
            if rotary and other:
                held.append(_compare(claim, study, rotary, _as_good, other))
    return claim.judge(*held, *([] if tried >= {"absolute", "alibi"} else [None]))


def _rotary_extrapolates(study: Study) -> Claim:
    claim = Claim(
        "Rotary positions extrapolate better than absolute ones",
        "beyond the trained length rotary beats absolute. A table of learned positions ends there and cannot be read, "
        "so what stands here is rotary alone: far positions against the last of its own length",
    )
    rotary, absolute = study.cell("global"), study.cell("global", "absolute")
    contexts = [context for context in study.contexts(rotary) if rotary and context > rotary.length] if rotary else []
    if rotary is None or not contexts:
        return claim
    spans = study.spans(contexts[-1], [rotary])
    last = spans[-2] if len(spans) > 1 else spans[0]
    held = _compare(claim, study, rotary, _beats, absolute, contexts[-1], last)
    if held is None and not claim.parts:
        own, far = study.far(rotary), study.scores(rotary, contexts[-1], last)
        near = study.scores(rotary, rotary.length, own)
        names = _with(study, rotary, far), (f"the same at {span_name(own)} of {rotary.length:,}", shown(near))
        change = _percent(level(far) - level(near))
        rows = [*far.values(), *near.values()]
        where = f"{span_name(last)} of {contexts[-1]:,}"
        claim.parts.append(Part(names[0], names[1], where, change, "other positions of the text", None, rows))
        claim.rest_on(rotary)
    return claim.judge(held)


def _alibi_is_near_sighted(study: Study) -> Claim:
    claim = Claim(
        "ALiBi is fine within its length, yet weak at using far context",
        "under global attention it is as good as rotary over the trained length, and its loss falls less than rotary's "
        "from the first positions to the last",
    )
    rotary, alibi = study.cell("global"), study.cell("global", "alibi")
    fine = _compare(claim, study, alibi, _as_good, rotary)
    if rotary is None or alibi is None or len(study.spans(rotary.length, [rotary])) < 3:
        return claim.judge(fine, None)
    near, far = study.spans(rotary.length, [rotary])[0], study.far(rotary)

    def gains(cell: Cell) -> Losses:
        return gain(study.scores(cell, cell.length, near), study.scores(cell, cell.length, far))

    found = between(gains(alibi), gains(rotary), [gains(cell) for cell in study.runs if cell.length == rotary.length])
    if found is None:
        return claim.judge(fine, None)
    weak = _beats(found)
    shared = gains(alibi).keys() & gains(rotary).keys()
    falls = {cell: statistics.mean(gains(cell)[seed] for seed in shared) for cell in (alibi, rotary)}
    names = [(study.title(cell), f"falls by {fall:.4f} nats") for cell, fall in falls.items()]
    where = f"{span_name(near)} to {span_name(far)} of {rotary.length:,}"
    change = f"{_nats(found.mean)} nats", f"{_nats(found.low)} to {_nats(found.high)}; {found.how}"
    scores = (study.scores(cell, cell.length, span) for cell in (alibi, rotary) for span in (near, far))
    rows = [row for found in scores for row in found.values()]
    claim.parts.append(Part(names[0], names[1], where, *change, weak, rows))
    return claim.judge(fine, weak)


def _length_matters_more(study: Study) -> Claim:
    claim = Claim(
        "Training at the longer length matters more than the variant",
        "at the last positions of the longer length, what the shorter training costs each variant exceeds what lies "
        "between the best and the worst of them after the longer training; it does not hold where it exceeds that in "
        "none; of means, without an interval",
    )
    longest = max(cell.length for cell in study.runs)
    pairs = {cell._replace(length=study.length): cell for cell in study.runs if cell.length == longest > study.length}
    contexts = [c for short in pairs if short in study.runs for c in study.contexts(short) if c >= longest]
    context, span = max(contexts, default=0), (longest // 2, longest)
    costs, after = [], []
    for short, long in pairs.items():
        a, b = _shared(study.scores(short, context, span), study.scores(long, context, span))
        if math.isnan(level(a) - level(b)):
            continue
        costs.append(level(a) - level(b))
        after.append(level(b))
        rows = [*a.values(), *b.values()]
        where = f"{span_name(span)} of {context:,}"
        change = _percent(costs[-1])
        claim.parts.append(Part(_with(study, short, a), _with(study, long, b), where, change, "means", None, rows))
        claim.rest_on(short, long)
    if len(costs) < 2:
        return claim
    least, between_them = min(costs), max(after) - min(after)
    said = ("length, the least cost", _percent(least)), ("variants, worst against best", _percent(between_them))
    held = True if least > between_them else False if max(costs) <= between_them else None
    claim.parts.append(Part(*said, where, f"{_nats(least - between_them)} nats", "means", held))
    return claim.judge(held)


_CLAIMS: tuple[Callable[[Study], Claim], ...] = (
    _context_helps,
    _grouped_is_global,
    _local_is_worse,
    _summary_between,
    _rotary_is_best,
    _rotary_extrapolates,
    _alibi_is_near_sighted,
    _length_matters_more,
)
