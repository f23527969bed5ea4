"""The page of the from-scratch study: three pictures, a verdict for each claim, a line for each cell, costs, limits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from zebra.errors import ZebraError
from zebra.files import atomic_write
from zebra.report import page
from zebra.report.figures import HUES, INK, Figure
from zebra.report.method import method
from zebra.report.page import Cell, Line, Section, Table
from zebra.report.series import Span, number, span_name
from zebra.results import Result
from zebra.study.claims import METHOD, claims
from zebra.study.evidence import FAILS, HOLDS, UNTESTED, Claim, mean_text
from zebra.study.page import NAMES, curve, ordered
from zebra.study.pictures import SHAPES, Curve, plot_by_position
from zebra.study.results import POSITIONS, RECALL, TEXT, Study, StudyCell, short_layout, studies_in

VERDICTS = {HOLDS: "holds", FAILS: "does not hold", UNTESTED: "open"}
_VERBS = {HOLDS: ("holds", "hold"), FAILS: ("does not hold", "do not hold"), UNTESTED: ("is open", "are open")}
_MEANS = (
    "Means over seeds are of losses, and behind ± stands the deviation of the losses times the mean. Pairs a token are "
    "those of queries and keys, summed over the layers, at 1,024 tokens."
)
_WITH_SELF_EXTEND = ("full", "GL")
"""The layouts whose lines with Self-Extend are drawn."""


def write_page(
    results: Sequence[Result], path: Path, images: Path, findings: Sequence[str], limits: Sequence[str]
) -> None:
    """The page and its pictures, with what results cannot say: paragraphs on what was found, and limits.

    Raises:
        ZebraError: results of no study, or of several.
    """
    studies = studies_in(results)
    if len(studies) != 1:
        raise ZebraError(f"the page is of one study of two cells or more; got {len(studies)}. Give the run of a grid.")
    study, recall = studies[0], studies[0].on(RECALL)
    figures = [*_layouts(study), *_layouts(recall), *_positions(study, recall)]
    sections = [
        Section("What was found", [NAMES, *findings, *figures]),
        Section("The paper's claims", _verdicts(study, recall)),
        Section("The cells", [_MEANS, _cells(study, recall)]),
        Section("What a training step costs", _costs(study)),
        Section("Limits", list(limits)),
        method(study.results),
    ]
    for figure in figures:
        atomic_write(images / f"{path.stem}-{figure.name}.svg", figure.standalone + "\n")
    origin = [Cell(f"Written from benchmarks/results/{path.stem}.jsonl by benchmarks/study.py.")]
    summary, stem = [_summary(study, recall), _counted(study, recall), origin], f"../{images.name}/{path.stem}"
    atomic_write(path, page.markdown(stem, "The from-scratch study", summary, sections))


def _summary(study: Study, recall: Study) -> Line:
    """Perplexity of each rotary layout at the last positions of the trained length, on text and on recall."""
    runs = sum(map(len, study.runs.values()))
    line = [Cell(f"{len(study.runs)} models, {runs} trainings, means over seeds.")]
    for subject, of in ((study, "text at positions"), (recall, "digits recalled from")):
        cells = _rotary(subject)
        span = subject.far(cells[0])
        line.append(Cell(f" Perplexity of {of} {span_name(span, ' to ')}: "))
        means = [(cell, subject.scores(cell, cell.length, span)) for cell in cells]
        for i, (cell, scores) in enumerate((cell, scores) for cell, scores in means if scores):
            mean = mean_text(scores).partition(" ")[0]
            line.append(Cell(f"{', ' if i else ''}{mean} {short_layout(cell.layout)}", results=[*scores.values()]))
        line.append(Cell("."))
    return line


def _counted(study: Study, recall: Study) -> Line:
    """The numbers of the claims by verdict, on text and on recall."""
    sentences = []
    for subject, checked in ((TEXT, claims(study)), (RECALL, claims(recall))):
        of_verdict: dict[str, list[str]] = {verdict: [] for verdict in (HOLDS, FAILS, UNTESTED)}
        for i, claim in enumerate(checked, start=1):
            if subject == TEXT or not claim.of_text_alone:
                of_verdict[claim.verdict].append(str(i))
        parts = [
            f"{', '.join(which)} {_VERBS[verdict][len(which) > 1]}" for verdict, which in of_verdict.items() if which
        ]
        sentences.append(f"Claims on {subject}: {'; '.join(parts)}.")
    return [Cell(" ".join(sentences))]


def _context(study: Study) -> int:
    """The longest context that cells of the study's length were read at."""
    return max(context for cell in study.runs if cell.length == study.length for context in study.contexts(cell))


