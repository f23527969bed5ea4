"""Results: what was measured, on what, and by which code. Tables and plots are views of results.

Length, depth and position are columns, never part of a metric's name. Results are stored in JSON Lines files.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from zebra.errors import ZebraError
from zebra.files import append_lines, atomic_write, check_writable
from zebra.provenance import git_commit, versions


@dataclass(frozen=True, kw_only=True)
class Result:
    """One measurement. Columns that do not apply are None.

    Attributes:
        low, high: the 95 % interval of `value`; for a time, the shortest and the longest that were measured.
        n: how many units were measured (tokens, samples).
        length: the context length in tokens.
        position_from, position_to: the half-open range of positions that were scored, counted from 0.
        depth: the relative position of a needle in its text, 0 to 1.
        origin: not a column, but the file and line that the result was read from, `results.jsonl:17`; None if it was
            not read from a file.
    """

    run: str
    model: str
    layout: str
    task: str
    metric: str
    value: float
    length: int | None = None
    position_from: int | None = None
    position_to: int | None = None
    depth: float | None = None
    n: int | None = None
    low: float | None = None
    high: float | None = None
    seed: int | None = None
    device: str = "cpu"
    versions: dict[str, str] = field(default_factory=lambda: dict(versions()))
    commit: str | None = field(default_factory=git_commit)
    origin: str | None = field(default=None, compare=False, repr=False)

    def columns(self) -> dict[str, Any]:
        """The values by name of column."""
        return {name: getattr(self, name) for name in COLUMNS}

    def json(self) -> str:
        """The result as one line of JSON."""
        return to_json(self.columns())


COLUMNS = tuple(f.name for f in fields(Result) if f.name != "origin")
"""The columns of a result, in order."""
_REQUIRED = ("run", "model", "layout", "task", "metric", "value")
_TYPES: dict[str, Any] = get_type_hints(Result) | {"versions": dict, "value": int | float}
_TYPES |= dict.fromkeys(("depth", "low", "high"), int | float | None)
"""The type of each column, checked when results are read from a file."""


def to_json(tree: Any, indent: int | None = None) -> str:
    """Encode as standard JSON, which has no NaN and no infinity: these become null.

    Control characters are escaped, and so are surrogates, such as those in file names that are not UTF-8.
    """

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: finite(inner) for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return [finite(inner) for inner in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    text = json.dumps(finite(tree), indent=indent, ensure_ascii=False, allow_nan=False)
    return re.sub("[\x7f-\x9f\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)


def write_results(path: str | os.PathLike[str], results: Iterable[Result]) -> None:
    """Write results to a new file, atomically."""
    atomic_write(path, "".join(result.json() + "\n" for result in results))


def append_results(path: str | os.PathLike[str], results: Iterable[Result]) -> None:
    """Append results to a file, all or none."""
    append_lines(path, "".join(result.json() + "\n" for result in results))


def check_results_file(path: str | os.PathLike[str]) -> None:
    """Check that results can be appended to a file: it can be written, and is absent or holds results.

    Raises:
        ZebraError: the file cannot be written, or some lines are not results.
    """
    check_writable(path)
    if Path(path).exists():
        read_results(path)


def read_results(path: str | os.PathLike[str]) -> list[Result]:
    """Read the results of a JSON Lines file, each with its origin.

    Raises:
        ZebraError: there is no such file, or some lines are not results. The message names the file, the first ten such
            lines, and the fault of the first.
    """
    if not Path(path).is_file():
        raise ZebraError(f"there is no results file at {path}. Give a results.jsonl or a run directory that has one.")
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ZebraError(f"{path} is not a results file: it is not UTF-8 at byte {error.start}.") from None
    results, faults = [], {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            results.append(_parse(line, f"{path}:{number}"))
        except json.JSONDecodeError as error:  # a complete file ends in a line break
            faults[number] = "it was cut off" if number == len(lines) else str(error)
        except (ValueError, TypeError, RecursionError) as error:
            faults[number] = str(error)
    if faults:
        first, *others = faults
        more = f" Neither are {len(others):,} others: lines {', '.join(map(str, others[:9]))}." if others else ""
        remedy = f"Remove {'those lines' if others else 'that line'}, or give another file."
        raise ZebraError(f"{path}, line {first} is not a result: {faults[first]}.{more} {remedy}")
    return results


def _parse(line: str, origin: str) -> Result:
    columns = json.loads(line)
    if not isinstance(columns, dict):
        raise TypeError("it is not a JSON object")
    if unknown := sorted(set(columns) - set(COLUMNS)):
        raise ValueError(f"unknown columns {unknown}")
    if missing := [name for name in _REQUIRED if name not in columns]:
        raise ValueError(f"missing columns {missing}")
    if columns["value"] is None:  # it was not finite
        columns["value"] = math.nan
    result = Result(**columns, origin=origin)
    for column in COLUMNS:
        value = getattr(result, column)
        if isinstance(value, bool) or not isinstance(value, _TYPES[column]) or not _in_range(column, value):
            raise ValueError(f"the column {column} cannot be {str(value)[:40]!r}")
    return result


def _in_range(column: str, value: Any) -> bool:
    """Whether a number is in the range of its column: a count of 63 bits, a share, or what a float can hold."""
    if column in ("length", "position_from", "position_to", "n"):
        return value is None or 0 <= value < 2**63
    if column == "depth":
        return value is None or 0 <= value <= 1
    return not isinstance(value, int) or abs(value) < 2**1023
