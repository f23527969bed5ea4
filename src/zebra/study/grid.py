"""A grid of training runs from scratch (attention kinds × position embeddings × lengths) as one command.

run/tokenizer/            trained once on the grid's text unless the recipe names one; all cells share it
run/cells/<name>.yaml     a cell: a recipe of `zebra pretrain`, which can also be run alone
run/cells/<name>.log      what its process printed
run/cells/<name>/         its run directory (zebra.train.run)
run/results.jsonl         the results of all finished cells, in the grid's order; cells no longer in the grid come last

Each cell has a process of its own. A finished cell is not run again, a killed one resumes, and one that fails does not
stop the others.
"""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

import torch
import yaml

from zebra.errors import ZebraError
from zebra.files import atomic_directory, atomic_write, directory_lock
from zebra.model.checkpoint import load_tokenizer
from zebra.model.families import attention_pairs, layout
from zebra.plan.cost import Run
from zebra.plan.decoder import decoder_from_config
from zebra.plan.devices import Device
from zebra.progress import bar, console
from zebra.report import write_report
from zebra.results import Result, read_results, write_results
from zebra.signals import collected
from zebra.stripes import visible_pairs
from zebra.study.cells import CELL_KEYS, recipes_of
from zebra.study.layout import NAME
from zebra.study.recipe import StudyRecipe
from zebra.train import directory
from zebra.train.pretrain import config_of
from zebra.train.processes import check_processes, tokens_per_step
from zebra.train.recipe import NewTokenizer, PretrainRecipe
from zebra.train.recipe_file import as_recipe, read_recipe
from zebra.train.step_memory import planned_step
from zebra.train.texts import read_texts
from zebra.train.tokenizer import tokenizer_texts, train_tokenizer
from zebra.train.trainer import check_machine

ORIGIN = "origin.yaml"
"""The file beside a grid's tokenizer with the settings and the data that it was trained on."""


def study(grid: StudyRecipe | str | os.PathLike[str], workers: int = 1) -> list[Result]:
    """Run the cells that are not finished, `workers` at a time, and return the results of all cells.

    With several GPUs, worker i uses GPU i modulo their number; on a CPU the workers share the cores.

    Raises:
        ZebraError: what `read_recipe` raises; before any work, a contradiction in any cell, no text, no GPU where the
            recipe needs one, or a cell's directory of another recipe; when all others are finished, cells that failed.
    """
    grid = as_recipe(grid, StudyRecipe)
    recipes: Sequence[PretrainRecipe] = recipes_of(grid)
    if workers < 1:
        raise ZebraError(f"workers must be at least 1; got {workers}. Raise it.")
    check_processes(recipes[0])
    check_machine(recipes[0].train)
    run = Path(grid.run)
    with directory_lock(run):
        _check_run(run, recipes)
        recipes = _with_tokenizer(run, recipes)
        todo = [recipe for recipe in recipes if not _is_finished(Path(recipe.run))]
        _gather(run, recipes)  # raises for damaged results, before any work
        if len(todo) < len(recipes):
            console.print(f"{len(recipes) - len(todo)} of {len(recipes)} cells are already done")
        failed = _run(run, recipes, todo, workers)
        results = _gather(run, recipes)
        for cell in (Path(recipe.run) for recipe in recipes):  # killed between their results and their page
            if _is_finished(cell) and not (cell / "report.html").exists():
                write_report(read_results(cell / "results.jsonl"), cell / "report.html")
    if failed:
        (name, reason), more = failed[0], len(failed) - 1
        raise ZebraError(
            f"{name} failed, {reason.rstrip('.')}{f'; and {more} more' if more else ''}. Logs are in "
            f"{run / 'cells'}/<name>.log, results of the other cells in {run / 'results.jsonl'}; run the same command "
            "again to retry."
        )
    return results


