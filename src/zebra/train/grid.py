"""A grid of trainings from scratch: attention kinds × position embeddings × lengths, as one command.

run/tokenizer/            trained once on the grid's text, where the recipe names none; all cells share it
run/cells/<name>.yaml     a cell: a recipe of `zebra pretrain`, which can be run alone
run/cells/<name>.log      what its process said
run/cells/<name>/         its directory (zebra.train.pretrain)
run/rows.jsonl            the rows of all cells that are done, in the grid's order

Each cell has a process of its own. A cell that is done is not run again, one that was killed goes on where it stood,
and one that fails leaves the others alone.
"""

from __future__ import annotations

import itertools
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
from typing import Annotated, Any, Literal, TypeVar

import torch
import yaml
from pydantic import BeforeValidator, Field, model_validator

from zebra import records
from zebra.model.checkpoint import open_tokenizer
from zebra.model.families import attention_pairs
from zebra.model.local import Local, layout_with
from zebra.model.study import NAME, StudyConfig, attention_kinds
from zebra.plan.decoder import decoder
from zebra.progress import bar, console
from zebra.records import Row
from zebra.refusal import Refusal
from zebra.staged import held, staged, write_whole
from zebra.stripes import visible_pairs
from zebra.train import directory
from zebra.train.pretrain import check_step, config_of
from zebra.train.recipe import NewTokenizer, PretrainRecipe, Section, checked
from zebra.train.texts import read_texts
from zebra.train.tokenizer import texts_of, train_tokenizer
from zebra.train.trainer import check_machine, tokens_per_step

T = TypeVar("T")
_Many = Annotated[
    tuple[T, ...], BeforeValidator(lambda one: (one,) if not isinstance(one, list | tuple) else tuple(one))
]
ASKED = "asked.yaml"
"""What a trained tokenizer was to be, and of what data; it lies beside it."""
_Size = Annotated[int, Field(ge=1)]


class Axes(Section):
    """Some cells: all combinations of what the axes list. One value may stand for a list of one."""

    attention: _Many[Literal["global", "local", "summary", "grouped"]] = Field(min_length=1)
    position: _Many[Literal["rotary", "alibi", "absolute", "none"]] = Field(min_length=1)
    group: _Many[_Size] = Field((4,), min_length=1, description="layers of a group; the first is global, of `grouped`")
    window: _Many[_Size] | None = Field(None, min_length=1, description="recipe.model.sliding_window without it")
    block: _Many[_Size] | None = Field(None, min_length=1, description="of `summary`; recipe.model.summary_block else")
    length: _Many[_Size] | None = Field(None, min_length=1, description="of training; recipe.train.length without it")
    seed: _Many[Annotated[int, Field(ge=0)]] | None = Field(None, min_length=1, description="recipe.train.seed else")


class StudyRecipe(Section):
    """A grid: what its cells share, and what they differ in."""

    run: str = Field(description="the run's directory")
    recipe: dict[str, Any] = Field(description="of each cell: a recipe of `zebra pretrain`, but for run")
    cells: list[Axes] = Field(min_length=1, description="run in this order; a cell that comes twice is run once")

    @model_validator(mode="after")
    def _shared(self) -> StudyRecipe:
        if "run" in self.recipe:
            raise ValueError("recipe has no run of its own: each cell has a directory under the grid's run; remove it")
        for name in ("model", "train", "evaluate"):
            if not isinstance(self.recipe.get(name) or {}, dict):
                raise ValueError(f"recipe.{name} is a table of keys and values; got {self.recipe[name]!r}")
        model = self.recipe.get("model") or {}
        if (kind := model.get("model_type")) != NAME:
            raise ValueError(f"recipe.model.model_type is {NAME}, whose layers have the kinds of a grid; got {kind!r}")
        own = [f"model.{name}" for name in ("attention_kinds", "layer_types", "position_embedding") if name in model]
        own += ["stripes"] * (self.recipe.get("stripes") is not None)
        if own:
            raise ValueError(f"recipe.{own[0]} is what the cells differ in, by attention and position; remove it")
        return self


