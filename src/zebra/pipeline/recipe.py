"""The recipe of a pipeline: stages in their order, each a verb's own recipe or the arguments of the function it calls.

convert, adapt, tune, pretrain    make <run>/<stage>/striped or <run>/<stage>/model, for the stages behind them
evaluate, report                  make rows, and a page
"""

from __future__ import annotations

import difflib
import inspect
import os
import re
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from pydantic import Field, create_model

from zebra.errors import ZebraError
from zebra.evaluate import documents, harness, perplexity, retrieval
from zebra.evaluate.selection import select
from zebra.model.load_options import LoadOptions
from zebra.train.directory import processes
from zebra.train.recipe import AdaptRecipe, PretrainRecipe, Section, SourceRecipe, checked, read_recipe
from zebra.train.tune_recipe import TuneRecipe


def _of_yaml(kind: Any) -> Any:
    """What YAML can write of an annotation: `torch.dtype | str | None` is `str | None`."""
    if get_origin(kind) is tuple:
        return Sequence[get_args(kind)[0]]  # type: ignore[misc]
    if get_origin(kind) not in (Union, types.UnionType):
        return kind
    plain = [one for one in get_args(kind) if one in (str, int, float, bool, types.NoneType) or get_origin(one) is list]
    return Union[tuple(plain)]  # noqa: UP007


def _arguments(name: str, call: Callable[..., Any], *own: str, more: Sequence[type] = ()) -> Any:
    """A section of the keyword arguments of a function but its `own`, and of the fields of dataclasses behind them."""
    given = [p for p in inspect.signature(call, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
    given += [p for one in more for p in inspect.signature(one, eval_str=True).parameters.values()]
    taken = [p for p in given if p.name not in own]
    kinds: Any = {p.name: (_of_yaml(p.annotation), ... if p.default is p.empty else p.default) for p in taken}
    return create_model(name, __base__=Section, **kinds)


MEASURES: dict[str, Callable[..., Any]] = {
    "perplexity": perplexity.evaluate_perplexity,
    "retrieval": retrieval.evaluate_retrieval,
    "tasks": harness.evaluate_tasks,
    "documents": documents.evaluate_documents,
}
"""What `evaluate` does, each as the verb of its name; its keys are the arguments of the function."""
_OWN = ("checkpoint", "run", "check_only", "options")


Select: Any = _arguments("Select", select, "checkpoint", "rope", "work", "check_only", "run")


class Convert(Section):
    """A layout that is given, or one that is measured by the arguments of `zebra.select`."""

    stripes: str | None = None
    select: Select | None = None
    rope: str | None = None
    full_decode: bool = False


_Measures = {
    name: _arguments(name, call, *_OWN, more=[documents.Options, LoadOptions] if name == "documents" else [LoadOptions])
    for name, call in MEASURES.items()
}
_choices: Any = {name: (kind | None, None) for name, kind in _Measures.items()}
Evaluate: Any = create_model("Evaluate", __base__=Section, **_choices)


class Report(Section):
    """A page of all rows before it."""

    title: str | None = None


KINDS: dict[str, Any] = {
    "convert": Convert,
    "adapt": AdaptRecipe,
    "tune": TuneRecipe,
    "pretrain": PretrainRecipe,
    "evaluate": Evaluate,
    "report": Report,
}
MADE = {"convert": "striped", "adapt": "model", "tune": "model", "pretrain": "model"}
"""Where in its folder a stage leaves a checkpoint."""


@dataclass(frozen=True)
class Stage:
    """A stage of a pipeline.

    Attributes:
        folder: all that it makes stands there.
        source: the checkpoint that it begins with, and `after` the stage that makes that; None where there is none.
        before: the folders of the stages whose rows a report shows, by stage.
    """

    name: str
    kind: str
    folder: Path
    recipe: Any
    source: Path | None
    after: str | None
    before: dict[str, Path]

    @property
    def made(self) -> Path | None:
        """The checkpoint that it makes."""
        return self.folder / MADE[self.kind] if self.kind in MADE else None


class Pipeline(Section):
    """The stages by name, each a verb's recipe or arguments; its kind is its name, or its `kind`."""

    run: str = Field(description="the folder of all stages")
    model: str | None = Field(None, description="the checkpoint that the first stages begin with")
    stages: dict[str, dict[str, Any] | None] = Field(min_length=1)


def read_pipeline(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> list[Stage]:
    """The stages of a pipeline's recipe; refuses what can be refused of the recipe alone.

    Raises:
        ZebraError: what `read_recipe` refuses of it and of each of its stages; a kind that is not there, an order that
            cannot be.
    """
    recipe = read_recipe(path, Pipeline, overrides)
    if processes() > 1:
        raise ZebraError("a pipeline is one process. Start a launcher on the verb of a stage, with the stage's recipe.")
    stages: dict[str, Stage] = {}
    for name, section in recipe.stages.items():
        stages[name] = _stage(f"{path}, stage {name}", recipe, name, dict(section or {}), stages)
    return list(stages.values())


def _stage(where: str, pipeline: Pipeline, name: str, section: dict[str, Any], before: dict[str, Stage]) -> Stage:
    kind, folder = str(section.pop("kind", name)), Path(pipeline.run) / name
    if not re.fullmatch(r"[A-Za-z][\w-]*", name) or name == "model":
        raise ZebraError(f"{where}: a stage's name is letters, digits, _ and -, and not model. Name it otherwise.")
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=1)
        said = f"did you mean {near[0]}?" if near else f"name it so, or write kind: one of {', '.join(KINDS)}."
        raise ZebraError(f"{where}: there is no stage of the kind {kind}; {said}")
    source, after = _source(where, kind, section, pipeline.model, before)
    rows = {name: other.folder for name, other in before.items() if kind == "report" and other.kind != "report"}
    if kind == "report" and not rows:
        raise ZebraError(f"{where}: a report is of the stages before it, and there is none. Move it to the end.")
    if issubclass(KINDS[kind], SourceRecipe) or kind == "pretrain":
        own = {"run": str(folder)} | ({} if kind == "pretrain" else {"model": str(source)})
        if twice := sorted(own.keys() & section.keys()):
            raise ZebraError(f"{where}: {' and '.join(twice)} of a stage are the pipeline's to say. Leave them out.")
        section |= own
    return Stage(name, kind, folder, checked(section, KINDS[kind], where), source, after, rows)


def _source(
    where: str, kind: str, section: dict[str, Any], model: str | None, before: dict[str, Stage]
) -> tuple[Path | None, str | None]:
    """The checkpoint that a stage begins with, and the stage that makes it: the last one before it, or `from`."""
    if kind in ("pretrain", "report"):
        return None, None
    makers = [name for name, stage in before.items() if stage.made]
    asked = section.pop("from", makers[-1] if makers else "model")
    if asked not in ("model", *makers):
        there = ", ".join(["model", *makers])
        raise ZebraError(
            f"{where}: from names a stage before it that makes a checkpoint, or model; got {asked}, of {there}."
        )
    if asked != "model":
        return before[asked].made, asked
    if model is None:
        raise ZebraError(
            f"{where}: it begins with a checkpoint, and no stage before it makes one. Add model: the first one."
        )
    if not Path(model).is_dir():
        raise ZebraError(f"{where}: there is no checkpoint at {model}. Give the directory of one as model.")
    return Path(model), None
