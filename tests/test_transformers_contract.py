"""What we rely on in transformers, one test for each behaviour, over the family table.

A test that fails here shows which behaviour of transformers has changed, before anything of ours is blamed.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EVERY_MEMBER, FIXED, MEMBERS, ROOT, SHAPE, UNROUTED, fitting, tiny_config, tiny_model, tokens
from transformers import AttentionInterface, AutoConfig, DynamicCache, Trainer, TrainingArguments
from transformers.generation import BaseStreamer
from transformers.masking_utils import AttentionMaskInterface, create_causal_mask, create_sliding_window_causal_mask

import zebra
from zebra import SelfExtend, ZebraError
from zebra.kernels import attend
from zebra.model import attention
from zebra.model.attention import IGNORED_KWARGS, NAME, zebra_attention
from zebra.model.documents import PACKING_KWARGS
from zebra.model.families import model_class, route_of, with_stripes
from zebra.model.loss import head_of, without_logits
from zebra.model.opaque_layers import SelfExtendLayer
from zebra.model.routes import ROUTES
from zebra.model.self_extend import bounded_cache, set_self_extend
from zebra.model.self_extend.formula import formula_logits
from zebra.stripes import Stripes

LAYOUT = "GLLL:9"
WINDOW = 9


def tiny(member: str) -> Any:
    """A tiny striped model of the member's target class, with random weights."""
    config = with_stripes(tiny_config(member), Stripes.parse(fitting(member, LAYOUT)))
    torch.manual_seed(7)
    return model_class(config)._from_config(config, attn_implementation=NAME, dtype=torch.float32).eval()


IDS = tokens(2, 40)

KNOWN = {
    name
    for name, parameter in inspect.signature(zebra_attention).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
} | IGNORED_KWARGS.union(PACKING_KWARGS)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What reaches the registered function: positional count and keywords of every call."""
    calls: list[dict[str, Any]] = []

    def spy(module: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append({"module": module, "args": args, **kwargs})
        return zebra_attention(module, *args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, NAME, spy)
    return calls


@pytest.mark.parametrize("family", EVERY_MEMBER)
def test_no_unknown_argument_reaches_attention(family: str, calls: list[dict[str, Any]]) -> None:
    model = tiny(family)
    model(IDS, labels=IDS, use_cache=False, output_hidden_states=True, num_items_in_batch=3).loss.backward()
    model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, num_beams=2, do_sample=False)
    assert calls
    unknown = {name for call in calls for name, value in call.items() if value is not None} - KNOWN
    assert unknown - {"module", "args", "output_attentions"} == set()


@pytest.mark.parametrize("family", EVERY_MEMBER)
def test_an_unknown_argument_is_refused_by_name(family: str) -> None:
    with pytest.raises(NotImplementedError, match="does not support the argument block_table"):
        tiny(family)(IDS, block_table=torch.zeros(4))
    tiny(family)(IDS, block_table=None)


@pytest.mark.parametrize("family", EVERY_MEMBER)
def test_attention_weights_are_refused(family: str) -> None:
    with pytest.raises(NotImplementedError, match="output_attentions"):
        tiny(family)(IDS, output_attentions=True)


@pytest.mark.parametrize("family", EVERY_MEMBER)
def test_attention_dropout_in_training_is_refused(family: str) -> None:
    model = tiny(family)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    model.eval()(IDS)
    with pytest.raises(NotImplementedError, match="dropout"):
        model.train()(IDS)


@pytest.mark.parametrize("family", EVERY_MEMBER)
def test_the_decoder_hands_down_positions_scale_softcap_and_rotated_keys(
    family: str, calls: list[dict[str, Any]]
) -> None:
    model = tiny(family)
    positions = torch.arange(40)[None] + 5
    model(IDS, position_ids=positions, use_cache=False)
    scale = getattr(model.config, "attention_multiplier", getattr(model.config, "query_pre_attn_scalar", 8) ** -0.5)
    for call in calls:
        assert call["position_ids"].tolist() == positions.tolist()
        assert call["scaling"] == pytest.approx(scale)
        query, key, value, mask = call["args"]
        assert query.shape == (2, 4, 40, 8)
        assert key.shape == value.shape == (2, 2, 40, 8)
        assert mask is None
        assert call.get("softcap") == getattr(model.config, "attn_logit_softcapping", None)


@pytest.mark.parametrize("family", EVERY_MEMBER)
def test_each_layer_attends_in_the_window_of_its_kind(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    windows: list[int | None] = []

    def spy(q: Any, k: Any, v: Any, mask: Any, **kwargs: Any) -> Any:
        windows.append(mask.window)
        return attend(q, k, v, mask, **kwargs)

    monkeypatch.setattr(attention, "attend", spy)
    model = tiny(family)
    model(IDS, use_cache=False)
    assert windows == [None if kind == "full_attention" else WINDOW for kind in model.config.layer_types]
    assert 0 < windows.count(None) < len(windows)


@pytest.mark.parametrize("family", EVERY_MEMBER)
def test_the_mask_function_is_asked_once_for_each_kind_of_layer(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def spy(**kwargs: Any) -> Any:
        calls.append(kwargs)
        return attention.zebra_mask(**kwargs)

    monkeypatch.setitem(AttentionMaskInterface._global_mapping, NAME, spy)
    mask = torch.ones_like(IDS)
    mask[1, :5] = 0
    model = tiny(family)
    model(IDS, attention_mask=mask, use_cache=False)
    assert len(calls) == 2
    for call in calls:
        assert (call["batch_size"], call["q_length"], call["kv_length"], call["q_offset"]) == (2, 40, 40, 0)
        assert call["attention_mask"].dtype == torch.bool


def test_attention_registered_without_its_mask_function_loses_the_padding() -> None:
    """Why the two are registered together."""
    AttentionInterface.register("contract_alone", zebra_attention)
    config = tiny_config("llama")
    config._attn_implementation = "contract_alone"
    mask = torch.ones(1, 4)
    mask[0, 0] = 0
    arguments = {"inputs_embeds": torch.zeros(1, 4, 32), "attention_mask": mask, "past_key_values": None}
    assert create_causal_mask(config=config, **arguments) is None
    config._attn_implementation = NAME
    assert create_causal_mask(config=config, **arguments) is not None


def test_a_window_counts_the_query_itself() -> None:
    config = tiny_config("mistral", sliding_window=3)
    config._attn_implementation = "eager"
    mask = create_sliding_window_causal_mask(
        config=config, inputs_embeds=torch.zeros(1, 6, 32), attention_mask=None, past_key_values=None
    )
    assert (mask[0, 0] == 0).sum(dim=-1).tolist() == [1, 2, 3, 3, 3, 3]


@pytest.mark.parametrize("family", [member for member in EVERY_MEMBER if member != "zebra_study"])  # ours, made stock
def test_the_source_class_ignores_layer_types_or_is_its_own_target(family: str) -> None:
    """The reason for each route: where it leads to another class, the source's own would not stripe."""
    config = tiny_config(family)
    takes_layer_types = "layer_types" in inspect.signature(type(config)).parameters
    assert takes_layer_types == (route_of(config).target == config.model_type)


