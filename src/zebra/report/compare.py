"""Runs side by side: what was measured in more than one, a column for each run, model and layout."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from zebra.records import Row
from zebra.report import retrieval, tasks
from zebra.report.page import Cell, Section, Table
from zebra.report.series import Series, interval, percent, series_of

HOW = (
    "What was measured in more than one run. Of perplexity that over the whole context is shown, of retrieval the mean "
    "over depths. A change is the right column's against the left one's, in points where it is of percents; where the "
    "two intervals overlap, which is said, chance may have made it."
)

Place = tuple[str, int | None]
"""A metric and a length."""


def together(sources: Mapping[str, Sequence[Row]]) -> list[Row]:
    """The rows of several sources; where two of them name a run alike, the source's name stands behind the run's."""
    named: dict[str, set[str]] = defaultdict(set)
    for source, rows in sources.items():
        for row in rows:
            named[row.run].add(source)
    return [
        replace(row, run=f"{row.run} ({source})") if len(named[row.run]) > 1 else row
        for source, rows in sources.items()
        for row in rows
    ]


def compare(rows: Iterable[Row]) -> Section:
    """A table for each task that more than one run has; no section where there is none."""
    cells: dict[str, dict[Place, dict[Series, list[Row]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in rows:
        whole = row.position_from in (None, 0) and row.position_to in (None, row.length)
        if whole and "@" not in row.model:
            cells[row.task][row.metric, row.length][series_of(row)].append(row)
    tables = [_table(task, places) for task, places in cells.items() if _runs(places) > 1]
    return Section("Side by side", [HOW, *tables] if tables else [])


def _runs(places: dict[Place, dict[Series, list[Row]]]) -> int:
    return max(len({series.run for series in found}) for found in places.values())


def _table(task: str, places: dict[Place, dict[Series, list[Row]]]) -> Table:
    columns = list(dict.fromkeys(series for found in places.values() for series in found))
    metrics = list(dict.fromkeys(metric for metric, _ in places))
    head = [Cell("metric", "tokens"), *(Cell(series.run, f"{series.name} {series.layout}") for series in columns)]
    head += [Cell("change")] if len(columns) == 2 else []
    body = []
    for metric, length in sorted(places, key=lambda place: (metrics.index(place[0]), place[1] or 0)):
        found = places[metric, length]
        line = [Cell(metric.replace("_", " "), "" if length is None else f"{length:,}")]
        line += [_value(found.get(series, [])) for series in columns]
        if len(columns) == 2:
            line.append(_change(*(found.get(series, []) for series in columns)))
        body.append(line)
    return Table(_name(task), head, body)


def _name(task: str) -> str:
    known = {"retrieval-": retrieval.name, "harness-": tasks.name, "documents-": tasks.name}
    return next((name(task) for prefix, name in known.items() if task.startswith(prefix)), task)


def _mean(rows: Sequence[Row]) -> float:
    return sum(row.value for row in rows) / len(rows)


def _bounds(rows: Sequence[Row]) -> tuple[float, float] | None:
    return interval(rows[0]) if len(rows) == 1 else None


def _value(rows: Sequence[Row]) -> Cell:
    return tasks.value(_mean(rows), _bounds(rows), share=tasks.is_share(rows[0])) if rows else Cell("–")


def _change(before: Sequence[Row], after: Sequence[Row]) -> Cell:
    if not before or not after:
        return Cell("–")
    by = _mean(after) - _mean(before)
    said = percent(by, sign="+") if tasks.is_share(before[0]) else f"{by:+,.3g}".replace("-", "−")
    one, two = _bounds(before), _bounds(after)
    overlap = one is not None and two is not None and one[0] <= two[1] and two[0] <= one[1]
    return Cell(said, "overlap" if overlap else "")
