"""Local layers with attention sinks and full decoding, in whole models: the laws, zebra.json, what is rejected."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EVERY_MEMBER, FAMILIES, STORIES, fitting, in_parts, logits, off, some, tokens
from torch import Tensor
from transformers import DynamicCache

import zebra
from zebra import SelfExtend, Stripes, ZebraError
from zebra.kernels import Mask, attend
from zebra.model.cache import StripedCache
from zebra.model.checkpoint import read_local_attention
from zebra.model.load_options import loaded_layout_name
from zebra.model.local import LocalAttention, local_attention_of, set_local_attention
from zebra.model.opaque_layers import FullDecodeLayer, SinkKeys, SinkLayer
from zebra.model.override import get_override, overriding_attention
from zebra.model.self_extend import SelfExtendAttention, bounded_cache
from zebra.model.self_extend.formula import formula_logits
from zebra.model.verify import verify
from zebra.plan import cost, memory
from zebra.plan.decoder import decoder_from_config
from zebra.positions import relative, sink_query

MakeCheckpoint = Callable[..., Path]
WINDOW, SINKS = 9, 3
LAYOUT = f"GLLL:{WINDOW}+{SINKS}"
MEMBERS = pytest.mark.parametrize("family", some(EVERY_MEMBER, *FAMILIES))


def left_padded(lengths: tuple[int, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    longest = max(lengths)
    ids, mask = tokens(len(lengths), longest), torch.ones(len(lengths), longest, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, : longest - length], mask[row, : longest - length] = 0, 0
    return ids, {"attention_mask": mask, "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0)}


class Naive:
    """The reference: a local layer by its mask, with one dense softmax."""

    def attend(self, module: Any, positions: Any, q: Tensor, k: Tensor, v: Tensor, mask: Mask, **more: Any) -> Any:
        return attend(q, k, v, replace(mask, sinks=SINKS), **more)


def naively(model: Any) -> Any:
    local = [m for m in model.modules() if isinstance(get_override(m), LocalAttention)]
    assert len(local) == 3 or model.config.model_type not in ("cwm", "qwen2", "qwen3")
    return overriding_attention(local, Naive())


@pytest.fixture(params=[None, "3:7"], ids=["sinks", "sinks and self-extend"])
def model(request: Any, checkpoints: MakeCheckpoint) -> Any:
    return zebra.load(checkpoints("llama"), stripes=LAYOUT, self_extend=request.param)


# Laws


@MEMBERS
def test_law_1_sinks_change_nothing_within_the_window_and_as_long_as_the_text_make_it_global(
    family: str, checkpoints: MakeCheckpoint
) -> None:
    ids = tokens(2, 40)
    with_sinks = zebra.load(checkpoints(family), stripes=fitting(family, LAYOUT))
    without = zebra.load(checkpoints(family), stripes=fitting(family, f"GLLL:{WINDOW}"))
    assert local_attention_of(with_sinks) == LocalAttention(SINKS)
    assert off(logits(with_sinks, ids[:, :WINDOW]), logits(without, ids[:, :WINDOW])) == 0
    assert off(logits(with_sinks, ids), logits(without, ids)) > 1e-3
    every = zebra.load(checkpoints(family), stripes=fitting(family, f"GLLL:{WINDOW}+40"))
    wide = zebra.load(checkpoints(family), stripes=fitting(family, "GLLL:40"))
    assert off(logits(every, ids), logits(wide, ids)) < 2e-5


@MEMBERS
def test_laws_2_to_4_in_every_family(family: str, checkpoints: MakeCheckpoint) -> None:
    """With a cache, padding or packed documents, each text gets what one dense softmax gives it alone."""
    model = zebra.load(checkpoints(family), stripes=fitting(family, LAYOUT))
    ids = tokens(2, 40)
    with naively(model):
        expected = logits(model, ids)
    assert off(logits(model, ids), expected) < 2e-5
    assert off(in_parts(model, ids, [13, 1, 1, 20, 5]), expected) < 2e-5
    batch, arguments = left_padded((40, 22, 5))
    for output in (logits(model, batch, **arguments), in_parts(model, batch, [7, 7, 7, 7, 7, 1, 1, 3], **arguments)):
        for row, length in enumerate((40, 22, 5)):
            assert off(output[row, 40 - length :], logits(model, batch[row : row + 1, 40 - length :])[0]) < 2e-5
    lengths = (14, 1, 23, 2)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    for use_cache in (False, True):
        packed = logits(model, ids[:1], position_ids=positions, use_cache=use_cache)
        for part, document in zip(packed.split(lengths, 1), ids[:1].split(lengths, 1), strict=True):
            assert off(part, logits(model, document)) < 2e-5


@pytest.mark.parametrize("parts", [[1] * 40, [2] * 20, [7] * 5 + [5], [WINDOW] * 4 + [4], [39, 1]], ids=len)
def test_law_2_with_the_cache(model: Any, parts: list[int]) -> None:
    ids = tokens(2, 40)
    cache = bounded_cache(model)
    assert off(in_parts(model, ids, parts, cache), logits(model, ids)) < 2e-5
    assert [isinstance(layer, SinkLayer) for layer in cache.layers] == [False, True, True, True, False]
    twin = copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))
    expected = logits(model, torch.cat([ids, ids[:, :3]], dim=1))[:, 40:]
    for one in twin:
        assert off(logits(model, ids[:, :3], past_key_values=one, use_cache=True), expected) < 2e-5


def test_law_4_gradients_equal_one_softmax_through_a_whole_model(checkpoints: MakeCheckpoint) -> None:
    model = zebra.load(checkpoints("llama"), stripes=LAYOUT, dtype=torch.float64)
    ids = tokens(2, 40)
    positions = torch.cat([torch.arange(n) for n in (17, 23)])[None].expand(2, -1)

    def gradient(**arguments: Any) -> Tensor:
        model.zero_grad()
        model(ids, labels=ids, use_cache=False, **arguments).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    for arguments in ({}, {"position_ids": positions}):
        output = gradient(**arguments)
        with naively(model):
            expected = gradient(**arguments)
        assert (output - expected).norm() <= 1e-6 * expected.norm()  # norms of transformers round to float32


def test_with_self_extend_both_equal_the_formula(checkpoints: MakeCheckpoint) -> None:
    model = zebra.load(checkpoints("llama"), stripes=LAYOUT, self_extend="3:7")
    kinds = [type(get_override(layer.self_attn)) for layer in model.model.layers]
    assert kinds == [SelfExtendAttention, LocalAttention, LocalAttention, LocalAttention, SelfExtendAttention]
    ids = tokens(1, 200)
    with formula_logits(model, SelfExtend(3, 7)) as formula:
        expected = formula(ids)
    assert off(logits(model, ids), expected) < 2e-5
    assert off(in_parts(model, ids, [50, 1, 1, 100, 48]), expected) < 2e-5
    batch, arguments = left_padded((200, 90, 5))
    for output in (logits(model, batch, **arguments), in_parts(model, batch, [80, 1, 1, 110, 8], **arguments)):
        for row, length in enumerate((200, 90, 5)):
            assert off(output[row, 200 - length :], logits(model, batch[row : row + 1, 200 - length :])[0]) < 2e-5
    lengths = (120, 3, 77)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = logits(model, ids, position_ids=positions)
    for part, document in zip(packed.split(lengths, 1), ids.split(lengths, 1), strict=True):
        assert off(part, logits(model, document)) < 2e-5
    plain = zebra.load(checkpoints("llama"), stripes=f"GLLL:{WINDOW}", self_extend="3:7")
    assert off(logits(plain, ids), expected) > 1e-3
    with naively(model):
        at_their_own_distance = logits(model, ids)
    assert off(at_their_own_distance, expected) > 1e-3
    wide = zebra.load(checkpoints("llama"), stripes=LAYOUT, self_extend="3:20")
    with naively(wide):
        at_their_own_distance = logits(wide, ids)
    assert off(logits(wide, ids[:, :20]), at_their_own_distance[:, :20]) < 2e-5


@pytest.mark.parametrize(("family", "layout"), [("gemma3_text", "1,3:9+3"), ("smollm3", LAYOUT), ("llama", "LLG:9+3")])
def test_with_self_extend_each_layer_has_its_own_rope_or_none(
    family: str, layout: str, checkpoints: MakeCheckpoint
) -> None:
    model, ids = zebra.load(checkpoints(family), stripes=layout, self_extend="3:7"), tokens(1, 100)
    with formula_logits(model, SelfExtend(3, 7)) as formula:
        expected = formula(ids)
    assert off(logits(model, ids), expected) < 2e-5
    extended = [o for m in model.modules() if isinstance(o := get_override(m), SelfExtendAttention)]
    assert [override.first for override in extended] == [True] + [False] * (len(extended) - 1)


def test_with_self_extend_a_prompt_is_read_alike_before_decoded_tokens(checkpoints: MakeCheckpoint) -> None:
    ids, output = tokens(1, 100), []
    model = zebra.load(checkpoints("llama"), stripes=LAYOUT, self_extend="3:7", full_decode=True)
    assert local_attention_of(model) == LocalAttention(SINKS, True)
    for parts in ([100], [60, 40]):
        cache = bounded_cache(model)
        cache.set_prompt_length(60)
        output.append(in_parts(model, ids, parts, cache))
    assert off(*output) < 2e-5
    assert off(output[0][:, :60], logits(model, ids)[:, :60]) < 2e-5


@pytest.mark.parametrize("setting", [SelfExtend(3, 7), SelfExtend(8, 16), SelfExtend(1, 5), SelfExtend(4, 30)], ids=str)
def test_under_self_extend_no_sink_is_farther_than_a_model_was_trained(setting: SelfExtend) -> None:
    trained = 64
    i = torch.arange(setting.reach(trained))
    seen_from = sink_query(i, setting.group, setting.window)
    near = i < setting.window
    assert torch.equal(seen_from[near], i[near])
    assert int(seen_from.max()) == trained - 1
    assert bool((seen_from.diff() >= 0).all())
    # The first token is as far as from a global layer.
    assert torch.equal(seen_from[~near], relative(i, 0 * i, setting.group, setting.window)[~near])


@pytest.mark.parametrize("layout", [LAYOUT, f"GLLL:{WINDOW}"])
@pytest.mark.parametrize("full_decode", [False, True])
def test_law_6_counts_and_bytes_are_the_plans(layout: str, full_decode: bool, checkpoints: MakeCheckpoint) -> None:
    path, stripes = checkpoints("llama"), Stripes.parse(layout)
    model = zebra.load(path, stripes=stripes, full_decode=full_decode)
    sizes = decoder_from_config(json.loads((path / "config.json").read_text()), name="tiny")
    fields = {"decoder": sizes, "stripes": stripes, "dtype": "float32", "full_decode": full_decode}
    for length in (2, 5, 8, 31, 200):
        cache = bounded_cache(model)
        logits(model, tokens(1, length), past_key_values=cache, use_cache=True)
        run = cost.Run(**fields, length=length, phase="decode")
        assert cache.kv_bytes() == memory.kv_bytes(run)
        i = torch.arange(length + 1)
        local = Mask(window=WINDOW, sinks=stripes.sinks).visible(i, i)[0, 0]
        whole = Mask().visible(i, i)[0, 0]
        decoded = whole if full_decode else local
        assert cost.pairs(run) == 2 * whole[-1].sum() + 3 * decoded[-1].sum()
        assert cost.pairs(replace(run, phase="prefill")) == 2 * whole[:-1].sum() + 3 * local[:-1].sum()


# Generating


@pytest.mark.parametrize("how", ["greedy", "beams", "prompt lookup", "chunked prefill", "sampled"])
def test_generate_equals_generating_without_a_cache(model: Any, how: str) -> None:
    arguments: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "num_beams": 1}
    arguments |= {"num_beams": 3} if how == "beams" else {}
    arguments |= {"do_sample": True} if how == "sampled" else {}
    only = {"prompt lookup": {"prompt_lookup_num_tokens": 3}, "chunked prefill": {"prefill_chunk_size": 7}}
    ids = tokens(1, 30).repeat(1, 2)
    mask = torch.ones_like(ids)
    if how not in only:
        ids[:, :11], mask[:, :11] = 0, 0
    output = []
    for more in (only.get(how, {}), {"use_cache": False}):
        torch.manual_seed(3)
        output.append(model.generate(ids, attention_mask=mask, **arguments, **more).tolist())
    assert output[0] == output[1]


@pytest.mark.parametrize("sinks", [0, SINKS])
def test_full_decoding_reads_by_the_window_and_decodes_with_all(sinks: int, checkpoints: MakeCheckpoint) -> None:
    """`verify` compares it with a dense mask on the source; this test compares different ways to feed the tokens."""
    stripes = f"GLLL:{WINDOW}+{sinks}"
    model = zebra.load(checkpoints("llama"), stripes=stripes, full_decode=True)
    ids = tokens(2, 40)
    by_window = logits(zebra.load(checkpoints("llama"), stripes=stripes), ids)
    assert off(logits(model, ids), by_window) == 0
    cache = bounded_cache(model)
    assert sum(isinstance(layer, FullDecodeLayer) for layer in cache.layers) == 3
    expected = in_parts(model, ids, [25] + [1] * 15, cache)  # nobody said: one token alone is decoded
    assert off(expected[:, :25], by_window[:, :25]) < 2e-5
    assert off(expected[:, 26:], by_window[:, 26:]) > 1e-3
    for parts in ([40], [25] + [1] * 15, [1] * 40, [13, 27], [7] * 5 + [5]):
        cache = bounded_cache(model)
        cache.set_prompt_length(25)
        assert off(in_parts(model, ids, parts, cache), expected) < 2e-5
    batch, arguments = left_padded((40, 30))
    cache = bounded_cache(model)
    cache.set_prompt_length(30)
    output = in_parts(model, batch, [12, 20, 8], cache, **arguments)
    for row, length in enumerate((40, 30)):
        alone = bounded_cache(model)
        alone.set_prompt_length(length - 10)
        assert (
            off(output[row, 40 - length :], in_parts(model, batch[row : row + 1, 40 - length :], [length], alone)[0])
            < 2e-5
        )


@pytest.mark.parametrize("more", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 7}])
def test_generate_tells_the_cache_where_the_prompt_ends(more: dict[str, Any], checkpoints: MakeCheckpoint) -> None:
    model = zebra.load(checkpoints("llama"), stripes=LAYOUT, full_decode=True)
    ids = tokens(1, 15).repeat(1, 2)[:, :29]  # in chunks of 7 the last is one token, which is read all the same
    arguments = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    whole = model.generate(ids, **arguments, **more)
    if "num_beams" in more:
        return
    cache = bounded_cache(model)
    cache.set_prompt_length(29)
    steps = in_parts(model, whole[:, :-1], [29] + [1] * 11, cache)
    assert whole[0, 29:].tolist() == steps[0, 28:].argmax(-1).tolist()


@pytest.mark.parametrize("family", some(["llama", "qwen3", "gemma2"], "llama"))
def test_verify_proves_them_against_the_source(family: str, checkpoints: MakeCheckpoint, tmp_path: Path) -> None:
    zebra.convert(checkpoints(family), tmp_path / "out", LAYOUT, full_decode=True)
    checks = verify(tmp_path / "out", checkpoints(family), self_extend="3:7")
    assert [check.name for check in checks if not check.passed] == []
    assert {"decoded", "long, zebra", "packed"} <= {check.name for check in checks}
    checks = verify(tmp_path / "out", self_extend=f"3:{2 * WINDOW}")  # plain transformers has no sinks
    assert [check.name for check in checks if not check.passed] == []
    (tmp_path / "out" / "zebra.json").write_text(json.dumps({"sinks": SINKS + 1}))
    assert all(check.passed for check in verify(tmp_path / "out", checkpoints(family)))


def test_verify_would_see_that_sinks_are_lost(
    checkpoints: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zebra.convert(checkpoints("llama"), tmp_path / "out", LAYOUT, full_decode=True)
    monkeypatch.setattr("zebra.model.load.set_local_attention", lambda model, local: None)
    checks = verify(tmp_path / "out", checkpoints("llama"))
    assert [check.name for check in checks if not check.passed] == ["long, zebra", "decoded"]


# The cache


def test_a_store_of_sinks_follows_its_rows(checkpoints: MakeCheckpoint) -> None:
    model = zebra.load(checkpoints("llama"), stripes=LAYOUT)
    batch, arguments = left_padded((20, 8, 13))
    cache = bounded_cache(model)
    in_parts(model, batch, [10, 10], cache, **arguments)
    layer = cache.layers[1]
    assert layer.positions.tolist() == [[0, 1, 2], [12, 13, 14], [7, 8, 9]]
    keys = layer.sink_keys.clone()
    cache.batch_repeat_interleave(2)
    assert layer.positions[:, 0].tolist() == [0, 0, 12, 12, 7, 7]
    cache.reorder_cache(torch.tensor([2, 0, 5, 1, 3, 4]))
    cache.batch_select_indices(torch.tensor([0, 2]))
    assert layer.positions[:, 0].tolist() == [12, 7]
    assert torch.equal(layer.sink_keys, keys[[1, 2]])
    assert layer.sink_keys.untyped_storage().nbytes() == 2 * 2 * SINKS * 8 * 4
    layer.reset()
    assert layer.positions is None


def test_sinks_that_are_taken_back_are_gone(checkpoints: MakeCheckpoint) -> None:
    """Assisted decoding appends draft tokens, then crops the rejected ones, even down to the first tokens."""
    model = zebra.load(checkpoints("llama"), stripes=LAYOUT)
    ids, other = tokens(1, 30), tokens(1, 30, seed=1)
    for length in (1, 2, 5, 14):
        cache = bounded_cache(model)
        cache.activate_past_recording()
        logits(model, ids[:, :length], past_key_values=cache, use_cache=True)
        logits(model, other[:, :6], past_key_values=cache, use_cache=True)
        cache.crop(-6)
        assert cache.layers[1].positions.tolist() == [[p if p < length else 1 << 40 for p in range(SINKS)]]
        output = logits(model, ids[:, length:], past_key_values=cache, use_cache=True)
        assert off(output, logits(model, ids)[:, length:]) < 2e-5


def test_gradients_flow_through_the_cache(checkpoints: MakeCheckpoint) -> None:
    model = zebra.load(checkpoints("llama"), stripes=LAYOUT, dtype=torch.float64)
    ids, output = tokens(1, 40), []
    cache = bounded_cache(model)
    for parts in ([40], [20, 1, 19]):
        model.zero_grad()
        cache = bounded_cache(model)
        pieces = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split(parts, dim=1)]
        torch.cat(pieces, dim=1).square().sum().backward()
        output.append(model.model.layers[1].self_attn.k_proj.weight.grad.clone())
    torch.testing.assert_close(*output, rtol=1e-5, atol=1e-5 * output[0].abs().max().item())


# zebra.json, the modules, and what is lost


def test_zebra_json_keeps_them_and_loading_restores_them(
    checkpoints: MakeCheckpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        zebra.convert(checkpoints("llama"), tmp_path / "one", LAYOUT, full_decode=True)
    assert "config.json has no field for 3 sinks and full decoding" in caplog.messages[-1]
    assert "plain transformers and vLLM run the checkpoint without" in caplog.messages[-1]
    card = json.loads((tmp_path / "one" / "zebra.json").read_text())
    assert (card["sinks"], card["full_decode"], card["layout"]) == (3, True, LAYOUT + ", full decode")
    assert "sink" not in (tmp_path / "one" / "config.json").read_text()
    model = zebra.load(tmp_path / "one")
    assert local_attention_of(model) == LocalAttention(3, True)
    assert loaded_layout_name(model, "yarn:8") == f"{LAYOUT} yarn:8, full decode"
    changed = {
        f"GLLL:{WINDOW}": (zebra.load(tmp_path / "one", stripes=f"GLLL:{WINDOW}"), LocalAttention(0, True)),
        LAYOUT: (zebra.load(tmp_path / "one", full_decode=False), LocalAttention(3)),
        "G": (zebra.load(tmp_path / "one", stripes="G:9"), LocalAttention()),
    }
    assert all(local_attention_of(output) == expected for output, expected in changed.values())
    wide = zebra.load(tmp_path / "one", window=20)
    assert loaded_layout_name(wide) == "GLLL:20+3, full decode"
    with caplog.at_level(logging.WARNING):
        wide.save_pretrained(tmp_path / "two")
    assert "config.json has no field for 3 sinks" in caplog.messages[-1]
    again = zebra.load(tmp_path / "two")
    assert loaded_layout_name(again) == loaded_layout_name(wide)
    ids = tokens(1, 60)
    assert off(logits(again, ids), logits(wide, ids)) == 0
    assert off(logits(again, ids), logits(model, ids)) > 1e-3
    zebra.load(tmp_path / "two", stripes="GLLL:9", full_decode=False).save_pretrained(tmp_path / "two")
    assert read_local_attention(tmp_path / "two") == LocalAttention()
    zebra.load(checkpoints("llama"), stripes="GLLL:9").save_pretrained(tmp_path / "three")
    assert not (tmp_path / "three" / "zebra.json").exists()


def test_another_attention_loses_them_and_that_is_said(
    checkpoints: MakeCheckpoint, caplog: pytest.LogCaptureFixture
) -> None:
    model = zebra.load(checkpoints("llama"), stripes=LAYOUT, full_decode=True)
    ids = tokens(1, 40)
    with caplog.at_level(logging.WARNING):
        model.set_attn_implementation("zebra")
        assert caplog.messages == []
        model.set_attn_implementation("sdpa")
    assert caplog.messages == [
        '3 sinks and full decoding of local layers require attention "zebra" and are lost with any other.'
    ]
    plain = zebra.load(checkpoints("llama"), stripes=f"GLLL:{WINDOW}")
    assert off(logits(model, ids), logits(plain, ids)) < 2e-5
    arguments = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert model.generate(ids, **arguments).tolist() == plain.generate(ids, **arguments).tolist()
    with pytest.raises(AttributeError, match='supports only attention "zebra"'):
        logits(model, ids, past_key_values=bounded_cache(model), use_cache=True)
    assert not hasattr(SinkKeys(ids, 0), "shape")


@pytest.mark.parametrize("full_decode", [False, True])
def test_another_cache_is_refused(full_decode: bool, checkpoints: MakeCheckpoint) -> None:
    model = zebra.load(checkpoints("llama"), stripes=LAYOUT, full_decode=full_decode)
    ids = tokens(1, 40)
    cache = DynamicCache(config=model.config)
    logits(model, ids, past_key_values=cache, use_cache=True)
    with pytest.raises(ZebraError, match="another cache with tokens in it"):
        logits(model, ids[:, :1], past_key_values=cache, use_cache=True)
    with pytest.raises(ZebraError, match="got another cache"):
        model.generate(ids, cache_implementation="static", max_new_tokens=2)
    if full_decode:
        with pytest.raises(ZebraError, match="use_cache=False"):
            model.generate(ids, use_cache=False, max_new_tokens=2)
    else:  # while the window holds all, any cache will do
        cache = DynamicCache(config=model.config)
        assert off(in_parts(model, ids[:, :30], [7, 23], cache), logits(model, ids[:, :30])) < 2e-5


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "full decoding of a dense model": (
        {"full_decode": True},
        "only local layers support full decoding; the layout full has none",
    ),
    "sinks without local layers": ({"stripes": "G:9+3"}, "only local layers support 3 sinks"),
    "a window of a dense model": ({"window": 64}, "requires local layers, but this layout is full"),
    "a window of zero": ({"stripes": "GL:9", "window": 0}, "got 0"),
}


@pytest.mark.parametrize(("arguments", "why"), BAD.values(), ids=BAD)
def test_what_has_no_local_layers_is_refused(arguments: dict[str, Any], why: str, checkpoints: MakeCheckpoint) -> None:
    with pytest.raises(ZebraError, match=why):
        zebra.load(checkpoints("llama"), **arguments)


@pytest.mark.parametrize(
    "card", ["{", "[]", '{"sinks": -1}', '{"sinks": 2147483648}', '{"sinks": true}', '{"full_decode": 1}']
)
def test_a_broken_zebra_json_is_refused(card: str, stories: Path) -> None:
    (stories / "zebra.json").write_text(card)
    with pytest.raises(ZebraError, match=r"zebra\.json"):
        zebra.load(stories, stripes="GL:9")


def test_converting_without_local_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ZebraError, match="the layout full has none"):
        zebra.convert(STORIES, tmp_path / "out", "G:9", full_decode=True)
    assert not (tmp_path / "out").exists()


def test_converting_with_sinks_under_alibi_is_refused(checkpoints: MakeCheckpoint, tmp_path: Path) -> None:
    source = checkpoints("zebra_study", position_embedding="alibi")
    with pytest.raises(ZebraError, match="sinks are not supported with ALiBi"):
        zebra.convert(source, tmp_path / "out", "GL:9+3")
    assert not (tmp_path / "out").exists()


def test_sinks_come_before_self_extend(checkpoints: MakeCheckpoint) -> None:
    model = zebra.load(checkpoints("llama"), stripes="GL:9", self_extend="3:7")
    with pytest.raises(ZebraError, match=r"3 sinks must be set before other overrides .* has SelfExtendAttention"):
        set_local_attention(model, LocalAttention(3))


def test_full_decoding_beyond_the_trained_length_has_a_warning(
    checkpoints: MakeCheckpoint, caplog: pytest.LogCaptureFixture
) -> None:
    zebra.load(checkpoints("llama"), stripes="GL:9+3", full_decode=True)
    assert not caplog.messages
    zebra.load(checkpoints("llama"), stripes="GL:9+3", full_decode=True, self_extend="3:7")
    assert "beyond the trained length these are new to the model" in caplog.messages[-1]


def test_a_decoded_token_sees_sinks_as_exactly_as_a_prompt_does() -> None:
    """However far it is: both round the angle of the query's position alike, and it cancels."""
    model = zebra.load(STORIES, stripes="GL:64+4", self_extend="128:256", dtype=torch.float64)
    ids = tokens(1, 2000)
    whole = logits(model, ids, logits_to_keep=8)
    decoded = in_parts(model, ids, [1992] + [1] * 8)
    assert off(decoded[:, -8:], whole) < 1e-12


def test_a_plain_cache_has_no_store(checkpoints: MakeCheckpoint) -> None:
    model = zebra.load(checkpoints("llama"), stripes=f"GLLL:{WINDOW}")
    assert type(bounded_cache(model)) is StripedCache
    assert not any(isinstance(layer, SinkLayer | FullDecodeLayer) for layer in bounded_cache(model).layers)
