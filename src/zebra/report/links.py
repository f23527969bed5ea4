"""The list of results at the end of a page, and the links of its numbers to them.

A number of one result links to `#result-17`; one of several, a mean say, links to `#from-3`, which names them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from zebra.report.series import number
from zebra.results import COLUMNS, Result

_FEW = 12
"""Up to so many results are named with their values."""
_FIRST = ("value", "metric", "task")
_DESCRIBED = ("metric", "value", "low", "high", "length", "depth", "n")


class Links:
    """Where the numbers of a page link to."""

    def __init__(self, results: Sequence[Result]) -> None:
        self.results = results
        self.several: dict[tuple[int, ...], int] = {}
        """Places of results to the number of their list; whole once all numbers of the page are linked."""
        self._place = {id(result): i for i, result in enumerate(results, start=1)}

    def to(self, results: Iterable[Result]) -> str:
        """The address of what a number rests on; empty where that is no result of the page."""
        places = tuple(sorted({self._place[id(result)] for result in results if id(result) in self._place}))
        if len(places) < 2:
            return f"#result-{places[0]}" if places else ""
        return f"#from-{self.several.setdefault(places, len(self.several) + 1)}"

    def named(self, places: tuple[int, ...]) -> list[tuple[int, int, str]]:
        """The results behind a number: a few with their values, many as spans from first to last."""
        if len(places) <= _FEW:
            return [(i, i, number(self.results[i - 1].value)) for i in places]
        spans = [[i for _, i in span] for _, span in groupby(enumerate(places), lambda at: at[1] - at[0])]
        return [(span[0], span[-1], "") for span in spans]


def result_columns(results: Sequence[Result]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Columns as text by name: those in which all results are alike, with their value, and the others."""
    columns = {name.replace("_", " "): [plain(getattr(one, name)) for one in results] for name in (*_FIRST, *COLUMNS)}
    if any(result.origin for result in results):
        origins = [(result.origin or "").rpartition(":") for result in results]
        columns |= {"file": [file for file, _, _ in origins], "line": [line for _, _, line in origins]}
    alike = {name: texts[0] for name, texts in columns.items() if len(results) > 1 and len(set(texts)) == 1}
    different = {name: texts for name, texts in columns.items() if name not in alike}
    return {name: text for name, text in alike.items() if text != "–"}, different


def describe(result: Result) -> str:
    """A result in a line, for readers who point at it in a figure."""
    columns = {name: getattr(result, name) for name in _DESCRIBED}
    return ", ".join(f"{name} {plain(value)}" for name, value in columns.items() if value is not None)


def plain(value: Any) -> str:
    """A column's value as text."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {version}" for name, version in value.items())
    return "–" if value is None else f"{value:.9g}" if isinstance(value, float) else str(value)
