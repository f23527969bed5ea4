r"""Local attention with global approximation: the band, and one mean key and value for each finished block before it.

    keys      [ b b ][ b b ][ b b ] . S - 1      \   the band of w keys, by any kernel of the table
    queries    \                                 m   a block's mean key and value, from the query on that stands w
               \ \                                   behind the block's last token
                m  . \ \
                m  .   \ \                       One softmax over both (after LongT5's transient global attention,
       S - 1    m  m     \ \                     arXiv 2112.07916, section 3.1.2).

Blocks of b tokens count from the first real token of each text, so padding and packing change nothing. Keys are
averaged as they stand in the cache, rotated; under ALiBi a mean stands at the mean position of its block. The cost is
N (w + N / b) pairs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from zebra.kernels import attend
from zebra.kernels.merging import merge
from zebra.kernels.request import Mask
from zebra.study import layout


class _Blocks(NamedTuple):
    """The blocks of all texts of a row, M in the row with the most, one after another.

    Attributes:
        of: (1 or B, S), the block of each key; M for padding.
        size: (1 or B, M), tokens of each so far.
        last: (1 or B, M), the index of the last key of each.
        document: (1 or B, M), the index of the first token of its text.
    """

    of: Tensor
    size: Tensor
    last: Tensor
    document: Tensor


def summarised(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    *,
    block: int,
    scale: float | None = None,
    slopes: Tensor | None = None,
    with_lse: bool = False,
    **arguments: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of the last T of S tokens over the keys of their window and the means of blocks before it.

        s_im = scale * <q_i, mean of k over block m>,   visible where i - last(m) >= w and m has b tokens

    Args:
        q: (B, H, T, D). k, v: (B, K, S, D), from the beginning of the text on.
        mask: it has a window.
        block: b, tokens of a block, at least 1.
        arguments: as `attend` has them.

    Returns:
        What `attend` returns.

    Raises:
        ValueError: no window, or a block below 1.
        NotImplementedError: an argument that it does not know.
    """
    if mask.window is None or block < 1:
        raise ValueError(f"a summary stands before a window, of blocks of at least 1; got {mask.window} and {block}.")
    if unknown := [name for name, value in arguments.items() if value is not None]:
        raise NotImplementedError(f"attention over summaries knows no {', '.join(sorted(unknown))}.")
    named = {"scale": scale, "slopes": slopes, **arguments}
    if k.shape[2] < mask.window + block:  # no block has ended before any query's band
        return attend(q, k, v, mask, with_lse=with_lse, **named)
    near, near_lse = attend(q, k, v, mask, **named)
    assert near_lse is not None
    with torch.autocast(q.device.type, enabled=False):
        far, far_lse = _far(q, k, v, mask, block, q.shape[-1] ** -0.5 if scale is None else scale, slopes)
    return merge(near, near_lse, far, far_lse, with_lse=with_lse)


def blocks_of(mask: Mask, keys: int, block: int, device: torch.device) -> _Blocks:
    """The blocks of each row's keys."""
    index = torch.arange(keys, device=device)
    first = mask.first_tokens(keys, device)
    real = torch.ones_like(first, dtype=torch.bool) if mask.keys is None else mask.keys.bool()
    first = first.expand_as(real)
    place = index - first
    # A block begins where a text does and every b tokens; padding belongs to none.
    of = ((place % block == 0) & real).cumsum(dim=1) - 1
    count = int(of.max()) + 1
    of = torch.where(real, of, count)
    rows, last, document = (of.new_zeros(len(of), count + 1) for _ in range(3))
    rows.scatter_add_(1, of, torch.ones_like(of))
    last.scatter_reduce_(1, of, index.expand_as(of), "amax", include_self=False)
    document.scatter_(1, of, first)
    return _Blocks(of, rows[:, :count], last[:, :count], document[:, :count])


