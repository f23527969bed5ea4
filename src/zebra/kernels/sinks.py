r"""Local attention with sinks: the band, merged with a small dense attention over the first tokens of each text.

    keys      0 . . ........ S - 1
    queries   \                       \  the band of w keys, by any kernel of the table
              \ \                     s  the sinks before it: j < sinks and i - j >= w
              s \ \
              s s \ \                 A sink inside the band belongs to the band, so that no key counts twice.
       S - 1  s s . \ \

A trained model gives much of its attention to the first few tokens, so a window that hides them harms more than its
length explains (StreamingLLM, arXiv 2309.17453). Sinks keep their positions; under Self-Extend the queries move to
others (`zebra.positions.sink_query`), or for a single token the sinks, by the inverse rotation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from zebra.kernels import attend
from zebra.kernels.merging import Attention, join, merge
from zebra.kernels.reference import masked_softmax
from zebra.kernels.request import Mask

_ROWS = 1024
"""Queries at a time: 1.5 MiB of float32 for ten heads of 64."""
NO_POSITION = 1 << 40
"""The position of a missing sink: after all queries."""


class SinkRotation(Protocol):
    """Gives queries other distances to the sinks outside their windows, by moving one or the other."""

    def move_query(self, query: Tensor, tokens_before: Tensor) -> Tensor:
        """Queries (B, H, T, D) from where they are to where they see sinks from.

        tokens_before: (1 or B, T), the number of tokens before each in its text.
        """

    def move_sinks(self, keys: Tensor, tokens_before: Tensor) -> Tensor:
        """The first keys (B, K, sinks, D) of texts to where one query of each, which stays, sees them at that distance.

        tokens_before: (1 or B, 1).
        """


class Sinks(NamedTuple):
    """The sinks of n consecutive blocks of queries."""

    keys: Tensor  # (B, K, n, sinks, D)
    values: Tensor  # (B, K, n, sinks, D)
    positions: Tensor  # (1 or B, n, sinks), indices in the sequence, padding counted; `NO_POSITION` for a missing one
    last: int | None = None  # the index of the last sink of all sequences; None while one may be missing


def sink_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    *,
    cached: Sinks | None = None,
    start: int = 0,
    rotation: SinkRotation | None = None,
    tokens_before: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    with_lse: bool = False,
    **arguments: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention under a mask with a window and sinks, in O(T (w + sinks)); its oracle is `reference`.

    Args:
        q: (B, H, T, D).
        k, v: (B, K, S, D), from the first token of the sequence on, unless `cached` has the sinks.
        cached: the sinks as one block, from a cache whose local layer has dropped their keys.
        start: the index in the sequence of the first key in `k`.
        rotation: gives the sinks outside the window another distance; None keeps their own.
        tokens_before: (1 or B, T), the number of real tokens before each query in its text, where the mask cannot tell.
        arguments: further arguments of `attend`.

    Returns:
        out: (B, H, T, D). lse: (B, H, T), None without `with_lse`.

    Raises:
        NotImplementedError: sinks under ALiBi.
    """
    band, kwargs = replace(mask, sinks=0), {"scale": scale, "softcap": softcap, **arguments}
    end = start + k.shape[2]
    if mask.window is None or not mask.sinks or end <= mask.window:
        return attend(q, k, v, band, with_lse=with_lse, **kwargs)
    if arguments.get("slopes") is not None:
        raise NotImplementedError("sinks are not supported with ALiBi, which lowers distant scores. Leave them out.")
    is_plain_token = q.shape[2] == 1 and mask.keys is None and mask.documents is None
    if is_plain_token and cached is not None and cached.last is not None and cached.last < end - mask.window:
        recent = k[:, :, -mask.window :], v[:, :, -mask.window :]
        return _decoded(q, *recent, cached, rotation, end - 1, with_lse=with_lse, **kwargs)
    out, lse = attend(q, k, v, band, **kwargs)
    assert lse is not None
    queries = q.shape[2]
    position = torch.arange(end - queries, end, device=q.device)
    if cached is None:
        sinks, visible = _gather_sinks(k, v, mask, position)
    else:
        sinks, visible = cached, position[:, None] - cached.positions[:, :, None] >= mask.window
    if tokens_before is None:
        first = mask.first_tokens(end, q.device)[:, -queries:] if cached is None else cached.positions[:, 0, :1]
        tokens_before = position - first
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    parts: list[Attention] = []
    with torch.autocast(q.device.type, enabled=False):
        for part, its_sinks, seen in _parts(queries, sinks, visible):
            of_band = out[:, :, part], lse[:, :, part]
            if end - queries + part.stop <= mask.window:
                parts.append(of_band)
                continue
            rows = q[:, :, part]
            if rotation is not None:
                rows = rotation.move_query(rows, tokens_before[:, part])
            parts.append(merge(*of_band, *_over(rows, its_sinks, seen, scale, softcap)))
    out, lse = join(*parts)
    return out, lse if with_lse else None


