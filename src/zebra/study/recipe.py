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
            raise ValueError("recipe cannot have a run: each cell has a directory under the grid's run; remove it")
        for name in ("model", "train", "evaluate"):
            if not isinstance(self.recipe.get(name) or {}, dict):
                raise ValueError(f"recipe.{name} must be a mapping of keys to values; got {self.recipe[name]!r}")
        train, evaluate = self.recipe.get("train") or {}, self.recipe.get("evaluate") or {}
        if (length := evaluate.get("length", train.get("length"))) != train.get("length"):
            raise ValueError(
                f"recipe.evaluate.length must equal recipe.train.length, here {train.get('length')}; got {length!r}; "
                "leave it out, and set recipe.evaluate.beyond to evaluate longer contexts"
            )
        model = self.recipe.get("model") or {}
        if (kind := model.get("model_type")) != NAME:
            raise ValueError(f"recipe.model.model_type must be {NAME}; got {kind!r}")
        axes = [f"model.{name}" for name in ("attention_kinds", "layer_types", "position_embedding") if name in model]
        axes += ["stripes"] * (self.recipe.get("stripes") is not None)
        if axes:
            raise ValueError(
                f"recipe.{axes[0]} cannot be set: attention and position of the cells determine it; remove it"
            )
        return self
