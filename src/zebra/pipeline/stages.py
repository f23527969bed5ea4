"""What a stage of a pipeline does: it is checked before the first one works, and performed.

A stage whose checkpoint does not exist yet is checked on a placeholder: the source's files, linked, under the config
that the stages before it will write. What a verb rejects of configs, tokenizers and data, it rejects there.
"""

from __future__ import annotations

import importlib
import inspect
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from pydantic import create_model

from zebra.data.conversations import read_conversations
from zebra.evaluate import documents, harness, perplexity, retrieval
from zebra.evaluate.selection import select
from zebra.model.checkpoint import read_config, write_config, write_zebra_json
from zebra.model.load import convert, converted_config
from zebra.model.load_options import LoadOptions
from zebra.model.local import LocalAttention
from zebra.pipeline.recipe import Convert, Stage
from zebra.report import write_report
from zebra.results import Result, read_results, write_results
from zebra.stripes import Stripes
from zebra.train.chat import Chat
from zebra.train.dry_run import dry_run
from zebra.train.measuring import local_attention_for
from zebra.train.pretrain import config_of
from zebra.train.recipe import CheckpointRecipe, RecipeSection, check_files, checked
from zebra.train.source import adapted_config, read_source
from zebra.train.trainer import check_machine
from zebra.train.tune_recipe import TuneRecipe

_MEASURES: dict[str, Callable[..., Any]] = {
    "perplexity": perplexity.evaluate_perplexity,
    "retrieval": retrieval.evaluate_retrieval,
    "tasks": harness.evaluate_tasks,
    "documents": documents.evaluate_documents,
}
_NOT_KEYS = ("checkpoint", "run", "check_only", "work")
"""Arguments that the pipeline sets."""


def perform(stage: Stage) -> None:
    """Run a stage from where it stands."""
    if stage.kind == "convert":
        _convert(stage)
    elif stage.kind == "evaluate":
        _evaluate(stage)
    elif stage.kind == "report":
        results = [result for folder in stage.before.values() for result in results_in(folder)]
        write_report(results, stage.folder / "report.html", title=stage.recipe.title)
    else:
        getattr(importlib.import_module(f"zebra.train.{stage.kind}"), stage.kind)(stage.recipe)
        write_report(results_in(stage.folder), stage.folder / "report.html")


def results_in(folder: Path) -> list[Result]:
    """The results that a stage wrote; none where it wrote none."""
    file = folder / "results.jsonl"
    return read_results(file) if file.exists() else []


def _convert(stage: Stage) -> None:
    recipe, target = stage.recipe, stage.checkpoint
    assert stage.source is not None
    assert target is not None
    stripes = recipe.stripes
    if recipe.select is not None:
        selection = select(stage.source, **_select_arguments(recipe), work=stage.folder / "selection", run=stage.name)
        write_results(stage.folder / "results.jsonl", selection.results)
        stripes = selection.stripes
    if not target.exists():  # it may have been killed after this
        convert(stage.source, target, stripes, rope=recipe.rope, full_decode=recipe.full_decode)


def _evaluate(stage: Stage) -> None:
    assert stage.source is not None
    results: list[Result] = []
    for name, arguments in stage.recipe.measures().items():
        file = stage.folder / f"{name}.jsonl"
        if not file.exists():
            write_results(file, _measured(name, arguments, stage.source, run=stage.name))
        results += read_results(file)
    write_results(stage.folder / "results.jsonl", results)


def _measured(name: str, arguments: dict[str, Any], checkpoint: Path, **more: Any) -> list[Result]:
    """The results of a measurement."""
    kwargs = _keywords(name, arguments, _MEASURES[name], LoadOptions)
    results = _MEASURES[name](checkpoint, **kwargs, **more)
    return results[0] if name == "documents" else results


def _select_arguments(recipe: Convert) -> dict[str, Any]:
    assert recipe.select is not None
    return _keywords("select", recipe.select, select) | {"rope": recipe.rope}


def _keywords(name: str, arguments: dict[str, Any], *calls: Callable[..., Any]) -> dict[str, Any]:
    """A section as keyword arguments of functions and dataclasses, all of them, defaults too.

    Raises:
        ZebraError: as `checked`.
    """
    parameters = [p for call in calls for p in inspect.signature(call, eval_str=True).parameters.values()]
    excluded = (*_NOT_KEYS, "rope") if name == "select" else _NOT_KEYS
    kinds: Any = {
        p.name: (_of_yaml(p.annotation), ... if p.default is p.empty else p.default)
        for p in parameters
        if p.kind is not p.VAR_KEYWORD and p.name not in excluded
    }
    return checked(arguments, create_model(name, __base__=RecipeSection, **kinds), f"its {name}").model_dump()


