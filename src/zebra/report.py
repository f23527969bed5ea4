"""Rows of results as one page: a self-contained HTML file, and the same in Markdown with its figures beside it.

A page is a list of sections and a section is prose, tables and figures; HTML, Markdown and the terminal are three
renderings of them. Rows that no section understands stand in a plain table at the end.
"""

from __future__ import annotations

import html as markup
import io
import itertools
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Any, NamedTuple
from urllib.parse import quote

import matplotlib
import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator
from rich.table import Table
from rich.text import Text

from zebra.records import Row
from zebra.refusal import Refusal
from zebra.stripes import GLOBAL, LOCAL, Stripes

DENSE = "dense"
INK = "#010203"
"""What figures draw in the colour of the text; it becomes `currentColor`, so that a figure follows light and dark."""
HUES = ("#e2571e", "#2a93a8", "#8b68d6", "#b8860b", "#d0488a", "#4f9d50")
_CONVENTIONS = {
    "disjoint": "windows side by side; every token but the first of each window is scored once",
    "strided": "overlapping windows; each scores only its last tokens, those that no window before it has scored",
    "truncated": "only the beginning of each document that is long enough to fill the context",
}
_Span = tuple[int, int]


class _Cell(NamedTuple):
    text: str
    dim: str = ""
    share: float | None = None  # of the longest bar in its column


@dataclass(frozen=True)
class _Table:
    title: str
    head: list[_Cell]
    body: list[list[_Cell]]
    numeric: bool = True


class _Figure(NamedTuple):
    name: str
    svg: str
    caption: str


class _Section(NamedTuple):
    title: str
    blocks: list[str | _Table | _Figure]


class _Series(NamedTuple):
    run: str
    model: str
    layout: str

    @property
    def adapted(self) -> bool:
        path = PurePath(self.model)
        return path.name == "model" and bool(path.parent.name)

    @property
    def name(self) -> str:
        path = PurePath(self.model)
        return f"{path.parent.name} (adapted)" if self.adapted else path.name or self.model


class _Group(NamedTuple):
    """What may be compared: one task at one context length, by series and span of positions."""

    task: str
    length: int
    scores: dict[_Series, dict[_Span, Row]]

    @property
    def spans(self) -> list[_Span]:
        """The buckets of positions in order, and last the whole context."""
        found = {span for scores in self.scores.values() for span in scores}
        return sorted(found, key=lambda span: (span == (0, self.length), span))

    @property
    def buckets(self) -> list[_Span]:
        return [span for span in self.spans if span != (0, self.length)] or self.spans

    def of_run(self, run: str) -> _Group:
        return self._replace(scores={series: scores for series, scores in self.scores.items() if series.run == run})

    def source(self, series: _Series) -> _Series | None:
        """What an adapted checkpoint came from: the first that its run measured."""
        if not series.adapted:
            return None
        return next((other for other in self.scores if other.run == series.run and not other.adapted), None)


def write_report(rows: Sequence[Row], html: Path, *, title: str | None = None) -> None:
    """Write the page to `html`, beside it the same in Markdown, whose figures are the files `<stem>-*.svg`.

    Raises:
        Refusal: no rows, or a page whose name does not end in .html.
    """
    _refuse_empty(rows)
    if html.suffix not in (".html", ".htm"):
        raise Refusal(
            f"a report is an HTML page, with Markdown and figures beside it; got the name {html.name!r}. "
            f"Write to {html.with_suffix('.html')}."
        )
    kinds = _by_kind(rows)
    groups = _groups(kinds["position"])
    runs = dict.fromkeys(row.run for row in rows)
    title = title or ", ".join(runs)
    verdicts = {run: _verdict(run, groups, kinds["cost"]) for run in runs}
    verdict = [f"{run}: {text}" if len(runs) > 1 else text for run, text in verdicts.items() if text]
    verdict = verdict or [f"{len(rows):,} rows of results."]
    sections = [
        _layouts(kinds["cost"]),
        _positions(groups),
        _training(kinds["loss"], _groups(kinds["on the way"]), groups),
        _cost(kinds["cost"], kinds["speed"]),
        _method(rows),
        _others(kinds["other"]),
    ]
    sections = [section for section in sections if section.blocks]
    html.parent.mkdir(parents=True, exist_ok=True)
    for figure in (block for section in sections for block in section.blocks if isinstance(block, _Figure)):
        _replace(html.with_name(f"{html.stem}-{figure.name}.svg"), _standalone(figure.svg))
    _replace(html.with_suffix(".md"), _markdown(html.stem, title, verdict, sections))
    _replace(html, _html(title, verdict, sections))