@dataclass(frozen=True)
class CellEstimate:
    """The size and the cost of a cell, known before it runs.

    Attributes:
        tokens: tokens of the whole training.
        attention: visible pairs as a share of those of full attention.
        hours: the least time of the training on one device; None if no device is given.
    """

    cell: str
    layout: str
    length: int
    seed: int
    parameters: int
    tokens: int
    attention: float
    hours: float | None
    done: bool


def estimate(grid: StudyRecipe, device: Device | None = None) -> list[CellEstimate]:
    """Estimate what `study` would run, and how long that takes on a device.

    Raises:
        ZebraError: what `study` raises before any work, except about the text and the machine; a dtype for which the
            device has no ceiling.
    """
    recipes = recipes_of(grid)
    _check_run(Path(grid.run), recipes)
    cells = []
    for recipe in recipes:
        config, train, step = config_of(recipe), recipe.train, step_of(recipe)
        steps = train.max_steps * train.gradient_accumulation_steps
        cell = CellEstimate(
            cell=Path(recipe.run).name,
            layout=f"{layout(config)} {config.position_embedding}",
            length=train.length,
            seed=train.seed,
            parameters=step.decoder.num_parameters,
            tokens=train.max_steps * tokens_per_step(recipe),
            attention=attention_pairs(config, train.length) / (config.num_hidden_layers * visible_pairs(train.length)),
            hours=None if device is None else steps * sum(device.seconds(step).values()) / 3600,
            done=_is_finished(Path(recipe.run)),
        )
        cells.append(cell)
    return cells


def step_of(recipe: PretrainRecipe) -> Run:
    """The forward and backward pass of a cell, as a run that `zebra.plan` estimates."""
    decoder = decoder_from_config(config_of(recipe).to_dict(), name=NAME)
    return planned_step(recipe, decoder, decoder.stripes)


# The run


def _check_run(run: Path, recipes: Sequence[PretrainRecipe]) -> None:
    """Check that the run's tokenizer and its cells belong to this grid.

    Finished cells that are not in the grid stay in its results, so they too may differ only in `CELL_KEYS`.
    """
    origin, expected = run / "tokenizer" / ORIGIN, _origin(recipes[0])
    trains = isinstance(recipes[0].tokenizer, NewTokenizer)
    if trains and origin.exists() and yaml.safe_load(origin.read_text(encoding="utf-8")) != expected:
        raise ZebraError(
            f"{origin.parent} was trained with another recipe: its tokenizer or its data differ. "
            f"Name another run, or remove {run}."
        )
    recipes = _sharing_tokenizer(run, recipes)
    for recipe in recipes:
        directory.check_recipe(Path(recipe.run), recipe)
    for cell in _other_cells(run, recipes):
        other = read_recipe(cell / "recipe.yaml", PretrainRecipe)
        if different := [name for name in directory.differing_keys(recipes[0], other) if name not in CELL_KEYS]:
            raise ZebraError(
                f"{cell} is a cell of another recipe: {', '.join(different)} differ. Name another run, or remove it."
            )


