"""What the numbers of a page depend on, and the results that no section of it shows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from zebra.report.page import Cell, Section, Table, plain
from zebra.report.perplexity import convention
from zebra.report.series import layer_lists, step
from zebra.results import COLUMNS, Result

_CONVENTIONS = {
    "disjoint": "windows side by side; every token but the first of each window is scored once",
    "strided": "overlapping windows; each scores only its last tokens, those that no window before it has scored",
    "truncated": "only the beginning of each document that is long enough to fill the context",
}
_BOS = "; each window begins with the tokenizer's BOS token"
_INTERVALS = {
    "perplexity-": "95 %, bootstrap over documents",
    "compare-paired": "of methods side by side: 95 %, bootstrap over windows",
    "retrieval-": "of retrieval: 95 %, Wilson's over samples",
    "selection-": "of selections: 95 %, bootstrap over sequences, of the change from the source",
}
_MANY = 12
"""The most values that are shown of one fact."""


def others(results: list[Result]) -> Section:
    """The results that no other section shows, as a plain table."""
    names = [name for name in COLUMNS if name not in ("device", "versions", "commit")]
    columns = [name for name in names if any(getattr(one, name) is not None for one in results)]

    def cell(one: Result, column: str) -> Cell:
        value = getattr(one, column)
        text = f"{value:,.6g}" if isinstance(value, float) else plain(value)
        linked = column in ("value", "low", "high", "n") and value is not None
        return Cell(text, results=[one] if linked else [])

    body = [[cell(one, column) for column in columns] for one in results]
    table = Table("", [Cell(column.replace("_", " ")) for column in columns], body, numeric=False)
    return Section("Other results", [table] if results else [])


def method(results: Sequence[Result]) -> Section:
    """A table of what the numbers depend on: conventions, intervals, models, seeds, devices, versions, layers."""
    facts: dict[str, dict[str, None]] = defaultdict(dict)
    of_windows = {one.run for one in results if one.task == "compare-paired"}  # so are their perplexities
    for one in results:
        how = convention(one.task)
        if one.task != how:
            name, _, rest = how.partition("-")
            begins = _BOS * ("bos" in rest.split("-"))
            facts["convention"][f"{how}: {_CONVENTIONS.get(name, 'as its evaluation defines it')}{begins}"] = None
        for kind, text in _INTERVALS.items():
            over_windows = kind == "perplexity-" and one.run in of_windows
            if one.low is not None and one.task.startswith(kind) and not over_windows:
                facts["intervals"][text] = None
        if step(one) is None:
            facts["models"][one.model] = None
        facts["seed"]["none" if one.seed is None else str(one.seed)] = None
        facts["device"][one.device] = None
        facts["versions"][plain(one.versions)] = None
        commit = one.commit or "not known: an installed package"
        facts["commit"][commit.replace("+", " with uncommitted changes")] = None
    facts["layers"] = dict.fromkeys(layer_lists(one.layout for one in results if not one.task.startswith("selection-")))
    body = []
    for name, values in ((name, values) for name, values in facts.items() if values):
        shown = [*values]
        if len(shown) > _MANY:  # a grid has many models
            shown[_MANY - 1 :] = [f"{len(shown) - _MANY + 1:,} more, in the results"]
        body.append([Cell(name), Cell("; ".join(shown))])
    return Section("How it was measured", [Table("", [Cell(""), Cell("")], body, numeric=False)])