def position_table(rows: Sequence[Row]) -> Table:
    """Perplexity by position for the terminal: a column for each model and layout, before and after, with the change.

    Raises:
        Refusal: no rows of perplexity by position.
    """
    _refuse_empty(rows)
    groups = _groups(_by_kind(rows)["position"])
    if not groups:
        tasks = ", ".join(sorted({row.task for row in rows}))
        raise Refusal(f"a table by position needs rows of a task perplexity-*; got the tasks {tasks}. Evaluate first.")
    grid = Table.grid()
    for table in _position_tables(groups):
        shown = Table(title=Text(table.title), title_justify="left", title_style="", header_style="bold")
        for i, cell in enumerate(table.head):
            shown.add_column(Text.assemble(cell.text, ("\n" + cell.dim, "dim")), justify="right" if i else "left")
        for line in table.body:
            shown.add_row(*(Text.assemble(c.text, (f" {c.dim}" if c.dim else "", "dim")) for c in line))
        grid.add_row(shown)
    return grid


def _refuse_empty(rows: Sequence[Row]) -> None:
    if not rows:
        raise Refusal("a report is made of at least one row of results; got 0 rows. Give a run that has a rows.jsonl.")


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


# Rows


def _kind(row: Row) -> str:
    if row.task.startswith("perplexity-") and row.metric == "perplexity":
        known = None not in (row.length, row.position_from, row.position_to)
        return ("position" if _step(row) is None else "on the way") if known else "other"
    if (row.task, row.metric) == ("train", "loss") and row.n is not None and _step(row) is not None:
        return "loss"
    if row.task == "cost" and row.metric in ("layers", "attention_pairs", "cached_tokens") and row.length is not None:
        return "cost"
    return "speed" if (row.task, row.metric) == ("speed", "evaluation_tokens_per_second") else "other"


