"""Runs side by side: what was measured in more than one, each with its model and layout."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from zebra.report import retrieval, tasks
from zebra.report.benches import CEILINGS
from zebra.report.page import Cell, Section, Table
from zebra.report.pivot import Column, Results, pivot_table, split
from zebra.report.series import Series, interval, percent, series_of
from zebra.results import Result

HOW = (
    "Measurements that more than one run has. Perplexity is that over the whole context, retrieval the mean over "
    "depths. A change is the right column minus the left one, in points where they are percentages. Where the two "
    "intervals overlap, as noted, the change may be chance."
)
Measure = tuple[str, int | None]
"""A metric and a length."""


def merge_sources(sources: Mapping[str, Sequence[Result]]) -> list[Result]:
    """The results of several sources.

    Where two sources have a run of one name, the source's name is added to the run's.
    """
    short = {source: Path(source).stem or source for source in sources}
    if len(set(short.values())) < len(short):
        short = {source: source for source in sources}
    sources_of_run: dict[str, set[str]] = defaultdict(set)
    for source, results in sources.items():
        for result in results:
            sources_of_run[result.run].add(source)
    return [
        replace(result, run=f"{result.run} ({short[source]})") if len(sources_of_run[result.run]) > 1 else result
        for source, results in sources.items()
        for result in results
    ]


def compare(results: Iterable[Result]) -> Section:
    """A table for each task that more than one run has; no section where there is none."""
    tables = [
        _table(task, here)
        for task, here in split(filter(_is_compared, results), lambda one: one.task).items()
        if any(len({one.run for one in same}) > 1 for same in split(here, _measure).values())
    ]
    return Section("Side by side", [HOW, *tables] if tables else [])


def _is_compared(result: Result) -> bool:
    """Of perplexity that of the whole context, nothing during training; one table of ceilings has those of all runs."""
    whole = result.position_from in (None, 0) and result.position_to in (None, result.length)
    return whole and "@" not in result.model and result.task != CEILINGS


def _measure(result: Result) -> Measure:
    return result.metric, result.length


def _table(task: str, results: list[Result]) -> Table:
    """Two series as columns with their change; more of them as lines."""
    metrics = list(dict.fromkeys(one.metric for one in results))
    measures = sorted(dict.fromkeys(map(_measure, results)), key=lambda at: (metrics.index(at[0]), at[1] or 0))
    heads = {
        (metric, length): Cell(metric.replace("_", " "), "" if length is None else f"{length:,}")
        for metric, length in measures
    }
    names = {one: Cell(one.run, f"{one.name} {one.layout}") for one in map(series_of, results)}
    if len(names) > 2:
        measured = {at: Column(head, tasks.mean_cell) for at, head in heads.items()}
        places = split(results, lambda one: (series_of(one), _measure(one)))
        return pivot_table(_name(task), [Cell("run")], {one: [names[one]] for one in names}, measured, places)
    columns: dict[Series | None, Column] = {one: Column(name, tasks.mean_cell) for one, name in names.items()}
    columns[None] = Column(Cell("change"), _change)
    cells: dict[tuple[Measure, Series | None], Results] = {}
    for at, here in split(results, _measure).items():
        cells |= {(at, one): same for one, same in split(here, series_of).items()}
        cells[at, None] = [one for series in names for one in cells.get((at, series), ())]
    lines = {at: [head] for at, head in heads.items()}
    return pivot_table(_name(task), [Cell("metric", "tokens")], lines, columns, cells)


def _name(task: str) -> str:
    names = {"retrieval-": retrieval.name, "harness-": tasks.name, "documents-": tasks.name}
    return next((name(task) for prefix, name in names.items() if task.startswith(prefix)), task.replace("-", ": ", 1))


def _change(results: Results) -> Cell:
    """The change between the means of two series."""
    sides = list(split(results, series_of).values())
    if len(sides) < 2:
        return Cell("–")
    before, after = sides
    change = tasks.mean(after) - tasks.mean(before)
    plain = f"{change:+,.0f}" if abs(change) >= 1000 else f"{change:+.3g}" if change else "0"
    text = percent(change, sign="+") if tasks.is_share(before[0]) else plain.replace("-", "−")
    one, two = (interval(side[0]) if len(side) == 1 else None for side in sides)
    overlap = one is not None and two is not None and one[0] <= two[1] and two[0] <= one[1]
    return Cell(text, "overlap" if overlap else "", results=results)
