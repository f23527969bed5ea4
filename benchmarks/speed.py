"""The figures that zebra's speed is held to, measured on this machine: `make bench`.

python benchmarks/speed.py                  everything; half an hour and more on two cores
python benchmarks/speed.py decode loss      only these parts; their rows replace those that were there
python benchmarks/speed.py --page           nothing is measured: the page again, from the rows

Rows go to benchmarks/results/cpu.jsonl (cuda.jsonl on a GPU), the page is docs/results/speed.md.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from zebra.errors import ZebraError
from zebra.measure import ceiling_results, measure_ceilings
from zebra.model.load import read_device
from zebra.report import benches, page
from zebra.report.method import method
from zebra.report.page import Cell, Section, Table
from zebra.report.series import interval, number, percent
from zebra.results import Result, read_results, write_results
from zebra_bench.pairing import bench
from zebra_bench.subjects import (
    FAST,
    Attention,
    Decode,
    Extended,
    Layer,
    Loss,
    Paired,
    Prefill,
    TrainStep,
)

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results" / "speed.md"

_CPU = not torch.cuda.is_available()
_BOTH = ("float32", "bfloat16")
PARTS: dict[str, tuple[Paired, ...]] = {
    "ceilings": (),
    "attention": tuple(Attention(dtype=dtype) for dtype in _BOTH),
    "switch": tuple(Attention(length=4096, memory=False, matmul_precision=p) for p in ("highest", "medium")),
    "train-step": tuple(TrainStep(dtype=dtype) for dtype in _BOTH),
    "decode": (Decode(),),
    "self-extend": (
        Extended(work="attention", memory=False),
        Extended(work="decode"),
        Extended(work="chunks", layers=12, heads=12, intermediate=2048),
    ),
    "authors": (Extended(work="authors", heads=2, memory=False),),  # with more heads only slower
    "loss": (Loss(),),
    "plan": (
        TrainStep(length=2048, layers=6, heads=4, intermediate=704, memory=False),
        TrainStep(length=2048, memory=False),
        TrainStep(length=2048, layers=10, heads=10, intermediate=1728, memory=False),
    ),
    "prefill": (Prefill(),),
    "layer": (Layer(),),
}
"""What is measured; a part's rows have its name as their run."""

Value = Callable[[list[Result]], tuple[float, str]]


@dataclass(frozen=True)
class Figure:
    """A line of the table: what is measured, what it is held to, and the value with its evidence, from the rows."""

    work: str
    against: str
    line: float
    stretch: float
    value: Value
    unit: str = "×"
    why: str = ""
    """Why the stretch was not reached, on the machine of the published rows: two cores of Zen 4."""

    def reached(self, value: float) -> str:
        """In a word; of a ratio more is better, of a share less."""
        better = (lambda bound: value <= bound) if self.unit == "of" else (lambda bound: value >= bound)
        return "stretch" if better(self.stretch) else "passed" if better(self.line) else "missed"

    def shown(self, value: float) -> str:
        """With the unit."""
        return {"×": f"{value:.1f} ×", "%": percent(value), "of": f"{value:.3f}"}[self.unit]


def _best(rows: Sequence[Result], metric: str, fast: bool = False) -> Result:
    """Ours, of those with one metric: the kernel with the least of it, or with the greatest share."""
    ours = [r for r in rows if r.metric == metric and r.model.startswith("zebra") and r.model.endswith(FAST) == fast]
    if not ours:
        raise LookupError(metric)
    return (max if "share" in metric else min)(ours, key=lambda row: row.value)


def _peer(rows: Sequence[Result], metric: str, model: str) -> Result:
    found = [row for row in rows if row.metric == metric and row.model == model]
    if not found:
        raise LookupError(model)
    return found[-1]


def _of(rows: Sequence[Result], run: str, dtype: str) -> list[Result]:
    """The rows of a part in a dtype, at the length that the part has."""
    lengths = [getattr(sizes, "length", None) for sizes in PARTS[run]]
    return [row for row in rows if row.run == run and row.task.endswith(dtype) and row.length in lengths]


def faster(run: str, dtype: str, peer: str, metric: str = "milliseconds") -> Value:
    """How many times the peer's median is ours."""

    def value(rows: list[Result]) -> tuple[float, str]:
        here = _of(rows, run, dtype)
        ours, theirs = _best(here, metric), _peer(here, metric, peer)
        said = f"{_spread(theirs)} against {_spread(ours)} ms"
        others = {r.model: r for r in here if r.metric == metric and r.model.startswith("zebra, ") and r is not ours}
        said += f" by {ours.model.removeprefix('zebra, ')}" if others else ""
        said += "".join(
            f"; {theirs.value / row.value:.1f} × by {model.removeprefix('zebra, ')}, {_spread(row)} ms"
            for model, row in others.items()
        )
        return theirs.value / ours.value, said

    return value


