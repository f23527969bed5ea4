"""The options of the verbs that load a checkpoint, in one place: those of `zebra.model.load_options.LoadOptions`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

Beyond = Annotated[bool, typer.Option("--beyond", help="Also at lengths that the model was not trained for.")]
Run = Annotated[str, typer.Option(help="The run's name in the rows.")]
Out = Annotated[Path | None, typer.Option(help="Append the rows to this JSON Lines file.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
"""Those of measurements."""

OPTIONS: dict[str, Any] = {
    "stripes": Annotated[
        str | None, typer.Option(help="Run with this layout: PATTERN:WINDOW, GLLL:512; with sinks GLLL:512+4.")
    ],
    "rope": Annotated[str | None, typer.Option(help="A change of the rope: linear:8, yarn:8, llama3:8, base:5000000.")],
    "self_extend": Annotated[
        str | None, typer.Option(help="Read beyond the trained length: GROUP:WINDOW such as 8:1024, or auto:TARGET.")
    ],
    "window": Annotated[int | None, typer.Option(help="Another window for local layers than the layout's.")],
    "full_decode": Annotated[
        bool | None,
        typer.Option("--full-decode/--no-full-decode", help="Local layers keep all keys, and decoded tokens see them."),
    ],
    "dtype": Annotated[str | None, typer.Option(help="float32, bfloat16, ...; the checkpoint's own otherwise.")],
    "device": Annotated[str | None, typer.Option(help="Where to run; a GPU where there is one.")],
}


def loads_a_checkpoint(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb with these options behind its own, in place of its `**loading`."""

    @functools.wraps(verb)
    def run(**arguments: Any) -> None:
        verb(**arguments)

    own = inspect.signature(verb, eval_str=True)
    named = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in OPTIONS.items()
    ]
    as_keywords = [p.replace(kind=p.KEYWORD_ONLY) for p in named]
    typed: Any = run
    typed.__signature__ = own.replace(parameters=[*as_keywords, *more])
    typed.__annotations__ = {p.name: p.annotation for p in [*as_keywords, *more]}
    return run
