"""The verb `generate`: the text alone on stdout, as it comes; all else on stderr."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from zebra.cli import show
from zebra.cli.loading import loads_a_checkpoint
from zebra.errors import ZebraError


@loads_a_checkpoint
def generate(
    checkpoint: Annotated[str, typer.Argument(help="The checkpoint.")],
    prompt: Annotated[str | None, typer.Option(help="The text to go on with.")] = None,
    file: Annotated[Path | None, typer.Option(help="A file that has it, UTF-8; - reads stdin.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="As a message, in the tokenizer's chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to make at most.")] = 256,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token; above it, draw.")] = 0.0,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest of this probability.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from this many of the likeliest.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Draw from those this times as probable as the first.")] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: rather tokens that were not there.")] = 1.0,
    num_beams: Annotated[int, typer.Option(help="Beams; the text is printed at the end.")] = 1,
    stop: Annotated[list[str] | None, typer.Option(help="End behind this string; may be given again.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    prefill_chunk: Annotated[int | None, typer.Option(help="Read the prompt this many tokens at a time.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout, at the end.")] = False,
    **loading: Any,
) -> None:
    """Go on with a text. Greedily, unless a temperature is given; the text streams to stdout, times go to stderr."""
    decoding: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "num_beams": num_beams,
        "stop": tuple(stop or ()),
        "seed": seed,
        "prefill_chunk": prefill_chunk,
    }
    text = _prompt(prompt, file)
    with show.quiet_host(), show.warnings_as_notes():
        from zebra.generation import generate as run

        with show.writing(not as_json) as write:
            made = run(
                checkpoint,
                text,
                chat=chat,
                on_text=write,
                **loading,
                **decoding,
            )
    show.generated(made, decoding, as_json)


def _prompt(text: str | None, file: Path | None) -> str:
    """The prompt, as it stands: a last line break of a file is the prompt's too."""
    if (text is None) == (file is None):
        both = "both" if text is not None else "neither"
        raise ZebraError(f"a prompt is --prompt TEXT or --file PATH (- reads stdin); got {both}. Give one.")
    if text is not None or file is None:
        return text or ""
    try:
        read = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
        return read.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ZebraError(f"the prompt in {file} is not UTF-8 at byte {error.start}. Save it as UTF-8.") from None
    except OSError as error:
        raise ZebraError(f"the prompt in {file} cannot be read: {error.strerror}. Give a file of text.") from None
