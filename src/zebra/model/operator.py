"""Attention as one torch operator, `torch.ops.zebra.attention`, for `torch.compile` and `torch.export`.

    eager       q, k, v ─► documents_of ─► kernels.attend ─► out, lse        kernels chosen by shapes and by values
    traced      q, k, v ─► zebra::attention ─► out, lse                      the same, when the program runs
                               └─ backward: zebra::attention_backward

The operator is opaque: a graph has one node for it, whose shapes follow from those of its inputs. So padding and packed
documents, which depend on the values of tensors, need no graph break and no guard. Import `zebra.model.attention`
before you load an exported program.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zebra.kernels import Mask, attend, gradients
from zebra.model.documents import documents_of

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? keys, Tensor? positions, SymInt? window, float scale, float? softcap"
)


def _mask(q: Tensor, k: Tensor, keys: Tensor | None, positions: Tensor | None, window: int | None) -> Mask:
    if keys is not None and bool(keys.all()):
        keys = None
    documents = documents_of(positions, keys, (q.shape[0], q.shape[2]), past=k.shape[2] - q.shape[2])
    return Mask(window=window, keys=keys, documents=documents)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor | None,
    positions: Tensor | None,
    window: int | None,
    scale: float,
    softcap: float | None,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        mask = _mask(q, k, keys, positions, window)
        out, lse = attend(q, k, v, mask, scale=scale, softcap=softcap, with_lse=with_lse)
    return out.transpose(1, 2).contiguous(), q.new_empty(0) if lse is None else lse.contiguous()


def _shapes(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _ = q.shape
    shape = (batch, heads, queries) if rest[-1] else (0,)
    dtype = torch.promote_types(q.dtype, torch.float32) if rest[-1] else q.dtype
    return q.new_empty(batch, queries, heads, v.shape[3]), q.new_empty(shape, dtype=dtype)


def _attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor | None,
    positions: Tensor | None,
    window: int | None,
    scale: float,
    softcap: float | None,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    mask = _mask(q, k, keys, positions, window)
    out, grad_out = out.transpose(1, 2), grad_out.transpose(1, 2)
    sides = gradients(q, k, v, mask, out, lse, grad_out, grad_lse, scale=scale, softcap=softcap)
    dq, dk, dv = (x.contiguous() for x in sides)
    return dq, dk, dv


def _shapes_backward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, keys, positions, *ctx.rest, with_lse = inputs
    assert with_lse, "a backward needs the log-sum-exp"
    ctx.save_for_backward(q, k, v, keys, positions, *output)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, out, lse = ctx.saved_tensors
    return *attention_backward(*inputs, *ctx.rest, out, lse, grad_out, grad_lse), *[None] * 6


attention = torch.library.custom_op(
    "zebra::attention", _attention, mutates_args=(), schema=f"({_ARGUMENTS}, bool with_lse) -> (Tensor, Tensor)"
)
"""The output (B, T, H, D) and the log-sum-exp (B, H, T), empty without `with_lse`.

Args:
    q, k, v, window, scale, softcap, with_lse: as `zebra.kernels.attend` has them.
    keys: (B, S) bool, True at real tokens. positions: (1 or B, T), which show packed documents.
"""

attention_backward = torch.library.custom_op(
    "zebra::attention_backward",
    _attention_backward,
    mutates_args=(),
    schema=f"({_ARGUMENTS}, Tensor out, Tensor lse, Tensor grad_out, Tensor grad_lse) -> (Tensor, Tensor, Tensor)",
)
"""The gradients of q, k and v, from the inputs and outputs of `attention` and the gradients of the outputs."""

attention.register_fake(_shapes)
attention.register_autograd(_backward, setup_context=_save)
attention_backward.register_fake(_shapes_backward)
