"""The table of verbs: each parses its arguments, makes one call and prints. Imports stand inside: help is quick."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from zebra import __version__
from zebra.cli import data, documents, pipeline, show, tasks, training
from zebra.cli.convert import EXAMPLE as EXAMPLE_OF_CONVERT
from zebra.cli.convert import convert
from zebra.cli.generate import generate
from zebra.cli.loading import loads_a_checkpoint
from zebra.cli.retrieval import EXAMPLE, retrieval
from zebra.cli.study import EXAMPLE as EXAMPLE_OF_STUDY
from zebra.cli.study import study
from zebra.errors import ZebraError

app = typer.Typer(
    help="A longer and cheaper context for decoder language models: stripes of global and local attention.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
evaluate = typer.Typer(help="Measure a checkpoint.", no_args_is_help=True)
app.add_typer(evaluate, name="evaluate")
app.add_typer(data.app, name="data")

_ROPE = "A change of the rope: linear:8, yarn:8, llama3:8, base:5000000."
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


_UsageError: Any = typer.BadParameter.__base__
"""Typer brings click's along, and names no more of its errors than two."""


def main() -> None:
    """The command `zebra`: a refusal, or what cannot be parsed, is one line and exit code 2, an interrupt code 130."""
    interrupted = "interrupted. Nothing half-written was left; the same command goes on where it can."
    try:
        code = app(standalone_mode=False)
        if code == 130:  # typer catches the interrupt first, and says nothing
            _fail(interrupted, 130)
        raise SystemExit(code or 0)
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            if page := error.format_message():  # typer with rich has printed it
                print(page)
            raise SystemExit(2) from None
        more = f" `{error.ctx.command_path} --help` lists what there is." if error.ctx else ""
        _fail(error.format_message().rstrip(".") + "." + more, 2)
    except ZebraError as refusal:
        _fail(str(refusal), 2)
    except KeyboardInterrupt:
        _fail(interrupted, 130)
    except OSError as error:
        if error.errno is None:
            raise
        where = f": {error.filename}" if error.filename else ""
        _fail(f"{os.strerror(error.errno)}{where}. Nothing half-written was left.", 2)


