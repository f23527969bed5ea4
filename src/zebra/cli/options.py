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


def stripes_notation(value: str | None) -> str | None:
    """Check a layout; raises as `Stripes.parse`."""
    return value if value is None else str(Stripes.parse(value))


def rope_notation(value: str | None) -> str | None:
    """Check a change of the rope; raises as `Rope.parse`."""
    return value if value is None else str(Rope.parse(value))


def self_extend_notation(value: str | None) -> str | None:
    """Check a setting of Self-Extend; raises as `SelfExtend.parse`."""
    if value is not None and not value.strip().startswith("auto:"):  # a target needs the model's trained length
        SelfExtend.parse(value)
    return value


def dtype_name(value: str | None) -> str | None:
    """Check the name of a dtype; raises as `check_dtype`."""
    if value is not None:
        check_dtype(value)
    return value


# Checkpoints, and how they are loaded


def _loading(name: str, text: str, check: Callable[[str | None], str | None] | None = None) -> Any:
    return typer.Option(name, help=text, callback=check, rich_help_panel="How the checkpoint is loaded")


def _plain_path(value: str) -> str:
    """The path of a directory as results name it, `a/b` for `./a/b/`; anything else may be a name in the hub."""
    return str(Path(value)) if Path(value).exists() else value


Checkpoint = Annotated[
    str, typer.Argument(callback=_plain_path, help="Checkpoint: a directory that transformers saved.")
]
StripesOption = Annotated[
    str | None,
    _loading(
        "--stripes",
        "Layout, PATTERN:WINDOW or LAYERS:WINDOW, such as GLLL:512 or 0,4:512; GLLL:512+4 adds 4 sinks. "
        "Default: the checkpoint's own.",
        stripes_notation,
    ),
]
RopeOption = Annotated[
    str | None,
    _loading("--rope", "Change of the rope: linear:8, yarn:8, llama3:8, base:5000000. Default: none.", rope_notation),
]
SelfExtendOption = Annotated[
    str | None,
    _loading(
        "--self-extend",
        "Read beyond the trained length: GROUP:WINDOW such as 8:1024, or auto:LENGTH. Default: off.",
        self_extend_notation,
    ),
]
Window = Annotated[int | None, _loading("--window", "Window of local layers, in tokens. Default: the layout's.")]
FullDecode = Annotated[
    bool | None,
    _loading(
        "--full-decode/--no-full-decode",
        "Let local layers keep all keys, for the tokens that are generated. Default: as the checkpoint says.",
    ),
]
Dtype = Annotated[
    str | None,
    _loading("--dtype", "float64, float32, bfloat16 or float16. Default: the checkpoint's own.", dtype_name),
]
Device = Annotated[str | None, _loading("--device", "cpu, cuda, cuda:1. Default: a GPU if there is one.")]


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
