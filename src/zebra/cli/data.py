"""The commands of `zebra data`, which make and check training data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from zebra.cli import show
from zebra.cli.options import Json, Seed, Separator, call_arguments, names, numbers, output_file
from zebra.errors import ZebraError


def instructions(
    documents: Annotated[list[str], typer.Argument(help="Text files, or JSON Lines with document, qa and summary.")],
    out: Annotated[Path, typer.Option("--out", "-o", callback=output_file, help="JSON Lines file to write.")],
    kinds: Annotated[
        str,
        typer.Option("--kind", callback=names, help="Kinds of instructions, comma-separated: qa, summary, writing."),
    ] = "qa,summary,writing",
    words: Annotated[
        int | None,
        typer.Option(help="Fill each prompt with other documents to this many words. Default: no."),
    ] = None,
    depths: Annotated[
        str,
        typer.Option(
            "--depth",
            callback=numbers("--depth", float, "0,0.5,1", least=0, most=1),
            help="Depths of the document in question, 0 (start) to 1 (end), used in turn.",
        ),
    ] = "0,0.5,1",
    writing: Annotated[int, typer.Option(min=0, metavar="INT", help="Writing tasks per document.")] = 3,
    separator: Separator = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Make long instructions from long documents: questions, summaries, writing. No network, no model."""
    options = call_arguments(locals(), "out")
    from zebra.data.instructions import instruction_stats, make_instructions, read_annotated
    from zebra.files import atomic_file
    from zebra.results import to_json

    documents_read = read_annotated(options.pop("documents"), separator=options.pop("separator", None))
    with atomic_file(out) as partial, partial.open("w", encoding="utf-8") as file:

        def written() -> Iterator[dict[str, Any]]:
            for example in make_instructions(documents_read, **options):
                file.write(to_json(example) + "\n")
                yield example

        stats = instruction_stats(written())
        if not stats:
            raise ZebraError(
                f"no instructions of the kinds {', '.join(options['kinds'])} can be made from these documents: they "
                "have no questions, no summaries, or no two passages of sentences. Use other documents or kinds."
            )
    show.instructions(stats, as_json)
    show.note(f"{sum(kind.instructions for kind in stats):,} instructions in {out}")


def check(
    conversations: Annotated[list[str], typer.Argument(help="JSON Lines files of conversations.")],
    against: Annotated[
        list[str] | None, typer.Option(help="Conversations of the evaluation, to find leaks; repeatable.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Find bad training conversations: empty or copied answers, encoding, language, duplicates, leaks."""
    from zebra.data.conversations import read_conversations
    from zebra.data.quality import evaluation_text, faults, ngrams

    read = read_conversations(conversations)
    evaluated = ngrams(evaluation_text(one) for one in read_conversations(against)) if against else frozenset()
    show.faults([(fault, read[i].where) for i, fault in faults(read, evaluated).items()], len(read), as_json)
