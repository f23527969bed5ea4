"""One row of results: what was measured, on what, by which code. Tables and plots are views of rows.

Length, depth and position are columns, never part of a metric's name. Rows live in JSON Lines files.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from zebra.errors import ZebraError
from zebra.files import atomic_write


@functools.cache
def versions() -> dict[str, str]:
    """The versions that a result depends on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name, distribution in (
        ("zebra", "zebra-llm"),
        ("torch", "torch"),
        ("transformers", "transformers"),
        ("accelerate", "accelerate"),
        ("trl", "trl"),
    ):
        try:
            found[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def git_commit() -> str | None:
    """The commit of the checkout that this package runs from (`+` after it: with changes), None when installed."""
    here = Path(__file__).resolve().parent
    try:
        tracked = subprocess.run(
            ["git", "ls-files", "--error-unmatch", __file__], cwd=here, capture_output=True, timeout=10
        )
        if tracked.returncode != 0:
            return None
        name = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True, timeout=10)
        changed = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=here, capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return name.stdout.decode().strip() + ("+" if changed.returncode else "") if name.returncode == 0 else None


@dataclass(frozen=True, kw_only=True)
class Result:
    """One measurement. `low` and `high` bound `value` at 95 %, or are a time's least and most;
    `n` counts what was measured (tokens, samples).

    `length` is the context length in tokens; `position_from` and `position_to` bound the positions that were scored,
    half-open and counted from 0; `depth` is a needle's place, 0 to 1. What does not apply is None.
    `origin` is no column: the file and line that the row was read from, `results.jsonl:17`; of a row just measured,
    None.
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
        """What the row says, by column."""
        return {name: getattr(self, name) for name in COLUMNS}

    def json(self) -> str:
        """The row as one line of JSON."""
        return to_json(self.columns())


COLUMNS = tuple(f.name for f in fields(Result) if f.name != "origin")
"""A row's columns in their order."""
_REQUIRED = ("run", "model", "layout", "task", "metric", "value")


def to_json(tree: Any, indent: int | None = None) -> str:
    """JSON as its standard has it, which knows no NaN and no infinity: such numbers become null."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: finite(inner) for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return [finite(inner) for inner in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(tree), indent=indent, ensure_ascii=False, allow_nan=False)


def _row(columns: Any, origin: str) -> Result:
    if not isinstance(columns, dict):
        raise TypeError("it is no JSON object")
    unknown = sorted(set(columns) - set(COLUMNS))
    if unknown:
        raise ValueError(f"unknown columns {unknown}")
    if missing := [name for name in _REQUIRED if name not in columns]:
        raise ValueError(f"no columns {missing}")
    if columns.get("value", 0) is None:  # it was not finite
        columns["value"] = math.nan
    row = Result(**columns, origin=origin)
    for column, kind in _KINDS.items():
        value = getattr(row, column)
        if isinstance(value, bool) or not isinstance(value, kind):
            raise ValueError(f"the column {column} holds {value!r}")
    return row


_OPTIONAL_NUMBER = (int, float, type(None))
_KINDS: dict[str, Any] = {
    **dict.fromkeys(("run", "model", "layout", "task", "metric", "device"), str),
    "value": (int, float),
    **dict.fromkeys(("length", "position_from", "position_to", "n", "seed"), (int, type(None))),
    **dict.fromkeys(("depth", "low", "high"), _OPTIONAL_NUMBER),
    "versions": dict,
    "commit": (str, type(None)),
}
"""What each column may hold, for rows that come from a file."""


def write_results(path: str | os.PathLike[str], rows: Iterable[Result]) -> None:
    """Write rows to a new file, which is whole or absent."""
    atomic_write(path, "".join(row.json() + "\n" for row in rows))


def append_results(path: str | os.PathLike[str], rows: Iterable[Result]) -> None:
    """Append rows to a file in one write."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(row.json() + "\n" for row in rows))


def read_results(path: str | os.PathLike[str]) -> list[Result]:
    """Read the rows of a JSON Lines file, each with its origin.

    Raises:
        ZebraError: no such file, or lines that are no rows; the message names the file, what is wrong with the first of
            them, and the others.
    """
    if not Path(path).is_file():
        raise ZebraError(f"there is no file of rows at {path}. Give a results.jsonl or a run directory that has one.")
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ZebraError(f"{path} is no file of rows: it is not UTF-8 at byte {error.start}.") from None
    rows, wrong = [], {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(_row(json.loads(line), f"{path}:{number}"))
        except (ValueError, TypeError) as error:
            wrong[number] = str(error)
    if wrong:
        first, *others = wrong
        more = f" Nor are {len(others):,} others: lines {', '.join(map(str, others[:9]))}." if others else ""
        raise ZebraError(f"{path}, line {first} is not a row of results: {wrong[first]}.{more}")
    return rows
