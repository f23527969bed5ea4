"""Perplexity on a page: by position, after and during training, and a sentence on what training changed."""

from __future__ import annotations

from functools import partial

from zebra.report.figures import Figure, plot_during_training, plot_loss, plot_positions
from zebra.report.page import Cell, Section, Table
from zebra.report.pivot import Results, change_words, interval_cell, split, table, value_cell, where
from zebra.report.series import (
    FULL,
    Series,
    Span,
    buckets,
    count,
    percent,
    series_of,
    short_layouts,
    source_of,
    span_name,
    span_of,
    spans,
    step,
    trained_series,
)
from zebra.results import Result

HOW = (
    "Perplexity by the number of tokens before a token; lower is better. Each value has its 95 % interval. The change "
    "compares a trained checkpoint with its source."
)
_MANY = 4
"""Series: more of them are the rows of a table, and the best and worst stand for them in a sentence."""


def positions(results: list[Result]) -> Section:
    """Perplexity by position: a figure for each task and length, and a table for each run with these."""
    blocks: list[str | Table | Figure] = [HOW]
    groups = split(results, lambda one: (one.task, one.length)).values()
    for i, group in enumerate((group for group in groups if len(buckets(group)) > 1), start=1):
        caption = f"Perplexity by position in {_contexts(group[0])}"
        blocks.append(Figure(f"positions-{i}", [partial(plot_positions, results=group)], caption, group))
    blocks += map(_table, split(results, lambda one: (one.run, one.task, one.length)).values())
    return Section("Perplexity by position", blocks if results else [])


def _contexts(one: Result) -> str:
    return f"contexts of {one.length or 0:,} tokens, {convention(one.task)}"


def convention(task: str) -> str:
    """The convention of a perplexity task (`disjoint`, `strided-bos`); of any other task its name."""
    return task.removeprefix("perplexity-")


def _table(results: list[Result]) -> Table:
    """A column for each series, followed by its change from the source if it is trained; last the scored tokens.

    Many series are rows, with a column for each span of positions.
    """
    columns = []
    every = split(results, series_of)
    layouts = short_layouts(one.layout for one in every)
    for series in every:
        columns.append((Cell(series.name, layouts[series.layout]), where(interval_cell, **series._asdict())))
        if (source := source_of(series, every)) is not None:
            columns.append((Cell("change"), partial(_change, before=source, after=series)))
    columns.append((Cell("tokens", "scored"), _tokens_scored))
    by_span, names = split(results, span_of), _span_cells(results)
    title = f"{results[0].run}: {_contexts(results[0])}"
    if len(every) > _MANY:
        rows = [[head, *(show(by_span[span]) for span in names)] for head, show in columns]
        return Table(title, [Cell("model"), *names.values()], rows)
    return table(title, [Cell("positions")], [([name], by_span[span]) for span, name in names.items()], columns)


def _span_cells(results: list[Result]) -> dict[Span, Cell]:
    parts = buckets(results)
    return {span: Cell(span_name(span) if span in parts else "all") for span in spans(results)}


def _change(results: Results, before: Series, after: Series) -> Cell:
    scores = {series_of(one): one for one in results}
    if before not in scores or after not in scores or not scores[before].value:
        return Cell("–")
    share = scores[after].value / scores[before].value
    return Cell(percent(share - 1, sign="+"), results=[scores[before], scores[after]])


def _tokens_scored(results: Results) -> Cell:
    """The numbers of scored tokens; each links to the first result that has it."""
    counts = split((one for one in results if one.n is not None), lambda one: one.n)
    return Cell(" / ".join(f"{n:,}" for n in counts) or "–", results=[same[0] for same in counts.values()])


def training(losses: list[Result], during: list[Result], outside: list[Result]) -> Section:
    """The training loss, and perplexity during training.

    Args:
        outside: perplexities that were not measured during training; those of the source become step 0.
    """
    blocks: list[str | Table | Figure] = []
    if losses:
        caption = "Training loss (nats per token) against the tokens trained on"
        blocks.append(Figure("loss", [partial(plot_loss, losses=losses)], caption, losses, height=2.6))
    groups = split(during, lambda one: (one.run, one.layout, one.task, one.length))
    for i, ((run, layout, task, length), scores) in enumerate(groups.items(), start=1):
        per_step = next((one.n / at for one in losses if one.run == run and one.n and (at := step(one))), None)
        unit = "tokens" if per_step else "steps"
        points = {at * (per_step or 1): here for at, here in split(scores, lambda one: step(one) or 0).items()}
        place = run, layout, task, length
        sources = [one for one in outside if (one.run, one.layout, one.task, one.length) == place]
        before = split((one for one in sources if not series_of(one).is_output), series_of)
        if before:
            points[0] = next(iter(before.values()))
        points = dict(sorted(points.items()))
        plot = partial(plot_during_training, points=points, spans=buckets(scores), unit=unit)
        caption = f"{run}: perplexity by position during training, {convention(task)}"
        blocks.append(Figure(f"during-training-{i}", [plot], caption, scores, height=2.6))
        columns = [
            (name, where(interval_cell, position_from=span[0], position_to=span[1]))
            for span, name in _span_cells(scores).items()
        ]
        lines = [([Cell(count(at))], here) for at, here in points.items()]
        blocks.append(table("", [Cell(unit, "trained")], lines, columns))
    return Section("Training", blocks)


def position_summary(run: str, results: list[Result], costs: list[Result]) -> list[Cell]:
    """In words, what training changed at the last and the first positions, and what share of full attention is left."""
    groups = split((one for one in results if one.run == run), lambda one: (one.task, one.length or 0))
    words = _perplexity(groups[max(groups, key=lambda key: key[1])]) if groups else []
    pairs = {one.layout: one for one in costs if (one.run, one.metric) == (run, "attention_pairs") and one.value}
    striped = next((layout for layout in pairs if layout != FULL), None)
    if striped is not None and FULL in pairs:
        share = percent(pairs[striped].value / pairs[FULL].value, 0)
        words.append(Cell(", while attention computes " if words else f"With {striped}, attention computes "))
        words += [Cell(share, results=[pairs[FULL], pairs[striped]]), Cell(" of the pairs of full attention")]
    return [*words, Cell(".")] if words else []


def _perplexity(results: list[Result]) -> list[Cell]:
    """The change from source to trained model; without these the values of all models, of many the best and worst."""
    parts = buckets(results)
    scores = {(series_of(one), span_of(one)): one for one in results}
    every = split(results, series_of)
    after = trained_series(every)
    before = source_of(after, every) if after else None
    words: list[Cell] = []
    if after and before:
        for span in dict.fromkeys([parts[-1], parts[0]]):
            if (before, span) in scores and (after, span) in scores:
                words.append(Cell(" and " if words else "Perplexity "))
                words += change_words(scores[before, span], scores[after, span])
                words.append(Cell(f" at positions {span_name(span, ' to ')}"))
        return words
    far, start = parts[-1], f"Perplexity at positions {span_name(parts[-1], ' to ')} is "
    shown = [scores[series, far] for series in every if (series, far) in scores]
    joint = ", "
    if len(shown) > _MANY:
        shown = [min(shown, key=lambda one: one.value), max(shown, key=lambda one: one.value)]
        start, joint = f"{start}between ", " and "
    for one in shown:
        name = f" for {series_of(one).name} {one.layout}"
        words += [Cell(joint if words else start), value_cell([one]), Cell(name)]
    return words
