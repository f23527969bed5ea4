"""The command `plan`: what a layout costs, by formulas alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from zebra.cli import show
from zebra.cli.options import FullDecode, Json, output_file, stripes_notation
from zebra.errors import ZebraError
from zebra.model.checkpoint_files import check_checkpoint
from zebra.plan.devices import DEVICES
from zebra.plan.shapes import SHAPES


def plan(
    model: Annotated[
        str,
        typer.Argument(help=f"Checkpoint directory, GGUF file, config.json, or a built-in name: {', '.join(SHAPES)}."),
    ],
    length: Annotated[int, typer.Option(help="Tokens of context; in decode, the tokens before the new one.")],
    stripes: Annotated[
        str | None,
        typer.Option(callback=stripes_notation, help="Layout. Default: the model's own, or GLLL:512."),
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences per batch.")] = 1,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    phase: Annotated[
        Literal["train", "prefill", "decode"], typer.Option(metavar="NAME", help="train, prefill or decode.")
    ] = "prefill",
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Activation checkpointing.")] = False,
    lora: Annotated[int | None, typer.Option(help="Train with LoRA of this rank. Default: train all weights.")] = None,
    device: Annotated[str, typer.Option(help=f"{', '.join(DEVICES)}, or a JSON file of peaks.")] = "h100-sxm",
    memory: Annotated[str | None, typer.Option(help="Memory budget, such as 80GiB: find what fits.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Time budget in seconds: find a layout that meets it.")] = None,
    self_extend: Annotated[str | None, typer.Option(help="Also plan Self-Extend: GROUP:WINDOW or auto:LENGTH.")] = None,
    full_decode: FullDecode = None,
    parallel: Annotated[
        str | None, typer.Option(help="Plan one of several devices, such as shard=4,sequence=2.")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(help="Numbers of devices, such as 8..1024: find the fastest way to share a training.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(callback=output_file, help="SVG file for a plot of the costs from 1K to 1M tokens.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Estimate what a layout costs before it runs: FLOPs, bytes, memory, time, and what fits."""
    import zebra.study.layout  # noqa: F401  # the plan knows the models of the study
    from zebra.plan import cluster as clusters
    from zebra.plan import comparison, decoder, devices, fit
    from zebra.plan.cost import Run
    from zebra.plan.parallel import Parallel
    from zebra.positions import SelfExtend
    from zebra.stripes import Stripes

    if Path(model).is_dir():
        check_checkpoint(model)
    sizes, ceilings = decoder.read_decoder(model), devices.find_device(device)
    default = sizes.stripes or Stripes.grouped(stride=4, window=512)
    run = Run(
        decoder=sizes,
        stripes=default if stripes is None else Stripes.parse(stripes),
        length=length,
        batch=batch,
        dtype=dtype,
        phase=phase,
        checkpointing=checkpointing,
        lora=lora,
        self_extend=None if self_extend is None else SelfExtend.parse(self_extend, sizes.trained_length),
        full_decode=sizes.full_decode if full_decode is None else full_decode,
    )
    if cluster is not None:
        if any(option is not None for option in (parallel, memory, seconds, picture)):
            raise ZebraError(
                "--cluster cannot be combined with --parallel, --memory, --seconds or --picture. Leave those out."
            )
        show.cluster(clusters.compare(run, ceilings, clusters.parse_cluster(cluster)), as_json)
        return
    shared = None if parallel is None else Parallel.parse(parallel)
    budget = None if memory is None else fit.parse_bytes(memory)
    tree = comparison.compare(run, ceilings, budget=budget, seconds=seconds, parallel=shared)
    if picture is not None:
        from zebra.report.plan_picture import write_picture

        write_picture(picture, comparison.curves(run, ceilings), phase=phase, device=ceilings.name)
        show.note(f"picture {picture}")
    show.plan(tree, as_json)
