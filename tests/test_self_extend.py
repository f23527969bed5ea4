"""Self-Extend in a model: equal to its dense formula however it is run, and rejected where it cannot be."""

from __future__ import annotations

import contextlib
import copy
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STORIES, TEXT, checkpoint_activations, in_parts, logits, off, some, tiny_config, tiny_model, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import zebra
from zebra import SelfExtend, ZebraError
from zebra.evaluate.perplexity import evaluate_perplexity
from zebra.kernels import Mask, attend, only
from zebra.kernels.merging import merge
from zebra.kernels.self_extend import self_extend_attention
from zebra.model import attention
from zebra.model.cache import StripedCache
from zebra.model.opaque_layers import PendingKeys, SelfExtendLayer
from zebra.model.override import get_override
from zebra.model.self_extend import (
    SelfExtendAttention,
    attention_layers,
    bounded_cache,
    rotate,
    rotation_between,
    self_extend_of,
)
from zebra.model.self_extend.formula import formula_logits
from zebra.positions import grouped_key, grouped_query

FAMILIES = ("llama", "qwen3", "gemma2", "phi", "gpt_oss")
SETTING = "3:7"
EXACT = {"rope_parameters": {"rope_type": "default", "rope_theta": 256.0}}
"""With heads of 8 the frequencies are 1, 1/4, 1/16, 1/64: the float32 angles of transformers are exact."""

MakeCheckpoint = Callable[..., Path]


@pytest.fixture
def model(checkpoints: MakeCheckpoint) -> Any:
    return zebra.load(checkpoints("llama"), self_extend=SETTING)


# The two attentions and their merge


def drawn(length: int, heads: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, heads, length, 8), (2, 2, length, 8), (2, heads, length, 8), (2, 2, length, 8), (2, 2, length, 8)]
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


def dense(q: Tensor, k: Tensor, far_q: Tensor, far_k: Tensor, v: Tensor, mask: Mask, window: int) -> tuple[Tensor, ...]:
    """The reference: two full matrices of scores, one softmax."""
    k, far_k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, far_k, v))
    j = torch.arange(v.shape[2])
    i = j[len(j) - q.shape[2] :]
    near = i[:, None] - j < window
    scores = torch.where(near, q @ k.mT, far_q @ far_k.mT) * q.shape[-1] ** -0.5
    visible = mask.visible(i, j)
    scores = scores.masked_fill(~visible, float("-inf"))
    weights = scores.softmax(dim=-1).where(visible.any(dim=-1, keepdim=True), 0.0)
    return weights @ v, scores.logsumexp(dim=-1)


@pytest.mark.parametrize("kernel", [None, "banded", "reference"])
@pytest.mark.parametrize("hidden", ["nothing", "left", "right", "documents"])
def test_near_and_far_are_one_softmax(kernel: str | None, hidden: str) -> None:
    keys = torch.ones(2, 40, dtype=torch.bool)
    keys[1, :25] = hidden != "left"
    keys[1, 30:] = hidden != "right"
    documents = (torch.rand(2, 40, generator=torch.Generator().manual_seed(1)) < 0.1).cumsum(dim=1)
    mask = Mask(documents=documents) if hidden == "documents" else Mask(keys=None if hidden == "nothing" else keys)
    whole_q, k, whole_far_q, far_k, v = drawn(40)
    for queries in [40] if hidden == "documents" else [1, 2, 9, 40]:  # documents come in whole sequences only
        q, far_q = whole_q[:, :, 40 - queries :], whole_far_q[:, :, 40 - queries :]
        for window in (1, 2, 7, 39, 40, 50):
            expected = dense(q, k, far_q, far_k, v, mask, window)
            for near in (k, k[:, :, max(0, 40 - (window - 1 + queries)) :]):
                with contextlib.nullcontext() if kernel is None else only(kernel):
                    out, lse = self_extend_attention(q, near, far_q, far_k, v, mask, window=window, with_lse=True)
                torch.testing.assert_close(out, expected[0], rtol=1e-12, atol=1e-12)
                torch.testing.assert_close(lse, expected[1], rtol=1e-12, atol=1e-12)
            assert self_extend_attention(q, k, far_q, far_k, v, mask, window=window)[1] is None


