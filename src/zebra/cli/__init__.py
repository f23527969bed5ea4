"""The commands: each parses its arguments, makes one call and prints. Imports are lazy: help needs no torch."""

from __future__ import annotations

import errno
import io
import os
import re
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any

import typer

from zebra import __version__
from zebra.cli import chat, command, compare, convert, data, evaluate, generate, plan, report, serve, show, train
from zebra.errors import ZebraError, machine_fault
from zebra.signals import Terminated, raising_terminated

app = typer.Typer(
    help="Longer and cheaper context for decoder language models. Stripes are a layout of layers: G attends to all "
    "earlier tokens (global), L to a sliding window of them (local).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_GROUPS = {
    "evaluate": typer.Typer(
        help="Evaluate a checkpoint: perplexity, retrieval, tasks, documents.", no_args_is_help=True
    ),
    "data": typer.Typer(help="Training data: make long instructions, check conversations.", no_args_is_help=True),
}
_COMMANDS: dict[str, Callable[..., None]] = {
    "zebra plan llama-2-7b --length 16384 --stripes GLLL:512 --memory 80GiB": plan.plan,
    "zebra convert ./Llama-3.1-8B ./Llama-3.1-8B-GLLL --stripes GLLL:4096": convert.convert,
    "zebra export ./Llama-3.1-8B-GLLL llama.gguf --to gguf --dtype q8_0": convert.export,
    "zebra select ./Llama-3.1-8B --budget 0.5 --window 4096 --length 32768 --text books/": convert.select,
    "zebra compare ./Llama-3.1-8B book.txt --length 32768 --budget-minutes 30": compare.compare,
    "zebra verify ./Llama-3.1-8B-GLLL --against ./Llama-3.1-8B": convert.verify,
    "zebra adapt recipes/demo.yaml --set train.max_steps=100 --set evaluate.eval_steps=50": train.adapt,
    "zebra tune recipes/tiny-lit-cpu.yaml --set train.max_steps=100": train.tune,
    'zebra pretrain recipes/retrieval-cpu.yaml --set "data.files=[examples/books/train]" '
    '--set "evaluate.files=[examples/books/validation]" --set train.max_steps=100': train.pretrain,
    "zebra run examples/pipeline-tiny.yaml --dry-run": train.run,
    "zebra study recipes/study-cpu.yaml --workers 2": train.study,
    'zebra generate ./Llama-3.1-8B-GLLL --prompt "Once upon a time" --max-new-tokens 100': generate.generate,
    "zebra chat ./SmolLM2-135M-Instruct --file book.txt --self-extend auto:32768": chat.chat,
    "zebra serve ./Llama-3.1-8B-GLLL --cache-memory 4GiB": serve.serve,
    "zebra evaluate perplexity ./Llama-3.1-8B book.txt --length 32768 --stripes GLLL:4096": evaluate.perplexity,
    "zebra evaluate retrieval ./Llama-3.1-8B-GLLL --task passkey,lookup --length 4096,16384": evaluate.retrieval,
    "zebra evaluate tasks ./Llama-3.1-8B-GLLL --tasks hellaswag,zebra-lookup --length 4096": evaluate.tasks,
    "zebra evaluate documents ./Llama-3.1-8B-GLLL examples/questions.jsonl --length 8192,32768": evaluate.documents,
    "zebra with -- lm_eval run --model hf --model_args pretrained=./Llama-3.1-8B-GLLL,attn_implementation=zebra "
    "--tasks hellaswag": command.with_,
    "zebra report runs/before runs/after -o report.html": report.report,
    "zebra doctor --measure --out ceilings.json": report.doctor,
    "zebra data instructions examples/instructions/squality_train.jsonl examples/text --kind qa,writing --words 8000 "
    "-o long.jsonl": data.instructions,
    "zebra data check long.jsonl --against examples/instructions/squality_test.jsonl": data.check,
}
"""An example of each command, and its function; in the order of the help."""
_SETTINGS = {"with": {"allow_interspersed_args": False}}
"""Settings of click: all options after the command that `with` runs are that command's own."""

for _example, _function in _COMMANDS.items():
    _first, _second = _example.split()[1:3]
    _name = _second if _first in _GROUPS else _first
    _epilog = "Example: " + _example.replace("[", r"\[")  # no markup of rich
    _GROUPS.get(_first, app).command(_name, epilog=_epilog, context_settings=_SETTINGS.get(_name))(_function)
for _name, _group in _GROUPS.items():
    app.add_typer(_group, name=_name)

_UsageError: Any = typer.BadParameter.__base__
"""The base of click's usage errors, which typer does not export."""


def main() -> None:
    """The command `zebra`: an error is one line and exit code 2, a failed check 1, an interrupt 130, SIGTERM 143."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch's own switch: large tensors in pages of 2 MiB
    interrupted = "interrupted. No partial output was left; the same command resumes where it can."
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name must not lose the results beside it, as on stderr
    try:
        with raising_terminated():
            code = app(standalone_mode=False)
        _flush()
        if code == 130:  # typer catches the interrupt first, and prints nothing
            _fail(interrupted, 130)
        raise SystemExit(code or 0)
    except Terminated as end:
        _fail(end.message, 128 + signal.SIGTERM)
    except _UsageError as error:
        _fail_usage(error)
    except ZebraError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail(interrupted, 130)
    except BaseException as error:
        if (fault := machine_fault(error)) is None:
            raise
        with suppress(OSError, SystemExit):  # stdout itself may be what failed
            _flush()
        _fail(fault, 2)


def _flush() -> None:
    """Write what stdout has in its buffer; where that fails, the interpreter would fail on it once more at its end."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        with suppress(OSError):  # it is no file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:
            raise SystemExit(1) from None
        raise


def _fail_usage(error: Any) -> None:
    if type(error).__name__ == "NoArgsIsHelpError":
        if page := error.format_message():  # typer with rich has printed it
            print(page)
        raise SystemExit(2)
    more = f" `{error.ctx.command_path} --help` lists the options." if error.ctx else ""
    text = error.format_message().replace("Value error, ", "")
    for kind, plain in _NUMBERS.items():
        text = re.sub(f"Input should be a valid {kind},.*", plain, text)
    _fail(text.rstrip(".") + "." + more, 2)


_NUMBERS = {"integer": "it must be an integer in digits, such as 8192", "number": "it must be a number, such as 0.5"}
"""Of what pydantic says of a text that is none."""


def _fail(message: str, code: int) -> None:
    show.note(f"zebra: {' '.join(message.split())}")
    raise SystemExit(code)


def _version(value: bool) -> None:
    if value:
        print(f"zebra {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand == "with":  # whose environment is the user's
        return
    # Read by libraries when they are imported; progress bars of theirs would break ours.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
