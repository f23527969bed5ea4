"""Calibration data for selecting layers: sequences, and those of their tokens that need more than a window.

    a text    the source model reads each sequence whole, and again in pieces, where a token sees only the w/2 to w
              tokens before it; of the tokens beyond the window, the quarter whose loss rises most is scored
    a task    a question whose evidence is about a window back or more (`zebra.data.needles`); its answer is scored

The first contrasts long and short contexts, as LongPPL (arXiv 2410.23771) does to find its key tokens, with a share in
place of its thresholds. One sequence in four is held out: it takes no part in the selection, and tests it.
"""

from __future__ import annotations

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
from zebra.data.encoding import windows_of
from zebra.data.needles import SampleGenerator
from zebra.errors import ZebraError
from zebra.evaluate.batches import batches
from zebra.model.finite import check_finite
from zebra.model.loss import head_of, token_losses

SHARE = 0.25
"""The share of the tokens beyond the window that is scored."""
MIN_SAMPLES = 4
"""The fewest sequences of which one can be held out."""
_BATCH_TOKENS = 8192


@dataclass(frozen=True)
class CalibrationBatch:
    """Sequences that run together: `ids` (B, T), and `scored` (B, T), where the loss of a token is measured."""

    ids: NDArray[np.int64]
    scored: NDArray[np.bool_]
    held_out: bool

    def tensors(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """`ids` and `scored`, both (B, T), on a device."""
        return torch.from_numpy(self.ids).to(device), torch.from_numpy(self.scored).to(device)


ScoredSequence = tuple[NDArray[np.int64], NDArray[np.bool_]]
"""The tokens of a sequence (T,), and which of them are scored (T,)."""


def text_sequences(corpus: Corpus, length: int, samples: int, prefix: tuple[int, ...] = ()) -> list[ScoredSequence]:
    """Sequences of `length` tokens, each from one document, spread evenly over the text; no token is scored yet.

    Args:
        prefix: tokens that begin each sequence, see `zebra.data.encoding.window_prefix`.

    Raises:
        ZebraError: the text has fewer such sequences than `samples`.
    """
    starts = [
        (tokens, window) for tokens in corpus for window in windows_of(tokens, length, prefix) if len(window) == length
    ]
    if len(starts) < samples:
        raise ZebraError(
            f"the text must have {samples:,} sequences of {length:,} tokens in its documents; got {len(starts):,}, and "
            f"its longest document has {int(corpus.lengths.max(initial=0)):,} tokens. Give more text, a shorter "
            f"length, or --samples of at least {MIN_SAMPLES}."
        )
    chosen = [starts[round(k)] for k in np.linspace(0, len(starts) - 1, samples)]
    sequences = [window.tokens(tokens).astype(np.int64) for tokens, window in chosen]
    return [(ids, np.zeros(length, dtype=bool)) for ids in sequences]


def task_sequences(
    needles: SampleGenerator, tasks: Sequence[str], *, length: int, window: int, samples: int, seed: int
) -> list[ScoredSequence]:
    """Prompts of `length` tokens, each followed by its first answer, from the tasks in turn.

    Depths are spread evenly over those at which the evidence is about a window or more before the answer.
    """
    deepest = max(0.0, 1 - window / length)
    rounds = -(-samples // len(tasks))
    sequences = []
    for i in range(samples):
        task, depth = tasks[i % len(tasks)], deepest * (i // len(tasks)) / max(1, rounds - 1)
        (sample,) = needles.samples(task, length=length, depth=depth, seed=seed + i)
        answer = sample.answers[0].ids
        ids = np.array([*sample.ids, *answer], dtype=np.int64)
        sequences.append((ids, np.arange(len(ids)) >= length))
    return sequences


def batches_of(sequences: Sequence[ScoredSequence], seed: int) -> list[CalibrationBatch]:
    """Group sequences of equal length into batches. One in four, drawn with the seed, is held out; these come last."""
    held_out = set(Random(seed).sample(range(len(sequences)), len(sequences) // 4))

    def group(i: int) -> tuple[bool, int]:
        return i in held_out, len(sequences[i][0])

    def fits(batch: list[int], i: int) -> bool:
        return group(batch[0]) == group(i) and (len(batch) + 1) * len(sequences[i][0]) <= _BATCH_TOKENS

    results: list[CalibrationBatch] = []
    for batch in batches(sorted(range(len(sequences)), key=group), fits):
        ids, scored = zip(*(sequences[i] for i in batch), strict=True)
        results.append(CalibrationBatch(np.stack(ids), np.stack(scored), batch[0] in held_out))
    return results


@torch.no_grad()
def long_range(model: PreTrainedModel, ids: Tensor, window: int, prefix: Sequence[int] = ()) -> Tensor:
    """The long-range tokens of sequences: of the tokens from `window` on, the `SHARE` with the largest gain.

    gain_t = loss of token t with w/2 to w tokens before it  -  its loss with the whole sequence before it

    Args:
        ids: (B, T).
        prefix: tokens that begin each sequence, and each piece: without its BOS token a model may fail everywhere.

    Returns:
        (B, T) bool.
    """
    head = head_of(model)
    decoder: Any = model.get_decoder()

    def losses(ids: Tensor) -> Tensor:
        of_tokens = token_losses(decoder(input_ids=ids, use_cache=False).last_hidden_state, head, ids)
        check_finite(of_tokens[:, 1:], model)
        return of_tokens

    batch, length = ids.shape
    near = torch.zeros(ids.shape, device=ids.device)
    context = min(length, max(2, window))
    step = context // 2
    starts = [*range(0, length - context, step), length - context]
    pieces = torch.cat([ids[:, start : start + context] for start in starts])
    first = prefix[: context - step]
    pieces[:, : len(first)] = pieces.new_tensor(first)
    for start, piece_losses in zip(starts, losses(pieces).split(batch), strict=True):
        near[:, start + context - step : start + context] = piece_losses[:, -step:]
    gain = (near - losses(ids))[:, window:]
    most = gain.topk(max(1, int(SHARE * gain.shape[1])), dim=1).indices + window
    return torch.zeros_like(ids, dtype=torch.bool).scatter(1, most, True)
