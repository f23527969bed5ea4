"""Ulysses: each process has all tokens of a part of the heads. DeepSpeed has it; accelerate starts it by `sp_size`.

DeepSpeed (0.19) puts a wrapper in the place of the attention function that the model's config names. It exchanges
tokens for heads, gathers the positions, and calls the function with (B, H / P, N, D), the positions of the whole
sequence and no mask.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
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


# DeepSpeed itself


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize("engine", ["ulysses", "zero"])
def test_deepspeed_on_two_processes(engine: str, checkpoints: Callable[..., Path]) -> None:
    """On CPUs by gloo; its first start compiles an operator, which takes a minute."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, __file__, engine, str(checkpoints("llama", num_key_value_heads=2))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"{engine} equals one process") == 2


def run_process(engine: str, folder: str) -> None:
    """One of the processes: its logits, or its losses of three steps, are those of one."""
    import deepspeed
    import torch.distributed as dist

    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    model = zebra.load(folder, stripes="GL:5", dtype=torch.float32)
    ids = torch.randint(3, 97, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "position_ids": torch.arange(TOKENS)[None]}
    if engine == "ulysses":
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

        expected = model(**batch, use_cache=False).logits.chunk(size, dim=1)[rank]
        UlyssesSPAttentionHF.register_with_transformers(
            model, core_attn_implementation=NAME, sequence_parallel_size=size, micro_batch_size=1
        )
        shard = {name: tensor.chunk(size, dim=1)[rank] for name, tensor in batch.items()}
        torch.testing.assert_close(model(**shard, use_cache=False).logits, expected)
    else:
        single = zebra.load(folder, stripes="GL:5", dtype=torch.float32)
        optimizer = torch.optim.AdamW(single.parameters(), lr=1e-3, weight_decay=0.0)
        adamw = {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.0, "torch_adam": True}}
        settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, "optimizer": adamw}
        settings["gradient_clipping"] = 0.0  # its default is 1
        sharded, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
        for _ in range(3):
            expected = single(**batch, labels=ids, use_cache=False).loss
            loss = sharded(**batch, labels=ids, use_cache=False).loss
            torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
            expected.backward()
            optimizer.step()
            optimizer.zero_grad()
            sharded.backward(loss)
            sharded.step()
    print(f"{engine} equals one process", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    run_process(*sys.argv[1:])