def _decoded(
    q: Tensor, k: Tensor, v: Tensor, sinks: Sinks, rotation: SinkRotation | None, index: int, **kwargs: Any
) -> Attention:
    """Attention of one token of each sequence over sinks and window at once: in few calls, as each one costs time."""
    keys, values = sinks.keys.squeeze(2), sinks.values.squeeze(2)
    if rotation is not None:
        keys = rotation.move_sinks(keys, index - sinks.positions[:, 0, :1])
    return attend(q, torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2), Mask(), **kwargs)


def _parts(queries: int, sinks: Sinks, visible: Tensor) -> Iterator[tuple[slice, Sinks, Tensor]]:
    """Parts of the queries, small enough for the caches of a processor, with their sinks and which of them they see."""
    blocks, size = visible.shape[1:3]
    if blocks == 1:
        for start in range(0, queries, _ROWS):
            part = slice(start, min(start + _ROWS, queries))
            yield part, sinks, visible[:, :, part]
        return
    step = max(1, _ROWS // size)
    for i in range(0, blocks, step):
        of_blocks = sinks.keys[:, :, i : i + step], sinks.values[:, :, i : i + step]
        its_sinks = Sinks(*of_blocks, sinks.positions[:, i : i + step])
        yield slice(i * size, min((i + step) * size, queries)), its_sinks, visible[:, i : i + step]


def _gather_sinks(k: Tensor, v: Tensor, mask: Mask, position: Tensor) -> tuple[Sinks, Tensor]:
    """The sinks of whole sequences, and which each query sees: (1 or B, n, queries of a block, sinks) bool.

    Without documents, all queries are one block. With documents a block has w queries. Among them only one document can
    have queries that are w or more behind its first token, so one document's sinks serve the block.

    position: (T,), the index of each query. k, v: (B, K, S, D).
    """
    window, count, queries = mask.window or 0, k.shape[2], len(position)
    first = mask.first_tokens(count, k.device)[:, count - queries :]
    if mask.documents is None:
        block, anchor = queries, first[:, -1:]
    else:
        block = min(window, queries)
        short = -queries % block
        anchor = pad(torch.where(position - first >= window, first, -1), (0, short), value=-1)
        anchor = anchor.unflatten(1, (-1, block)).amax(dim=2)
        first, position = pad(first, (0, short), value=-2), pad(position, (0, short))
    positions = anchor[:, :, None] + torch.arange(mask.sinks, device=k.device)
    inside = positions.clamp(0, count - 1).flatten(1)
    exists = (anchor >= 0)[:, :, None] & (positions < count)
    if mask.keys is not None:
        exists = exists & mask.keys.bool().gather(1, inside).view_as(exists)
    positions = positions.masked_fill(~exists, NO_POSITION)
    keys, values = (
        x.gather(2, inside[:, None, :, None].expand(len(x), x.shape[1], -1, x.shape[3])).unflatten(
            2, positions.shape[1:]
        )
        for x in (k, v)
    )
    visible = position.view(-1, block)[:, :, None] - positions[:, :, None] >= window
    if mask.documents is not None:
        visible = visible & (first.unflatten(1, (-1, block)) == anchor[:, :, None])[..., None]
    return Sinks(keys, values, positions), visible


def _over(q: Tensor, sinks: Sinks, visible: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Attention of each block of queries over its sinks: out (B, H, T, D), lse (B, H, T); 0 and -inf without any.

    visible: (1 or B, n, queries of a block, sinks) bool.
    """
    queries, wide = q.shape[2], torch.promote_types(q.dtype, torch.float32)
    heads, blocks = sinks.keys.shape[1:3]
    block = visible.shape[2]
    grouped = pad(q, (0, 0, 0, blocks * block - queries)).unflatten(2, (blocks, block)).unflatten(1, (heads, -1))
    rows = grouped.transpose(2, 3).to(wide)  # (B, K, n, g, t, D): a group's heads are rows over the same keys
    shape = rows.shape[3:5]
    scores = (rows.flatten(3, 4) @ sinks.keys.to(wide).mT * scale).unflatten(3, shape)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights, lse = masked_softmax(scores, visible[:, None, :, None])
    out = (weights.flatten(3, 4) @ sinks.values.to(wide)).unflatten(3, shape)
    out, lse = (x.transpose(2, 3).flatten(1, 2).flatten(2, 3)[:, :, :queries] for x in (out, lse))
    return out.to(q.dtype), lse
