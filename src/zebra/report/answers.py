"""Instruction tuning on a page: the loss on answers before, during and after training, and what was trained on."""

from __future__ import annotations

from functools import partial

from matplotlib.axes import Axes

from zebra.report.figures import Figure, drawable
from zebra.report.page import Cell, Section, Table
from zebra.report.pivot import Results, change_words, interval_cell, split, table, where
from zebra.report.series import percent, series_of, short_layouts, step, trained_series
from zebra.results import Result

_METRICS = ("samples", "tokens")


def answers(results: list[Result]) -> Section:
    """The loss on the answers of each suite: a figure over the steps, and a table for each run."""
    blocks: list[str | Table | Figure] = []
    if any(step(one) is not None for one in results):
        caption = "Loss on the answers (nats per token) over training, suite by suite"
        blocks.append(Figure("answers", [partial(_plot_losses, results=results)], caption, results, height=2.6))
    blocks += map(_table, split(results, lambda one: one.run).values())
    return Section("Answers", blocks)


def _suite(result: Result) -> str:
    return result.task.removeprefix("answers-")


def answer_summary(run: str, results: list[Result]) -> list[Cell]:
    """In words, how tuning changed the loss on each suite's answers, compared with the source."""
    words: list[Cell] = []
    for suite, losses in split(results, _suite).items():
        losses = [one for one in losses if one.run == run and step(one) is None]
        trained = trained_series(map(series_of, losses))
        after = next((one for one in losses if series_of(one) == trained), None)
        if after is not None and losses[0] is not after:
            words.append(Cell(f"{', ' if words else 'The loss '}on {suite} answers "))
            words += change_words(losses[0], after)
    return [*words, Cell(". ")] if words else []


def _table(results: list[Result]) -> Table:
    """A row for each model or step, a column for each suite."""
    layouts = short_layouts(one.layout for one in results)

    def names(one: Result) -> tuple[str, str]:
        at = step(one)
        return series_of(one).name if at is None else f"step {at:,}", layouts[one.layout]

    lines = [([Cell(*line)], here) for line, here in split(results, names).items()]
    columns = [
        (Cell(_suite(one), f"{one.n or 0:,} tokens", dim_results=[one]), where(interval_cell, task=task))
        for task, (one, *_) in split(results, lambda one: one.task).items()
    ]
    title = f"{results[0].run}: nats per token of the answers, lower is better"
    return table(title, [Cell("loss on answers")], lines, columns)


def _plot_losses(axes: Axes, results: list[Result]) -> None:
    """A line for each suite; step 0 is the source in the layout that is trained."""
    several = len({one.run for one in results}) > 1
    trained = {(one.run, one.layout) for one in results if step(one) is not None}
    points: dict[str, list[tuple[int, float]]] = {}
    for one in results:
        at = step(one)
        if at is not None or (not series_of(one).is_output and (one.run, one.layout) in trained):
            name = f"{one.run}: {_suite(one)}" if several else _suite(one)
            points.setdefault(name, []).append((at or 0, drawable(one.value)))
    for name, line in points.items():
        axes.plot(*zip(*sorted(line), strict=True), label=name)
    axes.set_xlim(left=0)
    axes.set(xlabel="steps", ylabel="loss on answers")


def composition(results: list[Result]) -> Section:
    """What each run was trained on, by length and kind."""
    blocks: list[str | Table | Figure] = []
    for i, (run, counts) in enumerate(split(results, lambda one: one.run).items(), start=1):
        caption = f"{run}: conversations trained on by length and kind, shares of the samples and of the tokens"
        plots = [partial(_plot_shares, counts=counts, metric=metric) for metric in _METRICS]
        blocks += [Figure(f"instructions-{i}", plots, caption, counts, height=2.8), _composition_table(counts)]
    return Section("What it was tuned on", blocks)


def _total(counts: Results) -> float:
    return sum(one.value for one in counts) or 1.0


def _kind(result: Result) -> str:
    return result.task.removeprefix("instructions-")


def _composition_table(counts: list[Result]) -> Table:
    by_metric = split(counts, lambda one: one.metric)

    def share(here: Results) -> Cell:
        if not here:
            return Cell("0")
        every = by_metric[here[0].metric]
        return Cell(f"{here[0].value:,.0f}", percent(here[0].value / _total(every), 0), None, here, every)

    def answered(here: Results) -> Cell:
        both = [one for metric in ("answer_tokens", "tokens") for one in here if one.metric == metric]
        if len(both) < 2 or not both[1].value:
            return Cell("–")
        return Cell(percent(both[0].value / both[1].value, 0), results=both)

    groups = split(counts, lambda one: (_kind(one), one.position_from or 0))
    lines = [([Cell(kind), Cell(f"{start:,}+")], here) for (kind, start), here in groups.items()]
    columns = [(Cell(metric), where(share, metric=metric)) for metric in _METRICS]
    columns.append((Cell("answers", "of the tokens"), answered))
    return table("", [Cell("kind"), Cell("length", "tokens")], lines, columns)


def _plot_shares(axes: Axes, counts: list[Result], metric: str) -> None:
    """Stacked bars of the kinds, a bar for each length."""
    counts = [one for one in counts if one.metric == metric]
    starts = sorted({one.position_from or 0 for one in counts})
    base = [0.0] * len(starts)
    for kind, here in split(counts, _kind).items():
        share_by_start = {one.position_from or 0: one.value / _total(counts) for one in here}
        shares = [share_by_start.get(start, 0.0) for start in starts]
        axes.bar(range(len(starts)), shares, bottom=base, label=kind, width=0.7)
        base = [a + b for a, b in zip(base, shares, strict=True)]
    axes.set_xticks(range(len(starts)), [f"{start:,}+" for start in starts])
    axes.set(xlabel="tokens of the conversation", ylabel=f"share of the {metric}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
