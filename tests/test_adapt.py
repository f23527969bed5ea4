"""Adaptation end to end on the real tiny checkpoint: what a run leaves, and what a kill does to it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import (
    KILL_AT_A_LOG,
    STORIES,
    TEXT,
    FinishedRun,
    adapt_recipe,
    fitting,
    killed,
    losses,
    tiny_model,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

import zebra
from zebra import ZebraError
from zebra.model.checkpoint import read_local_attention
from zebra.model.local import LocalAttention
from zebra.results import read_results
from zebra.train import step_memory
from zebra.train.adapt import adapt
from zebra.train.directory import COMPLETE
from zebra.train.recipe import AdaptRecipe

SEPARATOR = "<|endoftext|>"
STEPS = 6
RUN_FILES = {"recipe.yaml", "inputs.json", "before.jsonl", "checkpoints", "model", "model.json", "results.jsonl"}
"""What a finished run has."""


def names(where: Path) -> set[str]:
    return {p.name for p in where.iterdir()}


def test_a_run_leaves_a_checkpoint_and_its_rows(adapt_run: FinishedRun) -> None:
    run, rows = adapt_run
    assert names(run) == RUN_FILES
    assert read_results(run / "results.jsonl") == rows
    assert AdaptRecipe.model_validate(yaml.safe_load((run / "recipe.yaml").read_text())) == adapt_recipe(run)
    assert len(losses(rows)) == STEPS
    assert [row.n for row in rows if row.metric == "loss"] == [600 * (i + 1) for i in range(STEPS)]
    measured = {(row.model, row.layout) for row in rows if row.metric == "perplexity"}
    assert measured == {
        (str(STORIES), "full"),
        (str(STORIES), "GLLL:33"),
        (f"{run}@3", "GLLL:33"),
        (f"{run}@6", "GLLL:33"),
        (str(run / "model"), "GLLL:33"),
    }
    whole = [row.value for row in rows if (row.position_from, row.position_to) == (0, 600)]
    assert whole[3] < whole[2]  # it learns from step 3 to step 6
    assert {row.seed for row in rows} == {0}
    assert all(row.versions["torch"] and row.device for row in rows)


def test_the_adapted_checkpoint_is_a_plain_one(adapt_run: FinishedRun) -> None:
    run, rows = adapt_run
    model = run / "model"
    assert names(model) == names(STORIES) | {"zebra.json"}
    plain = AutoModelForCausalLM.from_pretrained(model)
    ours = zebra.load(model)
    assert plain.config.max_position_embeddings == 600
    assert plain.config.use_cache  # the Trainer turns it off for itself
    assert plain.config.layer_types[:2] == ["full_attention", "sliding_attention"]
    ids = AutoTokenizer.from_pretrained(model)(
        "Once upon a time there was a little girl.", return_tensors="pt"
    ).input_ids
    torch.testing.assert_close(plain(ids).logits, ours(ids).logits, atol=1e-4, rtol=1e-4)
    source = AutoModelForCausalLM.from_pretrained(STORIES)
    assert not torch.equal(source.model.layers[0].mlp.up_proj.weight, plain.model.layers[0].mlp.up_proj.weight)
    card = json.loads((model / "zebra.json").read_text())
    assert (card["layout"], card["steps"], card["tokens"]) == ("GLLL:33", STEPS, STEPS * 600)
    # What was measured at the last step is what the written checkpoint gives.
    last = {
        name: [row.value for row in rows if row.metric == "perplexity" and row.model == name]
        for name in (f"{run}@6", str(model))
    }
    assert last[f"{run}@6"] == pytest.approx(last[str(model)], rel=1e-6)


def test_the_loss_is_that_of_transformers(adapt_run: FinishedRun) -> None:
    """The first logged loss equals what stock transformers computes for the same rows."""
    _, rows = adapt_run
    from zebra.data.corpus import read_corpus
    from zebra.data.encoding import Encoder
    from zebra.data.packing import pack
    from zebra.model.checkpoint import load_tokenizer, read_config

    encoder = Encoder.of(load_tokenizer(STORIES, read_config(STORIES)))
    corpus = read_corpus([str(TEXT / "tinystories_test.txt")], encoder, separator=SEPARATOR)
    packed = pack(corpus, 600, join=True, seed=0)
    model = zebra.load(STORIES, stripes="GLLL:33")
    with torch.no_grad():
        stock = (
            model(packed[i]["input_ids"][None], labels=packed[i]["labels"][None], use_cache=False).loss.item()
            for i in range(len(packed))
        )
        assert any(abs(loss - losses(rows)[0]) < 1e-5 for loss in stock)


def test_a_finished_run_is_not_run_again(adapt_run: FinishedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run, rows = adapt_run
    monkeypatch.setattr("zebra.train.run.run_trainer", lambda *_: pytest.fail("trained again"))
    assert adapt(adapt_recipe(run)) == rows
    assert zebra.adapt(run / "recipe.yaml") == zebra.adapt(str(run / "recipe.yaml")) == rows


def test_a_run_directory_belongs_to_one_recipe(adapt_run: FinishedRun, tmp_path: Path) -> None:
    run, _ = adapt_run
    with pytest.raises(ZebraError, match=r"another recipe: train\.learning_rate, train\.max_steps differ"):
        adapt(adapt_recipe(run, train__learning_rate=2e-3, train__max_steps=24))
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ZebraError, match="is not a run of zebra"):
        adapt(adapt_recipe(tmp_path))


KILL_IN_A_SAVE = """
from transformers import Trainer
save = Trainer._save_optimizer_and_scheduler
def save_or_die(self, output_dir):
    if self.state.global_step == 4:
        die()
    return save(self, output_dir)
