"""Layer selections on a page: how much the loss needs each layer, and how good the choice is on held-out sequences."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from zebra.errors import ZebraError
from zebra.report.figures import ACCENT, INK, Figure, drawable
from zebra.report.layouts import MOST_LAYERS
from zebra.report.page import Cell, Section, Table
from zebra.report.pivot import interval_cell, split, value_cell
from zebra.report.series import interval, number, series_of, stripes_of
from zebra.results import Result
from zebra.stripes import layer_letters

HOW = (
    "Each layer in turn was made local, while the others stayed as in the source. Its bar is the rise of the loss, in "
    "nats a token, over the tokens that need more than the window. A layer that another can replace has a small bar; "
    "greedy selection, which measures again after each layer that became local, keeps one of the two. The chosen "
    "layout is measured once more on sequences that took no part in the choice, beside the paper's stride at every "
    "offset."
)
_ORDERS = {"greedy": "measured, greedy", "once": "measured, one-shot", "stride": "stride", "local": "all local"}
_REQUIRED = {
    *(("source", metric) for metric in ("layers", "loss", "held_out_loss")),
    ("candidate", "rise"),
    ("stride", "held_out_rise"),
    ("once", "held_out_rise"),
}


class LayerSelection(NamedTuple):
    """The results of one selection for one number of global layers.

    Attributes:
        depth: the number of layers.
        budget: how many of them stay global.
        results: by what was measured ("source", "candidate", or for a held-out layout its key in `_ORDERS`) and metric.
    """

    depth: int
    budget: int
    results: dict[tuple[str, str], list[Result]]

    @property
    def source(self) -> Result:
        """The source's loss on the held-out sequences."""
        return self.results["source", "held_out_loss"][0]

    @property
    def title(self) -> str:
        """What was measured, and how many layers stay global."""
        measured = self.source.task.split("-", 2)[2]
        by = "long-range tokens" if measured in ("text", "text-bos") else f"answers of {measured.replace('+', ', ')}"
        model = f"{series_of(self.source).name}, by {by} in sequences of {self.source.length:,} tokens"
        return f"{model}; {self.budget} of {self.depth} layers stay global"

    @property
    def needs(self) -> dict[int, Result]:
        """For each global layer of the source, the result with only that layer made local."""
        before = _letters(self.results["source", "loss"][0].layout, self.depth)
        needs = {}
        for one in self.results["candidate", "rise"]:
            letters = _letters(one.layout, self.depth)
            changed = [i for i in range(self.depth) if letters[i] != before[i]]
            if len(changed) == 1:
                needs[changed[0]] = one
        return dict(sorted(needs.items()))

    @property
    def held_out(self) -> dict[str, list[Result]]:
        """What layouts add to the held-out loss, by how they were chosen; the selection that was asked for is first."""
        return {order: here for order in _ORDERS if (here := self.results.get((order, "held_out_rise")))}

    @property
    def chosen(self) -> dict[str, str]:
        """The layouts of greedy and one-shot selection, a letter for each layer."""
        orders = [order for order in ("greedy", "once") if order in self.held_out]
        return {order: _letters(self.held_out[order][0].layout, self.depth) for order in orders}

    @property
    def compared(self) -> tuple[Result, Result]:
        """The held-out results of the chosen layout and of the best stride."""
        return self.held_out[next(iter(self.chosen))][0], min(self.held_out["stride"], key=lambda one: one.value)


def _letters(layout: str, depth: int) -> str:
    """G or L for each layer."""
    return layer_letters(stripes_of(layout).layer_types(depth))


def _selections(results: list[Result]) -> list[LayerSelection]:
    """One selection per budget; a stride belongs to the smallest budget that has at least its global layers."""
    selections = []
    groups = split(results, lambda one: (one.run, one.model, one.task.split("-", 2)[2], one.length, str(one.seed)))
    for group in groups.values():
        parts = split(group, lambda one: (one.task.split("-", 2)[1], one.metric))
        if not parts.keys() >= _REQUIRED:
            continue
        layers = parts["source", "layers"][0].value
        if not 1 <= layers <= MOST_LAYERS:
            continue
        depth = int(layers)
        try:
            counts = {id(one): _letters(one.layout, depth).count("G") for one in group}
        except ZebraError:  # a layout of another notation
            continue
        measured = [one for order in ("greedy", "once") for one in parts.get((order, "held_out_rise"), ())]
        budgets = list(dict.fromkeys(counts[id(one)] for one in measured))
        for one in parts["stride", "held_out_rise"]:
            counts[id(one)] = min((n for n in budgets if n >= counts[id(one)]), default=max(budgets))
        for budget in budgets:
            here = {
                (part, metric): [
                    one for one in same if part not in ("greedy", "once", "stride") or counts[id(one)] == budget
                ]
                for (part, metric), same in parts.items()
            }
            if here["stride", "held_out_rise"]:
                selections.append(LayerSelection(depth, budget, here))
    return selections


