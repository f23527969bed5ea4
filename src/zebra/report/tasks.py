"""Rows of the harness's tasks and of questions about documents as tables: a line for each metric, length across."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from zebra.report.page import Cell, Figure, Section, Table
from zebra.report.series import Series, interval, number, percent, series_of
from zebra.results import Result

_CHECK = "documents-check-"
_SHARES = ("acc", "acc_norm", "accuracy", "exact_match", "em", "f1", "rouge1", "rouge2", "rougeL")
HOW = (
    "Tasks of the lm-evaluation-harness, and questions about documents, by the length in tokens that the model was "
    "given to read. ROUGE and F1 are against the best reference answer; a log-likelihood is in nats per token of the "
    "reference answers. Where the data were checked, a table says which share of the items has which fault. Beside a "
    "value stands its 95 % interval."
)


def tasks(rows: list[Result]) -> Section:
    """All of them, as tables."""
    blocks: list[str | Table | Figure] = [HOW, *task_tables(rows)]
    return Section("Tasks", blocks if rows else [])


def task_tables(rows: list[Result]) -> list[Table]:
    """A table for each task of each run, model and layout."""
    grids: dict[tuple[str, Series], dict[str, dict[int | None, Result]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        grids[row.task, series_of(row)][row.metric][row.length] = row
    return [_table(task, series, metrics) for (task, series), metrics in grids.items()]


def _table(task: str, series: Series, metrics: dict[str, dict[int | None, Result]]) -> Table:
    lengths = sorted({length for cells in metrics.values() for length in cells}, key=lambda length: length or 0)
    counts = sorted({row.n for cells in metrics.values() for row in cells.values() if row.n is not None})
    head = [Cell("share of items" if task.startswith(_CHECK) else "metric")]
    head += [Cell("–") if length is None else Cell(f"{length:,}", "tokens") for length in lengths]
    body = [
        [Cell(metric.replace("_", " ")), *(_value(cells.get(length)) for length in lengths)]
        for metric, cells in metrics.items()
    ]
    title = f"{series.run}: {name(task)}, {series.name} {series.layout}"
    return Table(title + (f", {' or '.join(f'{n:,}' for n in counts)} items" if counts else ""), head, body)


def name(task: str) -> str:
    """A task's name for people."""
    if task.startswith(_CHECK):
        return f"the data of {task.removeprefix(_CHECK)}"
    kind, _, rest = task.partition("-")
    if kind == "harness":
        return rest
    score, _, file = rest.partition("-")
    return f"{file}, by {'generation' if score == 'generate' else score}"


def _value(row: Result | None) -> Cell:
    if row is None or not math.isfinite(row.value):
        return Cell("–")
    return value([row])


def is_share(row: Result) -> bool:
    """Whether a row's value is a share, which is shown in percent."""
    return row.task.startswith(_CHECK) or row.metric.partition(" ")[0] in _SHARES


def value(rows: Sequence[Result]) -> Cell:
    """The mean of rows, in percent where they are shares; of a single one, with its interval."""
    bounds = interval(rows[0]) if len(rows) == 1 else None
    mean = rows[0].value if len(rows) == 1 else sum(row.value for row in rows) / len(rows)
    if is_share(rows[0]):
        return Cell(percent(mean), "–".join(f"{100 * bound:.1f}" for bound in bounds) if bounds else "", results=rows)
    return Cell(number(mean), " to ".join(map(number, bounds)) if bounds else "", results=rows)
