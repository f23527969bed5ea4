"""Perplexity on a page: by position after training and during it, and in a sentence what training changed."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial

from zebra.report.figures import draw, plot_during_training, plot_loss, plot_positions
from zebra.report.page import Cell, Figure, Section, Table
from zebra.report.pivot import Column, Results, pivot_table, split, value_cell
from zebra.report.series import (
    FULL,
    PositionScores,
    Series,
    Span,
    count,
    interval,
    number,
    percent,
    position_scores,
    series_of,
    span_name,
    step,
    trained_series,
)
from zebra.results import Result

_MANY = 4


def positions(results: list[Result]) -> Section:
    """Perplexity by position: figures, then tables."""
    if not results:
        return Section("Perplexity by position", [])
    blocks: list[str | Table | Figure] = [
        "How well tokens are predicted, by the number of tokens before them; lower is better. Each value has its "
        "95 % interval. The change compares a trained checkpoint with its source."
    ]
    groups = [group for group in position_scores(results) if len(group.buckets) > 1]
    for i, group in enumerate(groups, start=1):
        caption = f"Perplexity by position in contexts of {group.length:,} tokens, {convention(group.task)}"
        svg = draw(f"positions{i}", partial(plot_positions, group=group))
        blocks.append(Figure(f"positions-{i}", svg, caption, group.results))
    return Section("Perplexity by position", [*blocks, *position_tables(results)])


def position_tables(results: list[Result]) -> list[Table]:
    """A table for each run, task and length."""
    return [_position_table(run, group) for run, group in _of_runs(results)]


def _position_table(run: str, group: PositionScores) -> Table:
    """A column for each series, behind that of a trained one its change, and last the tokens."""
    whole = (0, group.length)
    lines = {span: [Cell("all" if span == whole != group.spans[0] else span_name(span))] for span in group.spans}
    columns: dict[Hashable, Column] = {}
    places: dict[tuple[Span, Hashable], Results] = {}
    for series, scores in group.scores.items():
        columns[series] = Column(Cell(series.name, series.layout))
        places |= {(span, series): [score] for span, score in scores.items()}
        if (source := group.source(series)) is not None:
            columns[series, "change"] = Column(Cell("change"), _change)
            before = group.scores[source]
            places |= {(span, (series, "change")): [before[span], scores[span]] for span in scores if span in before}
    columns["tokens"] = Column(Cell("tokens", "scored"), _tokens_scored)
    places |= {(span, "tokens"): [s[span] for s in group.scores.values() if span in s] for span in lines}
    title = f"{run}: contexts of {group.length:,} tokens, {convention(group.task)}"
    return pivot_table(title, [Cell("positions")], lines, columns, places)


def _change(results: Results) -> Cell:
    if not results or not results[0].value:
        return Cell("–")
    before, after = results
    return Cell(percent(after.value / before.value - 1, sign="+"), results=results)


def _tokens_scored(results: Results) -> Cell:
    """How many tokens; of results with the same count, the first is linked."""
    counts = {one.n: one for one in reversed(results) if one.n is not None}
    return Cell(" / ".join(f"{n:,}" for n in reversed(counts)) or "–", results=[*counts.values()])


def convention(task: str) -> str:
    """How perplexity was measured; of another task its name."""
    return task.removeprefix("perplexity-")


def training(losses: list[Result], during: list[Result], outside: list[Result]) -> Section:
    """The loss, and the perplexities during training; those before it are among the ones outside."""
    blocks: list[str | Table | Figure] = []
    if losses:
        svg = draw("loss", lambda axes: plot_loss(axes, losses), height=2.6)
        blocks.append(Figure("loss", svg, "Training loss (nats per token) against the tokens trained on", losses))
    for i, (run, scores) in enumerate(_of_runs(during), start=1):
        per_step = next((one.n / at for one in losses if one.run == run and one.n and (at := step(one))), None)
        unit = "tokens" if per_step else "steps"
        points = {(step(next(iter(by.values()))) or 0) * (per_step or 1): by for by in scores.scores.values()}
        points = dict(sorted((points | _start(scores, outside)).items()))
        name = f"during-training-{i}"
        caption = f"{run}: perplexity by position during training, {convention(scores.task)}"
        plot = partial(plot_during_training, points=points, buckets=scores.buckets, unit=unit)
        blocks.append(Figure(name, draw(name, plot, height=2.6), caption, scores.results))
        columns = {
            span: Column(Cell("all" if span not in scores.buckets else span_name(span))) for span in scores.spans
        }
        lines = {at: [Cell(count(at))] for at in points}
        places = {(at, span): [score] for at, by in points.items() for span, score in by.items()}
        blocks.append(pivot_table("", [Cell(unit, "trained")], lines, columns, places))
    return Section("Training", blocks)


def _of_runs(results: list[Result]) -> list[tuple[str, PositionScores]]:
    runs = split(results, lambda one: one.run)
    return [(run, group) for run, here in runs.items() for group in position_scores(here)]


def _start(during: PositionScores, outside: list[Result]) -> dict[float, dict[Span, Result]]:
    """The scores before the first step: the source in the layout that is trained."""
    trained = next(iter(during.scores))
    place = trained.run, trained.layout, during.task, during.length
    sources = [one for one in outside if (one.run, one.layout, one.task, one.length) == place]
    for group in position_scores(one for one in sources if not series_of(one).is_output):
        return {0: next(iter(group.scores.values()))}
    return {}


def position_summary(run: str, results: list[Result], costs: list[Result]) -> list[Cell]:
    """What training changed at the far positions and at the near ones, and the share of full attention that is left."""
    groups = position_scores(one for one in results if one.run == run)
    longest = max(groups, key=lambda group: group.length, default=None)
    words = _perplexity(longest) if longest else []
    pairs = {one.layout: one for one in costs if (one.run, one.metric) == (run, "attention_pairs") and one.value}
    striped = next((layout for layout in pairs if layout != FULL), None)
    if striped is not None and FULL in pairs:
        share = percent(pairs[striped].value / pairs[FULL].value, 0)
        words.append(Cell(", while attention computes " if words else f"With {striped}, attention computes "))
        words += [Cell(share, results=[pairs[FULL], pairs[striped]]), Cell(" of the pairs of full attention")]
    return [*words, Cell(".")] if words else []


def _perplexity(group: PositionScores) -> list[Cell]:
    far = group.buckets[-1]
    after = trained_series(group.scores)
    before = group.source(after) if after else None
    if after is None or before is None:
        return _each({series: scores[far] for series, scores in group.scores.items() if far in scores}, far)
    a, b = group.scores[before], group.scores[after]
    words: list[Cell] = []
    for span in dict.fromkeys([far, group.buckets[0]]):
        if span in a and span in b:
            words += [Cell(" and " if words else "Perplexity "), *_fall(a[span], b[span])]
            words.append(Cell(f" at positions {span_name(span, ' to ')}"))
    return words


def _each(scores: dict[Series, Result], span: Span) -> list[Cell]:
    """The value of each series; of many, the best and the worst."""
    order: Sequence[Series] = sorted(scores, key=lambda series: scores[series].value)
    many = len(order) > _MANY
    words = [Cell(f"Perplexity at positions {span_name(span, ' to ')} is " + ("between " if many else ""))]
    for i, series in enumerate((order[0], order[-1]) if many else scores):
        words.append(Cell("" if not i else " and " if many else ", "))
        words += [value_cell([scores[series]]), Cell(f" for {series.name} {series.layout}")]
    return words


def _fall(before: Result, after: Result) -> list[Cell]:
    if number(before.value) == number(after.value):
        return [Cell("stayed at "), value_cell([after])]
    a, b = interval(before), interval(after)
    unclear = " (the intervals overlap)" if a and b and a[0] <= b[1] and b[0] <= a[1] else ""
    way = "fell" if after.value < before.value else "rose"
    return [Cell(f"{way} from "), value_cell([before]), Cell(" to "), value_cell([after]), Cell(unclear)]
