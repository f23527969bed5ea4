r"""Local attention with global approximation: the band, and one mean key and value for each finished block before it.

    keys      [ b b ][ b b ][ b b ] . S - 1      \   the band of w keys, by any kernel of the table
    queries    \                                 m   a block's mean key and value, for queries that stand w or more
               \ \                                   behind the block's last token
                m  . \ \
                m  .   \ \                       One softmax over both (after LongT5's transient global attention,
       S - 1    m  m     \ \                     arXiv 2112.07916, section 3.1.2).

Blocks of b tokens are counted from the first real token of each text, so padding and packing change nothing. The mean
is over keys as cached, after the rotation; with ALiBi its position is the mean position of its block. The cost is
N (w + N / b) pairs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zebra.kernels import Mask, attend, native
from zebra.kernels.merging import merge
from zebra.kernels.reference import masked_softmax
from zebra.study import layout


class _Blocks(NamedTuple):
    """The M blocks of all texts of a batch entry, one after another; M is the largest number over the batch."""

    of_key: Tensor  # (1 or B, S), the block of each key; M for padding
    size: Tensor  # (1 or B, M), the tokens that each block has so far
    last: Tensor  # (1 or B, M), the index of the last key of each block
    document: Tensor  # (1 or B, M), the index of the first token of the block's text


def summary_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    *,
    block: int,
    scale: float | None = None,
    slopes: Tensor | None = None,
    with_lse: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of the last T of S tokens over the keys of their window and the means of the blocks before it.

        s_im = scale * <q_i, mean of k over block m>,   visible where i - last(m) >= w and m has b tokens

    Args:
        q: (B, H, T, D).
        k, v: (B, K, S, D), from the beginning of the text on.
        mask: a mask with a window.
        block: b, the tokens of a block, at least 1.
        scale, slopes, with_lse: as in `zebra.kernels.attend`; slopes: (H).

    Returns:
        out: (B, H, T, D).
        lse: (B, H, T), None without `with_lse`.

    Raises:
        ValueError: no window, or a block below 1.
        NotImplementedError: any other argument of `attend`.
    """
    if mask.window is None or block < 1:
        raise ValueError(
            f"summary attention requires a window and a block of at least 1; got {mask.window} and {block}."
        )
    if unknown := [name for name, value in kwargs.items() if value is not None]:
        raise NotImplementedError(f"summary attention does not support {', '.join(sorted(unknown))}.")
    if k.shape[2] < mask.window + block:  # no block has ended before any query's band
        return attend(q, k, v, mask, scale=scale, slopes=slopes, with_lse=with_lse)
    near, near_lse = attend(q, k, v, mask, scale=scale, slopes=slopes)
    assert near_lse is not None
    with torch.autocast(q.device.type, enabled=False):
        far, far_lse = _attend_means(q, k, v, mask, block, q.shape[-1] ** -0.5 if scale is None else scale, slopes)
    return merge(near, near_lse, far, far_lse, with_lse=with_lse)


