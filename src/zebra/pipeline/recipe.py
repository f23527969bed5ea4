"""The recipe of a pipeline: a sequence of stages, each the recipe of a command or the arguments of its function."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from zebra.errors import ZebraError, did_you_mean
from zebra.model.checkpoint_files import check_checkpoint
from zebra.train.processes import processes
from zebra.train.recipe import AdaptRecipe, PretrainRecipe, Recipe, RecipeSection
from zebra.train.recipe_file import checked, read_recipe
from zebra.train.tune_recipe import TuneRecipe


class Convert(RecipeSection):
    """A conversion: a layout, or the arguments of `zebra.select`, which chooses one."""

    stripes: str | None = None
    select: dict[str, Any] | None = None
    rope: str | None = None
    full_decode: bool = False

    @model_validator(mode="after")
    def _one_layout(self) -> Convert:
        if (self.stripes is None) == (self.select is None):
            raise ValueError("a conversion requires either stripes or select; set one, such as stripes: GLLL:512")
        return self


class Evaluate(RecipeSection):
    """An evaluation: the arguments of the functions that measure a checkpoint, by the name of their command."""

    perplexity: dict[str, Any] | None = None
    retrieval: dict[str, Any] | None = None
    tasks: dict[str, Any] | None = None
    documents: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _not_empty(self) -> Evaluate:
        if not self.measures():
            raise ValueError(f"an evaluation requires at least one of {', '.join(type(self).model_fields)}; add one")
        return self

    def measures(self) -> dict[str, dict[str, Any]]:
        """The arguments of each measurement that the recipe names."""
        return {name: arguments for name, arguments in self if arguments is not None}


class Report(RecipeSection):
    """A report on the results of all stages before it."""

    title: str | None = None


KINDS: dict[str, type[RecipeSection]] = {
    "convert": Convert,
    "adapt": AdaptRecipe,
    "tune": TuneRecipe,
    "pretrain": PretrainRecipe,
    "evaluate": Evaluate,
    "report": Report,
}
_CHECKPOINTS = {"convert": "striped", "adapt": "model", "tune": "model", "pretrain": "model"}
"""The name of the checkpoint that a stage writes in its folder."""
_WRITTEN_LAST = {"convert": "striped", "evaluate": "results.jsonl"}
"""What a stage writes last; for kinds not named here, report.html."""


@dataclass(frozen=True)
class Stage:
    """A stage of a pipeline.

    Attributes:
        folder: where it writes everything.
        source: the checkpoint that it reads; None without one.
        after: the stage that writes this checkpoint; None for the pipeline's `model`.
        trust_remote_code: allow a tokenizer that is Python code in the checkpoint.
    """

    name: str
    kind: str
    folder: Path
    recipe: Any
    source: Path | None
    after: str | None
    trust_remote_code: bool

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint that it writes; None if it writes none."""
        return self.folder / _CHECKPOINTS[self.kind] if self.kind in _CHECKPOINTS else None

    @property
    def state(self) -> str:
        """`new`, `begun` or `done`, by what it wrote apart from hidden files; a report is always `new`."""
        names = [file.name for file in self.folder.glob("[!.]*")]
        if self.kind == "report" or not names:
            return "new"
        return "done" if _WRITTEN_LAST.get(self.kind, "report.html") in names else "begun"


class Pipeline(RecipeSection):
    """Stages by name, each a command's recipe or arguments. A stage's kind is its key `kind`, or else its name."""

    run: str = Field(description="the folder of all stages")
    model: str | None = Field(None, description="the checkpoint that the first stages begin with")
    stages: dict[str, dict[str, Any] | None] = Field(min_length=1)


def read_pipeline(
    path: str | os.PathLike[str], overrides: Sequence[str] = (), *, trust_remote_code: bool = False
) -> list[Stage]:
    """Read the stages of a pipeline from its recipe.

    Raises:
        ZebraError: what `read_recipe` raises, for the pipeline and each of its stages; an unknown kind, an impossible
            order, a launcher with several processes.
    """
    pipeline = read_recipe(path, Pipeline, overrides)
    if processes() > 1:
        raise ZebraError("a pipeline must run in one process. Use a launcher for the command of a single stage.")
    stages: dict[str, Stage] = {}
    for name, section in pipeline.stages.items():
        stage = _stage(f"{path}, stage {name}", pipeline, name, dict(section or {}), stages)
        stages[name] = replace(stage, trust_remote_code=trust_remote_code)
    return list(stages.values())


def _stage(where: str, pipeline: Pipeline, name: str, section: dict[str, Any], before: dict[str, Stage]) -> Stage:
    kind, folder = str(section.pop("kind", name)), Path(pipeline.run) / name
    if not re.fullmatch(r"[A-Za-z][\w-]*", name) or name == "model":
        raise ZebraError(f"{where}: a stage's name is a letter, then letters, digits, _ and -; not model. Rename it.")
    if kind not in KINDS:
        remedy = did_you_mean(kind, KINDS, f"set kind to one of {', '.join(KINDS)}.")
        raise ZebraError(f"{where}: unknown stage kind {kind}; {remedy}")
    source, after = _source(where, kind, section, pipeline.model, before)
    if kind == "report" and all(other.kind == "report" for other in before.values()):
        raise ZebraError(f"{where}: a report requires another stage before it. Move it to the end.")
    if issubclass(KINDS[kind], Recipe):
        keys = {"run": str(folder)} | ({"model": str(source)} if source else {})
        if twice := sorted(keys.keys() & section.keys()):
            raise ZebraError(f"{where}: the pipeline sets {' and '.join(twice)}. Remove it from the stage.")
        section |= keys
    return Stage(name, kind, folder, checked(section, KINDS[kind], where), source, after, trust_remote_code=False)


def _source(
    where: str, kind: str, section: dict[str, Any], model: str | None, before: dict[str, Stage]
) -> tuple[Path | None, str | None]:
    """The checkpoint that a stage reads, and the stage that writes it: `from`, or the last earlier one that does."""
    if kind in ("pretrain", "report"):
        return None, None
    writers = [name for name, stage in before.items() if stage.checkpoint]
    name = section.pop("from", writers[-1] if writers else "model")
    if name not in ("model", *writers):
        choices = ", ".join(["model", *writers])
        raise ZebraError(
            f"{where}: from must be model or an earlier stage that writes a checkpoint; got {name}. Use {choices}."
        )
    if name != "model":
        return before[name].checkpoint, name
    if model is None:
        raise ZebraError(
            f"{where}: it requires a checkpoint, and no stage before it writes one. Set model to a checkpoint."
        )
    check_checkpoint(model)
    return Path(model), None
