"""The verb `evaluate documents`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from zebra.cli import show
from zebra.cli.loading import Beyond, Json, Out, Run, loads_a_checkpoint
from zebra.cli.retrieval import numbers

EXAMPLE = "zebra evaluate documents ./Llama-3.1-8B-GLLL questions.jsonl --length 8192,32768 --items items.jsonl"


@loads_a_checkpoint
def documents(
    checkpoint: Annotated[Path, typer.Argument(help="The checkpoint.")],
    file: Annotated[Path, typer.Argument(help="JSON Lines of document, question and answers, or of document and qa.")],
    score: Annotated[
        str, typer.Option(help="generate, for ROUGE and F1, or likelihood of the reference answers.")
    ] = "generate",
    length: Annotated[
        str | None, typer.Option(help="Tokens of prompt and answer, the model's own otherwise; several with commas.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="The first so many items alone.")] = None,
    answer_tokens: Annotated[int, typer.Option(help="Tokens of an answer, made at most or scored.")] = 128,
    template: Annotated[
        str | None, typer.Option(help="The prompt, with {document} and {question}; a plain one otherwise.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="As a message, in the tokenizer's chat template.")] = False,
    stop: Annotated[list[str] | None, typer.Option(help="End an answer at this string; may be given again.")] = None,
    check_only: Annotated[
        bool, typer.Option("--check-only", help="Look at the data; load no model, measure nothing.")
    ] = False,
    items: Annotated[Path | None, typer.Option(help="Write what came of each item to this JSON Lines file.")] = None,
    beyond: Beyond = False,
    seed: Annotated[int, typer.Option(help="Seed of the intervals' bootstrap.")] = 0,
    run: Run = "evaluate",
    out: Out = None,
    as_json: Json = False,
    **loading: Any,
) -> None:
    """Questions about long documents: ROUGE and F1, or the reference's likelihood, after a look at the data."""
    lengths = [] if length is None else numbers("--length", length, int, "4096,16384")
    with show.quiet_host(), show.warnings_as_notes():
        from zebra.evaluate.documents import Options, evaluate_documents
        from zebra.evaluate.prompts import TEMPLATE

        rows, outcomes = evaluate_documents(
            checkpoint,
            file,
            lengths=lengths,
            limit=limit,
            beyond=beyond,
            check_only=check_only,
            seed=seed,
            run=run,
            options=Options(score, answer_tokens, template or TEMPLATE, chat, tuple(stop or ())),
            **loading,
        )
    if items is not None:
        from dataclasses import asdict

        from zebra.files import atomic_write
        from zebra.results import to_json

        atomic_write(items, "".join(to_json(asdict(outcome)) + "\n" for outcome in outcomes))
    show.rows(rows, as_json, out)
