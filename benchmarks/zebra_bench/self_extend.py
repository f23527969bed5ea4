"""Self-Extend, plain causal attention by the same kernels, and Self-Extend as its authors compute it.

prefill attention   attention of one layer over a whole text, from queries and keys as the model hands them over
decode attention    the same for one token after a cached text, with the cache's own work
authors             the prefill again, with the authors' way: its gigabytes of scores slow down whatever runs next
decode              one token by a whole model
chunks              the peak memory of a process that reads a text in chunks
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from zebra.kernels import Mask
from zebra.measure import relative_error
from zebra.model.attention import NAME, zebra_attention
from zebra.model.cache_layers import GrowingLayer
from zebra.model.load import read_device, read_dtype
from zebra.model.opaque_layers import SelfExtendLayer
from zebra.model.override import set_override
from zebra.model.self_extend import (
    AttentionLayer,
    GroupedRotation,
    SelfExtendAttention,
    bounded_cache,
    rotate,
    rotation_between,
    set_self_extend,
)
from zebra.model.self_extend.formula import FormulaAttention, formula_logits
from zebra.plan.devices import Device
from zebra.positions import SelfExtend, grouped_key, grouped_query
from zebra_bench.configs import SelfExtendConfig
from zebra_bench.generation import decoding_step, filled
from zebra_bench.models import llama_config, plan_run, random_model, random_tokens, sizes_in_words
from zebra_bench.peers import repeated, too_large
from zebra_bench.runner import Benchmark, Call, Variant, Workload

STEPS = 32
"""Tokens that a turn of decode makes; the time is that of one."""

_GATE_WINDOW = 256
"""The largest neighbour window of the gate, whose formula forms matrices of all pairs."""


def benchmark(config: SelfExtendConfig) -> Benchmark:
    """The same inputs and weights with Self-Extend and without."""
    setting = SelfExtend.parse(config.self_extend)
    variants = [
        Variant(name=name, layout="full", workloads=tuple(_workloads(config, one)), gate=partial(_error, config, one))
        for name, one in (("zebra, Self-Extend", setting), ("zebra, plain", None))
    ]
    left_out: tuple[str, ...] = ()
    if config.workload == "authors":
        if reason := too_large(config.batch_size * config.length**2, read_device(config.device)):
            left_out = (f"two score matrices: {reason}",)
        else:
            variants.append(_authors(config, setting))
    elif config.workload is None:
        left_out = ("two score matrices, as in the authors' code: minutes a turn; ask for the workload authors",)
    million = plan_run(config, None, "prefill").decoder.num_parameters / 1e6
    sizes = f"{million:.1f}M parameters, {sizes_in_words(config)}, vocabulary {config.vocab_size}"
    return Benchmark(task=f"self-extend {setting}: {sizes}", variants=tuple(variants), left_out=left_out)


def _workloads(config: SelfExtendConfig, setting: SelfExtend | None) -> Iterator[Workload]:
    if config.workload in (None, "attention", "authors"):
        yield Workload(
            prepare=partial(_prepare_attention, config, setting),
            suffix="_prefill_attention",
            tokens=config.batch_size * config.length,
            planned=partial(_layer_seconds, config, setting, "prefill"),
        )
    if config.workload in (None, "attention"):
        yield Workload(
            prepare=partial(_prepare_token, config, setting),
            suffix="_decode_attention",
            calls=STEPS,
            tokens=config.batch_size,
            planned=partial(_layer_seconds, config, setting, "decode"),
        )
    if config.workload in (None, "decode"):
        yield Workload(
            prepare=partial(_prepare_decode, config, setting),
            suffix="_decode",
            calls=STEPS,
            tokens=config.batch_size,
            planned=partial(_model_seconds, config, setting),
        )
    if config.memory and config.workload in (None, "chunks"):
        yield Workload(prepare=partial(_prepare_chunks, config, setting), suffix="_chunks", whole_process=True)


def _authors(config: SelfExtendConfig, setting: SelfExtend) -> Variant:
    """As many heads at a time as memory holds."""
    scores, device = config.batch_size * config.length**2, read_device(config.device)
    divisors = [n for n in range(1, config.heads + 1) if config.heads % n == 0]
    heads = max(n for n in divisors if not too_large(n * scores, device))
    workload = Workload(
        prepare=partial(_prepare_two_matrices, config, setting, heads),
        prepared_is_extra=True,
        suffix="_prefill_attention",
        planned=partial(_layer_seconds, config, setting, "prefill"),
    )
    some = "" if heads == config.heads else f", {heads} of {config.heads} heads at a time"
    return Variant(name=f"two score matrices{some}", layout="full", workloads=(workload,))


def frequencies(config: SelfExtendConfig) -> Tensor:
    """Of a rope of base 10,000: (D / 2,)."""
    pairs = torch.arange(0, config.head_dim, 2, device=read_device(config.device))
    return 10000.0 ** -(pairs.float() / config.head_dim)


def _module(config: SelfExtendConfig, setting: SelfExtend | None) -> Any:
    """A placeholder for a layer's attention module, overridden by Self-Extend."""
    module: Any = nn.Module()
    if setting is not None:
        rope = nn.Module()
        rope.register_buffer("inv_freq", frequencies(config))
        rotation = GroupedRotation(rope, "inv_freq", setting, config.length)
        set_override(module, SelfExtendAttention(rotation, 0, first=True))
    return module


