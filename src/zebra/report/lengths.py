"""How far a model keeps what it can do: scores by length, and RULER's effective length."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import partial
from typing import NamedTuple

from zebra.report import retrieval, tasks
from zebra.report.figures import draw, plot_lengths
from zebra.report.page import Cell, Figure, Section, Table
from zebra.report.series import Series, labels, percent, series_of
from zebra.results import Result

THRESHOLD = 0.856
"""RULER's (arXiv 2404.06654v3, table 3): the score of Llama-2-7B there at 4K tokens, a mean over 13 tasks."""
HOW = (
    "Scores by the length of the text, of retrieval the mean over depths. The effective length is the longest at "
    f"which, as at all shorter ones that were measured, the score is above {percent(THRESHOLD)}, the dashed line. That "
    "threshold is RULER's (arXiv 2404.06654, table 3): the score of Llama-2-7B at 4K tokens. RULER takes the mean over "
    "its 13 tasks; here it is taken over what the caption says, so compare with lengths of this page only."
)


class Mean(NamedTuple):
    """A mean, and the rows that it was taken over."""

    value: float
    rows: list[Result]


Scores = dict[Series, dict[int, Mean]]


def effective(scores: Mapping[int, float]) -> int | None:
    """The longest length up to which every score exceeds the threshold; None where the first does not.

    Example:
        >>> effective({1024: 1.0, 2048: 0.9, 4096: 0.5, 8192: 0.9})
        2048
    """
    found = None
    for length in sorted(scores):
        if not scores[length] > THRESHOLD:
            break
        found = length
    return found


def lengths(rows: Iterable[Result]) -> Section:
    """A figure and a table for each task that has several lengths, and for the mean over tasks of retrieval; of a
    single model all tasks in one.
    """
    found = measures(rows)
    everyone = {series for scores in found.values() for series in scores}
    pictures = {name: {label: scores[of] for of, label in labels(scores).items()} for name, scores in found.items()}
    if len(everyone) == 1 and found:
        (label,) = labels(everyone).values()
        pictures = {label: {name: next(iter(scores.values())) for name, scores in found.items()}}
    blocks: list[str | Table | Figure] = [HOW]
    for i, (name, lines) in enumerate(pictures.items(), start=1):
        points = [
            (label, {n: mean.value for n, mean in line.items()}) for label, line in lines.items() if len(line) > 1
        ]
        svg = draw(f"lengths{i}", partial(plot_lengths, lines=points, threshold=THRESHOLD), height=2.6)
        used = {id(row): row for line in lines.values() for mean in line.values() for row in mean.rows}
        blocks += [Figure(f"lengths-{i}", svg, f"{name}, by length", [*used.values()]), _table(lines)]
    return Section("By length", blocks if found else [])


def measures(rows: Iterable[Result]) -> dict[str, Scores]:
    """What was scored at two lengths or more, by its name."""
    cells: dict[str, dict[Series, dict[int, list[Result]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for row in rows:
        if row.metric == "accuracy" and row.length is not None and row.task.startswith(("retrieval-", "harness-")):
            cells[row.task][series_of(row)][row.length].append(row)
    by_task: dict[str, Scores] = {
        task: {series: {n: _mean([here]) for n, here in sorted(by.items())} for series, by in found.items()}
        for task, found in cells.items()
    }
    names = {task: retrieval.name(task) if task.startswith("retrieval-") else tasks.name(task) for task in by_task}
    found = _over_tasks(by_task) | {names[task]: scores for task, scores in by_task.items()}
    return {name: scores for name, scores in found.items() if any(len(by) > 1 for by in scores.values())}


def _over_tasks(by_task: dict[str, Scores]) -> dict[str, Scores]:
    """Of models with several tasks of retrieval their mean, at the lengths that all of them have."""
    of: dict[tuple[str, Series], list[str]] = defaultdict(list)
    for task in sorted(by_task):
        if task.startswith("retrieval-"):
            for series in by_task[task]:
                of[retrieval.score(task), series].append(task)
    found: dict[str, Scores] = defaultdict(dict)
    for (score, series), its in of.items():
        if len(its) > 1:
            name = f"retrieval, {score}, mean of {', '.join(retrieval.name(task).partition(', by')[0] for task in its)}"
            shared = sorted(set.intersection(*(set(by_task[task][series]) for task in its)))
            found[name][series] = {n: _mean([by_task[task][series][n].rows for task in its]) for n in shared}
    return found


def _mean(groups: list[list[Result]]) -> Mean:
    """The mean over groups of each one's mean."""
    means = [sum(row.value for row in rows) / len(rows) for rows in groups]
    return Mean(sum(means) / len(means), [row for rows in groups for row in rows])


def _table(lines: dict[str, dict[int, Mean]]) -> Table:
    columns = sorted({length for line in lines.values() for length in line})
    head = [Cell(""), Cell("effective", "tokens"), *(Cell(f"{length:,}", "tokens") for length in columns)]
    body = []
    for label, line in lines.items():
        reached = effective({length: mean.value for length, mean in line.items()})
        ended = next((length for length in line if length > (reached or 0)), 0)  # the first that is too long
        seen = [row for length, mean in line.items() if length <= max(reached or 0, ended) for row in mean.rows]
        cells = [Cell(percent(line[n].value), results=line[n].rows) if n in line else Cell("–") for n in columns]
        body.append([Cell(label), Cell(f"{reached:,}" if reached else "none", results=seen), *cells])
    return Table("", head, body)
