"""The from-scratch study on a page: perplexity by position, quality against cost, beyond the length, cost, claims."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial

from zebra.report.figures import draw, plot_loss
from zebra.report.page import Cell, Chapter, Figure, Line, Section, Table
from zebra.report.series import number, span_name
from zebra.results import Result
from zebra.study import cells, claims, cost_table
from zebra.study.cells import ATTENTIONS, POSITIONS, Study, parted
from zebra.study.pictures import COLOURS, Point, highest, plot_beyond, plot_scatter
from zebra.study.spread import Scores, spread

_NAMES = (
    "Cells are named by layout and position embedding. G is a layer that sees all tokens before it, L one that sees "
    "its window, S one that sees its window and of what lies before that the mean of each block; the letters repeat "
    "over the layers, and behind the colon stand window and block in tokens. In a dense layout every layer is global."
)
_PAIRS = "attention pairs for each token, all layers"


def chapters(results: Sequence[Result]) -> list[Chapter]:
    """For `zebra.report.write_report`, a chapter for each study among the results."""
    return [
        Chapter(one.name or "study", verdict(one), sections(one, i), one.results)
        for i, one in enumerate(parted(results)[0], start=1)
    ]


def sections(study: Study, number: int = 1) -> list[Section]:
    """What a grid's rows say; its number among the studies of a page tells its figures from theirs."""
    prefix = "study" if number == 1 else f"study-{number}"
    named = f"{study.name}: " if study.name else ""
    return [
        Section(named + title, blocks)
        for title, blocks in (
            ("the paper's claims", _checklist(study)),
            ("perplexity by position", _by_position(study)),
            ("quality against cost", _scatter(study, prefix)),
            ("beyond the trained length", _beyond(study, prefix)),
            ("time and memory", _costs(study)),
            ("training", _training(study, prefix)),
        )
        if blocks
    ]


def verdict(study: Study) -> Line:
    """How many claims hold, whether long context helps at all, and grouped attention beside global."""
    judged = claims.claims(study)
    counted = Counter(claim.verdict for claim in judged if claim.papers)
    said = ", ".join(f"{counted[verdict]} {one if counted[verdict] == 1 else many}" for verdict, one, many in _SAID)
    runs = sum(len(seeds) for seeds in study.runs.values())
    text = f"{study.name}: " if study.name else ""
    text += f"{len(study.runs)} cells, {runs} runs. Of the paper's {counted.total()} claims {said}."
    text += "".join(f" {claim.says}: {claim.verdict}." for claim in judged if not claim.papers)
    line = [Cell(text)]
    grouped, wide = study.cell("grouped"), study.cell("global")
    if grouped and wide:
        one, two = (study.scores(cell, wide.length) for cell in (grouped, wide))
        if one and two:
            line += [Cell(f" Perplexity over contexts of {wide.length:,} tokens is "), _mean(one)]
            line += [Cell(f" with {grouped.name}, "), _mean(two), Cell(f" with {wide.name}.")]
    return line


def _mean(scores: Scores) -> Cell:
    return Cell(claims.shown(scores), results=[*scores.values()])


_SAID = (
    (claims.HOLDS, "holds", "hold"),
    (claims.FAILS, "does not hold", "do not hold"),
    (claims.UNTESTED, "is not tested here", "are not tested here"),
)
Blocks = list[str | Table | Figure]


def _checklist(study: Study) -> Blocks:
    judged = claims.claims(study)
    body, evidence = [], []
    for i, claim in enumerate(judged, start=1):
        rests = ", ".join(f"{study.title(cell)} × {len(study.runs[cell])}" for cell in claim.cells)
        rests += f"; {len(claim.rows)} rows" if claim.rows else "–"
        body.append([Cell(str(i)), Cell(claim.verdict), Cell(claim.says, claim.rule), Cell(rests, results=claim.rows)])
        for part in claim.parts:
            held = "open" if part.held is None else "yes" if part.held else "no"
            change = Cell(part.change, part.interval, results=part.rows)
            ends = (Cell(*named, dim_results=part.rows) for named in (part.one, part.other))
            line = [*ends, Cell(part.where), change, Cell(held)]
            evidence.append([Cell(str(i)), *line])
    head = [Cell(""), Cell("verdict"), Cell("claim", "rule"), Cell("rests on", "cells × seeds")]
    columns = [Cell("claim"), Cell("cell"), Cell("against"), Cell("positions"), Cell("change"), Cell("held")]
    title = "Evidence: means over seeds with their standard deviation"
    return [_NAMES, claims.HOW, Table("", head, body, numeric=False), Table(title, columns, evidence, numeric=False)]


def _ordered(study: Study, length: int | None = None) -> list[cells.Cell]:
    """Cells as the page has them: by training length, attention, position embedding, layout."""
    found = [cell for cell in study.runs if length in (None, cell.length)]
    rank = {name: i for i, name in enumerate((*ATTENTIONS, *POSITIONS))}
    return sorted(found, key=lambda c: (c.length, rank[c.attention], rank[c.position], len(c.layout), c.layout))


