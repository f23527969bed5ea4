"""Untrusted checkpoint files: which paths they may name, which code may run, and what a copy may change."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import yaml
from conftest import STORIES, TEXT, Zebra, adapt_recipe, refused, rejected, set_fields, tiny_model, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from zebra import convert, load
from zebra.train.pretrain import config_of
from zebra.train.recipe import PretrainRecipe

IDS = tokens(1, 30)


def digests(directory: Path) -> dict[str, str]:
    return {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in directory.rglob("*") if f.is_file()}


def sharded(directory: Path, *names: str) -> Path:
    """A tiny checkpoint whose tensors are distributed over shards with these names."""
    tiny_model("llama").save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    shards = {name: dict(list(tensors.items())[i :: len(names)]) for i, name in enumerate(names)}
    for name, part in shards.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(part, directory / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {tensor: name for name, part in shards.items() for tensor in part}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


@pytest.mark.parametrize("names", [("a/w.safetensors", "b/w.safetensors"), ("a/w.safetensors",)])
@pytest.mark.parametrize("links", [True, False])
def test_shards_in_subfolders_are_shared_and_never_written(
    names: tuple[str, ...], links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sharded(tmp_path / "source", *names)
    before, expected = digests(source), load(source)(IDS).logits
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(18, "Invalid cross-device link")))
    converted = convert(source, tmp_path / "out", "GL:64")
    assert digests(source) == before
    assert all((converted / name).samefile(source / name) == links for name in names)
    assert torch.equal(load(converted)(IDS).logits, expected)


@pytest.mark.parametrize("name", ["../w.safetensors", "{}/w.safetensors", "a/../../w.safetensors", "config.json"])
def test_an_index_names_shards_within_the_checkpoint(name: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    source = sharded(tmp_path / "source", "w.safetensors")
    (tmp_path / "w.safetensors").write_bytes((source / "w.safetensors").read_bytes())
    (outside / "w.safetensors").write_bytes((source / "w.safetensors").read_bytes())
    index = source / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"w.safetensors"', json.dumps(name.format(outside))))
    before = digests(tmp_path)
    for act in (lambda: load(source), lambda: convert(source, tmp_path / "out", "GL:9")):
        with rejected(r"a shard must be a \.safetensors file inside the checkpoint's directory; got"):
            act()
    assert digests(tmp_path) == before


@pytest.mark.parametrize("kind", [torch.int8, torch.int64, torch.float8_e4m3fn])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_weights_of_integers(kind: torch.dtype, file: str, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(kind)
    (tmp_path / "model.safetensors").unlink()
    if file.endswith(".bin"):
        torch.save(tensors, tmp_path / file)
    else:
        save_file(tensors, tmp_path / file, metadata={"format": "pt"})
    with rejected(rf"{name} holds integers or 8-bit numbers, and config\.json has no quantization_config"):
        load(tmp_path)


# Numbers that no tensor's shape shows


ROPE = {"rope_type": "default", "rope_theta": 1e4}
WRONG_NUMBERS: list[dict[str, object]] = [
    {"rope_theta": 0},
    {"rope_theta": -1e4},
    {"rope_theta": math.nan, "rope_parameters": None},
    {"rope_parameters": ROPE | {"rope_theta": math.inf}},
    {"rope_parameters": None, "rope_scaling": {"rope_type": "linear", "factor": 0.0}},
    {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE | {"rope_theta": 0.0}}},
    {"head_dim": 0},
    {"max_position_embeddings": 0},
    {"rms_norm_eps": math.nan},
    {"initializer_range": math.nan},
]


@pytest.mark.parametrize("fields", WRONG_NUMBERS, ids=str)
def test_a_number_of_a_config_that_computes_nonsense(fields: dict[str, object], stories: Path, zebra: Zebra) -> None:
    set_fields(stories, **fields)
    with rejected(r" must be a finite number( above 0)?; got .*\. Fix its config\.json"):
        load(stories)
    target = stories.parent / "out"
    for verb in (("convert", stories, target, "--stripes", "GL:9"), ("plan", stories, "--length", 512)):
        refused(zebra(*verb), "must be a finite number", "Fix its config.json")
    assert not target.exists()


DEEP = "[" * 100_000 + "]" * 100_000
NO_MODEL: dict[str, tuple[str, object]] = {
    "an activation that is none": ("config.json", {"hidden_act": "nope"}),
    "no head": ("config.json", {"num_attention_heads": 0}),
    "more layers than any machine": ("config.json", {"num_hidden_layers": 10**9}),
    "a wider one": ("config.json", {"hidden_size": 10**12}),
    "padding without an embedding": ("config.json", {"pad_token_id": 10**12}),
    "null for a number": ("config.json", {"pretraining_tp": None}),
    "a list for an object": ("config.json", {"rope_parameters": []}),
    "a list": ("config.json", "[]"),
    "deep": ("config.json", DEEP),
    "generation, a list": ("generation_config.json", "[]"),
    "generation, deep": ("generation_config.json", DEEP),
    "generation, a word for a token": ("generation_config.json", '{"eos_token_id": "x"}'),
    "settings, cut": ("zebra.json", '{"sin'),
    "index without a map": ("model.safetensors.index.json", '{"metadata": {}}'),
    "index, deep": ("model.safetensors.index.json", DEEP),
}


@pytest.mark.parametrize(("file", "content"), NO_MODEL.values(), ids=NO_MODEL.keys())
def test_files_that_describe_no_model_are_one_line(file: str, content: object, stories: Path, zebra: Zebra) -> None:
    """They used to end in a traceback, or never."""
    if isinstance(content, dict):
        set_fields(stories, **content)
    else:
        (stories / file).write_text(str(content))
    if file.endswith(".index.json"):
        (stories / "model.safetensors").unlink()
    refused(zebra("convert", stories, stories.parent / "out", "--stripes", "GL:9"))


def set_tokenizer(checkpoint: Path, **parts: Any) -> None:
    file = checkpoint / "tokenizer.json"
    tree = json.loads(file.read_text())
    tree["model"] |= parts.pop("model", {})
    file.write_text(json.dumps(tree | parts))


def test_a_tokenizer_of_no_use_is_one_line(stories: Path, zebra: Zebra) -> None:
    def generate() -> Any:
        return zebra("generate", stories, "--prompt", "a" * 40 + "c" + "x" * 60, "--max-new-tokens", 1)

    growing = {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 170}
    set_tokenizer(stories, normalizer={"type": "Sequence", "normalizers": [growing, growing]})
    refused(generate(), "normalize one character to at most")
    pattern = {"Regex": "(a|aa)+$|(x+x+)+y|(?:a+)+b"}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    set_tokenizer(stories, normalizer=None, pre_tokenizer=split)
    done = generate()  # whose library writes of its own panic to the process's stderr
    refused(done, "a Rust library panicked", "retry-limit-in-match over")
    set_tokenizer(stories, pre_tokenizer=None, model={"vocab": {}, "merges": []}, added_tokens=[], post_processor=None)
    refused(generate(), str(stories), "tokenizer")


def test_a_number_that_is_passed_to_load_or_written_in_a_recipe() -> None:
    with rejected("head_dim must be a finite number above 0; got 0"):
        load(STORIES, head_dim=0)
    model = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "rope_parameters": ROPE}
    tree = {"run": "x", "model": model | {"rope_parameters": ROPE | {"rope_theta": -1.0}}, "tokenizer": str(STORIES)}
    tree |= {"data": {"files": ["x"]}, "train": {"length": 8, "max_steps": 1, "learning_rate": 1.0}}
    with rejected("model: rope_theta must be a finite number above 0; got -1"):
        config_of(PretrainRecipe.model_validate(tree))


def test_weights_under_other_names(stories: Path) -> None:
    set_fields(stories, transformers_weights="other.safetensors")
    with rejected(r"transformers_weights is not supported, .* got 'other\.safetensors'"):
        load(stories)


def test_what_is_pushed_to_the_hub_has_its_sinks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers uploads at the end of its own `save_pretrained`, before zebra.json is written."""
    uploads: list[tuple[str, set[str], object]] = []
    model = load(STORIES, stripes="GLLL:65+4")

    class Hub:
        def create_repo(self, repo_id: str, **options: object) -> object:
            return SimpleNamespace(repo_id=repo_id)

    def upload(directory: str, repo_id: str, files_timestamps: object, **options: object) -> None:
        uploads.append((repo_id, set(os.listdir(directory)), options["commit_message"]))

    monkeypatch.setattr("transformers.utils.hub.hf_api", Hub)
    monkeypatch.setattr(
        "transformers.utils.hub.create_and_tag_model_card",
        lambda *_, **__: SimpleNamespace(save=lambda path: Path(path).touch()),
    )
    monkeypatch.setattr(model, "_upload_modified_files", upload)
    model.save_pretrained(tmp_path / "striped", push_to_hub=True, commit_message="four sinks")
    model.push_to_hub("somebody/striped")
    assert [(name, message) for name, _, message in uploads] == [("striped", "four sinks"), ("somebody/striped", None)]
    assert all({"zebra.json", "config.json", "model.safetensors"} <= files for _, files, _ in uploads)
    assert (tmp_path / "striped" / "zebra.json").is_file()


