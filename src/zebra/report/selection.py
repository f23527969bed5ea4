"""Layer selections on a page: what each layer is needed for, and what the choice is worth on held-out sequences."""

from __future__ import annotations

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
    "Each layer in turn was made local, the others left as they are in the source; its bar is what that adds to the "
    "loss of the tokens that need more than the window, in nats a token. A layer that another can replace has a small "
    "bar; greedy selection, which tries again after each layer that became local, keeps one of the two. What was "
    "chosen is measured once more on sequences that took no part in the choice, beside the paper's stride at every "
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
    """The results of one selection for one budget of global layers, by the part of their task and by metric."""

    run: str
    name: str
    measured: str
    length: int | None
    depth: int
    results: dict[tuple[str, str], list[Result]]

    def letters(self, layout: str) -> str:
        """G or L for each layer."""
        if layout == FULL:
            return "G" * self.depth
        kinds = Stripes.parse(layout).layer_types(self.depth)
        return "".join("G" if kind == GLOBAL else "L" for kind in kinds)

    def global_layers(self, result: Result) -> int:
        """How many layers of a result's layout are global."""
        return self.letters(result.layout).count("G")

    @property
    def budget(self) -> int:
        """How many layers it leaves global."""
        return self.global_layers(next(iter(self.chosen.values())))

    def by_budget(self) -> list[LayerSelection]:
        """One for each number of layers that was asked for; a stride goes to the least number that it meets."""
        chosen = [one for order in ("greedy", "once") for one in self.results.get((order, "held_out_rise"), [])]
        budgets = dict.fromkeys(map(self.global_layers, chosen))

        def belongs(part: str, result: Result, budget: int) -> bool:
            count = self.global_layers(result)
            if part == "stride":
                return budget == min((b for b in budgets if b >= count), default=max(budgets))
            return part not in ("greedy", "once") or count == budget

        return [
            self._replace(
                results={key: [one for one in here if belongs(key[0], one, b)] for key, here in self.results.items()}
            )
            for b in budgets
        ]

    @property
    def needs(self) -> dict[int, Result]:
        """What each of the source's global layers adds when it becomes local."""
        source = self.letters(self.results["source", "loss"][0].layout)
        rises = {}
        for one in self.results["candidate", "rise"]:
            changed = [i for i, (a, b) in enumerate(zip(source, self.letters(one.layout), strict=True)) if a != b]
            if len(changed) == 1:
                rises[changed[0]] = one
        return dict(sorted(rises.items()))

    def held_out(self, part: str) -> list[Result]:
        """What the layouts of a part add to the loss of the held-out sequences."""
        return self.results.get((part, "held_out_rise"), [])

    @property
    def chosen(self) -> dict[str, Result]:
        """The layout of each order, the one that was asked for first."""
        return {order: self.held_out(order)[0] for order in ("greedy", "once") if self.held_out(order)}

    @property
    def compared(self) -> tuple[Result, Result]:
        """On the held-out sequences, what was chosen and the stride that loses the least."""
        return next(iter(self.chosen.values())), min(self.held_out("stride"), key=lambda one: one.value)

    @property
    def title(self) -> str:
        """What was measured, and how many layers stay global."""
        by = "long-range tokens" if self.measured == "text" else f"answers of {self.measured.replace('+', ', ')}"
        sequences = f"{self.name}, by {by} in sequences of {self.length:,} tokens"
        return f"{sequences}; {self.budget} of {self.depth} layers stay global"


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
        where = f" nats a token to the loss of {one.name} on held-out sequences; "
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
    shown = {id(one) for selection in _selections(results) for here in selection.results.values() for one in here}
    return [one for one in results if id(one) not in shown]


def _selections(results: list[Result]) -> list[LayerSelection]:
    selections = []
    groups = split(results, lambda one: (one.run, one.model, one.task.split("-", 2)[2], one.length, str(one.seed)))
    for (run, _, measured, length, _), here in groups.items():
        parts = split(here, lambda one: (one.task.split("-", 2)[1], one.metric))
        if parts.keys() >= _REQUIRED:
            depth = int(parts["source", "layers"][0].value)
            of_all_budgets = LayerSelection(run, series_of(here[0]).name, measured, length, depth, parts)
            selections += [one for one in of_all_budgets.by_budget() if one.held_out("stride")]
    return selections


def _plot_needs(axes: Axes, selection: LayerSelection) -> None:
    kinds = selection.letters(next(iter(selection.chosen.values())).layout)
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
    chosen = {order: selection.letters(one.layout) for order, one in selection.chosen.items()}
    head = [Cell("layer"), Cell("rise", "when local"), *(Cell(_ORDERS[order]) for order in chosen)]
    body = [
        [Cell(str(i)), _rise(one), *(Cell("global" if kinds[i] == "G" else "local") for kinds in chosen.values())]
        for i, one in selection.needs.items()
    ]
    return Table(f"{selection.run}: {selection.title}", head, body)


def _held_out_table(selection: LayerSelection) -> Table:
    source = selection.results["source", "held_out_loss"][0]

    def count(one: Result) -> Cell:
        return Cell(str(selection.global_layers(one)), results=[one])

    body = [[Cell("the source"), Cell(source.layout), count(source), value_cell([source]), Cell("")]]
    for part, name in _ORDERS.items():
        for one in selection.held_out(part):
            offset = f" from layer {selection.letters(one.layout).index('G')}" if part == "stride" else ""
            loss = Cell(number(source.value + one.value), results=[source, one])
            body.append([Cell(name + offset), Cell(one.layout), count(one), loss, _rise(one)])
    head = [Cell("held out"), Cell("layout"), Cell("global", "layers"), Cell("loss"), Cell("rise", "over the source")]
    title = f"{selection.run}: sequences that took no part in the choice, {source.n or 0:,} tokens"
    return Table(title, head, body)


def _rise(result: Result) -> Cell:
    return interval_cell([result], lambda value: f"{value:+.4f}", between=" to ")
