"""Attention kernels behind one signature: `attend(q, k, v, mask, ...) -> (out, lse)`.

The kernels of the table `KERNELS` are tried in order. The first that does not decline the request runs, or a later one
that it names as faster. `reference` is the plain formula, the oracle for the others.

Shapes, everywhere: B batch, H query heads, K key-value heads (H a multiple of K), T queries, S keys, D head dimension.
The T queries are the *last* T of the S keys: query `t` is at key index `S - T + t`. So one signature serves training
(T = S), chunked prefill (1 < T < S) and decoding (T = 1).
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from zebra.kernels import banded, flex, fused, native, reference, varlen
from zebra.kernels.request import Kernel, Mask, Request, unit_stride

__all__ = ["KERNELS", "Kernel", "Mask", "Request", "attend", "autocast", "choose", "find", "gradients", "only"]

KERNELS: tuple[Kernel, ...] = (
    fused.KERNEL, varlen.KERNEL, flex.KERNEL, native.KERNEL, native.DECODE, banded.KERNEL, reference.KERNEL,
)  # fmt: skip
"""Fastest first."""

_log = logging.getLogger(__name__)
_only: contextvars.ContextVar[str | None] = contextvars.ContextVar("only", default=None)
_warned: set[str] = set()
_INTEGERS = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})


@contextlib.contextmanager
def only(name: str) -> Iterator[None]:
    """Within this context serve every request by one kernel; what it declines is an error. For tests and benchmarks.

    Raises:
        ValueError: there is no kernel of this name.
    """
    names = [kernel.name for kernel in KERNELS]
    if name not in names:
        raise ValueError(f"there is no kernel {name!r}. Choose one of {names}.")
    token = _only.set(name)
    try:
        yield
    finally:
        _only.reset(token)


def find(request: Request) -> tuple[Kernel | None, dict[str, str]]:
    """Find the kernel that serves a request, None where all decline, and why each kernel before it declines."""
    forced = _only.get()
    kernels = {kernel.name: kernel for kernel in KERNELS if forced in (None, kernel.name)}
    reasons: dict[str, str] = {}
    for kernel in kernels.values():
        reason = kernel.declines(request)
        if reason is None:
            faster = kernels.get(kernel.slower_than(request) or "")
            return (kernel if faster is None or faster.declines(request) is not None else faster), reasons
        reasons[kernel.name] = reason
    return None, reasons


def choose(request: Request) -> Kernel:
    """Find the kernel that serves a request.

    A warning is logged, once for each message, if only the dense formula is left, or if a kernel that is made for this
    device and these sizes declines.

    Raises:
        NotImplementedError: all decline; the message has each one's reason.
    """
    kernel, reasons = find(request)
    lines = {name: f"{name}: {reason}" for name, reason in reasons.items()}
    if kernel is None:
        raise NotImplementedError(f"no attention kernel can serve this request. {'; '.join(lines.values())}.")
    if kernel is reference.KERNEL and _only.get() is None:
        _warn_once(f"attention uses the dense formula, slow and memory-intensive, because {'; '.join(lines.values())}")
        return kernel
    device = request.q.device.type
    declined = [one for one in KERNELS if one.name in lines and one.does_not_pay(request) is None]
    missed = [lines[one.name] for one in declined if device in (one.devices or ())]
    if missed:
        _warn_once(f"attention uses the kernel {kernel.name}, because {'; '.join(missed)}")
    return kernel


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    slopes: Tensor | None = None,
    with_lse: bool = True,
    **arguments: Any,
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention of T queries over S keys under a mask, by the fastest kernel that supports it.

        s_ij = scale * <q_i, k_j>,   then softcap * tanh(s_ij / softcap) where a softcap is given,
        then s_ij - m_h (i - j) where slopes m are given (ALiBi, arXiv 2108.12409)
        lse_i = log(sum over visible j of exp(s_ij)),   out_i = sum over visible j of exp(s_ij - lse_i) v_j

    Args:
        q: (B, H, T, D), the queries.
        k: (B, K, S, D), the keys.
        v: (B, K, S, D), the values; their head size D may differ from that of the keys.
        mask: what restricts a causal query further; None is plain causal attention.
        scale: D ** -0.5 where None.
        slopes: (H,), ALiBi's slope of each head.
        with_lse: return the log-sum-exp; without it, kernels that do not compute one may serve too.
        arguments: any others. A kernel declines those that it does not know, unless they are None.

    Returns:
        out: (B, H, T, D) in the dtype of the inputs, with D of the values. lse: (B, H, T), natural logarithm, in at
        least float32, None without `with_lse`. A query that sees no key has out 0 and lse -inf.

        Masked keys and values change neither the output nor the gradient of a query, as long as they are finite. A
        masked NaN or infinity may reach every query: the formula gives it the weight 0, and 0 * NaN is NaN. Without
        sinks, keys that are outside the window of all queries are never read.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together; a scale that is not finite, or a softcap that is
            not positive and finite.
        NotImplementedError: no kernel can serve the request.
    """
    mask = mask or Mask()
    q, k, v = autocast(q, k, v)
    _check(q, k, v, mask, slopes)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not math.isfinite(scale) or not (softcap is None or 0 < softcap < math.inf):
        raise ValueError(f"scale must be finite, and softcap positive and finite or None; got {scale} and {softcap}.")
    k, v, mask = _trim(q, k, v, mask)
    request = Request(
        q=unit_stride(q),
        k=unit_stride(k),
        v=unit_stride(v),
        mask=mask,
        scale=scale,
        softcap=softcap,
        slopes=slopes,
        with_lse=with_lse,
        arguments={name: value for name, value in arguments.items() if value is not None},
    )
    return choose(request).run(request)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast the tensors as torch's autocast would for attention, if it is on."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)