@pytest.mark.parametrize("hidden", ["nothing", "left", "documents"])
def test_gradients_are_those_of_one_softmax(hidden: str) -> None:
    inputs = [x.requires_grad_() for x in drawn(40)]
    keys = torch.ones(2, 40, dtype=torch.bool)
    keys[1, :25] = False
    documents = (torch.rand(2, 40, generator=torch.Generator().manual_seed(1)) < 0.1).cumsum(dim=1)
    mask = Mask(keys=keys if hidden == "left" else None, documents=documents if hidden == "documents" else None)
    seeds = [torch.randn(2, 4, 40, 8, dtype=torch.float64), torch.randn(2, 4, 40, dtype=torch.float64)]
    gradients = []
    for out, lse in (self_extend_attention(*inputs, mask, window=7, with_lse=True), dense(*inputs, mask, 7)):
        seen = ~lse.isneginf()
        roots = (out * seeds[0]).where(seen.unsqueeze(-1), 0.0).sum() + (lse * seeds[1])[seen].sum()
        gradients.append(torch.autograd.grad(roots, inputs))
    for output, expected in zip(*gradients, strict=True):
        expected = expected.nan_to_num(0.0)  # the oracle's softmax of a row that sees nothing
        torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)


def test_a_row_that_neither_side_sees_stays_empty() -> None:
    out, other = torch.zeros(1, 1, 3, 2, requires_grad=True), torch.ones(1, 1, 3, 2, requires_grad=True)
    none = float("-inf")
    lse = torch.tensor([[[none, 0.0, none]]], requires_grad=True)
    other_lse = torch.tensor([[[none, none, 5.0]]], requires_grad=True)
    merged, both = merge(out, lse, other * torch.tensor([0.0, 1.0, 1.0])[:, None], other_lse)
    assert both is not None
    assert merged[0, 0].tolist() == [[0, 0], [0, 0], [1, 1]]
    assert both[0, 0].tolist() == [none, 0.0, 5.0]
    merged.sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (out, other, lse, other_lse))


# Turning again


@pytest.mark.parametrize("start", [0, 5000, 300_000])
def test_turning_again_equals_turning_once_however_far(start: int) -> None:
    """The rotary of transformers at grouped positions, against the one at true positions rotated by the difference."""
    config = tiny_config("llama", head_dim=16, max_position_embeddings=10**6)
    rotary = tiny_model("llama", head_dim=16, max_position_embeddings=10**6).model.rotary_emb
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    assert config.rope_parameters["rope_type"] == "default"
    x = torch.randn(1, 2, 50, 16)
    positions = torch.arange(start, start + 50)[None]
    for new in (grouped_query(positions, 8, 64), grouped_key(positions, 8)):
        once, _ = apply_rotary_pos_emb(x, x, *rotary(x, new))
        first, _ = apply_rotary_pos_emb(x, x, *rotary(x, positions))
        again = rotate(first, rotation_between(rotary.inv_freq, positions, new, torch.float32))
        assert (again - once).abs().max() < 1e-6


def test_dimensions_without_a_rope_are_left() -> None:
    x = torch.randn(1, 1, 3, 10)
    new = rotate(
        x, rotation_between(torch.tensor([1.0, 0.1]), torch.zeros(1, 3), torch.arange(3.0)[None], torch.float32)
    )
    assert torch.equal(new[..., 4:], x[..., 4:])
    assert not torch.allclose(new[..., 1:, :4], x[..., 1:, :4])


# The formula


@pytest.mark.parametrize("family", FAMILIES)
def test_the_formula_without_self_extend_is_the_plain_model(family: str, checkpoints: MakeCheckpoint) -> None:
    """The reference is itself compared with plain transformers."""
    path = checkpoints(family, **EXACT)
    model = zebra.load(path, self_extend=SETTING)
    plain = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    with formula_logits(model, None) as formula:
        assert off(formula(tokens(2, 60)), logits(plain, tokens(2, 60))) < 1e-5


@pytest.mark.parametrize("rope", [None, "linear:4", "yarn:4", "llama3:4"])
@pytest.mark.parametrize("setting", ["4:8", "5:16", "8:64:log"])
def test_ropes_that_are_scaled_equal_the_formula(setting: str, rope: str | None, checkpoints: MakeCheckpoint) -> None:
    model = zebra.load(checkpoints("llama"), self_extend=setting, rope=rope)
    ids = tokens(1, 300)
    output = logits(model, ids)
    with formula_logits(model, self_extend_of(model)) as formula:
        assert off(output, formula(ids)) < 2e-5


@pytest.mark.parametrize("setting", some(["3:64", "4:8", "8:64:log"], "3:64", "8:64:log"))
@pytest.mark.parametrize("family", some(FAMILIES, "llama", "gpt_oss"))
def test_a_whole_text_equals_the_formula(family: str, setting: str, checkpoints: MakeCheckpoint) -> None:
    model = zebra.load(checkpoints(family, **EXACT), self_extend=setting)
    ids = tokens(1, 512)
    with formula_logits(model, self_extend_of(model)) as formula:
        expected = formula(ids)
    output = logits(model, ids)
    assert off(output, expected) < (2e-5 if family == "gpt_oss" else 1e-5)  # its experts round too
    plain = AutoModelForCausalLM.from_pretrained(checkpoints(family, **EXACT), attn_implementation="eager")
    unlike = off(logits(plain, ids), expected)
    assert unlike > 1e-2, "the test would not see a difference"
    window = self_extend_of(model).window
    assert torch.equal(output[:, :1], logits(model, ids[:, :1])) or off(output[:, :1], logits(model, ids[:, :1])) < 1e-5
    assert off(logits(model, ids[:, :window]), logits(plain, ids[:, :window])) < 1e-5


