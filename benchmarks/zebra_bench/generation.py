"""Reading a text into a cache, and one token after it: our cache and attention against the host's."""

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
from zebra.model.cache import PendingKeys, StripedCache
from zebra.model.load import read_device, read_dtype
from zebra.stripes import Stripes
from zebra_bench.models import config, named, planned, random_model, random_tokens
from zebra_bench.pairing import Call, Case, Variant, Work
from zebra_bench.subjects import Decode, Extended, Prefill

STEPS = 8
"""Tokens that a turn of decode makes; the time is that of one."""

Sizes = Prefill | Decode
MakeCache = Callable[[Any], Any]


def _hosts(made: Any) -> Any:
    return DynamicCache(config=made)


def case(sizes: Sizes) -> Case:
    """The same weights with our cache and attention, with the host's, and with the host's in a dense layout."""
    stripes = Stripes.parse(sizes.stripes)
    decoding = isinstance(sizes, Decode)
    prepare = _decode if decoding else _prefill

    def variant(name: str, layout: Stripes | None, attention: str, cache: MakeCache) -> Variant:
        run = planned(sizes, config(sizes, layout), layout, "decode" if decoding else "prefill")
        work = Work(
            prepare=partial(prepare, sizes, layout, attention, cache),
            calls=STEPS if decoding else 1,
            tokens=sizes.batch * (1 if decoding else sizes.length),
            planned=lambda device: sum(device.seconds(run).values()),
        )
        gate = partial(_error, sizes) if attention == NAME else None
        return Variant(name=name, layout=str(layout or "full"), works=(work,), gate=gate)

    variants = (
        variant("zebra", stripes, NAME, StripedCache),
        variant("transformers, sdpa", stripes, "sdpa", _hosts),
        variant("transformers, sdpa, dense", None, "sdpa", _hosts),
    )
    million = planned(sizes, config(sizes, stripes), stripes, "prefill").decoder.size / 1e6
    what = "decode of a token" if decoding else "prefill"
    return Case(task=f"{what}: {million:.1f}M parameters, {named(sizes)}, {sizes.words} words", variants=variants)


def _prefill(sizes: Sizes, layout: Stripes | None, attention: str, cache: MakeCache) -> Call:
    made = config(sizes, layout)
    model, tokens = random_model(sizes, made, attention), random_tokens(sizes, sizes.length)

    @torch.no_grad()
    def read() -> list[Tensor]:
        output = model(tokens, past_key_values=cache(made), use_cache=True, logits_to_keep=1)
        return [output.logits]

    return read


def _decode(sizes: Sizes, layout: Stripes | None, attention: str, cache: MakeCache) -> Call:
    """Each turn goes on where the last one ended, so the cache grows by `STEPS`, a trifle of its length."""
    made = config(sizes, layout)
    model, tokens = random_model(sizes, made, attention), random_tokens(sizes, 1)
    held = filled(sizes, cache(made), model.config.num_hidden_layers)

    @torch.no_grad()
    def step() -> list[Tensor]:
        for _ in range(STEPS):
            output = model(tokens, past_key_values=held, use_cache=True)
        return [output.logits]

    step()  # the host lets go of the storage of its local layers only now, and ours makes its room
    return step


def filled(sizes: Sizes | Extended, cache: Any, layers: int) -> Any:
    """A cache of `length` random tokens, put there as a prefill would, without computing it."""
    torch.manual_seed(sizes.seed)
    shape = sizes.batch, sizes.kv_heads, sizes.length, sizes.head_size
    device, dtype = read_device(sizes.device), read_dtype(sizes.dtype)
    with torch.no_grad():
        for layer in range(layers):
            held, _ = cache.update(*(torch.randn(shape, device=device, dtype=dtype) for _ in range(2)), layer)
            if isinstance(held, PendingKeys):
                held.write(held.states)
    return cache


@torch.no_grad()
def _error(sizes: Sizes) -> float:
    """Logits of a prefill's last token and of three decoded ones, against the host's eager without a cache."""
    window = Stripes.parse(sizes.stripes).window
    small = replace(sizes, length=window + 257, batch=1, layers=min(sizes.layers, 4), words=min(sizes.words, 1000))
    made, tokens = config(small, Stripes.parse(sizes.stripes)), random_tokens(small, small.length)
    model, cache = random_model(small, made, NAME), StripedCache(made)
    parts = tokens.tensor_split([small.length - i for i in (3, 2, 1)], dim=1)
    found = [model(part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits for part in parts]
    wanted = random_model(small, made, "eager")(tokens, logits_to_keep=4, use_cache=False).logits
    return relative_error([torch.cat(found, dim=1)], [wanted])
