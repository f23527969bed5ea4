"""What a page says first: in a sentence or two, what the rows of a run show."""

from __future__ import annotations

from zebra.report.page import Cell
from zebra.report.series import FULL, Group, Series, Span, interval, number, outcome, percent, span_name
from zebra.results import Result

_MANY = 4


def verdict(run: str, groups: list[Group], costs: list[Result]) -> list[Cell]:
    """What training did at the far positions and at the near ones, and what share of dense attention is left."""
    mine = [group.of_run(run) for group in groups]
    longest = max((group for group in mine if group.scores), key=lambda group: group.length, default=None)
    said = _perplexity(longest) if longest else []
    pairs = {row.layout: row for row in costs if (row.run, row.metric) == (run, "attention_pairs") and row.value}
    striped = next((layout for layout in pairs if layout != FULL), None)
    if striped is not None and FULL in pairs:
        share = percent(pairs[striped].value / pairs[FULL].value, 0)
        said.append(Cell(", while attention computes " if said else f"With {striped}, attention computes "))
        said += [Cell(share, results=[pairs[FULL], pairs[striped]]), Cell(" of the dense model's pairs")]
    return [*said, Cell(".")] if said else []


def _perplexity(group: Group) -> list[Cell]:
    far = group.buckets[-1]
    after = outcome(group.scores)
    before = group.source(after) if after else None
    if after is None or before is None:
        return _each({series: scores[far] for series, scores in group.scores.items() if far in scores}, far)
    a, b = group.scores[before], group.scores[after]
    said: list[Cell] = []
    for span in dict.fromkeys([far, group.buckets[0]]):
        if span in a and span in b:
            said += [Cell(" and " if said else "Perplexity "), *_fall(a[span], b[span])]
            said.append(Cell(f" at positions {span_name(span, ' to ')}"))
    return said


def _each(scores: dict[Series, Result], span: Span) -> list[Cell]:
    """The value of each series; of many, the best and the worst."""
    order = sorted(scores, key=lambda series: scores[series].value)
    many = len(order) > _MANY
    said = [Cell(f"Perplexity at positions {span_name(span, ' to ')} is " + ("between " if many else ""))]
    for i, series in enumerate((order[0], order[-1]) if many else scores):
        said.append(Cell("" if not i else " and " if many else ", "))
        said += [_value(scores[series]), Cell(f" for {series.name} {series.layout}")]
    return said


def _fall(before: Result, after: Result) -> list[Cell]:
    if number(before.value) == number(after.value):
        return [Cell("stayed at "), _value(after)]
    a, b = interval(before), interval(after)
    unclear = " (the intervals overlap)" if a and b and a[0] <= b[1] and b[0] <= a[1] else ""
    way = "fell" if after.value < before.value else "rose"
    return [Cell(f"{way} from "), _value(before), Cell(" to "), _value(after), Cell(unclear)]


def _value(row: Result) -> Cell:
    return Cell(number(row.value), results=[row])