@pytest.mark.full
def test_in_float64_at_4096_everything_equals_the_formula(checkpoints: MakeCheckpoint) -> None:
    model = zebra.load(checkpoints("llama", **EXACT), self_extend="16:128", dtype=torch.float64)
    ids = tokens(2, 4096)
    sample = torch.arange(0, 4096, 5)
    with formula_logits(model, self_extend_of(model)) as formula:
        expected = formula(ids[:1], logits_to_keep=sample)
        second = formula(ids[1:, :3000], logits_to_keep=torch.arange(3000))
    assert off(logits(model, ids[:1], logits_to_keep=sample), expected) < 1e-5
    for parts in ([1000] * 5, [4000] + [1] * 96, [333] * 13):
        output = in_parts(model, ids[:1], parts)
        assert off(output[:, sample], expected) < 1e-5
    batch, mask = ids.clone(), torch.ones_like(ids)
    batch[1, :1096], mask[1, :1096] = 0, 0
    batch[1, 1096:] = ids[1, :3000]
    both = logits(model, batch, attention_mask=mask)
    assert off(both[:1, sample], expected) < 1e-5
    assert off(both[1:, 1096:], second) < 1e-5
    packed = torch.cat([ids[1:, :3000], ids[:1]], dim=1)
    positions = torch.cat([torch.arange(3000), torch.arange(4096)])[None]
    output = logits(model, packed, position_ids=positions)
    assert off(output[:, :3000], second) < 1e-5
    assert off(output[:, 3000:][:, sample], expected) < 1e-5


def test_greedy_tokens_are_the_formulas(checkpoints: MakeCheckpoint) -> None:
    model = zebra.load(checkpoints("llama"), self_extend="8:32")
    ids = tokens(1, 200)
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    expected = ids
    with formula_logits(model, self_extend_of(model)) as formula:
        for _ in range(12):
            expected = torch.cat([expected, formula(expected)[:, -1:].argmax(dim=-1)], dim=1)
    assert output.tolist() == expected.tolist()


# With and without our cache


@pytest.mark.parametrize(
    "parts",
    [[40], [1] * 40, [7] * 6, [13, 1, 1, 20, 5], [33, 16]],
    ids=["whole", "one by one", "by 7", "mixed", "two"],
)
@pytest.mark.parametrize("ours", [True, False], ids=["ours", "stock"])
@pytest.mark.parametrize("family", some(FAMILIES, "llama", "phi", "gpt_oss"))
def test_parts_equal_the_whole(family: str, ours: bool, parts: list[int], checkpoints: MakeCheckpoint) -> None:
    model = zebra.load(checkpoints(family), self_extend=SETTING)
    ids = tokens(2, 40)
    cache = bounded_cache(model) if ours else DynamicCache(config=model.config)
    assert off(in_parts(model, ids, parts, cache), logits(model, ids)) < 2e-5


HOW: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "chunked prefill": {"prefill_chunk_size": 7},
    "static": {"cache_implementation": "static"},
    "sampled": {"do_sample": True},
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_generating_equals_generating_without_a_cache(family: str, how: str, checkpoints: MakeCheckpoint) -> None:
    model = zebra.load(checkpoints(family), self_extend=SETTING)
    ids = tokens(1, 30)
    arguments = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None} | HOW[how]
    output = []
    for more in ({}, {"use_cache": False}):
        torch.manual_seed(3)
        plain = {k: v for k, v in arguments.items() if not more or k in ("max_new_tokens", "do_sample", "eos_token_id")}
        plain |= {"num_beams": 3} if how == "beams" else {}
        output.append(model.generate(ids, attention_mask=torch.ones_like(ids), **plain, **more).tolist())
    assert output[0] == output[1]


def test_an_assistant_takes_tokens_back(checkpoints: MakeCheckpoint) -> None:
    model, draft = (zebra.load(checkpoints("llama"), self_extend=SETTING) for _ in range(2))
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    ids = tokens(1, 30)
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 14, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, **arguments, use_cache=False)
    assert model.generate(ids, assistant_model=draft, **arguments).tolist() == expected.tolist()


