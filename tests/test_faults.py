"""What goes wrong around a run: full disks, second processes, changed inputs, diverging losses. One line each."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import STORIES, TEXT, FinishedRun, Zebra, adapt_recipe, copy_of, losses, refused
from safetensors.torch import load_file, save_file
from test_adapt import names

from zebra import ZebraError
from zebra.files import file_digest
from zebra.results import read_results
from zebra.train import directory
from zebra.train.adapt import adapt
from zebra.train.directory import COMPLETE
from zebra.train.recipe import AdaptRecipe
from zebra.train.saves import EndsOnSignal, is_intact

SHORT = {"evaluate": None}


def write_recipe(where: Path, training_recipe: AdaptRecipe) -> Path:
    file = where / "recipe.yaml"
    file.write_text(yaml.safe_dump(training_recipe.model_dump(mode="json")))
    return file


@pytest.mark.full  # the quick run has it among the faults of commands (tests/faults)
def test_a_full_disk_in_a_save_is_one_line_and_the_run_goes_on_later(adapt_run: FinishedRun, tmp_path: Path) -> None:
    """A limit on the size of files fails the write as a full disk does."""
    training_recipe = adapt_recipe(tmp_path / "run", **SHORT)
    done = subprocess.run(
        [sys.executable, "-m", "zebra", "adapt", str(write_recipe(tmp_path, training_recipe))],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000)),
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"zebra: {tmp_path / 'run'} cannot be written; is the disk full?")
    assert not (tmp_path / "run" / "model").exists()
    assert not list((tmp_path / "run" / "checkpoints").glob(f"*/{COMPLETE}"))
    assert losses(adapt(training_recipe)) == losses(adapt_run.results)


def test_a_target_that_cannot_be_written(zebra: Zebra) -> None:
    refused(zebra("convert", STORIES, "/proc/striped", "--stripes", "GL:9"), "/proc", "No partial output was left")


def test_a_run_may_be_moved(adapt_run: FinishedRun, tmp_path: Path) -> None:
    """Its numbers do not depend on its location, and new results name the new one."""
    moved = Path(shutil.copytree(adapt_run.path, tmp_path / "moved"))
    assert adapt(adapt_recipe(moved)) == adapt_run.results
    shutil.rmtree(moved / "model")
    (moved / "results.jsonl").unlink()
    rows = adapt(adapt_recipe(moved))

    def columns(row: Any, where: Path) -> tuple[Any, ...]:
        return row.task, row.metric, row.position_from, row.run == where.name, row.model.replace(str(where), "")

    assert [columns(row, moved) for row in rows] == [columns(row, adapt_run.path) for row in adapt_run.results]
    timed = "evaluation_tokens_per_second"
    values = [[row.value for row in some if row.metric != timed] for some in (rows, adapt_run.results)]
    assert values[0] == values[1]


def test_one_process_at_a_time_in_a_run(tmp_path: Path) -> None:
    training_recipe = adapt_recipe(tmp_path / "run", **SHORT)
    with (
        directory.locked_run(training_recipe),
        pytest.raises(ZebraError, match=r"another process is using .*run\. Wait"),
    ):
        adapt(training_recipe)
    assert not (tmp_path / "run").exists()  # nothing came of either
    assert len(losses(adapt(training_recipe))) == 6


def test_a_run_keeps_to_its_inputs(stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text((TEXT / "tinystories_test.txt").read_text())
    changes = {"model": str(stories), "data__files": [str(text)], "train__max_steps": 1}
    training_recipe = adapt_recipe(tmp_path / "run", **changes, **SHORT)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("zebra.train.source.CheckpointStart.export", interrupt)
        with pytest.raises(KeyboardInterrupt):
            adapt(training_recipe)
    for name, part in (
        ("generation_config.json", '{"eos_token_id": 1}'),
        ("chat_template.jinja", "new"),
        ("zebra.json", '{"sinks": 4}'),
    ):
        before = (stories / name).read_bytes() if (stories / name).exists() else None
        (stories / name).write_text(part)
        with pytest.raises(ZebraError, match=rf"was created with other inputs: source \({name}\) changed since"):
            adapt(training_recipe)
        (stories / name).unlink() if before is None else (stories / name).write_bytes(before)
    weights = stories / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] *= 1.5
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ZebraError, match=r"was created with other inputs: source \(model\.safetensors\) changed since"):
        adapt(training_recipe)
    text.write_text(text.read_text().replace("Once", "Twice", 1))
    with pytest.raises(ZebraError, match=r"files \(.*\) and source \(model\.safetensors\) changed since"):
        adapt(training_recipe)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ZebraError, match=r"files \(.*\) and sequences of a step and source \(.*\) changed since"):
        adapt(training_recipe)


def test_a_recipe_for_a_gpu_is_refused_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ZebraError, match="cuda requires a GPU"):
        adapt(adapt_recipe(tmp_path / "run", train__device="cuda", **SHORT))
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_before_it_spoils_a_checkpoint(tmp_path: Path) -> None:
    spoiled = {
        "train__learning_rate": 1e30,
        "train__lr_scheduler_type": "constant_with_warmup",
        "train__warmup_steps": 5,
    }
    run = tmp_path / "run"
    with pytest.raises(
        ZebraError, match=r"loss is not finite at step 4, at a learning rate of 6e\+29.* that of step 2\."
    ):
        adapt(adapt_recipe(run, **SHORT, **spoiled))
    tensors = load_file(run / "checkpoints" / "checkpoint-2" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert names(run) == {"recipe.yaml", "inputs.json", "checkpoints"}


@pytest.mark.parametrize(("steps", "warm", "good"), [(1, 0, None), (3, 2, 1)])
def test_weights_that_are_not_finite_are_never_kept(tmp_path: Path, steps: int, warm: int, good: int | None) -> None:
    """The loss is finite, but the step makes weights non-finite, which no loss shows after the last step."""
    changes = {"train__max_steps": steps, "train__save_steps": 1, "train__learning_rate": 3e38, "evaluate": None}
    schedule = {"train__lr_scheduler_type": "constant_with_warmup", "train__warmup_steps": warm}
    run = tmp_path / "run"
    remedy = "No checkpoint was saved yet" if good is None else f"newest finite checkpoint is that of step {good}"
    with pytest.raises(ZebraError, match=rf"weights are not finite at step \d, .* {remedy}"):
        adapt(adapt_recipe(run, **changes, **schedule))
    marked = {complete.parent.name for complete in (run / "checkpoints").glob(f"*/{COMPLETE}")}
    assert marked == (set() if good is None else {f"checkpoint-{good}"})
    assert not (run / "model").exists()


@pytest.mark.parametrize("cut", [True, False], ids=["cut", "a bit"])
@pytest.mark.parametrize(
    "file",
    [
        "optimizer.pt",
        *(pytest.param(file, marks=pytest.mark.full) for file in ("trainer_state.json", "rng_state.pth")),
        pytest.param("model.safetensors", marks=pytest.mark.full),
    ],
)
def test_a_checkpoint_that_was_damaged_since_gives_way_to_the_one_before(
    adapt_run: FinishedRun, tmp_path: Path, file: str, cut: bool
) -> None:
    run = copy_of(adapt_run, tmp_path / "run")
    shutil.rmtree(run / "model")
    (run / "results.jsonl").unlink()
    last = run / "checkpoints" / "checkpoint-6"
    content = (last / file).read_bytes()
    (last / file).write_bytes(content[:100] if cut else content[:-200] + bytes([content[-200] ^ 1]) + content[-199:])
    (last.parent / "checkpoint-notes.txt").write_text("a file of somebody's")
    assert losses(adapt(adapt_recipe(run))) == losses(adapt_run.results)


class Witness:
    """A pickle that leaves a file where it is read."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> Any:
        return open, (str(self.file), "w")