def share_of_peak(rows: list[Result]) -> tuple[float, str]:
    """FLOPs of the local layer over what the device's products could have done meanwhile.

    Of a kernel made of torch's products all that it executes, hidden pairs too; of another those of visible pairs.
    """
    here = _of(rows, "switch", "float32")
    best = _best(here, "useful_share_of_peak_forward_backward", fast=True)
    executed = [r for r in here if (r.model, r.metric) == (best.model, "share_of_peak_forward_backward")]
    peak = _peer([row for row in rows if row.run == "switch"], "flops_per_second", "float32 products" + FAST)
    name = best.model.removesuffix(FAST).removeprefix("zebra, ")
    said = f"{name}; of {number(peak.value / 1e9)} GFLOP/s, which torch's products reach"
    said += f"; {percent(best.value)} counting visible pairs only" if executed else ", counting visible pairs only"
    return (executed or [best])[-1].value, said


def memory(run: str, dtype: str, peer: str) -> Value:
    """Our extra bytes over the peer's."""

    def value(rows: list[Result]) -> tuple[float, str]:
        here = _of(rows, run, dtype)
        fastest = _best(here, "milliseconds_forward_backward").model
        ours = _peer(here, "extra_bytes_forward_backward", fastest)
        theirs = _peer(here, "extra_bytes_forward_backward", peer)
        return ours.value / theirs.value, f"{ours.value / 2**20:,.0f} of {theirs.value / 2**20:,.0f} MiB"

    return value


def share_of_plain(metric: str) -> Value:
    """Self-Extend's number over that of plain causal attention."""

    def value(rows: list[Result]) -> tuple[float, str]:
        here = _of(rows, "self-extend", "float32")
        ours, plain = _peer(here, metric, "zebra, Self-Extend"), _peer(here, metric, "zebra, plain")
        if metric.startswith("peak_bytes"):
            return ours.value / plain.value, f"{ours.value / 2**20:,.0f} of {plain.value / 2**20:,.0f} MiB"
        said = f"{_spread(ours)} against {_spread(plain)} ms"
        theirs = [row for row in _of(rows, "authors", "float32") if row.metric == metric]
        for row in theirs:
            if row.model.startswith("two score matrices"):
                times = row.value / _peer(theirs, metric, "zebra, plain").value
                said += f"; {row.model} {times:.1f} times"
        return ours.value / plain.value, said

    return value


_LAYER = "local layer forward + backward, N = 16,384, w = 512"
_MASK = "sdpa, dense mask"
_STEP = "train step, 20M parameters, N = 8,192"
_HOST = "transformers, sdpa"
_TWO = "_forward_backward"
FIGURES = (
    Figure(
        f"{_LAYER}, float32", "transformers sdpa, dense mask, float32", 25, 28,
        faster("attention", "float32", _MASK, f"milliseconds{_TWO}"),
    ),
    Figure(
        f"{_LAYER}, bf16", "the same, bf16", 30, 36, faster("attention", "bfloat16", _MASK, f"milliseconds{_TWO}"),
    ),
    Figure(
        "local layer, N = 4,096, executed FLOPs, float32 with the switch", "the machine's measured matrix peak",
        0.47, 0.60, share_of_peak, "%",
    ),
    Figure(
        "its peak memory minus inputs and outputs, 12 heads of 64", "the same of the dense mask", 0.16, 0.08,
        memory("attention", "float32", _MASK), "of",
    ),
    Figure(
        f"{_STEP}, float32", "transformers default, float32", 2.6, 3.5, faster("train-step", "float32", _HOST),
        why="of its 10.1 s the products of the linear maps and the head, the same on both sides, take 5.8 at the "
        "rate that torch's reach, and attention 2.7; the stretch would be 9.1 s.",
    ),
    Figure(
        f"{_STEP}, bf16 autocast", "transformers default, bf16 autocast", 3.2, 4,
        faster("train-step", "bfloat16", _HOST),
        why="head and loss stay in float32, for a loss that is right: 1.8 s of 6.9; the stretch would be 6.4 s.",
    ),
    Figure(
        "decode at 32,768 cached, 44M parameters, float32", "transformers default cache, dense layout", 15, 18,
        faster("decode", "float32", f"{_HOST}, dense"),
        why="of 37 to 50 ms a token some 18 are the host's linear maps, which MKL multiplies with a single row by one "
        "thread at 10 GB/s, and some 15 the attention of two global layers at 19 GB/s, where a sum over memory reads "
        "32. A loop of our own in C++ took 3.6 ms off, too little. The ratio moves with the allocator: the host's "
        "cache is slow for the fresh memory of its copies (docs/log.md).",
    ),
    Figure(
        "Self-Extend 8:1024, attention of a prefill, N = 16,384", "plain causal, the same kernels", 1.25, 1.15,
        share_of_plain("milliseconds_prefill_attention"), "of",
    ),
    Figure(
        "its attention of a token, 16,384 cached", "plain causal, the same kernels", 1.2, 1.05,
        share_of_plain("milliseconds_decode_attention"), "of",
    ),
    Figure(
        "its decode of a token, 16,384 cached, 44M parameters", "the same model without", 1.05, 1.02,
        share_of_plain("milliseconds_decode"), "of",
    ),
    Figure(
        "its peak memory, whole process, 16,384 tokens in chunks of 2,048, 110M parameters",
        "the same model without", 1.15, 1.05, share_of_plain("peak_bytes_chunks"), "of",
    ),
    Figure(
        "loss, 32,000 words, N = 16,384, extra memory", "full logits", 0.045, 0.03,
        memory("loss", "float32", "full logits"), "of",
    ),
)  # fmt: skip


