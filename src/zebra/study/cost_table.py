"""What a cell costs: exact counts, and of a training step the plan's time and memory beside the measured ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from zebra.report.page import Cell, Table
from zebra.report.series import count, interval, number
from zebra.results import Result
from zebra.study import cells
from zebra.study.cells import Study

COUNTED = "Attention pairs and cached tokens are exact counts over one text of the training length."
"""How the table is to be read."""
TIMED = (
    " A training step (forward, loss, backward, optimiser) was timed in turns, all cells of a length in one process: "
    "the median, with the least and the most. Its memory is what a fresh process needs for the model, the optimiser "
    "and one step. Beside both stands what the plan says from the config and this machine's ceilings."
)
"""The same of the rows that `benchmarks/study.py` measures."""

Show = Callable[[Result, int], Cell]


def table(study: Study, lines: Sequence[cells.Cell]) -> Table | None:
    """A line for each cell, its columns those of which there are rows."""
    columns: list[tuple[Cell, dict[cells.Cell, Cell]]] = []
    for head, metric, show in _COLUMNS:
        found = {cell: show(rows[0], _tokens(study, cell)) for cell in lines if (rows := _rows(study, cell, metric))}
        columns += [(head, found)] if found else []
    if not columns:
        return None
    body = [
        [Cell(cell.name, f"trained at {cell.length:,}"), *(found.get(cell, Cell("–")) for _, found in columns)]
        for cell in lines
    ]
    return Table("", [Cell("cell"), *(head for head, _ in columns)], body)


def _rows(study: Study, cell: cells.Cell, metric: str) -> list[Result]:
    timed = [
        row
        for row in study.measured
        if (row.layout, row.length, row.metric) == (f"{cell.layout} {cell.position}", cell.length, metric)
    ]
    return timed or study.rows(cell, "cost", metric, cell.length)


def _tokens(study: Study, cell: cells.Cell) -> int:
    """Tokens of a timed step, by its time and its speed."""
    taken, speed = _rows(study, cell, "milliseconds"), _rows(study, cell, "tokens_per_second")
    return round(taken[0].value * speed[0].value / 1000) if taken and speed else 1


def _count(row: Result, _: int) -> Cell:
    return Cell(count(row.value), results=[row])


def _microseconds(row: Result, tokens: int) -> Cell:
    bounds = interval(row)
    said = "–".join(number(1000 * bound / tokens) for bound in bounds) if bounds else ""
    return Cell(number(1000 * row.value / tokens), said, results=[row])


def _mebibytes(row: Result, _: int) -> Cell:
    return Cell(number(row.value / 2**20), results=[row])


_COLUMNS: tuple[tuple[Cell, str, Show], ...] = (
    (Cell("parameters"), "parameters", _count),
    (Cell("attention pairs", "a text"), "attention_pairs", _count),
    (Cell("cached tokens", "a text"), "cached_tokens", _count),
    (Cell("planned", "µs a token"), "planned_milliseconds", _microseconds),
    (Cell("measured", "µs a token"), "milliseconds", _microseconds),
    (Cell("planned", "MiB"), "planned_bytes", _mebibytes),
    (Cell("measured", "MiB"), "extra_bytes", _mebibytes),
)
