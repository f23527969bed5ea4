"""The loss of a plain head, W h, and its gradients in one pass: no chunk of logits is computed twice.

    z = W h,    loss = sum of log(sum of e^z) - z_y,    dh = (softmax(z) - 1_y) W,    dW = (softmax(z) - 1_y)^T h

Gradients are formed beside the loss, while a chunk's logits are there (as in Liger, arXiv 2410.10989, section 3.2). A
backward through torch's `linear_cross_entropy` computes them again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_FLOAT32 = 1e-6
"""The relative error that a product in float32 stays below; one in bfloat16 has 2e-3."""


def plain_head_loss(states: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """The sum of the losses, ().

    Args:
        states: (n, hidden) in float32.
        weight: (V, hidden), in any floating-point dtype; products are in float32.
        targets: (n) int64.
        chunk: tokens whose logits are held at a time.
    """
    total: Tensor = _HeadLoss.apply(states, weight, targets, chunk, torch.is_grad_enabled())
    return total


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, targets: Tensor, chunk: int, grad: bool) -> Tensor:
        matrix = weight.float()
        of_states = torch.empty_like(states) if grad and ctx.needs_input_grad[0] else None
        of_weight = torch.zeros_like(matrix) if grad and ctx.needs_input_grad[1] else None
        total = states.new_zeros(())
        logits, buffer = states.new_empty(2, min(chunk, len(states)), len(matrix))  # fresh memory costs its page faults
        with onednn_products(states.device):
            for at in range(0, len(states), chunk):
                h, y = states[at : at + chunk], targets[at : at + chunk, None]
                z, p = logits[: len(h)], buffer[: len(h)]
                torch.mm(h, matrix.T, out=z)
                torch.log_softmax(z, dim=-1, out=p)  # `logsumexp` takes five times as long
                total -= p.gather(1, y).sum()
                if of_states is None and of_weight is None:
                    continue
                p.exp_().scatter_add_(1, y, p.new_full((len(h), 1), -1.0))
                if of_states is not None:
                    torch.mm(p, matrix, out=of_states[at : at + chunk])
                if of_weight is not None:
                    of_weight.addmm_(p.T, h)
        ctx.save_for_backward(of_states, of_weight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_states, of_weight = ctx.saved_tensors
        scaled = None if of_weight is None else (of_weight * grad).to(ctx.dtype)
        return None if of_states is None else of_states * grad, scaled, None, None, None


@contextmanager
def onednn_products(device: torch.device) -> Iterator[None]:
    """Within this context oneDNN computes products on a CPU, where it computes those of float32 in float32.

    torch takes MKL by default, which on AMD reaches less than half of oneDNN's rate. torch's precision `medium` takes
    oneDNN and lets it round to bfloat16: it does with AMX, and does not with AVX-512 or AVX2.
    """
    if device.type != "cpu" or not _is_default() or not _keeps_float32():
        yield
        return
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def _is_default() -> bool:
    """Whether nobody has set a precision; torch raises where it was set by the newer of its two interfaces."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:
        return False


@cache
def _keeps_float32() -> bool:
    """Whether products under `medium` are those of float32 here, in a few shapes: tried once."""
    generator = torch.Generator().manual_seed(0)
    torch.set_float32_matmul_precision("medium")
    try:
        for n, k, m in ((256, 256, 256), (512, 64, 2048), (2048, 512, 64), (64, 2048, 512)):
            a, b = torch.randn(n, k, generator=generator), torch.randn(m, k, generator=generator)
            expected = a.double() @ b.double().T
            if (a @ b.T - expected).norm() > _FLOAT32 * expected.norm():
                return False
        return True
    finally:
        torch.set_float32_matmul_precision("highest")