def selection(results: list[Result]) -> Section:
    """A figure and two tables for each selection."""
    blocks: list[str | Table | Figure] = [HOW]
    for i, one in enumerate(_selections(results), start=1):
        caption = f"What each layer is needed for: {one.title}"
        plot = partial(_plot_needs, selection=one)
        blocks.append(Figure(f"selection-{i}", [plot], caption, [*one.needs.values()], height=2.6))
        blocks += [_held_out_table(one), _needs_table(one)]
    return Section("Which layers stay global", blocks if len(blocks) > 1 else [])


def selection_summaries(results: list[Result]) -> list[list[Cell]]:
    """A line for each selection: what its layout adds to the held-out loss, and what the paper's best stride adds."""
    lines = []
    for one in _selections(results):
        chosen, best = one.compared
        worth = [Cell(f"{result.value:.4f}", results=[result]) for result in (chosen, best)]
        where = f" nats a token to the loss of {series_of(chosen).name} on held-out sequences; "
        stride = f"the paper's stride at its best offset, {best.layout}, adds "
        lines.append([Cell(f"{chosen.layout} adds "), worth[0], Cell(where + stride), worth[1], Cell(".")])
    return lines


def better_strides(results: list[Result]) -> list[str]:
    """A warning for each selection whose layout is worse than a stride of the paper on the held-out sequences."""
    pairs = (one.compared for one in _selections(results))
    return [
        f"on held-out sequences the stride {best.layout} loses less than {chosen.layout}: {best.value:+.4f} against "
        f"{chosen.value:+.4f} nats per token. Use more samples, or this layout: --stripes {best.layout}."
        for chosen, best in pairs
        if best.value < chosen.value
    ]


def incomplete(results: list[Result]) -> list[Result]:
    """Results of incomplete selections, which no figure shows."""
    shown = {id(one) for selection in _selections(results) for same in selection.results.values() for one in same}
    return [one for one in results if id(one) not in shown]


def _plot_needs(axes: Axes, selection: LayerSelection) -> None:
    needs, kinds = selection.needs, next(iter(selection.chosen.values()))
    for letter, color, label in (("G", INK, "stays global"), ("L", ACCENT, "becomes local")):
        rises = {i: drawable(one.value) for i, one in needs.items() if kinds[i] == letter}
        axes.bar(list(rises), list(rises.values()), color=color, label=label, width=0.8)
    bounds = {i: bounds for i, one in needs.items() if (bounds := interval(one))}
    if bounds:
        low, high = ([*map(drawable, side)] for side in zip(*bounds.values(), strict=True))
        axes.vlines(list(bounds), low, high, color="#888", linewidth=1.2)
    axes.axhline(0, color=INK, linewidth=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    axes.set(xlim=(-0.6, selection.depth - 0.4), xlabel="layer", ylabel="rise of the loss, nats a token")


def _needs_table(selection: LayerSelection) -> Table:
    chosen = selection.chosen
    head = [Cell("layer"), Cell("rise", "when local"), *(Cell(_ORDERS[order]) for order in chosen)]
    body = [
        [Cell(str(i)), _rise(one), *(Cell("global" if kinds[i] == "G" else "local") for kinds in chosen.values())]
        for i, one in selection.needs.items()
    ]
    return Table(f"{selection.source.run}: {selection.title}", head, body)


def _held_out_table(selection: LayerSelection) -> Table:
    source = selection.source
    body = []
    for order, layouts in {"": [source], **selection.held_out}.items():
        for one in layouts:
            letters = _letters(one.layout, selection.depth)
            name = _ORDERS.get(order, "the source") + (f" from layer {letters.index('G')}" if order == "stride" else "")
            loss, rise = value_cell([source]), Cell("")
            if order:
                loss, rise = Cell(number(source.value + one.value), results=[source, one]), _rise(one)
            body.append([Cell(name), Cell(one.layout), Cell(str(letters.count("G")), results=[one]), loss, rise])
    head = [Cell("held out"), Cell("layout"), Cell("global", "layers"), Cell("loss"), Cell("rise", "over the source")]
    title = f"{source.run}: sequences that took no part in the choice, {source.n or 0:,} tokens"
    return Table(title, head, body)


def _rise(result: Result) -> Cell:
    return interval_cell([result], lambda value: f"{value:+.4f}", between=" to ")
