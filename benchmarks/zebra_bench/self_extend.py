"""Self-Extend beside plain causal attention by the same kernels, and beside its authors' way of computing it.

prefill attention   a layer's attention over a whole text, from queries and keys as the host hands them
decode attention    the same for one token after a cached text, the cache's own work included
authors             the prefill again, beside the authors' way: its gigabytes of scores slow down whatever runs next
decode              one token by a whole model
chunks              the peak of a whole process that reads a text in chunks
"""

from __future__ import annotations

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
from zebra.model.cache import GrowingLayer, SelfExtendLayer
from zebra.model.load import read_device, read_dtype
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
from zebra_bench.generation import filled
from zebra_bench.models import config, named, planned, random_model, random_tokens
from zebra_bench.pairing import Call, Case, Variant, Work
from zebra_bench.peers import repeated, too_large
from zebra_bench.subjects import Extended

STEPS = 32
"""Tokens that a turn of decode makes; the time is that of one."""

_LOCAL = 256
"""The neighbour window of the gate, at most: the formula's matrices are dense."""


def case(sizes: Extended) -> Case:
    """The same inputs and weights with Self-Extend and without."""
    setting = SelfExtend.parse(sizes.self_extend)
    variants = [
        Variant(name=name, layout="full", works=tuple(_works(sizes, one)), gate=partial(_error, sizes, one))
        for name, one in (("zebra, Self-Extend", setting), ("zebra, plain", None))
    ]
    left_out = []
    if sizes.work == "authors":
        scores = sizes.batch * sizes.length**2
        fits = [n for n in range(1, sizes.heads + 1) if sizes.heads % n == 0]
        fits = [n for n in fits if not too_large(n * scores, read_device(sizes.device))]
        if fits:
            heads = "" if fits[-1] == sizes.heads else f", {fits[-1]} of {sizes.heads} heads at a time"
            seconds = partial(_attention_seconds, sizes, setting)
            prepare = partial(_prepare_two_matrices, sizes, setting, fits[-1])
            works = (Work(prepare=prepare, prepares_extra=True, suffix="_prefill_attention", planned=seconds),)
            variants.append(Variant(name=f"two score matrices{heads}", layout="full", works=works))
        else:
            left_out.append(f"two score matrices: {too_large(scores, read_device(sizes.device))}")
    elif sizes.work is None:
        left_out.append("two score matrices, as the authors' code has them: minutes a turn; ask for --work authors")
    million = planned(sizes, config(sizes, None), None, "prefill").decoder.size / 1e6
    task = f"self-extend {setting}: {million:.1f}M parameters, {named(sizes)}, {sizes.words} words"
    return Case(task=task, variants=tuple(variants), left_out=tuple(left_out))


def _works(sizes: Extended, setting: SelfExtend | None) -> Iterator[Work]:
    seconds = partial(_attention_seconds, sizes, setting)
    if sizes.work in (None, "attention", "authors"):
        prepare = partial(_prepare_attention, sizes, setting)
        yield Work(prepare=prepare, suffix="_prefill_attention", tokens=sizes.batch * sizes.length, planned=seconds)
    if sizes.work in (None, "attention"):
        prepare, seconds = partial(_prepare_token, sizes, setting), partial(seconds, phase="decode")
        yield Work(prepare=prepare, suffix="_decode_attention", calls=STEPS, tokens=sizes.batch, planned=seconds)
    if sizes.work in (None, "decode"):
        seconds, prepare = partial(_model_seconds, sizes, setting), partial(_prepare_decode, sizes, setting)
        yield Work(prepare=prepare, suffix="_decode", calls=STEPS, tokens=sizes.batch, planned=seconds)
    if sizes.memory and sizes.work in (None, "chunks"):
        yield Work(prepare=partial(_prepare_chunks, sizes, setting), suffix="_chunks", whole=True)


def frequencies(sizes: Extended) -> Tensor:
    """A rope's, of base 10,000."""
    size = sizes.head_size
    return 10000.0 ** -(torch.arange(0, size, 2, device=read_device(sizes.device)).float() / size)


def _module(sizes: Extended, setting: SelfExtend | None) -> Any:
    """What stands for a layer's attention module, with Self-Extend hung on it."""
    module: Any = nn.Module()
    if setting is not None:
        set_override(
            module, SelfExtendAttention(GroupedRotation(frequencies(sizes), setting, sizes.length), 0, first=True)
        )
    return module


