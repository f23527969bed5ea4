"""Grids: the cells and their recipes, what is run and what is not run again, and what is refused."""

from __future__ import annotations

import ctypes
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import FEW_STORIES, ROOT

from zebra import ZebraError
from zebra.plan.devices import find_device
from zebra.results import read_results
from zebra.study import grid
from zebra.study.cells import cells_of, recipes_of
from zebra.study.grid import estimate, study
from zebra.study.recipe import StudyRecipe
from zebra.train.pretrain import config_of
from zebra.train.recipe_file import read_recipe
from zebra.train.tokenizer import END


def tree(run: Path, *cells: dict[str, Any], **train: Any) -> dict[str, Any]:
    return {
        "run": str(run),
        "recipe": {
            "model": {
                "model_type": "zebra_study",
                "hidden_size": 16,
                "num_hidden_layers": 4,
                "num_attention_heads": 2,
                "sliding_window": 8,
                "summary_block": 4,
            },
            "tokenizer": {"vocab_size": 300},
            "data": {"files": [str(FEW_STORIES)], "separator": END, "join": True, "held_out": 0.2},
            "train": {
                "length": 64,
                "per_device_train_batch_size": 2,
                "max_steps": 4,
                "learning_rate": 1e-3,
                "logging_steps": 2,
                "save_steps": 2,
            }
            | train,
            "evaluate": {"length": 64, "join": True, "beyond": 128},
        },
        "cells": list(cells) or [{"attention": "grouped", "position": "rotary", "group": 2}],
    }


def of(*arguments: Any, **more: Any) -> StudyRecipe:
    return StudyRecipe.model_validate(tree(*arguments, **more))


def test_cells_are_all_combinations_in_order_and_each_once(tmp_path: Path) -> None:
    grid_recipe = of(
        tmp_path,
        {"attention": ["grouped", "global"], "position": "rotary", "group": [2, 4], "seed": [0, 1]},
        {"attention": ["summary", "global"], "position": ["rotary", "absolute"], "window": 16, "length": [32, 128]},
    )
    assert [cell.name for cell in cells_of(grid_recipe)] == [
        "grouped-2-rotary-w8-64-seed0",
        "grouped-2-rotary-w8-64-seed1",
        "grouped-4-rotary-w8-64-seed0",
        "grouped-4-rotary-w8-64-seed1",
        "global-rotary-64-seed0",
        "global-rotary-64-seed1",
        "summary-rotary-w16-b4-32-seed0",
        "summary-rotary-w16-b4-128-seed0",
        "summary-absolute-w16-b4-32-seed0",
        "summary-absolute-w16-b4-128-seed0",
        "global-rotary-32-seed0",
        "global-rotary-128-seed0",
        "global-absolute-32-seed0",
        "global-absolute-128-seed0",
    ]


def test_each_cell_is_a_recipe_with_equal_tokens_in_a_step(tmp_path: Path) -> None:
    grid_recipe = of(
        tmp_path,
        {"attention": "grouped", "position": "alibi", "group": 2, "length": [32, 128], "seed": 3},
        {"attention": "summary", "position": "absolute", "block": 16, "window": 5},
    )
    short, long, learned = recipes_of(grid_recipe)
    assert short.model["attention_kinds"] == ["global", "local"] * 2
    assert (short.model["position_embedding"], short.model["sliding_window"], short.train.seed) == ("alibi", 8, 3)
    assert (short.train.per_device_train_batch_size, long.train.per_device_train_batch_size) == (4, 1)
    assert short.evaluate is not None
    assert (short.evaluate.length, short.evaluate.beyond) == (32, 128)
    assert long.evaluate is not None
    assert long.evaluate.beyond is None  # it has learned to read as much
    assert learned.evaluate is not None
    assert learned.evaluate.beyond is None  # there are no positions
    assert (learned.model["attention_kinds"], learned.model["summary_block"]) == (["summary"] * 4, 16)


STUDY = {"model_type": "zebra_study"}