# An adapter beside its base


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # of the test's own call
def test_an_adapter_beside_its_base_is_rejected_by_every_verb(stories: Path, tmp_path: Path, zebra: Zebra) -> None:
    before = load(STORIES)(IDS).logits
    base = AutoModelForCausalLM.from_pretrained(STORIES)
    wrapped = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    wrapped.save_pretrained(stories)
    text, out = TEXT / "tinystories_test.txt", tmp_path / "out"
    recipe = tmp_path / "adapt.yaml"
    recipe.write_text(yaml.safe_dump(adapt_recipe(tmp_path / "run", model=str(stories)).model_dump(mode="json")))
    for verb in (
        ("convert", stories, out, "--stripes", "GL:9"),
        ("verify", stories, "--against", STORIES),
        ("verify", STORIES, "--against", stories),
        ("plan", stories, "--length", 512),
        ("generate", stories, "--prompt", "Once"),
        ("evaluate", "perplexity", stories, text, "--length", 64),
        ("select", stories, "--budget", 2, "--window", 16, "--length", 64, "--text", text),
        ("adapt", recipe),
        ("adapt", recipe, "--dry-run"),
    ):
        refused(zebra(*verb), "has both a full checkpoint and a peft adapter", "merge_and_unload")
    assert not out.exists()
    with rejected("has both a full checkpoint and a peft adapter"):
        load(stories)
    both = AutoModelForCausalLM.from_pretrained(stories)(IDS).logits
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):  # the remedies
        (stories / name).rename(adapter / name)
    assert torch.equal(load(stories)(IDS).logits, before)
    merged = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(str(stories)), adapter)
    merged.merge_and_unload().save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(load(tmp_path / "merged")(IDS).logits, both)


