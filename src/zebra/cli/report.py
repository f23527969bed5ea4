"""The commands `report`, which turns results into a page, and `doctor`, which shows what this machine has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zebra.cli import show
from zebra.cli.options import Json, output_file
from zebra.errors import ZebraError


def report(
    sources: Annotated[list[Path], typer.Argument(help="Run directories or results files.")],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", callback=output_file, help="HTML file to write; Markdown goes next to it."),
    ] = Path("report.html"),
    title: Annotated[str | None, typer.Option(help="Title. Default: made from the runs.")] = None,
) -> None:
    """Write results as an HTML report, several runs side by side."""
    from zebra.report import merge_sources, write_report
    from zebra.results import read_results
    from zebra.study.page import chapters

    files = {str(source): source / "results.jsonl" if source.is_dir() else source for source in sources}
    results = merge_sources({name: read_results(file) for name, file in files.items()})
    write_report(results, out, title=title, chapters=chapters(results))
    show.line(f"{out}: {len(results)} results")


def doctor(
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure FLOP/s, bandwidth and one local layer, in about ten seconds.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="With --measure: the device. Default: a GPU if there is one.")
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(min=1, metavar="INT", help="With --measure: matrix size. Default: 2048 on a CPU, else 8192."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            callback=output_file,
            help="With --measure: JSON file of the peaks, for `plan --device`.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show versions, devices, and which attention kernel runs when; or measure the machine."""
    from zebra.doctor import kernels, machine

    if not measure:
        if (device, size, out) != (None, None, None):
            raise ZebraError("--device, --size and --out require --measure. Add it, or leave them out.")
        show.machine(machine(), kernels(), as_json)
        return
    from zebra import measure as measuring

    ceilings, results = measuring.measure(device, size=size)
    try:
        if out is not None:
            measuring.write_ceilings(out, ceilings)
    finally:
        show.results(results, as_json)