def means(states: Tensor, blocks: _Blocks) -> Tensor:
    """The mean of each block of keys or values (B, K, S, D): (B, K, M, D) in float32 or wider."""
    wide, count = torch.promote_types(states.dtype, torch.float32), blocks.size.shape[1]
    sums = states.new_zeros(*states.shape[:2], count + 1, states.shape[3], dtype=wide)
    of = blocks.of[:, None, :, None].expand_as(states)
    sums = sums.scatter_add(2, of, states.to(wide))[:, :, :count]
    return sums / blocks.size.clamp(min=1)[:, None, :, None]


def _far(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, block: int, scale: float, slopes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention over the means alone; out 0 and lse -inf where a query sees none."""
    assert mask.window is not None
    queries, keys, wide = q.shape[2], k.shape[2], torch.promote_types(q.dtype, torch.float32)
    blocks = blocks_of(mask, keys, block, q.device)
    mean_k, mean_v = means(k, blocks), means(v, blocks)
    first = mask.first_tokens(keys, q.device)
    outs, lses = [], []
    for start in range(0, queries, layout.QUERIES):
        i = torch.arange(keys - queries + start, keys - queries + min(queries, start + layout.QUERIES), device=q.device)
        seen = (i[:, None] - blocks.last[:, None] >= mask.window) & (blocks.size[:, None] == block)
        if mask.documents is not None:
            seen = seen & (first[:, i, None] == blocks.document[:, None])
        reach = int(seen.any(dim=1).int().mul(torch.arange(1, seen.shape[2] + 1, device=q.device)).max())
        seen = seen[:, None, None, :, :reach]
        rows = q[:, :, start : start + layout.QUERIES].to(wide).unflatten(1, (k.shape[1], -1))
        scores = rows @ mean_k[:, :, None, :reach].mT * scale
        if slopes is not None:
            place = blocks.last[:, None, :reach] - (block - 1) / 2
            by_head = slopes.to(wide).view(k.shape[1], -1, 1, 1)
            scores = scores - by_head * (i[:, None] - place)[:, None, None].to(wide)
        scores = scores.masked_fill(~seen, float("-inf"))
        lse = torch.logsumexp(scores, dim=-1) if reach else scores.new_full(scores.shape[:-1], float("-inf"))
        weights = torch.exp(scores - lse.unsqueeze(-1).where(seen.any(dim=-1, keepdim=True), 0.0))
        outs.append((weights @ mean_v[:, :, None, :reach]).flatten(1, 2))
        lses.append(lse.flatten(1, 2))
    return torch.cat(outs, dim=2).to(q.dtype), torch.cat(lses, dim=2)


def formula(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, block: int, scale: float, slopes: Tensor | None = None
) -> Tensor:
    """The same as it reads, one query at a time, in the dtype of the inputs: the oracle of `summarised`.

    Returns:
        (B, H, T, D); 0 for a query that is padding.
    """
    assert mask.window is not None
    group, keys = q.shape[1] // k.shape[1], k.shape[2]
    out = []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for t in range(q.shape[2]):
                i = keys - q.shape[2] + t
                text = [
                    j
                    for j in range(keys)
                    if (mask.keys is None or mask.keys[b, j])
                    and (mask.documents is None or mask.documents[b, j] == mask.documents[b, i])
                ]
                parts = [[j] for j in text if 0 <= i - j < mask.window]
                for n in range(0, len(text) - block + 1, block):
                    if i - text[n + block - 1] >= mask.window:
                        parts.append(text[n : n + block])
                if not parts or (mask.keys is not None and not mask.keys[b, i]):
                    out.append(q.new_zeros(q.shape[3]))
                    continue
                mean_k, mean_v = (torch.stack([x[b, h // group, part].mean(dim=0) for part in parts]) for x in (k, v))
                scores = mean_k @ q[b, h, t] * scale
                if slopes is not None:
                    scores = scores - slopes[h] * torch.tensor([i - sum(part) / len(part) for part in parts]).to(q)
                out.append(scores.softmax(dim=0) @ mean_v)
    return torch.stack(out).view(q.shape)
