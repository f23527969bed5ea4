"""The paper's qualitative claims as a checklist, each checked against the results by a rule stated beside it.

The claims are recalled, not read in the paper (arXiv 2312.08618, section 3). Differences are of loss, and are shown as
changes of perplexity in percent with their 95 % intervals. A claim is untested where a cell is missing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import NamedTuple

from zebra.report.series import percent, span_name
from zebra.study.evidence import (
    AS_GOOD,
    BEATS,
    FAILS,
    HOLDS,
    UNTESTED,
    Claim,
    Evidence,
    change_text,
    place,
    results_of,
    shared,
    within,
)
from zebra.study.results import ATTENTIONS, POSITIONS, RECALL, Study, StudyCell
from zebra.study.spread import Losses, gain, level, loss_difference, losses

_SHARE = percent(math.expm1(AS_GOOD), 0)
METHOD = (
    "The claims are recalled from the paper, not read in it. The evidence is a change of perplexity with its 95 % "
    "interval, over runs paired by seed. With three seeds or more it is Student's t interval of the differences. With "
    "fewer, the noise is pooled from the cells with several seeds, less their means and those of the seeds.",
    "One cell beats another where the whole interval lies below 0, and does not where it lies above. It is as good "
    f"where the interval lies below {_SHARE}, and is not where it lies above. Where the interval decides neither, the "
    "claim is open; where a cell is missing, it is not tested. Neither counts as a result. The intervals cover other "
    "seeds, not other texts, and are not corrected for their number: where a claim has k comparisons, chance "
    "rejects it in up to 2.5 × k % of studies although it is true.",
)
"""How to read the checklist, in paragraphs."""


def claims(study: Study) -> list[Claim]:
    """All claims, in the order of the page; the one about Self-Extend only where a cell was evaluated with it."""
    checked = []
    for rule in _RULES:
        if rule.check is _self_extend_carries and not study.uses_self_extend:
            continue
        claim = Claim(rule.claim, rule.holds_where, rule.in_paper, rule.of_text_alone)
        holds = None if rule.of_text_alone and study.subject == RECALL else rule.check(claim, study)
        claim.verdict = UNTESTED if holds is None else HOLDS if holds else FAILS
        checked.append(claim)
    return checked


def _all(*holds: bool | None) -> bool | None:
    """False if any part fails; else None if any is open or there are none; else True."""
    return False if False in holds else None if None in holds or not holds else True


def _nats(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")


def _context_helps(claim: Claim, study: Study) -> bool | None:
    full = study.cell("global")
    return None if full is None else claim.compare(study, full, BEATS, study.cell("local"), study.far(full))


def _grouped_is_global(claim: Claim, study: Study) -> bool | None:
    full = study.cell("global")
    if full is None:
        return None
    parts = []
    for grouped in study.cells("grouped"):
        parts.append(claim.compare(study, grouped, AS_GOOD, full))
        fewer, more = (study.cost(cell, "attention_pairs") for cell in (grouped, full))
        if fewer is None or more is None or not more.value > 0:
            parts.append(None)
            continue
        names = [(study.title(cell), f"{cost.value:,.0f} pairs") for cell, cost in ((grouped, fewer), (full, more))]
        change, is_cheaper = percent(fewer.value / more.value - 1, sign="+"), fewer.value < more.value
        where = f"a text of {study.length:,}"
        claim.evidence.append(Evidence(names, where, change, "counted", is_cheaper, [fewer, more]))
        parts.append(is_cheaper)
    holds = _all(*parts)
    uses_context = claim.compare(study, full, BEATS, study.cell("local"), study.far(full), gates=True)
    return holds if uses_context or holds is False else None


def _local_is_worse(claim: Claim, study: Study) -> bool | None:
    others = [*filter(None, [study.cell("global")]), *study.cells("grouped")]
    holds = [claim.compare(study, cell, BEATS, study.cell("local")) for cell in others]
    return _all(*holds, *([] if len(others) > 1 else [None]))


def _summary_between(claim: Claim, study: Study) -> bool | None:
    summary, local, full = (study.cell(kind) for kind in ("summary", "local", "global"))
    return _all(claim.compare(study, summary, BEATS, local), claim.compare(study, full, AS_GOOD, summary))


def _rotary_is_best(claim: Claim, study: Study) -> bool | None:
    cells = [rotary for kind in ATTENTIONS for rotary in study.cells(kind)]
    pairs = [(rotary, rotary._replace(position=position)) for rotary in cells for position in POSITIONS[1:]]
    holds = [claim.compare(study, rotary, AS_GOOD, other) for rotary, other in pairs if other in study.runs]
    tried = study.cell("global", "absolute") and study.cell("global", "alibi")
    return _all(*holds, *([] if tried else [None]))


def _rotary_extrapolates(claim: Claim, study: Study) -> bool | None:
    rotary, absolute = study.cell("global"), study.cell("global", "absolute")
    context = max(study.contexts(rotary), default=0) if rotary else 0
    if rotary is None or absolute is None or context <= rotary.length:
        return None
    span = study.last(rotary, context)
    far, anew = study.scores(rotary, context, span), study.scores(absolute, absolute.length, study.far(absolute))
    names = [(study.title(rotary), far), (f"{study.title(absolute)}, restarted", anew)]
    of_all = [losses(study.scores(cell, cell.length, study.far(cell))) for cell in study.runs]
    return claim.decide(names, BEATS, of_all, place(span, context))


def _self_extend_carries(claim: Claim, study: Study) -> bool | None:
    full, local, holds = study.cell("global"), study.cell("local"), []
    if full is None or (full_extended := study.extended(full)) is None:
        return None
    context = max(study.contexts(full))
    span = study.last(full, context)
    for cell in (full, *study.cells("grouped")):
        extended = study.extended(cell)
        holds += [claim.compare(study, extended, BEATS, other, span, context) for other in (cell, local)]
        if cell != full:
            holds.append(claim.compare(study, extended, AS_GOOD, full_extended, span, context))
    return _all(*holds, *([] if len(holds) > 2 else [None]))


def _alibi_is_near_sighted(claim: Claim, study: Study) -> bool | None:
    rotary, alibi = study.cell("global"), study.cell("global", "alibi")
    if rotary is None or alibi is None:
        return None
    fine = claim.compare(study, alibi, AS_GOOD, rotary)
    if len(spans := study.spans(rotary.length, [rotary])) < 3:
        return _all(fine, None)
    near, far = spans[0], study.far(rotary)

    def gains(cell: StudyCell) -> Losses:
        return gain(study.scores(cell, cell.length, near), study.scores(cell, cell.length, far))

    alibi_gains, rotary_gains = gains(alibi), gains(rotary)
    of_all = [gains(cell) for cell in study.runs if cell.length == rotary.length]
    change = loss_difference(alibi_gains, rotary_gains, of_all)
    if isinstance(change, str):
        return _all(fine, None)
    seeds = alibi_gains.keys() & rotary_gains.keys()
    names = [
        (study.title(cell), f"falls by {statistics.mean(of[seed] for seed in seeds):.4f} nats")
        for cell, of in ((alibi, alibi_gains), (rotary, rotary_gains))
    ]
    interval = f"{_nats(change.low)} to {_nats(change.high)}; {change.method}"
    results = results_of(*(study.scores(cell, cell.length, span) for cell in (alibi, rotary) for span in (near, far)))
    where = f"fall from {span_name(near)} to {place(far, rotary.length)}"
    claim.evidence.append(Evidence(names, where, f"{_nats(change.mean)} nats", interval, within(change, BEATS), results,
                                   difference=change, limit=BEATS))  # fmt: skip
    return _all(fine, within(change, BEATS))


def _length_matters_more(claim: Claim, study: Study) -> bool | None:
    shortest, longest = (end(cell.length for cell in study.runs) for end in (min, max))
    pairs = {cell._replace(length=shortest): cell for cell in study.runs if cell.length == longest > shortest}
    contexts = [c for short in pairs if short in study.runs for c in study.contexts(short) if c >= longest]
    context, span = max(contexts, default=0), (longest // 2, longest)
    after = {cell: scores for cell in pairs.values() if (scores := study.scores(cell, context, span))}
    levels = {cell: level(scores) for cell, scores in after.items()}
    if not levels or not all(map(math.isfinite, levels.values())):
        return None
    worst, best = (end(levels, key=levels.__getitem__) for end in (max, min))
    variants = gain(after[worst], after[best])
    holds: list[bool | None] = []
    for short, long in pairs.items():
        of_short, of_long = shared(study.scores(short, context, span), study.scores(long, context, span))
        cost = gain(of_short, of_long)
        change = loss_difference(variants, cost, ())  # the noise of cells says nothing of a difference of differences
        if not of_short or isinstance(change, str):
            holds += [None] * bool(of_short)
            continue
        compared = {study.title(worst): variants, f"{study.title(long)} at {shortest:,}": cost}
        names = [(f"cost of {name}", change_text(statistics.mean(of.values()))) for name, of in compared.items()]
        interval = f"{_nats(change.low)} to {_nats(change.high)}; {change.method}"
        results = results_of(of_short, of_long, after[worst], after[best])
        holds.append(within(change, BEATS))
        claim.evidence.append(Evidence(names, place(span, context), f"{_nats(change.mean)} nats", interval, holds[-1],
                                       results, difference=change, limit=BEATS))  # fmt: skip
    return _all(*holds, *([] if len(holds) > 1 else [None]))


class _Rule(NamedTuple):
    """A claim, the rule by which it holds, the function that checks it, and two fields of `Claim`."""

    claim: str
    holds_where: str
    check: Callable[[Claim, Study], bool | None]
    in_paper: bool = True
    of_text_alone: bool = False


_RULES = (
    _Rule(
        "Context beyond the local layers' reach helps in this data",
        "at the last positions of the trained length global beats local, which sees no farther back than its windows "
        "reach, layer upon layer: a check of the set-up, not of the paper",
        _context_helps,
        in_paper=False,
    ),
    _Rule(
        "Grouped attention is about as good as global, and cheaper",
        "every grouped layout is as good as global, and computes fewer attention pairs. A global model that does not "
        "beat local at the last positions of the trained length leaves the claim untested",
        _grouped_is_global,
    ),
    _Rule(
        "Local attention alone is worse than global and than grouped",
        "global and every grouped layout beat local",
        _local_is_worse,
    ),
    _Rule(
        "Local attention with global approximation lies between local and global",
        "summary beats local, and global is as good as summary",
        _summary_between,
    ),
    _Rule(
        "Rotary positions are the best, or as good as any",
        "in each kind of attention rotary is as good as every other position embedding, and absolute and ALiBi were "
        "tried under global attention",
        _rotary_is_best,
    ),
    _Rule(
        "Rotary positions extrapolate better than absolute ones",
        "on text beyond the trained length rotary beats absolute. Learned positions end there, so that the absolute "
        "model is restarted: its score at the last positions of its own length stands for it",
        _rotary_extrapolates,
        of_text_alone=True,
    ),
    _Rule(
        "ALiBi is fine within its length, yet weak at using far context",
        "on text, under global attention, ALiBi is as good as rotary over the trained length, and its loss falls less "
        "than rotary's from the first positions to the last",
        _alibi_is_near_sighted,
        of_text_alone=True,
    ),
    _Rule(
        "Training at the longer length matters more than the variant",
        "on text, at the last positions of the longer length, training at the shorter costs each layout of both "
        "lengths more than the worst cell of the longer loses to the best",
        _length_matters_more,
        of_text_alone=True,  # distances of recall are no positions: most values are asked for beyond both lengths
    ),
    _Rule(
        "Self-Extend reads past the trained length, grouped as well as global",
        "at the last positions of the longest context global and every grouped layout, read with Self-Extend (arXiv "
        "2401.01325), beat themselves without it and local, and grouped is as good as global",
        _self_extend_carries,
        in_paper=False,
    ),
)
"""The claims in the order of the page."""
