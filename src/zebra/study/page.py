"""The chapter of a study on a page: claims, perplexity by position, quality against cost, extrapolation, costs."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from zebra.report.figures import Figure, plot_loss
from zebra.report.page import Cell, Chapter, Line, Section, Table
from zebra.report.pivot import value_cell
from zebra.report.series import Span, count, number, span_name
from zebra.results import Result
from zebra.study.claims import METHOD, claims
from zebra.study.evidence import FAILS, HOLDS, UNTESTED, Claim, mean_text
from zebra.study.pictures import COLOURS, SHAPES, Curve, Point, plot_by_position, plot_scatter
from zebra.study.results import ATTENTIONS, POSITIONS, RECALL, TEXT, Study, StudyCell, studies_in
from zebra.study.spread import Scores, Spread, spread

Blocks = list[str | Table | Figure]
NAMES = (
    "Cells are named by layout and position embedding. G is a layer that sees all tokens before it. L sees its window. "
    "S sees its window, and the mean of each block before it. The letters repeat over the layers; after the colon "
    "stand the window and the block in tokens. In a full layout every layer is global."
)
_COUNTS = {
    HOLDS: ("holds", "hold"),
    FAILS: ("does not hold", "do not hold"),
    UNTESTED: ("is not tested here", "are not tested here"),
}
"""Each verdict in words, of one claim and of several."""
_TEXT_PROSE = (
    "Each cell is read at the length that it was trained at. Beside a mean stands the standard deviation over seeds; "
    "lower is better."
)
_RECALL_PROSE = (
    "Perplexity of values that a document told under a key, by the tokens since: 1 where they are looked up, 10 where "
    "the digits are guessed."
)
_DRAWABLE = 1e6
_FAR = 1.25
"""Points above this many times the best perplexity are drawn at the upper edge, or they would squeeze the others."""


def chapters(results: Sequence[Result]) -> list[Chapter]:
    """A chapter for each study among the results, for `zebra.report.write_report`."""
    return [_chapter(study, i) for i, study in enumerate(studies_in(results), start=1)]


def _chapter(study: Study, index: int) -> Chapter:
    """The chapter of one study; `index`, its number on the page, makes the names of its figures unique."""
    prefix = "study" if index == 1 else f"study-{index}"
    title = f"{study.name}: " if study.name else ""
    checked = {subject: claims(study.on(subject)) for subject in study.subjects}
    recall = study.on(RECALL) if RECALL in study.subjects else None
    blocks = {
        "the paper's claims": _checklist(checked),
        "perplexity by position": _by_position(study, _TEXT_PROSE),
        "recall by distance": _by_position(recall, _RECALL_PROSE) if recall else [],
        "quality against cost": _scatter(study, prefix),
        "beyond the trained length": _beyond(study, prefix),
        "recall beyond the trained length": _beyond(recall, f"{prefix}-recall") if recall else [],
        "what a text costs": _costs(study),
        "training": _training(study, prefix),
    }
    sections = [Section(title + name, part) for name, part in blocks.items() if part]
    return Chapter(study.name or "study", _summary(study, checked), sections, study.results)


def _summary(study: Study, checked: Mapping[str, Sequence[Claim]]) -> Line:
    """How many of the paper's claims hold, the verdicts on the others, and grouped attention beside global."""
    runs = sum(len(seeds) for seeds in study.runs.values())
    text = f"{study.name}: " if study.name else ""
    text += f"{len(study.runs)} cells, {runs} runs."
    for subject, of_subject in checked.items():
        verdicts = Counter(claim.verdict for claim in of_subject if claim.in_paper)
        counts = ((verdicts[verdict], names) for verdict, names in _COUNTS.items())
        counted = ", ".join(f"{number} {names[number != 1]}" for number, names in counts)
        where = f" on {subject}" if len(checked) > 1 else ""
        text += f" Of the paper's {verdicts.total()} claims {counted}{where}."
        text += "".join(f" {claim.text}{where}: {claim.verdict}." for claim in of_subject if not claim.in_paper)
    line = [Cell(text)]
    grouped, full = study.cell("grouped"), study.cell("global")
    if grouped and full and all(scores := [study.scores(cell, full.length) for cell in (grouped, full)]):
        of_grouped, of_full = (Cell(mean_text(of), results=[*of.values()]) for of in scores)
        line += [Cell(f" Perplexity over contexts of {full.length:,} tokens is "), of_grouped]
        line += [Cell(f" with {grouped.name}, "), of_full, Cell(f" with {full.name}.")]
    return line


