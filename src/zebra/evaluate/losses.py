"""Losses of layouts on calibration sequences, stored in a folder as they are measured.

    inputs.json           what the losses depend on; the same inputs continue, others are rejected
    scored_tokens.json    which tokens are scored: for each batch, their indices in its flattened (B, T)
    losses.jsonl          one line per layout and batch: {"layout": "GLGG", "batch": 3, "sums": [41.2, 39.9]}

A layout is a string with one letter per layer, G or L. A process that is killed loses only the loss in progress. Budget
and order are not among the inputs, so another budget in the same folder reuses the losses.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from zebra.errors import ZebraError
from zebra.evaluate.calibration import CalibrationBatch
from zebra.evaluate.scoring import no_progress
from zebra.files import append_to_log, atomic_write, check_inputs, directory_lock, is_vacant, read_log
from zebra.model.finite import check_finite
from zebra.model.layerwise import Layerwise
from zebra.model.loss import head_of, losses_at

Advance = Callable[[float], None]


class Losses:
    """Losses of layouts on the selection sequences and on the held-out sequences; none is measured twice.

    Args:
        model: with attention "zebra", in evaluation mode.
        window, sinks: of the local layers.
        folder: where `losses.jsonl` is read and written; None keeps the losses in memory.

    Attributes:
        candidates: the layouts that were measured on the selection sequences, in order.

    Raises:
        ZebraError: a line of the file is not a loss.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[CalibrationBatch],
        window: int,
        sinks: int = 0,
        folder: Path | None = None,
    ):
        self._layers, self._head, self._model = Layerwise(model, window, sinks), head_of(model), model
        self._batches = batches
        self._file = None if folder is None else folder / "losses.jsonl"
        self._sums: dict[tuple[str, int], list[float]] = {}
        self.candidates: list[str] = []
        if self._file is not None:
            read_log(self._file, self._read, "loss")

    def measure(
        self, base: str, layouts: Sequence[str], *, held_out: bool = False, advance: Advance = no_progress
    ) -> bool:
        """Measure layouts, each run from the first layer that differs from `base`; returns whether any was new."""
        new = False
        if not held_out:
            self.candidates += [kinds for kinds in layouts if kinds not in self.candidates]
        for i in self._indices(held_out):
            batch = self._batches[i]
            missing = [kinds for kinds in layouts if (kinds, i) not in self._sums]
            advance(len(layouts) - len(missing))
            if not missing:
                continue
            new = True
            ids, scored = batch.tensors(self._model.device)
            states = self._layers.states(ids, base)
            for kinds in missing:
                start = next((i for i, kind in enumerate(kinds) if kind != base[i]), 0)
                hidden = states[-1] if kinds == base else self._layers.resume(ids, kinds, start, states[start])
                losses = losses_at(hidden, self._head, ids, scored).double()
                check_finite(losses, self._model)
                self._add(kinds, i, [sequence.sum().item() for sequence in losses.split(_counts(batch))])
                advance(1)
        return new

    def sums(self, kinds: str, *, held_out: bool = False) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """For a measured layout, the sum of losses of each sequence, and its number of scored tokens, both (n,)."""
        which = self._indices(held_out)
        counts = [count for i in which for count in _counts(self._batches[i])]
        return np.array([value for i in which for value in self._sums[kinds, i]]), np.array(counts, dtype=np.float64)

    def mean(self, kinds: str) -> float:
        """The mean loss of a layout on the selection sequences, in nats per token."""
        sums, counts = self.sums(kinds)
        return float(sums.sum() / counts.sum())

    def _indices(self, held_out: bool) -> list[int]:
        return [i for i, batch in enumerate(self._batches) if batch.held_out == held_out]

    def _read(self, entry: dict[str, Any]) -> None:
        self._sums[str(entry["layout"]), int(entry["batch"])] = [float(value) for value in entry["sums"]]

    def _add(self, kinds: str, batch: int, sums: list[float]) -> None:
        """Store the sums of the sequences of a batch, in memory and in the file."""
        self._sums[kinds, batch] = sums
        if self._file is not None:
            append_to_log(self._file, {"layout": kinds, "batch": batch, "sums": sums})


def _counts(batch: CalibrationBatch) -> list[int]:
    return batch.scored.sum(axis=1).tolist()


@contextmanager
def selection_folder(folder: Path, inputs: dict[str, Any]) -> Iterator[Path]:
    """Lock the folder of these inputs for this process, and create it if it is absent.

    Raises:
        ZebraError: the folder holds something else, has other inputs, or another process works in it.
    """
    file = folder / "inputs.json"
    if not file.exists() and not is_vacant(folder):
        raise ZebraError(f"{folder} exists but is not a selection: it has no inputs.json. Name another with --out.")
    with directory_lock(folder):
        check_inputs(file, inputs, instead="name another folder with --out")
        if not file.exists():
            atomic_write(file, json.dumps(inputs, indent=2) + "\n")
        yield folder
