"""Losses in a folder, written as they are measured: a process killed at any moment loses the one in progress.

    inputs.json        what the losses depend on; a second start with the same continues, with others it is rejected
    calibration.npz    which tokens are scored
    losses.jsonl       a line for each layout and batch: {"layout": "GLGG", "part": 3, "sums": [41.2, 39.9]}

Neither budget nor order is among the inputs: another budget in the same folder reuses the losses.
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
from zebra.files import atomic_write, check_inputs, directory_lock


class LossCache:
    """Sums of losses by layout, a letter for each layer, and batch; in memory only where there is no folder."""

    def __init__(self, folder: Path | None = None):
        self._folder = folder
        self._sums: dict[tuple[str, int], list[float]] = {}
        if folder is not None and (folder / "losses.jsonl").exists():
            self._read(folder / "losses.jsonl")

    def __contains__(self, key: tuple[str, int]) -> bool:
        return key in self._sums

    def __getitem__(self, key: tuple[str, int]) -> list[float]:
        return self._sums[key]

    def add(self, layout: str, batch: int, sums: list[float]) -> None:
        """Store the sum of each sequence of a batch, in memory and, in one write, at the end of the file."""
        self._sums[layout, batch] = sums
        if self._folder is not None:
            line = json.dumps({"layout": layout, "part": batch, "sums": sums}) + "\n"
            with (self._folder / "losses.jsonl").open("a", encoding="utf-8") as file:
                file.write(line)

    def _read(self, file: Path) -> None:
        text = file.read_bytes()
        complete = text.rfind(b"\n") + 1  # a kill or a full disk may have cut the last line
        if complete < len(text):
            os.truncate(file, complete)
        for number, line in enumerate(text[:complete].splitlines(), start=1):
            try:
                entry = json.loads(line)
                self._sums[str(entry["layout"]), int(entry["part"])] = [float(value) for value in entry["sums"]]
            except (ValueError, KeyError, TypeError):
                raise ZebraError(
                    f"{file}, line {number} is no loss. Remove the line to measure it again, or name another folder."
                ) from None


@contextmanager
def selection_folder(folder: Path, inputs: dict[str, Any]) -> Iterator[Path]:
    """Lock a folder of these inputs for this process; it is created where it is absent.

    Raises:
        ZebraError: a folder of something else or of other inputs, or one that another process works in.
    """
    file = folder / "inputs.json"
    if folder.exists() and not file.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ZebraError(f"{folder} exists and holds no selection: it has no inputs.json. Name another with --work.")
    with directory_lock(folder):
        check_inputs(file, inputs, instead="name another folder with --work")
        if not file.exists():
            atomic_write(file, json.dumps(inputs, indent=2) + "\n")
        yield folder


def read_scored_tokens(folder: Path) -> list[NDArray[np.bool_]] | None:
    """The scored tokens of each batch, None where the file is absent or damaged: they can be computed again."""
    try:
        with np.load(folder / "calibration.npz") as arrays:
            return [arrays[f"part_{i}"] for i in range(len(arrays.files))]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def write_scored_tokens(folder: Path, scored: list[NDArray[np.bool_]]) -> None:
    """Write the scored tokens of each batch; the file is complete or absent."""
    temporary = folder / f".calibration.{os.getpid()}.npz"
    arrays: dict[str, Any] = {f"part_{i}": array for i, array in enumerate(scored)}
    np.savez_compressed(temporary, **arrays)
    os.replace(temporary, folder / "calibration.npz")