@pytest.mark.parametrize(
    ("cell", "recipe", "says"),
    [
        ({"group": 5}, {}, "a group must have from 1 to 4 layers; got 5"),
        ({"attention": "local", "window": 65}, {}, "the window must be at most the length, 64 tokens; got 65"),
        ({"attention": "global", "length": 48}, {}, "must divide"),
        ({"attention": "dilated"}, {}, "cells.0.attention"),
        ({"self_extend": "8:64"}, {}, "self_extend"),
        ({"seed": -1}, {}, "cells.0.seed"),
        ({}, {"run": "elsewhere"}, "cannot have a run"),
        ({}, {"model": {"model_type": "llama"}}, "model_type must be zebra_study"),
        ({}, {"stripes": "GL:8"}, "recipe.stripes cannot be set"),
        ({}, {"train": [1]}, "recipe.train must be a mapping"),
        ({}, {"evaluate": {"length": 128}}, "must equal recipe.train.length, here 64; got 128"),
        ({}, {"model": STUDY | {"position_embedding": "alibi"}}, "position_embedding cannot be set"),
        ({}, {"self_extend": "8:64"}, "the cell grouped-2-rotary-w8-64-seed0: recipe: unknown key self_extend"),
        ({}, {"model": STUDY | {"sliding_window": 8, "num_hidden_layers": "four"}}, "got 'four'"),
    ],
)
def test_a_grid_that_contradicts_itself_is_rejected(
    tmp_path: Path, cell: dict[str, Any], recipe: dict[str, Any], says: str
) -> None:
    grid_tree = tree(tmp_path / "run", {"attention": "grouped", "position": "rotary", "group": 2} | cell)
    grid_tree["recipe"] |= recipe
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(grid_tree))
    with pytest.raises(ZebraError, match=says):
        study(read_recipe(path, StudyRecipe))
    assert not (tmp_path / "run").exists()


def test_a_cell_is_one_process(tmp_path: Path) -> None:
    settings = tree(tmp_path / "run")
    settings["recipe"]["parallel"] = {"shard": 2}
    with pytest.raises(ZebraError, match=r"parallel\.shard 2 requires a multiple of 2 processes"):
        study(StudyRecipe.model_validate(settings))
    assert not (tmp_path / "run").exists()


def test_there_is_a_worker(tmp_path: Path) -> None:
    with pytest.raises(ZebraError, match="workers must be at least 1"):
        study(of(tmp_path / "run"), workers=0)


@pytest.mark.parametrize(
    ("name", "size", "layouts"),
    [
        ("study-cpu", None, 11),  # what decides a claim
        pytest.param("study-117m", 117e6, 11, marks=pytest.mark.full),
        pytest.param("study-345m", 345e6, 11, marks=pytest.mark.full),
    ],
)
def test_the_grids_of_the_repository_can_be_estimated(
    name: str, size: float | None, layouts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    cells = estimate(read_recipe(ROOT / "recipes" / f"{name}.yaml", StudyRecipe))
    assert len({cell.cell for cell in cells}) == len(cells) > 30
    assert len({cell.layout for cell in cells}) >= layouts
    assert len({cell.tokens for cell in cells}) == 1
    for cell in cells if size else []:
        assert ("absolute" in cell.cell and "16384" in cell.cell) or abs(cell.parameters / size - 1) < 0.02


@pytest.mark.parametrize(
    ("name", "device", "hours"), [("study-117m", "h100-sxm", 134), ("study-345m", "h100-sxm", 728)]
)
def test_the_hours_of_a_grid_are_those_of_its_recipe(
    name: str, device: str, hours: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    path = ROOT / "recipes" / f"{name}.yaml"
    cells = estimate(read_recipe(path, StudyRecipe), find_device("h100-sxm"))
    assert round(sum(cell.hours or 0 for cell in cells)) == hours
    assert f"{hours} hours of an H100" in path.read_text()
    of = {cell.layout: cell.hours or 0 for cell in cells if cell.length == 16384}
    assert of["L:512 rotary"] < of["GLLL:512 rotary"] < of["GL:512 rotary"] < of["full rotary"]


@pytest.mark.parametrize("name", ["study-117m", pytest.param("study-345m", marks=pytest.mark.full)])
def test_large_grids_train_at_their_width(name: str, tmp_path: Path) -> None:
    """Their hidden size, heads and optimiser; four layers, short sequences, and a vocabulary that few words fill."""
    smaller = {
        "run": tmp_path / "run", "recipe.model.num_hidden_layers": 4, "recipe.model.sliding_window": 16,
        "recipe.tokenizer.vocab_size": 300, "recipe.data": f"{{files: [{FEW_STORIES}]}}",
        "recipe.train.length": 32, "recipe.train.gradient_accumulation_steps": 1, "recipe.train.max_steps": 2,
        "recipe.train.warmup_steps": 1, "recipe.train.logging_steps": 1, "recipe.train.save_steps": 2,
        "recipe.train.device": "best", "recipe.evaluate": "null",
        "cells": "[{attention: grouped, position: rotary, group: 4}]",
    }  # fmt: skip
    path, changes = ROOT / "recipes" / f"{name}.yaml", [f"{key}={value}" for key, value in smaller.items()]
    losses = [one.value for one in study(read_recipe(path, StudyRecipe, changes)) if one.metric == "loss"]
    assert len(losses) == 2
    assert all(4 < loss < 8 for loss in losses)  # ln 300 is 5.7
    (trained,) = (tmp_path / "run").glob("cells/*/model/config.json")
    config = json.loads(trained.read_text())
    sizes = {"study-117m": (768, 12), "study-345m": (1024, 16)}
    assert (config["hidden_size"], config["num_attention_heads"]) == sizes[name]


def test_learned_positions_are_not_read_beyond(tmp_path: Path) -> None:
    (learned,) = recipes_of(of(tmp_path, {"attention": "global", "position": "absolute"}))
    assert learned.evaluate is not None
    beyond = learned.model_copy(update={"evaluate": learned.evaluate.model_copy(update={"beyond": 128})})
    with pytest.raises(ZebraError, match="64 learned positions; got 128 tokens"):
        config_of(beyond)


TWO = {"attention": ["global", "grouped"], "position": "rotary", "group": 2}


def test_a_grid_runs_each_cell_once(tmp_path: Path) -> None:
    grid = of(tmp_path / "run", TWO, max_steps=2)
    results = study(grid, workers=2)
    assert {(one.run, one.layout) for one in results if one.task == "train"} == {
        ("global-rotary-64-seed0", "full rotary"),
        ("grouped-2-rotary-w8-64-seed0", "GL:8 rotary"),
    }
    assert {one.length for one in results if one.metric == "perplexity"} == {64, 128}
    assert read_results(tmp_path / "run" / "results.jsonl") == results
    logs = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "cells").glob("*.log")}
    assert len(logs) == 2
    assert [cell.done for cell in estimate(grid)] == [True, True]
    page = tmp_path / "run" / "cells" / "global-rotary-64-seed0" / "report.html"
    page.unlink()  # a kill came between the cell's results and its page
    assert study(grid) == results
    assert page.exists()
    assert all(path.stat().st_mtime_ns == time for path, time in logs.items())