@torch.no_grad()
def gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k and v from what `attend` returned, by whichever kernel; outside autograd.

    Args:
        q, k, v, mask, scale, softcap: the arguments of `attend`.
        out, lse: what it returned.
        grad_out, grad_lse: the gradients of these.

    Raises:
        NotImplementedError: every kernel with a backward of its own declines the request.
    """
    keys = k.shape[2]
    k, v, mask = _trim(q, k, v, mask)
    request = Request(unit_stride(q), unit_stride(k), unit_stride(v), mask, scale, softcap)
    forced, reasons, unseen = _only.get(), [], (0, 0, keys - k.shape[2], 0)
    for kernel in KERNELS:
        if kernel.gradients is None or forced not in (None, kernel.name):
            continue
        if (reason := kernel.declines(request)) is None:
            dq, dk, dv = kernel.gradients(request, out, lse, grad_out, grad_lse)
            return (dq, pad(dk, unseen), pad(dv, unseen)) if unseen[2] else (dq, dk, dv)
        reasons.append(f"{kernel.name}: {reason}")
    raise NotImplementedError(f"no attention kernel can compute the gradients of this request. {'; '.join(reasons)}.")


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Mask, slopes: Tensor | None) -> None:
    fits = (
        q.ndim == k.ndim == v.ndim == 4
        and min(*q.shape, *k.shape, *v.shape) >= 1
        and k.shape[:3] == v.shape[:3]
        and q.shape[0] == k.shape[0]
        and q.shape[3] == k.shape[3]
        and q.shape[1] % k.shape[1] == 0
        and q.shape[2] <= k.shape[2]
    )
    if not fits:
        raise ValueError(
            "attention requires q (B, H, T, D) and k, v (B, K, S, D), none empty, with H a multiple of K and "
            f"1 <= T <= S; got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}."
        )
    of_keys = "key, (B, S)", (k.shape[0], k.shape[2])
    others = ("mask.keys", mask.keys, *of_keys), ("mask.documents", mask.documents, *of_keys)
    for name, tensor, entry, shape in (*others, ("slopes", slopes, "head, (H,)", q.shape[1:2])):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must have one entry per {entry} = {tuple(shape)}; got {tuple(tensor.shape)}.")
    devices = {x.device for x in (q, k, v, mask.keys, mask.documents, slopes) if x is not None}
    if len(devices) > 1:
        raise ValueError(
            f"q, k, v, the mask and slopes must be on one device; got {', '.join(sorted(map(str, devices)))}."
        )
    if mask.keys is not None and mask.keys.dtype != torch.bool:
        raise ValueError(f"mask.keys must be bool, True for real tokens; got {mask.keys.dtype}.")
    if mask.documents is not None and mask.documents.dtype not in _INTEGERS:
        raise ValueError(f"mask.documents must hold integers; got {mask.documents.dtype}.")
    if mask.documents is not None and bool((mask.documents[:, 1:] < mask.documents[:, :-1]).any()):
        raise ValueError("mask.documents must not decrease along a sequence. Number its documents in order.")


def _trim(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> tuple[Tensor, Tensor, Mask]:
    """Drop the keys that no query sees, and the window where it hides nothing."""
    if mask.window is None or mask.sinks:
        return k, v, mask
    unseen = k.shape[2] - (q.shape[2] + mask.window - 1)
    if unseen > 0:
        k, v, mask = k[:, :, unseen:], v[:, :, unseen:], mask.sliced(unseen)
    return k, v, mask if mask.window is not None and mask.window < k.shape[2] else replace(mask, window=None)


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        _log.warning(message)
