"""`zebra study`: a grid of trainings from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zebra.cli import show
from zebra.cli.options import Json, Set


def study(
    recipe: Annotated[Path, typer.Argument(help="YAML grid; see recipes/study-*.yaml.")],
    set_: Set = None,
    workers: Annotated[int, typer.Option(help="Cells to train at a time, one for each GPU, or sharing the cores.")] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the cells and which are done; train nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a grid of models from scratch, attention × positions × length, and measure each; resumable."""
    from zebra.study.recipe import StudyRecipe
    from zebra.train.recipe import read_recipe

    grid = read_recipe(recipe, StudyRecipe, set_ or [])
    with show.working():
        from zebra.study.grid import estimate
        from zebra.study.grid import study as run

        if dry_run:
            show.cells(estimate(grid), as_json)
            return
        rows = run(grid, workers)
    from zebra.report import write_report
    from zebra.study.page import chapters

    page = Path(grid.run) / "report.html"
    write_report(rows, page, chapters=chapters(rows))
    show.results(rows, as_json)
    show.note(f"results {grid.run}/results.jsonl, report {page}, cells {grid.run}/cells/")
