"""Instruction tuning on a page: the loss on answers before, on the way and after, and what was trained on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from matplotlib.axes import Axes

from zebra.report.figures import HUES, draw
from zebra.report.page import Cell, Figure, Section, Table
from zebra.report.series import interval, number, outcome, percent, series_of, step
from zebra.results import Result

_SUITE, _KIND = "answers-", "instructions-"


def answers(rows: list[Result]) -> Section:
    """The loss on the answers of each suite: a line over the steps, and a table."""
    tables = answer_tables(rows)
    on_the_way = [row for row in rows if step(row) is not None]
    blocks: list[str | Table | Figure] = []
    if on_the_way:
        svg = draw("answers", lambda axes: _plot_way(axes, _with_start(rows)), height=2.6)
        caption = "Loss on the answers (nats per token) over training, suite by suite"
        blocks.append(Figure("answers", svg, caption, rows))
    return Section("Answers", [*blocks, *tables])


def verdict(run: str, rows: list[Result]) -> list[Cell]:
    """What tuning did to the loss on each suite's answers, against the source as it was."""
    said: list[Cell] = []
    for task in dict.fromkeys(row.task for row in rows):
        mine = [row for row in rows if (row.run, row.task) == (run, task) and step(row) is None]
        made = outcome(map(series_of, mine))
        after = next((row for row in mine if series_of(row) == made), None)
        if after is not None and mine[0] is not after:
            way = "fell" if after.value < mine[0].value else "rose"
            said.append(Cell(f"{', ' if said else 'The loss '}on {task.removeprefix(_SUITE)} answers {way} from "))
            said += [_value(mine[0]), Cell(" to "), _value(after)]
    return [*said, Cell(". ")] if said else []


def _value(row: Result) -> Cell:
    return Cell(number(row.value), results=[row])


def answer_tables(rows: list[Result]) -> list[Table]:
    """A table for each run: models and steps down, suites across."""
    runs: dict[str, dict[tuple[str, str], dict[str, Result]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        at = step(row)
        name = f"step {at:,}" if at is not None else series_of(row).name
        runs[row.run][name, row.layout][row.task.removeprefix(_SUITE)] = row
    tables = []
    for run, models in runs.items():
        suites = list(dict.fromkeys(suite for found in models.values() for suite in found))
        first = {suite: next(found[suite] for found in models.values() if suite in found) for suite in suites}
        head = [Cell("loss on answers")]
        head += [Cell(suite, f"{row.n or 0:,} tokens", dim_results=[row]) for suite, row in first.items()]
        body = [
            [Cell(name, layout), *(_cell(found.get(suite)) for suite in suites)]
            for (name, layout), found in models.items()
        ]
        tables.append(Table(f"{run}: nats per token of the answers, lower is better", head, body))
    return tables


def makeup(rows: list[Result]) -> Section:
    """What each run was trained on, by length and kind."""
    blocks: list[str | Table | Figure] = []
    for i, run in enumerate(dict.fromkeys(row.run for row in rows), start=1):
        mine = [row for row in rows if row.run == run]
        shares = [_stacked(mine, metric) for metric in ("samples", "tokens")]
        svg = draw(f"instructions{i}", *shares, height=2.8)
        caption = f"{run}: conversations trained on, shares of the samples (left) and of the tokens (right), by length "
        blocks += [Figure(f"instructions-{i}", svg, caption + "and kind", mine), _makeup_table(mine)]
    return Section("What it was tuned on", blocks)


def _makeup_table(rows: list[Result]) -> Table:
    found: dict[tuple[str, int], dict[str, Result]] = defaultdict(dict)
    for row in rows:
        found[row.task.removeprefix(_KIND), row.position_from or 0][row.metric] = row
    parts = {metric: [row for row in rows if row.metric == metric] for metric in ("samples", "tokens")}

    def share(has: dict[str, Result], metric: str) -> Cell:
        row = has.get(metric)
        if row is None:
            return Cell("0")
        dim = percent(row.value / _total(rows, metric), 0)
        return Cell(f"{row.value:,.0f}", dim, results=[row], dim_results=parts[metric])

    def answered(has: dict[str, Result]) -> Cell:
        answers, tokens = has.get("answer_tokens"), has.get("tokens")
        if answers is None or tokens is None or not tokens.value:
            return Cell("–")
        return Cell(percent(answers.value / tokens.value, 0), results=[answers, tokens])

    body = [
        [Cell(kind), Cell(f"{low:,}+"), share(has, "samples"), share(has, "tokens"), answered(has)]
        for (kind, low), has in found.items()
    ]
    head = [Cell("kind"), Cell("length", "tokens"), Cell("samples"), Cell("tokens"), Cell("answers", "of the tokens")]
    return Table("", head, body)


def _cell(row: Result | None) -> Cell:
    if row is None:
        return Cell("–")
    bounds = interval(row)
    return _value(row)._replace(dim="–".join(number(bound) for bound in bounds) if bounds else "")


def _with_start(rows: list[Result]) -> dict[str, list[tuple[int, float]]]:
    """Suite to points; step 0 is the source in the layout that is trained."""
    points: dict[str, list[tuple[int, float]]] = defaultdict(list)
    trained = {(row.run, row.layout) for row in rows if step(row) is not None}
    for row in rows:
        at = step(row)
        if at is None and not series_of(row).made and (row.run, row.layout) in trained:
            at = 0
        if at is not None:
            points[f"{row.run}: {row.task.removeprefix(_SUITE)}"].append((at, row.value))
    runs = {row.run for row in rows}
    return {name if len(runs) > 1 else name.partition(": ")[2]: sorted(found) for name, found in points.items()}


def _plot_way(axes: Axes, points: dict[str, list[tuple[int, float]]]) -> None:
    for i, (suite, found) in enumerate(points.items()):
        axes.plot(*zip(*found, strict=True), color=HUES[i % len(HUES)], marker="o", markersize=4, label=suite)
    axes.set_xlim(left=0)
    axes.set_xlabel("steps")
    axes.set_ylabel("loss on answers")


def _total(rows: list[Result], metric: str) -> float:
    return sum(row.value for row in rows if row.metric == metric) or 1.0


def _stacked(rows: list[Result], metric: str) -> Callable[[Axes], None]:
    mine = [row for row in rows if row.metric == metric]
    total = _total(rows, metric)
    lows = sorted({row.position_from or 0 for row in mine})
    kinds = list(dict.fromkeys(row.task.removeprefix(_KIND) for row in mine))

    def plot(axes: Axes) -> None:
        base = [0.0] * len(lows)
        for i, kind in enumerate(kinds):
            here = {row.position_from or 0: row.value / total for row in mine if row.task == _KIND + kind}
            shares = [here.get(low, 0.0) for low in lows]
            axes.bar(range(len(lows)), shares, bottom=base, color=HUES[i % len(HUES)], label=kind, width=0.7)
            base = [a + b for a, b in zip(base, shares, strict=True)]
        axes.set_xticks(range(len(lows)), [f"{low:,}+" for low in lows])
        axes.set_xlabel("tokens of the conversation")
        axes.set_ylabel(f"share of the {metric}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")

    return plot
