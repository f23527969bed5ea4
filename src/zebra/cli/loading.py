"""Options of the verbs that load a checkpoint and measure it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Stripes = Annotated[str | None, typer.Option(help="Measure with this layout.")]
Rope = Annotated[str | None, typer.Option(help="A change of the rope: linear:8, yarn:8, llama3:8, base:5000000.")]
SelfExtend = Annotated[
    str | None, typer.Option(help="Read beyond the trained length: GROUP:WINDOW such as 8:1024, or auto:TARGET.")
]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, ...; the checkpoint's own otherwise.")]
Device = Annotated[str | None, typer.Option(help="Where to run; a GPU where there is one.")]
Beyond = Annotated[bool, typer.Option("--beyond", help="Also at lengths that the model was not trained for.")]
Run = Annotated[str, typer.Option(help="The run's name in the rows.")]
Out = Annotated[Path | None, typer.Option(help="Append the rows to this JSON Lines file.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