def _inputs(config: SelfExtendConfig, length: int) -> list[Tensor]:
    """q, k, v, each (B, heads, T, D); random ones count as rotated."""
    device, dtype = read_device(config.device), read_dtype(config.dtype)
    torch.manual_seed(config.seed)
    heads = config.heads, config.kv_heads, config.kv_heads
    return [torch.randn(config.batch_size, h, length, config.head_dim, device=device, dtype=dtype) for h in heads]


def _positions(start: int, length: int, device: torch.device) -> Tensor:
    return torch.arange(start, start + length, device=device)[None]


def _prepare_attention(config: SelfExtendConfig, setting: SelfExtend | None) -> Call:
    module, (q, k, v) = _module(config, setting), _inputs(config, config.length)
    positions = _positions(0, config.length, q.device)

    @torch.no_grad()
    def run() -> list[Tensor]:
        return [zebra_attention(module, q, k, v, None, position_ids=positions)[0]]

    return run


def _cache_layer(setting: SelfExtend | None) -> DynamicLayer:
    return GrowingLayer() if setting is None else SelfExtendLayer(setting.window)


def _through(module: Any, layer: DynamicLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """New tokens through the cache into the registered function, as in a model: (B, T, H, D)."""
    keys, values = layer.update(k, v)
    positions = _positions(values.shape[2] - q.shape[2], q.shape[2], q.device)
    return zebra_attention(module, q, keys, values, None, position_ids=positions)[0]


def _prepare_token(config: SelfExtendConfig, setting: SelfExtend | None) -> Call:
    """Each turn continues where the last one ended, so the cache grows by `STEPS`, very little of its length."""
    module, (q, k, v) = _module(config, setting), _inputs(config, config.length + 1)
    layer = _cache_layer(setting)
    with torch.no_grad():
        _through(module, layer, q[:, :, :1], k[:, :, :-1], v[:, :, :-1])
    last = [states[:, :, -1:].clone() for states in (q, k, v)]

    @torch.no_grad()
    def step() -> list[Tensor]:
        return [[_through(module, layer, *last) for _ in range(STEPS)][-1]]

    step()  # makes room
    return step


def _model(config: SelfExtendConfig, setting: SelfExtend | None) -> Any:
    model = random_model(config, llama_config(config, None), NAME)
    if setting is not None:
        set_self_extend(model, setting)
    return model


def _prepare_decode(config: SelfExtendConfig, setting: SelfExtend | None) -> Call:
    model, tokens = _model(config, setting), random_tokens(config, 1)
    step = decoding_step(model, tokens, filled(config, bounded_cache(model)), STEPS)
    step()  # makes room
    return step


def _prepare_chunks(config: SelfExtendConfig, setting: SelfExtend | None) -> Call:
    model, tokens = _model(config, setting), random_tokens(config, config.length)
    lengths = [config.chunk] * math.ceil(config.length / config.chunk)
    return lambda: [_in_chunks(model, tokens, lengths)[-1]]


@torch.no_grad()
def _in_chunks(model: Any, tokens: Tensor, lengths: list[int]) -> list[Tensor]:
    """The last logits of each chunk, read one after another into a cache."""
    cache, ends = bounded_cache(model), torch.tensor(lengths).cumsum(0)[:-1]
    chunks = tokens.tensor_split(ends, dim=1)
    return [model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1).logits for chunk in chunks]


def _prepare_two_matrices(config: SelfExtendConfig, setting: SelfExtend, heads: int) -> Call:
    """The additive causal mask is that of transformers, once for all layers."""
    q, k, v = _inputs(config, config.length)
    mask = torch.full((config.length, config.length), torch.finfo(q.dtype).min, device=q.device)
    mask = mask.to(q.dtype).triu_(1)

    @torch.no_grad()
    def run() -> list[Tensor]:
        return [two_matrices(q, k, v, mask, setting, frequencies(config), heads)]

    return run


