"""Loading and converting: what stays as transformers has it, what is rejected."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import EVERY_MEMBER, FIXED, STORIES, fitting, rejected, set_fields, tiny_config, tiny_model, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import zebra
from zebra import Stripes, ZebraError
from zebra.compare.run import compare
from zebra.evaluate.perplexity import evaluate_perplexity
from zebra.model import routes
from zebra.model.cache import StripedCache
from zebra.model.checkpoint import load_tokenizer, read_config
from zebra.model.families import layout, stripes_of, with_stripes
from zebra.model.load import read_device, read_dtype
from zebra.model.routes import Route
from zebra.plan.decoder import read_decoder

IDS = tokens(1, 30)


def tree(where: Path) -> set[str]:
    return {str(p.relative_to(where)) for p in where.rglob("*")}


def test_load_gives_the_stock_class_with_our_attention_and_cache(checkpoints: Callable[..., Path]) -> None:
    from transformers.models.cwm.modeling_cwm import CwmForCausalLM

    model = zebra.load(checkpoints("llama"), stripes=Stripes.parse("GLLL:9"))
    assert isinstance(model, CwmForCausalLM)
    assert type(model).__name__ == "CwmForCausalLM"
    assert model.config._attn_implementation == "zebra"
    assert layout(model.config) == "GLLL:9"
    out = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=5, return_dict_in_generate=True)
    assert isinstance(out.past_key_values, StripedCache)


def test_load_without_stripes_equals_plain_transformers(checkpoints: Callable[..., Path]) -> None:
    path = checkpoints("mistral", sliding_window=8)
    plain = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    ours = zebra.load(path)
    assert layout(ours.config) == "L:8"
    assert torch.allclose(ours(IDS).logits, plain(IDS).logits, atol=1e-4)


def test_load_takes_the_ordinary_arguments_of_from_pretrained(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(checkpoints("llama"), tmp_path / "inner" / "here")
    model = zebra.load(tmp_path / "inner", subfolder="here", max_position_embeddings=900, attention_dropout=0.0)
    assert model.config.max_position_embeddings == 900
    assert torch.equal(model(IDS).logits, zebra.load(checkpoints("llama"))(IDS).logits)
    for name in ("config", "output_loading_info", "attn_implementation"):
        with rejected(f"zebra.load does not accept {name}"):
            zebra.load(checkpoints("llama"), **{name: "x"})


@pytest.mark.parametrize("how", [lambda m: pickle.loads(pickle.dumps(m)), copy.deepcopy], ids=["pickle", "deepcopy"])
def test_a_loaded_model_can_be_pickled_and_copied(how: Callable[..., Any], checkpoints: Callable[..., Path]) -> None:
    model = zebra.load(checkpoints("qwen3"), stripes="GLLL:9")
    again = how(model)
    assert type(again) is type(model)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    out = again.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=2, return_dict_in_generate=True)
    assert isinstance(out.past_key_values, StripedCache)


@pytest.mark.parametrize("draft", ["same", "other"])
def test_a_striped_model_drafts_and_is_drafted_for(draft: str, checkpoints: Callable[..., Path]) -> None:
    """Assisted decoding crops both caches, and changes no token of a greedy text."""
    model = zebra.load(checkpoints("llama"), stripes="GLLL:9")
    assistant = zebra.load(checkpoints("llama", initializer_range=0.3 if draft == "same" else 0.25), stripes="LG:5")
    arguments = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 25, "do_sample": False, "eos_token_id": None}
    expected = model.generate(IDS, **arguments)
    assert model.generate(IDS, assistant_model=assistant, **arguments).tolist() == expected.tolist()


def test_loading_leaves_nothing_of_ours_in_the_config(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    model = zebra.load(checkpoints("qwen3"), stripes="GL:7")
    model.save_pretrained(tmp_path)
    written = (tmp_path / "config.json").read_text()
    assert "zebra" not in written
    assert json.loads(written)["architectures"] == ["Qwen3ForCausalLM"]


def test_convert_changes_the_config_alone(tmp_path: Path) -> None:
    converted = zebra.convert(STORIES, tmp_path / "out", "GLLL:129")
    weights = converted / "model.safetensors"
    assert (
        weights.samefile(STORIES / "model.safetensors")
        or weights.read_bytes() == (STORIES / "model.safetensors").read_bytes()
    )
    assert tree(converted) == tree(STORIES) | {"zebra.json"}
    for file in tree(STORIES) - {"config.json"}:
        assert (converted / file).read_bytes() == (STORIES / file).read_bytes()
    source, target = (json.loads((p / "config.json").read_text()) for p in (STORIES, converted))
    changed = {key for key in source.keys() | target.keys() if source.get(key) != target.get(key)}
    assert changed <= {
        "architectures",
        "model_type",
        "layer_types",
        "sliding_window",
        "attention_bias",
        "rope_theta",  # the older fields of the same rope
        "rope_scaling",
        "transformers_version",
    }
    card = json.loads((converted / "zebra.json").read_text())
    assert card["layout"] == "GLLL:129"
    assert card["window"] == 129
    assert card["versions"]["transformers"]
    assert AutoTokenizer.from_pretrained(converted)("Once")["input_ids"]


def test_convert_copies_where_it_cannot_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    converted = zebra.convert(STORIES, tmp_path / "out", "GL:9") / "model.safetensors"
    assert converted.read_bytes() == (STORIES / "model.safetensors").read_bytes()
    assert converted.stat().st_nlink == 1


def test_convert_follows_symbolic_links(tmp_path: Path) -> None:
    """The hub's cache is a directory of links to blobs."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in STORIES.iterdir():
        (snapshot / file.name).symlink_to(file)
    converted = zebra.convert(snapshot, tmp_path / "out", "GL:9")
    assert not any(file.is_symlink() for file in converted.iterdir())