@pytest.mark.parametrize("plain_positions", [False, True])
def test_a_left_padded_batch_gives_each_row_what_it_gets_alone(model: Any, plain_positions: bool) -> None:
    """With positions as `generate` makes them, and as a forward without any has them, which counts the padding."""
    ids = tokens(2, 50)
    batch, mask = ids.clone(), torch.ones_like(ids)
    batch[1, :21], mask[1, :21] = 0, 0
    batch[1, 21:] = ids[1, :29]
    arguments: dict[str, Any] = {"attention_mask": mask}
    if not plain_positions:
        arguments["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
    both = logits(model, batch, **arguments)
    assert off(both[:1], logits(model, ids[:1])) < 2e-5
    assert off(both[1:, 21:], logits(model, ids[1:, :29])) < 2e-5
    parts = in_parts(model, batch, [10, 20, 1, 1, 18], **arguments)  # the second row's first chunk is padding only
    assert off(parts[:1], both[:1]) < 2e-5
    assert off(parts[1:, 21:], both[1:, 21:]) < 2e-5


def test_a_left_padded_batch_generates_what_each_row_does_alone(model: Any) -> None:
    ids = tokens(2, 40)
    batch, mask = ids.clone(), torch.ones_like(ids)
    batch[1, :15], mask[1, :15] = 0, 0
    for more in ({}, {"num_beams": 2}, {"prefill_chunk_size": 6}):
        arguments = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None} | more
        together = model.generate(batch, attention_mask=mask, **arguments)
        for row, start in ((0, 0), (1, 15)):
            one = {"attention_mask": mask[row : row + 1, start:]}
            alone = model.generate(batch[row : row + 1, start:], **one, **arguments)
            assert together[row, start:].tolist() == alone[0].tolist()


def test_offset_positions_change_nothing(model: Any) -> None:
    """A rope knows differences only."""
    ids = tokens(1, 40)
    assert off(logits(model, ids, position_ids=torch.arange(40)[None] + 100), logits(model, ids)) < 2e-5


def test_layers_share_the_places_of_a_forward_and_never_of_another(model: Any) -> None:
    """The same tensor of positions, changed in place between forwards."""
    ids, positions = tokens(1, 40), torch.arange(40)[None].clone()
    first = logits(model, ids, position_ids=positions)
    positions.copy_(torch.cat([torch.arange(20), torch.arange(20)]))
    second = logits(model, ids, position_ids=positions)
    assert off(second[:, :20], first[:, :20]) < 2e-5
    assert off(second[:, 20:], logits(model, ids[:, 20:])) < 2e-5
    ropes = {id(get_override(layer.self_attn).rotation) for layer in model.model.layers}
    assert len(ropes) == 1


def test_gradient_checkpointing_computes_the_same(model: Any) -> None:
    ids = tokens(2, 40)
    gradients = []
    model.train()
    for _ in range(2):
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        checkpoint_activations(model)
    assert off(*gradients) < 1e-6


# What the cache holds


def filled(model: Any, *parts: int) -> StripedCache:
    cache = bounded_cache(model)
    in_parts(model, tokens(1, sum(parts)), list(parts), cache)
    return cache