def _checklist(checked: Mapping[str, Sequence[Claim]]) -> Blocks:
    body, evidence = [], []
    several = len(checked) > 1
    for i, of_claim in enumerate(zip(*checked.values(), strict=True), start=1):
        results = [one for claim in of_claim for one in claim.results]
        rests = Cell(f"{len(results)} results" if results else "–", results=results)
        body.append([Cell(str(i)), *(Cell(claim.verdict) for claim in of_claim), Cell(of_claim[0].text), rests])
        for subject, claim in zip(checked, of_claim, strict=True):
            for part in claim.evidence:
                holds = "open" if part.holds is None else "yes" if part.holds else "no"
                change = Cell(part.change, part.interval, results=part.results)
                ends = (Cell(name, mean, dim_results=part.results) for name, mean in part.compared)
                where = [*([Cell(subject)] if several else []), Cell(part.where)]
                evidence.append([Cell(str(i)), *ends, *where, change, Cell(holds)])
    verdicts = [f"on {subject}" for subject in checked] if several else ["verdict"]
    head = [Cell(""), *map(Cell, verdicts), Cell("claim"), Cell("rests on")]
    claims_of_any = next(iter(checked.values()))
    rules = [f"Claim {i} holds where {claim.rule}." for i, claim in enumerate(claims_of_any, start=1)]
    rules += ["On recall, the positions are distances between a value and where it is asked for."] * several
    columns = ["claim", "cell", "against", *(["on"] if several else []), "positions", "change", "holds"]
    title = "Evidence: means over seeds with their standard deviation"
    tables = Table("", head, body, numeric=False), Table(title, [*map(Cell, columns)], evidence, numeric=False)
    return [NAMES, tables[0], *rules, *METHOD, tables[1]]


def ordered(cells: Iterable[StudyCell]) -> list[StudyCell]:
    """Cells in the order of the page: by training length, attention, position embedding, layout."""
    rank = {name: i for i, name in enumerate((*ATTENTIONS, *POSITIONS))}
    return sorted(cells, key=lambda c: (c.length, rank[c.attention], rank[c.position], len(c.layout), c.layout))


def _by_position(study: Study, prose: str) -> Blocks:
    blocks: Blocks = [prose]
    for length in sorted({cell.length for cell in study.runs}, key=lambda length: (length != study.length, length)):
        cells = [cell for cell in study.runs if cell.length == length]
        blocks.append(_table(study, cells, length, f"trained at {length:,}"))
    return blocks


def _table(study: Study, cells: Sequence[StudyCell], context: int, title: str) -> Table:
    spans = study.spans(context, cells)
    several = len({cell.length for cell in cells}) > 1
    head = ["cell", "seeds", *("all" if span == (0, context) else span_name(span) for span in spans)]
    body = []
    for cell in ordered(cells):
        line = [Cell(study.title(cell) if several else cell.name, cell.attention), Cell(str(len(study.runs[cell])))]
        body.append([*line, *(_mean(study.scores(cell, context, span)) for span in spans)])
    return Table(f"{title}, contexts of {context:,} tokens", [*map(Cell, head)], body)


def _mean(scores: Scores) -> Cell:
    if not scores:
        return Cell("–")
    of = spread(scores)
    dim = f"± {number(of.deviation)}" if of.deviation is not None else ""
    return Cell(number(of.mean), dim, results=[*scores.values()])


def _scatter(study: Study, prefix: str) -> Blocks:
    cells: list[tuple[StudyCell, float, Spread]] = []
    results: list[Result] = []
    for cell in ordered(cell for cell in study.runs if cell.length == study.length):
        scores, cost = study.scores(cell, cell.length), study.cost(cell, "attention_pairs")
        if scores and cost and 0 < spread(scores).mean < _DRAWABLE:
            cells.append((cell, cost.value / cell.length, spread(scores)))
            results += [*scores.values(), cost]
    if len(cells) < 2:
        return []
    highest = _FAR * min(quality.mean for _, _, quality in cells)
    points = [Point(cell, cost, quality, min(quality.mean, highest)) for cell, cost, quality in cells]
    caption = (
        f"Perplexity over contexts of {study.length:,} tokens against the cost of attention; bars are the standard "
        "deviation over seeds, cells on the dotted line are beaten by none that is as cheap"
    )
    if any(point.clipped for point in points):
        caption += "; far worse cells stand at the upper edge, with their numbers"
    return [Figure(f"{prefix}-scatter", [partial(plot_scatter, points=points)], caption, results, height=4.6)]


