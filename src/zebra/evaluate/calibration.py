"""What layers are chosen by: rows of tokens, and those of their tokens that need more than a window.

    a text    the source reads each row whole, and again in pieces that show each token only the window before it,
              w/2 to w tokens; scored is the quarter of the tokens beyond the window whose loss this raises most
    a task    a question whose evidence stands at least a window back (`zebra.data.needles`); scored is its answer

The first is the contrast of long and short contexts by which LongPPL (arXiv 2410.23771) picks its key tokens, with a
share in place of its thresholds. One row in four is held out: it takes no part in the choice, and shows what the choice
is worth.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from zebra.data.corpus import Corpus
from zebra.data.needles import SampleGenerator
from zebra.errors import ZebraError
from zebra.model.loss import head_of, token_losses

SHARE = 0.25
"""Of a row's tokens beyond the window, those that are scored."""
LEAST = 4
"""Rows, so that one can be held out."""
_BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Part:
    """Rows that are run together: `ids` (B, T), and `at` (B, T), the tokens whose loss is measured."""

    ids: NDArray[np.int64]
    at: NDArray[np.bool_]
    held_out: bool

    def tensors(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """`ids` and `at` there."""
        return torch.from_numpy(self.ids).to(device), torch.from_numpy(self.at).to(device)


Row = tuple[NDArray[np.int64], NDArray[np.bool_]]


def text_rows(corpus: Corpus, length: int, samples: int) -> list[Row]:
    """Rows of `length` tokens from documents that have as many, evenly over the text; what is scored is open yet.

    Raises:
        ZebraError: fewer such rows than samples.
    """
    starts = [
        (i, start)
        for i, tokens in enumerate(corpus.lengths.tolist())
        for start in range(0, tokens - length + 1, length)
    ]
    if len(starts) < samples:
        raise ZebraError(
            f"the text has {len(starts):,} rows of {length:,} tokens within its documents, and {samples:,} are asked "
            f"for; its longest document has {int(corpus.lengths.max(initial=0)):,} tokens. Give more text, a shorter "
            f"length, or --samples of at least {LEAST}."
        )
    chosen = [starts[round(k)] for k in np.linspace(0, len(starts) - 1, samples)]
    rows = [corpus[i][start : start + length].astype(np.int64) for i, start in chosen]
    return [(ids, np.zeros(length, dtype=bool)) for ids in rows]


def task_rows(
    needles: SampleGenerator, tasks: Sequence[str], *, length: int, window: int, samples: int, seed: int
) -> list[Row]:
    """Prompts of `length` tokens with their first answer behind them, task by task in turn.

    Depths are spread evenly over those at which the evidence stands a window or more before the answer.
    """
    deepest = max(0.0, 1 - window / length)
    rounds = -(-samples // len(tasks))
    rows = []
    for i in range(samples):
        task, depth = tasks[i % len(tasks)], deepest * (i // len(tasks)) / max(1, rounds - 1)
        (sample,) = needles.samples(task, length=length, depth=depth, seed=seed + i)
        answer = sample.answers[0].ids
        ids = np.array([*sample.ids, *answer], dtype=np.int64)
        rows.append((ids, np.arange(len(ids)) >= length))
    return rows


def parts_of(rows: Sequence[Row], seed: int) -> list[Part]:
    """Rows in batches of one length, one row in four held out, drawn by the seed; the held-out parts stand last."""
    held = set(Random(seed).sample(range(len(rows)), len(rows) // 4))
    order = sorted(range(len(rows)), key=lambda i: (i in held, len(rows[i][0]), i))
    parts: list[Part] = []
    for (held_out, length), alike in itertools.groupby(order, key=lambda i: (i in held, len(rows[i][0]))):
        together = list(alike)
        size = max(1, _BATCH_TOKENS // length)
        for start in range(0, len(together), size):
            batch = [rows[i] for i in together[start : start + size]]
            parts.append(Part(np.stack([ids for ids, _ in batch]), np.stack([at for _, at in batch]), held_out))
    return parts


@torch.no_grad()
def long_range(model: PreTrainedModel, ids: Tensor, window: int) -> Tensor:
    """Where a row's long-range tokens are, (B, T) bool: the `SHARE` of its tokens from `window` on that gain most.

    gain_t = loss of token t with w/2 to w tokens before it  -  its loss with the whole row before it
    """
    head = head_of(model)
    decoder: Any = model.get_decoder()

    def losses(rows: Tensor) -> Tensor:
        return token_losses(decoder(input_ids=rows, use_cache=False).last_hidden_state, head, rows)

    rows, length = ids.shape
    near = torch.zeros(ids.shape, device=ids.device)
    context = min(length, max(2, window))
    step = context // 2
    starts = [*range(0, length - context, step), length - context]
    pieces = torch.cat([ids[:, start : start + context] for start in starts])
    for start, found in zip(starts, losses(pieces).split(rows), strict=True):
        near[:, start + context - step : start + context] = found[:, -step:]
    gain = (near - losses(ids))[:, window:]
    most = gain.topk(max(1, int(SHARE * gain.shape[1])), dim=1).indices + window
    return torch.zeros_like(ids, dtype=torch.bool).scatter(1, most, True)