def test_convert_of_a_sharded_checkpoint(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    shards = sorted(p.name for p in (tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 2
    converted = zebra.convert(tmp_path / "sharded", tmp_path / "out", "GL:9")
    assert sorted(p.name for p in converted.glob("*.safetensors")) == shards
    zebra.load(converted)
    (tmp_path / "sharded" / shards[1]).unlink()
    with pytest.raises(ZebraError, match=f"lacks the shards {shards[1]}"):
        zebra.convert(tmp_path / "sharded", tmp_path / "out2", "GL:9")


def test_a_converted_checkpoint_can_be_striped_anew(tmp_path: Path) -> None:
    zebra.convert(STORIES, tmp_path / "one", "GLLL:129")
    zebra.convert(tmp_path / "one", tmp_path / "two", "0,3:65")
    assert layout(read_config(tmp_path / "two")) == "GLL:65"  # the shorter name of 0,3 in five layers


@pytest.mark.parametrize("member", EVERY_MEMBER)
def test_stripes_of_reads_back_what_striped_wrote(member: str) -> None:
    for notation in ("GLLL:9", "LG:3", "1:7", "L:5"):
        expected = Stripes.parse(fitting(member, notation))
        output = stripes_of(with_stripes(tiny_config(member), expected))
        assert output is not None
        assert output.layer_types(5) == expected.layer_types(5)
        assert output.window == expected.window


def test_rope_and_tying_are_carried_over(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e4,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    model = tiny_model("llama", rope_parameters=rope, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "source")
    zebra.convert(tmp_path / "source", tmp_path / "out", "GL:20")
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert converted.config.rope_parameters == rope
    assert torch.equal(converted(IDS[:, :20]).logits, model(IDS[:, :20]).logits)


def test_a_raw_config_of_llama_2_without_newer_fields_converts(tmp_path: Path, stories: Path) -> None:
    config = json.loads((stories / "config.json").read_text())
    for newer in ("head_dim", "attention_bias", "mlp_bias", "rope_parameters", "num_key_value_heads"):
        config.pop(newer)
    config |= {"rope_theta": 10000.0, "rope_scaling": None, "num_key_value_heads": 4, "torch_dtype": "float32"}
    (stories / "config.json").write_text(json.dumps(config))
    zebra.convert(stories, tmp_path / "out", "GLLL:16")
    assert all(check.passed for check in zebra.verify(tmp_path / "out", against=stories))


# What bad input gets


@pytest.mark.parametrize("path", ["nowhere", "./nowhere/at/all", "/nowhere"])
def test_a_missing_checkpoint(path: str) -> None:
    with rejected("there is no checkpoint at"):
        zebra.load(path)


def test_a_directory_without_a_config(tmp_path: Path) -> None:
    with rejected("no config.json"):
        zebra.load(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "nonsense"}', "{}"])
def test_a_corrupt_config(stories: Path, content: str) -> None:
    (stories / "config.json").write_text(content)
    with rejected("cannot be read|is not supported"):
        zebra.load(stories)


def test_a_truncated_shard(stories: Path, tmp_path: Path) -> None:
    weights = stories / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    for act in (lambda: zebra.load(stories), lambda: zebra.convert(stories, tmp_path / "out", "GL:9")):
        with rejected("corrupt or truncated"):
            act()
    assert not (tmp_path / "out").exists()


def test_the_index_of_another_format_is_not_asked(tmp_path: Path) -> None:
    """Checkpoints come with the original's shards and their index beside transformers' own."""
    tiny_model("llama").save_pretrained(tmp_path / "source", max_shard_size="20KB")
    (tmp_path / "source" / "consolidated.safetensors.index.json").write_text('{"weight_map": {"a": "gone"}}')
    zebra.convert(tmp_path / "source", tmp_path / "out", "GL:9")
    shutil.copy(
        STORIES / "model.safetensors", tmp_path / "out"
    )  # a single file goes before an index, as in transformers
    with rejected("different models"):
        zebra.load(tmp_path / "out")


def as_bin(checkpoint: Path) -> Path:
    """The checkpoint with its weights in torch's older format."""
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    torch.save(tensors, checkpoint / "pytorch_model.bin")
    return checkpoint / "pytorch_model.bin"


@pytest.mark.parametrize("older", [True, False])
def test_ties_are_read_from_the_tensors(older: bool, stories: Path, tmp_path: Path) -> None:
    """With tie_word_embeddings: true a file may still hold the embeddings twice, or a different head."""
    file = stories / "model.safetensors"
    tensors = load_file(file)
    for own in (0.0, 1e-3):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + own
        (stories / "pytorch_model.bin").unlink(missing_ok=True)
        save_file(tensors, file, {"format": "pt"})
        if older:
            as_bin(stories)
        written = zebra.convert(stories, tmp_path / str(own), "GLLL:129")
        assert (
            read_config(stories).tie_word_embeddings
            == json.loads((written / "config.json").read_text())["tie_word_embeddings"]
        )
        model = zebra.load(written)
        assert model.config.tie_word_embeddings == (own == 0)
        assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])


def test_a_config_without_a_dtype_has_that_of_its_tensors(stories: Path, tmp_path: Path) -> None:
    file, config = stories / "model.safetensors", stories / "config.json"
    save_file({name: one.bfloat16() for name, one in load_file(file).items()}, file, {"format": "pt"})
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "dtype"}))
    assert read_config(stories).dtype == torch.bfloat16  # a budget in bytes rests on it
    written = zebra.convert(stories, tmp_path / "out", "GLLL:129")
    assert json.loads((written / "config.json").read_text())["dtype"] == "bfloat16"


