"""Layer selections on a page: what each layer is needed for, and what the choice is worth on held-out sequences."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from zebra.report.figures import ACCENT, INK, draw, drawable
from zebra.report.page import Cell, Figure, Section, Table
from zebra.report.pivot import interval_cell, split, value_cell
from zebra.report.series import FULL, interval, number, series_of
from zebra.results import Result
from zebra.stripes import GLOBAL, Stripes

HOW = (
    "Each layer in turn was made local, while the others stayed as in the source. Its bar is the rise of the loss, in "
    "nats a token, over the tokens that need more than the window. A layer that another can replace has a small bar; "
    "greedy selection, which measures again after each layer that became local, keeps one of the two. The chosen "
    "layout is measured once more on sequences that took no part in the choice, beside the paper's stride at every "
    "offset."
)
"""How its pictures are to be read."""
_ORDERS = {"greedy": "measured, greedy", "once": "measured, one-shot", "stride": "stride", "local": "all local"}


_REQUIRED = {
    *(("source", metric) for metric in ("layers", "loss", "held_out_loss")),
    ("candidate", "rise"),
    ("stride", "held_out_rise"),
    ("once", "held_out_rise"),
}


class LayerSelection(NamedTuple):
    """One selection of layers for one budget.

    Attributes:
        title: what was measured, and how many layers stay global.
        depth: the number of layers.
        source: the source's loss on the held-out sequences.
        needs: for each of the source's global layers what it adds to the loss when it becomes local.
        held_out: for each kind of layout what it adds to the loss of the held-out sequences; what was asked for first.
        results: all of these.
    """

    run: str
    model: str
    title: str
    depth: int
    source: Result
    needs: dict[int, Result]
    held_out: dict[str, list[Result]]
    results: list[Result]

    @property
    def chosen(self) -> dict[str, Result]:
        """The layout of each order, the one that was asked for first."""
        return {order: self.held_out[order][0] for order in ("greedy", "once") if self.held_out[order]}

    @property
    def compared(self) -> tuple[Result, Result]:
        """On the held-out sequences, what was chosen and the stride that loses the least."""
        return next(iter(self.chosen.values())), min(self.held_out["stride"], key=lambda one: one.value)


def _letters(layout: str, depth: int) -> str:
    """G or L for each layer."""
    kinds = [GLOBAL] * depth if layout == FULL else Stripes.parse(layout).layer_types(depth)
    return "".join("G" if kind == GLOBAL else "L" for kind in kinds)


def selection(results: list[Result]) -> Section:
    """A figure and two tables for each selection."""
    blocks: list[str | Table | Figure] = [HOW]
    for i, one in enumerate(_selections(results), start=1):
        svg = draw(f"selection{i}", partial(_plot_needs, selection=one), height=2.6)
        caption = f"What each layer is needed for: {one.title}"
        blocks.append(Figure(f"selection-{i}", svg, caption, [*one.needs.values()]))
        blocks += [_held_out_table(one), _needs_table(one)]
    return Section("Which layers stay global", blocks if len(blocks) > 1 else [])


def selection_tables(results: list[Result]) -> list[Table]:
    """The tables alone, for a terminal: the layers, then the comparison."""
    return [table for one in _selections(results) for table in (_needs_table(one), _held_out_table(one))]


def selection_summaries(results: list[Result]) -> list[list[Cell]]:
    """A line for each selection: what its layout loses on held-out sequences, and the best stride of the paper's."""
    lines = []
    for one in _selections(results):
        chosen, best = one.compared
        worth = [Cell(f"{result.value:.4f}", results=[result]) for result in (chosen, best)]
        where = f" nats a token to the loss of {one.model} on held-out sequences; "
        stride = f"the paper's stride at its best offset, {best.layout}, adds "
        lines.append([Cell(f"{chosen.layout} adds "), worth[0], Cell(where + stride), worth[1], Cell(".")])
    return lines


def better_strides(results: list[Result]) -> list[str]:
    """A warning for each selection whose layout a stride of the paper's beats on the held-out sequences."""
    pairs = (one.compared for one in _selections(results))
    return [
        f"on held-out sequences the stride {best.layout} loses less than {chosen.layout}: {best.value:+.4f} against "
        f"{chosen.value:+.4f} nats a token. Give more samples, or take it by --stripes {best.layout}."
        for chosen, best in pairs
        if best.value < chosen.value
    ]


def incomplete(results: list[Result]) -> list[Result]:
    """Results of selections that are not complete, which no figure shows."""
    shown = {id(one) for selection in _selections(results) for one in selection.results}
    return [one for one in results if id(one) not in shown]


def _selections(results: list[Result]) -> list[LayerSelection]:
    groups = split(results, lambda one: (one.run, one.model, one.task.split("-", 2)[2], one.length, str(one.seed)))
    return [selection for here in groups.values() for selection in _selections_of(here)]


