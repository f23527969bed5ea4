"""The verbs that train by a recipe: each reads its own kind of recipe, and trains by its own function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from zebra.cli import show
from zebra.cli.loading import Json

if TYPE_CHECKING:
    from zebra.results import Result
    from zebra.train.recipe import AdaptRecipe, PretrainRecipe
    from zebra.train.tune_recipe import TuneRecipe

    R = TypeVar("R", AdaptRecipe, TuneRecipe, PretrainRecipe)

_Recipe = Annotated[Path, typer.Argument(help="A YAML recipe; see recipes/.")]
_Set = Annotated[list[str] | None, typer.Option("--set", help="Override a key: train.max_steps=100.")]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Print shapes, tokens, steps and memory; train nothing.")]


def adapt(recipe: _Recipe, set_: _Set = None, dry_run: _DryRun = False, as_json: Json = False) -> None:
    """Adapt a checkpoint to a longer context (LCAT), measure it before and after, and write a report."""
    from zebra.train.recipe import AdaptRecipe

    def run(read: AdaptRecipe) -> list[Result]:
        from zebra.train.adapt import adapt

        return adapt(read)

    _train(run, AdaptRecipe, recipe, set_, dry_run, as_json)


def tune(recipe: _Recipe, set_: _Set = None, dry_run: _DryRun = False, as_json: Json = False) -> None:
    """Tune a checkpoint on short and long instructions (LIT), measure it before and after, and write a report."""
    from zebra.train.tune_recipe import TuneRecipe

    def run(read: TuneRecipe) -> list[Result]:
        from zebra.train.tune import tune

        return tune(read)

    _train(run, TuneRecipe, recipe, set_, dry_run, as_json)


def pretrain(recipe: _Recipe, set_: _Set = None, dry_run: _DryRun = False, as_json: Json = False) -> None:
    """Train a model from scratch, and its tokenizer where none is given; measure it and write a report."""
    from zebra.train.recipe import PretrainRecipe

    def run(read: PretrainRecipe) -> list[Result]:
        from zebra.train.pretrain import pretrain

        return pretrain(read)

    _train(run, PretrainRecipe, recipe, set_, dry_run, as_json)


EXAMPLES: dict[Callable[..., None], str] = {
    adapt: "zebra adapt recipes/demo.yaml --set train.max_steps=100",
    tune: "zebra tune recipes/tiny-lit-cpu.yaml --set train.max_steps=100",
    pretrain: "zebra pretrain recipes/retrieval-cpu.yaml --set train.max_steps=100",
}


def _train(
    run: Callable[[R], list[Result]],
    kind: type[R],
    recipe: Path,
    overrides: list[str] | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Read a recipe and reckon it, or run it: then its page, and its rows; one process of several speaks."""
    from zebra.train.recipe import read_recipe

    read = read_recipe(recipe, kind, overrides or [])
    with show.quiet_host():
        if dry_run:
            from zebra.train.dry_run import dry_run as reckon

            show.dry_run(reckon(read), as_json)
            return
        run(read)
    from zebra.report import write_report
    from zebra.results import read_results
    from zebra.train.directory import is_first_process

    if is_first_process():
        page = Path(read.run) / "report.html"
        rows = read_results(page.with_name("results.jsonl"))  # each with its line there
        write_report(rows, page)
        show.rows(rows, as_json)
        show.note(f"checkpoint {read.run}/model, rows {read.run}/results.jsonl, report {page}")