def test_every_row_of_the_table_has_a_tiny_member_or_a_reason() -> None:
    members = [member for member in MEMBERS if member != "zebra_study"]  # which no table has
    served = {(route_of(tiny_config(member)).family, route_of(tiny_config(member)).target) for member in members}
    assert served == {(row.family, row.target) for row in ROUTES if row.target is not None}
    assert {row.target for row in ROUTES if row.target} <= {row.family for row in ROUTES if row.target}
    assert all(row.reason for row in ROUTES)


REFUSED = [row.family for row in ROUTES if row.target is None]


@pytest.mark.parametrize("family", REFUSED)
def test_a_refused_family_is_one_that_transformers_has(family: str) -> None:
    with pytest.raises(ZebraError, match="is not supported"):
        route_of(AutoConfig.for_model(family))


# Why a family is refused, where a class comes near.


def names(model_type: str, **changes: Any) -> set[str]:
    config = AutoConfig.for_model(model_type, **(SHAPE | changes))
    with torch.device("meta"):
        return {f"{name} {tuple(t.shape)}" for name, t in model_class(config)(config).state_dict().items()}


def test_granite_swa_wants_sinks_that_granite_lacks() -> None:
    lacking = names("granite_swa") - names("granite")
    assert len(lacking) == 5
    assert all("self_attn.sinks" in name for name in lacking)


def test_no_class_with_layer_types_has_mixtrals_experts_and_windows_of_each_layer() -> None:
    mixtral = names("mixtral", num_local_experts=4)
    assert mixtral == names("minimax", num_local_experts=4, layer_types=["full_attention"] * 5)
    mellum = names("mellum", num_experts=4, moe_intermediate_size=48, head_dim=8)
    assert mellum > mixtral
    assert all("norm" in name for name in mellum - mixtral)


