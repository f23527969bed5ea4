"""Ways to read long texts side by side (`zebra compare`): tables, a figure, and the advice that follows from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from matplotlib.axes import Axes

from zebra.report.advice import advice
from zebra.report.compared import Methods, answered, comparisons
from zebra.report.figures import ACCENT, Figure, drawable
from zebra.report.page import Cell, Line, Section, Table
from zebra.report.pivot import Results, Show, interval_cell, split, table, value_cell
from zebra.report.series import Span, layer_lists, number, percent, short_count, span_of, task_name
from zebra.results import Result

HOW = (
    "Each method read the same windows of the text and answered the same questions about it. Beside a perplexity is "
    "how far it is above the best method of the checkpoint itself at these positions, on the same tokens; other "
    "checkpoints, such as trained ones, may be below it. Tasks such as passkey: samples "
    "answered, over all depths. Prefill: the time from an empty cache to the first token, timed once. Cache: the keys "
    "and values after that. Both are also given as multiples of those of the unchanged checkpoint. A token: the time "
    "to decode one, the median of eight."
)
_COSTS = (
    ("prefill", "s", "prefill_seconds", 1.0),
    ("a token", "ms", "decode_seconds", 1e-3),
    ("cache", "MiB", "kv_bytes", 2.0**20),
)


def methods(results: Iterable[Result]) -> Section:
    """The tables and the figure of each comparison."""
    blocks: list[str | Table | Figure] = []
    for i, here in enumerate(comparisons(results), start=1):
        compared = Methods(here)
        caption = f"Ways to read {compared.length:,} tokens: quality and cost"
        panels = [*_panels(compared)]
        figure = Figure(f"methods-{i}", panels, caption, height=0.7 + 0.26 * len(compared.by_series))
        blocks += [HOW, _table(compared), figure, _paired_table(compared), _cost_table(compared), *_failures(here)]
    return Section("Methods side by side", blocks)


def method_summaries(results: Iterable[Result]) -> list[Line]:
    """The advice of each comparison."""
    return [advice(Methods(here)) for here in comparisons(results)]


def method_tables(results: Iterable[Result]) -> tuple[list[Table], list[str]]:
    """The tables of one comparison, and the lines below them: layers left out of names, failures, and the advice."""
    (here,) = comparisons(results)
    compared = Methods(here)
    return [_table(compared), _cost_table(compared)], [
        *layer_lists(one.layout for one in here),
        *_failures(here),
        "".join(cell.text for cell in advice(compared)),
    ]


def _failures(results: Iterable[Result]) -> list[str]:
    """A line for each method and reason: which parts failed, and why."""
    failed = [one for one in results if one.task.startswith("compare-failed-")]
    lines = []
    for (method, reason), here in split(failed, lambda one: (one.layout, one.metric)).items():
        parts = ", ".join(one.task.removeprefix("compare-failed-") for one in here)
        lines.append(f"{method} failed ({parts}): {reason}")
    return lines


def _table(compared: Methods) -> Table:
    columns: list[tuple[Cell, Show]] = []
    for span in compared.spans:
        columns.append((Cell("perplexity", _short(span)), partial(_perplexity, span=span)))
    tasks = dict.fromkeys(one.task for series in compared.by_series for one in compared.answers(series))
    for task in tasks:
        name = task_name(task).partition(" ")[0].rstrip(",")
        columns.append((Cell(name), partial(_answers, task=task)))
    for head, metric in (("prefill", "prefill_seconds"), ("cache", "kv_bytes")):
        base = compared.value(compared.baseline, metric)
        columns.append((Cell(head), partial(_ratio, metric=metric, base=base)))
    lines = [([Cell(compared.names[series])], here) for series, here in compared.by_series.items()]
    return table(f"{compared.length:,} tokens, {compared.counts}", [Cell("method")], lines, columns)


def _paired_table(compared: Methods) -> Table:
    """How far each method's perplexity is above the best of the checkpoint, with the intervals of the differences."""
    columns = [(Cell(_short(span)), partial(_above_best, span=span)) for span in compared.spans]
    lines = [([Cell(compared.names[series])], here) for series, here in compared.by_series.items()]
    return table(
        "Perplexity above that of the checkpoint's best method, on the same tokens", [Cell("method")], lines, columns
    )


