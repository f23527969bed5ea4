"""Tables of results: each row has some of the results, and each column shows one property of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

from zebra.report.page import Cell, Table
from zebra.report.series import interval, number, overlap
from zebra.results import Result

Key = TypeVar("Key", bound=Hashable)
Results = Sequence[Result]
Show = Callable[[Results], Cell]
"""Makes a cell from results; there may be none."""


def split(results: Iterable[Result], key: Callable[[Result], Key]) -> dict[Key, list[Result]]:
    """Group results by a key, with the keys in the order of their first results."""
    groups: dict[Key, list[Result]] = {}
    for result in results:
        groups.setdefault(key(result), []).append(result)
    return groups


def table(
    title: str,
    corner: Sequence[Cell],
    lines: Iterable[tuple[Sequence[Cell], Results]],
    columns: Iterable[tuple[Cell, Show]],
) -> Table:
    """A table with a row for each group of results.

    Args:
        corner: the heads of the columns that name the rows.
        lines: for each row the cells that name it, and its results.
        columns: for each column its head, and the function that makes its cells.
    """
    columns = list(columns)
    body = [[*names, *(show(results) for _, show in columns)] for names, results in lines]
    return Table(title, [*corner, *(head for head, _ in columns)], body)


def where(show: Show, **columns: Any) -> Show:
    """Restrict `show` to the results with these values in these columns."""
    return lambda results: show(
        [one for one in results if all(getattr(one, name) == value for name, value in columns.items())]
    )


def value_cell(results: Results, text: Callable[[float], str] = number) -> Cell:
    """The value of a result, or of the last one of several; a dash without results."""
    return Cell(text(results[-1].value), results=[results[-1]]) if results else Cell("–")


def interval_cell(
    results: Results,
    text: Callable[[float], str] = number,
    bound: Callable[[float], str] | None = None,
    between: str = "–",
) -> Cell:
    """A value with its interval beside it.

    Args:
        bound: formats the bounds of the interval; `text` does if None.
    """
    bounds = (interval(results[-1]) if results else None) or ()
    return value_cell(results, text)._replace(dim=between.join(map(bound or text, bounds)))


def change_words(before: Result, after: Result) -> list[Cell]:
    """A change in words: `fell from 5.00 to 4.00`."""
    if number(before.value) == number(after.value):
        return [Cell("stayed at "), value_cell([after])]
    way = "fell" if after.value < before.value else "rose"
    unclear = " (the intervals overlap)" if overlap(before, after) else ""
    return [Cell(f"{way} from "), value_cell([before]), Cell(" to "), value_cell([after]), Cell(unclear)]


def finite(results: Iterable[Result]) -> list[Result]:
    """The results whose values are numbers."""
    return [result for result in results if math.isfinite(result.value)]