def _rotary(study: Study) -> list[StudyCell]:
    return ordered(cell for cell in study.runs if (cell.length, cell.position) == (study.length, "rotary"))


def _layouts(study: Study) -> list[Figure]:
    """Every layout under rotary positions; dotted, those read by Self-Extend. None where all diverged."""
    context = _context(study)
    curves: list[Curve] = []
    results: list[Result] = []
    for cell in _rotary(study):
        extended = study.extended(cell) if cell.layout.partition(":")[0] in _WITH_SELF_EXTEND else None
        name, linestyle = short_layout(cell.layout), "--" if cell.layout.startswith("GLLL") else "-"
        drawn = [curve(study, cell, context, name, marker="o", linestyle=linestyle)]
        if extended is not None:
            dotted = {"marker": "o", "linestyle": ":", "markerfacecolor": "none"}
            drawn.append(curve(study, extended, context, f"{name}, Self-Extend", **dotted))
        curves += [one for one, _ in drawn if one.means]
        results += [result for _, of_one in drawn for result in of_one]
    if not curves:
        return []
    what = "Perplexity of text" if study.subject == TEXT else "Perplexity of recalled digits"
    caption = _caption(study, f"{what} under rotary positions")
    return [Figure(study.subject, [_plot(study, curves)], caption, results, 3.0)]


def _caption(study: Study, what: str) -> str:
    length, context = study.length, _context(study)
    where = f"up to {length:,} tokens (dashed) in contexts of {length:,}, beyond in contexts of {context:,}"
    return f"{what}, {where}; worse values leave the picture"


def _plot(study: Study, curves: Sequence[Curve], title: str = "") -> partial[None]:
    """Text to 1.6 times the least perplexity; recall to beyond a guess of digits."""
    least = min(min(one.means.values()) for one in curves)
    limits = (0.98 * least, 1.6 * least) if study.subject == TEXT else (0.95, 14.0)
    place = "position" if study.subject == TEXT else "distance in tokens"
    return partial(plot_by_position, curves=curves, trained=study.length, limits=limits, title=title, place=place)


def _positions(study: Study, recall: Study) -> list[Figure]:
    """Each position embedding under global attention, on text and on recall; none where there is one."""
    if sum(study.cell("global", position) is not None for position in POSITIONS) < 2:
        return []
    plots = []
    results: list[Result] = []
    for subject in (study, recall):
        curves = []
        for position, colour in zip(POSITIONS, (INK, *HUES), strict=False):
            if (cell := subject.cell("global", position)) is not None:
                style = {"marker": SHAPES[position], "color": colour}
                drawn, of_cell = curve(subject, cell, _context(subject), position, **style)
                curves += [drawn] * bool(drawn.means)
                results += of_cell
        if not curves:
            return []
        plots.append(_plot(subject, curves, subject.subject))
    caption = _caption(
        study, "Position embeddings under global attention, of which absolute ones end where training did"
    )
    return [Figure("positions", plots, caption, results, 2.8)]


def _verdicts(study: Study, recall: Study) -> list[str | Table | Figure]:
    """A line for each claim: on text and on recall the verdict, and the comparison that decides it."""
    body, rules = [], []
    for i, (on_text, on_recall) in enumerate(zip(claims(study), claims(recall), strict=True), start=1):
        evidence = [cell for claim in (on_text, on_recall) for cell in (_verdict(claim), _evidence(claim))]
        body.append([Cell(f"{i}. {on_text.text}"), *evidence])
        rules.append(f"Claim {i} holds where {on_text.rule}.")
    head = [Cell(name) for name in ("claim", "on text", "deciding comparison", "on recall", "deciding comparison")]
    paragraphs = [" ".join(rules[i : i + 3]) for i in range(0, len(rules), 3)]
    return [_NOTE, Table("", head, body, numeric=False), *paragraphs, *METHOD]


