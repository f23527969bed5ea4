"""The verb `run`: several verbs in a row, as one recipe."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from zebra.cli import show
from zebra.cli.loading import Json

EXAMPLE = "zebra run examples/pipeline-tiny.yaml --dry-run"


def run(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe of stages; see examples/pipeline-tiny.yaml.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key: stages.adapt.train.max_steps=100.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be done, and what it costs; do nothing.")
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(help="Of the predicted time: as `plan` has it, h200 or a JSON file; this machine otherwise."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Convert, adapt, tune, evaluate and report by one recipe; what is done already is not done again."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    with show.quiet_host(), show.warnings_as_notes():
        from zebra.pipeline.recipe import read_pipeline
        from zebra.pipeline.run import plan
        from zebra.pipeline.run import run as go
        from zebra.pipeline.stages import rows_in

        stages = read_pipeline(recipe, set_ or [])
        if dry_run:
            from zebra.measure import measure_ceilings
            from zebra.model.load import best_device
            from zebra.plan.devices import find

            planned = plan(stages)
            here = best_device()
            small = None if here != "cpu" else 1024
            show.planned(planned, find(device) if device else measure_ceilings(here, size=small), as_json)
            return
        done = go(stages)
    rows = [row for stage in stages for row in rows_in(stage.folder)]
    show.done(done, rows, as_json)
