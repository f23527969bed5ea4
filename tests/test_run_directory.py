"""A run directory: a recipe corrected before training starts, a longer training, a wrong clock."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import FEW_STORIES, TEXT, FinishedRun, adapt_recipe, copy_of, losses
from safetensors.torch import load_file
from test_pretrain import recipe as pretrain_recipe
from transformers import Trainer

from zebra import ZebraError
from zebra.train import directory
from zebra.train.adapt import adapt
from zebra.train.pretrain import pretrain

SHORT = {"evaluate": None}
CONSTANT = SHORT | {"train__lr_scheduler_type": "constant_with_warmup", "train__warmup_steps": 2}


def interrupted(monkeypatch: pytest.MonkeyPatch, train: Any, recipe: Any) -> None:
    """Start a run that is killed in its first step, when all is measured that comes before."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("zebra.train.run.run_trainer", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(recipe)


def test_a_recipe_and_its_files_may_be_mended_until_a_checkpoint_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A corrected recipe used to be rejected as another recipe, and measurements of the first one stayed."""
    text = tmp_path / "text.txt"
    text.write_text((TEXT / "tinystories_test.txt").read_text())
    changes: dict[str, Any] = {"data__files": [str(text)], "train__max_steps": 1}
    changes["evaluate"] = {"files": [str(tmp_path / "few.txt")], "length": 64}
    (tmp_path / "few.txt").write_text(FEW_STORIES.read_text()[:2000])
    interrupted(monkeypatch, adapt, adapt_recipe(tmp_path / "run", stripes="GL:40", **changes))
    assert (tmp_path / "run" / "before.jsonl").exists()
    text.write_text(text.read_text().replace("Once", "Twice", 1))
    results = adapt(adapt_recipe(tmp_path / "run", **changes))
    assert {one.layout for one in results if one.metric == "perplexity"} == {"full", "GLLL:33"}


def test_a_tokenizer_of_a_run_that_trained_nothing_is_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = TEXT / "tinystories_test.txt"
    changes = {"evaluate": None, "data__recall": None, "data__held_out": None, "train__max_steps": 1}
    run = tmp_path / "run"
    interrupted(monkeypatch, pretrain, pretrain_recipe(run, text, **changes))
    pretrain(pretrain_recipe(run, text, tokenizer={"vocab_size": 300}, **changes))
    assert load_file(run / "model" / "model.safetensors")["model.embed_tokens.weight"].shape[0] == 300


def test_a_folder_with_a_recipe_of_the_users_is_left_alone(tmp_path: Path) -> None:
    recipe = adapt_recipe(tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json") | {"stripes": "GL:40"}))
    with pytest.raises(ZebraError, match="a run of another recipe: stripes differ"):
        adapt(recipe)


def weights(run: Path) -> dict[str, Any]:
    return load_file(run / "model" / "model.safetensors")


@pytest.mark.full
def test_more_steps_of_a_constant_schedule_go_on_to_the_weights_of_an_uninterrupted_run(tmp_path: Path) -> None:
    whole = adapt(adapt_recipe(tmp_path / "whole", **CONSTANT))
    short = adapt(adapt_recipe(tmp_path / "run", **CONSTANT, train__max_steps=3))
    shorter = weights(tmp_path / "run")
    (tmp_path / "run" / "report.html").write_text("of 3 steps")
    longer = adapt(adapt_recipe(tmp_path / "run", **CONSTANT))
    assert losses(longer) == losses(whole)
    assert losses(longer)[:3] == losses(short)
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path / "run").items())
    assert any(not torch.equal(tensor, expected[name]) for name, tensor in shorter.items())
    assert not (tmp_path / "run" / "report.html").exists()
    assert adapt(adapt_recipe(tmp_path / "run", **CONSTANT)) == longer
    with pytest.raises(ZebraError, match=r"another recipe: train\.max_steps differ"):
        adapt(adapt_recipe(tmp_path / "run", **CONSTANT, train__max_steps=3))
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(ZebraError, match=r"checkpoint of step 6, which is missing.*run/model as its model"):
        adapt(adapt_recipe(tmp_path / "run", **CONSTANT, train__max_steps=9))
    assert weights(tmp_path / "run")


def test_more_steps_of_a_schedule_that_ends_are_another_training(adapt_run: FinishedRun, tmp_path: Path) -> None:
    run = copy_of(adapt_run, tmp_path / "run")
    with pytest.raises(ZebraError, match=r"cosine the learning rate depends on the number of steps\. Name another run"):
        adapt(adapt_recipe(run, train__max_steps=9))
    recipe = adapt_recipe(run, train__max_steps=9, train__lr_scheduler_type="constant")
    with pytest.raises(ZebraError, match=r"another recipe: train\.lr_scheduler_type, train\.max_steps differ"):
        adapt(recipe)


def test_what_is_drawn_for_all_steps_is_no_part_of_a_longer_training(tmp_path: Path) -> None:
    recipe = pretrain_recipe(tmp_path, TEXT / "tinystories_test.txt", train__lr_scheduler_type="constant")
    with pytest.raises(ZebraError, match=r"data\.recall are drawn for a fixed number of steps"):
        directory._check_longer(tmp_path, recipe)


def test_a_clock_that_was_set_back_loses_no_checkpoint(tmp_path: Path) -> None:
    """The Trainer removes the checkpoint with the oldest time: the one that it has just written."""
    run, recipe = tmp_path / "run", adapt_recipe(tmp_path / "run", **SHORT, train__max_steps=4)
    first = adapt(recipe)
    shutil.rmtree(run / "model")
    (run / "results.jsonl").unlink()
    checkpoints = run / "checkpoints"
    shutil.rmtree(checkpoints / "checkpoint-4")
    shutil.copytree(checkpoints / "checkpoint-2", checkpoints / "checkpoint-1")
    for step, time in ((1, 4e9), (2, 4e9 + 60)):
        os.utime(checkpoints / f"checkpoint-{step}", (time, time))
    assert losses(adapt(recipe)) == losses(first)
    assert {one.name for one in checkpoints.iterdir()} == {"checkpoint-2", "checkpoint-4"}


@pytest.mark.parametrize("numbers", [1, 10_000])
def test_whatever_torch_raises_on_a_full_disk_is_one_line(tmp_path: Path, numbers: int) -> None:
    with pytest.raises(ZebraError, match="cannot be written; is the disk full"), directory.writing(tmp_path):
        torch.save(torch.zeros(numbers), "/dev/full")
    with pytest.raises(RuntimeError, match="another"), directory.writing(tmp_path):
        raise RuntimeError("another")


def test_a_step_that_does_not_fit_into_memory_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(*_: object, **__: object) -> None:
        torch.empty(1 << 60)

    recipe = adapt_recipe(tmp_path / "run", **SHORT, train__per_device_train_batch_size=2, train__max_steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", allocate)
        with pytest.raises(ZebraError, match=r"2 x 600 tokens does not fit into memory .*halve .*activation_check"):
            adapt(recipe)
    mended = recipe.train.model_copy(update={"per_device_train_batch_size": 1})
    assert len(losses(adapt(recipe.model_copy(update={"train": mended})))) == 1


def test_losses_after_the_last_log_are_logged_at_the_end(tmp_path: Path) -> None:
    """They were in no result; a training of fewer steps than `logging_steps` had none."""
    steps = {"train__max_steps": 3, "train__logging_steps": 2, "train__length": 64}
    results = adapt(adapt_recipe(tmp_path / "run", **SHORT, **steps))
    assert [one.model.rpartition("@")[2] for one in results if one.metric == "loss"] == ["2", "3"]


@pytest.mark.parametrize("finished", [True, False])
def test_a_trained_checkpoint_that_is_not_what_was_written_is_never_measured(
    finished: bool, adapt_run: FinishedRun, tmp_path: Path
) -> None:
    """A fault of the disk or a hand changed it: what is measured again would be of another model."""
    run = copy_of(adapt_run, tmp_path / "run")
    weights = run / "model" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    if not finished:
        (run / "results.jsonl").unlink()
    with pytest.raises(ZebraError, match=r"is not what this run wrote: model.safetensors changed"):
        adapt(adapt_recipe(run))
    shutil.rmtree(run / "model")
    (run / "results.jsonl").unlink(missing_ok=True)
    adapt(adapt_recipe(run))
    assert weights.read_bytes() == content
