"""Rows to the sections of a page."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

from zebra.records import Row
from zebra.refusal import Refusal
from zebra.report.figures import drawn, plot_loss, plot_positions, plot_way, strips
from zebra.report.page import Cell, Figure, Section, Table
from zebra.report.series import (
    DENSE,
    Group,
    Span,
    count,
    interval,
    number,
    outcome,
    percent,
    series_of,
    span_name,
    step,
)
from zebra.stripes import LOCAL, Stripes

_CONVENTIONS = {
    "disjoint": "windows side by side; every token but the first of each window is scored once",
    "strided": "overlapping windows; each scores only its last tokens, those that no window before it has scored",
    "truncated": "only the beginning of each document that is long enough to fill the context",
}


def verdict(run: str, groups: list[Group], costs: list[Row]) -> str:
    """What adaptation did at the far positions and at the near ones, and what share of dense attention is left."""
    mine = [group.of_run(run) for group in groups]
    longest = max((group for group in mine if group.scores), key=lambda group: group.length, default=None)
    text = _perplexity_verdict(longest) if longest else ""
    pairs = {row.layout: row.value for row in costs if (row.run, row.metric) == (run, "attention_pairs")}
    for layout in [layout for layout in pairs if layout != DENSE and pairs.get(DENSE)][:1]:
        share = f"attention computes {percent(pairs[layout] / pairs[DENSE], 0)} of the dense model's pairs"
        text = f"{text}, while {share}" if text else f"With {layout}, {share}"
    return text and text + "."


def _perplexity_verdict(group: Group) -> str:
    far = group.buckets[-1]
    after = outcome(group.scores)
    before = group.source(after) if after else None
    if after is None or before is None:
        each = (f"{number(s[far].value)} for {of.name} {of.layout}" for of, s in group.scores.items() if far in s)
        return f"Perplexity at positions {span_name(far, ' to ')} is {', '.join(each)}"
    a, b = group.scores[before], group.scores[after]
    shared = [span for span in dict.fromkeys([far, group.buckets[0]]) if span in a and span in b]
    changes = (f"{_fall(a[span], b[span])} at positions {span_name(span, ' to ')}" for span in shared)
    return f"Perplexity {' and '.join(changes)}" if shared else ""


def _fall(before: Row, after: Row) -> str:
    old, new = number(before.value), number(after.value)
    if old == new:
        return f"stayed at {new}"
    a, b = interval(before), interval(after)
    unclear = " (the intervals overlap)" if a and b and a[0] <= b[1] and b[0] <= a[1] else ""
    return f"{'fell' if after.value < before.value else 'rose'} from {old} to {new}{unclear}"


_MOST_LAYERS = 10_000


def layouts(costs: list[Row]) -> Section:
    """The layouts as strips."""
    layouts: dict[tuple[str, int], tuple[str, ...]] = {}
    windows = set()
    for row in (row for row in costs if row.metric == "layers" and 1 <= row.value <= _MOST_LAYERS):
        n = int(row.value)
        try:
            stripes = Stripes(1, pattern="G") if row.layout == DENSE else Stripes.parse(row.layout)
            layouts[row.layout, n] = stripes.layer_types(n)
        except Refusal:  # a layout of another notation has no picture
            continue
        if LOCAL in layouts[row.layout, n]:
            windows.add(stripes.window)
    if not layouts:
        return Section("The layout", [])
    prose = (
        "Each cell is a layer, the first one on the left. A global layer compares every token with all tokens before "
        "it. A local layer looks at a window of recent tokens only, which costs far less; what lies farther back "
        "reaches it through the global layers below."
    )
    svg = strips(layouts, sorted(windows))
    return Section(
        "The layout", [prose, Figure("layout", svg, "What a layer of each kind sees, and where each kind stands")]
    )


def positions(groups: list[Group]) -> Section:
    """Perplexity by position: figures, then tables."""
    if not groups:
        return Section("Perplexity by position", [])
    blocks: list[str | Table | Figure] = [
        "How well a token is predicted, by how many tokens stand before it; lower is better. "
        "Beside a value stands its 95 % interval; the change is that of the adapted checkpoint against its source."
    ]
    for i, group in enumerate(groups, start=1):
        caption = f"Perplexity by position in contexts of {group.length:,} tokens, {_convention(group.task)}"
        blocks.append(
            Figure(f"positions-{i}", drawn(f"positions{i}", lambda a, g=group: plot_positions(a, g)), caption)
        )
    return Section("Perplexity by position", [*blocks, *position_tables(groups)])


def position_tables(groups: list[Group]) -> list[Table]:
    """A table for each run, task and length."""
    runs = dict.fromkeys((series.run, i) for i, group in enumerate(groups) for series in group.scores)
    return [_position_table(run, groups[i].of_run(run)) for run, i in runs]


def _position_table(run: str, group: Group) -> Table:
    head = [Cell("positions")]
    columns: list[Callable[[Span], Cell]] = []
    for series, scores in group.scores.items():
        head.append(Cell(series.name, series.layout))
        columns.append(lambda span, scores=scores: _score(scores.get(span)))
        source = group.source(series)
        if source is not None:
            head.append(Cell("change"))
            columns.append(lambda span, a=group.scores[source], b=scores: _change(a.get(span), b.get(span)))
    head.append(Cell("tokens", "scored"))
    columns.append(lambda span: _scored(scores[span].n for scores in group.scores.values() if span in scores))
    whole = (0, group.length)
    body = [
        [Cell("all" if span == whole != group.spans[0] else span_name(span)), *(column(span) for column in columns)]
        for span in group.spans
    ]
    return Table(f"{run}: contexts of {group.length:,} tokens, {_convention(group.task)}", head, body)


def _score(row: Row | None) -> Cell:
    if row is None:
        return Cell("–")
    bounds = interval(row)
    return Cell(number(row.value), "–".join(map(number, bounds)) if bounds else "")


def _change(before: Row | None, after: Row | None) -> Cell:
    return Cell(percent(after.value / before.value - 1, sign="+") if before and after and before.value else "–")


def _scored(counts: Iterable[int | None]) -> Cell:
    return Cell(" / ".join(f"{n:,}" for n in dict.fromkeys(counts) if n is not None) or "–")


def _convention(task: str) -> str:
    return task.removeprefix("perplexity-")


def training(losses: list[Row], on_the_way: list[Group], groups: list[Group]) -> Section:
    """The loss, and the perplexities on the way."""
    blocks: list[str | Table | Figure] = []
    if losses:
        svg = drawn("loss", lambda axes: plot_loss(axes, losses), height=2.6)
        blocks.append(Figure("loss", svg, "Training loss (nats per token) against the tokens trained on"))
    for run, i in dict.fromkeys((series.run, i) for i, group in enumerate(on_the_way) for series in group.scores):
        way = on_the_way[i].of_run(run)
        per_step = next((row.n / step(row) for row in losses if row.run == run and row.n and step(row)), None)
        unit = "tokens" if per_step else "steps"
        points = {(step(next(iter(s.values()))) or 0) * (per_step or 1): s for s in way.scores.values()}
        points |= _start(way, groups)
        points = dict(sorted(points.items()))
        name = f"on-the-way-{sum(isinstance(block, Table) for block in blocks) + 1}"
        title = f"{run}: perplexity by position on the way, {_convention(way.task)}"
        svg = drawn(name, lambda axes, p=points, w=way, u=unit: plot_way(axes, p, w.buckets, u), height=2.6)
        head = [Cell(unit, "trained"), *(Cell("all" if s not in way.buckets else span_name(s)) for s in way.spans)]
        body = [[Cell(count(at)), *(_score(scores.get(s)) for s in way.spans)] for at, scores in points.items()]
        blocks += [Figure(name, svg, title), Table(title, head, body)]
    return Section("Training", blocks)


def _start(way: Group, groups: list[Group]) -> dict[float, dict[Span, Row]]:
    """The scores before the first step: the source in the layout that is trained."""
    trained = next(iter(way.scores))
    for group in groups:
        if (group.task, group.length) == (way.task, way.length):
            for series, scores in group.scores.items():
                if (series.run, series.layout) == (trained.run, trained.layout) and not series.made:
                    return {0: scores}
    return {}


def cost(costs: list[Row], speeds: list[Row]) -> Section:
    """Exact counts and timings, dense and striped."""
    tables = []
    places = dict.fromkeys((row.run, row.model, row.length) for row in costs if row.metric != "layers")
    for place in places:
        metrics = {"attention_pairs": "attention pairs", "cached_tokens": "cached tokens"}
        here = [row for row in costs if (row.run, row.model, row.length) == place]
        found = {(row.layout, row.metric): row.value for row in here}
        layouts = dict.fromkeys(row.layout for row in here)
        columns = [_shares([found.get((layout, metric)) for layout in layouts], fewer=True) for metric in metrics]
        body = [[Cell(layout), *cells] for layout, *cells in zip(layouts, *columns, strict=True)]
        title = f"{place[0]}: one text of {place[2]:,} tokens, counted over all layers"
        tables.append(Table(title, [Cell("layout"), *map(Cell, metrics.values())], body))
    for run, length in dict.fromkeys((row.run, row.length) for row in speeds):
        here = [row for row in speeds if (row.run, row.length) == (run, length)]
        cells = _shares([row.value for row in here], fewer=False)
        body = [[Cell(series_of(row).name, row.layout), cell] for row, cell in zip(here, cells, strict=True)]
        context = f" of contexts of {length:,} tokens" if length is not None else ""
        tables.append(Table(f"{run}: evaluation{context}, timed", [Cell("model"), Cell("tokens per second")], body))
    prose = (
        "Attention pairs are the (query, key) pairs that attention computes; cached tokens are the keys that "
        "generation keeps. Both are exact counts. Speed is one timing of the evaluation that gave the perplexities: "
        "take small differences as noise."
    )
    return Section("Cost against full attention", [prose, *tables] if tables else [])


def _shares(values: list[float | None], *, fewer: bool) -> list[Cell]:
    """Numbers with bars and, from the second on, the ratio to the first."""
    longest = max((value for value in values if value), default=0)
    cells = []
    for i, value in enumerate(values):
        if value is None:
            cells.append(Cell("–"))
            continue
        first, ratio = values[0], ""
        if i and first and value:
            ratio = f"{percent(value / first)}, {first / value:.2f}× fewer" if fewer else f"{value / first:.2f}×"
        cells.append(Cell(count(value), ratio, value / longest if longest else None))
    return cells


def others(rows: list[Row]) -> Section:
    """What no other section shows."""
    columns = ("run", "model", "layout", "task", "metric", "value", "low", "high", "n", "length", "position_from",
               "position_to", "depth", "seed")  # fmt: skip
    shown = [asdict(row) for row in rows]
    columns = tuple(column for column in columns if any(row[column] is not None for row in shown))
    body = [[Cell(_plain(row[column])) for column in columns] for row in shown]
    table = Table("", [Cell(column.replace("_", " ")) for column in columns], body, numeric=False)
    return Section("Other rows", [table] if rows else [])


def _plain(value: Any) -> str:
    return "–" if value is None else f"{value:,.6g}" if isinstance(value, float) else str(value)


def method(rows: Sequence[Row]) -> Section:
    """All that a number depends on."""
    facts: dict[str, dict[str, None]] = defaultdict(dict)
    for row in rows:
        convention = _convention(row.task)
        if row.task != convention:
            facts["convention"][f"{convention}: {_CONVENTIONS.get(convention, 'as its evaluation defines it')}"] = None
        if row.low is not None and row.task != convention:
            facts["intervals"]["95 %, bootstrap over documents"] = None
        if row.low is not None and row.task.startswith("retrieval-"):
            facts["intervals"]["of retrieval: 95 %, Wilson's over samples"] = None
        if row.low is not None and row.task.startswith("selection-"):
            facts["intervals"]["of selections: 95 %, bootstrap over rows, of the difference from the source"] = None
        if step(row) is None:
            facts["models"][row.model] = None
        facts["seed"][str(row.seed)] = None
        facts["device"][row.device] = None
        facts["versions"][", ".join(f"{name} {version}" for name, version in row.versions.items())] = None
        commit = row.commit or "not known: an installed package"
        facts["commit"][commit.replace("+", " with uncommitted changes")] = None
    body = [[Cell(name), Cell("; ".join(values))] for name, values in facts.items()]
    return Section("How it was measured", [Table("", [Cell(""), Cell("")], body, numeric=False)])
