"""Ulysses: each process has all tokens of a part of the heads. DeepSpeed has it; accelerate starts it by `sp_size`.

DeepSpeed (0.19) puts a wrapper in the place of the attention function that the model's config names. It exchanges
tokens for heads, gathers the positions, and calls the function with (B, H / P, N, D), the positions of the whole
sequence and no mask.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import zebra
from zebra.model.attention import NAME, zebra_attention

TOKENS = 24


def by_heads(parts: int) -> Callable[..., tuple[Tensor, None]]:
    """The attention function as the processes of DeepSpeed's wrapper call it, one after the other."""

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        heads = [tensor.chunk(parts, dim=1) for tensor in (query, key, value)]
        outputs = [zebra_attention(module, *own, None, **kwargs)[0] for own in zip(*heads, strict=True)]
        return torch.cat(outputs, dim=2), None

    return attention


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("stripes", ["GL:5", "GL:5+2"])
def test_a_part_of_the_heads_attends_as_it_does_among_all(
    stripes: str, packed: bool, checkpoints: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zebra.load(checkpoints("llama", num_key_value_heads=2), stripes=stripes, dtype=torch.float32)
    ids = torch.randint(3, 97, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(TOKENS).expand(2, -1) % (9 if packed else TOKENS)

    def logits_and_gradients() -> list[Tensor]:
        model.zero_grad()
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        logits.square().sum().backward()
        return [logits.detach(), *(p.grad.clone() for p in model.parameters())]

    whole = logits_and_gradients()
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, NAME, by_heads(2))
    for one, other in zip(logits_and_gradients(), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * other.abs().max().item())
