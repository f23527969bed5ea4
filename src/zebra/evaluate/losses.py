"""The loss of layouts on calibration sequences, kept in a folder as it is measured.

    inputs.json           what the losses depend on; the same inputs continue, others are rejected
    scored_tokens.json    which tokens are scored: for each batch, their indices in its flattened (B, T)
    losses.jsonl          a line for each layout and batch: {"layout": "GLGG", "batch": 3, "sums": [41.2, 39.9]}

A layout is a string with a letter for each layer, G or L. A process killed at any moment loses the loss in progress.
Neither budget nor order is among the inputs: another budget in the same folder reuses the losses.
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
    """The losses of layouts on the sequences that choose, and on those held out; none is measured twice.

    Args:
        model: with attention "zebra", in evaluation mode.
        window, sinks: of the layers that are local.
        folder: to read and write `losses.jsonl` in; None keeps the losses in memory.

    Attributes:
        candidates: the layouts that were measured on the sequences that choose, in order.

    Raises:
        ZebraError: a line of the file that is no loss.
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
        """Measure layouts, each from the first layer in which it differs from `base`; whether any was new."""
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
        """Of a measured layout: each sequence's sum of losses (n,), and its number of scored tokens (n,)."""
        which = self._indices(held_out)
        counts = [count for i in which for count in _counts(self._batches[i])]
        return np.array([value for i in which for value in self._sums[kinds, i]]), np.array(counts, dtype=np.float64)

    def mean(self, kinds: str) -> float:
        """The mean loss of a layout, in nats a token, on the sequences that choose."""
        sums, counts = self.sums(kinds)
        return float(sums.sum() / counts.sum())

    def _indices(self, held_out: bool) -> list[int]:
        return [i for i, batch in enumerate(self._batches) if batch.held_out == held_out]

    def _read(self, entry: dict[str, Any]) -> None:
        self._sums[str(entry["layout"]), int(entry["batch"])] = [float(value) for value in entry["sums"]]

    def _add(self, kinds: str, batch: int, sums: list[float]) -> None:
        """Store the sum of each sequence of a batch, in memory and in the file."""
        self._sums[kinds, batch] = sums
        if self._file is not None:
            append_to_log(self._file, {"layout": kinds, "batch": batch, "sums": sums})


def _counts(batch: CalibrationBatch) -> list[int]:
    return batch.scored.sum(axis=1).tolist()


@contextmanager
def selection_folder(folder: Path, inputs: dict[str, Any]) -> Iterator[Path]:
    """Lock a folder of these inputs for this process; it is created where it is absent.

    Raises:
        ZebraError: a folder of something else or of other inputs, or one that another process works in.
    """
    file = folder / "inputs.json"
    if not file.exists() and not is_vacant(folder):
        raise ZebraError(f"{folder} exists and holds no selection: it has no inputs.json. Name another with --out.")
    with directory_lock(folder):
        check_inputs(file, inputs, instead="name another folder with --out")
        if not file.exists():
            atomic_write(file, json.dumps(inputs, indent=2) + "\n")
        yield folder
