"""What a layout costs on a page: exact counts of pairs and cached tokens, and the speed of the evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from zebra.report.page import Cell, Section
from zebra.report.pivot import Column, Results, pivot_table, split
from zebra.report.series import count, percent, series_of
from zebra.results import Result

_METRICS = {"attention_pairs": "attention pairs", "cached_tokens": "cached tokens"}
PROSE = (
    "Attention pairs are the (query, key) pairs that attention computes; cached tokens are the keys that "
    "generation keeps. Both are exact counts. Speed is one timing of the evaluation that gave the perplexities: "
    "take small differences as noise."
)


def cost(costs: list[Result], speeds: list[Result]) -> Section:
    """Exact counts and timings, full and striped."""
    tables = []
    texts = split(costs, lambda one: (one.run, one.model, one.length))
    for (run, _, length), here in texts.items():
        lines = {layout: [Cell(layout)] for layout in dict.fromkeys(one.layout for one in here)}
        places = split(here, lambda one: (one.layout, one.metric))
        columns = {
            metric: Column(Cell(name), _shares([places.get((layout, metric), ()) for layout in lines], fewer=True))
            for metric, name in _METRICS.items()
        }
        if any(one.metric in _METRICS for one in here):
            title = f"{run}: one text of {length:,} tokens, counted over all layers"
            tables.append(pivot_table(title, [Cell("layout")], lines, columns, places))
    for (run, length), here in split(speeds, lambda one: (one.run, one.length)).items():
        context = f" of contexts of {length:,} tokens" if length is not None else ""
        series = split(here, series_of)
        speed = Column(Cell("tokens per second"), _shares([*series.values()], fewer=False))
        title = f"{run}: evaluation{context}, timed"
        models = {one: [Cell(one.name, one.layout)] for one in series}
        timed = {(one, "speed"): results for one, results in series.items()}
        tables.append(pivot_table(title, [Cell("model")], models, {"speed": speed}, timed))
    return Section("Cost against full attention", [PROSE, *tables] if tables else [])


def _shares(column: Sequence[Results], *, fewer: bool) -> Callable[[Results], Cell]:
    """What a column shows: numbers with bars and, from the second line on, the ratio to the first."""
    longest = max((one.value for results in column for one in results if one.value), default=0)
    first = column[0][0] if column[0] else None

    def show(results: Results) -> Cell:
        if not results:
            return Cell("–")
        one, ratio = results[0], ""
        if first and first is not one and first.value and one.value:
            share = one.value / first.value
            ratio = f"{percent(share)}, {1 / share:.2f}× fewer" if fewer else f"{share:.2f}×"
        bar = one.value / longest if longest else None
        return Cell(count(one.value), ratio, bar, results, [first, one] if first and ratio else [])

    return show
