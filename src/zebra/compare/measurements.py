"""The measurements of each method, stored in a file as they are made.

    cost             the time to read one window into the cache and to decode a few tokens, and the bytes of the cache
    window i         the losses of the i-th window of the text, summed by position bucket
    TASK DEPTH i     the score of the i-th retrieval sample

    measurements.jsonl    {"method": "rope=yarn:2", "unit": ["window", 3, null], "sums": [...], "seconds": 14.2, ...}

All methods measure the same units in the same order, so that differences between them are paired.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zebra.data.needles import Sample
from zebra.data.questions import IN_HAYSTACK
from zebra.evaluate.perplexity import evaluating, sequence_losses
from zebra.evaluate.retrieval import retrieval
from zebra.files import append_to_log, read_log
from zebra.model.cache import StripedCache
from zebra.model.self_extend import bounded_cache

DECODED = 8
"""Decoded tokens, of whose times the median counts: the first one copies the cache to get room for more."""
PREFILL_CHUNK = 8192
"""Tokens of a text that are read into the cache at once."""
_WINDOWS_PER_ROUND = 2

Measurement = dict[str, Any]


class Unit(NamedTuple):
    """One measurement of a method: `kind` is "cost", "window" or a retrieval task."""

    kind: str
    number: int = 0
    depth: float | None = None

    def __str__(self) -> str:
        return " ".join(str(part) for part in (self.kind, self.depth, self.number) if part is not None)


COST = Unit("cost")


def hides_in_text(task: str) -> bool:
    """Whether the needles of a task are hidden in the user's text; the pass key is hidden in a few repeated sentences.

    The user's text shows how the model does on this text. The repeated sentences show whether the method reaches this
    length at all, even with a small model that fails in any real text.
    """
    return task in IN_HAYSTACK and task != "passkey"


def schedule(tasks: Sequence[str], depths: Sequence[float], windows: int, samples: int) -> Iterator[Unit]:
    """Yield the units in the order of measurement, in rounds, so that any first part of it is balanced.

    A round has two windows, and a sample of each task at each depth; the middle depth comes first.
    """
    middle_first = sorted(depths, key=lambda depth: (abs(depth - 0.5), depth))
    window, sample = 0, 0
    while window < windows or sample < samples:
        for _ in range(min(_WINDOWS_PER_ROUND, windows - window)):
            yield Unit("window", window)
            window += 1
        if sample < samples:
            yield from (Unit(task, sample, depth) for depth in middle_first for task in tasks)
            sample += 1


def measure_cost(model: PreTrainedModel, window: NDArray[np.integer[Any]]) -> Measurement:
    """Measure the seconds to read a text into the cache, those of a decoded token, and the bytes of the cache.

    Args:
        window: (T,) the text.
    """
    ids = torch.from_numpy(window.astype(np.int64))[None].to(model.device)
    cache = bounded_cache(model)
    cache.set_prompt_length(ids.shape[1])
    with evaluating(model):
        model(ids[:, :PREFILL_CHUNK], use_cache=False, logits_to_keep=1)  # warm-up, compiles kernels
        start = time.perf_counter()
        for chunk in ids.split(PREFILL_CHUNK, dim=1):
            logits = model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        token = logits.argmax(-1)
        token.item()  # waits for the device
        ends = [time.perf_counter()]
        kv_bytes = cache.kv_bytes() if isinstance(cache, StripedCache) else None
        for _ in range(DECODED):
            token = model(token, past_key_values=cache, use_cache=True).logits.argmax(-1)
            token.item()
            ends.append(time.perf_counter())
    decoding = statistics.median(end - begin for begin, end in itertools.pairwise(ends))
    return {"prefill_seconds": ends[0] - start, "decode_seconds": decoding, "kv_bytes": kv_bytes}


def measure_window(model: PreTrainedModel, window: NDArray[np.integer[Any]], bounds: Sequence[int]) -> Measurement:
    """Measure the sum of a window's token losses and the number of scored tokens, for each bucket of positions.

    Args:
        window: (T,) the text; its first token is not scored.
        bounds: of the buckets, from 0 to T.
    """
    start = time.perf_counter()
    ids = torch.from_numpy(window.astype(np.int64))[None].to(model.device)
    with evaluating(model):
        (losses,) = sequence_losses(model, ids)
    buckets = [losses[max(first, 1) : end] for first, end in itertools.pairwise(bounds)]
    seconds = time.perf_counter() - start
    return {"sums": [float(b.sum()) for b in buckets], "counts": [len(b) for b in buckets], "seconds": seconds}


def measure_sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sample: Sample) -> Measurement:
    """Measure the share of a sample's answers that the greedy continuation contains."""
    start = time.perf_counter()
    (score,) = retrieval(model, tokenizer, [sample], batch_tokens=PREFILL_CHUNK)
    return {"score": score, "seconds": time.perf_counter() - start}


class Measurements:
    """Measurements by method and unit; a process that is killed loses only the one in progress.

    Raises:
        ZebraError: a line of the file is not a measurement.
    """

    def __init__(self, file: Path):
        self._file = file
        self._measured: dict[str, dict[Unit, Measurement]] = defaultdict(dict)
        read_log(file, self._read, "measurement")

    def of(self, method: str) -> dict[Unit, Measurement]:
        """The measurements of a method by unit."""
        return self._measured[method]

    def add(self, method: str, unit: Unit, measurement: Measurement) -> None:
        """Store a measurement in memory and in the file."""
        self._measured[method][unit] = measurement
        append_to_log(self._file, {"method": method, "unit": unit} | measurement)

    def _read(self, entry: Measurement) -> None:
        self._measured[str(entry.pop("method"))][Unit(*entry.pop("unit"))] = entry
