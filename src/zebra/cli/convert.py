"""The verb `convert`: to a layout that is given, or to one that is measured."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from zebra.cli import show
from zebra.errors import ZebraError
from zebra.model.checkpoint_files import check_conversion

EXAMPLE = (
    "zebra convert ./Llama-3.1-8B ./Llama-3.1-8B-GLLL --stripes GLLL:4096\n\n"
    "zebra convert ./Llama-3.1-8B ./Llama-3.1-8B-half --select 0.5 --window 4096 --length 32768 --text book.txt"
)


def convert(
    source: Annotated[Path, typer.Argument(help="The checkpoint to convert, a directory.")],
    target: Annotated[Path, typer.Argument(help="The directory to make.")],
    stripes: Annotated[
        str | None, typer.Option(help="The layout: PATTERN:WINDOW or LAYERS:WINDOW; +4 behind it for 4 sinks.")
    ] = None,
    rope: Annotated[
        str | None, typer.Option(help="A change of the rope: linear:8, yarn:8, llama3:8, base:5000000.")
    ] = None,
    full_decode: Annotated[
        bool, typer.Option("--full-decode", help="Local layers keep all keys, and decoded tokens see them.")
    ] = False,
    select: Annotated[
        str | None,
        typer.Option(
            help="Measure which layers stay global, instead of --stripes, and how many: 8, 0.25, flops:0.5, "
            "cache:4GiB@131072."
        ),
    ] = None,
    window: Annotated[
        str | None, typer.Option(help="Of the layers that become local, under --select; 512+4 with 4 sinks.")
    ] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of each row that is measured.")] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="A file, folder or glob of text to measure on; may be given again.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Retrieval tasks to measure on, several with commas; --text is their haystack.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Rows to measure; one in four is held out.")] = 16,
    order: Annotated[str, typer.Option(help="greedy, or once: by the first round alone.")] = "greedy",
    separator: Annotated[str | None, typer.Option(help="Splits a file of text into documents.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the measuring: float32, bfloat16, ...")] = None,
    device: Annotated[str | None, typer.Option(help="Where to measure; a GPU where there is one.")] = None,
    seed: Annotated[int, typer.Option(help="Of the tasks' samples, and of what is held out.")] = 0,
    work: Annotated[
        Path | None, typer.Option(help="Folder for rows, page and what is measured; TARGET-selection otherwise.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Make a copy of a checkpoint with stripes, which plain transformers loads."""
    if (stripes is None) == (select is None):
        raise ZebraError(
            f"a conversion takes either --stripes or --select; got {'neither' if stripes is None else 'both'}. "
            "Write --stripes GLLL:512, or --select 0.25 --window 512 --length 4096 --text book.txt."
        )
    own = {"--window": window, "--length": length, "--text": text, "--task": task, "--work": work}
    if stripes is not None and (foreign := [option for option, value in own.items() if value is not None]):
        raise ZebraError(
            f"{' and '.join(foreign)} belong to --select, and --stripes {stripes} says all. Leave them out."
        )
    check_conversion(source, target, stripes, rope)
    with show.quiet_host():
        from zebra.model.checkpoint import read_config, read_local_attention
        from zebra.model.load import convert as run
        from zebra.model.local import layout_name

        rows: list[Any] = []
        if select is not None:
            if window is None or length is None:
                raise ZebraError("--select needs --window and --length. Write for example --window 512 --length 4096.")
            place = target if target.name else Path(os.path.abspath(target))  # `.` has no name of its own
            where = work or place.with_name(f"{place.name}-selection")
            stripes, rows = _selected(
                where,
                checkpoint=source,
                budget=select,
                window=window,
                length=length,
                text=text or (),
                tasks=[name.strip() for name in task.split(",")] if task else (),
                samples=samples,
                order=order,
                separator=separator,
                rope=rope,
                dtype=dtype,
                device=device,
                seed=seed,
            )
        assert stripes is not None
        run(source, target, stripes, rope=rope, full_decode=full_decode)
        config = read_config(target)
        named = layout_name(config, read_local_attention(target))
    kinds = "".join("G" if kind == "full_attention" else "L" for kind in config.layer_types)
    if as_json:
        made = {"target": str(target), "class": config.architectures[0], "layout": named, "layers": kinds}
        show.json(made | {"results": [row.columns() for row in rows]})
        return
    if rows:
        show.rows(rows, as_json)
    print(f"{target}: {config.architectures[0]}, {named}, layers {kinds}")


def _selected(work: Path, **given: Any) -> tuple[str, list[Any]]:
    """The layout and the rows; rows and page stand in the folder."""
    from zebra.evaluate.selection import select
    from zebra.report import write_report
    from zebra.report.selection import better
    from zebra.results import read_results

    found = select(**given, work=work, run=str(work))
    write_report(read_results(work / "results.jsonl"), work / "report.html")
    for line in better(found.rows):
        show.note(line)
    show.note(f"rows {work}/results.jsonl, page {work}/report.html")
    return str(found.stripes), found.rows
