"""Packed documents: which tokens of a batch belong together, from the arguments that transformers passes to attention.

    position_ids     0 1 2 0 1 | 0 1 2 3 4     a step other than 1 starts a document; padding is skipped
    cu_seq_lens_q    0     3     5         10  where documents start in the flattened batch, and its size
    seq_idx          0 0 0 1 1 | 0 0 0 0 0     the document of each token
    documents        0 0 0 1 1 | 2 2 2 2 2

`cu_seq_lens_q` and `seq_idx` name documents. Positions only suggest them, and may continue from one to the next.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from zebra.errors import ZebraError

PACKING_KWARGS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""The arguments of transformers (`TransformersKwargs`) that name packed documents."""


def documents_of(
    position_ids: Tensor | None,
    keys: Tensor | None,
    queries: tuple[int, int],
    *,
    past: int = 0,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | Tensor | None = None,
    max_length_k: int | Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor | None:
    """The document of each token, (B, T), non-decreasing along T; None where each sequence is one document.

    Args:
        position_ids: (1 or B, T).
        keys: (B, past + T) bool, False at padding (left, right or between), whose positions do not count; or None.
        queries: B and T.
        past: number of cached tokens before the T.
        cu_seq_lens_q, cu_seq_lens_k: (documents + 1), offsets in the flattened batch of B T tokens; both the same.
        max_length_q, max_length_k: tokens of the longest document, or more.
        seq_idx: (1 or B, T) integers that change where a document starts.

    Raises:
        ZebraError: arguments that contradict each other or the batch; documents that start after cached tokens.
    """
    batch, tokens = queries
    offsets = cu_seq_lens_q if cu_seq_lens_q is not None else cu_seq_lens_k
    most = [int(length) for length in (max_length_q, max_length_k) if length is not None]
    if offsets is None and most:
        raise _error("max_length_q or max_length_k without cu_seq_lens_q", queries)
    starts = seq_idx if seq_idx is None else _changes(seq_idx)
    if starts is not None and starts.shape[-1] != tokens - 1:
        raise _error(f"a seq_idx of {starts.shape[-1] + 1} tokens", queries)
    if offsets is not None:
        other = offsets if cu_seq_lens_k is None or past else cu_seq_lens_k
        starts = _starts(offsets, other, most, starts, queries)
    if position_ids is not None and tokens > 1:
        restarts = position_ids.diff(dim=-1) != 1 if keys is None else _restarts(position_ids, keys[:, past:].bool())
        if starts is not None and bool((restarts & ~starts).any()):
            raise _error("position_ids that restart inside a document", queries)
        starts = restarts if starts is None else starts
    if starts is None or not bool(starts.any()):
        return None
    if past:
        raise ZebraError(
            "packed documents require one forward pass without cached tokens; got a document that starts after "
            f"{past} of them. Pass all documents at once, with use_cache=False."
        )
    return pad(starts.cumsum(dim=-1), (1, 0)).expand(batch, -1)


def _changes(documents: Tensor) -> Tensor:
    return documents.diff(dim=-1) != 0


def _restarts(positions: Tensor, real: Tensor) -> Tensor:
    """Whether each token but the first is real and does not continue the real one before it, (B, T - 1) bool.

    Positions count the padding between two tokens (a plain forward) or leave it out (`generate`).

    Args:
        positions: (1 or B, T). real: (B, T) bool.
    """
    index = torch.arange(real.shape[1], device=real.device)
    before = torch.where(real, index, -1).cummax(dim=1).values[:, :-1]
    step = positions[:, 1:] - positions.expand(real.shape).gather(1, before.clamp(min=0))
    return real[:, 1:] & (before >= 0) & (step != 1) & (step != index[1:] - before)


def _starts(
    offsets: Tensor, other: Tensor, most: Sequence[int], of_index: Tensor | None, queries: tuple[int, int]
) -> Tensor:
    """Check the arguments; whether a document starts at each token but a sequence's first, (B, T - 1) bool.

    Args:
        offsets, other: of the queries and of the keys. most: upper bounds of the longest document.
        of_index: the result according to `seq_idx`, or None.
    """
    if offsets.dim() != 1:
        raise _error(f"cu_seq_lens_q of shape {tuple(offsets.shape)}", queries)
    size = math.prod(queries)
    index = torch.arange(size, device=offsets.device)
    document = torch.searchsorted(offsets[1:].contiguous(), index, right=True).view(queries)
    ends = offsets[0] == 0, offsets[-1] == size, (offsets.diff() >= 0).all()
    whole = (document[1:, 0] != document[:-1, -1]).all()  # no document continues in the next sequence
    if not bool(torch.stack([*ends, whole]).all()):
        raise _error(f"cu_seq_lens_q of {offsets.tolist()[:8]}", queries)
    if not torch.equal(offsets, other):
        raise _error("a cu_seq_lens_k that differs from cu_seq_lens_q", queries)
    if most and min(most) < (longest := int(offsets.diff().max())):
        raise _error(f"a document of {longest} tokens and a smaller max_length_q or max_length_k", queries)
    starts = _changes(document)
    if of_index is not None and bool((of_index != starts).any()):
        raise _error("a seq_idx that differs from cu_seq_lens_q", queries)
    return starts


def _error(got: str, queries: tuple[int, int]) -> ZebraError:
    return ZebraError(
        f"the arguments of packed documents must agree and describe a batch of {queries[0]} x {queries[1]} tokens; "
        f"got {got}. Pass what one collator returns, such as transformers' DataCollatorWithFlattening."
    )