def _fail(message: str, code: int) -> None:
    print(f"zebra: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"zebra {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    # The hub is never asked unless the user names a model in it; bars of the host would break ours.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


app.command(epilog=EXAMPLE_OF_CONVERT)(convert)


@app.command(epilog="zebra verify ./Llama-3.1-8B-GLLL --against ./Llama-3.1-8B")
def verify(
    target: Annotated[Path, typer.Argument(help="The converted checkpoint.")],
    against: Annotated[Path | None, typer.Option(help="The checkpoint that it was converted from.")] = None,
    self_extend: Annotated[str | None, typer.Option(help="Compare this Self-Extend with its formula.")] = None,
    rope: Annotated[str | None, typer.Option(help="The change of rope that was converted with.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of the long checks.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random tokens.")] = 0,
    dtype: Annotated[str, typer.Option(help="float64, float32 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1.")] = "cpu",
    as_json: Json = False,
) -> None:
    """Prove a conversion, or Self-Extend; exit code 1 when a check fails."""
    with show.quiet_host():
        from zebra.model.verify import verify as run

        checks = run(
            target, against, rope=rope, self_extend=self_extend, length=length, seed=seed, dtype=dtype, device=device
        )
    show.checks(checks, as_json)
    if not all(check.passed for check in checks):
        raise typer.Exit(1)


for verb, example in training.EXAMPLES.items():
    app.command(epilog=example)(verb)
app.command(epilog=pipeline.EXAMPLE)(pipeline.run)

app.command(epilog=EXAMPLE_OF_STUDY)(study)


@app.command(epilog="zebra plan llama-2-7b --length 16384 --stripes GLLL:512 --memory 80GiB")
def plan(
    model: Annotated[str, typer.Argument(help="A checkpoint's directory, a config.json, or a name: llama-2-7b.")],
    length: Annotated[int, typer.Option(help="Tokens of context; in decode those before the new one.")],
    stripes: Annotated[str | None, typer.Option(help="The layout; the config's own or GLLL:512 otherwise.")] = None,
    batch: Annotated[int, typer.Option(help="Rows at a time.")] = 1,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    phase: Annotated[str, typer.Option(help="train, prefill or decode.")] = "prefill",
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Compute activations again.")] = False,
    lora: Annotated[int | None, typer.Option(help="Train low-rank updates of this rank.")] = None,
    device: Annotated[str, typer.Option(help="h100-sxm, a100-80gb, ..., or a JSON file of ceilings.")] = "h100-sxm",
    memory: Annotated[str | None, typer.Option(help="A budget, 80GiB: the length, batch and layout that fit.")] = None,
    seconds: Annotated[float | None, typer.Option(help="A budget of time: the layout that meets it.")] = None,
    self_extend: Annotated[str | None, typer.Option(help="Beside it Self-Extend: G:W or auto:TARGET.")] = None,
    full_decode: Annotated[
        bool, typer.Option("--full-decode", help="Local layers keep all keys, and decoded tokens see them.")
    ] = False,
    picture: Annotated[Path | None, typer.Option(help="Draw it over 1K to 1M tokens into this .svg.")] = None,
    as_json: Json = False,
) -> None:
    """What a layout costs before it is run: FLOPs, bytes, memory, time, and what fits."""
    from zebra.plan import decoder, devices, fit, sheet
    from zebra.plan.cost import Run
    from zebra.positions import SelfExtend
    from zebra.stripes import Stripes

    read, ceilings = decoder.read(model), devices.find(device)
    own = read.stripes or Stripes.grouped(stride=4, window=512)
    run = Run(
        decoder=read,
        stripes=own if stripes is None else Stripes.parse(stripes),
        length=length,
        batch=batch,
        dtype=dtype,
        phase=phase,
        checkpointing=checkpointing,
        lora=lora,
        self_extend=None if self_extend is None else SelfExtend.parse(self_extend, read.trained_length),
        full_decode=full_decode,
    )
    found = sheet.tree(run, ceilings, budget=None if memory is None else fit.bytes_of(memory), seconds=seconds)
    if picture is not None:
        from zebra.report.costs import write_picture

        write_picture(picture, sheet.curves(run, ceilings), phase=phase, device=ceilings.name)
        show.note(f"picture {picture}")
    show.plan(found, as_json)


app.command(epilog='zebra generate ./Llama-3.1-8B-GLLL --prompt "Once upon a time" --max-new-tokens 100')(generate)


@evaluate.command(epilog="zebra evaluate perplexity ./Llama-3.1-8B book.txt --length 32768 --stripes GLLL:4096")
@loads_a_checkpoint
def perplexity(
    checkpoint: Annotated[Path, typer.Argument(help="The checkpoint.")],
    text: Annotated[list[str], typer.Argument(help="Files, folders or globs of text.")],
    length: Annotated[str, typer.Option(help="Tokens of context; several with commas.")],
    convention: Annotated[str, typer.Option(help="disjoint, strided or truncated windows.")] = "disjoint",
    stride: Annotated[int | None, typer.Option(help="Tokens scored by each strided window.")] = None,
    separator: Annotated[str | None, typer.Option(help="Splits a file into documents.")] = None,
    field: Annotated[str, typer.Option(help="The field of .jsonl or .parquet records that has the text.")] = "text",
    workers: Annotated[int, typer.Option(min=1, help="Processes that tokenise.")] = 1,
    join: Annotated[bool, typer.Option("--join", help="Join documents into long ones of at least the length.")] = False,
    prompt: Annotated[
        int | None, typer.Option(help="Read so many tokens of each window, and score those decoded behind them.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the intervals' bootstrap.")] = 0,
    run: Annotated[str, typer.Option(help="The run's name in the rows.")] = "evaluate",
    out: Annotated[Path | None, typer.Option(help="Append the rows to this JSON Lines file.")] = None,
    as_json: Json = False,
    **loading: Any,
) -> None:
    """Perplexity by position, at one or more context lengths."""
    with show.quiet_host():
        from zebra.evaluate.perplexity import evaluate_perplexity

        rows = evaluate_perplexity(
            checkpoint,
            text,
            lengths=_lengths(length),
            convention=convention,
            stride=stride,
            separator=separator,
            field=field,
            workers=workers,
            join=join,
            prompt=prompt,
            seed=seed,
            run=run,
            **loading,
        )
    show.rows(rows, as_json, out)


evaluate.command(epilog=EXAMPLE)(retrieval)
evaluate.command(epilog=tasks.EXAMPLE)(tasks.tasks)
evaluate.command(epilog=documents.EXAMPLE)(documents.documents)


@app.command(epilog="zebra report runs/before runs/after -o report.html")
def report(
    sources: Annotated[list[Path], typer.Argument(help="Run directories, or files of rows.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write; Markdown goes beside it.")] = Path(
        "report.html"
    ),
    title: Annotated[str | None, typer.Option(help="The page's title.")] = None,
) -> None:
    """Turn rows of results into one page, the runs side by side where there are several."""
    from zebra.report import merge_sources, write_report
    from zebra.results import read_results
    from zebra.study.page import chapters

    files = {str(source): source / "results.jsonl" if source.is_dir() else source for source in sources}
    results = merge_sources({name: read_results(file) for name, file in files.items()})
    write_report(results, out, title=title, chapters=chapters(results))
    print(f"{out}: {len(results)} results")


@app.command(epilog="zebra doctor --measure --out ceilings.json")
def doctor(
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure FLOP/s, bandwidth and one local layer instead; some ten seconds.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="Measure this device; a GPU where there is one otherwise.")] = None,
    size: Annotated[
        int | None, typer.Option(min=1, help="Measure matrices of this size; 2048 on a CPU, 8192 on a GPU otherwise.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the measured ceilings for `zebra plan --device` here.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show versions, devices, and which attention kernel serves which request; or measure the machine."""
    from zebra.doctor import kernels, machine

    if not measure:
        if (device, size, out) != (None, None, None):
            raise ZebraError("--device, --size and --out belong to --measure. Add it, or drop them.")
        show.machine(machine(), kernels(), as_json)
        return
    from zebra import measure as measuring

    if out is not None and out.is_dir():
        raise ZebraError(f"--out is a file; got the folder {out}. Name a file.")
    ceilings, results = measuring.measure(device, size=size)
    if out is not None:
        measuring.write_ceilings(out, ceilings)
    show.rows(results, as_json)


def _lengths(text: str) -> list[int]:
    try:
        return [int(part.replace("_", "")) for part in text.split(",")]
    except ValueError:
        raise ZebraError(
            f"--length takes whole numbers, several with commas; got {text!r}. Write 4096 or 512,4096."
        ) from None