def _of_yaml(kind: Any) -> Any:
    """What YAML can write of an annotation: `torch.dtype | str | None` is `str | None`."""
    if get_origin(kind) is tuple:
        return Sequence[get_args(kind)[0]]  # type: ignore[misc]
    if get_origin(kind) not in (Union, types.UnionType):
        return kind
    plain = [one for one in get_args(kind) if one in (str, int, float, bool, types.NoneType) or get_origin(one) is list]
    return Union[tuple(plain)]  # noqa: UP007


# Checked before the first stage works


def check(stage: Stage, source: Path | None, target: Path) -> None:
    """Check a stage on its checkpoint or a placeholder, and write a placeholder of the checkpoint that it will write.

    Raises:
        ZebraError: what the verb itself rejects before it works; of texts to train on only that they do not exist.
    """
    if stage.kind == "report":
        return
    if stage.kind == "evaluate":
        assert source is not None
        for name, arguments in stage.recipe.measures().items():
            if _has_tokenizer(source):
                _measured(name, arguments, source, check_only=True)
    elif stage.kind == "convert":
        assert source is not None
        _check_conversion(stage.recipe, source, target)
    else:
        _check_training(stage.recipe, source, target)


def _check_conversion(recipe: Convert, source: Path, target: Path) -> None:
    if recipe.select is None:
        stripes = Stripes.parse(recipe.stripes or "")
    elif _has_tokenizer(source):
        stripes = select(source, **_select_arguments(recipe), check_only=True).stripes
    else:
        stripes = Stripes.parse(f"0:{recipe.select.get('window')}")
    _write_placeholder(target, source, *converted_config(source, stripes, recipe.rope, recipe.full_decode))


def _check_training(recipe: Any, source: Path | None, target: Path) -> None:
    files: dict[str, str] = {}
    check_files(recipe)
    if source is None:
        check_machine(recipe.train)
        config = config_of(recipe)
    else:
        recipe = recipe.model_copy(update={"model": str(source)})
        if _has_tokenizer(source):
            config, tokenizer = read_source(recipe)
            files = _check_conversations(recipe, tokenizer) if isinstance(recipe, TuneRecipe) else {}
        else:
            config = adapted_config(recipe, read_config(source))
    dry_run(recipe)
    if isinstance(recipe, CheckpointRecipe) and recipe.lora is not None and not recipe.lora.merge:
        target.mkdir(parents=True)
        (target / "adapter_config.json").touch()  # no whole checkpoint
    else:
        _write_placeholder(target, source, config, local_attention_for(recipe), files)


def _check_conversations(recipe: TuneRecipe, tokenizer: Any) -> dict[str, str]:
    """Read the conversations, and return the template that tuning will write."""
    importlib.import_module("zebra.train.tune")  # it rejects a machine without trl
    chat = Chat(tokenizer, recipe.chat_template, recipe.model)
    data, suites = recipe.data, (recipe.evaluate and recipe.evaluate.suites) or []
    for files in (data.files, *(one.files for one in data.sources or []), *(suite.files for suite in suites)):
        if files:
            read_conversations(files)
    return {"chat_template.jinja": chat.template} if recipe.chat_template else {}


def _has_tokenizer(checkpoint: Path) -> bool:
    """A placeholder of a model that is trained from scratch has neither tokenizer nor weights."""
    return any(checkpoint.glob("tokenizer*"))


def _write_placeholder(
    target: Path, source: Path | None, config: Any, local: LocalAttention, files: dict[str, str] | None = None
) -> None:
    """A directory that reads like a checkpoint: the source's files, linked, but for its config and these files."""
    target.mkdir(parents=True)
    for name, text in (files or {}).items():
        (target / name).write_text(text, encoding="utf-8")
    for file in source.iterdir() if source is not None else ():
        if file.name not in ("config.json", "zebra.json", *(files or {})):
            (target / file.name).symlink_to(file.resolve())
    write_config(config, target)
    write_zebra_json(target, config, local, source=source)
