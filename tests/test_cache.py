"""The bounded cache: what it holds, in tokens and in bytes, after every way to fill it."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tokens
from transformers import DynamicCache

import zebra
from zebra.model.cache import StripedCache
from zebra.model.cache_layers import GrowingLayer, TrimmedSlidingLayer
from zebra.model.opaque_layers import SelfExtendLayer

WINDOW = 9
TOKEN = 2 * 2 * 8 * 4
"""Bytes of one token's key and value in one layer: 2 tensors, 2 heads of 8 float32 numbers."""


@pytest.fixture
def model(checkpoints: Callable[..., Path]) -> Any:
    return zebra.load(checkpoints("llama"), stripes=f"GLLL:{WINDOW}")


@torch.no_grad()
def fill(model: Any, cache: DynamicCache, *parts: int) -> DynamicCache:
    for n in parts:
        model(tokens(1, n), past_key_values=cache, use_cache=True)
    return cache


@pytest.mark.parametrize(
    "parts", [(3,), (8,), (9,), (200,), (100, 1), (1,) * 30, (7,) * 20, (14,), (16, 5), (200, 1, 1, 50)], ids=str
)
def test_a_local_layer_holds_the_window_less_one(model: Any, parts: tuple[int, ...]) -> None:
    cache = fill(model, StripedCache(model.config), *parts)
    n = sum(parts)
    for i, layer in enumerate(cache.layers):
        held = min(n, WINDOW - 1) if i % 4 else n
        assert layer.keys.shape[-2] == layer.values.shape[-2] == held
        assert layer.get_seq_length() == n
        for states in (layer.keys, layer.values):
            assert states.untyped_storage().nbytes() <= (held + max(1, held // 4)) * TOKEN // 2


def test_a_mask_without_the_cached_tokens_is_rejected(model: Any) -> None:
    """It used to put the query at the first key, the only one it saw; in a global and a local layer."""
    cache = fill(model, StripedCache(model.config), 30)
    for mask in (torch.ones(1, 1), torch.ones(1, 30)):
        with pytest.raises(
            zebra.ZebraError, match=r"an entry for each token, including cached ones: 31 here; got (1|30)\."
        ):
            model(tokens(1, 1), attention_mask=mask, past_key_values=cache, use_cache=True)


def test_storage_is_bounded_where_that_of_transformers_is_not(model: Any) -> None:
    """Law 7 for memory: local layers stay constant while the text doubles; the stock cache's grow."""
    ours = [fill(model, StripedCache(model.config), n).kv_bytes() for n in (500, 1000)]
    assert ours[1] - ours[0] == 2 * 500 * TOKEN
    stock = fill(model, DynamicCache(config=model.config), 1000)
    assert sum(layer.keys.untyped_storage().nbytes() for layer in stock.layers) > 2 * ours[1] // 2


def test_a_window_of_one_holds_nothing(checkpoints: Callable[..., Path]) -> None:
    model = zebra.load(checkpoints("qwen2"), stripes="GL:1")
    cache = fill(model, StripedCache(model.config), 5, 1, 1)
    assert [layer.keys.shape[-2] for layer in cache.layers] == [7, 0, 7, 0, 7]


@torch.no_grad()
def grow(layer: Any, parts: list[int], batch: int = 1) -> None:
    generator = torch.Generator().manual_seed(1)
    for n in parts:
        layer.update(*(torch.randn(batch, 2, n, 8, generator=generator) for _ in range(2)))


@torch.no_grad()
@pytest.mark.parametrize("window", [33, 64, 65])
def test_slack_is_a_quarter_of_what_is_kept(window: int) -> None:
    """It is not a quarter of the kept tokens plus the new one, which is dropped again."""
    local, near = TrimmedSlidingLayer(window), SelfExtendLayer(window)
    for _ in range(3 * window):
        states = torch.randn(1, 2, 1, 8)
        local.update(states, states)
        near.update(states, states)[0].layer.write(states, states)
        for held in (local.keys, local.values, near.near):
            tokens = held.untyped_storage().nbytes() // (2 * 8 * 4)
            assert held.shape[2] <= tokens <= max(held.shape[2] + 1, 1.25 * held.shape[2])


@pytest.mark.parametrize("parts", [[100] + [1] * 300, [7] * 60, [40, 1, 1, 40, 1, 3] * 5, [1] * 50], ids=str)
@pytest.mark.parametrize("kind", [GrowingLayer, TrimmedSlidingLayer])
def test_layers_hold_what_those_of_transformers_hold_and_grow_by_a_quarter(kind: Any, parts: list[int]) -> None:
    arguments = () if kind is GrowingLayer else (WINDOW,)
    ours, stock = kind(*arguments), kind.__base__(*arguments)
    addresses = []
    for i in range(len(parts)):
        for layer in (ours, stock):
            grow(layer, parts[i : i + 1])
        assert torch.equal(ours.keys, stock.keys)
        assert torch.equal(ours.values, stock.values)
        for states in (ours.keys, ours.values):
            live = states.shape[-2] if kind is GrowingLayer else WINDOW - 1 + parts[i]
            assert states.untyped_storage().nbytes() <= max(1.25 * live, 2 * states.shape[-2]) * TOKEN // 2
        addresses.append(ours.keys.untyped_storage().data_ptr())
    moves = sum(a != b for a, b in itertools.pairwise(addresses))
    if parts[-1] == 1 and kind is GrowingLayer:
        assert moves < 30  # not once for each token
    seen = [layer.update(*torch.ones(2, 1, 2, 3, 8)) for layer in (ours, stock)]
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


@pytest.mark.parametrize("kind", [GrowingLayer, TrimmedSlidingLayer])
def test_two_caches_that_share_a_beginning_do_not_write_into_each_other(kind: Any) -> None:
    one, two = (kind(*(() if kind is GrowingLayer else (WINDOW,))) for _ in range(2))
    grow(one, [20, 1])
    two.lazy_initialization(one.keys, one.values)
    two.keys, two.values, two.cumulative_length = one.keys, one.values, 21
    again = copy.deepcopy(one)
    for layer, value in ((one, 1.0), (two, 2.0), (again, 3.0), (one, 1.0)):
        layer.update(*torch.full((2, 1, 2, 1, 8), value))
    assert (one.keys[:, :, -2:] == 1).all()
    assert (two.keys[:, :, -1:] == 2).all()
    assert (again.keys[:, :, -1:] == 3).all()
    taken = one.keys
    one.crop(-1) if kind is GrowingLayer else None
    one.update(*torch.full((2, 1, 2, 1, 8), 4.0))
    assert (taken[:, :, -2:] == 1).all()
    assert pickle.loads(pickle.dumps(one)).keys.equal(one.keys)


def test_a_cache_outlives_inference_mode(model: Any) -> None:
    """Tokens that were cached inside inference mode can be continued outside."""
    cache, parts = StripedCache(model.config), (20, 1, 1, 1)
    with torch.inference_mode():
        for n in parts:
            model(tokens(1, n), past_key_values=cache, use_cache=True)
    expected = fill(model, DynamicCache(config=model.config), *parts, 1, 1)
    fill(model, cache, 1, 1)
    for ours, stock in zip(cache.layers, expected.layers, strict=True):
        torch.testing.assert_close(ours.keys, stock.keys)


def test_what_does_not_fit_is_promoted_or_rejected_as_in_transformers() -> None:
    layer = GrowingLayer()
    layer.update(*torch.zeros(2, 3, 2, 5, 8, dtype=torch.bfloat16))
    assert layer.update(*torch.ones(2, 3, 2, 1, 8))[0].dtype == torch.float32
    with pytest.raises(RuntimeError):
        layer.update(*torch.ones(2, 1, 2, 1, 8))


@pytest.mark.parametrize("only", ["", "q_proj"])
def test_gradients_flow_through_the_cache(model: Any, only: str) -> None:
    """A chunk's loss reaches the chunk before it, as with the stock cache; also where no key needs a gradient."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(only in name)
    output = []
    for cache in (StripedCache(model.config), DynamicCache(config=model.config)):
        model.zero_grad()
        losses = [
            model(tokens(1, n), past_key_values=cache, use_cache=True).logits.square().sum() for n in (20, 1, 1, 7)
        ]
        sum(losses).backward()
        output.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    torch.testing.assert_close(*output)


def test_beams_and_selection_move_rows(model: Any) -> None:
    cache = StripedCache(model.config)
    fill(model, cache, 20)
    cache.batch_repeat_interleave(3)
    assert {layer.keys.shape[0] for layer in cache.layers} == {3}
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    cache.batch_select_indices(torch.tensor([1]))
    assert {layer.keys.shape[0] for layer in cache.layers} == {1}


def test_crop_takes_back_what_was_recorded(model: Any) -> None:
    """Assisted decoding appends draft tokens, then crops the rejected ones."""
    cache, plain = StripedCache(model.config), StripedCache(model.config)
    fill(model, cache, 20)
    for layer in cache.layers:
        if isinstance(layer, TrimmedSlidingLayer):
            layer.activate_past_recording()
    fill(model, cache, 5)
    cache.crop(-5)
    fill(model, plain, 20)
    for ours, expected in zip(cache.layers, plain.layers, strict=True):
        assert torch.equal(ours.keys, expected.keys)
        assert ours.get_seq_length() == 20


def test_our_layers_do_not_replace_those_of_transformers(model: Any) -> None:
    """A `_layer_type` on a layer of ours would change transformers for the whole process."""
    StripedCache(model.config)
    assert all(type(layer) is not TrimmedSlidingLayer for layer in DynamicCache(config=model.config).layers)