def test_weights_in_the_older_format_are_read_and_checked(stories: Path, tmp_path: Path) -> None:
    expected = zebra.load(stories)(IDS).logits
    weights = as_bin(stories)
    converted = zebra.convert(stories, tmp_path / "out", "GLLL:129")
    assert torch.equal(zebra.load(converted)(IDS).logits, expected)
    assert torch.equal(zebra.load(stories)(IDS).logits, expected)
    weights.write_bytes(weights.read_bytes()[:5000])
    with rejected("corrupt or truncated"):
        zebra.convert(stories, tmp_path / "two", "GL:9")
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_attention_heads", 7), ("vocab_size", "a"), ("num_hidden_layers", -1), ("rope_parameters", 3)],
)
def test_a_config_that_describes_no_model(stories: Path, field: str, value: object) -> None:
    set_fields(stories, **{field: value})
    with rejected("cannot be read|is not valid|does not describe|num_hidden_layers must be from 1 to 1,000; got -1"):
        zebra.load(stories)


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "cpu:x"])
def test_a_device_that_is_not_there(device: str) -> None:
    with rejected(f"device '{device}' is not available"):
        read_device(device)


def test_dtypes_by_name() -> None:
    assert read_dtype("bfloat16") is read_dtype(torch.bfloat16) is torch.bfloat16
    for wrong in ("int8", torch.int8):
        with rejected("dtype must be one of float64"):
            read_dtype(wrong)