@pytest.mark.full
def test_a_grid_grows(tmp_path: Path) -> None:
    results = study(of(tmp_path / "run", TWO), workers=2)
    more = of(tmp_path / "run", TWO, {"attention": "local", "position": "none"})
    assert [cell.done for cell in estimate(more)] == [True, True, False]
    grown = study(more)
    assert grown[: len(results)] == results
    assert {one.layout for one in grown[len(results) :]} >= {"L:8 none"}

    fewer = tree(tmp_path / "run", {"attention": "local", "position": "none"})
    fewer["recipe"]["data"]["num_proc"] = 2  # changes no number
    assert study(StudyRecipe.model_validate(fewer)) == [*grown[len(results) :], *results]  # finished cells stay
    for changed in (estimate, study):
        with pytest.raises(
            ZebraError, match=r"global-rotary-64-seed0 is a cell of another recipe: train\.max_steps differ"
        ):
            changed(of(tmp_path / "run", {"attention": "local", "position": "alibi"}, max_steps=6))


def test_another_recipe_in_the_same_run_is_refused(tmp_path: Path) -> None:
    (first,) = recipes_of(of(tmp_path / "run"))
    Path(first.run).mkdir(parents=True)
    (Path(first.run) / "recipe.yaml").write_text(yaml.safe_dump(first.model_dump(mode="json")))
    for run_grid in (estimate, study):
        with pytest.raises(ZebraError, match=r"holds a run of another recipe: .*train.max_steps"):
            run_grid(of(tmp_path / "run", max_steps=6))


def test_a_cell_that_fails_leaves_the_others_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\ncase "$4" in *grouped*) echo "zebra: the loss is not finite" >&2; exit 2;; esac\n')
    fake.chmod(0o755)
    monkeypatch.setattr(grid.sys, "executable", str(fake))
    cells = {"attention": ["grouped", "global"], "position": "none", "group": 2}
    with pytest.raises(
        ZebraError, match=r"grouped-2-none-w8-64-seed0 failed, the loss is not finite\. Logs are in"
    ) as error:
        study(of(tmp_path / "run", cells))
    assert "more" not in str(error.value)
    assert (tmp_path / "run" / "cells" / "global-none-64-seed0.yaml").exists()  # the second one was started


