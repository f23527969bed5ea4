"""Runs side by side: what more than one run measured, each with its model and layout."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from zebra.errors import printable
from zebra.report import tasks
from zebra.report.page import Cell, Section, Table
from zebra.report.pivot import Results, split, table, where
from zebra.report.series import overlap, percent, series_of, step, task_name
from zebra.results import Result

HOW = (
    "Measurements that more than one run has. Perplexity is that over the whole context, retrieval the mean over "
    "depths. A change is the right column minus the left one, in points where they are percentages. Where the two "
    "intervals overlap, as noted, the change may be chance."
)


def merge_sources(sources: Mapping[str, Sequence[Result]]) -> list[Result]:
    """The results of several sources, with text that a page can show.

    Where two sources have a run of the same name, the name of the source is added to the run's.
    """
    short = {source: Path(source).name.removesuffix(".jsonl") or source for source in sources}
    if len(set(short.values())) < len(short):
        short = {source: source for source in sources}
    sources_of_run: dict[str, set[str]] = defaultdict(set)
    for source, results in sources.items():
        for result in results:
            sources_of_run[result.run].add(source)
    merged = []
    for source, results in sources.items():
        for result in results:
            run = f"{result.run} ({short[source]})" if len(sources_of_run[result.run]) > 1 else result.run
            columns = vars(result) | {"run": run}
            texts: dict[str, Any] = {name: printable(text) for name, text in columns.items() if isinstance(text, str)}
            merged.append(replace(result, **texts))
    return merged


def compare(results: Iterable[Result]) -> Section:
    """A table for each task that more than one run has; an empty section where there is none."""
    compared = [
        one
        for one in results
        if one.position_from in (None, 0) and one.position_to in (None, one.length)  # the whole context
        if step(one) is None  # not during training
        if one.task != "bench ceilings"
    ]
    runs = split(compared, lambda one: (one.task, one.metric, one.length))
    shared = {task for (task, *_), same in runs.items() if len({one.run for one in same}) > 1}
    groups = split((one for one in compared if one.task in shared), lambda one: one.task)
    return Section("Side by side", [HOW, *map(_table, groups.values())] if groups else [])


def _table(results: list[Result]) -> Table:
    """Two series as columns with their change; more than two as rows."""
    title = task_name(results[0].task)
    metrics = [*split(results, lambda one: one.metric)]
    measures = split(results, lambda one: (one.metric, one.length))
    heads = {
        (metric, length): Cell(metric.replace("_", " "), "" if length is None else f"{length:,}")
        for metric, length in sorted(measures, key=lambda at: (metrics.index(at[0]), at[1] or 0))
    }
    every = split(results, series_of)
    runs = {one: Cell(one.run, f"{one.name} {one.layout}") for one in every}
    if len(every) > 2:
        columns = [(head, where(tasks.mean_cell, metric=at[0], length=at[1])) for at, head in heads.items()]
        return table(title, [Cell("run")], [([runs[one]], here) for one, here in every.items()], columns)
    columns = [(head, where(tasks.mean_cell, **one._asdict())) for one, head in runs.items()]

    def change(here: Results) -> Cell:
        """The difference between the means of the two series."""
        before, after = ([one for one in here if series_of(one) == series] for series in every)
        if not before or not after:
            return Cell("–")
        change = tasks.mean(after) - tasks.mean(before)
        plain = f"{change:+,.0f}" if abs(change) >= 1000 else f"{change:+.3g}" if change else "0"
        text = percent(change, sign="+") if tasks.is_share(before[0]) else plain.replace("-", "−")
        overlaps = len(before) == len(after) == 1 and overlap(before[0], after[0])
        return Cell(text, "overlap" if overlaps else "", results=[*before, *after])

    lines = [([head], measures[at]) for at, head in heads.items()]
    return table(title, [Cell("metric", "tokens")], lines, [*columns, (Cell("change"), change)])
