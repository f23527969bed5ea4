"""Attention on a CPU by zebra's own C++ kernel, native.cpp, which is compiled on the machine at the first request.

Each query sees one run of keys, [lo_i, hi_i), and neither bound decreases (`Mask.key_ranges`), so windows, documents,
padding and chunks are one case. The tiles and their arithmetic are those of `banded`
(FlashAttention, arXiv 2205.14135, sections 3.1 and 3.2). But a tile's scores never leave the L1 cache, and keys that
half of a tile cannot see are not computed for that half.

`decode` serves few queries over many keys. Each task is one part of the keys for all queries of a group's heads, 16 of
them at a time. The parts are merged by their log-sum-exps.
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
_SIZES = (32, 64, 80, 96, 128, 256)
_ELEMENTS = {torch.float32: "float", torch.bfloat16: "BFloat16", torch.float16: "Float16"}
"""The element types of simd.h."""
_X86 = frozenset({"avx2", "fma", "f16c"})
"""What an x86 CPU must support; every 64-bit ARM CPU has NEON."""


class _View(ctypes.Structure):
    """A tensor (B, heads, tokens, D) as native.cpp takes it: its address and strides. The last stride is 1."""

    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "row"))]


_VIEWS = ("q", "k", "v", "out", "grad", "dq", "dk", "dv")
_FLAT = ("lse", "dlse", "lo", "hi", "slopes")


class _Call(ctypes.Structure):
    """The arguments of native.cpp, which documents them."""

    _fields_ = [
        *((name, _View) for name in _VIEWS),
        *((name, ctypes.c_void_p) for name in _FLAT),
        *((name, ctypes.c_int32) for name in ("batch", "heads", "kv_heads", "queries", "keys", "threads")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    ]


def arguments(tensors: dict[str, Tensor], scale: float, softcap: float | None, group: int = 1) -> ctypes.Structure:
    """The arguments of native.cpp, which fills in the output tensors. Each head of q has the rows of `group` heads."""
    q, k = tensors["q"], tensors["k"]
    fields: dict[str, Any] = dict(zip(("batch", "heads", "queries"), q.shape, strict=False))
    fields |= {"kv_heads": k.shape[1], "keys": k.shape[2], "threads": torch.get_num_threads()}
    fields["heads"] *= group
    for name, tensor in tensors.items():
        fields[name] = _View(tensor.data_ptr(), *tensor.stride()[:3]) if name in _VIEWS else tensor.data_ptr()
    return _Call(**fields, scale=scale, softcap=softcap or 0.0)


def options(dtype: torch.dtype, size: int) -> tuple[str, ...]:
    """The compiler options that set the element type and the head size of native.cpp."""
    return f"-DELEMENT={_ELEMENTS[dtype]}", f"-DSIZE={size}"


def instructions() -> str:
    """The instruction set that the kernel was compiled for, or why it was not compiled."""
    library = _library(torch.bfloat16, 64)
    if isinstance(library, str):
        return library
    library.instructions.restype = ctypes.c_char_p
    name: str = library.instructions().decode()
    by = "matrix registers (AMX)" if library.matrices() else "dot products"
    return f"{name}, bfloat16 by {by}" if library.dots() else name


def _run(direction: str, tensors: dict[str, Tensor], scale: float, softcap: float | None, group: int = 1) -> None:
    library = _library(tensors["q"].dtype, tensors["q"].shape[3])
    assert not isinstance(library, str)
    if library[direction](ctypes.byref(arguments(tensors, scale, softcap, group))):
        raise MemoryError("the attention kernel native ran out of memory for its keys and values")


def _library(dtype: torch.dtype, size: int) -> ctypes.CDLL | str:
    """native.cpp compiled and loaded, or the reason why it is not."""
    if not compiler.IS_ARM and (missing := _X86 - compiler.cpu_flags()):
        return f"this CPU does not report {', '.join(sorted(missing))}"
    return _loaded(compiler.CPU, *options(dtype, size))


@functools.cache
def _loaded(*options: str) -> ctypes.CDLL | str:
    """Load the library once per process; without matrix registers (AMX) where the system does not permit them."""
    try:
        library = compiler.library(SOURCE, *options)
        return library if library.permitted() else compiler.library(SOURCE, *options, "-mno-amx-bf16")
    except compiler.Unbuilt as reason:
        return str(reason)


class _Native(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lo: Tensor,
        hi: Tensor,
        slopes: Tensor | None,
        scale: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (unit_stride(x) for x in (q, k, v))
        out = unit_stride(torch.empty_like(q))
        lse = torch.empty(q.shape[:3], dtype=torch.float32)
        saved = q, k, v, out, lse, lo, hi, slopes
        _run("forward", _saved(saved), scale, softcap)
        ctx.save_for_backward(*saved)
        ctx.scale, ctx.softcap = scale, softcap
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        gradients = _backward(_saved(ctx.saved_tensors), grad_out, grad_lse, ctx.scale, ctx.softcap)
        return *gradients, None, None, None, None, None


def _saved(tensors: Iterable[Tensor | None]) -> dict[str, Tensor]:
    """The tensors that are not None, by their names in a call."""
    named = zip(("q", "k", "v", "out", "lse", "lo", "hi", "slopes"), tensors, strict=True)
    return {name: tensor for name, tensor in named if tensor is not None}


def _backward(
    saved: dict[str, Tensor], grad_out: Tensor, grad_lse: Tensor, scale: float, softcap: float | None
) -> Iterable[Tensor]:
    gradients = {f"d{name}": unit_stride(torch.empty_like(saved[name])) for name in ("q", "k", "v")}
    incoming = {"grad": unit_stride(grad_out), "dlse": grad_lse.contiguous()}
    _run("backward", saved | gradients | incoming, scale, softcap)
    return gradients.values()


def native(request: Request) -> tuple[Tensor, Tensor | None]:
    """Run the kernel over the run of keys that each query sees: out (B, H, T, D), lse (B, H, T)."""
    inputs = request.q, request.k, request.v, *_key_ranges(request), _slopes(request)
    out, lse = _Native.apply(*inputs, request.scale, request.softcap)
    return out, lse if request.with_lse else None


def attend_ranges(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, end: Tensor, *, scale: float
) -> tuple[Tensor, Tensor] | None:
    """Attention of T queries over S keys in which query t sees the keys [first_t, end_t), for any T and S.

    Args:
        q: (B, H, T, D). k, v: (B, K, S, D).
        first, end: (1 or B, T) integers, end at most S; neither may decrease along T, which is not checked.

    Returns:
        out: (B, H, T, D) and lse: (B, H, T), 0 and -inf for a query that sees no key; None if this kernel cannot run.
    """
    fits = q.device.type == "cpu" and q.dtype in _ELEMENTS and q.shape[3] in _SIZES and scale > 0
    fits = fits and q.dtype == k.dtype == v.dtype and k.shape == v.shape
    if not fits or q.shape[2] < KERNEL.min_queries or isinstance(_library(q.dtype, q.shape[3]), str):
        return None
    ranges = (x.expand(q.shape[0], -1).to(torch.int32).contiguous() for x in (first, end))
    out, lse = _Native.apply(q, k, v, *ranges, None, scale, None)
    return out, lse


def decode(request: Request) -> tuple[Tensor, Tensor | None]:
    """As `native`, for few queries: the heads of a group are rows over the same keys, as in `fused`."""
    group = request.q.shape[1] // request.k.shape[1]
    rows = request.q.unflatten(1, (-1, group)).transpose(2, 3).flatten(2, 3)  # (B, K, T g, D)
    lo, hi = _key_ranges(request)
    tensors = {"q": unit_stride(rows), "k": request.k, "v": request.v, "lo": lo, "hi": hi}
    out, lse = torch.empty(rows.shape, dtype=rows.dtype), torch.empty(rows.shape[:3], dtype=torch.float32)
    _run("decode", tensors | {"out": out, "lse": lse}, request.scale, request.softcap, group)
    out, lse = (x.unflatten(2, (-1, group)).transpose(2, 3).flatten(1, 2) for x in (out, lse))
    return out, lse if request.with_lse else None


def _gradients(
    request: Request, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    saved = _saved((request.q, request.k, request.v, unit_stride(out), lse, *_key_ranges(request), _slopes(request)))
    dq, dk, dv = _backward(saved, grad_out, grad_lse, request.scale, request.softcap)
    return dq, dk, dv


def _key_ranges(request: Request) -> list[Tensor]:
    ranges = request.mask.key_ranges(request.queries, request.keys, request.q.device)
    return [x.expand(request.q.shape[0], -1).to(torch.int32).contiguous() for x in ranges]


def _slopes(request: Request) -> Tensor | None:
    return None if request.slopes is None else request.slopes.detach().to(torch.float32).contiguous()


def _unsupported_reason(request: Request) -> str | None:
    size = request.q.shape[3]
    if size not in _SIZES:
        return f"it supports head sizes {', '.join(map(str, _SIZES))}, not {size}"
    if request.scale <= 0:
        return "it supports only positive scales"
    if request.slopes is not None and request.softcap is not None:
        return "it does not support ALiBi with a softcap"
    if request.slopes is not None and request.slopes.requires_grad and torch.is_grad_enabled():
        return "it computes no gradient of ALiBi's slopes"
    if request.mask.has_padding_holes():
        return "there is padding between the tokens of a sequence"
    library = _library(request.q.dtype, size)
    return library if isinstance(library, str) else None


def _no_decode_reason(request: Request) -> str | None:
    return "it has no gradient" if request.wants_gradient else _unsupported_reason(request)


KERNEL = Kernel(
    name="native",
    summary="tiles in C++, compiled on the machine: windows, documents, padding, chunks, ALiBi",
    run=native,
    devices=frozenset({"cpu"}),
    dtypes=frozenset(_ELEMENTS),
    softcap=True,
    slopes=True,
    min_queries=256,
    unsupported_reason=_unsupported_reason,
    gradients=_gradients,
)

DECODE = Kernel(
    name="decode",
    summary="few queries over many keys, in C++, compiled on the machine: each thread reads a part of the keys",
    run=decode,
    devices=KERNEL.devices,
    dtypes=KERNEL.dtypes,
    softcap=True,
    max_queries=16,
    min_keys=512,
    unsupported_reason=_no_decode_reason,
)
