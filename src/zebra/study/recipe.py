"""The recipe of a grid of training runs from scratch: what its cells share, and in what they differ. No torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, model_validator

from zebra.study.layout import NAME
from zebra.train.recipe import RecipeSection

T = TypeVar("T")
_Many = Annotated[
    tuple[T, ...], BeforeValidator(lambda one: (one,) if not isinstance(one, list | tuple) else tuple(one))
]
_Size = Annotated[int, Field(ge=1)]


class Axes(RecipeSection):
    """Some cells: all combinations of the values on the axes. A single value stands for a list of one."""

    attention: _Many[Literal["global", "local", "summary", "grouped"]] = Field(min_length=1)
    position: _Many[Literal["rotary", "alibi", "absolute", "none"]] = Field(min_length=1)
    group: _Many[_Size] = Field((4,), min_length=1, description="layers of a group; the first is global, of `grouped`")
    window: _Many[_Size] | None = Field(None, min_length=1, description="recipe.model.sliding_window without it")
    block: _Many[_Size] | None = Field(None, min_length=1, description="of `summary`; recipe.model.summary_block else")
    length: _Many[_Size] | None = Field(None, min_length=1, description="of training; recipe.train.length without it")
    seed: _Many[Annotated[int, Field(ge=0)]] | None = Field(None, min_length=1, description="recipe.train.seed else")


class StudyRecipe(RecipeSection):
    """A grid: what its cells share, and in what they differ."""

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
        train, evaluate = self.recipe.get("train") or {}, self.recipe.get("evaluate") or {}
        if (length := evaluate.get("length", train.get("length"))) != train.get("length"):
            raise ValueError(
                f"recipe.evaluate.length: each cell is measured at the length that it is trained at, here "
                f"{train.get('length')}; got {length!r}; leave it out, and give recipe.evaluate.beyond to read farther"
            )
        model = self.recipe.get("model") or {}
        if (kind := model.get("model_type")) != NAME:
            raise ValueError(f"recipe.model.model_type is {NAME}, whose layers have the kinds of a grid; got {kind!r}")
        axes = [f"model.{name}" for name in ("attention_kinds", "layer_types", "position_embedding") if name in model]
        axes += ["stripes"] * (self.recipe.get("stripes") is not None)
        if axes:
            raise ValueError(f"recipe.{axes[0]} is what the cells differ in, by attention and position; remove it")
        return self
