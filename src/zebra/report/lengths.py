"""Scores by length, and RULER's effective length: the length up to which the scores stay above a threshold."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import takewhile

from zebra.report import tasks
from zebra.report.figures import Figure, plot_lengths
from zebra.report.page import Cell, Section, Table
from zebra.report.pivot import Results, split, table, where
from zebra.report.series import Series, labels, percent, series_of, task_name
from zebra.results import Result

THRESHOLD = 0.856
"""RULER's threshold (arXiv 2404.06654v3, table 3): the score of Llama-2-7B at 4K tokens, a mean over 13 tasks."""
HOW = (
    "Scores by the length of the text; for retrieval, the mean over depths. The effective length is the longest "
    f"measured length at which, as at all shorter ones, the score is above {percent(THRESHOLD)}, the dashed line. That "
    "threshold is RULER's (arXiv 2404.06654, table 3): the score of Llama-2-7B at 4K tokens. RULER takes the mean "
    "over its 13 tasks; here it is taken over what the caption says, so compare with lengths of this page only."
)
ByLength = dict[int, list[Result]]


def effective(scores: Mapping[int, float]) -> int | None:
    """The longest length up to which every score exceeds the threshold; None where the first does not.

    Example:
        >>> effective({1024: 1.0, 2048: 0.9, 4096: 0.5, 8192: 0.9})
        2048
    """
    above = [*takewhile(lambda length: scores[length] > THRESHOLD, sorted(scores))]
    return above[-1] if above else None


def score(results: Iterable[Result]) -> float:
    """The mean over tasks of each task's mean score."""
    means = [tasks.mean(here) for here in split(results, lambda one: one.task).values()]
    return sum(means) / len(means)


def lengths(results: Iterable[Result]) -> Section:
    """A figure and a table for each measure; for a single series one figure and table with all measures."""
    by_measure = measures(results)
    figures = {name: {label: by[one] for one, label in labels(by).items()} for name, by in by_measure.items()}
    series = {series for by_series in by_measure.values() for series in by_series}
    if len(series) == 1:
        (label,) = labels(series).values()
        figures = {label: {name: by for name, by_series in by_measure.items() for by in by_series.values()}}
    blocks: list[str | Table | Figure] = [HOW]
    for i, (name, lines) in enumerate(figures.items(), start=1):
        points = {label: {n: score(here) for n, here in by.items()} for label, by in lines.items() if len(by) > 1}
        plot = partial(plot_lengths, lines=points, threshold=THRESHOLD)
        shown = {id(one): one for by in lines.values() for here in by.values() for one in here}
        blocks.append(Figure(f"lengths-{i}", [plot], f"{name}, by length", [*shown.values()], height=2.6))
        blocks.append(_table(lines))
    return Section("By length", blocks if by_measure else [])


def measures(results: Iterable[Result]) -> dict[str, dict[Series, ByLength]]:
    """What was scored at two lengths or more: first the means over the tasks of retrieval, then each task."""
    by_name: dict[str, dict[Series, ByLength]] = defaultdict(dict)
    scored = [one for one in results if one.metric == "accuracy" and one.length is not None]
    retrieved = sorted((one for one in scored if one.task.startswith("retrieval-")), key=lambda one: one.task)
    for (how, series), here in split(
        retrieved, lambda one: (task_name(one.task).rpartition(", ")[2], series_of(one))
    ).items():
        names = [task_name(task).rpartition(", ")[0] for task in split(here, lambda one: one.task)]
        if len(names) > 1:
            complete = {
                n: same for n, same in _by_length(here).items() if len({one.task for one in same}) == len(names)
            }
            by_name[f"retrieval, {how}, mean of {', '.join(names)}"][series] = complete
    for (task, series), here in split(scored, lambda one: (one.task, series_of(one))).items():
        if task.startswith(("retrieval-", "harness-")):
            by_name[task_name(task)][series] = _by_length(here)
    return {name: by_series for name, by_series in by_name.items() if any(len(by) > 1 for by in by_series.values())}


def _by_length(results: Iterable[Result]) -> ByLength:
    return dict(sorted(split(results, lambda one: one.length or 0).items()))


def _table(by_label: dict[str, ByLength]) -> Table:
    """A row for each label. The effective length links to the results up to it and at the first length that fails."""
    lines = []
    for label, by_length in by_label.items():
        reached = effective({length: score(here) for length, here in by_length.items()}) or 0
        ended = next((length for length in by_length if length > reached), 0)
        needed = [one for length, here in by_length.items() if length <= max(reached, ended) for one in here]
        names = [Cell(label), Cell(f"{reached:,}" if reached else "none", results=needed)]
        lines.append((names, [one for here in by_length.values() for one in here]))

    def mean(results: Results) -> Cell:
        return Cell(percent(score(results)), results=results) if results else Cell("–")

    every = sorted({length for by_length in by_label.values() for length in by_length})
    columns = [(Cell(f"{length:,}", "tokens"), where(mean, length=length)) for length in every]
    return table("", [Cell(""), Cell("effective", "tokens")], lines, columns)