def two_matrices(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, setting: SelfExtend, frequencies: Tensor, heads: int
) -> Tensor:
    """Self-Extend as in its authors' code for eager attention, over `heads` query heads at a time.

    It forms the scores of all pairs at exact positions and again at grouped ones, adds the mask to both, chooses one
    of the two for each pair, and takes the softmax in float32. q (B, H, T, D), k and v (B, K, T, D) are rotated.
    """
    length, window = q.shape[2], setting.window
    positions = _positions(0, length, q.device)
    grouped_q, grouped_k = grouped_query(positions, setting.group, window), grouped_key(positions, setting.group)
    k, v = repeated(q, k), repeated(q, v)
    far_q = rotate(q, rotation_between(frequencies, positions, grouped_q, torch.float32))
    far_k = rotate(k, rotation_between(frequencies, positions, grouped_k, torch.float32))
    outputs = []
    for i in range(0, q.shape[1], heads):
        some = slice(i, i + heads)
        near_scores = q[:, some] @ k[:, some].mT * q.shape[3] ** -0.5 + mask
        far_scores = far_q[:, some] @ far_k[:, some].mT * q.shape[3] ** -0.5 + mask
        near = torch.ones(length, length, device=q.device)
        near[window:, :-window] -= torch.ones(length - window, length - window, device=q.device).tril()
        scores = torch.where(near.bool(), near_scores, far_scores)
        outputs.append(scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype) @ v[:, some])
    return torch.cat(outputs, dim=1)


@torch.no_grad()
def _error(config: SelfExtendConfig, setting: SelfExtend | None) -> float:
    """One layer at once and in chunks, and a small model in chunks, against the formula of all pairs."""
    window = min(_GATE_WINDOW, SelfExtend.parse(config.self_extend).window)
    setting = None if setting is None else replace(setting, window=window)
    n = 2 * window + 67
    small = replace(config, length=n, batch_size=1, self_extend=f"1:{window}")
    small = replace(small, layers=min(config.layers, 2), vocab_size=min(config.vocab_size, 1000))
    return max(_layer_error(small, setting), _model_error(small, setting))


def _chunk_lengths(n: int) -> list[int]:
    return [n // 2, n - n // 2 - 2, 1, 1]


def _layer_error(config: SelfExtendConfig, setting: SelfExtend | None) -> float:
    tensors = _inputs(config, config.length)
    q, k, v = (states[:, : max(1, states.shape[1] * 2 // config.heads)] for states in tensors)
    rope, positions = frequencies(config), _positions(0, config.length, q.device)
    start = torch.zeros_like(positions)
    formula = FormulaAttention(AttentionLayer(None, None, 0, "rope", rope), setting, config.length)
    expected = formula.attend(None, start, q, k, v, Mask())[0].transpose(1, 2)
    q, k = (rotate(states, rotation_between(rope, start, positions, torch.float32)) for states in (q, k))
    module, layer = _module(config, setting), _cache_layer(setting)
    whole = zebra_attention(module, q, k, v, None, position_ids=positions)[0]
    chunks = zip(*(states.split(_chunk_lengths(config.length), dim=2) for states in (q, k, v)), strict=True)
    chunked = torch.cat([_through(module, layer, *chunk) for chunk in chunks], dim=1)
    return relative_error([whole, chunked], [expected, expected])


def _model_error(config: SelfExtendConfig, setting: SelfExtend | None) -> float:
    model, tokens = _model(config, setting), random_tokens(config, config.length)
    lengths = _chunk_lengths(config.length)
    logits = torch.cat(_in_chunks(model, tokens, lengths), dim=1)
    last = torch.tensor(lengths, device=tokens.device).cumsum(0) - 1
    with formula_logits(model, setting) as formula:
        expected = formula(tokens, logits_to_keep=last)
    return relative_error([logits], [expected])


def _seconds(config: SelfExtendConfig, setting: SelfExtend | None, phase: str, device: Device) -> dict[str, float]:
    return device.seconds(replace(plan_run(config, None, phase), self_extend=setting))


def _layer_seconds(config: SelfExtendConfig, setting: SelfExtend | None, phase: str, device: Device) -> float:
    """The plan's seconds of one layer's attention."""
    return _seconds(config, setting, phase, device)["attention"] / config.layers


def _model_seconds(config: SelfExtendConfig, setting: SelfExtend | None, device: Device) -> float:
    return sum(_seconds(config, setting, "decode", device).values())
