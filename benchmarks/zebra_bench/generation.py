"""One token after a cached text: our cache and attention, and those of transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from zebra.measure import relative_error
from zebra.model.attention import NAME
from zebra.model.cache import StripedCache
from zebra.model.load import read_device, read_dtype
from zebra.model.opaque_layers import PendingKeys
from zebra.stripes import Stripes
from zebra_bench.configs import DecodeConfig, ModelConfig
from zebra_bench.models import llama_config, plan_run, planned_seconds, random_model, random_tokens, sizes_in_words
from zebra_bench.runner import Benchmark, Call, Variant, Workload

STEPS = 8
"""Tokens that a turn of decode makes; the time is that of one."""

MakeCache = Callable[[Any], Any]


def benchmark(config: DecodeConfig) -> Benchmark:
    """The same weights with our cache and attention, with those of transformers, and with full attention there."""
    stripes = Stripes.parse(config.stripes)

    def variant(name: str, layout: Stripes | None, attention: str, cache: MakeCache) -> Variant:
        workload = Workload(
            prepare=partial(_decode, config, layout, attention, cache),
            calls=STEPS,
            tokens=config.batch_size,
            planned=planned_seconds(plan_run(config, layout, "decode")),
        )
        gate = partial(_error, config) if attention == NAME else None
        return Variant(name=name, layout=str(layout or "full"), workloads=(workload,), gate=gate)

    variants = (
        variant("zebra", stripes, NAME, StripedCache),
        variant("transformers, sdpa", stripes, "sdpa", _dynamic_cache),
        variant("transformers, sdpa, full attention", None, "sdpa", _dynamic_cache),
    )
    million = plan_run(config, stripes, "prefill").decoder.num_parameters / 1e6
    task = f"decode of a token: {million:.1f}M parameters, {sizes_in_words(config)}, vocabulary {config.vocab_size}"
    return Benchmark(task=task, variants=variants)


def _dynamic_cache(model_config: Any) -> Any:
    return DynamicCache(config=model_config)


def _decode(config: DecodeConfig, layout: Stripes | None, attention: str, make_cache: MakeCache) -> Call:
    """Each turn continues where the last one ended, so the cache grows by `STEPS`, very little of its length."""
    model_config = llama_config(config, layout)
    model, tokens = random_model(config, model_config, attention), random_tokens(config, 1)
    step = decoding_step(model, tokens, filled(config, make_cache(model_config)), STEPS)
    step()  # only now does transformers free the storage of its local layers, and ours makes room
    return step


def decoding_step(model: Any, tokens: Tensor, cache: Any, steps: int) -> Call:
    """A call that decodes the same token `steps` times into the cache; its output is the last logits."""

    @torch.no_grad()
    def step() -> list[Tensor]:
        for _ in range(steps):
            output = model(tokens, past_key_values=cache, use_cache=True)
        return [output.logits]

    return step


def filled(config: ModelConfig, cache: Any) -> Any:
    """The cache with `length` random tokens."""
    torch.manual_seed(config.seed)
    states = torch.empty(
        (config.batch_size, config.kv_heads, config.length, config.head_dim),
        device=read_device(config.device),
        dtype=read_dtype(config.dtype),
    )
    return fill(cache, config.layers, states)


@torch.no_grad()
def fill(cache: Any, layers: int, states: Tensor) -> Any:
    """Put random keys and values like `states` (B, K, S, D) into a cache as a prefill would, without computing it."""
    for layer in range(layers):
        keys, _ = cache.update(torch.randn_like(states), torch.randn_like(states), layer)
        if isinstance(keys, PendingKeys):
            keys.layer.write(keys.states, keys.states)
    return cache


@torch.no_grad()
def _error(config: DecodeConfig) -> float:
    """Logits of a prefill's last token and of three decoded ones, against eager attention without a cache."""
    stripes = Stripes.parse(config.stripes)
    layers, vocab_size = min(config.layers, 4), min(config.vocab_size, 1000)
    small = replace(config, length=stripes.window + 257, batch_size=1, layers=layers, vocab_size=vocab_size)
    model_config, tokens = llama_config(small, stripes), random_tokens(small, small.length)
    model, cache = random_model(small, model_config, NAME), StripedCache(model_config)
    chunks = tokens.tensor_split([small.length - i for i in (3, 2, 1)], dim=1)
    logits = [model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1).logits for chunk in chunks]
    expected = random_model(small, model_config, "eager")(tokens, logits_to_keep=4, use_cache=False).logits
    return relative_error([torch.cat(logits, dim=1)], [expected])
