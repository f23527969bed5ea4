"""The command `compare`: ways to read long texts, side by side on the user's own text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zebra.cli import options, show


def compare(
    checkpoint: options.Checkpoint,
    text: Annotated[list[str], typer.Argument(help="Your text: files, folders or globs, at least --length tokens.")],
    length: Annotated[int, typer.Option(min=2, help="Context length that you need, in tokens.")],
    stripes: Annotated[
        str | None,
        typer.Option(
            callback=options.stripes_notation,
            help="Layout of the methods with stripes. Default: GL with a window of an eighth of the trained length "
            "and 4 attention sinks.",
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            callback=options.names,
            help="Methods, comma-separated: unchanged, linear, yarn, dynamic, self-extend, stripes, selected, "
            "stripes+self-extend, selected+self-extend. Default: all.",
        ),
    ] = None,
    additional: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            metavar="OPTIONS",
            help='Another method, such as "rope=yarn:4 stripes=GLLL:1024" or "checkpoint=runs/adapted/model"; '
            "repeatable.",
        ),
    ] = None,
    tasks: Annotated[
        str, typer.Option("--task", callback=options.names, help="Retrieval tasks, comma-separated.")
    ] = "passkey,needle",
    depths: Annotated[
        str,
        typer.Option(
            "--depth",
            callback=options.numbers("--depth", float, "0.1,0.9", least=0, most=1),
            help="Depths of the evidence, comma-separated, 0 (start) to 1 (end).",
        ),
    ] = "0.1,0.5,0.9",
    windows: Annotated[int, typer.Option(min=1, help="Maximum number of windows of the text.")] = 16,
    samples: Annotated[int, typer.Option(min=1, help="Maximum number of samples per task and depth.")] = 10,
    budget_minutes: Annotated[
        float, typer.Option(min=0, help="Time for all measurements; a rerun with more minutes adds to them.")
    ] = 30.0,
    separator: options.Separator = None,
    field: options.Field = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    seed: options.Seed = 0,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", callback=options.output_folder, help="Folder for measurements, results, report."),
    ] = Path("runs/compare"),
    as_json: options.Json = False,
) -> None:
    """Compare ways to read a long text on your own text: quality, cost, and one sentence of advice."""
    from zebra.compare.methods import Method
    from zebra.data.documents import check_texts
    from zebra.model.checkpoint_files import check_checkpoint

    arguments = options.call_arguments(locals(), "Method", "check_texts", "check_checkpoint", "out", "additional")
    check_checkpoint(checkpoint)
    check_texts(text, separator=separator, field=field)
    more = [Method.parse(notation) for notation in additional or ()]
    with show.working():
        from zebra.compare.run import compare as measure_methods

        results = measure_methods(out=out, additional=more, **arguments)
    show.comparison(results, out, as_json)
