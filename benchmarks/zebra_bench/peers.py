"""Alternatives that compute one layer's attention: torch's own, and packages where they are installed."""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from zebra import masks
from zebra.kernels import Mask

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q (B, H, T, D), k and v (B, K, T, D) to the output (B, H, T, D)."""


@dataclass(frozen=True)
class Peer:
    """An alternative.

    Attributes:
        prepare: (window, q) to the call; what it builds first is not timed, as the layers of a model share it.
        declines: why it cannot run for q here, or None.
        local: whether it keeps to the window.
        backward: why it has no backward pass for q, or None.
        may_fail: whether it depends on a compiler or a package, so that a first call decides.
    """

    name: str
    prepare: Callable[[int, Tensor], Attend]
    declines: Callable[[Tensor], str | None] = lambda q: None
    local: bool = True
    backward: Callable[[Tensor], str | None] = lambda q: None
    may_fail: bool = False


def repeated(q: Tensor, k: Tensor) -> Tensor:
    """k (B, K, T, D) with each head once for each query head of its group: (B, H, T, D), as transformers does."""
    return k if k.shape[1] == q.shape[1] else k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)


def _band(window: int, q: Tensor) -> Tensor:
    position = torch.arange(q.shape[2], device=q.device)
    return Mask(window).visible(position, position)


def _dense_mask(window: int, q: Tensor) -> Attend:
    """What transformers runs for a sliding-window layer without flash-attn."""
    band = _band(window, q)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, repeated(q, k), repeated(q, v), attn_mask=band)

    return call


def _causal(window: int, q: Tensor) -> Attend:
    """What a global layer costs."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])

    return call


def _eager(window: int, q: Tensor) -> Attend:
    """Eager attention of transformers: scores of all pairs, the mask added, the softmax in float32."""
    mask = torch.zeros(1, 1, q.shape[2], q.shape[2], dtype=q.dtype, device=q.device)
    mask.masked_fill_(~_band(window, q), torch.finfo(q.dtype).min)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ repeated(q, k).mT * q.shape[3] ** -0.5 + mask
        return scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype) @ repeated(q, v)

    return call


def too_large(scores: int, device: torch.device | str) -> str | None:
    """Why eager attention with so many scores cannot run: they, their softmax and both gradients are held at once."""
    needed = 6 * 4 * scores
    if str(device).startswith("cuda"):
        available = torch.cuda.mem_get_info(device)[0]
    else:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 1 << 33
    return None if needed < available / 2 else f"its scores and their gradients would take {needed / 2**30:,.0f} GiB"


_BLOCK = 128


def band_blocks(length: int, window: int, device: torch.device | str) -> BlockMask:
    """The block mask of a causal band, by arithmetic: `create_block_mask` forms all N x N pairs on a CPU.

    Row r of blocks sees the columns from that of its first query's first key to column r. Blocks wholly inside the band
    need no mask: j <= r - 1 and the block's farthest pair, 128 (r - j + 1) - 1 apart, within the window.
    """
    rows = -(-length // _BLOCK)
    r = torch.arange(rows, device=device)[:, None]
    j = torch.arange(rows, device=device)[None, :]
    first = (r * _BLOCK - window + 1).clamp(min=0) // _BLOCK
    touched = (j >= first) & (j <= r)
    whole = touched & (j < r) & (_BLOCK * (r - j + 1) - 1 < window)

    def packed(blocks: Tensor) -> tuple[Tensor, Tensor]:
        counts = blocks.sum(dim=1, dtype=torch.int32)
        indices = blocks.int().argsort(dim=1, descending=True, stable=True).to(torch.int32)
        return counts[None, None], indices[None, None].contiguous()

    def visible(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return masks.within(i, j, window)

    return BlockMask.from_kv_blocks(
        *packed(touched & ~whole), *packed(whole), BLOCK_SIZE=_BLOCK, mask_mod=visible, seq_lengths=(length, length)
    )


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)


def _flex(window: int, q: Tensor) -> Attend:
    blocks = band_blocks(q.shape[2], window, q.device)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = _compiled()(q, k, v, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1])
        return out

    return call


def flex_reason(device: torch.device | str) -> str | None:
    """Why flex_attention cannot run: it has to be compiled."""
    if str(device).startswith("cuda"):
        return None if importlib.util.find_spec("triton") else "it is compiled, and there is no triton here"
    return None if shutil.which(os.environ.get("CXX", "c++")) else "it is compiled, and there is no C++ compiler here"


def _flash(call: Callable[..., Any], window: int) -> Attend:
    """(B, N, H, D) there, and a window that counts the keys to the left."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        out = call(q, k, v, causal=True, window_size=(window - 1, 0))
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return attend


def _flash_attn(window: int, q: Tensor) -> Attend:
    return _flash(importlib.import_module("flash_attn").flash_attn_func, window)


def _hub(window: int, q: Tensor) -> Attend:
    """A kernel of the hub that is in the local cache: nothing is downloaded."""
    from huggingface_hub import snapshot_download

    folder = snapshot_download("kernels-community/flash-attn2", local_files_only=True)
    kernel = importlib.import_module("kernels").get_local_kernel(folder, "flash_attn2")
    return _flash(kernel.flash_attn_func, window)


def _needs(package: str) -> Callable[[Tensor], str | None]:
    def declines(q: Tensor) -> str | None:
        if not q.is_cuda:
            return "it runs on CUDA only"
        if q.dtype not in (torch.bfloat16, torch.float16):
            return f"it takes bfloat16 and float16, not {str(q.dtype).removeprefix('torch.')}"
        return None if importlib.util.find_spec(package) else f"the package {package} is not installed"

    return declines


PEERS: tuple[Peer, ...] = (
    Peer("sdpa, dense mask", _dense_mask),
    Peer("sdpa, causal", _causal, local=False),
    Peer("eager", _eager, lambda q: too_large(math.prod(q.shape[:3]) * q.shape[2], q.device)),
    Peer(
        "flex_attention",
        _flex,
        lambda q: flex_reason(q.device),
        backward=lambda q: None if q.is_cuda else "it has none on a CPU",
        may_fail=True,
    ),
    Peer("flash-attn", _flash_attn, _needs("flash_attn"), may_fail=True),
    Peer("hub kernel flash-attn2", _hub, _needs("kernels"), may_fail=True),
)
