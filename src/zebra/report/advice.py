"""The advice that follows from a comparison of ways to read long texts."""

from __future__ import annotations

import math

from zebra.report.compared import Methods, answered
from zebra.report.page import Cell, Line
from zebra.report.pivot import value_cell
from zebra.report.series import Series, percent, span_name

_CLOSE = math.log(1.02)
"""A perplexity at most 2 % above the best counts as equally good."""
_READS = 1.25
"""A method copes with the text if its perplexity is at most this many times that within the trained length."""
_CHEAP = 0.75
"""A cache is cheap if it is smaller than this share of the best method's."""


def advice(compared: Methods) -> Line:
    """Name the method that reads the text best, with its numbers, and one with a much smaller cache if there is one.

    Of the methods whose perplexity at the last positions is about the lowest, the best answers the most questions, and
    of those is the fastest.
    """
    scored = [one for one in compared.by_series if compared.results(one, "loss_above_best", compared.far)]
    if not scored:
        return [Cell("No method could be measured on a window.")]
    as_good = [one for one in scored if compared.value(one, "loss_above_best", compared.far) <= _CLOSE]

    def rank(series: Series) -> tuple[float, float]:
        share, seconds = compared.share(series), compared.value(series, "prefill_seconds")
        return (-share if share == share else 0.0, seconds if seconds == seconds else math.inf)

    best = min(as_good, key=rank)
    words = [*_described(compared, best)]
    reference = compared.value(compared.baseline, "perplexity", compared.near)
    if compared.value(best, "perplexity", compared.far) > _READS * reference:
        words.insert(0, Cell("No method reads this length as well as the trained one; adapt the checkpoint. Best is "))
    cache = compared.value(best, "kv_bytes")
    cheaper = [one for one in scored if compared.value(one, "kv_bytes") < _CHEAP * cache]
    if cheaper:
        cheap = min(cheaper, key=lambda one: compared.value(one, "perplexity", compared.far))
        rise = compared.value(cheap, "perplexity", compared.far) / compared.value(best, "perplexity", compared.far)
        untrained = cheap.model == compared.baseline.model
        words += [
            Cell(f" If the cache must be smaller, {compared.names[cheap]} holds "),
            Cell(percent(compared.value(cheap, "kv_bytes") / cache, 0), results=compared.results(cheap, "kv_bytes")),
            Cell(" of it at a perplexity of "),
            value_cell(compared.results(cheap, "perplexity", compared.far)),
            Cell(", untrained; adapt it first." if untrained and rise > math.exp(_CLOSE) else "."),
        ]
    return words


def _described(compared: Methods, best: Series) -> Line:
    """The best method and its numbers."""
    baseline = compared.baseline
    words = [
        Cell(f"{compared.names[best]}: perplexity "),
        value_cell(compared.results(best, "perplexity", compared.far)),
        Cell(f" at positions {span_name(compared.far, ' to ')}"),
    ]
    if best != baseline and (plain := compared.results(baseline, "perplexity", compared.far)):
        words += [Cell(" ("), value_cell(plain), Cell(" unchanged)")]
    if near := compared.results(baseline, "perplexity", compared.near):
        words += [Cell(", beside "), value_cell(near), Cell(f" at {span_name(compared.near, ' to ')} unchanged")]
    if answers := compared.answers(best):
        share = answered(answers)
        of = " of the" if share.endswith("%") else ""
        words += [Cell(", "), Cell(share, results=answers), Cell(f"{of} questions answered")]
    ratio = compared.value(best, "prefill_seconds") / compared.value(baseline, "prefill_seconds")
    if best != baseline and ratio == ratio:
        words += [Cell(f", at {ratio:.2f} times the prefill time")]
    return [*words, Cell(".")]