@pytest.mark.parametrize("state", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_state_that_would_run_code_is_one_line(adapt_run: FinishedRun, tmp_path: Path, state: str) -> None:
    """Whoever can write the state can also mark it as complete."""
    run = copy_of(adapt_run, tmp_path / "run")
    for name in ("model", "checkpoints/checkpoint-6"):
        shutil.rmtree(run / name)
    (run / "results.jsonl").unlink()
    checkpoint = run / "checkpoints" / "checkpoint-4"
    torch.save(Witness(tmp_path / "it_ran"), checkpoint / state)
    file = checkpoint / state
    mark = json.loads((checkpoint / COMPLETE).read_text()) | {state: [file.stat().st_size, file_digest(file)]}
    (checkpoint / COMPLETE).write_text(json.dumps(mark))
    with pytest.raises(ZebraError, match=r"a state in .*checkpoint-4 .* would run code.*Remove that folder"):
        adapt(adapt_recipe(run))
    assert not (tmp_path / "it_ran").exists()


def test_sigterm_saves_a_checkpoint_and_ends_with_143(
    adapt_run: FinishedRun, tmp_path: Path, zebra: Zebra, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Schedulers send SIGTERM before they kill. The save is an additional one, between those of the recipe."""
    run, end_of_step = tmp_path / "run", EndsOnSignal.on_step_end

    def on_step_end(self: EndsOnSignal, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            signal.raise_signal(signal.SIGTERM)
        end_of_step(self, args, state, control, **kwargs)

    monkeypatch.setattr(EndsOnSignal, "on_step_end", on_step_end)
    file = write_recipe(tmp_path, adapt_recipe(run))
    before = signal.getsignal(signal.SIGTERM)
    done = zebra("adapt", file)
    assert done.returncode == 143
    last = done.stderr.splitlines()[-1]
    assert last == "zebra: terminated at step 3 of 6, which is saved; run the same command again to continue."
    assert is_intact(run / "checkpoints" / "checkpoint-3")
    assert signal.getsignal(signal.SIGTERM) is before
    monkeypatch.undo()
    done = zebra("adapt", file, "--json")
    assert "step 3/6" not in done.stderr
    assert losses(read_results(run / "results.jsonl")) == losses(adapt_run.results)


def test_sigterm_outside_of_a_training_leaves_nothing(tmp_path: Path, zebra: Zebra, monkeypatch: Any) -> None:
    def save(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("zebra.model.load.write_config", save)
    done = zebra("convert", STORIES, tmp_path / "out", "--stripes", "GL:9")
    assert (done.returncode, done.stderr.count("\n")) == (143, 1)
    assert done.stderr.startswith("zebra: terminated. No partial output was left")
    assert not list(tmp_path.glob("*out*"))


def test_damaged_inputs_are_refused(adapt_run: FinishedRun, tmp_path: Path) -> None:
    run = copy_of(adapt_run, tmp_path / "run")
    (run / "results.jsonl").unlink()
    for content in ("", "[]", "5", "{"):
        (run / "inputs.json").write_text(content)
        with pytest.raises(ZebraError, match=r"inputs\.json is damaged|was created with other inputs"):
            adapt(adapt_recipe(run))


def test_a_history_that_is_gone_is_refused_with_the_remedy(adapt_run: FinishedRun, tmp_path: Path) -> None:
    run = copy_of(adapt_run, tmp_path / "run")
    (run / "results.jsonl").write_text("")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ZebraError, match=r"trainer_state\.json is missing or damaged.*Remove .*model"):
        adapt(adapt_recipe(run))
    shutil.rmtree(run / "model")
    assert losses(adapt(adapt_recipe(run))) == losses(adapt_run.results)


def test_a_finished_run_keeps_to_its_inputs(stories: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text((TEXT / "tinystories_test.txt").read_text())
    changes = {"model": str(stories), "data__files": [str(text)], "train__max_steps": 1}
    recipe = adapt_recipe(tmp_path / "run", **changes, **SHORT)
    results = adapt(recipe)
    text.write_text(text.read_text().replace("Once", "Twice", 1))
    with pytest.raises(ZebraError, match=r"files \(.*text\.txt\) changed since"):
        adapt(recipe)
    text.unlink()
    assert adapt(recipe) == results  # it needs no text
    tree = json.loads((stories / "tokenizer.json").read_text())
    words = tree["model"]["vocab"]
    one, two = sorted(words, key=words.get)[-2:]
    words[one], words[two] = words[two], words[one]
    (stories / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(ZebraError, match=r"source \(tokenizer\.json\) changed since"):
        adapt(recipe)


def test_the_inputs_of_a_run_are_written_down(adapt_run: FinishedRun) -> None:
    inputs = json.loads((adapt_run.path / "inputs.json").read_text())
    assert inputs["sequences of a step"] == 1
    assert {"config.json", "model.safetensors", "tokenizer.json", "zebra.json"} < set(inputs["source"])
    assert inputs["files"][str(TEXT / "tinystories_test.txt")] == file_digest(TEXT / "tinystories_test.txt")