Trainer._save_optimizer_and_scheduler = save_or_die
"""
KILL_IN_THE_EXPORT = """
from zebra.train import source
source.write_config = lambda *_: die()
"""
KILLS = {
    "between saves": (KILL_AT_A_LOG, {"checkpoint-2"}, {"checkpoint-2"}),
    "inside a save": (KILL_IN_A_SAVE, {"checkpoint-2", "checkpoint-4"}, {"checkpoint-2"}),
    "inside the export": (KILL_IN_THE_EXPORT, {"checkpoint-4", "checkpoint-6"}, {"checkpoint-4", "checkpoint-6"}),
}


def kill_while_training(training_recipe: Any, kill: str, where: Path, verb: str = "adapt") -> None:
    (where / "recipe.yaml").write_text(yaml.safe_dump(training_recipe.model_dump(mode="json")))
    killed(kill, verb, where / "recipe.yaml")


@pytest.mark.parametrize(
    "when", [pytest.param(when, marks=[] if when == "inside a save" else pytest.mark.full) for when in KILLS]
)
def test_a_killed_run_resumes_to_the_same_losses(when: str, adapt_run: FinishedRun, tmp_path: Path) -> None:
    kill, left, whole = KILLS[when]
    run = tmp_path / "run"
    kill_while_training(adapt_recipe(run), kill, tmp_path)
    checkpoints = run / "checkpoints"
    assert names(checkpoints) == left
    assert {p.name for p in checkpoints.iterdir() if (p / COMPLETE).exists()} == whole
    assert not (run / "model").exists()
    assert not (run / "results.jsonl").exists()

    rows = adapt(adapt_recipe(run))
    _, expected = adapt_run
    assert losses(rows) == losses(expected)
    values = [[row.value for row in some if row.metric == "perplexity"] for some in (rows, expected)]
    assert values[0] == values[1]
    assert names(run) == RUN_FILES


@pytest.mark.parametrize(
    "changes",
    [
        {"data__join": False, "data__append_eos": True},
        pytest.param({"train__activation_checkpointing": True}, marks=pytest.mark.full),
        {"train__bf16": True},
        {"stripes": None},
    ],
    ids=("documents apart", "checkpointing", "bf16", "no stripes"),
)
def test_every_choice_of_a_recipe_runs(changes: dict[str, Any], tmp_path: Path) -> None:
    rows = adapt(adapt_recipe(tmp_path / "run", evaluate=None, train__max_steps=2, **changes))
    assert len(losses(rows)) == 2
    assert all(0 < loss < 10 for loss in losses(rows))
    assert {row.task for row in rows} == {"train", "cost"}


def test_tokens_are_counted_and_not_estimated(tmp_path: Path) -> None:
    """With three rows and batches of two, steps alternate between two rows and one."""
    few = tmp_path / "few.txt"
    few.write_text(SEPARATOR.join((TEXT / "tinystories_test.txt").read_text().split(SEPARATOR)[:2]))
    short = {"train__length": 180, "train__per_device_train_batch_size": 2, "train__max_steps": 4, "evaluate": None}
    rows = adapt(adapt_recipe(tmp_path / "run", data__files=[str(few)], **short))
    counts = [row.n for row in rows if row.metric == "loss"]
    assert counts == [360, 540, 900, 1080]
    assert json.loads((tmp_path / "run" / "model" / "zebra.json").read_text())["tokens"] == 1080


def test_attention_dropout_of_the_checkpoint_is_off_and_said(
    stories: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((stories / "config.json").read_text())
    (stories / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))
    adapt(adapt_recipe(tmp_path / "run", model=str(stories), train__max_steps=1, evaluate=None))
    assert "attention_dropout 0.1 is set to 0" in capfd.readouterr().err
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["attention_dropout"] == 0.0


def test_a_rope_whose_factor_is_not_written_stays_what_it_was_trained_as(stories: Path, tmp_path: Path) -> None:
    """transformers takes a missing factor of YaRN from max_position_embeddings, which adaptation raises."""
    config = json.loads((stories / "config.json").read_text())
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": None, "original_max_position_embeddings": 128}
    (stories / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    source = zebra.load(stories).model.rotary_emb
    adapt(adapt_recipe(tmp_path / "run", model=str(stories), train__max_steps=1, evaluate=None))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert plain.config.max_position_embeddings == 600
    assert plain.config.rope_parameters["factor"] == 4.0
    assert torch.equal(plain.model.rotary_emb.inv_freq, source.inv_freq)
    assert plain.model.rotary_emb.attention_scaling == source.attention_scaling


def test_a_damaged_recipe_in_the_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for content in ("{", "run: [1]", ""):
        (tmp_path / "run" / "recipe.yaml").write_text(content)
        with pytest.raises(ZebraError, match=r"recipe\.yaml is damaged"):
            adapt(adapt_recipe(tmp_path / "run"))


def test_activation_checkpointing_and_accumulation_change_no_loss(tmp_path: Path) -> None:
    short = {"evaluate": None, "train__max_steps": 2, "train__length": 300}
    pairs = {"train__per_device_train_batch_size": 2}
    plain = adapt(adapt_recipe(tmp_path / "a", **short, **pairs))
    recomputed = adapt(adapt_recipe(tmp_path / "b", **short, **pairs, train__activation_checkpointing=True))
    assert losses(plain) == pytest.approx(losses(recomputed), abs=1e-5)
    accumulated = adapt(adapt_recipe(tmp_path / "c", **short, train__gradient_accumulation_steps=2))
    assert losses(plain) == pytest.approx(losses(accumulated), abs=1e-4)


def test_a_step_that_does_not_fit_is_checkpointed_and_a_run_may_change_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short = {"evaluate": None, "train__length": 300, "train__lr_scheduler_type": "constant"}
    plain = adapt(adapt_recipe(tmp_path / "a", **short, train__max_steps=2))
    assert "activation checkpointing" not in capsys.readouterr().err
    monkeypatch.setattr(step_memory, "device_memory", lambda device: 2**20)
    recomputed = adapt(adapt_recipe(tmp_path / "b", **short, train__max_steps=2))
    assert "activation checkpointing is on" in capsys.readouterr().err
    assert losses(plain) == pytest.approx(losses(recomputed), abs=1e-5)
    changed = {"train__max_steps": 3, "train__activation_checkpointing": False}
    assert len(losses(adapt(adapt_recipe(tmp_path / "b", **short, **changed)))) == 3


KEEP_GRADIENTS = """
import os, sys, torch
from zebra.train import trainer
def keep(self, args, state, control, model=None, **kwargs):
    if state.is_world_process_zero and state.global_step == 0:
        gradients = {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters()}
        torch.save(gradients, sys.argv[-1] + ".gradients")
