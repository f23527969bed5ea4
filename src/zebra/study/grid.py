"""A grid of trainings from scratch: attention kinds × position embeddings × lengths, as one command.

run/tokenizer/            trained once on the grid's text, where the recipe names none; all cells share it
run/cells/<name>.yaml     a cell: a recipe of `zebra pretrain`, which can be run alone
run/cells/<name>.log      what its process said
run/cells/<name>/         its directory (zebra.train.pretrain)
run/results.jsonl            the rows of all cells that are done, in the grid's order, and then of those that it left
out

Each cell has a process of its own. A cell that is done is not run again, one that was killed goes on where it stood,
and one that fails leaves the others alone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from zebra.errors import ZebraError
from zebra.files import atomic_directory, atomic_write, directory_lock
from zebra.model.checkpoint import load_tokenizer
from zebra.model.families import attention_pairs
from zebra.model.local import LocalAttention, layout_name
from zebra.plan.decoder import decoder_from_config
from zebra.progress import bar, console
from zebra.results import Result, read_results, write_results
from zebra.stripes import visible_pairs
from zebra.study.layout import NAME
from zebra.study.recipe import AXES, StudyRecipe, recipes_of
from zebra.train import directory
from zebra.train.pretrain import check_step, config_of
from zebra.train.recipe import NewTokenizer, PretrainRecipe, read_recipe
from zebra.train.texts import read_texts
from zebra.train.tokenizer import texts_of, train_tokenizer
from zebra.train.trainer import check_machine, tokens_per_step

ASKED = "asked.yaml"
"""What a trained tokenizer was to be, and of what data; it lies beside it."""


def study(grid: StudyRecipe, workers: int = 1) -> list[Result]:
    """Run the cells that are not done, `workers` at a time, and return the rows of all.

    On a machine with GPUs worker i sees GPU i; on a CPU the workers share the cores.

    Raises:
        ZebraError: before any work, a contradiction in any cell, no text or no such machine, a cell's directory of
            another recipe; at the end, cells that failed, when all others are done.
    """
    recipes = recipes_of(grid)
    if workers < 1:
        raise ZebraError(f"--workers is at least 1; got {workers}.")
    check_machine(recipes[0].train)
    run = Path(grid.run)
    with directory_lock(run):
        _check_run(run, recipes)
        recipes = _with_tokenizer(run, recipes)
        done = [recipe for recipe in recipes if _is_done(recipe)]
        _gather(run, recipes)  # what is damaged is said before any work
        if done:
            console.print(f"{len(done)} of {len(recipes)} cells are done already", highlight=False)
        failed = _run(run, recipes, [recipe for recipe in recipes if recipe not in done], workers)
        rows = _gather(run, recipes)
    if failed:
        (name, why), more = failed[0], len(failed) - 1
        raise ZebraError(
            f"{name} failed, {why.rstrip('.')}"
            + (f"; and {more} more" if more else "")
            + f". Every log is {run / 'cells'}/<name>.log, the rows of the others are {run / 'results.jsonl'}; "
            "the same command tries again."
        )
    return rows


@dataclass(frozen=True)
class Reckoned:
    """A cell before it is run: parameters and tokens of its training, and attention against the dense model's."""

    cell: str
    layout: str
    parameters: int
    tokens: int
    attention: float
    done: bool


def reckoned(grid: StudyRecipe) -> list[Reckoned]:
    """What `study` would run; refuses as it does, but for the text."""
    found = []
    recipes = recipes_of(grid)
    _check_run(Path(grid.run), recipes)
    for recipe in recipes:
        config = config_of(recipe)
        length = recipe.train.length
        dense = config.num_hidden_layers * visible_pairs(length)
        found.append(
            Reckoned(
                cell=Path(recipe.run).name,
                layout=layout_name(config, LocalAttention()),
                parameters=decoder_from_config(config.to_dict(), name=NAME).num_parameters,
                tokens=recipe.train.max_steps * tokens_per_step(recipe),
                attention=attention_pairs(config, length) / dense,
                done=_is_done(recipe),
            )
        )
    return found


# The run


def _check_run(run: Path, recipes: Sequence[PretrainRecipe]) -> None:
    """Refuse a run of another recipe: of another tokenizer, or with cells that differ in more than cells do.

    Cells that are done and not in the grid stay in its rows, so they are held against it too.
    """
    asked, wanted = run / "tokenizer" / ASKED, _asked(recipes[0])
    trains = isinstance(recipes[0].tokenizer, NewTokenizer)
    if trains and asked.exists() and yaml.safe_load(asked.read_text(encoding="utf-8")) != wanted:
        raise ZebraError(
            f"{asked.parent} was trained by another recipe: its tokenizer or its data differ. "
            f"Name another run, or remove {run}."
        )
    known = [_sharing(run, recipe) for recipe in recipes]
    for recipe in known:
        directory.check_recipe(Path(recipe.run), recipe)
    for other in _others(run, recipes):
        kept = read_recipe(other / "recipe.yaml", PretrainRecipe)
        if more := [name for name in directory.differing(known[0], kept) if name not in AXES]:
            raise ZebraError(
                f"{other} is a cell of another recipe: {', '.join(more)} differ. Name another run, or remove it."
            )