@pytest.mark.full
def test_a_killed_grid_goes_on_to_the_same_rows(tmp_path: Path) -> None:
    def rows(name: str) -> list[tuple[Any, ...]]:
        cells = read_results(tmp_path / name / "results.jsonl")
        return [(r.run, r.task, r.metric, r.length, r.position_from, r.value) for r in cells if r.task != "speed"]

    def start(name: str) -> subprocess.Popen[bytes]:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree(tmp_path / name, max_steps=40)))
        command = [sys.executable, "-m", "zebra", "study", str(path), "--json"]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)

    assert start("whole").wait(timeout=300) == 0
    killed = start("killed")
    checkpoints = tmp_path / "killed" / "cells" / "grouped-2-rotary-w8-64-seed0" / "checkpoints"
    while not any(checkpoints.glob("checkpoint-*/COMPLETE")):
        assert killed.poll() is None
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "results.jsonl").exists()
    assert start("killed").wait(timeout=300) == 0
    assert rows("killed") == rows("whole")


def test_a_seed_of_the_recipe_is_that_of_cells_without_one(tmp_path: Path) -> None:
    assert [cell.seed for cell in cells_of(of(tmp_path, seed=7))] == [7]


def test_a_text_smaller_than_a_step_starts_no_cell(tmp_path: Path) -> None:
    with pytest.raises(ZebraError, match="fewer than the 5,000 of one step"):
        study(of(tmp_path / "run", per_device_train_batch_size=5000))
    assert not list((tmp_path / "run" / "cells").glob("*"))
    changed = tree(tmp_path / "run")
    changed["recipe"]["tokenizer"] = {"vocab_size": 320}
    with pytest.raises(ZebraError, match="trained with another recipe: its tokenizer or its data differ"):
        study(StudyRecipe.model_validate(changed))


def test_rows_that_are_damaged_are_said_before_any_cell_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = {"attention": ["grouped", "global"], "position": "none", "group": 2}
    monkeypatch.setattr(grid, "_with_tokenizer", lambda _, recipes: recipes)
    first, _ = recipes_of(of(tmp_path / "run", cells))
    Path(first.run).mkdir(parents=True)
    begun = first.model_dump(mode="json") | {"tokenizer": str(tmp_path / "run" / "tokenizer")}
    (Path(first.run) / "recipe.yaml").write_text(yaml.safe_dump(begun))
    (Path(first.run) / "results.jsonl").write_text("{\n")
    with pytest.raises(ZebraError, match="is not a result"):
        study(of(tmp_path / "run", cells))
    assert not list((tmp_path / "run" / "cells").glob("*.log"))


def test_a_system_without_prctl_has_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert runpy.run_path(str(grid.__file__))["_prctl"](1, 15) is None


def test_why_a_cell_failed(tmp_path: Path) -> None:
    assert grid._reason(tmp_path / "cell", -9) == "killed by signal 9"
    assert grid._reason(tmp_path / "cell", 2) == "its log is empty"
    (tmp_path / "cell.log").write_text("a warning\nzebra: the disk is full\n\n")
    assert grid._reason(tmp_path / "cell", 2) == "the disk is full"


def test_workers_take_the_gpus_that_may_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (recipe,) = recipes_of(of(tmp_path / "run"))
    Path(recipe.run).parent.mkdir(parents=True)
    seen = []
    monkeypatch.setattr(grid.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(grid.subprocess, "Popen", lambda *_, env, **__: seen.append(env["CUDA_VISIBLE_DEVICES"]))
    for devices in ("", "2,5"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
        for worker in range(3):
            grid._start(recipe, worker, 3)
    assert seen == ["0", "1", "0", "2", "5", "2"]


def test_a_grid_that_is_told_to_end_takes_its_cells_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nkill -TERM {os.getpid()}\nexec sleep 60\n")
    fake.chmod(0o755)
    monkeypatch.setattr(grid.sys, "executable", str(fake))
    monkeypatch.setattr(grid, "_with_tokenizer", lambda _, recipes: recipes)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        study(of(tmp_path / "run"))
    assert ended.value.code == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.full
def test_a_killed_grid_leaves_no_cell_behind(tmp_path: Path) -> None:
    """The cells of a killed process used to go on, and held the locks of their directories."""
    (tmp_path / "cells").mkdir()
    cell = of(tmp_path).model_dump_json()
    starter = f"""
import sys
from zebra.study import grid
from zebra.study.cells import recipes_of
from zebra.study.recipe import StudyRecipe

(recipe,) = recipes_of(StudyRecipe.model_validate_json({cell!r}))
command = grid.subprocess.Popen
grid.subprocess.Popen = lambda arguments, **options: command(["/bin/sleep", "60"], **options)
print(grid._start(recipe, 0, 1).pid, flush=True)
sys.stdin.read()
"""
    arguments = [sys.executable, "-c", starter]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        os.kill(pid, 0)
        parent.kill()
    for _ in range(100):
        if not is_running(pid):
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the cell outlived its grid")


def is_running(pid: int) -> bool:
    """Whether a process is running, and not a zombie."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
