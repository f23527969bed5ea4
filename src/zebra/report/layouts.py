"""The layouts of a page: what a layer of each kind reads, which layers are of which kind, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from matplotlib.axes import Axes
from matplotlib.colors import to_rgba

from zebra.errors import ZebraError
from zebra.report.figures import ACCENT, INK, draw, plot_cells
from zebra.report.page import Cell, Figure, Section
from zebra.report.pivot import Column, Results, pivot_table, split
from zebra.report.series import FULL, count, percent, series_of
from zebra.results import Result
from zebra.stripes import GLOBAL, LOCAL, Stripes

_MOST_LAYERS = 1_000
_TOKENS = 10
"""Tokens of the schematic masks."""
LAYERS = (
    "Each cell is a layer, the first one on the left. A global layer compares every token with all tokens before "
    "it. A local layer looks at a window of recent tokens only, which costs far less; what lies farther back "
    "reaches it through the global layers below."
)
COSTS = (
    "Attention pairs are the (query, key) pairs that attention computes; cached tokens are the keys that "
    "generation keeps. Both are exact counts. Speed is one timing of the evaluation that gave the perplexities: "
    "take small differences as noise."
)
_METRICS = {"attention_pairs": "attention pairs", "cached_tokens": "cached tokens"}


def layouts(costs: list[Result]) -> Section:
    """The layouts of results that count layers."""
    kinds: dict[tuple[str, int], tuple[str, ...]] = {}
    results: dict[tuple[str, int], Result] = {}
    windows = set()
    for cost in (cost for cost in costs if cost.metric == "layers" and 1 <= cost.value <= _MOST_LAYERS):
        key = cost.layout, int(cost.value)
        try:
            stripes = Stripes(1, pattern="G") if cost.layout == FULL else Stripes.parse(cost.layout)
            kinds[key] = stripes.layer_types(int(cost.value))
        except ZebraError:  # a layout of another notation has no figure
            continue
        results.setdefault(key, cost)
        if LOCAL in kinds[key]:
            windows.add(stripes.window)
    if not kinds:
        return Section("The layout", [])
    masks = [partial(_plot_mask, color=INK, window=_TOKENS, text="global layer:\nreads every\ntoken before it")]
    if windows:
        sizes = " or ".join(f"{window:,}" for window in sorted(windows))
        text = f"local layer:\nreads the last {sizes}\ntokens, itself included"
        masks.append(partial(_plot_mask, color=ACCENT, window=3, text=text))
    svg = draw(
        "layout",
        *masks,
        partial(_plot_layers, kinds=kinds),
        height=max(1.9, 0.3 + 0.52 * len(kinds)),
        widths=[*(1 for _ in masks), 5 - len(masks)],
    )
    caption = "What a layer of each kind sees, and where each kind stands"
    return Section("The layout", [LAYERS, Figure("layout", svg, caption, list(results.values()))])


def _plot_mask(axes: Axes, color: str, window: int, text: str) -> None:
    """A line for each token that reads, a column for each that may be read."""
    plot_cells(
        axes,
        _TOKENS,
        _TOKENS,
        (
            {"xy": (j, i), "width": 0.88, "height": 0.88, "color": color if 0 <= i - j < window else to_rgba(INK, 0.1)}
            for i in range(_TOKENS)
            for j in range(_TOKENS)
        ),
    )
    axes.set_aspect("equal", anchor="N")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel(text)


def _plot_layers(axes: Axes, kinds: dict[tuple[str, int], tuple[str, ...]]) -> None:
    """A strip of layers for each layout, under its name, which links to the result."""
    most = max(n for _, n in kinds)
    cells = []
    for line, ((layout, n), layers) in enumerate(kinds.items()):
        width = min(most / n, most / 15)
        for i, kind in enumerate(layers):
            color = INK if kind == GLOBAL else ACCENT
            center = (i + 0.5) * width - 0.5
            cells.append({"xy": (center, line), "width": 0.9 * width, "height": 0.5, "color": color})
        text = f"{layout}: {layers.count(GLOBAL)} of {n} layers global"
        axes.text(-0.5, line - 0.33, text, url=f"@{line}", verticalalignment="bottom")
    plot_cells(axes, most, len(kinds), cells)
    axes.set_xlim(-0.5 - 0.06 * most, most - 0.5)
    axes.set_ylim(len(kinds) - 0.7, -0.7)
    axes.set_xticks([])
    axes.set_yticks([])


def cost(costs: list[Result], speeds: list[Result]) -> Section:
    """Exact counts and timings, full and striped."""
    tables = []
    texts = split(costs, lambda one: (one.run, one.model, one.length))
    for (run, _, length), here in texts.items():
        lines = {layout: [Cell(layout)] for layout in dict.fromkeys(one.layout for one in here)}
        places = split(here, lambda one: (one.layout, one.metric))
        columns = {
            metric: Column(Cell(name), _shares([places.get((layout, metric), ()) for layout in lines], fewer=True))
            for metric, name in _METRICS.items()
        }
        if any(one.metric in _METRICS for one in here):
            title = f"{run}: one text of {length:,} tokens, counted over all layers"
            tables.append(pivot_table(title, [Cell("layout")], lines, columns, places))
    for (run, length), here in split(speeds, lambda one: (one.run, one.length)).items():
        context = f" of contexts of {length:,} tokens" if length is not None else ""
        series = split(here, series_of)
        speed = Column(Cell("tokens per second"), _shares([*series.values()], fewer=False))
        title = f"{run}: evaluation{context}, timed"
        models = {one: [Cell(one.name, one.layout)] for one in series}
        timed = {(one, "speed"): results for one, results in series.items()}
        tables.append(pivot_table(title, [Cell("model")], models, {"speed": speed}, timed))
    return Section("Cost against full attention", [COSTS, *tables] if tables else [])


def _shares(column: Sequence[Results], *, fewer: bool) -> Callable[[Results], Cell]:
    """What a column shows: numbers with bars and, from the second line on, the ratio to the first."""
    longest = max((one.value for results in column for one in results if one.value), default=0)
    first = column[0][0] if column[0] else None

    def show(results: Results) -> Cell:
        if not results:
            return Cell("–")
        one, ratio = results[0], ""
        if first and first is not one and first.value and one.value:
            share = one.value / first.value
            ratio = f"{percent(share)}, {1 / share:.2f}× fewer" if fewer else f"{share:.2f}×"
        bar = one.value / longest if longest else None
        return Cell(count(one.value), ratio, bar, results, [first, one] if first and ratio else [])

    return show
