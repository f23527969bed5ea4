"""Results as tables: a line for each key of one kind, a column for each of another."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from zebra.report.page import Cell, Table
from zebra.report.series import interval, number
from zebra.results import Result

Key = TypeVar("Key", bound=Hashable)
LineKey = TypeVar("LineKey", bound=Hashable)
ColumnKey = TypeVar("ColumnKey", bound=Hashable)
Results = Sequence[Result]


def split(results: Iterable[Result], key: Callable[[Result], Key]) -> dict[Key, list[Result]]:
    """Results by a key, the keys in the order of their first results."""
    groups: dict[Key, list[Result]] = {}
    for result in results:
        groups.setdefault(key(result), []).append(result)
    return groups


def value_cell(results: Results, text: Callable[[float], str] = number) -> Cell:
    """The value of a result, the last of several; a dash without a result."""
    return Cell(text(results[-1].value), results=[results[-1]]) if results else Cell("–")


def interval_cell(
    results: Results,
    text: Callable[[float], str] = number,
    bound: Callable[[float], str] | None = None,
    between: str = "–",
) -> Cell:
    """A value with its interval beside it.

    Args:
        bound: the text of the interval's ends; as the value's where None.
    """
    bounds = (interval(results[-1]) if results else None) or ()
    return value_cell(results, text)._replace(dim=between.join(map(bound or text, bounds)))


def finite(results: Iterable[Result]) -> list[Result]:
    """The results whose values are numbers."""
    return [result for result in results if math.isfinite(result.value)]


class Column(NamedTuple):
    """The head of a column, and what it shows of the results at a place; without results it gets an empty list."""

    head: Cell
    show: Callable[[Results], Cell] = interval_cell


def pivot_table(
    title: str,
    corner: Sequence[Cell],
    lines: Mapping[LineKey, Sequence[Cell]],
    columns: Mapping[ColumnKey, Column],
    places: Mapping[tuple[LineKey, ColumnKey], Results],
) -> Table:
    """A table of the results at each place.

    Args:
        corner: the heads of the cells that name a line.
        lines: for each line the cells that name it.
        columns: for each column its head and what it shows.
        places: the results of each line and column; `split` makes them.
    """
    body = [
        [*names, *(column.show(places.get((line, key), ())) for key, column in columns.items())]
        for line, names in lines.items()
    ]
    return Table(title, [*corner, *(column.head for column in columns.values())], body)
