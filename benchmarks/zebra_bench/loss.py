"""Head and loss, forward + backward: ours, which never holds all logits, against full logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from zebra.measure import relative_error
from zebra.model.load import read_device, read_dtype
from zebra.model.loss import Head, summed_loss
from zebra.plan.cost import Run
from zebra.plan.decoder import decoder
from zebra.plan.devices import Device
from zebra_bench.pairing import Case, Variant, Work
from zebra_bench.subjects import Loss

Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def case(sizes: Loss) -> Case:
    """Hidden states, the head's weight and labels; the loss and both gradients."""
    tensors = _inputs(sizes, sizes.length)
    fields = {"num_hidden_layers": 1, "hidden_size": sizes.hidden, "num_attention_heads": 1, "intermediate_size": 1}
    fields |= {"vocab_size": sizes.words, "max_position_embeddings": sizes.length}
    head = decoder(fields, name="one head")
    run = Run(decoder=head, stripes=None, length=sizes.length, batch=sizes.batch, dtype=sizes.dtype, phase="train")

    def work(call: Call) -> tuple[Work, ...]:
        tokens = sizes.batch * sizes.length
        prepare = partial(partial, _forward_backward, call, tensors)
        return (Work(prepare=prepare, suffix="_forward_backward", tokens=tokens, planned=partial(_seconds, run)),)

    variants = (
        Variant(name="zebra", layout="", works=work(_ours), gate=partial(_error, sizes)),
        Variant(name="full logits", layout="", works=work(_full)),
    )
    rows = f", {sizes.batch} rows" if sizes.batch > 1 else ""
    return Case(task=f"loss: {sizes.words} words, hidden size {sizes.hidden}{rows}", variants=variants)


def _inputs(sizes: Loss, length: int) -> list[Tensor]:
    """Hidden states (B, T, h), the head's weight (V, h), labels (B, T)."""
    device, dtype = read_device(sizes.device), read_dtype(sizes.dtype)
    torch.manual_seed(sizes.seed)
    hidden = torch.randn(sizes.batch, length, sizes.hidden, device=device, dtype=dtype)
    weight = torch.randn(sizes.words, sizes.hidden, device=device, dtype=dtype) * sizes.hidden**-0.5
    return [hidden, weight, torch.randint(sizes.words, (sizes.batch, length), device=device)]


def _ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return summed_loss(hidden, Head(weight), labels) / labels[:, 1:].numel()


def _full(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """As the host does: logits of all tokens, in float32, and the labels shifted by padding them."""
    logits = functional.linear(hidden, weight).float()
    targets = functional.pad(labels, (0, 1), value=-100)[:, 1:].reshape(-1)
    return functional.cross_entropy(logits.view(-1, logits.shape[-1]), targets, ignore_index=-100)


def _forward_backward(call: Call, tensors: list[Tensor]) -> list[Tensor]:
    hidden, weight = (tensor.detach().requires_grad_() for tensor in tensors[:2])
    total = call(hidden, weight, tensors[2])
    return [total.detach(), *torch.autograd.grad(total, (hidden, weight))]


def _error(sizes: Loss) -> float:
    """Against full logits in float32."""
    tensors = _inputs(sizes, min(sizes.length, 131))
    wanted = _forward_backward(_full, [tensor.float() if tensor.is_floating_point() else tensor for tensor in tensors])
    return relative_error(_forward_backward(_ours, tensors), wanted)


def _seconds(run: Run, device: Device) -> float:
    return device.seconds(run)["head"]
