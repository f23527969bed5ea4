"""Runs side by side: what was measured in more than one, each with its model and layout."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from zebra.report import benches, retrieval, tasks
from zebra.report.page import Cell, Section, Table
from zebra.report.series import Series, interval, percent, series_of
from zebra.results import Result

HOW = (
    "What was measured in more than one run. Of perplexity that over the whole context is shown, of retrieval the mean "
    "over depths. A change is the right column's against the left one's, in points where it is of percents; where the "
    "two intervals overlap, which is said, chance may have made it."
)

Place = tuple[str, int | None]
"""A metric and a length."""


def merge_sources(sources: Mapping[str, Sequence[Result]]) -> list[Result]:
    """The rows of several sources; where two of them name a run alike, the source's name stands behind the run's."""
    short = {source: Path(source).stem or source for source in sources}
    if len(set(short.values())) < len(short):
        short = {source: source for source in sources}
    named: dict[str, set[str]] = defaultdict(set)
    for source, rows in sources.items():
        for row in rows:
            named[row.run].add(source)
    return [
        replace(row, run=f"{row.run} ({short[source]})") if len(named[row.run]) > 1 else row
        for source, rows in sources.items()
        for row in rows
    ]


def compare(rows: Iterable[Result]) -> Section:
    """A table for each task that more than one run has; no section where there is none."""
    cells: dict[str, dict[Place, dict[Series, list[Result]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for row in rows:
        whole = row.position_from in (None, 0) and row.position_to in (None, row.length)
        if whole and "@" not in row.model and row.task != benches.CEILINGS:  # one table has those of all
            cells[row.task][row.metric, row.length][series_of(row)].append(row)
    tables = [_table(task, places) for task, places in cells.items() if _runs(places) > 1]
    return Section("Side by side", [HOW, *tables] if tables else [])


def _runs(places: dict[Place, dict[Series, list[Result]]]) -> int:
    return max(len({series.run for series in found}) for found in places.values())


def _table(task: str, places: dict[Place, dict[Series, list[Result]]]) -> Table:
    """Two series as columns with their change; more of them as lines."""
    series = list(dict.fromkeys(one for found in places.values() for one in found))
    metrics = list(dict.fromkeys(metric for metric, _ in places))
    order = sorted(places, key=lambda place: (metrics.index(place[0]), place[1] or 0))
    labels = [Cell(metric.replace("_", " "), "" if length is None else f"{length:,}") for metric, length in order]
    names = [Cell(one.run, f"{one.name} {one.layout}") for one in series]
    if len(series) == 2:
        head = [Cell("metric", "tokens"), *names, Cell("change")]
        values = [[places[place].get(one, []) for one in series] for place in order]
        body = [[label, *map(_value, found), _change(*found)] for label, found in zip(labels, values, strict=True)]
        return Table(_name(task), head, body)
    body = [[name, *(_value(places[p].get(one, [])) for p in order)] for name, one in zip(names, series, strict=True)]
    return Table(_name(task), [Cell("run"), *labels], body)


def _name(task: str) -> str:
    known = {"retrieval-": retrieval.name, "harness-": tasks.name, "documents-": tasks.name}
    return next((name(task) for prefix, name in known.items() if task.startswith(prefix)), task.replace("-", ": ", 1))


def _value(rows: Sequence[Result]) -> Cell:
    return tasks.value(rows) if rows else Cell("–")


def _change(before: Sequence[Result], after: Sequence[Result]) -> Cell:
    if not before or not after:
        return Cell("–")
    by = sum(row.value for row in after) / len(after) - sum(row.value for row in before) / len(before)
    some = f"{by:+,.0f}" if abs(by) >= 1000 else f"{by:+.3g}" if by else "0"
    said = percent(by, sign="+") if tasks.is_share(before[0]) else some.replace("-", "−")
    one, two = (interval(rows[0]) if len(rows) == 1 else None for rows in (before, after))
    overlap = one is not None and two is not None and one[0] <= two[1] and two[0] <= one[1]
    return Cell(said, "overlap" if overlap else "", results=[*before, *after])
