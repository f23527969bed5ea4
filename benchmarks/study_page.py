"""The page of the from-scratch study: three pictures, a verdict for each claim, a line for each cell, costs, limits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from zebra.files import atomic_write
from zebra.report import page
from zebra.report.figures import HUES, INK, Figure
from zebra.report.method import method
from zebra.report.page import Cell, Line, Section, Table
from zebra.report.series import number, span_name
from zebra.results import Result
from zebra.study.claims import METHOD, claims
from zebra.study.evidence import FAILS, HOLDS, UNTESTED, Claim
from zebra.study.page import NAMES, curve, ordered
from zebra.study.pictures import Curve, plot_by_position
from zebra.study.results import POSITIONS, RECALL, TEXT, Study, StudyCell, studies_in
from zebra.study.spread import spread

VERDICTS = {HOLDS: "holds", FAILS: "does not hold", UNTESTED: "open"}
_OFFERED = ("global", "grouped")
"""The kinds that are read beyond the trained length by Self-Extend too."""


def write_page(results: Sequence[Result], path: Path, images: Path, prose: dict[str, list[str]]) -> None:
    """The page and its pictures.

    Args:
        prose: what results cannot say: paragraphs by the heading that they stand under.
    """
    (study,) = studies_in(results)
    recall = study.on(RECALL)
    figures = [_kinds(study), _kinds(recall), *_positions(study, recall)]
    sections = [
        Section("What was found", [*prose["found"], *figures]),
        Section("The paper's claims", _verdicts(study, recall)),
        Section("The cells", [NAMES, _cells(study, recall)]),
        Section("What attention costs", _costs(study)),
        Section("Limits", list(prose["limits"])),
        method(study.results),
    ]
    for figure in figures:
        atomic_write(images / f"{path.stem}-{figure.name}.svg", figure.standalone + "\n")
    runs = sum(map(len, study.runs.values()))
    summary: list[Line] = [[Cell(f"{len(study.runs)} models, {runs} trainings. {prose['summary'][0]}")]]
    summary.append([Cell(f"Written from benchmarks/results/{path.stem}.jsonl by benchmarks/study.py.")])
    text = page.markdown(f"../{images.name}/{path.stem}", "The from-scratch study", summary, sections)
    atomic_write(path, text)


def _context(study: Study) -> int:
    """The longest context that cells of the study's length were read at."""
    return max(context for cell in study.runs if cell.length == study.length for context in study.contexts(cell))


def _at_length(study: Study, position: str | None = None) -> list[StudyCell]:
    cells = [cell for cell in study.runs if cell.length == study.length and position in (None, cell.position)]
    return ordered(cells)


def _kinds(study: Study) -> Figure:
    """Every layout under rotary positions; dotted, those read by Self-Extend."""
    context, curves, results = _context(study), [], []
    for cell in _at_length(study, "rotary"):
        style = {"linestyle": "--"} if cell.layout.startswith("GLLL") else {}
        for read in (cell, study.extended(cell) if cell.attention in _OFFERED else None):
            if read is not None:
                name = cell.layout if read is cell else f"{cell.layout}, Self-Extend"
                style = style if read is cell else {"linestyle": ":", "markerfacecolor": "none"}
                drawn, rows = curve(study, read, context, name, marker="o", **style)
                curves.append(drawn)
                results += rows
    what = "Perplexity of text" if study.subject == TEXT else "Perplexity of recalled digits"
    caption = f"{what} under rotary positions, trained at {study.length:,} tokens (dashed), read to {context:,}"
    place = "position" if study.subject == TEXT else "distance in tokens"
    plot = partial(plot_by_position, curves=curves, trained=study.length, limits=_limits(study, curves), place=place)
    return Figure(study.subject, [plot], caption, results, height=3.0)


def _limits(study: Study, curves: Sequence[Curve]) -> tuple[float, float]:
    """Text to 1.4 times the least perplexity, what is worse leaves the picture; recall to beyond a guess of digits."""
    least = min(min(one.means.values()) for one in curves)
    return (0.98 * least, 1.4 * least) if study.subject == TEXT else (0.95, 14.0)


def _positions(study: Study, recall: Study) -> list[Figure]:
    """Each position embedding under global attention, on text and on recall; none where there is one."""
    if sum(study.cell("global", position) is not None for position in POSITIONS) < 2:
        return []
    plots, results = [], []
    for subject in (study, recall):
        context, curves = _context(study), []
        for position, colour, marker in zip(POSITIONS, (INK, *HUES), "o^sD", strict=False):
            cell = subject.cell("global", position)
            if cell is not None:
                at = context if context in subject.contexts(cell) else cell.length
                drawn, rows = curve(subject, cell, at, position, marker=marker)
                curves.append(drawn._replace(style={**drawn.style, "color": colour}))
                results += rows
        plots.append(_panel(subject, curves))
    caption = "Position embeddings under global attention; absolute ones end at the dashed line"
    return [Figure("positions", plots, caption, results, height=2.8)]


