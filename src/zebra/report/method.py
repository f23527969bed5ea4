"""What the numbers of a page depend on, and the rows that none of its sections shows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from zebra.report.links import plain
from zebra.report.page import Cell, Section, Table
from zebra.report.sections import convention
from zebra.report.series import step
from zebra.results import Result

_CONVENTIONS = {
    "disjoint": "windows side by side; every token but the first of each window is scored once",
    "strided": "overlapping windows; each scores only its last tokens, those that no window before it has scored",
    "truncated": "only the beginning of each document that is long enough to fill the context",
}

_MANY = 12
"""Values of a fact that are shown."""


def others(rows: list[Result]) -> Section:
    """What no other section shows."""
    known = ("run", "model", "layout", "task", "metric", "value", "low", "high", "n", "length", "position_from",
             "position_to", "depth", "seed")  # fmt: skip
    columns = [column for column in known if any(getattr(row, column) is not None for row in rows)]

    def cell(row: Result, column: str) -> Cell:
        value = getattr(row, column)
        text = f"{value:,.6g}" if isinstance(value, float) else plain(value)
        return Cell(text, results=[row] if column in ("value", "low", "high", "n") and value is not None else [])

    body = [[cell(row, column) for column in columns] for row in rows]
    table = Table("", [Cell(column.replace("_", " ")) for column in columns], body, numeric=False)
    return Section("Other rows", [table] if rows else [])


def _few(values: list[str]) -> list[str]:
    """A grid has many models."""
    return values if len(values) <= _MANY else [*values[: _MANY - 1], f"{len(values) - _MANY + 1:,} more, in the rows"]


def method(rows: Sequence[Result]) -> Section:
    """All that a number depends on."""
    facts: dict[str, dict[str, None]] = defaultdict(dict)
    for row in rows:
        how = convention(row.task)
        if row.task != how:
            facts["convention"][f"{how}: {_CONVENTIONS.get(how, 'as its evaluation defines it')}"] = None
        if row.low is not None and row.task != how:
            facts["intervals"]["95 %, bootstrap over documents"] = None
        if row.low is not None and row.task.startswith("retrieval-"):
            facts["intervals"]["of retrieval: 95 %, Wilson's over samples"] = None
        if row.low is not None and row.task.startswith("selection-"):
            facts["intervals"]["of selections: 95 %, bootstrap over rows, of the difference from the source"] = None
        if step(row) is None:
            facts["models"][row.model] = None
        facts["seed"]["none" if row.seed is None else str(row.seed)] = None
        facts["device"][row.device] = None
        facts["versions"][plain(row.versions)] = None
        commit = row.commit or "not known: an installed package"
        facts["commit"][commit.replace("+", " with uncommitted changes")] = None
    body = [[Cell(name), Cell("; ".join(_few([*values])))] for name, values in facts.items()]
    return Section("How it was measured", [Table("", [Cell(""), Cell("")], body, numeric=False)])
