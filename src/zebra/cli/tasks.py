"""The verb `evaluate tasks`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from zebra.cli import show
from zebra.cli.loading import Beyond, Json, Out, Run, loads_a_checkpoint
from zebra.cli.retrieval import numbers

EXAMPLE = "zebra evaluate tasks ./Llama-3.1-8B-GLLL --tasks hellaswag,zebra-lookup --length 4096,16384 --limit 100"


@loads_a_checkpoint
def tasks(
    checkpoint: Annotated[Path, typer.Argument(help="The checkpoint.")],
    names: Annotated[
        str,
        typer.Option(
            "--tasks",
            help="Tasks of lm-eval (hellaswag, mmlu, ...), YAML files, or zebra-TASK and zebra-TASK-likelihood for a "
            "TASK of `evaluate retrieval`; several with commas.",
        ),
    ],
    length: Annotated[
        str | None, typer.Option(help="Tokens of the texts, for tasks that make them; several with commas.")
    ] = None,
    shots: Annotated[int | None, typer.Option(help="Examples before each question; the task's own otherwise.")] = None,
    limit: Annotated[int | None, typer.Option(help="The first so many items of each task alone.")] = None,
    batch_size: Annotated[int, typer.Option(help="Requests that are run at once.")] = 8,
    chat: Annotated[bool, typer.Option("--chat", help="In the tokenizer's chat template.")] = False,
    include: Annotated[Path | None, typer.Option(help="A folder with YAML tasks of your own.")] = None,
    cut: Annotated[bool, typer.Option("--cut", help="Cut the beginnings of requests too long for the model.")] = False,
    beyond: Beyond = False,
    seed: Annotated[int, typer.Option(help="Seed of our samples, and of the examples.")] = 0,
    run: Run = "evaluate",
    out: Out = None,
    as_json: Json = False,
    **loading: Any,
) -> None:
    """Tasks of the lm-evaluation-harness, with data that is on this machine; nothing is downloaded."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"  # bars of the harness and of datasets
    lengths = [] if length is None else numbers("--length", length, int, "4096,16384")
    with show.quiet_host(), show.warnings_as_notes():
        from zebra.evaluate.harness import evaluate_tasks

        rows = evaluate_tasks(
            checkpoint,
            tasks=[name.strip() for name in names.split(",")],
            lengths=lengths,
            shots=shots,
            limit=limit,
            batch_size=batch_size,
            chat=chat,
            include=include,
            cut=cut,
            beyond=beyond,
            seed=seed,
            run=run,
            **loading,
        )
    show.rows(rows, as_json, out)