def _inputs(sizes: Extended, length: int) -> list[Tensor]:
    """q, k, v. Random ones need no rope to be rotated ones."""
    device, dtype = read_device(sizes.device), read_dtype(sizes.dtype)
    torch.manual_seed(sizes.seed)
    heads = sizes.heads, sizes.kv_heads, sizes.kv_heads
    return [torch.randn(sizes.batch, h, length, sizes.head_size, device=device, dtype=dtype) for h in heads]


def _positions(start: int, length: int, device: torch.device) -> Tensor:
    return torch.arange(start, start + length, device=device)[None]


def _prepare_attention(sizes: Extended, setting: SelfExtend | None) -> Call:
    module, (q, k, v) = _module(sizes, setting), _inputs(sizes, sizes.length)
    positions = _positions(0, sizes.length, q.device)

    @torch.no_grad()
    def run() -> list[Tensor]:
        return [zebra_attention(module, q, k, v, None, position_ids=positions)[0]]

    return run


def _cache_layer(setting: SelfExtend | None) -> DynamicLayer:
    return GrowingLayer() if setting is None else SelfExtendLayer(setting.window)


def _through(module: Any, layer: DynamicLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """New tokens through the cache into the registered function, as a host does it: (B, T, H, D)."""
    keys, values = layer.update(k, v)
    positions = _positions(values.shape[2] - q.shape[2], q.shape[2], q.device)
    return zebra_attention(module, q, keys, values, None, position_ids=positions)[0]


def _prepare_token(sizes: Extended, setting: SelfExtend | None) -> Call:
    """Each turn goes on where the last one ended, so the cache grows by `STEPS`, a trifle of its length."""
    module, (q, k, v) = _module(sizes, setting), _inputs(sizes, sizes.length + 1)
    layer = _cache_layer(setting)
    with torch.no_grad():
        _through(module, layer, q[:, :, :1], k[:, :, :-1], v[:, :, :-1])
    last = [states[:, :, -1:].clone() for states in (q, k, v)]

    @torch.no_grad()
    def step() -> list[Tensor]:
        return [[_through(module, layer, *last) for _ in range(STEPS)][-1]]

    step()  # room is made
    return step


def _model(sizes: Extended, setting: SelfExtend | None) -> Any:
    model = random_model(sizes, config(sizes, None), NAME)
    if setting is not None:
        set_self_extend(model, setting)
    return model


def _prepare_decode(sizes: Extended, setting: SelfExtend | None) -> Call:
    model, tokens = _model(sizes, setting), random_tokens(sizes, 1)
    held = filled(sizes, bounded_cache(model), sizes.layers)

    @torch.no_grad()
    def step() -> list[Tensor]:
        for _ in range(STEPS):
            output = model(tokens, past_key_values=held, use_cache=True)
        return [output.logits]

    step()
    return step


def _prepare_chunks(sizes: Extended, setting: SelfExtend | None) -> Call:
    model, tokens = _model(sizes, setting), random_tokens(sizes, sizes.length)
    return lambda: [_in_parts(model, tokens, [sizes.chunk] * -(-sizes.length // sizes.chunk))[-1]]


@torch.no_grad()
def _in_parts(model: Any, tokens: Tensor, lengths: list[int]) -> list[Tensor]:
    """The last logits of each part, read one after another into a cache."""
    cache, edges = bounded_cache(model), torch.tensor(lengths).cumsum(0)[:-1]
    parts = tokens.tensor_split(edges, dim=1)
    return [model(part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits for part in parts]


def _prepare_two_matrices(sizes: Extended, setting: SelfExtend, heads: int) -> Call:
    """The additive causal mask is the host's, once for all layers."""
    q, k, v = _inputs(sizes, sizes.length)
    hidden = torch.full((sizes.length, sizes.length), torch.finfo(q.dtype).min, device=q.device)
    hidden = hidden.to(q.dtype).triu_(1)

    @torch.no_grad()
    def run() -> list[Tensor]:
        return [two_matrices(q, k, v, hidden, setting, frequencies(sizes), heads)]

    return run


def two_matrices(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, setting: SelfExtend, rope: Tensor, heads: int
) -> Tensor:
    """Self-Extend as its authors' code for the eager attention reads, over `heads` query heads at a time.

    The scores of all pairs at exact positions and again at grouped ones, the mask added to both, one of the two chosen
    for each pair, the softmax in float32. Inputs are rotated, as ours are.
    """
    length, window = q.shape[2], setting.window
    places = _positions(0, length, q.device)
    k, v = repeated(q, k), repeated(q, v)
    far_q = rotate(q, rotation_between(rope, places, grouped_query(places, setting.group, window), torch.float32))
    far_k = rotate(k, rotation_between(rope, places, grouped_key(places, setting.group), torch.float32))
    outs = []
    for i in range(0, q.shape[1], heads):
        part = slice(i, i + heads)
        near_scores = q[:, part] @ k[:, part].mT * q.shape[3] ** -0.5 + hidden
        far_scores = far_q[:, part] @ far_k[:, part].mT * q.shape[3] ** -0.5 + hidden
        near = torch.ones(length, length, device=q.device)
        near[window:, :-window] -= torch.ones(length - window, length - window, device=q.device).tril()
        scores = torch.where(near.bool(), near_scores, far_scores)
        outs.append(scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype) @ v[:, part])
    return torch.cat(outs, dim=1)


@torch.no_grad()
def _error(sizes: Extended, setting: SelfExtend | None) -> float:
    """One layer whole and in parts, and a small model in parts, against the dense formula."""
    window = min(_LOCAL, SelfExtend.parse(sizes.self_extend).window)
    setting = None if setting is None else replace(setting, window=window)
    n = 2 * window + 67
    small = replace(sizes, length=n, batch=1, self_extend=f"1:{window}")
    small = replace(small, layers=min(sizes.layers, 2), words=min(sizes.words, 1000))
    return max(_layer_error(small, setting), _model_error(small, setting))


def _cuts(n: int) -> list[int]:
    return [n // 2, n - n // 2 - 2, 1, 1]


def _layer_error(sizes: Extended, setting: SelfExtend | None) -> float:
    tensors = _inputs(sizes, sizes.length)
    q, k, v = (states[:, : max(1, states.shape[1] * 2 // sizes.heads)] for states in tensors)
    rope, positions = frequencies(sizes), _positions(0, sizes.length, q.device)
    start = torch.zeros_like(positions)
    formula = FormulaAttention(AttentionLayer(None, None, 0, "rope", rope), setting, sizes.length)
    wanted = formula.attend(None, start, q, k, v, Mask())[0].transpose(1, 2)
    q, k = (rotate(states, rotation_between(rope, start, positions, torch.float32)) for states in (q, k))
    module, layer = _module(sizes, setting), _cache_layer(setting)
    whole = zebra_attention(module, q, k, v, None, position_ids=positions)[0]
    parts = zip(*(states.split(_cuts(sizes.length), dim=2) for states in (q, k, v)), strict=True)
    found = torch.cat([_through(module, layer, *part) for part in parts], dim=1)
    return relative_error([whole, found], [wanted, wanted])


def _model_error(sizes: Extended, setting: SelfExtend | None) -> float:
    model, tokens = _model(sizes, setting), random_tokens(sizes, sizes.length)
    cuts = _cuts(sizes.length)
    found = torch.cat(_in_parts(model, tokens, cuts), dim=1)
    with formula_logits(model, setting) as formula:
        wanted = formula(tokens, logits_to_keep=torch.tensor(cuts, device=tokens.device).cumsum(0) - 1)
    return relative_error([found], [wanted])


def _seconds(sizes: Extended, setting: SelfExtend | None, device: Device, phase: str) -> dict[str, float]:
    run = planned(sizes, config(sizes, None), None, phase)
    return dict(device.seconds(replace(run, self_extend=setting)))


def _attention_seconds(sizes: Extended, setting: SelfExtend | None, device: Device, phase: str = "prefill") -> float:
    """The plan's, of one layer."""
    return _seconds(sizes, setting, device, phase)["attention"] / sizes.layers


def _model_seconds(sizes: Extended, setting: SelfExtend | None, device: Device) -> float:
    return sum(_seconds(sizes, setting, device, "decode").values())