def test_weights_of_another_model(stories: Path, checkpoints: Callable[..., Path]) -> None:
    (stories / "model.safetensors").write_bytes((checkpoints("llama") / "model.safetensors").read_bytes())
    with rejected("Config and weights belong to different models"):
        zebra.load(stories)


@pytest.mark.parametrize("older", [True, False])
def test_a_missing_tensor_is_never_made_up(older: bool, stories: Path) -> None:
    tensors = load_file(stories / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, stories / "model.safetensors", metadata={"format": "pt"})
    if older:
        as_bin(stories)
    with rejected(r"lack model\.layers\.2\.mlp\.up_proj\.weight"):
        zebra.load(stories)


def test_tensors_that_would_be_dropped_in_silence(stories: Path) -> None:
    tensors = load_file(stories / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # older versions saved it
    save_file(tensors, stories / "model.safetensors", metadata={"format": "pt"})
    zebra.load(stories)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(64)
    save_file(tensors, stories / "model.safetensors", metadata={"format": "pt"})
    with rejected(r"q_proj\.bias and 0 more tensors that config\.json does not describe"):
        zebra.load(stories)


def test_no_weights_at_all(stories: Path) -> None:
    (stories / "model.safetensors").unlink()
    with rejected("has no weights"):
        zebra.load(stories)


def test_a_family_without_a_route(tmp_path: Path) -> None:
    AutoConfig.for_model("gpt2").save_pretrained(tmp_path / "known")
    with rejected("no stock class with learned absolute positions reads layer_types. See docs/families.md"):
        zebra.load(tmp_path / "known")
    AutoConfig.for_model("bloom").save_pretrained(tmp_path / "unknown")
    with rejected("the model family 'bloom' is not supported; supported families are llama, mistral"):
        zebra.load(tmp_path / "unknown")


def test_a_family_whose_class_this_transformers_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    route = Route("qwen3", "of_tomorrow", "it reads layer_types")
    monkeypatch.setattr(routes, "ROUTES", (route,))
    with rejected(f"runs as of_tomorrow, which transformers {transformers.__version__} does not have; upgrade"):
        with_stripes(tiny_config("qwen3"), Stripes.parse("GL:9"))


def test_the_first_row_that_takes_a_llama_serves_it() -> None:
    converted = {
        biased: with_stripes(tiny_config("llama", attention_bias=biased), Stripes.parse("GL:9"))
        for biased in (False, True)
    }
    assert [converted[biased].model_type for biased in (False, True)] == ["cwm", "smollm3"]
    assert converted[True].no_rope_layers == [1] * 5
    # cwm would use its own tokens
    assert with_stripes(tiny_config("llama", bos_token_id=None), Stripes.parse("GL:9")).model_type == "smollm3"
    with rejected("no bos_token_id or no eos_token_id: cwm would use its own"):
        with_stripes(tiny_config("mistral", eos_token_id=None), Stripes.parse("GL:9"))


def test_a_bidirectional_model() -> None:
    with rejected("it has bidirectional attention"):
        with_stripes(tiny_config("gemma2", use_bidirectional_attention=True), Stripes.parse("GL:9"))


@pytest.mark.parametrize("member", sorted(FIXED))
def test_layers_whose_rope_depends_on_their_kind_keep_it(member: str) -> None:
    same_kinds = Stripes.parse(fitting(member, "GLLL:9"))
    assert with_stripes(tiny_config(member), same_kinds).sliding_window == 9
    with rejected("only the window can change; got GLLL:9. Use .*:9"):
        with_stripes(tiny_config(member), Stripes.parse("GLLL:9"))


def test_one_rope_for_both_kinds_lets_layers_move() -> None:
    """Olmo 3 and Gemma 3 write a rope for each kind; they may be the same."""
    rope = {kind: {"rope_type": "default", "rope_theta": 5e3} for kind in ("full_attention", "sliding_attention")}
    assert layout(with_stripes(tiny_config("gemma3_text", rope_parameters=rope), Stripes.parse("GLLL:9"))) == "GLLL:9"


def test_qwen3_moe_becomes_mellum_with_the_same_layers_of_experts(tmp_path: Path) -> None:
    config = tiny_config("qwen3_moe", mlp_only_layers=[3], decoder_sparse_step=2)
    assert with_stripes(config, Stripes.parse("GL:9")).mlp_layer_types == ["dense", "sparse", "dense", "dense", "dense"]


def test_quantised_weights_of_gpt_oss() -> None:
    """Its published checkpoints are mxfp4; a layout changes nothing of that."""
    config = tiny_config("gpt_oss", quantization_config={"quant_method": "mxfp4"})
    assert with_stripes(config, Stripes.parse("GL:9")).quantization_config == {"quant_method": "mxfp4"}


@pytest.mark.parametrize("member", ["granite_swa", "gpt_oss"])
def test_learned_sinks_and_their_gradients_equal_transformers(member: str) -> None:
    """A learned sink is a score in the softmax without a value."""
    plain = tiny_model(
        member, sliding_window=9, layer_types=["full_attention", "sliding_attention"] * 2 + ["full_attention"]
    )
    for name, parameter in plain.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    output = []
    for implementation in ("eager", "zebra"):
        plain.set_attn_implementation(implementation)
        plain.zero_grad()
        out = plain(IDS, labels=IDS, use_cache=False)
        out.loss.backward()
        output.append([out.logits.detach(), *(p.grad for p in plain.parameters())])
    for one, other in zip(*output, strict=True):
        assert (one - other).norm() <= 1e-4 * one.norm().clamp(min=1e-3)


def test_experts_that_are_missing_are_found_in_the_files(tmp_path: Path) -> None:
    """Experts are separate tensors in the files, and one tensor in the model."""
    tiny_model("qwen2_moe").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with rejected(r"lack model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight"):
        zebra.load(tmp_path)


def test_llama_with_layer_types_is_a_trap(stories: Path) -> None:
    set_fields(stories, layer_types=["full_attention"] * 5, sliding_window=9)
    with rejected("ignores but its cache uses"):
        zebra.load(stories)


def test_a_layer_beyond_the_model() -> None:
    with rejected("names layer 9, but the model has 5 layers"):
        zebra.load(STORIES, stripes="0,9:16")


def test_source_and_target_the_same(stories: Path) -> None:
    before = tree(stories)
    with rejected("must be different directories"):
        zebra.convert(stories, stories, "GL:9")
    assert tree(stories) == before


def test_a_target_that_exists(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with rejected("exists already"):
        zebra.convert(STORIES, tmp_path / "out", "GL:9")
    assert tree(tmp_path) == {"out", "out/mine.txt"}


def test_a_failure_in_the_middle_leaves_no_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("zebra.model.load.write_zebra_json", fail)
    with pytest.raises(OSError, match="No space"):
        zebra.convert(STORIES, tmp_path / "out", "GL:9")
    assert tree(tmp_path) == set()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"stripe": "GL:8"}, "no option 'stripe'; did you mean stripes"),
        ({"device": "cpu"}, "no option 'device'; did you mean device_map"),
        ({"stripes": 8}, "stripes must be written PATTERN:WINDOW .* got 8"),
        ({"rope": 8}, "a rope must be none, .* got 8"),
        ({"self_extend": 8}, "Self-Extend must be GROUP:WINDOW, .* got 8"),
        ({"stripes": "GL:8", "window": "64"}, "the window, the number of keys .* got '64'"),
        ({"stripes": "GL:8", "full_decode": "no"}, "full_decode must be True, False or None; got 'no'"),
        ({"dtype": "bf16"}, "dtype must be one of .* got 'bf16'"),
        ({"dtype": torch.int8}, "dtype must be one of .* got 'int8'"),
    ],
)
def test_options_of_another_name_or_kind(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ZebraError, match=why):
        zebra.load(STORIES, **options)


