"""The cells of a grid of training runs from scratch, and the recipe of each."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any, NamedTuple

from zebra.errors import ZebraError
from zebra.study.model import StudyConfig, attention_kinds
from zebra.study.recipe import StudyRecipe
from zebra.train.pretrain import config_of
from zebra.train.recipe import PretrainRecipe
from zebra.train.recipe_file import checked

CELL_KEYS = ("run", "model.attention_kinds", "model.position_embedding", "model.sliding_window", "model.summary_block",
             "train.length", "train.per_device_train_batch_size", "train.seed", "evaluate.length",
             "evaluate.beyond")  # fmt: skip
"""The keys of a recipe in which the cells of a grid differ."""


class GridCell(NamedTuple):
    """One model of a grid; an axis that does not apply to it is None."""

    attention: str
    position: str
    group: int | None
    window: int | None
    block: int | None
    length: int
    seed: int

    @property
    def name(self) -> str:
        """The name of its directory, and of the run in its results: `grouped-4-rotary-w32-512-seed0`."""
        parts = [self.attention, self.group, self.position, self.window and f"w{self.window}"]
        parts += [self.block and f"b{self.block}", self.length, f"seed{self.seed}"]
        return "-".join(str(part) for part in parts if part is not None)


def cells_of(grid: StudyRecipe) -> list[GridCell]:
    """The cells in the order of the recipe, each once.

    Raises:
        ZebraError: a length or a window that neither an axis nor the recipe gives.
    """
    model, train = grid.recipe["model"], grid.recipe.get("train") or {}
    cells: dict[GridCell, None] = {}
    for axes in grid.cells:
        windows = axes.window or (model.get("sliding_window"),)
        blocks = axes.block or (model.get("summary_block", StudyConfig.summary_block),)
        lengths, seeds = axes.length or (train.get("length"),), axes.seed or (train.get("seed", 0),)
        for attention, position, group, window, block, length, seed in itertools.product(
            axes.attention, axes.position, axes.group, windows, blocks, lengths, seeds
        ):
            if not isinstance(length, int):
                raise ZebraError("a cell must have a length. Set recipe.train.length, or the axis length.")
            if attention != "global" and not isinstance(window, int):
                remedy = "Set recipe.model.sliding_window, or the axis window"
                raise ZebraError(f"{attention} layers must have a window. {remedy}.")
            of_group = group if attention == "grouped" else None
            of_window = window if attention != "global" else None
            of_block = block if attention == "summary" else None
            cells[GridCell(attention, position, of_group, of_window, of_block, length, seed)] = None
    return list(cells)


def recipes_of(grid: StudyRecipe) -> list[PretrainRecipe]:
    """Build the recipe of each cell. Steps have the same number of tokens at all lengths, so only the length differs.

    Raises:
        ZebraError: a recipe or a model that cannot be built; the error names the cell.
    """
    recipes = []
    for cell in cells_of(grid):
        try:
            recipe = checked(_recipe_tree(grid, cell), PretrainRecipe, "recipe")
            config_of(recipe)
        except (ZebraError, ValueError) as error:
            raise ZebraError(f"the cell {cell.name}: {error}") from None
        recipes.append(recipe)
    return recipes


def _recipe_tree(grid: StudyRecipe, cell: GridCell) -> dict[str, Any]:
    tree = copy.deepcopy(grid.recipe)
    model, train, evaluate = tree["model"], tree.get("train") or {}, tree.get("evaluate")
    layers = model.get("num_hidden_layers", StudyConfig.num_hidden_layers)
    batch, length = train.get("per_device_train_batch_size", 1), train.get("length", cell.length)
    numbers = {"model.num_hidden_layers": layers, "train.per_device_train_batch_size": batch, "train.length": length}
    numbers["evaluate.beyond"] = (evaluate or {}).get("beyond") or 1
    for name, number in numbers.items():
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"recipe.{name} must be an integer of at least 1; got {number!r}.")
    if cell.window is not None and cell.window > cell.length:
        raise ValueError(f"the window must be at most the length, {cell.length:,} tokens; got {cell.window:,}.")
    kinds = attention_kinds(cell.attention, layers, cell.group or 1)
    model |= {"attention_kinds": kinds, "position_embedding": cell.position, "sliding_window": cell.window}
    if cell.block is not None:
        model["summary_block"] = cell.block
    if batch * length % cell.length:
        raise ValueError(
            f"the length must divide the {batch * length:,} tokens of a batch (recipe.train."
            f"per_device_train_batch_size x length); got {cell.length:,}. Use a length that divides it."
        )
    train |= {"length": cell.length, "per_device_train_batch_size": batch * length // cell.length, "seed": cell.seed}
    if evaluate is not None:
        evaluate["length"] = cell.length
        if cell.position == "absolute" or (evaluate.get("beyond") or 0) <= cell.length:
            evaluate["beyond"] = None  # learned positions end at the trained length
    return tree | {"run": str(Path(grid.run) / "cells" / cell.name), "train": train}
