"""The page docs/results/speed.md, from the results of benchmarks/speed_smollm2.py and benchmarks/speed.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import speed_kernels
from speed_goals import goals, totals
from speed_waterfalls import HOW, picture, waterfalls
from zebra.errors import ZebraError
from zebra.files import atomic_write
from zebra.report import page
from zebra.report.method import method
from zebra.report.page import Cell, Section
from zebra.results import Result
from zebra_bench.published import stored_results

SMOLLM2 = "speed-smollm2.jsonl"
AMX = "speed-amx.jsonl"
"""The same, measured by `--out` on a CPU with AMX."""
SHOWN = (
    "prefill-8192-bfloat16", "prefill-8192-float32", "decode-32768-bfloat16",
    "lora-step-8192-bfloat16", "step-8192-float32",
)  # fmt: skip
"""Runs whose waterfalls are on the page; those of the others are in the results."""
DRAWN = ("prefill-16384-bfloat16", "decode-32768-bfloat16", "lora-step-8192-bfloat16")
ORIGIN = (
    "SmolLM2-135M (30 layers of hidden size 576, 9 query heads and 3 key-value heads of size 64) on one CPU thread, "
    "while other work used the machine's other core. Reproduce: python benchmarks/speed_smollm2.py, then make bench."
)
WITH_AMX = (
    "Another machine: an Intel CPU with AMX matrix registers for bfloat16, which torch's matrix products and zebra's "
    "attention use. Attention reaches about half of their peak, because exponentials, maxima and sums take as long as "
    "before (docs/log.md). As matrix products are faster, norms and other elementwise passes weigh more."
)


def sections(model: Sequence[Result], with_amx: Sequence[Result], kernels: list[Result]) -> list[Section]:
    """All that the page shows."""
    shown = [one for one in model if one.run in SHOWN]
    falls = waterfalls(shown)
    if falls and (drawn := [run for run in DRAWN if any(one.run == run for one in model)]):
        falls[0].blocks.insert(0, picture(model, drawn))
    small = [speed_kernels.goals(kernels), speed_kernels.plan(kernels), speed_kernels.kernel_tables(kernels)]
    registers = [one for part in (*waterfalls(with_amx), totals(with_amx)) for one in part.blocks if one != HOW]
    parts = [*falls, goals(model), totals(model)]
    parts += [Section("On an Intel CPU with AMX", [WITH_AMX, *registers] if registers else [])]
    parts += [*(small if kernels else []), method([*model, *with_amx, *kernels])]
    return [part for part in parts if part.blocks]


def write_page(folder: Path, target: Path, images: Path) -> None:
    """Write the page, and its picture into another folder.

    Raises:
        ZebraError: no results at all.
    """
    files = {name: folder / name for name in (SMOLLM2, AMX, "cpu.jsonl")}
    results = {name: stored_results(file) for name, file in files.items()}
    if not any(results.values()):
        raise ZebraError(f"there are no results in {folder}. Measure first: python benchmarks/speed.py")
    shown = sections(results[SMOLLM2], results[AMX], results["cpu.jsonl"])
    for figure in page.figures_of(shown):
        atomic_write(images / f"{target.stem}-{figure.name}.svg", figure.standalone)
    atomic_write(target, page.markdown(f"../images/{target.stem}", "Speed", [[Cell(ORIGIN)]], shown))
