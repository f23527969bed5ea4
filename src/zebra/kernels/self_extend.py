r"""Self-Extend's attention as two attentions, merged by their log-sum-exps (arXiv 2401.01325).

    keys      0 .......... S - W ...... S       far    queries from W on, over the keys before S - W, plain causal,
    queries   near                                     with vectors rotated to grouped positions
       W - 1  \ \                               near   the causal band of W keys, at exact positions
              f \ \
              f f \ \                           Together they cover the causal triangle once: the cost of one attention.
       S - 1  f f f \ \
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from zebra.kernels import attend
from zebra.kernels.merging import join, merge
from zebra.kernels.request import Mask


def self_extend_attention(
    q: Tensor,
    k: Tensor,
    far_q: Tensor,
    far_k: Tensor,
    v: Tensor,
    mask: Mask,
    *,
    window: int,
    with_lse: bool = False,
    **arguments: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention with one softmax over near keys, scored by `q` and `k`, and far keys, scored by `far_q` and `far_k`.

    Args:
        q, far_q: (B, H, T, D), of the last T of the S tokens.
        k: (B, K, at least min(S, W - 1 + T), D), the keys of the last tokens.
        far_k, v: (B, K, S, D).
        mask: padding over S, and documents where T = S; it has no window.
        window: W, at least 1.
        arguments: further arguments of `attend`.

    Returns:
        out: (B, H, T, D). lse: (B, H, T), None without `with_lse`.
    """
    queries, keys = q.shape[2], v.shape[2]
    dropped, far_keys = keys - k.shape[2], keys - window
    near = replace(mask.sliced(dropped), window=window)
    if far_keys <= 0:
        return attend(q, k, v[:, :, dropped:], near, with_lse=with_lse, **arguments)
    out, lse = attend(q, k, v[:, :, dropped:], near, **arguments)
    first = max(0, queries - far_keys)  # of the queries that have far keys
    far_out, far_lse = attend(
        far_q[:, :, first:], far_k[:, :, :far_keys], v[:, :, :far_keys], mask.sliced(end=far_keys), **arguments
    )
    assert lse is not None
    assert far_lse is not None
    if mask.documents is not None:
        # In the far part a query is aligned with the token W before it, which may be in another document.
        other = mask.documents[:, window:] != mask.documents[:, :far_keys]
        far_lse = far_lse.masked_fill(other[:, None, far_keys - queries + first :], float("-inf"))
    merged = merge(out[:, :, first:], lse[:, :, first:], far_out, far_lse, with_lse=with_lse)
    return join((out[:, :, :first], lse[:, :, :first]), merged) if first else merged
