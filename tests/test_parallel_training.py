"""Training with sequence parallelism gives the losses, evaluations and checkpoint of a single process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import FEW_STORIES, FinishedRun, Zebra, adapt_recipe, losses, refused
from safetensors.torch import load_file
from test_pretrain import recipe as pretrain_recipe
from test_tune import recipe as tune_recipe
from test_tune import write

from zebra import ZebraError
from zebra.files import file_digest
from zebra.results import read_results
from zebra.train.adapt import adapt
from zebra.train.directory import COMPLETE
from zebra.train.dry_run import dry_run
from zebra.train.parallel import ShardedStates
from zebra.train.pretrain import pretrain
from zebra.train.processes import check_processes, data_groups
from zebra.train.recipe import AdaptRecipe, Parallel
from zebra.train.tune import tune


def launch(
    processes: int, recipe: Any, file: Path, verb: str = "adapt", accelerate: bool = False
) -> subprocess.CompletedProcess[str]:
    """The command under torchrun or accelerate, as a user starts it."""
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    if accelerate:
        launcher = ["accelerate.commands.launch", "--multi_gpu", f"--num_processes={processes}", "--num_machines=1"]
        launcher += ["--mixed_precision=no", "--dynamo_backend=no"]  # --cpu would start one process without MPI
    return subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "zebra", verb, str(file)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def perplexities(rows: list[Any]) -> list[float]:
    return [row.value for row in rows if row.metric == "perplexity"]


def test_two_processes_that_split_sequences_train_as_one(adapt_run: FinishedRun, tmp_path: Path) -> None:
    """Losses, evaluations by position before, during and after, and a checkpoint of the same files."""
    run = tmp_path / "run"
    done = launch(2, adapt_recipe(run, parallel={"sequence": 2}), tmp_path / "recipe.yaml")
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr  # DDP's, of a search for parameters without gradients
    rows = read_results(run / "results.jsonl")
    assert losses(rows) == pytest.approx(losses(adapt_run.results), rel=1e-5)
    assert perplexities(rows) == pytest.approx(perplexities(adapt_run.results), rel=1e-4)
    counted = [[row.n for row in one if row.metric == "loss"] for one in (rows, adapt_run.results)]
    assert counted[0] == counted[1]
    files = [sorted(file.name for file in (path / "model").iterdir()) for path in (run, adapt_run.path)]
    assert files[0] == files[1]
    weights, expected = (load_file(path / "model" / "model.safetensors") for path in (run, adapt_run.path))
    for name, weight in expected.items():
        assert (weights[name] - weight).norm() <= 1e-3 * weight.norm(), name


CONSTANT = {"train__lr_scheduler_type": "constant_with_warmup", "train__warmup_steps": 2}
"""A schedule without an end: a run may go on. Its first step has another rate than the later ones."""


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_first_step_that_goes_on_has_the_rate_of_the_schedule(tmp_path: Path) -> None:
    def states() -> dict[str, Any]:
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
        return {"model": model, "optimizer": optimizer, "lr_scheduler": schedule}

    first, then = states(), states()
    for _ in range(3):
        first["model"](torch.ones(2)).sum().backward()
        first["optimizer"].step()
        first["lr_scheduler"].step()
    args, state = SimpleNamespace(output_dir=tmp_path), SimpleNamespace(global_step=3, is_world_process_zero=True)
    ShardedStates(None, True).on_save(args, state, None, **first)
    ShardedStates(str(tmp_path / "checkpoint-3"), True).on_train_begin(args, state, None, **then)
    assert then["optimizer"].param_groups[0]["lr"] == first["optimizer"].param_groups[0]["lr"] == 0.3
    moments = [[one["exp_avg"] for one in some["optimizer"].state.values()] for some in (first, then)]
    assert all(torch.equal(*pair) for pair in zip(*moments, strict=True))


@pytest.mark.full
def test_two_processes_that_split_weights_train_as_one(tmp_path: Path) -> None:
    """Each holds half of the moments, and one process goes on from what they wrote, with the same steps."""
    two = adapt_recipe(tmp_path / "run", parallel={"shard": 2}, evaluate=None, train__max_steps=4, **CONSTANT)
    done = launch(2, two, tmp_path / "recipe.yaml")
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-4"
    weights = load_file(checkpoint / "model.safetensors")
    whole = sum(tensor.numel() for tensor in weights.values())
    for file in sorted((checkpoint / "moments").iterdir()):
        moments = [tensor for name, tensor in load_file(file).items() if name.endswith("exp_avg")]
        assert sum(tensor.numel() for tensor in moments) == pytest.approx(whole / 2, rel=0.02), file.name
    step = {"train__gradient_accumulation_steps": 2, "evaluate": None} | CONSTANT
    file = max((checkpoint / "moments").iterdir())
    whole_file = file.read_bytes()
    file.write_bytes(whole_file[:8] + b"[" + whole_file[9:])
    whole_mark = (checkpoint / COMPLETE).read_text()
    mark = json.loads(whole_mark) | {f"moments/{file.name}": [file.stat().st_size, file_digest(file)]}
    (checkpoint / COMPLETE).write_text(json.dumps(mark))  # whoever damages them could mark them as whole
    with pytest.raises(ZebraError, match=r"a state in .*checkpoint-4 .* is damaged"):
        adapt(adapt_recipe(tmp_path / "run", **step))
    file.write_bytes(whole_file)
    (checkpoint / COMPLETE).write_text(whole_mark)
    rows, expected = (adapt(adapt_recipe(tmp_path / name, **step)) for name in ("run", "one"))
    assert losses(rows) == pytest.approx(losses(expected), rel=1e-5)
    files = [sorted(file.name for file in (tmp_path / name / "model").iterdir()) for name in ("run", "one")]
    assert files[0] == files[1]
    for name, weight in load_file(tmp_path / "one" / "model" / "model.safetensors").items():
        trained = load_file(tmp_path / "run" / "model" / "model.safetensors")[name]
        assert (trained - weight).norm() <= 1e-3 * weight.norm(), name


@pytest.mark.full
@pytest.mark.parametrize(
    ("processes", "changes"),
    [
        (2, {"parallel": {"shard": 2}, "lora": {"r": 2}}),
        (2, {"parallel": {"shard": 2}, "stripes": "GLLL:33+2", "train__activation_checkpointing": True}),
        (4, {"parallel": {"shard": 2, "sequence": 2}, "train__gradient_accumulation_steps": 2}),
        (4, {"parallel": {"shard": 2, "sequence": 2}, "lora": {"r": 2}, "train__activation_checkpointing": True}),
        (4, {"parallel": {"data": 2, "shard": 2}, "train__length": 601, "data__join": False}),
    ],
    ids=["lora", "sinks and checkpointing", "sequences too", "everything", "copies"],
)
def test_weights_are_split_in_every_setting(processes: int, changes: dict[str, Any], tmp_path: Path) -> None:
    shared = adapt_recipe(tmp_path / "shared", **changes)
    done = launch(processes, shared, tmp_path / "recipe.yaml")
    assert done.returncode == 0, done.stderr
    batch = 4 if "data" in changes["parallel"] else 2
    whole = {name: change for name, change in changes.items() if name != "parallel"}
    one = adapt(adapt_recipe(tmp_path / "one", train__per_device_train_batch_size=batch, **whole))
    rows = read_results(tmp_path / "shared" / "results.jsonl")
    assert losses(rows) == pytest.approx(losses(one), rel=1e-5)
    assert perplexities(rows) == pytest.approx(perplexities(one), rel=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("first", [1, 2])
def test_more_processes_go_on_with_what_fewer_began(first: int, tmp_path: Path) -> None:
    """From 1 to 2, and from 2 to 4; moments of whole weights are split."""
    began = adapt_recipe(
        tmp_path / "run",
        train__max_steps=4,
        train__gradient_accumulation_steps=2,
        parallel={"shard": first},
        evaluate=None,
        **CONSTANT,
    )
    if first == 1:
        adapt(began)
    else:
        assert launch(2, began, tmp_path / "recipe.yaml").returncode == 0
    goes_on = adapt_recipe(tmp_path / "run", parallel={"shard": 2 * first}, evaluate=None, **CONSTANT)
    done = launch(2 * first, goes_on, tmp_path / "recipe.yaml")
    assert done.returncode == 0, done.stderr
    one = adapt(adapt_recipe(tmp_path / "one", train__gradient_accumulation_steps=2 * first, evaluate=None, **CONSTANT))
    assert losses(read_results(tmp_path / "run" / "results.jsonl")) == pytest.approx(losses(one), rel=1e-5)


@pytest.mark.full
def test_conversations_and_random_weights_are_trained_on_by_processes_that_split_weights(tmp_path: Path) -> None:
    write(tmp_path)
    done = launch(2, tune_recipe(tmp_path / "two", tmp_path, parallel={"shard": 2}), tmp_path / "recipe.yaml", "tune")
    assert done.returncode == 0, done.stderr
    rows, one = (
        read_results(tmp_path / "two" / "results.jsonl"),
        tune(tune_recipe(tmp_path / "one", tmp_path, train__per_device_train_batch_size=4)),
    )
    assert losses(rows) == pytest.approx(losses(one), rel=1e-5)
    new = pretrain_recipe(tmp_path / "new", FEW_STORIES, parallel={"shard": 2})
    done = launch(2, new, tmp_path / "recipe.yaml", "pretrain", accelerate=True)
    assert done.returncode == 0, done.stderr
    whole = pretrain_recipe(tmp_path / "whole", FEW_STORIES, train__per_device_train_batch_size=2)
    assert losses(read_results(tmp_path / "new" / "results.jsonl")) == pytest.approx(losses(pretrain(whole)), rel=1e-5)


@pytest.mark.full
@pytest.mark.parametrize(
    "changes",
    [
        {"lora": {"r": 2}},
        {"train__activation_checkpointing": True, "train__gradient_accumulation_steps": 2},
        {"train__length": 601, "data__join": False},
        {"parallel": {"ring": True}, "train__activation_checkpointing": True},
    ],
    ids=["lora", "checkpointing", "odd", "ring"],
)
def test_four_processes_train_as_two_groups(changes: dict[str, Any], tmp_path: Path) -> None:
    """Two groups that split sequences take the steps of two sequences at once."""
    parallel = {"data": 2, "sequence": 2} | changes.pop("parallel", {})
    two = adapt_recipe(tmp_path / "two", evaluate=None, parallel=parallel, **changes)
    done = launch(4, two, tmp_path / "recipe.yaml")
    assert done.returncode == 0, done.stderr
    one = adapt(adapt_recipe(tmp_path / "one", evaluate=None, train__per_device_train_batch_size=2, **changes))
    assert losses(read_results(tmp_path / "two" / "results.jsonl")) == pytest.approx(losses(one), rel=1e-5)


@pytest.mark.full
def test_packed_conversations_are_split_too(tmp_path: Path) -> None:
    """trl's collator packs them into one sequence of an odd length; answers are scored where they are."""
    write(tmp_path)
    shared = tune_recipe(tmp_path / "two", tmp_path, parallel={"sequence": 2})
    done = launch(2, shared, tmp_path / "recipe.yaml", "tune")
    assert done.returncode == 0, done.stderr
    rows, expected = read_results(tmp_path / "two" / "results.jsonl"), tune(tune_recipe(tmp_path / "one", tmp_path))
    assert losses(rows) == pytest.approx(losses(expected), rel=5e-5)  # AdamW magnifies the rounding of small gradients
    of_answers, of_one = ([row.value for row in some if row.metric == "answer_loss"] for some in (rows, expected))
    assert of_answers == pytest.approx(of_one, rel=1e-4)
    assert of_one


