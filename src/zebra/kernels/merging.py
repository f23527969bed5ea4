"""Put attention together from two parts: two sets of keys, merged by their log-sum-exps, or two sets of queries.

Keys are merged as in FlashAttention (arXiv 2205.14135).
"""

from __future__ import annotations

import torch
from torch import Tensor

Attention = tuple[Tensor, Tensor | None]
"""An output and its log-sum-exp."""


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor, *, with_lse: bool = True) -> Attention:
    """Merge the attention over two disjoint sets of keys; differentiable in all four tensors.

        out = (e^l1 o1 + e^l2 o2) / (e^l1 + e^l2),   lse = log(e^l1 + e^l2)

    A query that sees no key on either side stays 0 with lse -inf.

    Args:
        out, other: (B, H, T, D).
        lse, other_lse: (B, H, T), natural logarithms.
        with_lse: return the merged log-sum-exp.

    Returns:
        out: (B, H, T, D). lse: (B, H, T), None without `with_lse`.
    """
    lowest = torch.finfo(lse.dtype).min
    one, two = lse.clamp(min=lowest), other_lse.clamp(min=lowest)  # -inf - (-inf) would be NaN
    weight = torch.sigmoid(two - one).unsqueeze(-1)
    merged = torch.lerp(out.to(weight.dtype), other.to(weight.dtype), weight).to(out.dtype)
    if not with_lse:
        return merged, None
    neither = lse.isneginf() & other_lse.isneginf()
    return merged, torch.logaddexp(one, two).masked_fill(neither, float("-inf"))


def join(*parts: Attention) -> Attention:
    """Concatenate the attention of consecutive parts of the queries.

    Args:
        parts: outputs (B, H, T, D), each with its log-sum-exp (B, H, T) or None.

    Returns:
        The same for all queries; no log-sum-exp if a part has none.
    """
    if len(parts) == 1:
        return parts[0]
    lses = [lse for _, lse in parts if lse is not None]
    lse = torch.cat(lses, dim=2) if len(lses) == len(parts) else None
    return torch.cat([out for out, _ in parts], dim=2), lse