def _above_best(results: Results, span: Span) -> Cell:
    here = [one for one in results if one.metric == "loss_above_best" and span_of(one) == span]
    return interval_cell(here, lambda nats: percent(math.expm1(nats), sign="+"), between=" to ")


def _cost_table(compared: Methods) -> Table:
    """The measured costs, and beside them those planned for this machine."""
    columns = []
    for head, unit, metric, size in _COSTS:
        columns.append((Cell(head, unit), partial(_value, metric=metric, size=size)))
        columns.append((Cell("planned", unit), partial(_value, metric=f"{metric}_planned", size=size)))
    lines = [([Cell(compared.names[series])], here) for series, here in compared.by_series.items()]
    return table(f"Cost of {compared.length:,} tokens, {compared.device}", [Cell("method")], lines, columns)


def _perplexity(results: Results, span: Span) -> Cell:
    here = [one for one in results if span_of(one) == span]
    cell = value_cell([one for one in here if one.metric == "perplexity"])
    above = [one for one in here if one.metric == "loss_above_best" and one.value]
    return cell._replace(dim=percent(math.expm1(above[0].value), sign="+"), dim_results=above) if above else cell


def _answers(results: Results, task: str) -> Cell:
    here = [one for one in results if one.task == task]
    return Cell(answered(here), results=here) if here else Cell("–")


def _ratio(results: Results, metric: str, base: float) -> Cell:
    here = [one for one in results if one.metric == metric]
    return value_cell(here, lambda value: f"×{value / base:.2f}") if base > 0 else value_cell(here)


def _value(results: Results, metric: str, size: float) -> Cell:
    return value_cell([one for one in results if one.metric == metric], lambda value: number(value / size))


def _panels(compared: Methods) -> Iterable[Callable[[Axes], None]]:
    """Panels of horizontal bars, one for each method: perplexity at the last positions, answers, prefill, cache."""
    series = [*compared.by_series]
    names = [compared.names[one] for one in series]
    shares = [100 * compared.share(one) for one in series]
    far = [compared.value(one, "perplexity", compared.far) for one in series]
    yield partial(_plot_bars, values=far, names=names, title=f"perplexity, {_short(compared.far)}", log=True)
    if not all(map(math.isnan, shares)):
        total = sum(one.n or 0 for one in compared.answers(compared.baseline))
        yield partial(_plot_bars, values=shares, title=f"answers, % of {total}" if total else "answers, %")
    for metric, unit, title in (("prefill_seconds", 1.0, "prefill, s"), ("kv_bytes", 2.0**20, "cache, MiB")):
        yield partial(_plot_bars, values=[compared.value(one, metric) / unit for one in series], title=title)


def _short(span: Span) -> str:
    return "–".join(map(short_count, span))


def _plot_bars(
    axes: Axes, values: Sequence[float], title: str, names: Sequence[str] | None = None, log: bool = False
) -> None:
    drawn = [drawable(value) for value in values]
    axes.barh(range(len(drawn)), [0 if math.isnan(value) else value for value in drawn], color=ACCENT, height=0.62)
    known = [value for value in drawn if value > 0]
    if log and known and max(known) > 4 * min(known):
        axes.set_xscale("log")
        axes.set_xlim(left=min(known) / 2)
    for i, value in enumerate(drawn):
        text = "–" if math.isnan(value) else number(value) if 0 < value < 10 else f"{value:,.0f}"
        axes.annotate(
            text, (0 if math.isnan(value) else value, i), (3, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.set_yticks(range(len(drawn)), names or [""] * len(drawn))
    axes.set(ylim=(len(drawn) - 0.4, -0.6), xticks=[])
    axes.margins(x=0.3)
    if not any(known):
        axes.set_xlim(0, 1)
    axes.minorticks_off()
    axes.grid(False)
    axes.spines[["bottom", "left"]].set_visible(False)
    axes.tick_params(length=0)
    # In two lines, because long names leave the panels narrow.
    axes.set_title(title.replace(", ", ",\n", 1), loc="left", fontsize=8)