def _origin(recipe: PretrainRecipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json", include={"tokenizer", "data"}, exclude={"data": {"num_proc", "cache_dir"}})


def _sharing_tokenizer(run: Path, recipes: Sequence[PretrainRecipe]) -> Sequence[PretrainRecipe]:
    """The cells' recipes with the path of the grid's tokenizer, if the grid trains one."""
    if not isinstance(recipes[0].tokenizer, NewTokenizer):
        return recipes
    return [recipe.model_copy(update={"tokenizer": str(run / "tokenizer")}) for recipe in recipes]


def _with_tokenizer(run: Path, recipes: Sequence[PretrainRecipe]) -> Sequence[PretrainRecipe]:
    """The cells' recipes with their shared tokenizer, which is trained if it does not exist yet."""
    settings, path = recipes[0].tokenizer, run / "tokenizer"
    if isinstance(settings, NewTokenizer) and not path.is_dir():
        tokenizer = train_tokenizer(tokenizer_texts(recipes[0]), settings)
        with atomic_directory(path) as aside:
            tokenizer.save_pretrained(aside)
            atomic_write(aside / ORIGIN, yaml.safe_dump(_origin(recipes[0])))
    recipes = _sharing_tokenizer(run, recipes)
    tokenizer = load_tokenizer(str(recipes[0].tokenizer))
    read_texts(recipes[0], tokenizer)  # fails here if the text is too short, and caches the tokens for all cells
    return recipes


def _is_finished(cell: Path) -> bool:
    results = cell / "results.jsonl"
    return results.exists() and results.stat().st_size > 0


def _other_cells(run: Path, recipes: Sequence[PretrainRecipe]) -> list[Path]:
    """Finished cells of the run that are not in the grid."""
    of_grid = {Path(recipe.run) for recipe in recipes}
    return [cell for cell in sorted((run / "cells").glob("*/")) if cell not in of_grid and _is_finished(cell)]


def _gather(run: Path, recipes: Sequence[PretrainRecipe]) -> list[Result]:
    cells = [*filter(_is_finished, (Path(recipe.run) for recipe in recipes)), *_other_cells(run, recipes)]
    results = [one for cell in cells for one in read_results(cell / "results.jsonl")]
    if results:
        write_results(run / "results.jsonl", results)
    return results


# Processes


def _run(
    run: Path, recipes: Sequence[PretrainRecipe], todo: Sequence[PretrainRecipe], workers: int
) -> list[tuple[str, str]]:
    """Run cells, `workers` at a time; return the names of those that failed, with their reasons."""
    failed: list[tuple[str, str]] = []
    waiting, free = list(todo), list(range(workers))
    running: dict[int, tuple[Path, subprocess.Popen[bytes]]] = {}
    with collected(signal.SIGTERM, signal.SIGHUP) as received, bar("cells", len(todo), "cells") as advance:
        try:
            while waiting or running:
                while waiting and free:
                    worker, recipe = free.pop(0), waiting.pop(0)
                    running[worker] = Path(recipe.run), _start(recipe, worker, workers)
                time.sleep(0.2)
                if received:
                    raise SystemExit(128 + received[0])
                for worker in [worker for worker, (_, process) in running.items() if process.poll() is not None]:
                    cell, process = running.pop(worker)
                    free.append(worker)
                    if process.returncode:
                        failed.append((cell.name, _reason(cell, process.returncode)))
                    _gather(run, recipes)
                    advance(1, note=cell.name)
                    if not console.is_terminal:
                        console.print(f"{cell.name}: {'failed' if process.returncode else 'done'}")
        finally:
            for _, process in running.values():
                process.terminate()
            for _, process in running.values():
                process.wait()
    return failed


def _start(recipe: PretrainRecipe, worker: int, workers: int) -> subprocess.Popen[bytes]:
    path = f"{recipe.run}.yaml"
    atomic_write(path, yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    environment = dict(os.environ)
    if gpus := torch.cuda.device_count():
        visible = environment.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[worker % gpus]
    else:
        environment["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // workers))
    command = [sys.executable, "-m", "zebra", "pretrain", path, "--json"]
    end_with = functools.partial(_end_with, os.getpid())
    with Path(f"{recipe.run}.log").open("ab") as log:
        return subprocess.Popen(
            command, stdin=DEVNULL, stdout=DEVNULL, stderr=log, env=environment, preexec_fn=end_with
        )


_PR_SET_PDEATHSIG = 1
_prctl = getattr(ctypes.CDLL(None), "prctl", lambda *_: None)  # looked up before the fork; other systems lack it


def _end_with(parent: int) -> None:
    """End this process with its parent, even if SIGKILL ends that; else a cell would go on alone (Linux, prctl(2))."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it has ended already
        os._exit(1)


def _reason(cell: Path, code: int) -> str:
    """Why a cell failed: the signal that killed it, else the last line of its log."""
    if code < 0:
        return f"killed by signal {-code}"
    log = Path(f"{cell}.log")
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
    return next((line.removeprefix("zebra: ") for line in reversed(lines) if line.strip()), "its log is empty")