def _asked(recipe: PretrainRecipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json", include={"tokenizer", "data"}, exclude={"data": {"workers", "cache"}})


def _sharing(run: Path, recipe: PretrainRecipe) -> PretrainRecipe:
    """A cell's recipe with the grid's tokenizer, where that is trained."""
    trains = isinstance(recipe.tokenizer, NewTokenizer)
    return recipe.model_copy(update={"tokenizer": str(run / "tokenizer")}) if trains else recipe


def _with_tokenizer(run: Path, recipes: Sequence[PretrainRecipe]) -> list[PretrainRecipe]:
    """The recipes with one tokenizer, trained where it is not there yet."""
    asked, made = recipes[0].tokenizer, run / "tokenizer"
    if isinstance(asked, NewTokenizer) and not made.is_dir():
        tokenizer = train_tokenizer(texts_of(recipes[0]), asked)
        with atomic_directory(made) as aside:
            tokenizer.save_pretrained(aside)
            atomic_write(aside / ASKED, yaml.safe_dump(_asked(recipes[0])))
    recipes = [_sharing(run, recipe) for recipe in recipes]
    tokenizer = load_tokenizer(str(recipes[0].tokenizer))
    check_step(recipes[0], read_texts(recipes[0], tokenizer))  # and the text is in the cache, for all cells
    return list(recipes)


# Processes


def _is_done(recipe: PretrainRecipe) -> bool:
    rows = Path(recipe.run) / "results.jsonl"
    return rows.exists() and rows.stat().st_size > 0  # as `pretrain` has it


@contextmanager
def _told_to_end() -> Iterator[list[int]]:
    """The signals to end that came; the cells are ended before the process is."""
    told: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield told
        return
    signals = signal.SIGTERM, signal.SIGHUP
    before = {number: signal.signal(number, lambda number, _: told.append(number)) for number in signals}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(
    run: Path, recipes: Sequence[PretrainRecipe], todo: Sequence[PretrainRecipe], workers: int
) -> list[tuple[str, str]]:
    """Run cells, `workers` at a time; the names of those that failed, with the last line that they said."""
    failed: list[tuple[str, str]] = []
    waiting, free = list(todo), list(range(workers))
    running: dict[int, tuple[PretrainRecipe, subprocess.Popen[bytes]]] = {}
    with _told_to_end() as told, bar("cells", len(todo), "cells") as advance:
        try:
            while waiting or running:
                while waiting and free:
                    worker, recipe = free.pop(0), waiting.pop(0)
                    running[worker] = recipe, _start(recipe, worker, workers)
                time.sleep(0.2)
                if told:
                    raise SystemExit(128 + told[0])
                for worker, (recipe, process) in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[worker]
                    free.append(worker)
                    name = Path(recipe.run).name
                    if process.returncode:
                        failed.append((name, _why(recipe, process.returncode)))
                    _gather(run, recipes)
                    advance(1, note=name)
                    if not console.is_terminal:
                        console.print(f"{name}: {'failed' if process.returncode else 'done'}", highlight=False)
        finally:
            for _, process in running.values():
                process.terminate()
            for _, process in running.values():
                process.wait()
    return failed


def _start(recipe: PretrainRecipe, worker: int, workers: int) -> subprocess.Popen[bytes]:
    run = Path(recipe.run)
    path = run.with_name(f"{run.name}.yaml")
    atomic_write(path, yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    shown = dict(os.environ)
    if gpus := torch.cuda.device_count():
        mine = shown.get("CUDA_VISIBLE_DEVICES", "").split(",")  # of the machine's GPUs, those that may be used
        named = len(mine) >= gpus and all(mine)
        shown["CUDA_VISIBLE_DEVICES"] = mine[worker % gpus] if named else str(worker % gpus)
    else:
        shown["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // workers))
    command = [sys.executable, "-m", "zebra", "pretrain", str(path), "--json"]
    with run.with_name(f"{run.name}.log").open("ab") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log, env=shown)


def _why(recipe: PretrainRecipe, code: int) -> str:
    """The last line of a cell's log; what is there is of before where the cell was killed."""
    if code < 0:
        return f"killed by signal {-code}"
    run = Path(recipe.run)
    try:
        lines = run.with_name(f"{run.name}.log").read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return "and its log is gone"
    return next((line.removeprefix("zebra: ") for line in reversed(lines) if line.strip()), "it said nothing.")


def _others(run: Path, recipes: Sequence[PretrainRecipe]) -> list[Path]:
    """Cells of the run that are done and not in the grid."""
    mine = {Path(recipe.run).name for recipe in recipes}
    done = sorted(file.parent for file in (run / "cells").glob("*/results.jsonl") if file.stat().st_size)
    return [cell for cell in done if cell.name not in mine]


def _gather(run: Path, recipes: Sequence[PretrainRecipe]) -> list[Result]:
    cells = [*(Path(recipe.run) for recipe in recipes if _is_done(recipe)), *_others(run, recipes)]
    rows = [row for cell in cells for row in read_results(cell / "results.jsonl")]
    if rows:
        write_results(run / "results.jsonl", rows)
    return rows
