"""Files of published results, in which the newer results of a run replace its earlier ones."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from zebra.results import Result, read_results, write_results


def stored_results(file: Path) -> list[Result]:
    """The results of a file, none where there is no such file."""
    return read_results(file) if file.is_file() else []


def replace_run(file: Path, run: str, results: Iterable[Result], order: Iterable[str]) -> None:
    """Write the results of a run in the place of its earlier ones, the runs of the file in an order."""
    others = [one for one in stored_results(file) if one.run != run]
    runs = [*order]
    write_results(file, sorted([*others, *results], key=lambda one: runs.index(one.run)))
