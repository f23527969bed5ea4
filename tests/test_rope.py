"""Changes of the rope: the notation, the frequencies of transformers, what is written, what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EVERY_MEMBER, logits, rejected, tiny_config, tiny_model, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM

import zebra
from zebra.model.checkpoint import read_config
from zebra.model.families import with_stripes
from zebra.model.rope import Rope, changes_with_length
from zebra.stripes import Stripes

IDS = tokens(1, 40)
TRAINED = 512
KINDS = ["linear:8", "yarn:8", "llama3:8", "base:5000000"]


@pytest.mark.parametrize("text", [*KINDS, "dynamic:1", "yarn:2.5", "none"])
def test_the_notation_reads_what_it_prints(text: str) -> None:
    assert str(Rope.parse(text)) == text
    assert Rope.parse(f"  {text.upper()} ") == Rope.parse(text)


def test_a_number_may_be_written_short() -> None:
    assert str(Rope.parse("base:5e6")) == "base:5000000"


@pytest.mark.parametrize("text", ["yarn", "yarn:1", "linear:0.5", "dynamic:0.9", "longrope:4", "none:2", "8", ""])
def test_what_extends_nothing_is_refused(text: str) -> None:
    with rejected(f"a rope must be none, base:THETA.*got {text}"):
        Rope.parse(text)


@pytest.mark.parametrize("text", ["yarn:", "yarn:x", "yarn:-8", "yarn:8:2", "yarn:1.2.3", "yarn:.", "base:nan"])
def test_a_number_that_is_none(text: str) -> None:
    with rejected("a rope must be written KIND:NUMBER"):
        Rope.parse(text)


def frequencies(model: Any) -> Tensor:
    return model.model.rotary_emb.inv_freq


def test_frequencies_are_the_formulas(checkpoints: Callable[..., Path]) -> None:
    path = checkpoints("llama")
    plain = frequencies(zebra.load(path))
    torch.testing.assert_close(frequencies(zebra.load(path, rope="linear:8")), plain / 8)
    expected = 5e6 ** -(torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(frequencies(zebra.load(path, rope="base:5e6")), expected)
    for text in ("yarn:8", "llama3:8"):
        share = frequencies(zebra.load(path, rope=text)) / plain
        assert share[0] == 1  # the fastest angle stays
        assert share[-1] == pytest.approx(1 / 8)  # the slowest is divided
    scaling = zebra.load(path, rope="yarn:8").model.rotary_emb.attention_scaling
    assert scaling == pytest.approx(0.1 * math.log(8) + 1)


@pytest.mark.parametrize("member", [m for m in EVERY_MEMBER if m not in ("cohere2", "granite_swa")])
@pytest.mark.parametrize("text", KINDS)
def test_transformers_reads_what_is_written(member: str, text: str) -> None:
    rope = Rope.parse(text)
    source = tiny_config(member)
    stripes = Stripes.of(source.layer_types, 9) if member in ("gemma3_text", "mellum") else Stripes.parse("GLLL:9")
    before = with_stripes(source, stripes)
    converted = rope.apply(before)
    assert converted.max_position_embeddings == (TRAINED if rope.kind == "base" else 8 * TRAINED)
    assert converted.model_type == before.model_type
    again = type(converted)(**converted.to_dict())
    assert again.rope_parameters == converted.rope_parameters
    if "full_attention" in converted.rope_parameters:
        assert converted.rope_parameters["sliding_attention"] == before.rope_parameters["sliding_attention"]
        parameters = converted.rope_parameters["full_attention"]
    else:
        parameters = converted.rope_parameters
    if rope.kind in ("yarn", "llama3"):
        assert parameters["original_max_position_embeddings"] == TRAINED
    assert before.rope_parameters == with_stripes(source, stripes).rope_parameters  # nothing was changed in place


def test_a_rotated_share_of_the_head_stays(checkpoints: Callable[..., Path]) -> None:
    config = tiny_config("llama", rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    config.rope_parameters["partial_rotary_factor"] = 0.5
    assert Rope.parse("yarn:8").apply(config).rope_parameters["partial_rotary_factor"] == 0.5


@pytest.mark.parametrize(
    ("member", "text"),
    [
        pytest.param(member, text, marks=() if member == "llama" or text == "yarn:8" else pytest.mark.full)
        for member in ("llama", "smollm3", "gemma2", "qwen3")
        for text in KINDS
    ],
)
def test_a_converted_checkpoint_runs_in_plain_transformers(
    member: str, text: str, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    converted = zebra.convert(checkpoints(member), tmp_path / "out", "GLLL:16", rope=text)
    ours = zebra.load(checkpoints(member), stripes="GLLL:16", rope=text)
    plain = AutoModelForCausalLM.from_pretrained(converted, attn_implementation="eager")
    assert plain.config.rope_parameters == ours.config.rope_parameters
    torch.testing.assert_close(logits(plain, IDS), logits(ours, IDS), rtol=1e-4, atol=1e-3)
    unchanged = zebra.load(checkpoints(member), stripes="GLLL:16")
    assert (logits(ours, IDS) - logits(unchanged, IDS)).abs().max() > 1e-2
    assert json.loads((converted / "zebra.json").read_text())["rope"] == text
    checks = zebra.verify(converted, against=checkpoints(member), rope=text)
    assert all(check.passed for check in checks)
    assert checks[0].difference == 0
    assert not zebra.verify(converted, against=checkpoints(member))[0].passed


def test_only_global_layers_change_where_each_kind_has_a_rope(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    source = checkpoints("olmo2")
    local = zebra.load(source, stripes="L:16")
    torch.testing.assert_close(logits(zebra.load(source, stripes="L:16", rope="yarn:8"), IDS), logits(local, IDS))
    converted = zebra.convert(source, tmp_path / "out", "GLLL:16", rope="yarn:8")
    with rejected("only the target's global layers, which the source's class olmo2 does not support"):
        zebra.verify(converted, against=source, rope="yarn:8")
    own = zebra.convert(checkpoints("gemma3_text"), tmp_path / "own", "1,3:16", rope="yarn:8")
    assert all(check.passed for check in zebra.verify(own, against=checkpoints("gemma3_text"), rope="yarn:8"))


# Refusals


def test_a_rope_that_is_scaled_already(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    converted = zebra.convert(checkpoints("llama"), tmp_path / "out", "GL:9", rope="linear:4")
    for text in ("yarn:2", "base:1e9"):
        with rejected("already scaled .*factor 4.0.*rope_type linear"):
            zebra.load(converted, rope=text)
    assert zebra.load(converted, rope="none").config.rope_parameters["factor"] == 4


def test_a_base_that_is_not_larger(checkpoints: Callable[..., Path]) -> None:
    with rejected("cannot be changed to base:10000: the base must be larger than the current 10,000"):
        zebra.load(checkpoints("llama"), rope="base:1e4")


def test_a_family_whose_global_layers_have_no_rope(checkpoints: Callable[..., Path]) -> None:
    with rejected("only its local layers have one"):
        zebra.load(checkpoints("cohere2"), rope="yarn:8")


def test_a_base_for_each_layer(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    source = checkpoints("granite_swa")
    with rejected("cannot be changed to base:50000: each layer has its own base .layer_rope_theta."):
        zebra.load(source, rope="base:50000")
    converted = zebra.convert(source, tmp_path / "out", "GL:16", rope="yarn:8")
    assert all(check.passed for check in zebra.verify(converted, against=source, rope="yarn:8"))


# Frequencies that change with the length


def test_dynamic_equals_transformers_and_needs_no_history(checkpoints: Callable[..., Path]) -> None:
    path = checkpoints("llama", max_position_embeddings=16)
    model = zebra.load(path, rope="dynamic:1")
    assert model.config.max_position_embeddings == 16
    parameters = {n: logits(model, IDS[:, :n]) for n in (10, 40, 24, 12)}  # a longer text before shorter ones
    for n, one in parameters.items():
        config = read_config(path)
        config.rope_parameters = {"rope_type": "dynamic", "factor": 1.0, "rope_theta": 1e4}
        fresh = AutoModelForCausalLM.from_pretrained(path, config=config, attn_implementation="eager")
        torch.testing.assert_close(one, logits(fresh, IDS[:, :n]), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(parameters[10], logits(zebra.load(path), IDS[:, :10]))


def test_a_model_whose_rope_changes_with_length_refuses_a_cache(checkpoints: Callable[..., Path]) -> None:
    model = zebra.load(checkpoints("llama", max_position_embeddings=16), stripes="GL:9", rope="dynamic:2")
    options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 2, "do_sample": False}
    for how in ({}, {"use_cache": True}, {"cache_implementation": "static"}):
        with rejected("its frequencies change with the length.*Pass use_cache=False"):
            model.generate(IDS, **options, **how)
    with rejected("use_cache=False"):
        model(IDS, use_cache=True)
    assert model(IDS).past_key_values is None
    assert model.generate(IDS, **options, use_cache=False).shape == (1, 42)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        {"rope_type": "longrope", "factor": 2.0, "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
        | {"original_max_position_embeddings": 16},
    ],
    ids=["dynamic", "longrope"],
)
def test_a_source_whose_rope_changes_with_length_is_measured_and_not_converted(rope: Any, tmp_path: Path) -> None:
    tiny_model("llama", max_position_embeddings=32, rope_parameters=rope).save_pretrained(tmp_path / "source")
    assert changes_with_length(read_config(tmp_path / "source")) == rope["rope_type"]
    model = zebra.load(tmp_path / "source")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "source", attn_implementation="eager")
    torch.testing.assert_close(logits(model, IDS), logits(plain, IDS), rtol=1e-4, atol=1e-3)
    with rejected("its frequencies change with the length"):
        model(IDS, use_cache=True)
    with rejected(f"fixed frequencies; those of a rope of type {rope['rope_type']} change"):
        zebra.convert(tmp_path / "source", tmp_path / "out", "GL:9")
    with rejected("already scaled"):
        zebra.load(tmp_path / "source", rope="yarn:4")


def test_a_dynamic_rope_of_the_global_layers_alone_needs_no_history_either(tmp_path: Path) -> None:
    rope = {
        "full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    tiny_model("gemma3_text", max_position_embeddings=16, rope_parameters=rope).save_pretrained(tmp_path)
    model = zebra.load(tmp_path)
    first = logits(model, IDS[:, :12])
    logits(model, IDS)
    torch.testing.assert_close(logits(model, IDS[:, :12]), first)


def test_convert_refuses_dynamic(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    with rejected("of type dynamic change"):
        zebra.convert(checkpoints("llama"), tmp_path / "out", "GL:9", rope="dynamic:4")
    with rejected("dynamic NTK supports only one"):
        zebra.load(checkpoints("olmo2"), stripes="GL:9", rope="dynamic:4")