def _by_position(study: Study) -> Blocks:
    lengths = sorted({cell.length for cell in study.runs}, key=lambda length: (length != study.length, length))
    prose = (
        "Each cell is read at the length that it was trained at. Beside a mean stands the standard deviation over "
        "seeds; lower is better."
    )
    return [prose, *(_table(study, _ordered(study, length), length, f"trained at {length:,}") for length in lengths)]


def _table(study: Study, lines: Sequence[cells.Cell], context: int, title: str) -> Table:
    spans = study.spans(context, lines)
    several = len({cell.length for cell in lines}) > 1
    names = [Cell("all" if span == (0, context) else span_name(span)) for span in spans]
    body = [
        [
            Cell(study.title(cell) if several else cell.name, cell.attention),
            Cell(str(len(study.runs[cell]))),
            *(_score(study.scores(cell, context, span)) for span in spans),
        ]
        for cell in lines
    ]
    return Table(f"{title}, contexts of {context:,} tokens", [Cell("cell"), Cell("seeds"), *names], body)


def _score(scores: Scores) -> Cell:
    if not scores:
        return Cell("–")
    of = spread(scores)
    dim = f"± {number(of.deviation)}" if of.deviation is not None else ""
    return Cell(number(of.mean), dim, results=[*scores.values()])


def _scatter(study: Study, prefix: str) -> Blocks:
    points: list[Point] = []
    rows: list[Result] = []
    for cell in _ordered(study, study.length):
        scores, costs = study.scores(cell, cell.length), study.rows(cell, "cost", "attention_pairs", cell.length)
        if scores and costs and 0 < spread(scores).mean < 1e6:
            points.append(Point(cell, costs[0].value / cell.length, spread(scores)))
            rows += [*scores.values(), costs[0]]
    if len(points) < 2:
        return []
    svg = draw(f"{prefix}-scatter", lambda axes: plot_scatter(axes, points, _PAIRS), height=4.6)
    caption = (
        f"Perplexity over contexts of {study.length:,} tokens against the cost of attention; bars are the standard "
        "deviation over seeds, cells on the dotted line are beaten by none that is as cheap"
        + "; what is far worse stands at the upper edge, with its number"
        * (highest(points) is not None)
    )
    return [Figure(f"{prefix}-scatter", svg, caption, rows)]


def _beyond(study: Study, prefix: str) -> Blocks:
    context = max((c for cell in study.runs if cell.length == study.length for c in study.contexts(cell)), default=0)
    if context <= study.length:
        return []
    read = [cell for cell in _ordered(study) if study.scores(cell, context) or study.spans(context, [cell])]
    mine = {position: [c for kind in ATTENTIONS if (c := study.cell(kind, position)) in read] for position in POSITIONS}
    drawn_cells = {position: found for position, found in mine.items() if found}
    lines = {
        cell: {
            span: spread(scores).mean
            for span in study.spans(context, [cell])[:-1]
            if (scores := study.scores(cell, context, span)) and 0 < spread(scores).mean < 1e6
        }
        for found in drawn_cells.values()
        for cell in found
        if cell is not None
    }
    values = [value for scores in lines.values() for value in scores.values()]
    blocks: Blocks = []
    if values:
        limits = 0.95 * min(values), 1.05 * max(values)
        plots = [
            partial(
                plot_beyond,
                lines={c: lines[c] for c in found if c},
                trained=study.length,
                position=position,
                limits=limits,
            )
            for position, found in drawn_cells.items()
        ]
        svg = draw(f"{prefix}-beyond", *plots, height=3.2)
        caption = (
            f"Perplexity by position in contexts of {context:,} tokens, trained at {study.length:,} (dashed), a panel "
            "for each position embedding, the mean over seeds"
        )
        scored = (study.scores(cell, context, span) for cell, spans in lines.items() for span in spans)
        blocks.append(Figure(f"{prefix}-beyond", svg, caption, [row for found in scored for row in found.values()]))
    prose = (
        "A table of learned positions ends where training did: absolute cells cannot be read farther and have no line."
    )
    return [
        *blocks,
        *([prose] if any(c.position == "absolute" for c in study.runs) else []),
        _table(study, read, context, "read farther"),
    ]


def _costs(study: Study) -> Blocks:
    found = cost_table.table(study, _ordered(study))
    return [cost_table.COUNTED + cost_table.TIMED * bool(study.measured), found] if found else []


def _training(study: Study, prefix: str) -> Blocks:
    """The loss of the main cells, the first seed of each."""
    found = [cell for kind in ATTENTIONS if (cell := study.cell(kind)) is not None]
    lines = {
        cell: [
            row
            for row in next(iter(study.runs[cell].values()))
            if (row.task, row.metric) == ("train", "loss") and row.n is not None
        ]
        for cell in found
    }
    rows = [row for line in lines.values() for row in line]
    if not rows:
        return []
    named = {line[0].run: (cell.name, COLOURS[cell.attention]) for cell, line in lines.items() if line}
    svg = draw(f"{prefix}-loss", partial(plot_loss, losses=rows, named=named), height=2.6)
    return [Figure(f"{prefix}-loss", svg, "Training loss (nats a token) against the tokens trained on", rows)]
