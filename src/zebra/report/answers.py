"""Instruction tuning on a page: the loss on answers before, during and after, and what was trained on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial

from matplotlib.axes import Axes

from zebra.report.figures import HUES, draw
from zebra.report.page import Cell, Figure, Section, Table
from zebra.report.pivot import Column, Results, pivot_table, split, value_cell
from zebra.report.series import percent, series_of, step, trained_series
from zebra.results import Result

_PREFIX, _KIND_PREFIX = "answers-", "instructions-"
_METRICS = ("samples", "tokens")


def answers(results: list[Result]) -> Section:
    """The loss on the answers of each suite: a line over the steps, and a table."""
    blocks: list[str | Table | Figure] = []
    if any(step(one) is not None for one in results):
        svg = draw("answers", partial(_plot_losses, points=_points(results)), height=2.6)
        caption = "Loss on the answers (nats per token) over training, suite by suite"
        blocks.append(Figure("answers", svg, caption, results))
    return Section("Answers", [*blocks, *answer_tables(results)])


def answer_summary(run: str, results: list[Result]) -> list[Cell]:
    """What tuning did to the loss on each suite's answers, against the source as it was."""
    words: list[Cell] = []
    for suite, losses in split(results, _suite).items():
        losses = [one for one in losses if one.run == run and step(one) is None]
        trained = trained_series(map(series_of, losses))
        after = next((one for one in losses if series_of(one) == trained), None)
        if after is not None and losses[0] is not after:
            way = "fell" if after.value < losses[0].value else "rose"
            words.append(Cell(f"{', ' if words else 'The loss '}on {suite} answers {way} from "))
            words += [value_cell([losses[0]]), Cell(" to "), value_cell([after])]
    return [*words, Cell(". ")] if words else []


def answer_tables(results: list[Result]) -> list[Table]:
    """A table for each run: models and steps down, suites across."""
    tables = []
    for run, losses in split(results, lambda one: one.run).items():
        lines = {line: [Cell(*line)] for line in map(_line, losses)}
        columns = {
            suite: Column(Cell(suite, f"{first.n or 0:,} tokens", dim_results=[first]))
            for suite, (first, *_) in split(losses, _suite).items()
        }
        title = f"{run}: nats per token of the answers, lower is better"
        places = split(losses, lambda one: (_line(one), _suite(one)))
        tables.append(pivot_table(title, [Cell("loss on answers")], lines, columns, places))
    return tables


def _line(result: Result) -> tuple[str, str]:
    at = step(result)
    return f"step {at:,}" if at is not None else series_of(result).name, result.layout


def _suite(result: Result) -> str:
    return result.task.removeprefix(_PREFIX)


def composition(results: list[Result]) -> Section:
    """What each run was trained on, by length and kind."""
    blocks: list[str | Table | Figure] = []
    for i, (run, counts) in enumerate(split(results, lambda one: one.run).items(), start=1):
        shares = [_stacked_bars(counts, metric) for metric in _METRICS]
        svg = draw(f"instructions{i}", *shares, height=2.8)
        caption = f"{run}: conversations trained on, shares of the samples (left) and of the tokens (right), by length "
        blocks += [Figure(f"instructions-{i}", svg, caption + "and kind", counts), _composition_table(counts)]
    return Section("What it was tuned on", blocks)


def _composition_table(counts: list[Result]) -> Table:
    def share(results: Results, of: list[Result]) -> Cell:
        if not results:
            return Cell("0")
        dim = percent(results[0].value / _total(of), 0)
        return Cell(f"{results[0].value:,.0f}", dim, results=results, dim_results=of)

    def answered(results: Results) -> Cell:
        by_metric = {one.metric: one for one in results}
        answer_tokens, tokens = by_metric.get("answer_tokens"), by_metric.get("tokens")
        if answer_tokens is None or tokens is None or not tokens.value:
            return Cell("–")
        return Cell(percent(answer_tokens.value / tokens.value, 0), results=[answer_tokens, tokens])

    kinds = split(counts, lambda one: (_kind(one), one.position_from or 0))
    lines = {(kind, start): [Cell(kind), Cell(f"{start:,}+")] for kind, start in kinds}
    columns = {
        metric: Column(Cell(metric), partial(share, of=[one for one in counts if one.metric == metric]))
        for metric in _METRICS
    }
    columns["answers"] = Column(Cell("answers", "of the tokens"), answered)
    places: Mapping[tuple[tuple[str, int], str], Results] = {
        **split(counts, lambda one: ((_kind(one), one.position_from or 0), one.metric)),
        **{(line, "answers"): here for line, here in kinds.items()},
    }
    return pivot_table("", [Cell("kind"), Cell("length", "tokens")], lines, columns, places)


def _kind(result: Result) -> str:
    return result.task.removeprefix(_KIND_PREFIX)


def _total(counts: list[Result]) -> float:
    return sum(one.value for one in counts) or 1.0


def _points(results: list[Result]) -> dict[str, list[tuple[int, float]]]:
    """Steps and losses by suite; step 0 is the source in the layout that is trained."""
    points: dict[str, list[tuple[int, float]]] = defaultdict(list)
    several = len({one.run for one in results}) > 1
    trained = {(one.run, one.layout) for one in results if step(one) is not None}
    for one in results:
        at = step(one)
        if at is None and not series_of(one).is_output and (one.run, one.layout) in trained:
            at = 0
        if at is not None:
            points[f"{one.run}: {_suite(one)}" if several else _suite(one)].append((at, one.value))
    return {name: sorted(line) for name, line in points.items()}


def _plot_losses(axes: Axes, points: dict[str, list[tuple[int, float]]]) -> None:
    for i, (suite, line) in enumerate(points.items()):
        axes.plot(*zip(*line, strict=True), color=HUES[i % len(HUES)], marker="o", markersize=4, label=suite)
    axes.set_xlim(left=0)
    axes.set_xlabel("steps")
    axes.set_ylabel("loss on answers")


def _stacked_bars(results: list[Result], metric: str) -> Callable[[Axes], None]:
    counts = [one for one in results if one.metric == metric]
    total = _total(counts)
    starts = sorted({one.position_from or 0 for one in counts})

    def plot(axes: Axes) -> None:
        base = [0.0] * len(starts)
        for i, (kind, here) in enumerate(split(counts, _kind).items()):
            share_by_start = {one.position_from or 0: one.value / total for one in here}
            shares = [share_by_start.get(start, 0.0) for start in starts]
            axes.bar(range(len(starts)), shares, bottom=base, color=HUES[i % len(HUES)], label=kind, width=0.7)
            base = [a + b for a, b in zip(base, shares, strict=True)]
        axes.set_xticks(range(len(starts)), [f"{start:,}+" for start in starts])
        axes.set_xlabel("tokens of the conversation")
        axes.set_ylabel(f"share of the {metric}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")

    return plot