trainer._ShowProgress.on_pre_optimizer_step = keep
from zebra.train.adapt import adapt
from zebra.train.recipe import AdaptRecipe
from zebra.train.recipe_file import read_recipe
adapt(read_recipe(sys.argv[-1], AdaptRecipe))
"""


@pytest.mark.full
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """DDP over gloo: half the rows in each, one writer; the gradients are synchronised through our loss."""
    (tmp_path / "train.py").write_text(KEEP_GRADIENTS)
    runs_by_processes = []
    for processes, per_device_train_batch_size in ((1, 2), (2, 1)):
        # An odd packing: the two halves have not the same number of predicted tokens.
        training_recipe = adapt_recipe(
            tmp_path / f"of-{processes}",
            evaluate=None,
            data__join=False,
            train__max_steps=2,
            train__per_device_train_batch_size=per_device_train_batch_size,
        )
        path = tmp_path / f"{processes}.yaml"
        path.write_text(yaml.safe_dump(training_recipe.model_dump(mode="json")))
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        done = subprocess.run(
            [sys.executable, *launcher * (processes > 1), str(tmp_path / "train.py"), str(path)],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        rows = read_results(tmp_path / f"of-{processes}" / "results.jsonl")
        runs_by_processes.append((losses(rows), torch.load(f"{path}.gradients")))
    (one, expected), (two, gradients) = runs_by_processes
    assert two == pytest.approx(one, rel=1e-6)
    assert gradients.keys() == expected.keys()
    error = sum((gradients[name] - expected[name]).square().sum() for name in expected).sqrt()
    assert error <= 1e-6 * sum(expected[name].square().sum() for name in expected).sqrt()


def test_text_shorter_than_a_row_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ZebraError, match="fewer than one sequence of 999,999"):
        adapt(adapt_recipe(tmp_path / "run", train__length=999_999))
    assert not (tmp_path / "run").exists()


# Another rope


def test_a_run_with_another_rope(tmp_path: Path) -> None:
    run = tmp_path / "run"
    rows = adapt(adapt_recipe(run, rope="yarn:2", train__max_steps=2, evaluate__eval_steps=2))
    measured = {(row.model, row.layout) for row in rows if row.metric == "perplexity"}
    assert measured == {
        (str(STORIES), "full"),
        (str(STORIES), "GLLL:33 yarn:2"),
        (f"{run}@2", "GLLL:33 yarn:2"),
        (str(run / "model"), "GLLL:33 yarn:2"),
    }
    plain = AutoModelForCausalLM.from_pretrained(run / "model")
    assert plain.config.rope_parameters["rope_type"] == "yarn"
    assert plain.config.rope_parameters["original_max_position_embeddings"] == 512
    assert plain.config.max_position_embeddings == 1024
    assert json.loads((run / "model" / "zebra.json").read_text())["rope"] == "yarn:2"


@pytest.mark.full
def test_a_rope_alone_is_measured_too(tmp_path: Path) -> None:
    rows = adapt(
        adapt_recipe(tmp_path / "run", stripes=None, rope="base:50000", train__max_steps=2, evaluate__eval_steps=2)
    )
    assert {row.layout for row in rows if row.metric == "perplexity"} == {"full", "full base:50000"}


def test_ropes_that_cannot_be_trained(tmp_path: Path) -> None:
    with pytest.raises(
        ZebraError, match=r"extends the model's 512 positions to 563, but train.length is 600.*at least 2"
    ):
        adapt(adapt_recipe(tmp_path / "run", rope="yarn:1.1"))
    with pytest.raises(ZebraError, match="type dynamic change"):
        adapt(adapt_recipe(tmp_path / "run", rope="dynamic:2"))
    assert not (tmp_path / "run").exists()


def save_with_tokenizer(model: Any, where: Path) -> None:
    model.save_pretrained(where)
    for file in STORIES.glob("tokenizer*"):
        shutil.copy(file, where)


def test_a_router_that_wants_its_own_loss_is_refused(tmp_path: Path) -> None:
    save_with_tokenizer(tiny_model("qwen2_moe", vocab_size=512, output_router_logits=True), tmp_path / "moe")
    with pytest.raises(ZebraError, match="does not support the router's auxiliary loss"):
        adapt(adapt_recipe(tmp_path / "run", model=str(tmp_path / "moe")))


@pytest.mark.full
@pytest.mark.parametrize("member", ["gemma2", "gemma3_text", "qwen3_moe", "olmo2", "granite_swa"])
def test_other_families_are_adapted(member: str, tmp_path: Path) -> None:
    """Capped logits, experts, sinks and ropes of each kind through the Trainer, with gradient checkpointing."""
    save_with_tokenizer(tiny_model(member, vocab_size=512), tmp_path / "source")
    changes = {
        "train__max_steps": 4,
        "evaluate__eval_steps": 4,
        "train__activation_checkpointing": True,
        "rope": "yarn:2",
    }
    run, source = tmp_path / "run", tmp_path / "source"
    rows = adapt(adapt_recipe(run, model=str(source), stripes=fitting(member, "GLLL:33"), **changes))
    assert losses(rows)[-1] < losses(rows)[0]
    measured = {row.model: row.value for row in rows if row.metric == "perplexity"}
    assert measured[f"{run}@4"] == pytest.approx(measured[str(run / "model")], rel=1e-4)


@pytest.mark.parametrize(
    "lora", [None, *(pytest.param({"r": 2, "merge": merge}, marks=pytest.mark.full) for merge in (False, True))]
)
def test_sinks_are_trained_with_and_kept(lora: dict[str, Any] | None, tmp_path: Path) -> None:
    """In the rows, the Trainer's checkpoints, and the checkpoint that is left."""
    train = {"length": 300, "max_steps": 2, "learning_rate": 1e-3, "logging_steps": 1, "save_steps": 1}
    adapted_recipe = adapt_recipe(tmp_path / "run", stripes="GLLL:33+2", train=train, evaluate=None, lora=lora)
    rows = adapt(adapted_recipe)
    assert {row.layout for row in rows} == {"GLLL:33+2", "full"}
    pairs = {row.layout: row.value for row in rows if row.metric == "attention_pairs"}
    local = sum(min(i + 1, 33) + min(2, max(0, i - 32)) for i in range(300))
    assert pairs["GLLL:33+2"] == 2 * 300 * 301 // 2 + 3 * local
    left = tmp_path / "run" / ("base" if lora and not lora["merge"] else "model")
    assert read_local_attention(left) == LocalAttention(2)
    if lora is None:
        assert read_local_attention(tmp_path / "run" / "checkpoints" / "checkpoint-1") == LocalAttention(2)
    without = adapt(adapt_recipe(tmp_path / "without", stripes="GLLL:33", train=train, evaluate=None, lora=lora))
    assert losses(without) != losses(rows)


def test_recall_may_be_adapted_to(tmp_path: Path) -> None:
    training_recipe = adapt_recipe(
        tmp_path / "run",
        evaluate=None,
        train__max_steps=3,
        data__recall={"share": 1.0, "first": 200, "hold": 0.0, "until": 0.1},
    )
    rows = adapt(training_recipe)
    assert len(losses(rows)) == 3
    # Words and numbers that the checkpoint never asked for are harder than its stories.
    plain = adapt(adapt_recipe(tmp_path / "plain", evaluate=None, train__max_steps=3))
    assert losses(rows)[0] > losses(plain)[0] + 1
