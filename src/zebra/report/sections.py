"""Rows to the sections of a page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from zebra.errors import ZebraError
from zebra.report.figures import draw, plot_loss, plot_positions, plot_way, strips
from zebra.report.page import Cell, Figure, Section, Table
from zebra.report.series import (
    FULL,
    Group,
    Span,
    count,
    interval,
    number,
    percent,
    series_of,
    span_name,
    step,
)
from zebra.results import Result
from zebra.stripes import LOCAL, Stripes

_MOST_LAYERS = 10_000


def layouts(costs: list[Result]) -> Section:
    """The layouts as strips."""
    layouts: dict[tuple[str, int], tuple[str, ...]] = {}
    first: dict[tuple[str, int], Result] = {}
    windows = set()
    for row in (row for row in costs if row.metric == "layers" and 1 <= row.value <= _MOST_LAYERS):
        n = int(row.value)
        try:
            stripes = Stripes(1, pattern="G") if row.layout == FULL else Stripes.parse(row.layout)
            layouts[row.layout, n] = stripes.layer_types(n)
        except ZebraError:  # a layout of another notation has no picture
            continue
        first.setdefault((row.layout, n), row)
        if LOCAL in layouts[row.layout, n]:
            windows.add(stripes.window)
    if not layouts:
        return Section("The layout", [])
    prose = (
        "Each cell is a layer, the first one on the left. A global layer compares every token with all tokens before "
        "it. A local layer looks at a window of recent tokens only, which costs far less; what lies farther back "
        "reaches it through the global layers below."
    )
    caption = "What a layer of each kind sees, and where each kind stands"
    figure = Figure("layout", strips(layouts, sorted(windows)), caption, [*first.values()])
    return Section("The layout", [prose, figure])


def positions(groups: list[Group]) -> Section:
    """Perplexity by position: figures, then tables."""
    if not groups:
        return Section("Perplexity by position", [])
    blocks: list[str | Table | Figure] = [
        "How well a token is predicted, by how many tokens stand before it; lower is better. "
        "Beside a value stands its 95 % interval; the change is that of a trained checkpoint against its source."
    ]
    for i, group in enumerate((group for group in groups if len(group.buckets) > 1), start=1):
        caption = f"Perplexity by position in contexts of {group.length:,} tokens, {convention(group.task)}"
        svg = draw(f"positions{i}", partial(plot_positions, group=group))
        blocks.append(Figure(f"positions-{i}", svg, caption, group.rows))
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
        columns.append(partial(_score_at, scores))
        source = group.source(series)
        if source is not None:
            head.append(Cell("change"))
            columns.append(partial(_change_at, group.scores[source], scores))
    head.append(Cell("tokens", "scored"))
    columns.append(lambda span: _scored([scores[span] for scores in group.scores.values() if span in scores]))
    whole = (0, group.length)
    body = [
        [Cell("all" if span == whole != group.spans[0] else span_name(span)), *(column(span) for column in columns)]
        for span in group.spans
    ]
    return Table(f"{run}: contexts of {group.length:,} tokens, {convention(group.task)}", head, body)


def _score_at(scores: Mapping[Span, Result], span: Span) -> Cell:
    return _score(scores.get(span))


def _score(row: Result | None) -> Cell:
    if row is None:
        return Cell("–")
    bounds = interval(row)
    return Cell(number(row.value), "–".join(map(number, bounds)) if bounds else "", results=[row])


def _change_at(before: Mapping[Span, Result], after: Mapping[Span, Result], span: Span) -> Cell:
    return _change(before.get(span), after.get(span))


def _change(before: Result | None, after: Result | None) -> Cell:
    if before is None or after is None or not before.value:
        return Cell("–")
    return Cell(percent(after.value / before.value - 1, sign="+"), results=[before, after])


def _scored(rows: list[Result]) -> Cell:
    """How many tokens; of the rows that say the same, the first."""
    counts = {row.n: row for row in reversed(rows) if row.n is not None}
    return Cell(" / ".join(f"{n:,}" for n in reversed(counts)) or "–", results=[*counts.values()])


def convention(task: str) -> str:
    """How perplexity was measured; of another task its name."""
    return task.removeprefix("perplexity-")


def training(losses: list[Result], on_the_way: list[Group], groups: list[Group]) -> Section:
    """The loss, and the perplexities on the way."""
    blocks: list[str | Table | Figure] = []
    if losses:
        svg = draw("loss", lambda axes: plot_loss(axes, losses), height=2.6)
        blocks.append(Figure("loss", svg, "Training loss (nats per token) against the tokens trained on", losses))
    for run, i in dict.fromkeys((series.run, i) for i, group in enumerate(on_the_way) for series in group.scores):
        way = on_the_way[i].of_run(run)
        per_step = next((row.n / at for row in losses if row.run == run and row.n and (at := step(row))), None)
        unit = "tokens" if per_step else "steps"
        points = {(step(next(iter(s.values()))) or 0) * (per_step or 1): s for s in way.scores.values()}
        points |= _start(way, groups)
        points = dict(sorted(points.items()))
        name = f"on-the-way-{sum(isinstance(block, Table) for block in blocks) + 1}"
        title = f"{run}: perplexity by position on the way, {convention(way.task)}"
        svg = draw(name, partial(plot_way, points=points, buckets=way.buckets, unit=unit), height=2.6)
        head = [Cell(unit, "trained"), *(Cell("all" if s not in way.buckets else span_name(s)) for s in way.spans)]
        body = [[Cell(count(at)), *(_score(scores.get(s)) for s in way.spans)] for at, scores in points.items()]
        blocks += [Figure(name, svg, title, way.rows), Table("", head, body)]
    return Section("Training", blocks)


def _start(way: Group, groups: list[Group]) -> dict[float, dict[Span, Result]]:
    """The scores before the first step: the source in the layout that is trained."""
    trained = next(iter(way.scores))
    for group in groups:
        if (group.task, group.length) == (way.task, way.length):
            for series, scores in group.scores.items():
                if (series.run, series.layout) == (trained.run, trained.layout) and not series.made:
                    return {0: scores}
    return {}


def cost(costs: list[Result], speeds: list[Result]) -> Section:
    """Exact counts and timings, dense and striped."""
    tables = []
    places = dict.fromkeys((row.run, row.model, row.length) for row in costs if row.metric != "layers")
    for place in places:
        metrics = {"attention_pairs": "attention pairs", "cached_tokens": "cached tokens"}
        here = [row for row in costs if (row.run, row.model, row.length) == place]
        found = {(row.layout, row.metric): row for row in here}
        layouts = dict.fromkeys(row.layout for row in here)
        columns = [_shares([found.get((layout, metric)) for layout in layouts], fewer=True) for metric in metrics]
        body = [[Cell(layout), *cells] for layout, *cells in zip(layouts, *columns, strict=True)]
        title = f"{place[0]}: one text of {place[2]:,} tokens, counted over all layers"
        tables.append(Table(title, [Cell("layout"), *map(Cell, metrics.values())], body))
    for run, length in dict.fromkeys((row.run, row.length) for row in speeds):
        here = [row for row in speeds if (row.run, row.length) == (run, length)]
        cells = _shares([*here], fewer=False)
        body = [[Cell(series_of(row).name, row.layout), cell] for row, cell in zip(here, cells, strict=True)]
        context = f" of contexts of {length:,} tokens" if length is not None else ""
        tables.append(Table(f"{run}: evaluation{context}, timed", [Cell("model"), Cell("tokens per second")], body))
    prose = (
        "Attention pairs are the (query, key) pairs that attention computes; cached tokens are the keys that "
        "generation keeps. Both are exact counts. Speed is one timing of the evaluation that gave the perplexities: "
        "take small differences as noise."
    )
    return Section("Cost against full attention", [prose, *tables] if tables else [])


def _shares(rows: list[Result | None], *, fewer: bool) -> list[Cell]:
    """Numbers with bars and, from the second on, the ratio to the first."""
    longest = max((row.value for row in rows if row and row.value), default=0)
    first = rows[0]
    cells = []
    for i, row in enumerate(rows):
        if row is None:
            cells.append(Cell("–"))
            continue
        ratio = ""
        if i and first and first.value and row.value:
            share = row.value / first.value
            ratio = f"{percent(share)}, {1 / share:.2f}× fewer" if fewer else f"{share:.2f}×"
        dim_results = [first, row] if first and ratio else []
        cells.append(Cell(count(row.value), ratio, row.value / longest if longest else None, [row], dim_results))
    return cells
