"""What a dry run says is what a run needs; the recipes that cannot run here are built at their real widths."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, STORIES, TEXT, Zebra, adapt_recipe, kind_of, losses, refused
from transformers import AutoConfig

import zebra
from zebra import ZebraError
from zebra.model.families import model_class
from zebra.plan.shapes import SHAPES, shape
from zebra.stripes import Stripes
from zebra.train import step_memory
from zebra.train.adapt import adapt
from zebra.train.dry_run import dry_run
from zebra.train.recipe import AdaptRecipe
from zebra.train.recipe_file import read_recipe
from zebra.train.step_memory import saved_storages

RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.yaml") if not path.stem.startswith("study-"))  # grids
BIG = [path for path in RECIPES if path.stem.startswith("lcat-") and not path.stem.endswith("-cpu")]

PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "qwen3-4b": 4_022_468_096,
    "smollm2-135m": 134_515_008,
    "gpt2-117m": 124_439_808,
    "gpt2-345m": 354_823_168,
}
"""Parameters, as the models' cards count them."""


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_the_parameters_that_were_published(name: str) -> None:
    config = AutoConfig.for_model(**shape(name))
    with torch.device("meta"):
        model = model_class(config)(config)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


def test_a_shape_of_another_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ZebraError, match="no built-in shape 'llama-9'"):
        dry_run(adapt_recipe(tmp_path, model="nowhere", shape="llama-9"))
    with pytest.raises(ZebraError, match="an estimate requires a checkpoint or a built-in shape"):
        dry_run(adapt_recipe(tmp_path, model="nowhere"))


_SLOW = ("lcat-llama2-7b-16k", "lit-7b-16k", "lcat-llama3-8b-64k", "lcat-qwen3-4b-32k")  # their layers are heavy


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.full] * (path.stem in _SLOW)) for path in RECIPES],
    ids=lambda path: path.stem,
)
def test_every_recipe_can_be_estimated(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    training_recipe = read_recipe(path, kind_of(path))
    estimate = dry_run(training_recipe)
    assert estimate.total == sum(estimate.memory.values()) > 0
    layers, layout = (
        int(estimate.facts["model"].split(", ")[1].split()[0]),
        estimate.facts["layout"].rpartition(", ")[0],
    )
    expected, estimated = (
        None if name in (None, "full") else Stripes.parse(name) for name in (training_recipe.stripes, layout)
    )
    assert (expected and expected.layer_types(layers)) == (estimated and estimated.layer_types(layers))
    assert (expected and expected.window) == (estimated and estimated.window)
    for size, unit in re.findall(r"^# Hardware:.* (\d+) (GB|GiB)\b", path.read_text(), re.MULTILINE):
        assert estimate.total < int(size) * (2**30 if unit == "GiB" else 10**9)
    # In these the head and the attention dominate; a layer's activations stay far below the weights of a big model.
    if path in BIG:
        assert 2**30 < estimate.total < 200 * 2**30
        assert "not available" in estimate.facts["text"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("length", [300, 900])
def test_activations_are_what_autograd_keeps(precision: str, length: int, tmp_path: Path) -> None:
    """Over all layers of the real model and at the real length, where the dry run saw two layers and 128 tokens."""
    training_recipe = adapt_recipe(tmp_path, train__length=length, train__bf16=precision == "bfloat16")
    model = zebra.load(STORIES, stripes=training_recipe.stripes, dtype=torch.float32).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"), saved_storages(model) as saved:
        model.model(torch.zeros(1, length, dtype=torch.long), use_cache=False)
    memory = dry_run(training_recipe).memory
    estimated = memory["activations"] + memory.get("weights cast to bfloat16", 0)
    assert estimated == pytest.approx(sum(saved.values()), rel=0.1)


def test_checkpointing_and_low_rank_need_less(tmp_path: Path) -> None:
    full = dry_run(adapt_recipe(tmp_path, train__length=4096))
    again = dry_run(adapt_recipe(tmp_path, train__length=4096, train__activation_checkpointing=True))
    low = dry_run(adapt_recipe(tmp_path, train__length=4096, lora={"r": 2, "modules_to_save": []}))
    assert again.total < full.total / 2
    assert low.memory["AdamW"] < full.memory["AdamW"] / 10
    assert low.memory["gradients"] * 2 == low.memory["AdamW"]


def test_checkpointing_is_on_where_a_step_does_not_fit_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = {
        choice: adapt_recipe(tmp_path, train__length=4096, train__activation_checkpointing=choice)
        for choice in (False, True, "auto")
    }
    without, with_it = (dry_run(recipes[choice]) for choice in (False, True))
    for room, expected, state in ((1.0, without, "off"), (0.99, with_it, "on")):
        memory = math.ceil(room * without.total / step_memory.USABLE)
        monkeypatch.setattr(step_memory, "device_memory", lambda device, memory=memory: memory)
        estimate = dry_run(recipes["auto"])
        assert estimate.memory == expected.memory
        assert estimate.facts["activation checkpointing"].startswith(state)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # two processes share a CPU's memory
        assert dry_run(recipes["auto"]).memory == with_it.memory
        monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert dry_run(recipes[False]).memory == without.memory


def test_a_dry_run_leaves_nothing(zebra: Zebra, tmp_path: Path) -> None:
    arguments = ("adapt", ROOT / "recipes" / "demo.yaml", "--set", f"run={tmp_path / 'run'}", "--dry-run")
    done = zebra(*arguments, "--json", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    estimate = json.loads(done.stdout)
    assert estimate["memory"]["total"] == sum(v for k, v in estimate["memory"].items() if k != "total")
    assert "600 steps, 2,457,600 tokens" in estimate["facts"]["training"]
    assert "total" in zebra(*arguments, cwd=ROOT).stdout
    assert not list(tmp_path.glob("run*"))
    refused(zebra(*arguments, "--set", "model=nowhere", cwd=ROOT), "no checkpoint at nowhere")


@pytest.mark.full
@pytest.mark.parametrize("path", BIG, ids=lambda path: path.stem)
def test_a_big_recipe_takes_a_step_with_two_layers_of_its_real_width(path: Path, tmp_path: Path) -> None:
    """Random weights, the example's tokenizer and so its vocabulary, short rows; the rest as the recipe says."""
    training_recipe = read_recipe(path, AdaptRecipe)
    assert training_recipe.shape is not None
    fields: dict[str, Any] = shape(training_recipe.shape) | {
        "num_hidden_layers": 2,
        "vocab_size": 512,
        "dtype": "bfloat16",
    }
    fields |= {"bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(**fields)
    model = model_class(config)._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (STORIES / name).exists():
            (tmp_path / "model" / name).write_bytes((STORIES / name).read_bytes())
    del model
    tree = training_recipe.model_dump() | {
        "run": str(tmp_path / "run"),
        "model": str(tmp_path / "model"),
        "evaluate": None,
        "parallel": {},
    }
    tree["data"] = {"files": [str(TEXT / "tinystories_test.txt")], "separator": "<|endoftext|>", "append_eos": True}
    tree["train"] |= {
        "length": 256,
        "max_steps": 1,
        "gradient_accumulation_steps": 1,
        "warmup_steps": 0,
        "device": "best",
    }
    tree["train"] |= {"logging_steps": 1, "save_steps": 1}
    rows = adapt(AdaptRecipe.model_validate(tree))
    assert (
        5.5 < losses(rows)[0] < 8
    )  # a random model guesses among 512 words: ln 512 = 6.2, and its logits have a width