def _spread(row: Result) -> str:
    bounds = interval(row)
    return number(row.value) + (f" ({number(bounds[0])} to {number(bounds[1])})" if bounds else "")


def figures(rows: list[Result]) -> Section:
    """The table of figures to reach."""
    body, reasons = [], []
    for figure in FIGURES:
        line, stretch = figure.shown(figure.line), figure.shown(figure.stretch)
        try:
            value, said = figure.value(rows)
            measured, verdict = figure.shown(value), figure.reached(value)
        except LookupError:
            measured, verdict, said = "–", "not measured", "–"
        body.append([*map(Cell, (figure.work, figure.against, measured, line, stretch, verdict, said))])
        if verdict in ("passed", "missed") and figure.why:
            reasons.append(f"{figure.work}, {verdict}: {figure.why}")
    head = [*map(Cell, ("work", "against", "measured", "pass line", "stretch", "reached", "evidence"))]
    prose = (
        "Medians, the least and the most of the turns in brackets. Both sides take turns in one process, in the same "
        "dtype. Of Self-Extend's times and of memory less is better."
    )
    return Section("Figures to reach", [prose, Table("", head, body, numeric=False), *reasons])


def plan(rows: list[Result]) -> Section:
    """The plan's step time beside the measured one, for three sizes."""
    here = [row for row in rows if row.run == "plan"]
    body = []
    for task, length in dict.fromkeys((row.task, row.length) for row in here if row.metric == "milliseconds"):
        of = [row for row in here if (row.task, row.length) == (task, length)]
        step = _best(of, "milliseconds")
        guess = _peer(of, "planned_milliseconds", step.model)
        sizes = task.removeprefix("bench train step: ")
        cells = f"{sizes}, {length:,} tokens", number(guess.value), _spread(step), f"{guess.value / step.value:.2f}"
        body.append([*map(Cell, cells)])
    head = [Cell("train step of zebra"), Cell("planned", "ms"), Cell("measured", "ms"), Cell("planned / measured")]
    prose = "Ceilings are measured before and after each; the aim is 0.75 to 1.25."
    return Section("The plan against the clock", [prose, Table("", head, body, numeric=False)] if body else [])


def write_page(results: Path, target: Path) -> None:
    """The page from the rows of both kinds of device, as far as there are any.

    Raises:
        ZebraError: no rows at all.
    """
    found = {kind: read_results(file) for kind in ("cpu", "cuda") if (file := results / f"{kind}.jsonl").is_file()}
    if not any(found.values()):
        raise ZebraError(f"there are no rows in {results}. Measure first: python benchmarks/speed.py")
    sections = []
    for kind, rows in found.items():
        parts = [figures(rows)] if kind == "cpu" else []
        runs = dict.fromkeys(row.run for row in rows)
        tables = [table for run in runs for table in benches.bench_tables([row for row in rows if row.run == run])]
        parts += [plan(rows), Section("All measurements", [benches.HOW, *tables]), method(rows)]
        name = "" if kind == "cpu" else "GPU: "
        sections += [part._replace(title=name + part.title) for part in parts if part.blocks]
    verdict = [
        [Cell("Measured by benchmarks/speed.py, which also wrote this page from the rows in benchmarks/results/.")]
    ]
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    aside.write_text(page.markdown(target.stem, "Speed", verdict, sections), encoding="utf-8")
    os.replace(aside, target)


def measured(part: str) -> list[Result]:
    """A part's rows."""
    rows: list[Result] = []
    if part == "ceilings":
        rows += ceiling_results(measure_ceilings(read_device(None)), run=part)
    for sizes in PARTS[part]:
        results, left_out = bench(sizes)
        for line in left_out:
            print(f"{part}, left out: {line}", file=sys.stderr)
        rows += [replace(row, run=part) for row in results]
    return rows


def main(arguments: list[str]) -> None:
    if unknown := [one for one in arguments if one not in (*PARTS, "--page")]:
        raise ZebraError(f"parts are {', '.join(PARTS)}, or --page alone; got {', '.join(unknown)}.")
    file = RESULTS / f"{'cpu' if _CPU else 'cuda'}.jsonl"
    parts = [] if "--page" in arguments else arguments or [*PARTS]
    if len(parts) > 1:  # each in a process of its own: what one leaves in the heap changes the next one's times
        for part in parts:
            if subprocess.run([sys.executable, __file__, part]).returncode:
                raise ZebraError(f"{part} ended early. The rows of the parts before it are written.")
        return
    for part in parts:
        print(part, file=sys.stderr)
        rows = measured(part)  # what was there stays until the new rows are
        kept = [row for row in (read_results(file) if file.is_file() else []) if row.run != part]
        write_results(file, sorted([*kept, *rows], key=lambda row: [*PARTS].index(row.run)))
    write_page(RESULTS, PAGE)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ZebraError as refusal:
        sys.exit(f"speed: {refusal}")
