"""Attention on a CPU by our own kernel in C++, native.cpp, compiled on the machine at its first request.

Each query sees one run of keys, [lo_i, hi_i), and neither end ever falls (`Mask.key_ranges`), so windows, documents,
padding and chunks are one case. The tiles and their arithmetic are those of `banded`
(FlashAttention, arXiv 2205.14135, sections 3.1 and 3.2), but a tile's scores never leave the first cache, and keys that
half of a tile cannot see are not computed for it.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zebra.kernels import compiler
from zebra.kernels.request import Kernel, Request, unit_stride

SOURCE = Path(__file__).with_name("native.cpp")
_SIZES = (64, 128)
_CPU = {  # the instruction sets that the kernel uses
    torch.float32: frozenset({"avx512f", "avx512dq", "avx512bw"}),
    torch.bfloat16: frozenset({"avx512f", "avx512dq", "avx512bw", "avx512_bf16"}),
}


class _View(ctypes.Structure):
    """A tensor (B, heads, tokens, D) as native.cpp takes it: its address and strides; the last one is 1."""

    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "row"))]


_VIEWS = ("q", "k", "v", "out", "grad", "dq", "dk", "dv")
_FLAT = ("lse", "dlse", "lo", "hi")


class _Call(ctypes.Structure):
    """The arguments of native.cpp, which documents them."""

    _fields_ = [
        *((name, _View) for name in _VIEWS),
        *((name, ctypes.c_void_p) for name in _FLAT),
        *((name, ctypes.c_int32) for name in ("batch", "heads", "kv_heads", "queries", "keys", "threads")),
        ("scale", ctypes.c_float),
    ]


def _run(direction: str, tensors: dict[str, Tensor], scale: float) -> None:
    """Call native.cpp, which fills in the outputs among the tensors."""
    q, k = tensors["q"], tensors["k"]
    fields: dict[str, Any] = dict(zip(("batch", "heads", "queries"), q.shape, strict=False))
    fields |= {"kv_heads": k.shape[1], "keys": k.shape[2], "threads": torch.get_num_threads(), "scale": scale}
    for name, tensor in tensors.items():
        fields[name] = _View(tensor.data_ptr(), *tensor.stride()[:3]) if name in _VIEWS else tensor.data_ptr()
    call = _Call(**fields)
    library = _library()
    assert not isinstance(library, str)
    function = library[f"{direction}_{str(q.dtype).removeprefix('torch.')}_{q.shape[3]}"]
    if function(ctypes.byref(call)):
        raise MemoryError("the attention kernel native ran out of memory for its keys and values")


@functools.cache
def _library() -> ctypes.CDLL | str:
    """native.cpp compiled and loaded, or the reason why it is not; once for the process."""
    try:
        return compiler.library(SOURCE)
    except compiler.Unbuilt as reason:
        return str(reason)


class _Native(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (unit_stride(x) for x in (q, k, v))
        out = unit_stride(torch.empty_like(q))
        lse = torch.empty(q.shape[:3], dtype=torch.float32)
        _run("forward", {"q": q, "k": k, "v": v, "out": out, "lse": lse, "lo": lo, "hi": hi}, scale)
        ctx.save_for_backward(q, k, v, out, lse, lo, hi)
        ctx.scale = scale
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        saved = dict(zip(("q", "k", "v", "out", "lse", "lo", "hi"), ctx.saved_tensors, strict=True))
        return *_backward(saved, grad_out, grad_lse, ctx.scale), None, None, None


def _backward(saved: dict[str, Tensor], grad_out: Tensor, grad_lse: Tensor, scale: float) -> Iterable[Tensor]:
    gradients = {f"d{name}": unit_stride(torch.empty_like(saved[name])) for name in ("q", "k", "v")}
    incoming = {"grad": unit_stride(grad_out), "dlse": grad_lse.contiguous()}
    _run("backward", saved | gradients | incoming, scale)
    return gradients.values()


def native(request: Request) -> tuple[Tensor, Tensor | None]:
    """The kernel over the run of keys that each query sees: out (B, H, T, D), lse (B, H, T)."""
    out, lse = _Native.apply(request.q, request.k, request.v, *_key_ranges(request), request.scale)
    return out, lse if request.with_lse else None


def _gradients(
    request: Request, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    lo, hi = _key_ranges(request)
    saved = {"q": request.q, "k": request.k, "v": request.v, "out": unit_stride(out), "lse": lse, "lo": lo, "hi": hi}
    dq, dk, dv = _backward(saved, grad_out, grad_lse, request.scale)
    return dq, dk, dv


def _key_ranges(request: Request) -> list[Tensor]:
    ranges = request.mask.key_ranges(request.queries, request.keys, request.q.device)
    return [x.expand(request.q.shape[0], -1).to(torch.int32).contiguous() for x in ranges]


def _unsupported_reason(request: Request) -> str | None:
    size = request.q.shape[3]
    if size not in _SIZES:
        return f"it takes head sizes {' and '.join(map(str, _SIZES))}, not {size}"
    if request.scale <= 0:
        return "it takes positive scales only"
    if request.mask.has_padding_holes():
        return "padding stands between the tokens of a sequence"
    if missing := _CPU[request.q.dtype] - compiler.cpu_flags():
        return f"this CPU does not say that it has {', '.join(sorted(missing))}"
    library = _library()
    return library if isinstance(library, str) else None


KERNEL = Kernel(
    name="native",
    summary="tiles in C++ for AVX-512, compiled on the machine: windows, documents, padding, chunks",
    run=native,
    devices=frozenset({"cpu"}),
    dtypes=frozenset(_CPU),
    min_queries=256,
    unsupported_reason=_unsupported_reason,
    gradients=_gradients,
)
