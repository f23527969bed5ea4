"""The command `generate`: the text alone on stdout, as it comes; all else on stderr."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

from zebra.cli import options, show
from zebra.errors import ZebraError
from zebra.files import check_regular_file
from zebra.model.checkpoint_files import check_checkpoint


def generate(
    checkpoint: options.Checkpoint,
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    file: Annotated[Path | None, typer.Option(help="UTF-8 file with the text to continue; - reads stdin.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Use the tokenizer's chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="INT", help="Maximum number of new tokens.")] = 256,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    num_beams: Annotated[
        int, typer.Option(min=1, metavar="INT", help="Beams of beam search; the text is printed at the end.")
    ] = 1,
    stop: options.Stop = None,
    prefill_chunk: Annotated[
        int | None,
        typer.Option(min=1, metavar="INT", help="Tokens per prefill chunk. Default: the whole prompt."),
    ] = None,
    seed: options.Seed = 0,
    stripes: options.StripesNotation = None,
    rope: options.RopeNotation = None,
    self_extend: options.SelfExtendNotation = None,
    window: options.Window = None,
    full_decode: options.FullDecode = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Continue a text, by default greedily. The text streams to stdout, timings go to stderr."""
    arguments = options.call_arguments(locals(), "prompt", "file")
    check_checkpoint(checkpoint)
    text = _prompt(prompt, file)
    with show.working():
        from zebra.decoding import Decoding
        from zebra.generation import generate as run

        with show.writing(not as_json) as write:
            generated = run(arguments.pop("checkpoint"), text, on_text=write, **arguments)
        decoding = {field.name: arguments.get(field.name, field.default) for field in fields(Decoding)}
    show.generated(generated, decoding, as_json)


def _prompt(text: str | None, file: Path | None) -> str:
    """The prompt as it is; a line break at the end of a file belongs to it."""
    if (text is None) == (file is None):
        both = "both" if text is not None else "neither"
        raise ZebraError(
            f"exactly one of --prompt TEXT and --file PATH (- reads stdin) is required; got {both}. Give one."
        )
    if text is not None or file is None:
        return text or ""
    if str(file) != "-":
        check_regular_file(file)
    try:
        return (sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ZebraError(f"the prompt in {file} is not UTF-8 at byte {error.start}. Save it as UTF-8.") from None
    except OSError as error:
        raise ZebraError(f"the prompt in {file} cannot be read: {error.strerror}. Give a file of text.") from None
