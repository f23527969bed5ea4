"""Run a pipeline: stages in their order, each once.

    <run>/<stage>/                what the stage wrote: a checkpoint, results.jsonl, report.html
    <run>/<stage>/.inputs.json    its section of the recipe, digests of its checkpoint and of its files

A stage that is done is skipped. A killed stage resumes if its command can. A stage with other inputs is rejected.
"""

from __future__ import annotations

import gc
import importlib
import inspect
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, ConfigDict, create_model

from zebra.data.conversations import read_conversations
from zebra.data.documents import Names, names_of
from zebra.errors import ZebraError
from zebra.evaluate import documents, harness, perplexity, retrieval
from zebra.evaluate.selection import Selection, select
from zebra.files import atomic_write, check_inputs, directory_lock
from zebra.model.checkpoint import checkpoint_digests, read_config, write_config, write_zebra_json
from zebra.model.gguf import as_directory
from zebra.model.load import convert, converted_config
from zebra.model.load_options import LoadOptions
from zebra.model.local import LocalAttention
from zebra.pipeline.recipe import Convert, Stage
from zebra.progress import console
from zebra.report import write_report
from zebra.results import Result, read_results, write_results
from zebra.stripes import Stripes
from zebra.train.chat import Chat
from zebra.train.directory import digests_of_files, flatten
from zebra.train.dry_run import dry_run
from zebra.train.pretrain import config_of
from zebra.train.processes import check_processes
from zebra.train.recipe import CheckpointRecipe, RecipeSection
from zebra.train.recipe_file import check_files, checked
from zebra.train.run_results import local_attention_for
from zebra.train.source import adapted_config, read_source
from zebra.train.trainer import check_machine
from zebra.train.tune_recipe import TuneRecipe

_MEASURES: dict[str, Callable[..., Any]] = {
    "perplexity": perplexity.evaluate_perplexity,
    "retrieval": retrieval.evaluate_retrieval,
    "tasks": harness.evaluate_tasks,
    "documents": documents.evaluate_documents,
}
_RECORD = ".inputs.json"


