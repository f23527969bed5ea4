"""Layouts on a page: what a layer of each kind reads, which layers are of which kind, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from matplotlib.axes import Axes
from matplotlib.colors import to_rgba

from zebra.errors import ZebraError
from zebra.report.figures import ACCENT, INK, Figure, plot_cells
from zebra.report.page import Cell, Section
from zebra.report.pivot import Results, Show, split, table, where
from zebra.report.series import count, percent, series_of, stripes_of
from zebra.results import Result
from zebra.stripes import GLOBAL, LOCAL

MOST_LAYERS = 1_000
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
LayerTypes = Mapping[tuple[str, int], tuple[str, ...]]
"""The kind of each layer, by layout and number of layers."""


def layouts(costs: list[Result]) -> Section:
    """A figure of the layouts, whose depths are in the results that count layers."""
    kinds: dict[tuple[str, int], tuple[str, ...]] = {}
    results = []
    windows = set()
    for cost in costs:
        key = cost.layout, int(cost.value) if 1 <= cost.value <= MOST_LAYERS else 0
        if cost.metric != "layers" or not key[1] or key in kinds:
            continue
        try:
            stripes = stripes_of(cost.layout)
            kinds[key] = stripes.layer_types(key[1])
        except ZebraError:  # a layout of another notation has no figure
            continue
        results.append(cost)
        if LOCAL in kinds[key]:
            windows.add(stripes.window)
    if not kinds:
        return Section("The layout", [])
    plots = [partial(_plot_mask, color=INK, window=_TOKENS, text="global layer:\nreads every\ntoken before it")]
    if windows:
        sizes = " or ".join(f"{window:,}" for window in sorted(windows))
        text = f"local layer:\nreads the last {sizes}\ntokens, itself included"
        plots.append(partial(_plot_mask, color=ACCENT, window=3, text=text))
    widths = [*(1 for _ in plots), 5 - len(plots)]
    caption = "What a layer of each kind sees, and where each kind stands"
    height = max(1.9, 0.3 + 0.52 * len(kinds))
    figure = Figure("layout", [*plots, partial(_plot_layers, kinds=kinds)], caption, results, height, widths=widths)
    return Section("The layout", [LAYERS, figure])


def _plot_mask(axes: Axes, color: str, window: int, text: str) -> None:
    """A schematic mask: a row for each query, a column for each key."""
    cells = [
        {"xy": (j, i), "width": 0.88, "height": 0.88, "color": color if 0 <= i - j < window else to_rgba(INK, 0.1)}
        for i in range(_TOKENS)
        for j in range(_TOKENS)
    ]
    plot_cells(axes, _TOKENS, _TOKENS, cells)
    axes.set(aspect="equal", anchor="N", xlabel=text)


def _plot_layers(axes: Axes, kinds: LayerTypes) -> None:
    """A row of layers for each layout, under its name, which links to the result."""
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
    axes.set(xlim=(-0.5 - 0.06 * most, most - 0.5), ylim=(len(kinds) - 0.7, -0.7))


def cost(costs: list[Result], speeds: list[Result]) -> Section:
    """Exact counts and timings, with full attention and with stripes."""
    tables = []
    counts = [one for one in costs if one.metric in _METRICS]
    for (run, _, length), here in split(counts, lambda one: (one.run, one.model, one.length)).items():
        lines = [([Cell(layout)], same) for layout, same in split(here, lambda one: one.layout).items()]
        by_metric = split(here, lambda one: one.metric)
        columns = [
            (Cell(name), where(_shares(by_metric.get(metric, ()), fewer=True), metric=metric))
            for metric, name in _METRICS.items()
        ]
        title = f"{run}: one text of {length:,} tokens, counted over all layers"
        tables.append(table(title, [Cell("layout")], lines, columns))
    for (run, length), here in split(speeds, lambda one: (one.run, one.length)).items():
        context = f" of contexts of {length:,} tokens" if length is not None else ""
        lines = [([Cell(one.name, one.layout)], same) for one, same in split(here, series_of).items()]
        columns = [(Cell("tokens per second"), _shares(here, fewer=False))]
        tables.append(table(f"{run}: evaluation{context}, timed", [Cell("model")], lines, columns))
    return Section("Cost against full attention", [COSTS, *tables] if tables else [])


def _shares(column: Results, *, fewer: bool) -> Show:
    """Show the numbers of a column with bars, and from the second on with their ratio to the first."""
    longest = max((one.value for one in column if one.value), default=0)

    def show(results: Results) -> Cell:
        if not results:
            return Cell("–")
        first, one, ratio = column[0], results[0], ""
        if first is not one and first.value and one.value:
            share = one.value / first.value
            ratio = f"{percent(share)}, {1 / share:.2f}× fewer" if fewer else f"{share:.2f}×"
        bar = one.value / longest if longest else None
        return Cell(count(one.value), ratio, bar, results, [first, one] if ratio else [])

    return show