@pytest.mark.parametrize("parts", [(3,), (7,), (200,), (100, 1), (1,) * 60, (7,) * 20, (200, 1, 1, 50)], ids=str)
def test_a_layer_holds_no_more_than_its_tokens_and_the_window(model: Any, parts: tuple[int, ...]) -> None:
    """N far keys, N values and W - 1 near keys, which is N + (W - 1) / 2 tokens' worth, and slack to grow into."""
    n, window, side = sum(parts), 7, 2 * 8 * 4
    for layer in filled(model, *parts).layers:
        assert isinstance(layer, SelfExtendLayer)
        assert layer.keys.shape[-2] == layer.values.shape[-2] == layer.get_seq_length() == n
        assert layer.near.shape[-2] == min(n, window - 1)
        live = sum(states.numel() * 4 for states in (layer.keys, layer.values, layer.near))
        assert live <= (n + window) * 2 * side
        held = [states.untyped_storage().nbytes() // side for states in (layer.keys, layer.values, layer.near)]
        assert max(held[:2]) <= 1.25 * n + 1
        assert held[2] <= 2 * window


def test_the_bytes_of_a_cache_count_the_near_keys(model: Any) -> None:
    cache = filled(model, 100)
    assert cache.kv_bytes() == 5 * (100 + 100 + 6) * 2 * 8 * 4


def test_near_keys_are_exact_and_far_ones_turned(model: Any) -> None:
    ids = tokens(1, 50)
    ours, stock = bounded_cache(model), DynamicCache(config=model.config)
    logits(model, ids, past_key_values=ours, use_cache=True)
    logits(model, ids, past_key_values=stock, use_cache=True)
    layer_of_ours, stock_layer = ours.layers[0], stock.layers[0]
    assert torch.equal(layer_of_ours.near, stock_layer.keys[:, :, -6:])
    assert torch.equal(layer_of_ours.values, stock_layer.values)
    positions = torch.arange(50)[None]
    frequencies = model.model.rotary_emb.inv_freq
    expected = rotate(stock_layer.keys, rotation_between(frequencies, positions, positions // 3, torch.float32))
    assert off(layer_of_ours.keys, expected) < 1e-6


def test_batches_of_a_cache_are_moved_together(model: Any) -> None:
    ids, rows = tokens(3, 40), torch.tensor([2, 0])
    cache = bounded_cache(model)
    logits(model, ids[:, :30], past_key_values=cache, use_cache=True)
    cache.batch_select_indices(rows)
    assert (
        off(logits(model, ids[rows, 30:], past_key_values=cache, use_cache=True), logits(model, ids[rows])[:, 30:])
        < 2e-5
    )
    cache = bounded_cache(model)
    logits(model, ids[:1, :30], past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([1, 1]))
    twice = ids[:1].repeat(2, 1)
    assert off(logits(model, twice[:, 30:], past_key_values=cache, use_cache=True), logits(model, twice)[:, 30:]) < 2e-5
    cache.reset()
    assert off(in_parts(model, ids, [20, 20], cache), logits(model, ids)) < 2e-5


def test_tokens_are_taken_back_where_the_past_is_recorded(model: Any) -> None:
    ids = tokens(1, 40)
    cache = bounded_cache(model)
    cache.activate_past_recording()
    logits(model, ids[:, :30], past_key_values=cache, use_cache=True)
    for keep in (25, 28, 9):
        cache.crop(keep - cache.get_seq_length())
        assert cache.get_seq_length() == keep
        assert all(layer.near.shape[-2] == min(6, keep) for layer in cache.layers)
        again = copy.deepcopy(cache)
        output = logits(model, ids[:, keep:], past_key_values=again, use_cache=True)
        assert off(output, logits(model, ids)[:, keep:]) < 2e-5
        if keep == 28:  # a whole prefill, all of it recorded
            cache.reset()
            logits(model, ids[:, :30], past_key_values=cache, use_cache=True)
        elif keep == 25:
            logits(model, ids[:, keep:35], past_key_values=cache, use_cache=True)
    cache = filled(model, 30)
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-3)
    cache = filled(model, 5)
    cache.crop(-3)
    assert cache.layers[0].near.shape[-2] == 2


def test_a_cache_is_copied_and_pickled_with_its_near_keys(model: Any) -> None:
    ids = tokens(1, 40)
    cache = bounded_cache(model)
    logits(model, ids[:, :30], past_key_values=cache, use_cache=True)
    for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        output = logits(model, ids[:, 30:], past_key_values=twin, use_cache=True)
        assert off(output, logits(model, ids)[:, 30:]) < 2e-5
    assert cache.get_seq_length() == 30


def test_keys_that_wait_say_who_can_take_them(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model.set_attn_implementation("sdpa")
    assert "Self-Extend 3:7" in caplog.messages[0]
    with pytest.raises(AttributeError, match='supports only attention "zebra"'):
        logits(model, tokens(1, 20), past_key_values=bounded_cache(model), use_cache=True)
    assert not hasattr(PendingKeys(SelfExtendLayer(4), torch.zeros(1)), "shape")


# Where it hangs


def test_with_stripes_only_global_layers_are_extended(checkpoints: MakeCheckpoint) -> None:
    model = zebra.load(checkpoints("llama"), stripes="GLLG:9", self_extend=SETTING)
    kinds = [isinstance(get_override(layer.self_attn), SelfExtendAttention) for layer in model.model.layers]
    assert kinds == [True, False, False, True, True]
    assert [isinstance(layer, SelfExtendLayer) for layer in bounded_cache(model).layers] == kinds
    ids = tokens(1, 200)
    with formula_logits(model, self_extend_of(model)) as formula:
        expected = formula(ids)
    assert off(logits(model, ids), expected) < 2e-5
    assert off(in_parts(model, ids, [50, 1, 1, 100, 48]), expected) < 2e-5


def test_layers_without_a_rope_are_left(checkpoints: MakeCheckpoint) -> None:
    model = zebra.load(checkpoints("smollm3"), self_extend=SETTING)
    ropes = [layer.rope for layer in attention_layers(model)]
    assert [rope is not None for rope in ropes] == [bool(x) for x in model.config.no_rope_layers]
    assert [isinstance(layer, SelfExtendLayer) for layer in bounded_cache(model).layers] == [
        r is not None for r in ropes
    ]


def test_nothing_of_it_is_saved_and_that_is_said(
    checkpoints: MakeCheckpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = zebra.load(checkpoints("llama"), self_extend=SETTING)
    with caplog.at_level(logging.WARNING):
        model.save_pretrained(tmp_path / "saved")
        assert "load the checkpoint with self_extend='3:7'" in caplog.messages[-1]
        zebra.load(checkpoints("llama")).save_pretrained(tmp_path / "plain")
    assert len(caplog.messages) == 1
    assert "extend" not in (tmp_path / "saved" / "config.json").read_text()
    plain = zebra.load(tmp_path / "saved")
    assert self_extend_of(plain) is None
    assert self_extend_of(model) == SelfExtend(3, 7)
    assert off(logits(plain, tokens(1, 40)), logits(model, tokens(1, 40))) > 1e-2


def test_a_model_is_copied_and_pickled_with_it(model: Any) -> None:
    ids = tokens(1, 40)
    expected = logits(model, ids)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert off(logits(twin, ids), expected) < 1e-6


def test_frequencies_that_a_conversion_rounds_are_rounded_in_both_parts(checkpoints: MakeCheckpoint) -> None:
    """Near and far tokens are rotated by one set of frequencies: the model's, whatever happens to it."""
    model, ids = zebra.load(checkpoints("llama"), self_extend="3:16"), tokens(1, 300)
    before = logits(model, ids)
    model.to(torch.bfloat16).to(torch.float32)
    with formula_logits(model, self_extend_of(model)) as formula:
        expected = formula(ids)
    assert off(expected, before) > 1e-3  # the rounding shows
    assert off(logits(model, ids), expected) < 1e-5


def test_a_group_of_one_changes_nothing(checkpoints: MakeCheckpoint) -> None:
    plain = zebra.load(checkpoints("llama"))
    same = zebra.load(checkpoints("llama"), self_extend=SelfExtend(1, 7))
    assert off(logits(same, tokens(1, 200)), logits(plain, tokens(1, 200))) < 2e-5


# Bad input


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("gpt2", {}, "its positions are learned, ALiBi"),
        ("bloom", {}, "its positions are learned, ALiBi|no max_position_embeddings"),
        ("gptj", {}, "transformers' registered attention functions"),
        ("cohere", {}, "its rope is interleaved"),
        ("glm", {"head_dim": 8}, "its rope is interleaved"),
        ("cohere2", {}, "its rope is interleaved|no global layer"),
        ("persimmon", {}, "does not pass to its attention"),
        ("mistral", {"sliding_window": 16}, "no global layer with a rotary embedding.*sliding_window=None"),
        ("gemma3_text", {"layer_types": ["sliding_attention"] * 5}, "no global layer.*Load it without Self-Extend.$"),
        ("falcon", {"alibi": True}, "its positions are learned, ALiBi"),
        ("minimax", {}, "does not support the cache of Self-Extend|cache of its own"),
    ],
)
def test_models_that_cannot_have_self_extend_are_rejected(
    family: str, changes: dict[str, Any], words: str, checkpoints: MakeCheckpoint
) -> None:
    with pytest.raises(ZebraError, match=words):
        zebra.load(checkpoints(family, **changes), self_extend=SETTING)


@pytest.mark.parametrize(
    ("rope", "setting", "words"),
    [
        ("dynamic:2", SETTING, "the rope type dynamic .* frequencies change"),
        (None, "3:512", "below the trained length"),
        (None, "0:8", "integers from 1"),
        (None, "auto:100", "above the trained length"),
        (None, "eight", "GROUP:WINDOW"),
        (None, "8:2", "at most as many sinks .* got 3 sinks and 8:2"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(
    rope: str | None, setting: str, words: str, checkpoints: MakeCheckpoint
) -> None:
    with pytest.raises(ZebraError, match=words):
        zebra.load(checkpoints("llama"), stripes="GL:9+3", rope=rope, self_extend=setting)


def test_a_model_that_cannot_run_is_rejected(checkpoints: MakeCheckpoint) -> None:
    """Experts in float64 do not run in transformers."""
    with pytest.raises(
        ZebraError, match=r"could not probe this qwen3_moe .*Load it without Self-Extend, or in another dtype"
    ):
        zebra.load(checkpoints("qwen3_moe"), self_extend=SETTING, dtype=torch.float64)


def test_a_family_without_a_route_is_served_by_self_extend_alone(checkpoints: MakeCheckpoint) -> None:
    assert self_extend_of(zebra.load(checkpoints("phi"), self_extend="auto:4096")) == SelfExtend(32, 128)
    with pytest.raises(ZebraError, match="is not supported"):
        zebra.load(checkpoints("phi"), stripes="GL:9", self_extend=SETTING)


def test_no_reminder_of_the_trained_length_up_to_the_reach(
    checkpoints: MakeCheckpoint, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers reminds of each length once: each model here has its own."""
    with caplog.at_level(logging.WARNING, "transformers.generation.stopping_criteria"):
        for length, options, reminders in ((21, {}, 1), (22, {"self_extend": "auto:80"}, 0)):
            model = zebra.load(checkpoints("llama", max_position_embeddings=length), **options)
            ids = torch.full((1, 4), 5)
            model.generate(ids, max_new_tokens=30, min_new_tokens=30, do_sample=False)
            assert sum(f"maximum length ({length})" in message for message in caplog.messages) == reminders


def test_a_text_beyond_the_reach_is_warned_of_once(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    reach = SelfExtend.parse(SETTING).reach(512)
    assert reach > 1000
    short = zebra.load(STORIES, self_extend="1:7")
    logits(model, tokens(1, 300))  # the first request of a process says which kernels decline
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        logits(model, tokens(1, 600))
        logits(short, tokens(1, 512))
        mask = torch.ones(1, 520, dtype=torch.long)
        mask[:, :8] = 0
        logits(short, tokens(1, 520), attention_mask=mask)
        assert caplog.messages == []
        logits(short, tokens(1, 513))
        logits(short, tokens(1, 600))
    assert len(caplog.messages) == 1
    for word in ("513 tokens", "Self-Extend 1:7", "to 512", "Raise the group", "auto:513"):
        assert word in caplog.messages[0]


def test_positions_of_a_chunk_that_do_not_follow_are_refused(model: Any) -> None:
    cache = filled(model, 20)
    with pytest.raises(ZebraError, match="starts after 20 of them"):
        logits(
            model, tokens(1, 4), past_key_values=cache, use_cache=True, position_ids=torch.tensor([[20, 21, 30, 31]])
        )


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "stock"])
@pytest.mark.parametrize("new", [1, 20])
@pytest.mark.parametrize("start", [0, 39, 50])
def test_positions_that_do_not_go_on_from_the_cached_ones_are_refused(
    model: Any, start: int, new: int, ours: bool
) -> None:
    cache = bounded_cache(model) if ours else DynamicCache(config=model.config)
    in_parts(model, tokens(1, 40), [39, 1], cache)
    positions = torch.arange(start, start + new)[None]
    with pytest.raises(ZebraError, match=rf"\[{start}.* after 40 cached ones.*Leave out position_ids.* 1,521 tokens"):
        logits(model, tokens(1, new), past_key_values=cache, use_cache=True, position_ids=positions)


@pytest.mark.parametrize(
    ("positions", "shown"),
    [
        ([*range(30), *range(50, 60)], "28, 29, 50, 51"),
        (list(range(0, 80, 2)), "0, 2, 4"),
        (list(range(39, -1, -1)), "39, 38, 37"),
        ([*range(20), *range(5, 25)], "18, 19, 5, 6"),
    ],
    ids=["gap", "step", "reversed", "back"],
)
def test_positions_of_a_whole_text_with_gaps_are_refused(model: Any, positions: list[int], shown: str) -> None:
    with pytest.raises(ZebraError, match=rf"\[{shown}.*Leave out position_ids"):
        logits(model, tokens(1, 40), position_ids=torch.tensor([positions]))


def test_text_at_an_offset_goes_on_there(model: Any) -> None:
    ids, cache = tokens(2, 40), bounded_cache(model)
    output = in_parts(model, ids, [30, 1, 1, 8], cache, position_ids=torch.arange(100, 140)[None])
    assert off(output, logits(model, ids)) < 2e-5
    cache.reset()  # an emptied cache begins anew
    assert off(in_parts(model, ids, [20, 20], cache), logits(model, ids)) < 2e-5


def test_packed_documents_cannot_be_gone_on_with(model: Any) -> None:
    for start in (20, 40):
        cache, packed = bounded_cache(model), torch.arange(20).repeat(2)[None]
        logits(model, tokens(1, 40), past_key_values=cache, use_cache=True, position_ids=packed)
        with pytest.raises(ZebraError, match="start at positions"):
            logits(model, tokens(1, 1), past_key_values=cache, use_cache=True, position_ids=torch.tensor([[start]]))


def test_padding_is_counted_from_the_first_token_on_or_never(model: Any) -> None:
    """Rows keep what their positions are above their places, also those of padding alone, and when they are moved."""
    ids, mask = tokens(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[1, :21] = 0
    cache = bounded_cache(model)
    for start, end in ((0, 10), (10, 30)):
        part = {"attention_mask": mask[:, :end], "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0)[:, start:end]}
        logits(model, ids[:, start:end], past_key_values=cache, use_cache=True, **part)
    assert cache.layers[0].offset.tolist() == [[0], [-21]]
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 2, 3]))
    assert cache.layers[0].offset.tolist() == [[-21], [0], [0]]
    with pytest.raises(ZebraError, match="start at positions"):
        logits(model, ids[:, 30:31].repeat(2, 1)[:3], past_key_values=cache, use_cache=True)


def test_padding_between_tokens_is_refused(model: Any) -> None:
    mask = torch.ones(1, 20, dtype=torch.long)
    mask[0, 5:8] = 0
    with pytest.raises(ZebraError, match="but not inside it"):
        logits(model, tokens(1, 20), attention_mask=mask)


def test_a_model_without_position_ids_is_rejected_at_run_time_too(model: Any) -> None:
    attn = model.model.layers[0].self_attn
    q, k, v = torch.zeros(1, 4, 9, 8), torch.zeros(1, 2, 9, 8), torch.zeros(1, 2, 9, 8)
    with pytest.raises(ZebraError, match="requires position_ids"):
        attention.zebra_attention(attn, q, k, v, None, scaling=1.0)


# A real model


def test_a_real_model_reads_far_beyond_its_length(tmp_path: Path) -> None:
    """stories260K, trained at 512, over stories joined to 6,144 tokens: two such here, all in the full run."""
    some = tmp_path / "some.txt"
    some.write_text((TEXT / "tinystories_validation.txt").read_text()[:26_000])
    held(some)


@pytest.mark.full
def test_a_real_model_reads_far_beyond_its_length_over_the_whole_text() -> None:
    held(TEXT / "tinystories_validation.txt")


@pytest.mark.full
def test_a_real_model_goes_on_with_3000_tokens_by_the_formulas_tokens() -> None:
    """The formula reads prompt and new tokens at once: each is the likeliest behind those before."""
    prompt = (TEXT / "tinystories_validation.txt").read_text().replace("<|endoftext|>", "")[:6_150]
    model = zebra.load(STORIES, self_extend="auto:4096", dtype=torch.float64)
    assert str(self_extend_of(model)) == "32:128"
    options: dict[str, Any] = {"self_extend": "auto:4096", "dtype": "float64", "device": "cpu", "max_new_tokens": 40}
    generated = zebra.generate(STORIES, prompt, **options)
    assert generated.tokens == zebra.generate(STORIES, prompt, prefill_chunk=512, **options).tokens
    assert 3000 <= generated.prompt_tokens <= 3100
    assert len(generated.tokens) == 40
    ids = torch.tensor([AutoTokenizer.from_pretrained(STORIES)(prompt)["input_ids"] + list(generated.tokens)])
    keep = torch.arange(generated.prompt_tokens - 1, ids.shape[1] - 1)
    with formula_logits(model, self_extend_of(model)) as formula:
        likeliest = formula(ids, logits_to_keep=keep).argmax(dim=-1)
    assert likeliest[0].tolist() == list(generated.tokens)
    assert logits(zebra.load(STORIES), ids, logits_to_keep=keep).argmax(dim=-1)[0].tolist() != list(generated.tokens)


def held(text: Path) -> None:
    def measured(length: int, **arguments: Any) -> dict[tuple[int, int], float]:
        rows = evaluate_perplexity(
            STORIES, [str(text)], lengths=[length], separator="<|endoftext|>", join=True, **arguments
        )
        if "self_extend" in arguments:
            assert {row.layout for row in rows} == {"full, self-extend 32:64"}
        return {(row.position_from, row.position_to): row.value for row in rows}

    fresh = measured(512)[0, 512]
    ours = measured(6144, self_extend="32:64")
    with pytest.warns(UserWarning, match="exceeds the 512 positions that this model was trained for"):
        plain = measured(6144)
    assert ours[0, 6144] < 1.2 * fresh
    assert ours[4096, 6144] < 1.4 * fresh
    assert plain[4096, 6144] > 100 * fresh


def test_attention_of_plain_layers_is_not_touched(checkpoints: MakeCheckpoint) -> None:
    plain = zebra.load(checkpoints("llama"))
    assert all(not isinstance(get_override(m), SelfExtendAttention) for m in plain.modules())
    q = torch.randn(1, 4, 9, 8)
    expected, _ = attend(q, q[:, :2], q[:, :2], with_lse=False)
    output, _ = attention.zebra_attention(plain.model.layers[0].self_attn, q, q[:, :2], q[:, :2], None)
    assert torch.equal(output.transpose(1, 2), expected)