@pytest.mark.parametrize("family", sorted(FIXED))
def test_a_layer_that_changes_its_kind_changes_its_rope(family: str) -> None:
    """Why these families keep their kinds: moved layers change even inputs within the window."""
    config = tiny_config(family)
    torch.manual_seed(7)
    source = model_class(config)._from_config(config, attn_implementation=NAME, dtype=torch.float32).eval()
    moved = type(config)(**(config.to_dict() | {"layer_types": ["full_attention"] * 5}))
    other = model_class(moved)._from_config(moved, attn_implementation=NAME, dtype=torch.float32).eval()
    other.load_state_dict(source.state_dict())
    short = IDS[:, :WINDOW]
    assert (source(short).logits - other(short).logits).abs().max() > 1e-3


@pytest.mark.parametrize("family", EVERY_MEMBER)
def test_config_fields_survive_json(family: str) -> None:
    config = tiny(family).config
    again = type(config)(**config.to_dict())
    assert again.layer_types == config.layer_types == list(Stripes.parse(fitting(family, LAYOUT)).layer_types(5))
    assert again.sliding_window == WINDOW


@pytest.mark.parametrize("family", EVERY_MEMBER)
def test_a_mask_of_one_row_serves_a_batch(family: str) -> None:
    model = tiny(family)
    mask = torch.ones(1, 40, dtype=torch.long)
    mask[0, :7] = 0
    expected = model(IDS, attention_mask=mask.expand(2, -1), use_cache=False).logits
    assert torch.equal(model(IDS, attention_mask=mask, use_cache=False).logits, expected)


def test_a_window_of_one_is_wrong_in_the_stock_cache_alone() -> None:
    """Its slice by -(window - 1) keeps everything. When this fails, our cache need not mend it."""
    config = with_stripes(tiny_config("llama"), Stripes.parse("GL:1"))
    torch.manual_seed(7)
    model = model_class(config)._from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    cache = DynamicCache(config=config)
    for t in range(12):
        model(IDS[:1, t : t + 1], past_key_values=cache, use_cache=True)
    assert cache.layers[1].keys.shape[-2] > 0


def test_cwm_brings_its_own_defaults_where_a_field_is_not_written() -> None:
    """Why every field is written out."""
    bare = AutoConfig.for_model("cwm", num_hidden_layers=5)
    assert bare.eos_token_id == [128001, 128008, 128009]
    assert bare.rope_parameters["rope_type"] == "llama3"


def test_the_stock_local_cache_shows_window_less_one_and_holds_the_prefill() -> None:
    """Why the cache is trimmed. When this fails, transformers has fixed it and `TrimmedSlidingLayer` can go."""
    model = tiny("llama")
    cache = DynamicCache(config=model.config)
    long = torch.randint(3, 97, (1, 200))
    model(long, past_key_values=cache, use_cache=True)
    local = cache.layers[1]
    assert local.keys.shape[-2] == WINDOW - 1
    assert local.keys.untyped_storage().nbytes() >= 200 * local.keys[0, :, 0].numel() * 4


def test_the_stock_masks_let_packed_documents_leak_with_a_cache() -> None:
    """Why documents are taken from the positions in our function."""
    model = tiny_model("llama")
    positions = torch.cat([torch.arange(20), torch.arange(20)])[None]
    alone = model(IDS[:1, 20:], use_cache=False).logits
    packed = model(IDS[:1], position_ids=positions, use_cache=True).logits[:, 20:]
    assert (packed - alone).abs().max() > 1e-2


@pytest.mark.parametrize("family", EVERY_MEMBER)
def test_no_logits_and_the_last_hidden_state_is_what_the_head_takes(family: str) -> None:
    model = tiny(family)
    nothing = model(IDS, **without_logits())
    assert nothing.logits.shape == (2, 0, 97)
    assert nothing.past_key_values is None
    expected = model(IDS, use_cache=False).logits
    torch.testing.assert_close(head_of(model).logits(nothing.hidden_states[-1]), expected, rtol=1e-6, atol=1e-6)


def test_generate_makes_its_own_cache_only_where_none_is_given(checkpoints: Callable[..., Path]) -> None:
    model = zebra.load(checkpoints("qwen3"), stripes=LAYOUT)
    cache = DynamicCache(config=model.config)
    out = model.generate(
        IDS, attention_mask=torch.ones_like(IDS), past_key_values=cache, max_new_tokens=2, return_dict_in_generate=True
    )
    assert out.past_key_values is cache


