"""The commands that read a recipe: `adapt`, `tune`, `pretrain`; `study`, many trainings; `run`, several commands."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from zebra.cli import show
from zebra.cli.options import Json, RecipeFile, Set, TrustRemoteCode
from zebra.errors import ZebraError
from zebra.model.checkpoint_files import check_checkpoint

_DryRun = Annotated[bool, typer.Option("--dry-run", help="Print shapes, tokens, steps and memory; do not train.")]


def adapt(
    recipe: RecipeFile,
    set_: Set = None,
    dry_run: _DryRun = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Adapt a checkpoint to a longer context (LCAT), evaluate it before and after, and write a report."""
    _train("adapt", recipe, set_, dry_run, as_json, trust_remote_code=trust_remote_code)


def tune(
    recipe: RecipeFile,
    set_: Set = None,
    dry_run: _DryRun = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Tune a checkpoint on short and long instructions (LIT), evaluate it before and after, and write a report."""
    _train("tune", recipe, set_, dry_run, as_json, trust_remote_code=trust_remote_code)


def pretrain(recipe: RecipeFile, set_: Set = None, dry_run: _DryRun = False, as_json: Json = False) -> None:
    """Train a model from scratch, with its tokenizer if the recipe says so, evaluate it and write a report."""
    _train("pretrain", recipe, set_, dry_run, as_json)


@contextmanager
def _naming_the_command(command: str, file: Path, overrides: list[str] | None) -> Iterator[None]:
    """The error of a recipe that is another command's names that command."""
    try:
        yield
    except ZebraError:
        from zebra.pipeline.recipe import Pipeline
        from zebra.study.recipe import StudyRecipe
        from zebra.train.recipe_file import read_recipe

        kinds = {**_training_recipes(), "study": StudyRecipe, "run": Pipeline}
        fitting = []
        for other, kind in kinds.items():
            with suppress(ZebraError):
                read_recipe(file, kind, overrides or ())
                fitting.append(other)
        if not fitting or command in fitting:
            raise
        raise ZebraError(f"{file} is a recipe of `zebra {fitting[0]}`. Use this command.") from None


def _training_recipes() -> dict[str, Any]:
    """The class of the recipe of each command that trains one model."""
    from zebra.train.recipe import AdaptRecipe, PretrainRecipe
    from zebra.train.tune_recipe import TuneRecipe

    return {"adapt": AdaptRecipe, "tune": TuneRecipe, "pretrain": PretrainRecipe}


def _train(
    command: str, file: Path, overrides: list[str] | None, dry_run: bool, as_json: bool, **options: bool
) -> None:
    """Estimate a recipe's cost, or train by it, write its page and print its results."""
    from zebra.train.recipe import CheckpointRecipe
    from zebra.train.recipe_file import check_files, read_recipe

    with _naming_the_command(command, file, overrides):
        recipe = read_recipe(file, _training_recipes()[command], overrides or ())
    page = Path(recipe.run) / "report.html"
    if not dry_run and not page.with_name("results.jsonl").exists():  # a finished run needs no texts
        if isinstance(recipe, CheckpointRecipe):
            check_checkpoint(recipe.model)
        check_files(recipe)
    with show.working():
        if dry_run:
            from zebra.train import dry_run as estimate

            show.dry_run(estimate.dry_run(recipe), as_json)
            return
        getattr(importlib.import_module(f"zebra.train.{command}"), command)(recipe, **options)
        from zebra.report import write_report
        from zebra.results import read_results
        from zebra.train.processes import is_first_process

        if not is_first_process():
            return
        results = read_results(page.with_name("results.jsonl"))
        write_report(results, page)
    show.results(results, as_json)
    show.note(f"checkpoint {recipe.run}/model, results {recipe.run}/results.jsonl, report {page}")


def study(
    recipe: Annotated[Path, typer.Argument(help="YAML grid; see recipes/study-*.yaml.")],
    set_: Set = None,
    workers: Annotated[
        int,
        typer.Option(min=1, metavar="INT", help="Cells to train at a time: one per GPU, or sharing the cores."),
    ] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the cells and which are done; do not train.")
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="With --dry-run: estimate the hours on a device of `zebra plan`."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train and evaluate a grid of models from scratch: attention × positions × length; resumable."""
    from zebra.plan.devices import find_device
    from zebra.study.recipe import StudyRecipe
    from zebra.train.recipe_file import read_recipe

    if device is not None and not dry_run:
        raise ZebraError(
            f"--device requires --dry-run, as training uses this machine; got {device}. Add --dry-run, or leave it out."
        )
    with _naming_the_command("study", recipe, set_):
        grid = read_recipe(recipe, StudyRecipe, set_ or [])
    with show.working():
        from zebra.study.grid import estimate
        from zebra.study.grid import study as run

        if dry_run:
            show.cells(estimate(grid, None if device is None else find_device(device)), as_json)
            return
        results = run(grid, workers)
    from zebra.report import write_report
    from zebra.study.page import chapters

    page = Path(grid.run) / "report.html"
    write_report(results, page, chapters=chapters(results))
    show.results(results, as_json)
    show.note(f"results {grid.run}/results.jsonl, report {page}, cells {grid.run}/cells/")


def run(
    recipe: Annotated[Path, typer.Argument(help="YAML pipeline; see examples/pipeline-tiny.yaml.")],
    set_: Set = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all stages and print their states; run nothing.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Run a pipeline, such as convert, adapt, tune, evaluate and report; finished stages are skipped."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from zebra.pipeline.recipe import read_pipeline

    with _naming_the_command("run", recipe, set_):
        stages = read_pipeline(recipe, set_ or [], trust_remote_code=trust_remote_code)
    with show.working():
        from zebra.pipeline import run as pipeline

        states = pipeline.plan(stages) if dry_run else pipeline.run(stages)
    results = [] if dry_run else [result for stage in stages for result in pipeline.results_in(stage)]
    show.stages(states, results, as_json)