def _beyond(study: Study, prefix: str) -> Blocks:
    context = max((c for cell in study.runs if cell.length == study.length for c in study.contexts(cell)), default=0)
    if context <= study.length:
        return []
    blocks: Blocks = []
    if any(cell.position == "absolute" for cell in study.runs):
        blocks.append("Learned positions end where training did: absolute cells cannot be read farther.")
    blocks.append(_table(study, [cell for cell in study.runs if study.spans(context, [cell])], context, "read farther"))
    panels: dict[str, list[Curve]] = defaultdict(list)
    results: list[Result] = []
    for position, kind in itertools.product(POSITIONS, ATTENTIONS):
        if (cell := study.cell(kind, position)) is None:
            continue
        drawn, scores = curve(study, cell, context, kind, marker=SHAPES[position])
        panels[position] += [drawn] * bool(drawn.means)
        results += scores
    values = [value for curves in panels.values() for drawn in curves for value in drawn.means.values()]
    if not values:
        return blocks
    limits = 0.95 * min(values), 1.05 * max(values)
    what, place = ("Perplexity", "position") if study.subject == TEXT else ("Perplexity of recalled values", "distance")
    plots = [
        partial(plot_by_position, curves=curves, trained=study.length, limits=limits, title=position, place=place)
        for position, curves in panels.items()
        if curves
    ]
    caption = (
        f"{what} by {place}, the mean over seeds, a panel for each position embedding: to the trained length (dashed) "
        f"in contexts of {study.length:,} tokens, beyond it in contexts of {context:,}"
    )
    return [Figure(f"{prefix}-beyond", plots, caption, results, height=3.2), *blocks]


def curve(study: Study, cell: StudyCell, context: int, name: str, **style: Any) -> tuple[Curve, list[Result]]:
    """A cell's mean perplexities by position, in the colour of its attention, and the results behind them.

    Up to the trained length they come from contexts of that length, if it was measured, and beyond it from contexts of
    `context` tokens.
    """
    near = cell.length if cell.length in study.contexts(cell) else 0
    places = [(cell.length, span) for span in study.spans(cell.length, [cell])[:-1]]
    places += [(context, span) for span in study.spans(context, [cell])[:-1] if near <= span[0] and context > near]
    means: dict[Span, float] = {}
    results: list[Result] = []
    for length, span in places:
        scores = study.scores(cell, length, span)
        if scores and 0 < (mean := spread(scores).mean) < _DRAWABLE:
            means[span] = mean
            results += scores.values()
    return Curve(name, means, {"color": COLOURS[cell.attention]} | style), results


_COSTS = {"parameters": "parameters", "attention_pairs": "attention pairs", "cached_tokens": "cached tokens"}
"""The column heads of the costs, by metric."""


def _costs(study: Study) -> Blocks:
    """A row for each cell, a column for each cost that has results."""
    cells = ordered(study.runs)
    metrics = [metric for metric in _COSTS if any(study.cost(cell, metric) for cell in cells)]
    if not metrics:
        return []
    body = []
    for cell in cells:
        costs = (study.cost(cell, metric) for metric in metrics)
        counts = (value_cell([] if cost is None else [cost], count) for cost in costs)
        body.append([Cell(cell.name, f"trained at {cell.length:,}"), *counts])
    prose = "Attention pairs and cached tokens are exact counts over one text of the training length."
    return [prose, Table("", [Cell("cell"), *(Cell(_COSTS[metric]) for metric in metrics)], body)]


def _training(study: Study, prefix: str) -> Blocks:
    """The training loss of the first rotary cell of each kind of attention, for its first seed."""
    results: list[Result] = []
    names: dict[str, tuple[str, str]] = {}
    for cell in filter(None, map(study.cell, ATTENTIONS)):
        run = next(iter(study.runs[cell].values()))
        losses = [one for one in run if (one.task, one.metric) == ("train", "loss") and one.n is not None]
        results += losses
        names |= {one.run: (cell.name, COLOURS[cell.attention]) for one in losses}
    if not results:
        return []
    plot = partial(plot_loss, losses=results, named=names)
    caption = "Training loss (nats per token) against the tokens trained on"
    return [Figure(f"{prefix}-loss", [plot], caption, results, height=2.6)]
