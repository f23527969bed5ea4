"""LoRA: what is trained, and that the written checkpoint is what was trained."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STORIES, adapt_recipe, losses
from safetensors.torch import load_file, save_file
from test_adapt import KILLS, kill_while_training, names
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import zebra
from zebra import ZebraError
from zebra.train import lora
from zebra.train.adapt import adapt
from zebra.train.recipe import Lora

peft = pytest.importorskip("peft")

IDS = torch.randint(3, 97, (1, 30), generator=torch.Generator().manual_seed(0))
STEPS = {"train__max_steps": 8, "train__learning_rate": 3e-3}


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_trained_is_what_longlora_trains(tied: bool, checkpoints: Callable[..., Path]) -> None:
    model = zebra.load(checkpoints("llama", tie_word_embeddings=tied), stripes="GL:9", dtype=torch.bfloat16)
    before = model(IDS).logits
    wrapped = lora.wrap(model, Lora(r=3, lora_alpha=12.0), seed=0)
    with torch.autocast("cpu", torch.bfloat16):  # B is zero at first, so nothing changes
        assert (wrapped(IDS).logits - before).norm() < 0.05 * before.norm()
    trained = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    kinds = {
        kind
        for kind in ("lora_A", "lora_B", "embed_tokens", "layernorm", "model.norm", "lm_head")
        if any(kind in name for name in trained)
    }
    # A tied head is trained with the embeddings; a head of its own stays frozen.
    assert kinds == {"lora_A", "lora_B", "embed_tokens", "layernorm", "model.norm"}
    assert wrapped.get_output_embeddings().weight.requires_grad == tied
    assert sum(name.endswith("lora_A.default.weight") for name in trained) == 4 * 5
    assert {p.dtype for p in wrapped.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for name, p in wrapped.named_parameters() if "base_layer" in name} == {torch.bfloat16}
    assert wrapped.peft_config["default"].lora_alpha == 12


def test_the_update_is_the_formula(checkpoints: Callable[..., Path]) -> None:
    """Merged, W becomes W + alpha / r * B A."""
    model = zebra.load(checkpoints("qwen3"), stripes="GL:9")
    w = model.model.layers[1].self_attn.q_proj.weight.detach().clone()
    wrapped = lora.wrap(model, Lora(r=2, lora_alpha=6.0, modules_to_save=()), seed=0)
    layer = wrapped.get_base_model().model.layers[1].self_attn.q_proj
    b, a = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    torch.nn.init.normal_(b)
    expected = w + 3.0 * (b @ a).detach()
    torch.testing.assert_close(wrapped.merge_and_unload().model.layers[1].self_attn.q_proj.weight, expected)


def test_an_adaptation_is_merged_into_a_plain_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    rows = adapt(adapt_recipe(run, lora={"r": 4}, evaluate=None, **STEPS))
    assert losses(rows)[-1] < losses(rows)[0]
    assert names(run / "model") == names(STORIES) | {"zebra.json"}
    plain = AutoModelForCausalLM.from_pretrained(run / "model")
    ids = AutoTokenizer.from_pretrained(run / "model")("Once upon a time", return_tensors="pt").input_ids
    adapter = lora.reload(zebra.load(STORIES, stripes="GLLL:33"), run / "checkpoints" / "checkpoint-8")
    torch.testing.assert_close(plain(ids).logits, adapter(ids).logits, atol=1e-4, rtol=1e-4)
    source = AutoModelForCausalLM.from_pretrained(STORIES)
    for name, trained in (("self_attn.q_proj", True), ("input_layernorm", True), ("mlp.up_proj", False)):
        same = torch.equal(*(model.model.layers[0].get_submodule(name).weight for model in (plain, source)))
        assert same != trained, name


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # of the test's own call
def test_an_adapter_stays_one_where_it_is_not_merged(tmp_path: Path) -> None:
    run = tmp_path / "run"
    results = adapt(
        adapt_recipe(
            run, lora={"r": 4, "merge": False}, train__length=300, evaluate__length=300, evaluate__eval_steps=8, **STEPS
        )
    )
    assert "adapter_config.json" in names(run / "model")
    written = json.loads((run / "model" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(run / "base")
    assert json.loads((run / "base" / "config.json").read_text())["use_cache"]
    with pytest.raises(ZebraError, match=r"is a peft adapter of .*, not a full checkpoint"):
        zebra.load(run / "model")
    moved = run.rename(tmp_path / "moved")
    config = moved / "model" / "adapter_config.json"
    with pytest.raises(ZebraError, match=rf"{run}/base, which is now at {moved}/base\. .* to {config}"):
        zebra.load(moved / "model")
    config.write_text(json.dumps(written | {"base_model_name_or_path": str(moved / "base")}))  # the remedy
    torch.testing.assert_close(
        peft.AutoPeftModelForCausalLM.from_pretrained(moved / "model")(IDS).logits,
        lora.reload(zebra.load(moved / "base"), moved / "model")(IDS).logits,
    )
    config.write_text(json.dumps(written))
    alone = shutil.copytree(moved / "model", tmp_path / "alone" / "model")
    with pytest.raises(ZebraError, match=f"{run}/base, which is gone"):
        zebra.load(alone)
    moved.rename(run)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(run / "model")
    trained = lora.reload(zebra.load(STORIES, stripes="GLLL:33"), run / "checkpoints" / "checkpoint-8")
    torch.testing.assert_close(loaded(IDS).logits, trained(IDS).logits, atol=1e-4, rtol=1e-4)
    values = {
        name: [one.value for one in results if one.metric == "perplexity" and one.model == name]
        for name in (f"{run}@8", str(run / "model"))
    }
    assert values[f"{run}@8"] == pytest.approx(values[str(run / "model")], rel=1e-4)


@pytest.mark.parametrize("merge", [True, False])
def test_what_differs_from_what_was_trained_is_never_written(
    merge: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel

    add, save = lora.add_updates, PeftModel.save_pretrained

    def halve(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data *= 0.5

    monkeypatch.setattr(lora, "add_updates", lambda model, trained: (halve(trained), add(model, trained)))

    def save_half(self: Any, folder: Path, *args: Any, **kwargs: Any) -> None:
        if "partial" in str(folder):
            halve(self)
        save(self, folder, *args, **kwargs)

    monkeypatch.setattr(PeftModel, "save_pretrained", save_half)
    with pytest.raises(ZebraError, match="logits of the written checkpoint differ"):
        adapt(adapt_recipe(tmp_path / "run", lora={"r": 4, "merge": merge}, evaluate=None, **STEPS))
    assert not (tmp_path / "run" / "model").exists()


def with_own_head(checkpoint: Path, *, tied: bool) -> Tensor:
    """Give a checkpoint an untied head, whatever its config says about ties; return the head."""
    tensors = load_file(checkpoint / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = table + 0.3 * torch.randn(table.shape, generator=torch.Generator().manual_seed(0))
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    config = checkpoint / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": tied}))
    return tensors["lm_head.weight"]


@pytest.mark.parametrize("lying", [True, False])
def test_a_head_of_its_own_is_neither_tied_nor_lost(lying: bool, stories: Path, tmp_path: Path) -> None:
    """Whether the head is tied is read from the tensors; config.json may be wrong."""
    head = with_own_head(stories, tied=lying)
    adapt(adapt_recipe(tmp_path / "run", model=str(stories), lora={"r": 4}, evaluate=None, **STEPS))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert not model.config.tie_word_embeddings
    assert torch.equal(model.lm_head.weight, head)
    assert not torch.equal(model.model.embed_tokens.weight, zebra.load(stories).model.embed_tokens.weight)


def test_a_merge_ties_nothing_that_its_source_does_not(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """peft ties by the config's flag, which the tensors of the source contradict."""
    with_own_head(stories, tied=True)
    monkeypatch.setattr("zebra.model.checkpoint.correct_by_weights", lambda config, path: None)

    def believe(model: Any) -> bool:
        model.config.tie_word_embeddings = True
        return True

    monkeypatch.setattr(lora, "has_tied_head", believe)
    with pytest.raises(ZebraError, match="logits of the written checkpoint differ"):
        adapt(adapt_recipe(tmp_path / "run", model=str(stories), lora={"r": 4}, evaluate=None, **STEPS))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")  # peft saves the frozen head beside its update
