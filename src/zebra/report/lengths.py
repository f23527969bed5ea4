"""How far a model keeps what it can do: scores by length, and RULER's effective length."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from zebra.records import Row
from zebra.report.figures import drawn, plot_lengths
from zebra.report.page import Cell, Figure, Section, Table
from zebra.report.series import Series, percent, series_of

THRESHOLD = 0.856
"""RULER's (arXiv 2404.06654), the score of Llama-2-7B at 4K tokens there; recalled, not verified against the paper."""
HOW = (
    "Scores by the length of the text. The effective length is the longest at which, as at all shorter ones that were "
    f"measured, the score is at least {percent(THRESHOLD)}. The threshold is RULER's, Llama-2-7B's score at 4K tokens "
    "(recalled from the paper, not verified); RULER takes it over 13 tasks by generation, here it is taken over what "
    "each caption says."
)

Scores = dict[Series, dict[int, float]]


def effective(scores: Mapping[int, float]) -> int | None:
    """The longest length up to which every score reaches the threshold; None where the first does not.

    Example:
        >>> effective({1024: 1.0, 2048: 0.9, 4096: 0.5, 8192: 0.9})
        2048
    """
    found = None
    for length in sorted(scores):
        if scores[length] < THRESHOLD:
            break
        found = length
    return found


def lengths(rows: Iterable[Row]) -> Section:
    """A figure and a table for retrieval by each score, and for each task of several lengths."""
    blocks: list[str | Table | Figure] = [HOW]
    for i, (name, scores) in enumerate(measures(rows).items(), start=1):
        caption = f"{name}, by length; dashed, RULER's threshold"
        svg = drawn(
            f"lengths{i}", lambda axes, scores=scores: plot_lengths(axes, _lines(scores), THRESHOLD), height=2.6
        )
        blocks += [Figure(f"lengths-{i}", svg, caption), _table(name, scores)]
    return Section("By length", blocks if len(blocks) > 1 else [])


def measures(rows: Iterable[Row]) -> dict[str, Scores]:
    """What was scored at two lengths or more: the mean over a model's tasks and depths, at lengths that all have."""
    cells: dict[str, dict[Series, dict[int, dict[str, list[float]]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    )
    for row in rows:
        name = _measure(row)
        if name is not None and row.length is not None:
            cells[name][series_of(row)][row.length][row.task].append(row.value)
    found: dict[str, Scores] = {}
    for name, by_series in cells.items():
        scores = {series: _means(by_length) for series, by_length in by_series.items()}
        if any(len(by_length) > 1 for by_length in scores.values()):
            found[name] = scores
    return found


def _measure(row: Row) -> str | None:
    if row.metric != "accuracy":
        return None
    if row.task.startswith("retrieval-"):
        score = row.task.split("-")[1]
        return f"retrieval, by {'generation' if score == 'generate' else score}"
    return row.task.removeprefix("harness-") if row.task.startswith("harness-") else None


def _means(by_length: dict[int, dict[str, list[float]]]) -> dict[int, float]:
    tasks = {task for by_task in by_length.values() for task in by_task}
    return {
        length: sum(sum(values) / len(values) for values in by_task.values()) / len(by_task)
        for length, by_task in sorted(by_length.items())
        if set(by_task) == tasks
    }


def _label(series: Series, scores: Scores) -> str:
    several = len({other.run for other in scores}) > 1
    return f"{series.run}: {series.name} {series.layout}" if several else f"{series.name} {series.layout}"


def _lines(scores: Scores) -> dict[str, dict[int, float]]:
    return {_label(series, scores): by_length for series, by_length in scores.items()}


def _table(name: str, scores: Scores) -> Table:
    columns = sorted({length for by_length in scores.values() for length in by_length})
    head = [Cell("model"), Cell("effective", "tokens"), *(Cell(f"{length:,}", "tokens") for length in columns)]
    body = []
    for series, by_length in scores.items():
        reached = effective(by_length)
        cells = [Cell(percent(by_length[length]) if length in by_length else "–") for length in columns]
        body.append([Cell(_label(series, scores)), Cell(f"{reached:,}" if reached else "none"), *cells])
    return Table(name, head, body)