# Code of others


def with_code(checkpoint: Path, *, config: bool = False, tokenizer: bool = False) -> Path:
    """Add Python code to the checkpoint that creates a file when it runs; return that file's path."""
    witness = checkpoint.parent / "it_ran"
    (checkpoint / "custom.py").write_text(
        f"open({str(witness)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, PreTrainedTokenizerFast\n"
        "class Config(LlamaConfig): model_type = 'custom'\n"
        "class Tokenizer(PreTrainedTokenizerFast): pass\n"
    )
    if config:
        set_fields(checkpoint, model_type="custom", auto_map={"AutoConfig": "custom.Config"})
    if tokenizer:
        file = checkpoint / "tokenizer_config.json"
        fields = json.loads(file.read_text()) if file.exists() else {}
        own = {"auto_map": {"AutoTokenizer": [None, "custom.Tokenizer"]}, "tokenizer_class": "CustomTokenizer"}
        file.write_text(json.dumps(fields | own))
        set_fields(checkpoint, model_type="smollm3")  # a family for which transformers knows no class of tokenizer
    return witness


def test_code_of_a_checkpoint_runs_only_where_it_is_trusted(
    stories: Path, tmp_path: Path, zebra: Zebra, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is on standard input: transformers would ask for consent there, and accept a "y" from a pipe."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    witness = with_code(stories, tokenizer=True)
    text, recipe = TEXT / "tinystories_test.txt", tmp_path / "adapt.yaml"
    adapted = adapt_recipe(tmp_path / "run", model=str(stories), evaluate=None).model_dump(mode="json")
    recipe.write_text(yaml.safe_dump(adapted))
    pipeline = tmp_path / "run.yaml"
    stages = {"evaluate": {"perplexity": {"text": [str(text)], "lengths": [64]}}}
    pipeline.write_text(yaml.safe_dump({"run": str(tmp_path / "pipeline"), "model": str(stories), "stages": stages}))
    document = tmp_path / "qa.jsonl"
    document.write_text('{"document": "a", "question": "b", "answers": ["c"]}\n')
    verbs: tuple[tuple[object, ...], ...] = (
        ("generate", stories, "--prompt", "Once", "--max-new-tokens", 2),
        ("evaluate", "perplexity", stories, text, "--length", 64),
        ("evaluate", "retrieval", stories, "--task", "passkey", "--length", 256),
        ("evaluate", "documents", stories, document),
        ("select", stories, "--budget", 2, "--window", 16, "--length", 64, "--text", text, "--out", tmp_path / "s"),
        ("adapt", recipe),
        ("run", pipeline),
    )
    for verb in verbs:
        refused(zebra(*verb, input="y\n" * 9), "is custom Python code", "--trust-remote-code")
    assert not witness.exists()
    done = zebra("generate", stories, "--prompt", "Once", "--max-new-tokens", 2, "--trust-remote-code")
    assert done.returncode == 0, done.stderr
    assert witness.exists()


def test_a_model_that_is_code_of_a_checkpoint_is_never_run(stories: Path, zebra: Zebra) -> None:
    witness = with_code(stories, config=True)
    with rejected("its model is custom Python code, and zebra runs only model classes of transformers"):
        load(stories)
    with rejected("zebra.load does not accept trust_remote_code: it runs only model classes of transformers"):
        load(STORIES, trust_remote_code=True)
    load(STORIES, trust_remote_code=False)
    done = zebra("generate", stories, "--prompt", "Once", "--trust-remote-code", input="y\n")
    refused(done, "its model is custom Python code")
    assert not witness.exists()


class _Code:
    def __init__(self, call: Any, *arguments: object):
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[object, ...]:
        return self.call, self.arguments


@pytest.mark.parametrize("older", [True, False])
@pytest.mark.parametrize("call", [Path.touch, os.mkdir])  # torch names modules such as os in another message
def test_a_pickle_runs_nothing(call: Any, older: bool, stories: Path, tmp_path: Path) -> None:
    tensors = load_file(stories / "model.safetensors")
    (stories / "model.safetensors").unlink()
    code = tensors | {"x": _Code(call, tmp_path / "it_ran")}
    torch.save(code, stories / "pytorch_model.bin", _use_new_zipfile_serialization=not older)
    with rejected(r"pytorch_model\.bin is a pickle of more than tensors, .* Use model\.safetensors"):
        load(stories)
    assert not (tmp_path / "it_ran").exists()


@pytest.mark.parametrize("content", [[torch.ones(3)], {"model": {"a": torch.ones(3)}}, "text"], ids=str)
def test_a_pickle_of_something_else(content: object, stories: Path) -> None:
    (stories / "model.safetensors").unlink()
    torch.save(content, stories / "pytorch_model.bin")
    with rejected(r"pytorch_model\.bin is corrupt or truncated: it is not a dict of tensors"):
        load(stories)