def _selections_of(results: list[Result]) -> list[LayerSelection]:
    """One for each number of layers that was asked for; a stride belongs to the least number that it meets."""
    parts = split(results, lambda one: (_part(one), one.metric))
    if not parts.keys() >= _REQUIRED:
        return []
    depth = int(parts["source", "layers"][0].value)
    counts = {id(one): _letters(one.layout, depth).count("G") for one in results}
    rises = split((one for one in results if one.metric == "held_out_rise"), _part)
    budgets = dict.fromkeys(counts[id(one)] for order in ("greedy", "once") for one in rises.get(order, ()))

    def budgets_of(one: Result) -> Collection[int]:
        count = counts[id(one)]
        if _part(one) == "stride":
            return [min((budget for budget in budgets if budget >= count), default=max(budgets))]
        return [count] if _part(one) in ("greedy", "once") else budgets

    selections = []
    for budget in budgets:
        here = [one for one in results if budget in budgets_of(one)]
        held_out = {part: [one for one in rises.get(part, ()) if budget in budgets_of(one)] for part in _ORDERS}
        source, model = parts["source", "held_out_loss"][0], series_of(results[0]).name
        title = f"{model}, by {_measured(source)}; {budget} of {depth} layers stay global"
        needs = _needs(parts["source", "loss"][0], parts["candidate", "rise"], depth)
        if held_out["stride"]:
            selections.append(LayerSelection(source.run, model, title, depth, source, needs, held_out, here))
    return selections


def _part(result: Result) -> str:
    """What of a selection was measured: source, candidate, or the kind of a held-out layout."""
    return result.task.split("-", 2)[1]


def _measured(result: Result) -> str:
    measured = result.task.split("-", 2)[2]
    by = "long-range tokens" if measured == "text" else f"answers of {measured.replace('+', ', ')}"
    return f"{by} in sequences of {result.length:,} tokens"


def _needs(source: Result, candidates: list[Result], depth: int) -> dict[int, Result]:
    """The candidates that differ from the source in one layer, by that layer."""
    needs = {}
    for one in candidates:
        letters = zip(_letters(source.layout, depth), _letters(one.layout, depth), strict=True)
        changed = [i for i, (before, after) in enumerate(letters) if before != after]
        if len(changed) == 1:
            needs[changed[0]] = one
    return dict(sorted(needs.items()))


def _plot_needs(axes: Axes, selection: LayerSelection) -> None:
    kinds = _letters(next(iter(selection.chosen.values())).layout, selection.depth)
    for letter, color, label in (("G", INK, "stays global"), ("L", ACCENT, "becomes local")):
        rises = {i: drawable(one.value) for i, one in selection.needs.items() if kinds[i] == letter}
        axes.bar(list(rises), list(rises.values()), color=color, label=label, width=0.8)
    bounds = {i: bounds for i, one in selection.needs.items() if (bounds := interval(one))}
    if bounds:
        axes.vlines(list(bounds), *zip(*bounds.values(), strict=True), color="#888", linewidth=1.2)
    axes.axhline(0, color=INK, linewidth=0.6)
    axes.set_xlim(-0.6, selection.depth - 0.4)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    axes.set_xlabel("layer")
    axes.set_ylabel("rise of the loss, nats a token")


def _needs_table(selection: LayerSelection) -> Table:
    chosen = {order: _letters(one.layout, selection.depth) for order, one in selection.chosen.items()}
    head = [Cell("layer"), Cell("rise", "when local"), *(Cell(_ORDERS[order]) for order in chosen)]
    body = [
        [Cell(str(i)), _rise(one), *(Cell("global" if kinds[i] == "G" else "local") for kinds in chosen.values())]
        for i, one in selection.needs.items()
    ]
    return Table(f"{selection.run}: {selection.title}", head, body)


def _held_out_table(selection: LayerSelection) -> Table:
    source = selection.source
    layouts = [("the source", source)]
    layouts += [(name, one) for part, name in _ORDERS.items() for one in selection.held_out[part]]
    body = []
    for name, one in layouts:
        letters = _letters(one.layout, selection.depth)
        offset = f" from layer {letters.index('G')}" if name == _ORDERS["stride"] else ""
        count = Cell(str(letters.count("G")), results=[one])
        if one is source:
            loss, rise = value_cell([source]), Cell("")
        else:
            loss, rise = Cell(number(source.value + one.value), results=[source, one]), _rise(one)
        body.append([Cell(name + offset), Cell(one.layout), count, loss, rise])
    head = [Cell("held out"), Cell("layout"), Cell("global", "layers"), Cell("loss"), Cell("rise", "over the source")]
    title = f"{selection.run}: sequences that took no part in the choice, {source.n or 0:,} tokens"
    return Table(title, head, body)


def _rise(result: Result) -> Cell:
    return interval_cell([result], lambda value: f"{value:+.4f}", between=" to ")