def test_options_of_another_name_that_are_handed_on() -> None:
    for call in (
        lambda: zebra.generate(STORIES, "Once", stripe="GL:8"),
        lambda: zebra.Conversation(STORIES, stripe="GL:8"),
        lambda: evaluate_perplexity(STORIES, "README.md", lengths=[64], stripe="GL:8"),
        lambda: compare(str(STORIES), "README.md", length=64, out=Path("nowhere"), stripe="GL:8"),
    ):
        with pytest.raises(ZebraError, match="no option 'stripe'"):
            call()


def test_a_tokenizer_that_does_not_match(stories: Path) -> None:
    config = read_config(stories)
    config.vocab_size = 300
    with rejected("has ids up to 511, but the model has 300 embeddings"):
        load_tokenizer(stories, config)
    (stories / "tokenizer.json").write_text("{")
    with rejected("cannot be read"):
        load_tokenizer(stories, read_config(stories))


def test_a_4d_mask_is_refused(checkpoints: Callable[..., Path]) -> None:
    model = zebra.load(checkpoints("llama"), stripes="GL:9")
    with pytest.raises(ValueError, match="2-D attention_mask"):
        model(IDS, attention_mask=torch.ones(1, 1, 30, 30).tril())


@pytest.mark.parametrize("change", [{"sliding_window": 5}, {"layer_types": ["full_attention"] * 5}])
def test_a_config_that_changes_after_loading_is_an_error(
    checkpoints: Callable[..., Path], change: dict[str, Any]
) -> None:
    """It would change the cache and no layer."""
    model = zebra.load(checkpoints("llama"), stripes="GLLLL:9")
    ids = torch.arange(3, 30)[None]
    model(ids)
    for name, value in change.items():
        setattr(model.config, name, value)
    with pytest.raises(ValueError, match=r"config\.sliding_window .* layer 1 was built with a window of 9; .* Pass"):
        model(ids)