@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "lm_head"]])
def test_updates_of_the_head_are_trained(targets: list[str], stories: Path, tmp_path: Path) -> None:
    with_own_head(stories, tied=False)
    run, low_rank = tmp_path / "run", {"r": 4, "target_modules": targets, "modules_to_save": []}
    rows = adapt(adapt_recipe(run, model=str(stories), lora=low_rank, evaluate=None, **STEPS))
    assert losses(rows)[-1] < losses(rows)[0]
    heads = [load_file(folder / "model.safetensors")["lm_head.weight"] for folder in (run / "model", stories)]
    assert not torch.equal(*heads)


def test_the_dtype_of_weights_is_read_from_them(stories: Path, tmp_path: Path) -> None:
    file, config = stories / "model.safetensors", stories / "config.json"
    save_file({name: one.bfloat16() for name, one in load_file(file).items()}, file, {"format": "pt"})
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({name: value for name, value in fields.items() if name != "dtype"}))
    adapt(adapt_recipe(tmp_path / "run", model=str(stories), evaluate=None, train__max_steps=1))
    written = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert {one.dtype for one in written.values()} == {torch.bfloat16}


def test_the_frozen_weights_may_be_bfloat16(tmp_path: Path) -> None:
    changes = {"lora": {"r": 4, "base_dtype": "bfloat16"}, "train__bf16": True, "evaluate": None}
    rows = adapt(adapt_recipe(tmp_path / "run", **changes, **STEPS))
    assert losses(rows)[-1] < losses(rows)[0]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").dtype == torch.float32  # the source's


@pytest.mark.full
@pytest.mark.parametrize("when", KILLS)
def test_a_killed_low_rank_run_resumes_to_the_same_losses(when: str, tmp_path: Path) -> None:
    kill, _, _ = KILLS[when]
    changes = {"lora": {"r": 4}, "evaluate": None}
    expected = adapt(adapt_recipe(tmp_path / "whole", **changes))
    killed = adapt_recipe(tmp_path / "run", **changes)
    kill_while_training(killed, kill, tmp_path)
    assert losses(adapt(killed)) == losses(expected)


@pytest.mark.parametrize("name", ["qkv_proj", "lm_head"])
def test_modules_that_the_model_has_not_or_ties_are_refused_before_work(name: str, tmp_path: Path) -> None:
    recipe = adapt_recipe(tmp_path / "run", lora={"target_modules": ["q_proj", name]})
    with pytest.raises(ZebraError, match=rf"that are not tied to its embeddings; got {name}\. Choose from"):
        adapt(recipe)
    assert not (tmp_path / "run").exists()


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, checkpoints: Callable[..., Path]) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ZebraError, match=r"needs peft, not installed here.*'\.\[lora\]'"):
        lora.wrap(zebra.load(checkpoints("llama")), Lora(), seed=0)
