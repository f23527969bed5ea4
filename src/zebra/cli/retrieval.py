"""The verb `evaluate retrieval`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from zebra.cli import show
from zebra.cli.loading import loads_a_checkpoint
from zebra.errors import ZebraError

EXAMPLE = "zebra evaluate retrieval ./Llama-3.1-8B-GLLL --task passkey,lookup --length 4096,16384 --depth 0,0.5,1"
Number = TypeVar("Number", int, float)


@loads_a_checkpoint
def retrieval(
    checkpoint: Annotated[Path, typer.Argument(help="The checkpoint.")],
    task: Annotated[
        str,
        typer.Option(
            help="passkey, needle, multikey, multivalue, multiquery, lookup, variables, common-words, frequent-words; "
            "several with commas."
        ),
    ],
    length: Annotated[str, typer.Option(help="Tokens of each prompt; several with commas.")],
    depth: Annotated[
        str, typer.Option(help="Where the evidence stands, 0 at the beginning, 1 at the end; several with commas.")
    ] = "0,0.25,0.5,0.75,1",
    samples: Annotated[int, typer.Option(help="Samples of each task, length and depth.")] = 20,
    score: Annotated[
        str, typer.Option(help="generate, or likelihood for models that cannot follow a question.")
    ] = "generate",
    haystack: Annotated[
        list[str] | None, typer.Option(help="A file, folder or glob of text to hide things in; may be given again.")
    ] = None,
    beyond: Annotated[
        bool, typer.Option("--beyond", help="Also at lengths that the model was not trained for.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    run: Annotated[str, typer.Option(help="The run's name in the rows.")] = "evaluate",
    out: Annotated[Path | None, typer.Option(help="Append the rows to this JSON Lines file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    **loading: Any,
) -> None:
    """Does a model find what stands in a long text? Accuracy by length and depth, with 95 % intervals."""
    tasks = [name.strip() for name in task.split(",")]
    lengths, depths = numbers("--length", length, int, "1024,4096"), numbers("--depth", depth, float, "0,0.5,1")
    with show.quiet_host(), show.warnings_as_notes():
        from zebra.evaluate.retrieval import evaluate_retrieval

        rows = evaluate_retrieval(
            checkpoint,
            tasks=tasks,
            lengths=lengths,
            depths=depths,
            samples=samples,
            score=score,
            haystack=haystack or (),
            beyond=beyond,
            seed=seed,
            run=run,
            **loading,
        )
    show.rows(rows, as_json, out)


def numbers(option: str, text: str, kind: Callable[[str], Number], example: str) -> list[Number]:
    """Numbers of an option, with commas between them."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ZebraError(f"{option} takes numbers, several with commas; got {text!r}. Write {example}.") from None
