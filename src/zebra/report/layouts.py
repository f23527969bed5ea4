"""The layouts of a page as a figure: what a layer of each kind reads, and which layers are of which kind."""

from __future__ import annotations

from functools import partial

from matplotlib.axes import Axes
from matplotlib.colors import to_rgba

from zebra.errors import ZebraError
from zebra.report.figures import ACCENT, INK, draw, plot_cells
from zebra.report.page import Figure, Section
from zebra.report.series import FULL
from zebra.results import Result
from zebra.stripes import GLOBAL, LOCAL, Stripes

_MOST_LAYERS = 10_000
_TOKENS = 10
"""Tokens of the schematic masks."""
PROSE = (
    "Each cell is a layer, the first one on the left. A global layer compares every token with all tokens before "
    "it. A local layer looks at a window of recent tokens only, which costs far less; what lies farther back "
    "reaches it through the global layers below."
)


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
    return Section("The layout", [PROSE, Figure("layout", svg, caption, list(results.values()))])


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
