"""The verb `zebra bench`: a command for each subject, its options the subject's sizes."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from zebra.bench.subjects import SUBJECTS, Ceilings, Paired, Sizes
from zebra.cli import show
from zebra.errors import ZebraError

app = typer.Typer(help="Measure time and memory beside the plan.", no_args_is_help=True)

_EXAMPLES = {
    "attention": "--length 16384 --window 512",
    "train-step": "--length 2048 --dtype bfloat16",
    "decode": "--length 32768 --out results.jsonl",
    "ceilings": "--out machine.json",
}


def _command(subject: type[Sizes]) -> Callable[..., None]:
    """A function with the subject's sizes as its options."""
    writes = "Write the file of ceilings here." if subject is Ceilings else "Append the rows to this JSON Lines file."
    options: dict[str, tuple[Any, Any, str, list[str]]] = {
        one.name: (kind, one.default, one.metadata["help"], [f"--{one.name.replace('_', '-')}"] if kind is bool else [])
        for one in fields(subject)
        for kind in [get_type_hints(subject)[one.name]]
    }
    if "memory" in options:
        options["memory"] = (*options["memory"][:3], ["--memory/--no-memory"])
    options["out"] = (Path | None, None, writes, [])
    options["as_json"] = (bool, False, "One JSON document on stdout.", ["--json"])

    def run(**chosen: Any) -> None:
        out, as_json = chosen.pop("out"), chosen.pop("as_json")
        _measure(subject(**chosen), out, as_json)

    # typer reads a function's signature; this one is made of the data.
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=default,
                annotation=Annotated[kind, typer.Option(*flags, help=text)],
            )
            for name, (kind, default, text, flags) in options.items()
        ]
    )
    run.__annotations__ = {name: one.annotation for name, one in inspect.signature(run).parameters.items()}
    run.__doc__ = subject.about
    return run


def _measure(sizes: Sizes, out: Path | None, as_json: bool) -> None:
    left_out: tuple[str, ...] = ()
    if out is not None and (out.is_dir() or (out.parent.is_dir() and not os.access(out.parent, os.W_OK))):
        raise ZebraError(f"--out is a file in a folder that can be written; got {out}. Name another.")
    if isinstance(sizes, Ceilings):
        from zebra.bench import ceilings

        found, rows = ceilings.bench(sizes)
        if out is not None:
            ceilings.write(out, found)
    else:
        from zebra.bench.pairing import bench
        from zebra.results import append_results

        assert isinstance(sizes, Paired)
        try:
            rows, left_out = bench(sizes)
        except RuntimeError as error:  # torch has no class of its own for a CPU without memory
            if "allocate memory" not in str(error) and "out of memory" not in str(error):
                raise
            raise ZebraError(f"there is too little memory: {str(error).splitlines()[0]} Give smaller sizes.") from None
        if out is not None:
            append_results(out, rows)
    show.rows(rows, as_json)
    for line in left_out:
        show.note(f"left out: {line}")


for _name, _subject in SUBJECTS.items():
    app.command(_name, epilog=f"zebra bench {_name} {_EXAMPLES.get(_name, '')}".strip())(_command(_subject))