class SummaryAttention:
    """The attention override of a summary layer with blocks of `block` tokens; tests set `compute` to the formula."""

    beyond_layer_types = True
    """Its layers have a window, but `layer_types` of transformers has no name for them."""

    def __init__(self, block: int, compute: Callable[..., tuple[Tensor, Tensor | None]] = summary_attention):
        self.block, self.compute = block, compute

    def attend(
        self, module: nn.Module, positions: Tensor | None, query: Tensor, key: Tensor, value: Tensor, mask: Mask, /,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Apply `summary_attention` to the layer's query (B, H, T, D), key and value (B, K, S, D)."""
        return self.compute(query, key, value, mask, block=self.block, **kwargs)


def _blocks(mask: Mask, keys: int, block: int, device: torch.device) -> _Blocks:
    index = torch.arange(keys, device=device)
    first = mask.first_tokens(keys, device)
    real = torch.ones_like(first, dtype=torch.bool) if mask.keys is None else mask.keys.bool()
    first = first.expand_as(real)
    # A block begins with each text and every b tokens from there; padding belongs to no block.
    of_key = (((index - first) % block == 0) & real).cumsum(dim=1) - 1
    count = int(of_key.max()) + 1
    of_key = torch.where(real, of_key, count)
    size, last, document = (of_key.new_zeros(len(of_key), count + 1) for _ in range(3))
    size.scatter_add_(1, of_key, torch.ones_like(of_key))
    last.scatter_reduce_(1, of_key, index.expand_as(of_key), "amax", include_self=False)
    document.scatter_(1, of_key, first)
    return _Blocks(of_key, size[:, :count], last[:, :count], document[:, :count])


def _means(states: Tensor, blocks: _Blocks) -> Tensor:
    """The mean of each block of keys or values (B, K, S, D): (B, K, M, D) in at least float32."""
    dtype, count = torch.promote_types(states.dtype, torch.float32), blocks.size.shape[1]
    sums = states.new_zeros(*states.shape[:2], count + 1, states.shape[3], dtype=dtype)
    index = blocks.of_key[:, None, :, None].expand_as(states)
    sums = sums.scatter_add(2, index, states.to(dtype))[:, :, :count]
    return sums / blocks.size.clamp(min=1)[:, None, :, None]


def _attend_means(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, block: int, scale: float, slopes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention over the means alone; out is 0 and lse is -inf where a query sees none.

    A query sees a contiguous range of blocks, so the C++ kernel can compute it; otherwise scores are over all blocks.
    """
    assert mask.window is not None
    queries, keys, dtype = q.shape[2], k.shape[2], torch.promote_types(q.dtype, torch.float32)
    blocks = _blocks(mask, keys, block, q.device)
    mean_k, mean_v = _means(k, blocks), _means(v, blocks)
    first = mask.first_tokens(keys, q.device)
    if slopes is None and not mask.has_padding_holes():
        ranges = _block_ranges(blocks, first, queries, mask.window)
        fast = native.attend_ranges(q.to(mean_k.dtype), mean_k, mean_v, *ranges, scale=scale)
        if fast is not None:
            return fast[0].to(q.dtype), fast[1]
    outs, lses = [], []
    for start in range(0, queries, layout.QUERIES):
        end = min(queries, start + layout.QUERIES)
        i = torch.arange(keys - queries + start, keys - queries + end, device=q.device)
        visible = (i[:, None] - blocks.last[:, None] >= mask.window) & (blocks.size[:, None] == block)
        if mask.documents is not None:
            visible = visible & (first[:, i, None] == blocks.document[:, None])
        reach = int(visible.any(dim=1).int().mul(torch.arange(1, visible.shape[2] + 1, device=q.device)).max())
        visible = visible[:, None, None, :, :reach]
        grouped = q[:, :, start:end].to(dtype).unflatten(1, (k.shape[1], -1))
        scores = grouped @ mean_k[:, :, None, :reach].mT * scale
        if slopes is not None:
            position = blocks.last[:, None, :reach] - (block - 1) / 2
            by_head = slopes.to(dtype).view(k.shape[1], -1, 1, 1)
            scores = scores - by_head * (i[:, None] - position)[:, None, None].to(dtype)
        weights, lse = masked_softmax(scores, visible)
        outs.append((weights @ mean_v[:, :, None, :reach]).flatten(1, 2))
        lses.append(lse.flatten(1, 2))
    return torch.cat(outs, dim=2).to(q.dtype), torch.cat(lses, dim=2)


def _block_ranges(blocks: _Blocks, first: Tensor, queries: int, window: int) -> tuple[Tensor, Tensor]:
    """The range of blocks [begin, end) that each query sees, each (1 or B, T). No range has a text's incomplete block.

    first: the first token of each key's text.
    """
    keys, count = blocks.of_key.shape[1], blocks.size.shape[1]
    i = torch.arange(keys - queries, keys, device=first.device)
    last = blocks.last.masked_fill(blocks.size == 0, keys)
    end = torch.searchsorted(last, (i - window).expand(len(last), -1).contiguous(), right=True)
    begin = blocks.of_key.gather(1, first.expand_as(blocks.of_key).clamp(max=keys - 1))[:, keys - queries :]
    padding = blocks.of_key[:, keys - queries :] == count
    return torch.where(padding, end, begin).cummax(dim=1).values, end  # where `end` is below begin, no block is seen


def naive_summary_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    *,
    block: int,
    scale: float,
    slopes: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The formula itself, one query at a time, in the dtype of the inputs: the oracle of `summary_attention`.

    The arguments are those of `summary_attention`; any other is ignored.

    Returns:
        out: (B, H, T, D), 0 for a query that is padding; None in place of the log-sum-exp.
    """
    assert mask.window is not None
    group, keys = q.shape[1] // k.shape[1], k.shape[2]
    out = []
    for b, h, t in itertools.product(*map(range, q.shape[:3])):
        i = keys - q.shape[2] + t
        if mask.keys is not None and not mask.keys[b, i]:
            out.append(q.new_zeros(q.shape[3]))
            continue
        text = [
            j
            for j in range(keys)
            if (mask.keys is None or mask.keys[b, j])
            and (mask.documents is None or mask.documents[b, j] == mask.documents[b, i])
        ]
        parts = [[j] for j in text if 0 <= i - j < mask.window]
        blocks = (text[n : n + block] for n in range(0, len(text) - block + 1, block))
        parts += [one for one in blocks if i - one[-1] >= mask.window]
        mean_k, mean_v = (torch.stack([x[b, h // group, part].mean(dim=0) for part in parts]) for x in (k, v))
        scores = mean_k @ q[b, h, t] * scale
        if slopes is not None:
            scores = scores - slopes[h] * torch.tensor([i - sum(part) / len(part) for part in parts]).to(q)
        out.append(scores.softmax(dim=0) @ mean_v)
    return torch.stack(out).view(q.shape), None