def test_the_trainer_counts_tokens_for_our_loss_and_calls_back_after_a_save() -> None:
    parameters = inspect.signature(Trainer.__init__).parameters
    assert "compute_loss_func" in parameters
    source = inspect.getsource(Trainer._maybe_log_save_evaluate)
    assert source.index("self._save_checkpoint") < source.index("on_save")
    assert "average_tokens_across_devices" in inspect.signature(TrainingArguments.__init__).parameters


# Self-Extend


EXTENDABLE = [member for member in EVERY_MEMBER if member != "cohere2"] + list(UNROUTED)


@pytest.mark.parametrize("family", EXTENDABLE)
def test_a_model_passes_keys_through_the_cache_unread_and_rotates_by_halves(family: str) -> None:
    """All that Self-Extend needs of a model: it equals the formula, with the cache and without."""
    model = tiny_model(family)
    model.set_attn_implementation(NAME)
    set_self_extend(model, SelfExtend(3, 7))
    whole = model(IDS, use_cache=False).logits
    with formula_logits(model, SelfExtend(3, 7)) as formula:
        expected = formula(IDS)
    assert (whole - expected).abs().max() <= 2e-5 * expected.abs().max()
    cache = bounded_cache(model)
    parts = [model(part, past_key_values=cache, use_cache=True).logits for part in IDS.split([13, 1, 20, 6], dim=1)]
    assert (torch.cat(parts, dim=1) - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert any(isinstance(layer, SelfExtendLayer) for layer in cache.layers)
    with formula_logits(model, None) as formula:
        assert (whole - formula(IDS)).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize("family", UNROUTED)
def test_the_head_of_a_family_without_a_route_gives_its_logits(family: str) -> None:
    """Perplexity under Self-Extend rests on it."""
    model = tiny_model(family)
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:
        torch.nn.init.normal_(bias)
    nothing = model(IDS, **without_logits())
    assert nothing.logits.shape == (2, 0, 97)
    expected = model(IDS, use_cache=False).logits
    torch.testing.assert_close(head_of(model).logits(nothing.hidden_states[-1]), expected, rtol=1e-5, atol=1e-5)


def test_angles_are_computed_in_float32() -> None:
    """`rotation_between` repeats them."""
    rotary = tiny_model("llama", head_dim=16).double().model.rotary_emb
    positions = torch.arange(100_000, 100_030)[None]
    cos, _ = rotary(torch.zeros(1, dtype=torch.float64), positions)
    angles = positions.float()[..., None] * rotary.inv_freq.float()
    assert torch.equal(cos[..., :8], angles.cos().double())


def test_the_documentation_names_the_families_that_are_tried_with_self_extend() -> None:
    text = (ROOT / "docs" / "families.md").read_text()
    section = text[text.index("## Self-Extend") :]
    named = set(re.findall(r"`([a-z0-9_]+)`", section[: section.index("are refused")]))
    assert named >= {route_or_own(member) for member in EXTENDABLE}


def route_or_own(member: str) -> str:
    return str(tiny_config(member).model_type)


@pytest.mark.parametrize("stripes", [None, "GLLL:9"])
def test_generate_reads_behind_a_cache_and_leaves_all_but_the_last_token_in_it(
    checkpoints: Any, stripes: str | None
) -> None:
    """What `zebra.streaming` rests on: the whole prompt is handed in, and what the cache holds of it is not read."""
    model, ids = zebra.load(checkpoints("llama"), stripes=stripes), torch.arange(3, 43)[None]
    whole = model.generate(ids, max_new_tokens=6, do_sample=False)
    cache, read, streamed = bounded_cache(model), list[int](), list[Any]()

    class Streamer(BaseStreamer):
        def put(self, value: Any) -> None:
            streamed.append(value.flatten().tolist())

        def end(self) -> None:
            streamed.append("end")

    with torch.no_grad():
        model(ids[:, :30], past_key_values=cache, use_cache=True)
    options = {"max_new_tokens": 6, "do_sample": False, "past_key_values": cache, "return_dict_in_generate": True}
    with model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    ):
        output = model.generate(ids, attention_mask=torch.ones_like(ids), streamer=Streamer(), **options)
    assert torch.equal(output.sequences, whole)
    assert read == [10, *[1] * 5]
    assert output.past_key_values is cache
    assert {layer.get_seq_length() for layer in cache.layers} == {whole.shape[1] - 1}
    assert streamed == [ids[0].tolist(), *([token] for token in whole[0, 40:].tolist()), "end"]