def test_a_plan_believes_the_tensors_of_a_head(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "tied")
    tied = read_decoder(tmp_path / "tied")
    tensors = load_file(tmp_path / "tied" / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    for head, is_tied in ((table.clone(), True), (table + 1, False)):
        shutil.copytree(tmp_path / "tied", tmp_path / "own", dirs_exist_ok=True)
        save_file(tensors | {"lm_head.weight": head}, tmp_path / "own" / "model.safetensors", {"format": "pt"})
        own = read_decoder(tmp_path / "own")
        assert own.tied is is_tied
        assert own.num_parameters == tied.num_parameters + (0 if is_tied else table.numel())
        assert own.num_parameters == zebra.load(tmp_path / "own").num_parameters()


def test_special_tokens_without_an_embedding_are_left_out(stories: Path) -> None:
    """Gemma 3 of text has a token of images, and many a tokenizer one of padding."""
    own = AutoTokenizer.from_pretrained(stories)
    more = AutoTokenizer.from_pretrained(
        stories, extra_special_tokens={"image_token": "<image_soft_token>"}, pad_token="[PAD]"
    )
    more.save_pretrained(stories)
    config = read_config(stories)
    read = load_tokenizer(stories, config)
    for text in ("a b", "a <image_soft_token> b [PAD]"):
        assert read(text).input_ids == own(text).input_ids
    assert read.name_or_path == str(stories)
    more.chat_template = "[PAD]{{ messages[0].content }}"
    more.save_pretrained(stories)
    with pytest.raises(zebra.ZebraError, match="ids up to 513, but the model has 512 embeddings"):
        load_tokenizer(stories, config)
