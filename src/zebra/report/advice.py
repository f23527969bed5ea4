"""The advice that follows from a comparison of ways to read long texts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from zebra.report.compared import Methods, answered
from zebra.report.page import Cell, Line
from zebra.report.pivot import value_cell
from zebra.report.series import Series, percent, span_name

_CLOSE = 1.02
"""A perplexity at most 2 % above the best counts as equally good."""
_READS = 1.25
"""A method copes with the text if its perplexity is at most this many times that within the trained length."""
_CHEAP = 0.75
"""A cache is cheap if it is smaller than this share of the best method's."""
_ENOUGH = 4
"""With fewer windows or questions than this, the advice says how few they are."""


def advice(compared: Methods) -> Line:
    """Name the method that reads the text best, with its numbers, and one with a much smaller cache if there is one.

    Of the methods whose perplexity at the last positions is about the lowest, the best answers the most questions, and
    of those is the fastest. Each checkpoint has its own advice: a trained one is better by what it learned, too.
    """
    scored = [one for one in compared.by_series if compared.results(one, "loss_above_best", compared.far)]
    by_model = {
        model: [one for one in scored if one.model == model] for model in dict.fromkeys(s.model for s in scored)
    }
    if compared.baseline.model not in by_model:
        return [Cell("No method could be measured on a window.")]
    own = by_model.pop(compared.baseline.model)
    best = _best(compared, own)
    words = [*_described(compared, best)]
    reference = compared.value(compared.baseline, "perplexity", compared.near)
    if compared.value(best, "perplexity", compared.far) > _READS * reference:
        words.insert(0, Cell("No method reads this length as well as the trained one; adapt the checkpoint. Best is "))
    words += _cheaper(compared, best, own)
    for series in by_model.values():
        words += [Cell(" "), *_described(compared, _best(compared, series))]
    if compared.windows < _ENOUGH or compared.samples < _ENOUGH:
        words += [Cell(f" Only {compared.counts} were measured; a larger budget adds more.")]
    return words


def _best(compared: Methods, scored: Sequence[Series]) -> Series:
    def perplexity(series: Series) -> float:
        value = compared.value(series, "perplexity", compared.far)
        return math.inf if math.isnan(value) else value

    lowest = min(map(perplexity, scored))
    as_good = [one for one in scored if perplexity(one) <= _CLOSE * lowest]

    def rank(series: Series) -> tuple[float, float]:
        share, seconds = compared.share(series), compared.value(series, "prefill_seconds")
        return (-share if share == share else 0.0, seconds if seconds == seconds else math.inf)

    return min(as_good, key=rank)


def _cheaper(compared: Methods, best: Series, scored: Sequence[Series]) -> Line:
    """Of the methods with a much smaller cache than the best, the one that reads best; nothing without one."""
    cache = compared.value(best, "kv_bytes")
    cheaper = [one for one in scored if compared.value(one, "kv_bytes") < _CHEAP * cache]
    if not cheaper:
        return []
    cheap = min(cheaper, key=lambda one: compared.value(one, "perplexity", compared.far))
    rise = compared.value(cheap, "perplexity", compared.far) / compared.value(best, "perplexity", compared.far)
    return [
        Cell(f" If the cache must be smaller, {compared.names[cheap]} holds "),
        Cell(percent(compared.value(cheap, "kv_bytes") / cache, 0), results=compared.results(cheap, "kv_bytes")),
        Cell(" of it at a perplexity of "),
        value_cell(compared.results(cheap, "perplexity", compared.far)),
        Cell("; adapt it first." if rise > _CLOSE else "."),
    ]


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
