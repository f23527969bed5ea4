"""The verb `data`: what is made of data before training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zebra.cli import show
from zebra.errors import ZebraError

app = typer.Typer(help="Make training data.", no_args_is_help=True)


@app.command(epilog="zebra data instructions squality.jsonl books/ --kind qa,writing --words 8000 -o long.jsonl")
def instructions(
    documents: Annotated[list[str], typer.Argument(help="Text files, or JSON Lines with document, qa, summary.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The JSON Lines file to write.")],
    kind: Annotated[str, typer.Option(help="qa, summary, writing; several with commas.")] = "qa,summary,writing",
    words: Annotated[int | None, typer.Option(help="Fill each prompt with other documents to so many words.")] = None,
    depth: Annotated[str, typer.Option(help="Where the document asked about begins, 0 to 1; in turn.")] = "0,0.5,1",
    writing: Annotated[int, typer.Option(min=0, help="Writing tasks of each document.")] = 3,
    separator: Annotated[str | None, typer.Option(help="Splits a text file into documents.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of what is drawn.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Turn long documents into long instructions: questions, summaries, writing. No network, no model."""
    from zebra.data.instructions import InstructionOptions, instruction_stats, make_instructions, read_annotated, write

    try:
        depths = tuple(float(part) for part in depth.split(","))
    except ValueError:
        raise ZebraError(f"--depth takes numbers, several with commas; got {depth!r}. Write 0,0.5,1.") from None
    kinds = tuple(part.strip() for part in kind.split(","))
    order = InstructionOptions(kinds=kinds, words=words, depths=depths, writing=writing, seed=seed)
    made = list(make_instructions(read_annotated(documents, separator=separator), order))
    if not made:
        raise ZebraError(
            f"these documents have nothing for {', '.join(kinds)}: no questions, no summaries, or no two passages of "
            "sentences to write. Give others, or other kinds."
        )
    write(made, out)
    show.instructions(instruction_stats(made), as_json)
    show.note(f"{len(made):,} instructions in {out}")


@app.command(epilog="zebra data check long.jsonl short.jsonl --against evaluation.jsonl")
def check(
    conversations: Annotated[list[str], typer.Argument(help="JSON Lines of conversations.")],
    against: Annotated[
        list[str] | None, typer.Option(help="Conversations that are measured on; may be given again.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Find what should not be trained on: empty and copied answers, encoding, language, duplicates, leaks."""
    from zebra.data.conversations import read_conversations
    from zebra.data.quality import evaluation_text, faults, ngrams

    read = read_conversations(conversations)
    measured = ngrams(evaluation_text(one) for one in read_conversations(against)) if against else frozenset()
    found = [(fault.name, read[fault.at].where) for fault in faults(read, measured)]
    show.faults(found, len(read), as_json)