def _by_kind(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by the section that shows them; a second value for one place (another seed, say) is shown as it is."""
    kinds: dict[str, list[Row]] = defaultdict(list)
    seen = set()
    for row in rows:
        place = (*_series(row), row.task, row.metric, row.length, row.position_from, row.position_to)
        kinds["other" if place in seen else _kind(row)].append(row)
        seen.add(place)
    return kinds


def _series(row: Row) -> _Series:
    return _Series(row.run, row.model, row.layout)


def _step(row: Row) -> int | None:
    """The training step of a row on the way, whose model is named `<run>@<step>`."""
    step = row.model.rpartition("@")[2]
    return int(step) if "@" in row.model and step.isdecimal() else None


def _groups(rows: Iterable[Row]) -> list[_Group]:
    groups: dict[tuple[str, int], _Group] = {}
    for row in rows:
        assert row.length is not None and row.position_from is not None and row.position_to is not None
        group = groups.setdefault((row.task, row.length), _Group(row.task, row.length, {}))
        group.scores.setdefault(_series(row), {})[row.position_from, row.position_to] = row
    return list(groups.values())


def _number(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 1e6 and value != int(value):
        return f"{value:.2e}"
    return f"{value:,.{2 if abs(value) < 100 else 1 if abs(value) < 1000 else 0}f}"


def _count(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else str(value)


def _percent(share: float, decimals: int = 1, sign: str = "") -> str:
    return f"{100 * share:{sign}.{decimals}f}\N{NO-BREAK SPACE}%".replace("-", "−")


def _range(span: _Span, to: str = "–") -> str:
    return f"{span[0]:,}{to}{span[1]:,}"


# Sections


def _verdict(run: str, groups: list[_Group], costs: list[Row]) -> str:
    """What adaptation did at the far positions and at the near ones, and what share of dense attention is left."""
    mine = [group.of_run(run) for group in groups]
    longest = max((group for group in mine if group.scores), key=lambda group: group.length, default=None)
    text = _perplexity_verdict(longest) if longest else ""
    pairs = {row.layout: row.value for row in costs if (row.run, row.metric) == (run, "attention_pairs")}
    for layout in [layout for layout in pairs if layout != DENSE and pairs.get(DENSE)][:1]:
        share = f"attention computes {_percent(pairs[layout] / pairs[DENSE], 0)} of the dense model's pairs"
        text = f"{text}, while {share}" if text else f"With {layout}, {share}"
    return text and text + "."


def _perplexity_verdict(group: _Group) -> str:
    far = group.buckets[-1]
    after = next((series for series in group.scores if series.adapted), None)
    before = group.source(after) if after else None
    if after is None or before is None:
        each = (f"{_number(s[far].value)} for {of.name} {of.layout}" for of, s in group.scores.items() if far in s)
        return f"Perplexity at positions {_range(far, ' to ')} is {', '.join(each)}"
    a, b = group.scores[before], group.scores[after]
    shared = [span for span in dict.fromkeys([far, group.buckets[0]]) if span in a and span in b]
    changes = (f"{_fall(a[span], b[span])} at positions {_range(span, ' to ')}" for span in shared)
    return f"Perplexity {' and '.join(changes)}" if shared else ""


def _fall(before: Row, after: Row) -> str:
    old, new = _number(before.value), _number(after.value)
    if old == new:
        return f"stayed at {new}"
    a, b = _interval(before), _interval(after)
    unclear = " (the intervals overlap)" if a and b and a[0] <= b[1] and b[0] <= a[1] else ""
    return f"{'fell' if after.value < before.value else 'rose'} from {old} to {new}{unclear}"


def _interval(row: Row) -> tuple[float, float] | None:
    return None if row.low is None or row.high is None else (row.low, row.high)


def _layouts(costs: list[Row]) -> _Section:
    layouts: dict[tuple[str, int], tuple[str, ...]] = {}
    windows = set()
    for row in (row for row in costs if row.metric == "layers"):
        n = int(row.value)
        try:
            stripes = Stripes(1, pattern="G") if row.layout == DENSE else Stripes.parse(row.layout)
            layouts[row.layout, n] = stripes.layer_types(n)
        except Refusal:  # a layout of another notation has no picture
            continue
        if LOCAL in layouts[row.layout, n]:
            windows.add(stripes.window)
    if not layouts:
        return _Section("The layout", [])
    prose = (
        "Each cell is a layer, the first one on the left. A global layer compares every token with all tokens before "
        "it. A local layer looks at a window of recent tokens only, which costs far less; what lies farther back "
        "reaches it through the global layers below."
    )
    svg = _strips(layouts, sorted(windows))
    return _Section(
        "The layout", [prose, _Figure("layout", svg, "What a layer of each kind sees, and where each kind stands")]
    )


def _positions(groups: list[_Group]) -> _Section:
    if not groups:
        return _Section("Perplexity by position", [])
    blocks: list[str | _Table | _Figure] = [
        "How well a token is predicted, by how many tokens stand before it; lower is better. "
        "Beside a value stands its 95 % interval; the change is that of the adapted checkpoint against its source."
    ]
    for i, group in enumerate(groups, start=1):
        caption = f"Perplexity by position in contexts of {group.length:,} tokens, {_convention(group.task)}"
        blocks.append(
            _Figure(f"positions-{i}", _drawn(f"positions{i}", lambda a, g=group: _plot_positions(a, g)), caption)
        )
    return _Section("Perplexity by position", [*blocks, *_position_tables(groups)])


def _position_tables(groups: list[_Group]) -> list[_Table]:
    runs = dict.fromkeys((series.run, i) for i, group in enumerate(groups) for series in group.scores)
    return [_position_table(run, groups[i].of_run(run)) for run, i in runs]


def _position_table(run: str, group: _Group) -> _Table:
    head = [_Cell("positions")]
    columns: list[Callable[[_Span], _Cell]] = []
    for series, scores in group.scores.items():
        head.append(_Cell(series.name, series.layout))
        columns.append(lambda span, scores=scores: _score(scores.get(span)))
        source = group.source(series)
        if source is not None:
            head.append(_Cell("change"))
            columns.append(lambda span, a=group.scores[source], b=scores: _change(a.get(span), b.get(span)))
    head.append(_Cell("tokens", "scored"))
    columns.append(lambda span: _scored(scores[span].n for scores in group.scores.values() if span in scores))
    whole = (0, group.length)
    body = [
        [_Cell("all" if span == whole != group.spans[0] else _range(span)), *(column(span) for column in columns)]
        for span in group.spans
    ]
    return _Table(f"{run}: contexts of {group.length:,} tokens, {_convention(group.task)}", head, body)


def _score(row: Row | None) -> _Cell:
    if row is None:
        return _Cell("–")
    interval = _interval(row)
    return _Cell(_number(row.value), "–".join(map(_number, interval)) if interval else "")


def _change(before: Row | None, after: Row | None) -> _Cell:
    return _Cell(_percent(after.value / before.value - 1, sign="+") if before and after and before.value else "–")


def _scored(counts: Iterable[int | None]) -> _Cell:
    return _Cell(" / ".join(f"{n:,}" for n in dict.fromkeys(counts) if n is not None) or "–")


def _convention(task: str) -> str:
    return task.removeprefix("perplexity-")


def _training(losses: list[Row], on_the_way: list[_Group], groups: list[_Group]) -> _Section:
    blocks: list[str | _Table | _Figure] = []
    if losses:
        svg = _drawn("loss", lambda axes: _plot_loss(axes, losses), height=2.6)
        blocks.append(_Figure("loss", svg, "Training loss (nats per token) against the tokens trained on"))
    for run, i in dict.fromkeys((series.run, i) for i, group in enumerate(on_the_way) for series in group.scores):
        way = on_the_way[i].of_run(run)
        per_step = next((row.n / _step(row) for row in losses if row.run == run and row.n and _step(row)), None)
        unit = "tokens" if per_step else "steps"
        points = {(_step(next(iter(s.values()))) or 0) * (per_step or 1): s for s in way.scores.values()}
        points |= _start(way, groups)
        points = dict(sorted(points.items()))
        name = f"on-the-way-{sum(isinstance(block, _Table) for block in blocks) + 1}"
        title = f"{run}: perplexity by position on the way, {_convention(way.task)}"
        svg = _drawn(name, lambda axes, p=points, w=way, u=unit: _plot_way(axes, p, w.buckets, u), height=2.6)
        head = [_Cell(unit, "trained"), *(_Cell("all" if s not in way.buckets else _range(s)) for s in way.spans)]
        body = [[_Cell(_count(at)), *(_score(scores.get(s)) for s in way.spans)] for at, scores in points.items()]
        blocks += [_Figure(name, svg, title), _Table(title, head, body)]
    return _Section("Training", blocks)


def _start(way: _Group, groups: list[_Group]) -> dict[float, dict[_Span, Row]]:
    """The scores before the first step: the source in the layout that is trained."""
    trained = next(iter(way.scores))
    for group in groups:
        if (group.task, group.length) == (way.task, way.length):
            for series, scores in group.scores.items():
                if (series.run, series.layout) == (trained.run, trained.layout) and not series.adapted:
                    return {0: scores}
    return {}


def _cost(costs: list[Row], speeds: list[Row]) -> _Section:
    tables = []
    places = dict.fromkeys((row.run, row.model, row.length) for row in costs if row.metric != "layers")
    for place in places:
        metrics = {"attention_pairs": "attention pairs", "cached_tokens": "cached tokens"}
        here = [row for row in costs if (row.run, row.model, row.length) == place]
        found = {(row.layout, row.metric): row.value for row in here}
        layouts = dict.fromkeys(row.layout for row in here)
        columns = [_shares([found.get((layout, metric)) for layout in layouts], fewer=True) for metric in metrics]
        body = [[_Cell(layout), *cells] for layout, *cells in zip(layouts, *columns, strict=True)]
        title = f"{place[0]}: one text of {place[2]:,} tokens, counted over all layers"
        tables.append(_Table(title, [_Cell("layout"), *map(_Cell, metrics.values())], body))
    for run, length in dict.fromkeys((row.run, row.length) for row in speeds):
        here = [row for row in speeds if (row.run, row.length) == (run, length)]
        cells = _shares([row.value for row in here], fewer=False)
        body = [[_Cell(_series(row).name, row.layout), cell] for row, cell in zip(here, cells, strict=True)]
        context = f" of contexts of {length:,} tokens" if length is not None else ""
        tables.append(_Table(f"{run}: evaluation{context}, timed", [_Cell("model"), _Cell("tokens per second")], body))
    prose = (
        "Attention pairs are the (query, key) pairs that attention computes; cached tokens are the keys that "
        "generation keeps. Both are exact counts. Speed is one timing of the evaluation that gave the perplexities: "
        "take small differences as noise."
    )
    return _Section("Cost against full attention", [prose, *tables] if tables else [])


def _shares(values: list[float | None], *, fewer: bool) -> list[_Cell]:
    """Numbers with bars and, from the second on, the ratio to the first."""
    longest = max((value for value in values if value), default=0)
    cells = []
    for i, value in enumerate(values):
        if value is None:
            cells.append(_Cell("–"))
            continue
        first, ratio = values[0], ""
        if i and first and value:
            ratio = f"{_percent(value / first)}, {first / value:.2f}× fewer" if fewer else f"{value / first:.2f}×"
        cells.append(_Cell(_count(value), ratio, value / longest if longest else None))
    return cells


def _others(rows: list[Row]) -> _Section:
    columns = ("run", "model", "layout", "task", "metric", "value", "low", "high", "n", "length", "position_from",
               "position_to", "depth", "seed")  # fmt: skip
    shown = [asdict(row) for row in rows]
    columns = tuple(column for column in columns if any(row[column] is not None for row in shown))
    body = [[_Cell(_plain(row[column])) for column in columns] for row in shown]
    table = _Table("", [_Cell(column.replace("_", " ")) for column in columns], body, numeric=False)
    return _Section("Other rows", [table] if rows else [])


def _plain(value: Any) -> str:
    return "–" if value is None else f"{value:,.6g}" if isinstance(value, float) else str(value)


def _method(rows: Sequence[Row]) -> _Section:
    facts: dict[str, dict[str, None]] = defaultdict(dict)
    for row in rows:
        convention = _convention(row.task)
        if row.task != convention:
            facts["convention"][f"{convention}: {_CONVENTIONS.get(convention, 'as its evaluation defines it')}"] = None
        if row.low is not None and row.task != convention:
            facts["intervals"]["95 %, bootstrap over documents"] = None
        if _step(row) is None:
            facts["models"][row.model] = None
        facts["seed"][str(row.seed)] = None
        facts["device"][row.device] = None
        facts["versions"][", ".join(f"{name} {version}" for name, version in row.versions.items())] = None
        commit = row.commit or "not known: an installed package"
        facts["commit"][commit.replace("+", " with uncommitted changes")] = None
    body = [[_Cell(name), _Cell("; ".join(values))] for name, values in facts.items()]
    return _Section("How it was measured", [_Table("", [_Cell(""), _Cell("")], body, numeric=False)])


# Figures


def _drawn(name: str, plot: Callable[[Axes], None], *, height: float = 3.3) -> str:
    """A plot as an SVG element in the colour of the text around it, whose ids no other figure has."""
    style = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9, "lines.linewidth": 1.8}
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    with matplotlib.style.context(["default", style]):
        figure = Figure(figsize=(7.2, height), layout="constrained")
        axes = figure.add_subplot()
        plot(axes)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
        labels = axes.get_legend_handles_labels()[1]
        columns = max(1, min(len(labels), 100 // (max(map(len, labels), default=0) + 7)))
        legend = figure.legend(
            loc="outside upper left", ncols=columns, frameon=False, borderaxespad=0, handlelength=2.8
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    svg = file.getvalue()
    svg = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL
    )
    svg = svg.replace("xlink:href", "href").replace(INK, "currentColor")
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", svg)
    width, high = figure.get_size_inches() * 72
    return re.sub(r"<svg[^>]*>", f'<svg viewBox="0 0 {width:g} {high:g}">', svg, count=1).strip()


def _standalone(svg: str) -> str:
    style = "<style>svg{color:#1b1b1b}@media(prefers-color-scheme:dark){svg{color:#e8e8e8}}</style>"
    return re.sub(r"<svg([^>]*)>", rf'<svg xmlns="http://www.w3.org/2000/svg"\1>{style}', svg, count=1)


def _plot_positions(axes: Axes, group: _Group) -> None:
    buckets = group.buckets
    left = buckets[0][0] or buckets[0][1] / 2  # a logarithmic axis has no 0
    adapted = {(series.run, series.layout) for series in group.scores if series.adapted}
    several = len({series.run for series in group.scores}) > 1
    inks = itertools.cycle(("-", ":", "-."))
    hues: dict[tuple[str, str], str] = {}
    for series, scores in group.scores.items():
        place = (series.run, series.layout)
        if series.layout == DENSE and not series.adapted:
            color, line = INK, next(inks)
        else:
            color = hues.setdefault(place, HUES[len(hues) % len(HUES)])
            line = "--" if place in adapted and not series.adapted else "-"
        label = f"{series.run}: {series.name} {series.layout}" if several else f"{series.name} {series.layout}"
        here = [(max(a, left), b, scores[a, b]) for a, b in buckets if (a, b) in scores]
        x = [math.sqrt(a * b) for a, b, _ in here]
        axes.plot(x, [_finite(row.value) for *_, row in here], line, color=color, marker="o", markersize=4, label=label)
        low, high = zip(*(_interval(row) or (math.nan, math.nan) for *_, row in here), strict=True)
        axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    edges = [left, *(end for _, end in buckets)]
    axes.set_xscale("log", base=2)
    axes.set_xlim(left, edges[-1])
    axes.xaxis.set_major_locator(FixedLocator(edges))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{buckets[0][0]:,}", *(f"{edge:,}" for edge in edges[1:])])
    axes.set_xlabel("position (tokens of context)")
    _scale_perplexity(axes, [row.value for scores in group.scores.values() for row in scores.values()])


def _plot_loss(axes: Axes, losses: list[Row]) -> None:
    for i, run in enumerate(dict.fromkeys(row.run for row in losses)):
        here = [row for row in losses if row.run == run]
        x = [row.n or 0 for row in here]
        axes.plot(x, [_finite(row.value) for row in here], color=HUES[i % len(HUES)], label=run)
    axes.set_ylabel("training loss")
    _scale_trained(axes, "tokens")


def _plot_way(axes: Axes, points: dict[float, dict[_Span, Row]], buckets: list[_Span], unit: str) -> None:
    for i, bucket in enumerate(buckets, start=1):
        here = [(at, _finite(scores[bucket].value)) for at, scores in points.items() if bucket in scores]
        color = to_rgba(HUES[0], 0.25 + 0.75 * i / len(buckets))
        axes.plot(*zip(*here, strict=True), color=color, marker="o", markersize=3.5, label=_range(bucket))
    _scale_trained(axes, unit)
    _scale_perplexity(axes, [row.value for scores in points.values() for row in scores.values()])


def _scale_trained(axes: Axes, unit: str) -> None:
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda value, _: _short(value))
    axes.set_xlabel(f"{unit} trained on")


def _scale_perplexity(axes: Axes, values: list[float]) -> None:
    """Logarithmic where the values differ by more than a factor of 4."""
    axes.set_ylabel("perplexity")
    found = [value for value in values if math.isfinite(value) and value > 0]
    if found and max(found) > 4 * min(found):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.nan


def _short(value: float) -> str:
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{letter}"
    return f"{value:g}"


def _strips(layouts: dict[tuple[str, int], tuple[str, ...]], windows: list[int]) -> str:
    """The masks of the two kinds, schematic, and under them a strip of layers for each layout."""
    parts = [*_mask(0, "ink", "global layer", ["reads every token", "before it"], window=10)]
    if windows:
        sizes = " or ".join(f"{window:,}" for window in windows)
        parts += _mask(360, "accent", "local layer", [f"reads the last {sizes}", "tokens, itself included"], window=3)
    y = 150
    for (layout, n), kinds in layouts.items():
        counted = f"{kinds.count(GLOBAL)} of {n} layers global"
        parts.append(f'<text x="0" y="{y}"><tspan class="strong">{markup.escape(layout)}</tspan>  {counted}</text>')
        step = min(48.0, 720 / n)
        for i, kind in enumerate(kinds):
            style = "ink" if kind == GLOBAL else "accent"
            parts.append(_rect(i * step, y + 10, step - min(3, step / 5), 26, style))
        y += 70
    style = (
        f".ink{{fill:currentColor}}.accent{{fill:{HUES[0]}}}.faint{{fill:currentColor;opacity:.1}}"
        "text{font:13px system-ui,sans-serif;fill:currentColor}.strong{font-weight:600}"
    )
    return f'<svg viewBox="0 0 720 {y - 24}"><style>{style}</style>{"".join(parts)}</svg>'


def _mask(x: float, style: str, name: str, words: list[str], *, window: int) -> list[str]:
    """Ten tokens: a row for each that reads, a column for each that may be read."""
    cells = [(i, j) for i in range(10) for j in range(10)]
    parts = [_rect(x + 12 * j, 12 * i, 10.5, 10.5, style if 0 <= i - j < window else "faint") for i, j in cells]
    parts.append(f'<text class="strong" x="{x + 136}" y="46">{name}</text>')
    return [*parts, *(f'<text x="{x + 136}" y="{66 + 18 * i}">{word}</text>' for i, word in enumerate(words))]


def _rect(x: float, y: float, width: float, height: float, style: str) -> str:
    return f'<rect class="{style}" x="{x:g}" y="{y:g}" width="{width:.4g}" height="{height:g}"/>'


# Renderings

_CSS = f"""
:root {{ color-scheme: light dark; --paper: #fff; --ink: #1b1b1b; --pale: #6b6b6b; --line: #dedede; --stripe: #f5f5f4;
  --accent: {HUES[0]} }}
@media (prefers-color-scheme: dark) {{ :root {{ --paper: #151515; --ink: #e8e8e8; --pale: #9c9c9c; --line: #353535;
  --stripe: #1e1e1e }} }}
* {{ box-sizing: border-box }}
body {{ margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.6 system-ui, sans-serif }}
body::before {{ content: ""; display: block; height: 14px; background: repeating-linear-gradient(90deg,
  var(--ink) 0 22px, transparent 22px 34px, var(--ink) 34px 40px, transparent 40px 58px, var(--ink) 58px 72px,
  transparent 72px 80px) }}
main {{ max-width: 50rem; margin: 0 auto; padding: 2.5rem 1.25rem 5rem }}
h1 {{ font-size: 2.1rem; line-height: 1.2; letter-spacing: -.02em; margin: 0 0 1rem; overflow-wrap: anywhere }}
h2 {{ font-size: 1.25rem; letter-spacing: -.01em; margin: 3.5rem 0 .75rem }}
p {{ max-width: 42rem; margin: 0 0 1rem }}
.verdict {{ font-size: 1.2rem; line-height: 1.5; border-left: 4px solid var(--accent); padding-left: 1rem }}
figure, .table {{ margin: 1.75rem 0; overflow-x: auto }}
figure svg {{ display: block; width: 100%; min-width: 34rem; height: auto }}
figcaption, caption {{ color: var(--pale); font-size: .85rem; text-align: left; padding: .5rem 0 }}
caption {{ caption-side: top }}
table {{ border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums }}
th, td {{ padding: .4rem .75rem; text-align: left; vertical-align: top }}
th {{ font-weight: 600; vertical-align: bottom; border-bottom: 2px solid var(--ink) }}
tbody tr:nth-child(odd) {{ background: var(--stripe) }}
.numeric th:not(:first-child), .numeric td:not(:first-child) {{ text-align: right; white-space: nowrap }}
small {{ display: block; color: var(--pale); font-size: .8rem; font-weight: 400 }}
.bar {{ display: block; height: 8px; margin: .35rem 0 .15rem auto; background: var(--accent) }}
tr:first-child .bar {{ background: var(--ink) }}
.words td:first-child {{ font-weight: 600 }}
.words td {{ overflow-wrap: anywhere }}
"""


def _html(title: str, verdict: list[str], sections: list[_Section]) -> str:
    body = [f"<h1>{markup.escape(title)}</h1>", *(f'<p class="verdict">{markup.escape(text)}</p>' for text in verdict)]
    for section in sections:
        body.append(f"<section>\n<h2>{section.title}</h2>")
        for block in section.blocks:
            if isinstance(block, _Table):
                body.append(_html_table(block))
            elif isinstance(block, _Figure):
                caption = markup.escape(block.caption)
                svg = block.svg.replace("<svg", f'<svg role="img" aria-label="{caption}"', 1)
                body.append(f"<figure>{svg}<figcaption>{caption}</figcaption></figure>")
            else:
                body.append(f"<p>{markup.escape(block)}</p>")
        body.append("</section>")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{markup.escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def _html_table(table: _Table) -> str:
    def cell(tag: str, cell: _Cell) -> str:
        bar = "" if cell.share is None else f'<span class="bar" style="width:{100 * cell.share:.4g}%"></span>'
        dim = f"<small>{markup.escape(cell.dim)}</small>" if cell.dim else ""
        return f"<{tag}>{markup.escape(cell.text)}{bar}{dim}</{tag}>"

    caption = f"<caption>{markup.escape(table.title)}</caption>" if table.title else ""
    head = "".join(cell("th", found) for found in table.head)
    head = f"<thead><tr>{head}</tr></thead>" if any(found.text for found in table.head) else ""
    body = "\n".join(f"<tr>{''.join(cell('td', found) for found in line)}</tr>" for line in table.body)
    kind = "numeric" if table.numeric else "words"
    return f'<div class="table"><table class="{kind}">{caption}{head}<tbody>\n{body}\n</tbody></table></div>'


def _markdown(stem: str, title: str, verdict: list[str], sections: list[_Section]) -> str:
    blocks = [f"# {_escaped(title)}", *(f"**{_escaped(text)}**" for text in verdict)]
    for section in sections:
        blocks.append(f"## {section.title}")
        for block in section.blocks:
            if isinstance(block, _Table):
                blocks += [_escaped(block.title)] if block.title else []
                blocks.append(_markdown_table(block))
            elif isinstance(block, _Figure):
                blocks.append(f"![{_escaped(block.caption)}]({quote(f'{stem}-{block.name}.svg')})")
            else:
                blocks.append(_escaped(block))
    return "\n\n".join(blocks) + "\n"


def _markdown_table(table: _Table) -> str:
    head = [" ".join(filter(None, (_escaped(cell.text), _escaped(cell.dim)))) for cell in table.head]
    body = [[_escaped(f"{c.text} ({c.dim})" if c.dim else c.text) for c in line] for line in table.body]
    rule = ["---", *("---:" if table.numeric else "---" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *body))


def _escaped(text: str) -> str:
    """Text as Markdown shows it unchanged, on one line."""
    return re.sub(r"([\\`*_\[\]|~#$])", r"\\\1", markup.escape(text.replace("\n", " "), quote=False))