_NOTE = (
    "Beside each verdict is the comparison that decides it last, with the change of perplexity from the second to the "
    "first: negative where the first is better. Better: the interval is below 0. As good: it is below +2 %. Open (n "
    "seeds): n seeds of each cell, in all, would decide it if mean and deviation stayed as they are. In claims 7 and "
    "8 the numbers are nats, and the claim needs them below 0. Self-Extend's group and window stand as 16:256."
)


def _verdict(claim: Claim) -> Cell:
    """The verdict; where a comparison leaves it open, the seeds of each cell that would decide that."""
    part = claim.deciding
    if part is None or (claim.verdict == UNTESTED and part.holds is not None):
        return Cell("not asked" if claim.of_text_alone else "not tested")
    of = ""
    if claim.verdict == UNTESTED and part.difference:
        of = f" ({'more than 30' if math.isinf(part.seeds) else part.seeds} seeds)"
    return Cell(f"{VERDICTS[claim.verdict]}{of}", results=part.results)


def _evidence(claim: Claim) -> Cell:
    part = claim.deciding
    if part is None:
        return Cell("–")
    first, second = (name.replace(" rotary", "").replace("self-extend ", "") for name, _ in part.compared)
    interval = f" ({part.interval.partition(';')[0]})" if part.difference else ""
    where = part.where.partition(" of ")[0]
    return Cell(f"{first} against {second}, {where}: {part.change}{interval}", results=part.results)


def _cells(study: Study, recall: Study) -> Table:
    """Perplexity at the last positions of the trained length and of the longest context, with Self-Extend beside."""
    context, cells = _context(study), [*_rotary(study)]
    cells += ordered(cell for cell in study.runs if cell.length == study.length and cell not in cells)
    cells += ordered(cell for cell in study.runs if cell.length != study.length)
    near, far = study.far(cells[0]), study.last(cells[0], context)
    of_subject = [span_name(near), span_name(far), "Self-Extend"]
    head = [
        "model",
        "seeds",
        *(f"{subject} {what}" for subject in (TEXT, RECALL) for what in of_subject),
        "pairs a token",
    ]
    body = []
    for cell in cells:
        line = [Cell(study.title(cell)), Cell(str(len(study.runs[cell])))]
        for subject in (study, recall):
            at = cell.length if cell.length == study.length else context
            line += [_mean(subject, cell, at, near), _mean(subject, cell, context, far)]
            line.append(_mean(subject, subject.extended(cell), context, far))
        cost = study.cost(cell, "attention_pairs")
        line.append(Cell(number(int(cost.value / cell.length)), results=[cost]) if cost else Cell("–"))
        body.append(line)
    return Table("", [*map(Cell, head)], body)


def _mean(study: Study, cell: StudyCell | None, context: int, span: Span) -> Cell:
    scores = {} if cell is None else study.scores(cell, context, span)
    return Cell(mean_text(scores), results=[*scores.values()]) if scores else Cell("–")


def _costs(study: Study) -> list[str | Table | Figure]:
    """A training step of each rotary layout by length: measured, and planned."""
    timed, planned = (
        {(one.layout, one.length): one for one in study.measured if one.metric == metric}
        for metric in ("tokens_per_second", "planned_milliseconds")
    )
    lengths = sorted({length for _, length in timed if length})
    layouts = [f"{cell.layout} {cell.position}" for cell in _rotary(study)]
    layouts = [layout for layout in layouts if all((layout, length) in timed for length in lengths)]
    if not timed or not layouts:
        return []
    body = []
    for layout in layouts:
        line = [Cell(short_layout(layout.removesuffix(" rotary")))]
        for length in lengths:
            speed, of_full = timed[layout, length], timed[layouts[0], length]
            plan, plan_of_full = planned[layout, length], planned[layouts[0], length]
            line.append(Cell(number(1e6 / speed.value), results=[speed]))
            line.append(Cell(f"{of_full.value / speed.value:.2f}", results=[speed, of_full]))
            line.append(Cell(f"{plan.value / plan_of_full.value:.2f}", results=[plan, plan_of_full]))
        body.append(line)
    head = [Cell("layout"), *(Cell(text) for n in lengths for text in (f"{n:,}: µs a token", "of full", "by plan"))]
    prose = (
        "A training step of 16,384 tokens, in sequences of each length: microseconds a token, the share of full "
        "attention's time, and the share by the plan, from the closed forms of FLOPs and bytes under this machine's "
        "measured ceilings. The measured step includes the optimiser, the plan does not."
    )
    return [prose, Table("", head, body)]
