"""The options that several commands share, each declared once, and checked as far as that needs no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer

from zebra.errors import ZebraError
from zebra.files import check_writable
from zebra.model.checkpoint_files import check_dtype
from zebra.model.rope import Rope
from zebra.plan.budget import parse_budget
from zebra.positions import SelfExtend
from zebra.results import check_results_file
from zebra.stripes import Stripes

Value = TypeVar("Value")


def numbers(
    option: str, kind: Callable[[str], float], example: str, least: float, most: float = math.inf
) -> Callable[[str | None], list[Any] | None]:
    """A callback that reads an option's numbers, with commas between them, and raises a ZebraError for others."""

    def callback(value: str | None) -> list[Any] | None:
        try:
            values = None if value is None else [kind(part) for part in value.split(",")]
        except ValueError:
            raise ZebraError(
                f"{option} must be numbers, comma-separated; got {value!r}. Use for example {example}."
            ) from None
        if not all(least <= one <= most for one in values or ()):
            ends = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
            raise ZebraError(f"{option} must be numbers {ends}; got {value!r}. Use for example {example}.")
        return values

    return callback


def names(value: str | None) -> list[str] | None:
    """A callback that reads names with commas between them."""
    return None if value is None else [name.strip() for name in value.split(",")]


def call_arguments(arguments: dict[str, Any], *without: str) -> dict[str, Any]:
    """A command's arguments as those of the function that it calls, whose defaults stand for what is not given.

    Args:
        without: names of arguments that the command keeps for itself, beside `as_json`.
    """
    excluded = ("as_json", *without)
    return {name: value for name, value in arguments.items() if name not in excluded and value not in (None, [])}


def _checked_by(parse: Callable[[Value], object]) -> Callable[[Value | None], Value | None]:
    """A callback that leaves a value as it is, and raises what `parse` raises for it."""

    def callback(value: Value | None) -> Value | None:
        if value is not None:
            parse(value)
        return value

    return callback


def _check_self_extend(value: str) -> None:
    if not value.strip().startswith("auto:"):  # a target needs the model's trained length
        SelfExtend.parse(value)


def _check_folder(folder: Path) -> None:
    check_writable(folder / "results.jsonl")


stripes_notation = _checked_by(Stripes.parse)
budget_notation = _checked_by(parse_budget)
rope_notation = _checked_by(Rope.parse)
self_extend_notation = _checked_by(_check_self_extend)
output_file = _checked_by(check_writable)
output_folder = _checked_by(_check_folder)


# Checkpoints, and how they are loaded


def _loading(name: str, text: str, check: Callable[[str | None], str | None] | None = None) -> Any:
    return typer.Option(name, help=text, callback=check, rich_help_panel="How the checkpoint is loaded")


def _plain_path(value: str) -> str:
    """The path of a directory as results name it, `a/b` for `./a/b/`; anything else may be a name of the hub."""
    return str(Path(value)) if Path(value).exists() else value


Checkpoint = Annotated[
    str,
    typer.Argument(
        callback=_plain_path,
        help="Checkpoint: a transformers directory, a GGUF file, or OWNER/NAME on the hub.",
    ),
]
StripesNotation = Annotated[
    str | None,
    _loading(
        "--stripes",
        "Layout: a pattern and a window (GLLL:512), or the global layers and a window (0,4:512); +4 adds 4 attention "
        "sinks. Default: the checkpoint's own.",
        stripes_notation,
    ),
]
RopeNotation = Annotated[
    str | None,
    _loading(
        "--rope",
        "RoPE scaling: linear:8, yarn:8, llama3:8, base:5000000, dynamic:1 (evaluation only) or none (unchanged). "
        "Default: none.",
        rope_notation,
    ),
]
SelfExtendNotation = Annotated[
    str | None,
    _loading(
        "--self-extend",
        "Self-Extend, to read beyond the trained length: GROUP:WINDOW (8:1024) or auto:LENGTH. Default: off.",
        self_extend_notation,
    ),
]
Window = Annotated[int | None, _loading("--window", "Window of the local layers, in tokens. Default: the layout's.")]
FullDecode = Annotated[
    bool | None,
    _loading(
        "--full-decode/--no-full-decode",
        "Let generated tokens attend to all keys in local layers too. Default: the checkpoint's own.",
    ),
]
FullDecodeFlag = Annotated[
    bool, typer.Option("--full-decode", help="Let generated tokens attend to all keys in local layers too.")
]
Dtype = Annotated[
    str | None,
    _loading(
        "--dtype", "float64, float32, bfloat16 or float16. Default: the checkpoint's own.", _checked_by(check_dtype)
    ),
]
Device = Annotated[str | None, _loading("--device", "cpu, cuda, cuda:1. Default: a GPU if there is one.")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Allow a tokenizer that is Python code in the checkpoint; never a model."),
]


# How tokens are chosen

Temperature = Annotated[
    float, typer.Option(min=0, metavar="FLOAT", help="0: greedy; above 0: sample with this temperature.")
]
TopP = Annotated[
    float | None,
    typer.Option(min=0, max=1, metavar="FLOAT", help="Sample from the likeliest tokens up to this total probability."),
]
TopK = Annotated[int | None, typer.Option(min=1, metavar="INT", help="Sample from this many of the likeliest tokens.")]
MinP = Annotated[
    float | None,
    typer.Option(min=0, max=1, metavar="FLOAT", help="Exclude tokens below this share of the top probability."),
]
RepetitionPenalty = Annotated[
    float, typer.Option(min=0, metavar="FLOAT", help="Above 1: penalize tokens that already occurred.")
]
Stop = Annotated[list[str] | None, typer.Option(help="Stop after this string; repeatable.")]


# Measurements

length_list = numbers("--length", int, "4096 or 512,4096", least=2)
Lengths = Annotated[
    str, typer.Option("--length", callback=length_list, help="Context lengths in tokens, comma-separated.")
]
Score = Literal["generate", "likelihood"]
Beyond = Annotated[bool, typer.Option("--beyond", help="Allow lengths beyond the trained length.")]
Separator = Annotated[
    str | None, typer.Option(help="String that separates the documents in a text file. Default: one document per file.")
]
Field = Annotated[
    str | None, typer.Option(help="Field with the text in .jsonl, .json, .csv or .parquet records. Default: text.")
]
Bos = Annotated[
    bool | None,
    typer.Option(
        "--bos/--no-bos",
        help="Whether each chunk begins with the BOS token. Default: as the tokenizer does.",
    ),
]
Seed = Annotated[int, typer.Option(min=0, metavar="INT", help="Random seed.")]
RunName = Annotated[str, typer.Option("--run", help="Name of the run in the results.")]
Out = Annotated[
    Path | None,
    typer.Option(callback=_checked_by(check_results_file), help="JSON Lines file to which the results are appended."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]

# Recipes

RecipeFile = Annotated[Path, typer.Argument(help="YAML recipe; see recipes/.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe; repeatable.")
]