def _panel(study: Study, curves: Sequence[Curve]) -> Any:
    place = "position" if study.subject == TEXT else "distance in tokens"
    options: dict[str, Any] = {"limits": _limits(study, curves), "title": study.subject, "place": place}

    def plot(axes: Axes) -> None:
        plot_by_position(axes, curves, study.length, **options)

    return plot


def _verdicts(study: Study, recall: Study) -> list[str | Table | Figure]:
    """A line for each claim: the verdict on text and on recall, each with the comparison that decides it."""
    body, rules = [], []
    for i, (on_text, on_recall) in enumerate(zip(claims(study), claims(recall), strict=True), start=1):
        body.append([Cell(str(i)), Cell(on_text.text), _verdict(on_text), _verdict(on_recall)])
        rules.append(f"Claim {i} holds where {on_text.rule}.")
    head = [Cell(""), Cell("claim"), Cell("on text"), Cell("on recall")]
    return [Table("", head, body, numeric=False), *rules, *METHOD]


def _verdict(claim: Claim) -> Cell:
    part, verdict = claim.deciding, VERDICTS[claim.verdict]
    if part is None:
        return Cell("not tested")
    one, other = (name.replace(" rotary", "") for name, _ in part.compared)
    interval = part.interval.partition(";")[0]
    by = f"{one} {part.change} ({interval}) against {other}"
    if claim.verdict == UNTESTED and part.seeds is not None:
        by += f"; some {part.seeds} seeds would decide"
    return Cell(f"{verdict}: {by}", results=part.results)


def _cells(study: Study, recall: Study) -> Table:
    """Perplexity at the last positions of the trained length and of the longest context, with Self-Extend beside."""
    context, length = _context(study), study.length
    near = study.far(next(cell for cell in study.runs if cell.length == length))
    far = study.spans(context, [*study.runs])[-2]
    head = ["trained", "seeds", f"text {span_name(near)}", f"text {span_name(far)}", "Self-Extend"]
    head += [f"recall {span_name(near)}", f"recall {span_name(far)}", "Self-Extend", "pairs a token"]
    body = []
    for cell in ordered(study.runs):
        line = [Cell(study.title(cell)), Cell(str(len(study.runs[cell])))]
        for subject in (study, recall):
            extended = subject.extended(cell)
            at = near if cell.length == length else subject.far(cell)
            places = [(cell, cell.length, at), (cell, context, far), (extended, context, far)]
            line += [_mean(subject, *place) for place in places]
        cost = study.cost(cell, "attention_pairs")
        line.append(Cell(number(int(cost.value / cell.length)), results=[cost]) if cost else Cell("–"))
        body.append(line)
    return Table("", [*map(Cell, head)], body)


def _mean(study: Study, cell: StudyCell | None, context: int, span: tuple[int, int]) -> Cell:
    scores = {} if cell is None else study.scores(cell, context, span)
    if not scores:
        return Cell("–")
    of = spread(scores)
    deviation = f" ± {number(of.deviation)}" if of.deviation is not None else ""
    return Cell(number(of.mean) + deviation, results=[*scores.values()])


def _costs(study: Study) -> list[str | Table | Figure]:
    """A training step of each rotary layout by length: measured, and planned from the closed forms."""
    timed, planned = (
        {(one.layout, one.length): one for one in study.measured if one.metric == metric}
        for metric in ("tokens_per_second", "planned_milliseconds")
    )
    lengths = sorted({length for _, length in timed if length})
    layouts = [f"{cell.layout} {cell.position}" for cell in _at_length(study, "rotary")]
    layouts = [layout for layout in layouts if any((layout, length) in timed for length in lengths)]
    if not layouts:
        return []
    body = []
    for layout in layouts:
        line = [Cell(re.sub("^S+:", "S:", layout.removesuffix(" rotary")))]
        for length in lengths:
            one, full = timed.get((layout, length)), timed.get((layouts[0], length))
            if one is None or full is None:
                line += [Cell("–")] * 3
                continue
            plan, of_full = planned[layout, length], planned[layouts[0], length]
            line.append(Cell(number(1e6 / one.value), results=[one]))
            line.append(Cell(f"{full.value / one.value:.2f}", results=[one, full]))
            line.append(Cell(f"{plan.value / of_full.value:.2f}", results=[plan, of_full]))
        body.append(line)
    head = [Cell("layout"), *(Cell(text) for n in lengths for text in (f"{n:,}: µs a token", "of full", "by plan"))]
    prose = (
        "A training step of 16,384 tokens, in sequences of each length: microseconds a token, the share of full "
        "attention's time, and the share that the plan computes from the closed forms of FLOPs and bytes."
    )
    return [prose, Table("", head, body)]