@dataclass(frozen=True)
class Cell:
    """One model of a grid; None where an axis does not touch it."""

    attention: str
    position: str
    group: int | None
    window: int | None
    block: int | None
    length: int
    seed: int

    @property
    def name(self) -> str:
        """Its directory, and its rows' run: `grouped-4-rotary-w32-512-seed0`."""
        parts = [self.attention, self.group, self.position, self.window and f"w{self.window}"]
        parts += [self.block and f"b{self.block}", self.length, f"seed{self.seed}"]
        return "-".join(str(part) for part in parts if part is not None)


def study(grid: StudyRecipe, workers: int = 1) -> list[Row]:
    """Run the cells that are not done, `workers` at a time, and return the rows of all.

    On a machine with GPUs worker i sees GPU i; on a CPU the workers share the cores.

    Raises:
        Refusal: before any work, a contradiction in any cell, no text or no such machine, a cell's directory of
            another recipe; at the end, cells that failed, when all others are done.
    """
    recipes = recipes_of(grid)
    if workers < 1:
        raise Refusal(f"--workers is at least 1; got {workers}.")
    check_machine(recipes[0].train)
    run = Path(grid.run)
    with held(run):
        recipes = _with_tokenizer(grid, recipes)
        for recipe in recipes:
            directory.check_recipe(Path(recipe.run), recipe)
        done = [recipe for recipe in recipes if _is_done(recipe)]
        _gather(run, recipes)  # what is damaged is said before any work
        if done:
            console.print(f"{len(done)} of {len(recipes)} cells are done already", highlight=False)
        failed = _run(run, recipes, [recipe for recipe in recipes if recipe not in done], workers)
        rows = _gather(run, recipes)
    if failed:
        (name, why), more = failed[0], len(failed) - 1
        raise Refusal(
            f"{name} failed, {why.rstrip('.')}"
            + (f"; and {more} more" if more else "")
            + f". Every log is {run / 'cells'}/<name>.log, the rows of the others are {run / 'rows.jsonl'}; "
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
    for recipe in recipes_of(grid):
        config = config_of(recipe)
        length = recipe.train.length
        dense = config.num_hidden_layers * visible_pairs(length)
        found.append(
            Reckoned(
                cell=Path(recipe.run).name,
                layout=layout_with(config, Local()),
                parameters=decoder(config.to_dict(), name=NAME).size,
                tokens=recipe.train.steps * tokens_per_step(recipe),
                attention=attention_pairs(config, length) / dense,
                done=_is_done(recipe),
            )
        )
    return found


# Cells and their recipes


def cells_of(grid: StudyRecipe) -> list[Cell]:
    """The cells in their order, each once.

    Raises:
        Refusal: a recipe without a length, a window or a block that an axis leaves to it.
    """
    model, train = dict(grid.recipe["model"]), dict(grid.recipe.get("train") or {})
    cells: dict[Cell, None] = {}
    for axes in grid.cells:
        lengths = axes.length or (train.get("length"),)
        windows, blocks = (
            axes.window or (model.get("sliding_window"),),
            axes.block or (model.get("summary_block", StudyConfig.summary_block),),
        )
        seeds = axes.seed or (train.get("seed", 0),)
        for attention, position, group, window, block, length, seed in itertools.product(
            axes.attention, axes.position, axes.group, windows, blocks, lengths, seeds
        ):
            if not isinstance(length, int):
                raise Refusal("a cell has a length: give recipe.train.length, or the axis length.")
            if attention != "global" and not isinstance(window, int):
                raise Refusal(
                    f"{attention} layers have a window: give recipe.model.sliding_window, or the axis window."
                )
            cell = Cell(
                attention=attention,
                position=position,
                group=group if attention == "grouped" else None,
                window=window if attention != "global" else None,
                block=block if attention == "summary" else None,
                length=length,
                seed=seed,
            )
            cells[cell] = None
    return list(cells)


def recipes_of(grid: StudyRecipe) -> list[PretrainRecipe]:
    """A recipe for each cell; a step has as many tokens in all, so that lengths differ in nothing else.

    Raises:
        Refusal: a recipe that cannot be one, or a cell whose model cannot be built; the cell's name stands in front.
    """
    recipes = []
    for cell in cells_of(grid):
        try:
            recipe = checked(_tree(grid, cell), PretrainRecipe, "recipe")
            config_of(recipe)
        except (Refusal, ValueError) as error:
            raise Refusal(f"the cell {cell.name}: {error}") from None
        recipes.append(recipe)
    return recipes


def _tree(grid: StudyRecipe, cell: Cell) -> dict[str, Any]:
    shared = yaml.safe_load(yaml.safe_dump(grid.recipe))  # a copy
    model, train, evaluate = shared["model"], shared.get("train") or {}, shared.get("evaluate")
    for name, number in (
        ("model.num_hidden_layers", model.get("num_hidden_layers", 1)),
        ("train.rows_per_step", train.get("rows_per_step", 1)),
        ("train.length", train.get("length", cell.length)),
        ("evaluate.beyond", (evaluate or {}).get("beyond") or 1),
    ):
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"recipe.{name} is a whole number from 1 on; got {number!r}.")
    if cell.window is not None and cell.window > cell.length:
        raise ValueError(f"a window is at most the length, {cell.length:,} tokens; got {cell.window:,}.")
    kinds = attention_kinds(
        cell.attention, model.get("num_hidden_layers", StudyConfig.num_hidden_layers), cell.group or 1
    )
    model |= {"attention_kinds": kinds, "position_embedding": cell.position, "sliding_window": cell.window}
    if cell.block is not None:
        model["summary_block"] = cell.block
    rows = train.get("rows_per_step", 1) * train.get("length", cell.length)
    if rows % cell.length:
        raise ValueError(
            f"a step has {rows:,} tokens at a time (recipe.train.rows_per_step x length), and rows of {cell.length:,} "
            "do not fill it. Take a length that divides it."
        )
    train |= {"length": cell.length, "rows_per_step": rows // cell.length, "seed": cell.seed}
    if evaluate is not None:
        evaluate["length"] = cell.length
        if cell.position == "absolute" or (evaluate.get("beyond") or 0) <= cell.length:
            evaluate["beyond"] = None  # there are no positions beyond those that were learned
    return shared | {"run": str(Path(grid.run) / "cells" / cell.name), "train": train}


def _with_tokenizer(grid: StudyRecipe, recipes: Sequence[PretrainRecipe]) -> list[PretrainRecipe]:
    """The recipes with one tokenizer, trained where it is not there yet."""
    asked, made = recipes[0].tokenizer, Path(grid.run) / "tokenizer"
    if isinstance(asked, NewTokenizer):
        of = recipes[0].model_dump(mode="json", include={"tokenizer", "data"})
        if not made.is_dir():
            tokenizer = train_tokenizer(texts_of(recipes[0]), asked)
            with staged(made) as aside:
                tokenizer.save_pretrained(aside)
                write_whole(aside / ASKED, yaml.safe_dump(of))
        elif (made / ASKED).exists() and yaml.safe_load((made / ASKED).read_text(encoding="utf-8")) != of:
            raise Refusal(
                f"{made} was trained by another recipe: its tokenizer or its data differ. "
                f"Name another run, or remove {grid.run}."
            )
        recipes = [recipe.model_copy(update={"tokenizer": str(made)}) for recipe in recipes]
    tokenizer = open_tokenizer(str(recipes[0].tokenizer))
    check_step(recipes[0], read_texts(recipes[0], tokenizer))  # and the text is in the cache, for all cells
    return list(recipes)


# Processes


def _is_done(recipe: PretrainRecipe) -> bool:
    rows = Path(recipe.run) / "rows.jsonl"
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
    write_whole(path, yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
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


def _gather(run: Path, recipes: Sequence[PretrainRecipe]) -> list[Row]:
    rows = [row for recipe in recipes if _is_done(recipe) for row in records.read(Path(recipe.run) / "rows.jsonl")]
    if rows:
        records.write(run / "rows.jsonl", rows)
    return rows
