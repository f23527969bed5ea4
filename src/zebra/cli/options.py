"""The options that several verbs share, each declared once, and checked as far as that needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from zebra.errors import ZebraError
from zebra.model.checkpoint_files import check_checkpoint, check_dtype
from zebra.model.rope import Rope
from zebra.positions import SelfExtend
from zebra.stripes import Stripes

Number = TypeVar("Number", int, float)


def numbers(option: str, text: str, kind: Callable[[str], Number], example: str) -> list[Number]:
    """Numbers of an option, with commas between them.

    Raises:
        ZebraError: anything else.
    """
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ZebraError(f"{option} takes numbers, several with commas; got {text!r}. Write {example}.") from None


def names(text: str) -> list[str]:
    """Names with commas between them."""
    return [name.strip() for name in text.split(",")]


def _stripes(value: str | None) -> str | None:
    return value if value is None else str(Stripes.parse(value))


def _rope(value: str | None) -> str | None:
    return value if value is None else str(Rope.parse(value))


def _self_extend(value: str | None) -> str | None:
    if value is not None and not value.strip().startswith("auto:"):  # a target needs the model's trained length
        SelfExtend.parse(value)
    return value


def _dtype(value: str | None) -> str | None:
    if value is not None:
        check_dtype(value)
    return value


# Checkpoints, and how they are loaded

Checkpoint = Annotated[str, typer.Argument(help="Checkpoint: a directory that transformers saved.")]
StripesOption = Annotated[
    str | None,
    typer.Option(
        "--stripes",
        callback=_stripes,
        help="Layout, PATTERN:WINDOW or LAYERS:WINDOW, such as GLLL:512 or 0,4:512; GLLL:512+4 adds 4 sinks. "
        "Default: the checkpoint's own.",
    ),
]
RopeOption = Annotated[
    str | None,
    typer.Option(
        "--rope", callback=_rope, help="Change of the rope: linear:8, yarn:8, llama3:8, base:5000000. Default: none."
    ),
]
SelfExtendOption = Annotated[
    str | None,
    typer.Option(
        "--self-extend",
        callback=_self_extend,
        help="Read beyond the trained length: GROUP:WINDOW such as 8:1024, or auto:LENGTH. Default: off.",
    ),
]
Window = Annotated[int | None, typer.Option(help="Window of local layers, in tokens. Default: the layout's.")]
FullDecode = Annotated[
    bool | None,
    typer.Option(
        "--full-decode/--no-full-decode",
        help="Let local layers keep all keys, for the tokens that are generated. Default: as the checkpoint says.",
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(callback=_dtype, help="float64, float32, bfloat16 or float16. Default: the checkpoint's own."),
]
Device = Annotated[str | None, typer.Option(help="Device: cpu, cuda, cuda:1. Default: a GPU if there is one.")]


def load_arguments(
    checkpoint: str,
    stripes: str | None,
    rope: str | None,
    self_extend: str | None,
    window: int | None,
    full_decode: bool | None,
    dtype: str | None,
    device: str | None,
) -> dict[str, Any]:
    """The fields of `zebra.model.load_options.LoadOptions`, for a checkpoint that is there.

    Raises:
        ZebraError: as `check_checkpoint`.
    """
    check_checkpoint(checkpoint)
    return {
        "stripes": stripes,
        "rope": rope,
        "self_extend": self_extend,
        "window": window,
        "full_decode": full_decode,
        "dtype": dtype,
        "device": device,
    }


# Measurements

Lengths = Annotated[str, typer.Option("--length", help="Context lengths in tokens, several with commas.")]
Beyond = Annotated[bool, typer.Option("--beyond", help="Allow lengths beyond those that the model was trained for.")]
Separator = Annotated[
    str | None, typer.Option(help="String that separates documents in a text file. Default: a file is one document.")
]
Seed = Annotated[int, typer.Option(help="Seed of all random draws.")]
RunName = Annotated[str, typer.Option("--run", help="Name of the run in the results.")]
Out = Annotated[Path | None, typer.Option(help="JSON Lines file to append the results to.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]

# Recipes

RecipeFile = Annotated[Path, typer.Argument(help="YAML recipe; see recipes/.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe; repeatable.")
]
