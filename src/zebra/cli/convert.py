"""The commands that make checkpoints with stripes: `convert`, `export`, `select` and `verify`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from zebra.cli import options, show
from zebra.data.documents import check_texts
from zebra.errors import ZebraError
from zebra.exports import check_export
from zebra.model.checkpoint_files import check_checkpoint, check_conversion
from zebra.stripes import Stripes, layer_letters

if TYPE_CHECKING:
    from zebra.model.verify import Check


def convert(
    source: options.Checkpoint,
    target: Annotated[Path, typer.Argument(help="Directory to write; it must be new or empty.")],
    stripes: Annotated[
        str | None,
        typer.Option(
            help="Layout: a pattern and a window (GLLL:4096), or global layers (from 0) and a window (0,4:4096); +4 "
            "adds 4 attention sinks. Default: the checkpoint's own."
        ),
    ] = None,
    rope: Annotated[
        str | None,
        typer.Option(
            callback=options.rope_notation,
            help="RoPE scaling: linear:8, yarn:8, llama3:8, base:5000000 or none (unchanged). Default: none.",
        ),
    ] = None,
    full_decode: options.FullDecodeFlag = False,
    as_json: options.Json = False,
) -> None:
    """Copy a checkpoint or a GGUF file with stripes or another RoPE; plain transformers loads the copy."""
    check_conversion(source, target, stripes, rope)
    show.conversion(_converted(source, target, stripes, rope, full_decode), as_json)


def _converted(
    source: str, target: Path, stripes: Stripes | str | None, rope: str | None, full_decode: bool
) -> dict[str, str]:
    """Convert, and return what was written."""
    with show.working():
        from zebra.model.checkpoint import read_config, read_local_attention
        from zebra.model.families import layer_kinds
        from zebra.model.load import convert
        from zebra.model.local import layout_name

        convert(source, target, stripes, rope=rope, full_decode=full_decode)
        config = read_config(target, routed=False)
        return {
            "target": str(target),
            "class": config.architectures[0],
            "layout": layout_name(config, read_local_attention(target)),
            "layers": layer_letters(layer_kinds(config)),
        }


def export(
    checkpoint: options.Checkpoint,
    target: Annotated[Path, typer.Argument(help="What to write: a .gguf file, or a folder.")],
    to: Annotated[
        Literal["gguf", "mlx", "vllm", "sglang"],
        typer.Option(metavar="ENGINE", help="gguf (llama.cpp), mlx, vllm, or sglang (not tested)."),
    ],
    stripes: options.StripesNotation = None,
    dtype: Annotated[
        Literal["f32", "f16", "bf16", "q8_0"] | None,
        typer.Option(
            metavar="NAME", help="Type of the matrices, for a folder to GGUF: f32, f16, bf16 or q8_0. Default: f16."
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Export a checkpoint with stripes to another engine and print its command. Self-Extend does not carry over."""
    check_export(checkpoint, target, to, stripes, dtype)
    with show.working():
        from zebra.exports import export as run

        exported = run(checkpoint, target, to=to, stripes=stripes, dtype=dtype)
    show.export(exported, as_json)


def select(
    checkpoint: options.Checkpoint,
    budget: Annotated[
        str,
        typer.Option(
            callback=options.budget_notation,
            help="Global layers to keep: 8, or 0.25 of all; flops:0.5 of the prefill; cache:4GiB@131072 tokens.",
        ),
    ],
    window: Annotated[str, typer.Option(help="Window of the local layers, in tokens; 512+4 adds 4 attention sinks.")],
    length: Annotated[int, typer.Option(min=2, metavar="INT", help="Tokens of each text sequence or prompt.")],
    text: Annotated[
        list[str] | None, typer.Option(help="File, folder or glob to measure on; repeatable. Required without --task.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--task",
            callback=options.names,
            help="Retrieval tasks to measure on, comma-separated; --text is then their haystack.",
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=4, metavar="INT", help="Number of sequences or prompts; one in four is held out.")
    ] = 16,
    order: Annotated[
        Literal["greedy", "once"],
        typer.Option(metavar="NAME", help="greedy: measure again after each layer; once: choose after one round."),
    ] = "greedy",
    separator: options.Separator = None,
    field: options.Field = None,
    bos: options.Bos = None,
    rope: options.RopeNotation = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    seed: options.Seed = 0,
    work: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            callback=options.output_folder,
            help="Folder for measurements, results and report; the command resumes from it.",
        ),
    ] = Path("selection"),
    target: Annotated[
        Path | None, typer.Option("--convert", help="Also write the checkpoint with this layout to this directory.")
    ] = None,
    full_decode: options.FullDecodeFlag = False,
    as_json: options.Json = False,
) -> None:
    """Choose by measurement which layers stay global, within a budget."""
    arguments = options.call_arguments(locals(), "target", "full_decode")
    check_conversion(checkpoint, target, f"L:{window}", rope)
    if full_decode and target is None:
        raise ZebraError("--full-decode requires --convert; got none. Add it, or leave --full-decode out.")
    _check_what_measures(**arguments)
    with show.working():
        from zebra.evaluate.selection import select as run
        from zebra.report import write_report
        from zebra.report.selection import better_strides
        from zebra.results import read_results

        selection = run(**arguments, run=work.resolve().name)
        write_report(read_results(work / "results.jsonl"), work / "report.html")
        for line in better_strides(selection.results):
            show.note(line)
    written = None if target is None else _converted(checkpoint, target, selection.stripes, rope, full_decode)
    show.selection(selection, written, as_json)
    show.note(f"results {work}/results.jsonl, page {work}/report.html")


