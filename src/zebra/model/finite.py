"""Detect NaN and infinity where logits or losses are first computed, and trace them to the weights."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from zebra.errors import ZebraError


def check_finite(values: Tensor, model: PreTrainedModel) -> None:
    """Reject logits or losses of a model, in any shape, that are NaN or infinite.

    Only then are the weights searched for the first tensor that is not finite.

    Raises:
        ZebraError: some are; it names the checkpoint and that tensor, or the dtype in which activations overflow.
    """
    if bool(values.isfinite().all()):
        return
    name = model.name_or_path or "this model"
    for tensor_name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_meta or not tensor.is_floating_point():
            continue
        finite = (tensor if tensor.itemsize > 1 else tensor.float()).isfinite()
        if not bool(finite.all()):
            count = finite.numel() - int(finite.sum())
            raise ZebraError(
                f"the weights of {name} are not finite: {count:,} of the {finite.numel():,} values of {tensor_name} "
                "are NaN or infinite. Use another copy or an earlier checkpoint."
            )
    raise ZebraError(
        f"the logits of {name} are not finite, though its weights are: its activations overflow in {model.dtype}. "
        f"Use another dtype, such as {'float64' if model.dtype == torch.float32 else 'float32'}."
    )


@contextmanager
def checking_logits(model: PreTrainedModel) -> Iterator[None]:
    """Within this context check the logits of every forward pass of a model with `check_finite`."""

    def check(module: Any, args: Any, output: Any) -> None:
        check_finite(output.logits, module)

    with model.register_forward_hook(check):
        yield