def plan(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """Check the stages that are not done, and return the state of each stage.

    A stage whose checkpoint does not exist yet is checked on a placeholder: links to the files of the source, with the
    config that the stages before it will write.

    Raises:
        ZebraError: what a command rejects before it works, except training texts that are too short; a stage whose
            inputs changed since it began, or whose source stage is not done.
    """
    placeholders: dict[str | None, Path] = {}
    with TemporaryDirectory() as folder:
        for stage in stages:
            with _naming(stage, folder), warnings.catch_warnings(action="ignore"):
                if stage.after in placeholders and stage.state != "new":
                    raise ZebraError(
                        f"{stage.folder} depends on the stage {stage.after}, which is not done. Rename the folder."
                    )
                if _state(stage) != "done":
                    target = Path(folder, stage.name, stage.checkpoint.name if stage.checkpoint else "")
                    _check(stage, placeholders.get(stage.after, stage.source), target)
                    placeholders[stage.name] = target
    return [_columns(stage, stage.state) for stage in stages]


def run(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """Run the stages that are not done, and return for each its state before, and the seconds that it took.

    Raises:
        ZebraError: what `plan` raises; what a stage raises while it works; another process that works in the folder.
    """
    plan(stages)
    states = []
    with directory_lock(stages[0].folder.parent):
        for i, stage in enumerate(stages):
            with _naming(stage):
                start, state = time.perf_counter(), _state(stage)
                console.print(f"{i + 1} of {len(stages)}, {stage.name}: {state}", soft_wrap=True)
                if state != "done":
                    atomic_write(stage.folder / _RECORD, json.dumps(inputs_of(stage), indent=2) + "\n")
                    _perform(stage, stages[:i])
                    gc.collect()  # the Trainer's reference cycles hold the model, whose memory the next stage needs
            states.append(_columns(stage, state, time.perf_counter() - start))
    return states


def _columns(stage: Stage, state: str, seconds: float | None = None) -> dict[str, Any]:
    """The columns that are printed for a stage."""
    source = stage.after or (stage.source.name if stage.source else "")
    columns = {"stage": stage.name, "kind": stage.kind, "from": source, "state": state}
    return columns | {"seconds": seconds, "folder": str(stage.folder)}


@contextmanager
def _naming(stage: Stage, placeholders: str | None = None) -> Iterator[None]:
    """Within this context errors name the stage, and the checkpoint in place of its placeholder."""
    try:
        yield
    except ZebraError as error:
        text = str(error).replace(f"{placeholders}/", f"{stage.folder.parent}/") if placeholders else str(error)
        raise ZebraError(f"stage {stage.name}: {text}") from None


# What a stage depends on


def _state(stage: Stage) -> str:
    """The state of a stage; raises if its inputs changed since it began."""
    if stage.state != "new":
        record = stage.folder / _RECORD
        if not record.exists():
            raise ZebraError(f"{stage.folder} exists, but {record} is missing. Rename the folder.")
        check_inputs(record, inputs_of(stage), instead="rename that folder")
    return stage.state


def inputs_of(stage: Stage) -> dict[str, Any]:
    """All that a stage's results depend on, as values or digests by name; the pipeline's location is not among them.

    Raises:
        ZebraError: files, or a checkpoint, that do not exist.
    """
    section = stage.recipe.model_dump(mode="json", exclude={"run"} | ({"model"} if stage.source else set()))
    inputs = {"kind": stage.kind} | flatten(section) | {"its files": digests_of_files(section)}
    if stage.source is None:
        return inputs
    if stage.after and not stage.source.exists():  # the pipeline's own model may be a name of the hub
        raise ZebraError(f"the checkpoint {stage.source} is missing. Restore it, or rename the folder of its stage.")
    return inputs | {"its checkpoint": checkpoint_digests(stage.source)}


# What a stage does


def _perform(stage: Stage, before: Sequence[Stage]) -> None:
    """Run a stage; one that was interrupted resumes."""
    recipe, page = stage.recipe, stage.folder / "report.html"
    if stage.kind == "convert" and stage.source and stage.checkpoint:
        stripes = recipe.stripes
        if recipe.select is not None:
            selection = _selected(stage, stage.source, work=stage.folder / "selection", run=stage.name)
            write_results(stage.folder / "results.jsonl", selection.results)
            stripes = selection.stripes
        convert(stage.source, stage.checkpoint, stripes, rope=recipe.rope, full_decode=recipe.full_decode)
    elif stage.kind == "evaluate" and stage.source:
        results: list[Result] = []
        for name in recipe.measures():
            file = stage.folder / f"{name}.jsonl"
            if not file.exists():
                write_results(file, _measured(stage, name, stage.source, run=stage.name))
            results += read_results(file)
        write_results(stage.folder / "results.jsonl", results)
    elif stage.kind == "report":
        write_report([result for other in before for result in results_in(other)], page, title=recipe.title)
    else:
        trust = {} if stage.kind == "pretrain" else {"trust_remote_code": stage.trust_remote_code}
        getattr(importlib.import_module(f"zebra.train.{stage.kind}"), stage.kind)(recipe, **trust)
        write_report(results_in(stage), page)


def results_in(stage: Stage) -> list[Result]:
    """The results that a stage wrote; empty if it wrote none."""
    file = stage.folder / "results.jsonl"
    return read_results(file) if file.exists() else []


def _selected(stage: Stage, source: Path, **more: Any) -> Selection:
    """Select the layout of a conversion."""
    recipe: Convert = stage.recipe
    kwargs = _keyword_arguments("select", recipe.select or {}, select, without=("rope",))
    return select(source, **kwargs, rope=recipe.rope, trust_remote_code=stage.trust_remote_code, **more)


def _measured(stage: Stage, name: str, checkpoint: Path, **more: Any) -> list[Result]:
    """Measure a checkpoint."""
    kwargs = _keyword_arguments(name, stage.recipe.measures()[name], _MEASURES[name], LoadOptions)
    results = _MEASURES[name](checkpoint, **kwargs, trust_remote_code=stage.trust_remote_code, **more)
    return results[0] if name == "documents" else results


def _keyword_arguments(
    name: str, section: dict[str, Any], *functions: Callable[..., Any], without: Sequence[str] = ()
) -> dict[str, Any]:
    """Validate a section as keyword arguments of functions, except those that the pipeline sets.

    Raises:
        ZebraError: what `checked` raises.
    """
    excluded = {"checkpoint", "run", "check_only", "work", "trust_remote_code", *without}
    parameters = [p for function in functions for p in inspect.signature(function, eval_str=True).parameters.values()]
    several, names = Annotated[Any, AfterValidator(names_of)], {*get_args(Names)}  # one name stands for a list of one
    fields: dict[str, Any] = {
        p.name: (
            several if names <= {*get_args(p.annotation)} else p.annotation,
            ... if p.default is p.empty else p.default,
        )
        for p in parameters
        if p.kind is not p.VAR_KEYWORD and p.name not in excluded
    }
    config = RecipeSection.model_config | ConfigDict(arbitrary_types_allowed=True)
    return dict(checked(section, create_model(name, __config__=config, **fields), f"its {name}"))


# Checked before the first stage works


def _check(stage: Stage, source: Path | None, target: Path) -> None:
    """Check a stage on a checkpoint or its placeholder, and write a placeholder for the checkpoint it will write."""
    recipe = stage.recipe
    if stage.kind == "convert" and source is not None:
        if recipe.select is None:
            stripes = Stripes.parse(recipe.stripes)
        elif _has_tokenizer(source):
            stripes = _selected(stage, source, check_only=True).stripes
        else:
            stripes = Stripes.parse(f"0:{recipe.select.get('window')}")
        _write_placeholder(target, source, *converted_config(source, stripes, recipe.rope, recipe.full_decode), {})
    elif stage.kind == "evaluate" and source is not None:
        for name in recipe.measures():
            if _has_tokenizer(source):
                _measured(stage, name, source, check_only=True)
    elif stage.kind != "report":
        _check_training(stage, source, target)


def _check_training(stage: Stage, source: Path | None, target: Path) -> None:
    recipe = stage.recipe
    check_processes(recipe)
    check_files(recipe)
    templates: dict[str, str] = {}
    if source is None:
        check_machine(recipe.train)
        config = config_of(recipe)
    else:
        recipe = recipe.model_copy(update={"model": str(source)})
        if _has_tokenizer(source):
            config, tokenizer = read_source(recipe, stage.trust_remote_code)
            templates = _check_conversations(recipe, tokenizer) if isinstance(recipe, TuneRecipe) else {}
        else:
            config = adapted_config(recipe, read_config(source))
    dry_run(recipe)
    if isinstance(recipe, CheckpointRecipe) and recipe.lora is not None and not recipe.lora.merge:
        target.mkdir(parents=True)
        adapter = {"base_model_name_or_path": str(as_directory(recipe.model).absolute())}  # an adapter is written
        (target / "adapter_config.json").write_text(json.dumps(adapter), encoding="utf-8")
    else:
        _write_placeholder(target, source, config, local_attention_for(recipe), templates)


def _check_conversations(recipe: TuneRecipe, tokenizer: Any) -> dict[str, str]:
    """Read the conversations, and return the template that tuning will write."""
    importlib.import_module("zebra.train.tune")  # raises if trl is not installed
    chat = Chat(tokenizer, recipe.chat_template, recipe.model)
    for files in [source.files for source in recipe.data.by_source] + [suite.files for suite in recipe.suites]:
        read_conversations(files)
    return {"chat_template.jinja": chat.template} if recipe.chat_template else {}


def _has_tokenizer(checkpoint: Path) -> bool:
    """Whether there is a tokenizer; the placeholder of a model to train from scratch has none, and no weights."""
    return any(as_directory(checkpoint).glob("tokenizer*"))


def _write_placeholder(
    target: Path, source: Path | None, config: Any, local: LocalAttention, templates: dict[str, str]
) -> None:
    """Write a directory that reads like a checkpoint: links to the source's files, and its own config and templates."""
    target.mkdir(parents=True)
    for file in as_directory(source).iterdir() if source is not None else ():
        if file.name not in ("config.json", "zebra.json", *templates):
            (target / file.name).symlink_to(file.resolve())
    for name, text in templates.items():
        (target / name).write_text(text, encoding="utf-8")
    write_config(config, target)
    write_zebra_json(target, config, local, source=source)
