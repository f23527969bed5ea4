"""The paper's qualitative claims as a checklist, each compared with the results by a rule that is written beside it.

The claims are recalled, not read in the paper (arXiv 2312.08618, section 3). A difference is one of loss; it is shown
as a change of perplexity in percent, with its 95 % interval. A missing cell leaves its claim untested.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

from zebra.report.series import percent, span_name
from zebra.study.evidence import (
    AS_GOOD,
    BEATS,
    EQUAL,
    FAILS,
    HOLDS,
    UNTESTED,
    Claim,
    Evidence,
    change_text,
    mean_text,
    place,
    results_of,
    seeds_to_decide,
    shared,
    within,
)
from zebra.study.results import ATTENTIONS, POSITIONS, RECALL, Study, StudyCell
from zebra.study.spread import Losses, gain, level, loss_difference, losses

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


def claims(study: Study) -> list[Claim]:
    """All claims, in the order of the page."""
    checked = []
    for (text, rule), check in _CLAIMS.items():
        claim = Claim(text, rule, in_paper=check not in (_context_helps, _self_extend_carries))
        holds = check(claim, study)
        claim.verdict = UNTESTED if holds is None else HOLDS if holds else FAILS
        checked.append(claim)
    return checked


def _all(*holds: bool | None) -> bool | None:
    """False where one part fails, None where one is open or there is none."""
    return False if False in holds else None if None in holds or not holds else True


def _nats(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")


def _context_helps(claim: Claim, study: Study) -> bool | None:
    local = study.cell("local")
    wide = [cell for kind in ("global", "grouped") if (cell := study.cell(kind)) is not None]
    holds = [claim.compare(study, cell, BEATS, local, span=study.far(cell)) for cell in wide]
    return True if True in holds else _all(*holds)


def _grouped_is_global(claim: Claim, study: Study) -> bool | None:
    grouped, wide = study.cell("grouped"), study.cell("global")
    holds = claim.compare(study, grouped, AS_GOOD, wide)
    if wide is not None:
        uses_context = claim.compare(study, wide, BEATS, study.cell("local"), span=study.far(wide))
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
    return _all(*(claim.compare(study, study.cell(kind), BEATS, local) for kind in ("global", "grouped")))


def _summary_between(claim: Claim, study: Study) -> bool | None:
    summary, local, wide = (study.cell(kind) for kind in ("summary", "local", "global"))
    return _all(claim.compare(study, summary, BEATS, local), claim.compare(study, wide, AS_GOOD, summary))


def _rotary_is_best(claim: Claim, study: Study) -> bool | None:
    pairs = [(study.cell(kind), study.cell(kind, position)) for kind in ATTENTIONS for position in POSITIONS[1:]]
    holds = [claim.compare(study, rotary, AS_GOOD, other) for rotary, other in pairs if rotary and other]
    tried = study.cell("global", "absolute") and study.cell("global", "alibi")
    return _all(*holds, *([] if tried else [None]))


def _rotary_extrapolates(claim: Claim, study: Study) -> bool | None:
    rotary, absolute = study.cell("global"), study.cell("global", "absolute")
    context = max(study.contexts(rotary), default=0) if rotary else 0
    if rotary is None or absolute is None or context <= rotary.length or study.subject == RECALL:
        return None
    last = study.spans(context, [rotary])[-2]
    far, anew = study.scores(rotary, context, last), study.scores(absolute, absolute.length, study.far(absolute))
    names = [(study.title(rotary), far), (f"{study.title(absolute)}, begun anew", anew)]
    of_all = [losses(study.scores(cell, cell.length, study.far(cell))) for cell in study.runs]
    return claim.decide(names, BEATS, of_all, place(last, context))


def _self_extend_carries(claim: Claim, study: Study) -> bool | None:
    cells = [cell for kind in ("grouped", "global") if (cell := study.cell(kind)) and study.extended(cell)]
    holds, last = [], None
    for cell in cells:
        context = max(study.contexts(cell))
        last = study.spans(context, [cell])[-2], context
        holds.append(claim.compare(study, study.extended(cell), BEATS, cell, *last))
    if len(cells) < 2 or last is None:
        return None
    one, two = map(study.extended, cells)
    return _all(*holds, claim.compare(study, one, AS_GOOD, two, *last))


def _alibi_is_near_sighted(claim: Claim, study: Study) -> bool | None:
    rotary, alibi = study.cell("global"), study.cell("global", "alibi")
    fine = claim.compare(study, alibi, AS_GOOD, rotary)
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
    results = results_of(*(study.scores(cell, cell.length, span) for cell in cells for span in (near, far)))
    where = f"{span_name(near)} to {place(far, rotary.length)}"
    held, seeds = within(change, BEATS), seeds_to_decide(change, BEATS, len(one.keys() & two.keys()))
    evidence = Evidence(names, where, f"{_nats(change.mean)} nats", interval, held, results, seeds, -change.high)
    claim.evidence.append(evidence)
    return _all(fine, held)


def _length_matters_more(claim: Claim, study: Study) -> bool | None:
    shortest, longest = (end(cell.length for cell in study.runs) for end in (min, max))
    pairs = {cell._replace(length=shortest): cell for cell in study.runs if cell.length == longest > shortest}
    contexts = [c for short in pairs if short in study.runs for c in study.contexts(short) if c >= longest]
    context, span = max(contexts, default=0), (longest // 2, longest)
    costs, after = [], []
    for short, long in pairs.items():
        a, b = shared(study.scores(short, context, span), study.scores(long, context, span))
        cost = level(a) - level(b)
        if math.isnan(cost):
            continue
        costs.append(cost)
        after.append(level(b))
        names = [(study.title(short), mean_text(a)), (study.title(long), mean_text(b))]
        claim.evidence.append(Evidence(names, place(span, context), change_text(cost), "means", None, results_of(a, b)))
    if len(costs) < 2:
        return None
    least, range_after = min(costs), max(after) - min(after)
    names = [("length, the least cost", change_text(least)), ("variants, worst against best", change_text(range_after))]
    holds = True if least > range_after else False if max(costs) <= range_after else None
    change = f"{_nats(least - range_after)} nats"
    claim.evidence.append(Evidence(names, place(span, context), change, "means", holds))
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
        "on text beyond the trained length rotary beats absolute. A table of learned positions ends there, so an "
        "absolute model has to begin anew: the last positions of its own length stand for it",
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
    (
        "Self-Extend reads past the trained length, a grouped model as well as a global one (arXiv 2401.01325)",
        "at the last positions of the longest context both beat themselves without it, and grouped is as good as "
        "global",
    ): _self_extend_carries,
}
"""Each claim and the rule that it holds by, with the function that checks it."""
