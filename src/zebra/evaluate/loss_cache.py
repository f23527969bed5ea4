"""Losses as they are measured, in a folder: a process killed at any moment loses the one that it was at.

    inputs.json        what the losses depend on; a second start with the same goes on, with others it is refused
    calibration.npz    which tokens are scored
    losses.jsonl       a line for each layout and part: {"layout": "GLGG", "part": 3, "sums": [41.2, 39.9]}

Neither budget nor order is among the inputs: another budget in the same folder takes up what is there.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zebra.errors import ZebraError
from zebra.files import atomic_write, directory_lock


class LossCache:
    """Sums of losses by layout, a letter for each layer, and part; in memory alone where there is no folder."""

    def __init__(self, folder: Path | None = None):
        self._folder = folder
        self._sums: dict[tuple[str, int], list[float]] = {}
        if folder is not None and (folder / "losses.jsonl").exists():
            self._read(folder / "losses.jsonl")

    def __contains__(self, key: tuple[str, int]) -> bool:
        return key in self._sums

    def __getitem__(self, key: tuple[str, int]) -> list[float]:
        return self._sums[key]

    def add(self, layout: str, part: int, sums: list[float]) -> None:
        """Keep the sum of each row of a part, in memory and, in one write, at the end of the file."""
        self._sums[layout, part] = sums
        if self._folder is not None:
            line = json.dumps({"layout": layout, "part": part, "sums": sums}) + "\n"
            with (self._folder / "losses.jsonl").open("a", encoding="utf-8") as file:
                file.write(line)

    def _read(self, file: Path) -> None:
        text = file.read_bytes()
        whole = text.rfind(b"\n") + 1  # a kill or a full disk cut the last line
        if whole < len(text):
            os.truncate(file, whole)
        for number, line in enumerate(text[:whole].splitlines(), start=1):
            try:
                entry = json.loads(line)
                self._sums[str(entry["layout"]), int(entry["part"])] = [float(value) for value in entry["sums"]]
            except (ValueError, KeyError, TypeError):
                raise ZebraError(
                    f"{file}, line {number} is no loss. Remove the line to measure it again, or name another folder."
                ) from None


@contextmanager
def opened(folder: Path, inputs: dict[str, Any]) -> Iterator[Path]:
    """Hold a folder of these inputs for this process, made where it is absent.

    Raises:
        ZebraError: a folder of something else or of other inputs, or one that another process works in.
    """
    kept = folder / "inputs.json"
    if folder.exists() and not kept.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ZebraError(f"{folder} exists and holds no selection: it has no inputs.json. Name another with --work.")
    with directory_lock(folder):
        if kept.exists():
            _compare(kept, inputs)
        else:
            atomic_write(kept, json.dumps(inputs, indent=2) + "\n")
        yield folder


def _compare(kept: Path, inputs: dict[str, Any]) -> None:
    try:
        began = dict(json.loads(kept.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ZebraError(f"{kept} is damaged. Name another folder with --work, or remove {kept.parent}.") from None
    changed = sorted(name for name in {*inputs, *began} if inputs.get(name) != began.get(name))
    if changed:
        raise ZebraError(
            f"{kept.parent} began with other inputs: {' and '.join(changed)} changed since. "
            "Restore them to go on with it, or name another folder with --work."
        )


def scored(folder: Path) -> list[NDArray[np.bool_]] | None:
    """The scored tokens of each part, None where they are not in the folder whole: they can be found again."""
    try:
        with np.load(folder / "calibration.npz") as kept:
            return [kept[f"part_{i}"] for i in range(len(kept.files))]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def keep_scored(folder: Path, at: list[NDArray[np.bool_]]) -> None:
    """Keep the scored tokens of each part: the file is whole or absent."""
    aside = folder / f".calibration.{os.getpid()}.npz"
    named: dict[str, Any] = {f"part_{i}": each for i, each in enumerate(at)}
    np.savez_compressed(aside, **named)
    os.replace(aside, folder / "calibration.npz")
