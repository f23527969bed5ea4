"""Waterfalls of SmolLM2-135M as tables and a picture, from the results of benchmarks/speed_smollm2.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from matplotlib.axes import Axes

from zebra.report.figures import HUES, INK, Figure
from zebra.report.page import Cell, Section, Table
from zebra.report.pivot import Results, split
from zebra.report.series import number, percent
from zebra.results import Result
from zebra_bench.waterfall import PARTS

NAMES = {
    "projections": "projections: q, k, v, o",
    "global": "attention, global layers",
    "local": "attention, local layers",
    "MLP": "MLP: three products",
    "head": "head and loss",
    "merging": "Self-Extend: rotations, merging",
    "norms": "norms",
    "rope": "rope",
    "copies": "copies, cache",
    "rest": "SiLU, sums, embeddings",
    "optimizer": "optimizer",
    "framework": "framework",
}
_LEAST = 0.05
"""Milliseconds of a floor below which a ratio says nothing."""
PHASES = {"prefill": "Prefill", "decode": "Decoding a token", "lora-step": "A LoRA step", "step": "A training step"}
HOW = (
    "The tables split one call into its parts, by torch's profiler: milliseconds, and their ratio to the part's floor. "
    "The floor is the larger of two times: the part's FLOPs at the peak of matrix products (2,048 × 2,048, in the same "
    "run), and the bytes that it must move at the rate of a copy. Elementwise parts count as one pass over "
    "their inputs and outputs. Framework is the rest of the time: Python, dispatch, fresh memory. In decoding it "
    "includes the profiler's own time; the median time does not."
)


def waterfalls(results: Sequence[Result]) -> list[Section]:
    """A section for each phase, with a table for each length and dtype."""
    sections: list[Section] = []
    for phase, title in PHASES.items():
        here = [one for one in results if one.run.startswith(f"{phase}-") and one.task.startswith("bench SmolLM2")]
        tables = [waterfall(ones) for ones in split(here, lambda one: one.run).values()]
        if tables:
            sections.append(Section(title, [*([] if sections else [HOW]), *tables]))
    return sections


def waterfall(results: Sequence[Result]) -> Table:
    """Parts down, ways across."""
    first = results[0]
    ways = split(results, lambda one: (one.model, one.layout))
    dtype = first.task.rpartition(", ")[2]
    length = "cached tokens" if first.run.startswith("decode") else "tokens"
    head = [Cell(f"{first.length:,} {length}, {dtype}")]
    for (model, layout), _ in ways.items():
        head += [Cell(layout if model == "zebra" else model, "ms"), Cell("", "× floor")]
    firsts = {"time, median": _total, "turns": _turns, "share of the peak": _share}
    body = [[Cell(name), *_both(ways, show)] for name, show in firsts.items()]
    if any(_of(ones, "planned_milliseconds") for ones in ways.values()):
        body.insert(1, [Cell("planned, from rates measured here"), *_both(ways, _planned)])
    for part in PARTS:
        if any(_of(ones, f"milliseconds, {part}") for ones in ways.values()):
            body.append([Cell(NAMES[part]), *_both(ways, partial(_part, part))])
    return Table("", head, body)


def _both(ways: dict[tuple[str, str], list[Result]], show: Callable[[Results], list[Cell]]) -> list[Cell]:
    return [cell for ones in ways.values() for cell in show(ones)]


def _of(results: Results, metric: str) -> Result | None:
    return next((one for one in results if one.metric == metric), None)


def _total(results: Results) -> list[Cell]:
    time, floor = _of(results, "milliseconds"), floor_of(results)
    if time is None:
        return [Cell("–"), Cell("–")]
    return [Cell(number(time.value), results=[time]), Cell(f"{time.value / floor:.2f}" if floor else "–")]


def floor_of(results: Results) -> float:
    """The sum of a waterfall's floors."""
    return sum(one.value for one in results if one.metric.startswith("floor_milliseconds, "))


def _turns(results: Results) -> list[Cell]:
    time = _of(results, "milliseconds")
    return [Cell(f"{time.n}" if time else "–"), Cell("")]


def _planned(results: Results) -> list[Cell]:
    planned = _of(results, "planned_milliseconds")
    return [Cell(number(planned.value), results=[planned]) if planned else Cell("–"), Cell("")]


def _share(results: Results) -> list[Cell]:
    share = _of(results, "share_of_peak")
    return [Cell(percent(share.value, 0), results=[share]) if share else Cell("–"), Cell("")]


def _part(part: str, results: Results) -> list[Cell]:
    time, floor = _of(results, f"milliseconds, {part}"), _of(results, f"floor_milliseconds, {part}")
    if time is None:
        return [Cell("–"), Cell("–")]
    ratio = f"{time.value / floor.value:.2f}" if floor and floor.value > _LEAST else "–"
    return [Cell(number(time.value), results=[time]), Cell(ratio)]


def picture(results: Sequence[Result], runs: Sequence[str]) -> Figure:
    """Stacked bars of some runs, each way's parts above its floors."""
    here = [one for one in results if one.run in runs and one.model == "zebra"]
    plots = [partial(_bars, results=[one for one in here if one.run == run]) for run in runs]
    caption = "Seconds by part; below each bar, the floors of the same parts"
    return Figure("waterfalls", plots, caption, results=here, height=2.3, columns=1)


_GROUPS = {
    "projections": ("projections",),
    "attention": ("global", "local", "merging"),
    "MLP": ("MLP",),
    "norms, rope, SiLU, sums": ("norms", "rope", "rest"),
    "copies, head, optimizer": ("copies", "head", "optimizer"),
    "framework": ("framework",),
}


def _bars(axes: Axes, results: Sequence[Result]) -> None:
    """Of each way two bars: measured, and the floors of the same parts."""
    names: list[tuple[float, str]] = []
    at = 0.0
    for layout, ones in split(results, lambda one: one.layout).items():
        for name, start in (("measured", "milliseconds, "), ("floor", "floor_milliseconds, ")):
            left = 0.0
            for (group, parts), hue in zip(_GROUPS.items(), HUES, strict=True):
                width = sum(one.value for one in ones if one.metric.removeprefix(start) in parts) / 1e3
                label = group if not names else None
                axes.barh(
                    at, width, left=left, height=0.8, color=hue, alpha=1.0 if name == "measured" else 0.45, label=label
                )
                left += width
            names.append((at, layout if name == "measured" else "its floor"))
            at -= 1.0
        at -= 0.4
    axes.set_yticks([place for place, _ in names], [name for _, name in names])
    first = results[0]
    what = {"prefill": "prefill of", "decode": "a token after", "lora": "a LoRA step of", "step": "a step of"}
    name = f"{what[first.run.partition('-')[0]]} {first.length:,} tokens"
    axes.set_xlabel(f"seconds: {name}, {first.task.rpartition(', ')[2]}")
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=INK, alpha=0.12, linewidth=0.6)


def lines(results: Sequence[Result]) -> Iterator[str]:
    """The tables of some results as text, for a terminal."""
    for section in waterfalls(results):
        for block in section.blocks:
            if isinstance(block, Table):
                for row in [block.head, *block.body]:
                    yield f"{row[0].text:34}" + "".join(f"{cell.text:>12}" for cell in row[1:])
                yield ""
    for one in results:
        if one.metric in ("milliseconds", "extra_bytes") and one.run.startswith(("peers", "memory")):
            yield f"{one.run}  {one.model}, {one.layout}: {one.value:,.1f} {one.metric}"