@pytest.mark.full
def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    schedule = {"evaluate": None, "train__lr_scheduler_type": "constant"}
    shared = adapt_recipe(tmp_path / "run", train__max_steps=4, parallel={"sequence": 2}, **schedule)
    assert launch(2, shared, tmp_path / "recipe.yaml").returncode == 0
    rows = adapt(adapt_recipe(tmp_path / "run", **schedule))
    assert losses(rows) == pytest.approx(losses(adapt(adapt_recipe(tmp_path / "one", **schedule))), rel=1e-5)


@pytest.mark.parametrize(
    ("parallel", "processes", "message"),
    [
        ({"sequence": 2}, 1, "sequence 2 requires a multiple of 2 processes; 1 was started.*--nproc-per-node 2"),
        ({"sequence": 2}, 3, "sequence 2 requires a multiple of 2 processes; 3 were started"),
        ({"sequence": 2, "data": 3}, 4, "sequence 2 x parallel.data 3 requires 6 processes; 4 were started"),
        ({"shard": 2}, 1, "parallel.shard 2 requires a multiple of 2 processes; 1 was started"),
        ({"shard": 4, "sequence": 2}, 12, "shard 4 x parallel.sequence 2 requires a multiple of 8 .*nproc-per-node 8"),
    ],
)
def test_processes_that_do_not_divide_are_rejected(
    parallel: dict[str, int], processes: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(ZebraError, match=message):
        adapt(adapt_recipe(tmp_path / "run", parallel=parallel))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_accelerate_does_not_shard_too(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(ZebraError, match=f"Remove --use_{engine.lower()} from"):
        adapt(adapt_recipe(tmp_path / "run"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel": {"shard": 2}, "train__optimizer": "muon"}, r"muon does not support parallel\.shard"),
        ({"parallel": {"shard": 2, "ring": True}}, "ring requires parallel.sequence above 1"),
        ({"parallel": {"sequence": 2}, "train__compile": True}, "does not support parallel.sequence"),
    ],
)
def test_what_processes_cannot_share_is_rejected(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        adapt_recipe(tmp_path / "run", **changes)


def test_the_command_says_how_to_start_it(tmp_path: Path, zebra: Zebra) -> None:
    recipe = adapt_recipe(tmp_path / "run", parallel={"sequence": 2})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    refused(zebra("adapt", tmp_path / "recipe.yaml"), "torchrun --nproc-per-node 2 -m zebra")


def test_a_dry_run_counts_the_processes_of_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, shared = (dry_run(adapt_recipe(tmp_path, parallel={"sequence": size})) for size in (1, 2))
    assert whole.memory["weights"] == shared.memory["weights"]
    assert shared.memory["activations"] == pytest.approx(whole.memory["activations"] / 2, rel=0.01)
    added = {"keys and values fetched", "outputs joined"}
    assert shared.memory.keys() - whole.memory.keys() == added | {"gradients of keys and values"}
    assert 0 < sum(shared.memory[part] for part in added) < 0.1 * whole.memory["activations"]
    ring = dry_run(adapt_recipe(tmp_path, parallel={"sequence": 4, "ring": True}))
    gather = dry_run(adapt_recipe(tmp_path, parallel={"sequence": 4}))
    assert all(ring.memory[part] < gather.memory[part] for part in added)
    assert "1 groups of 2 processes" in shared.facts["a step"]
    sharded = dry_run(adapt_recipe(tmp_path, parallel={"shard": 2, "sequence": 2}))
    for part in ("weights", "gradients", "AdamW"):
        assert sharded.memory[part] == -(-whole.memory[part] // 4)
    assert sharded.memory["activations"] == shared.memory["activations"]
    assert whole.memory["weights"] / 4 < sharded.memory["weights gathered"] < whole.memory["weights"]
    assert "x 2 groups of 2 processes, which share sequences; weights sharded over 4" in sharded.facts["a step"]
    copies = dry_run(adapt_recipe(tmp_path, parallel={"data": 3, "shard": 2})).facts["training"].split()
    alone = whole.facts["training"].split()
    assert int(copies[2].replace(",", "")) == 6 * int(alone[2].replace(",", ""))
    monkeypatch.setenv("WORLD_SIZE", "8")
    recipe: AdaptRecipe = adapt_recipe(tmp_path, parallel={"sequence": 2})
    check_processes(recipe)
    assert data_groups(recipe) == 4
    assert recipe.parallel == Parallel(sequence=2)