def _check_what_measures(
    text: Sequence[str] = (),
    tasks: Sequence[str] = (),
    separator: str | None = None,
    field: str | None = None,
    bos: bool | None = None,
    samples: int = 16,
    **_: Any,
) -> None:
    """Check the texts and tasks that layers are chosen by."""
    if not text and not tasks:
        raise ZebraError("selecting layers requires a text or retrieval tasks; got neither. Give --text or --task.")
    for name, value in {"--separator": separator, "--field": field}.items():
        if value is not None and not text:
            raise ZebraError(f"{name} requires --text; got none. Add it, or leave {name} out.")
    if bos is not None and tasks:
        raise ZebraError("--bos and --no-bos apply to text sequences, not to the prompts of --task. Leave them out.")
    check_texts(text, separator=separator, field=field)
    if tasks:
        from zebra.data.needles import check_task

        for name in tasks:
            check_task(name, 0.5, samples)


def verify(
    target: Annotated[str, typer.Argument(help="Converted checkpoint.")],
    against: Annotated[
        str | None, typer.Option(help="Source checkpoint of the conversion. Required without --self-extend.")
    ] = None,
    self_extend: Annotated[
        str | None,
        typer.Option(
            callback=options.self_extend_notation,
            help="Also compare Self-Extend with its formula: GROUP:WINDOW or auto:LENGTH.",
        ),
    ] = None,
    rope: Annotated[
        str | None, typer.Option(callback=options.rope_notation, help="The --rope of the conversion.")
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            min=2, metavar="INT", help="Tokens of the long checks. Default: enough for keys beyond the window."
        ),
    ] = None,
    seed: options.Seed = 0,
    dtype: Annotated[
        Literal["float64", "float32", "bfloat16"] | None,
        typer.Option(
            metavar="NAME", help="float64, float32 or bfloat16. Default: float32; bfloat16 for quantised weights."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Device: cpu, cuda, cuda:1.")] = "cpu",
    engine: Annotated[
        Literal["gguf", "mlx", "vllm"] | None,
        typer.Option(metavar="NAME", help="Verify an export by running it in its engine: gguf, mlx or vllm."),
    ] = None,
    python: Annotated[
        str | None,
        typer.Option(help="Python of an environment with the engine. Default: this one.", metavar="PATH"),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Check that a conversion, an export or Self-Extend computes what it should; exit code 1 if a check fails."""
    arguments = options.call_arguments(locals())
    for checkpoint in filter(None, (target, against)):
        if engine is None or checkpoint != target:
            check_checkpoint(checkpoint)
    if engine is not None:
        checks = _checked_in_engine(**arguments)
    else:
        if python is not None:
            raise ZebraError("--python requires --engine, whose environment it names. Add --engine, or leave it out.")
        with show.working():
            from zebra.model.verify import verify as run

            checks = run(**arguments)
    show.checks(checks, as_json)
    if not all(check.passed for check in checks):
        raise typer.Exit(1)


def _checked_in_engine(target: str, engine: str, against: str | None = None, **arguments: Any) -> list[Check]:
    """What an export computes in its engine, beside what it was made of."""
    if against is None:
        raise ZebraError("verifying an export requires the checkpoint that it was made from. Name it with --against.")
    if arguments.pop("device") != "cpu":
        raise ZebraError("--device cannot be combined with --engine. Leave it out.")
    if other := sorted({*arguments} - {"python", "length", "seed"}):
        raise ZebraError(f"--{other[0].replace('_', '-')} cannot be combined with --engine. Leave it out.")
    with show.working():
        from zebra.exports.verify import verify_export

        return verify_export(target, against, engine, **arguments)
