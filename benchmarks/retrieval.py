"""What of the retrieval example's retrieval is left under stripes, and beyond its length: docs/results/retrieval.md.

python benchmarks/retrieval.py                       everything; half an hour on one core
python benchmarks/retrieval.py layouts beyond        only these parts; their rows replace those that were there
python benchmarks/retrieval.py --page                nothing is measured: the page again, from the rows

Layouts of local layers, all global but the named: every offset of the paper's strides, and the layers that
`zebra.select` keeps by the loss of the answers. `adapted` trains the model on under some of them, by
recipes/retrieval-adapt-cpu.yaml, which wants its books in data/books; runs that are there are taken up. Beyond the
trained length: as it is, and by Self-Extend. Rows go to benchmarks/results/retrieval-layouts.jsonl.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from zebra import select
from zebra.errors import ZebraError
from zebra.evaluate.intervals import wilson
from zebra.evaluate.retrieval import evaluate_retrieval
from zebra.files import atomic_write
from zebra.report import figures, page
from zebra.report.method import method
from zebra.report.page import Cell, Figure, Section, Table
from zebra.report.series import FULL, percent
from zebra.results import Result, read_results, write_results
from zebra.stripes import GLOBAL, Stripes
from zebra.train.adapt import adapt
from zebra.train.recipe import AdaptRecipe, read_recipe

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "examples" / "retrieval-2.2M"
RECIPE = ROOT / "recipes" / "retrieval-adapt-cpu.yaml"
FILE = ROOT / "benchmarks" / "results" / "retrieval-layouts.jsonl"
PAGE = ROOT / "docs" / "results" / "retrieval.md"
PICTURE = ROOT / "docs" / "images" / "retrieval-layouts.svg"

WINDOW, TRAINED, SEED = 128, 512, 1
STRIDES = ("GLGL", "LGLG", "GLLL", "LGLL", "LLGL", "LLLG", "LLLL")
TASKS = ("passkey", "multikey", "lookup")
FAR, NEAR = (0.0, 0.5), (1.0,)
DEPTHS = (*FAR, *NEAR)
LAYERS = 4
LOST = 0.1
ADAPTED = ", adapted"


def measured(part: str, checkpoint: Path = MODEL, *, adapted: bool = False, **given: Any) -> list[Result]:
    """Cells, as rows of a part."""
    lengths = given.setdefault("lengths", [TRAINED])
    given = {"tasks": TASKS, "depths": DEPTHS, "samples": 20, "beyond": max(lengths) > TRAINED} | given
    found = evaluate_retrieval(checkpoint, run=part, **given)
    for row in found:
        print(f"{part:8} {row.layout:34} {row.task:28} {row.length:>6,} {row.depth:4} {row.value:6.0%}", flush=True)
    return [replace(row, model=MODEL.name + ADAPTED * adapted) for row in found]


# The parts


def layouts() -> Iterator[list[Result]]:
    """Within the trained length, nothing trained."""
    yield measured("layouts")
    chosen = []
    for count in (2, 1):
        found = select(MODEL, count, window=WINDOW, length=TRAINED, tasks=list(TASKS), samples=32, seed=SEED)
        chosen.append(_letters(str(found.stripes)))
        yield [replace(row, model=MODEL.name, run="layouts") for row in found.rows]
    for layout in dict.fromkeys([*STRIDES, *chosen]):
        yield measured("layouts", stripes=f"{layout}:{WINDOW}")


def adapted() -> Iterator[list[Result]]:
    """The layouts that decide, after a short adaptation to each."""
    there = _of(_read(), "layouts")
    deciding = []
    for count in (1, 2):
        ranked = _ranked(there, count)
        deciding += [*filter(None, [_chosen(there, count)]), ranked[0], ranked[-1]]
    for layout in dict.fromkeys(deciding):
        yield measured("adapted", _adapted(layout), adapted=True)


def _adapted(layout: str) -> Path:
    """The checkpoint that the recipe makes for a layout, in runs/."""
    run, stripes = Path("runs") / f"retrieval-{layout}", "null" if layout == FULL else f"'{layout}:{WINDOW}'"
    adapt(read_recipe(RECIPE, AdaptRecipe, [f"run={run}", f"model={MODEL}", f"stripes={stripes}"]))
    return run / "model"


def beyond() -> Iterator[list[Result]]:
    """To four times the trained length: dense, and the measured layout of one global layer, adapted."""
    extended = {"self_extend": f"auto:{4 * TRAINED}"}
    given: dict[str, Any] = {"tasks": ("passkey", "lookup"), "lengths": [2 * TRAINED, 4 * TRAINED], "samples": 10}
    best = _chosen(_of(_read(), "layouts"), 1)
    assert best is not None
    for loading in ({}, extended):
        yield measured("beyond", **given, **loading)
        yield measured("beyond", _adapted(best), adapted=True, **given, **loading)


PARTS = {"layouts": layouts, "adapted": adapted, "beyond": beyond}


# The page, from the rows


def _read() -> list[Result]:
    return read_results(FILE) if FILE.is_file() else []


def _of(rows: Sequence[Result], part: str) -> list[Result]:
    return [row for row in rows if row.run == part]


def _letters(layout: str) -> str:
    """A layout as its layers, such as LLGL: rows have it in the shortest notation."""
    if layout == FULL:
        return layout
    return "".join("G" if kind == GLOBAL else "L" for kind in Stripes.parse(layout).layer_types(LAYERS))


def _layouts(rows: Sequence[Result]) -> list[str]:
    """The layouts of retrieval rows, those with the most global layers first."""
    found = dict.fromkeys(_letters(row.layout) for row in rows if row.task.startswith("retrieval"))
    return sorted(found, key=_globals, reverse=True)


def _chosen(rows: Sequence[Result], count: int) -> str | None:
    """The layout that selection kept with so many global layers."""
    greedy = [row for row in rows if row.task.startswith("selection-greedy") and row.metric == "held_out_rise"]
    return next((kept for row in greedy if _globals(kept := _letters(row.layout)) == count), None)


def _globals(letters: str) -> int:
    """How many of the model's layers are global."""
    return LAYERS if letters == FULL else letters.count("G")


class Score(NamedTuple):
    """A share of answers with its interval, from one row or from several of one size."""

    value: float
    low: float
    high: float

    @property
    def bounds(self) -> str:
        """The interval in percent."""
        return f"{100 * self.low:.0f}–{100 * self.high:.0f}"

    @classmethod
    def of(cls, rows: Sequence[Result]) -> Score | None:
        """The mean; None without rows."""
        if not rows:
            return None
        value = sum(row.value for row in rows) / len(rows)
        return cls(value, *wilson(value, sum(row.n or 0 for row in rows)))


def _score(rows: Sequence[Result], layout: str, task: str | None, depths: Sequence[float] = FAR) -> Score | None:
    here = _retrieved(rows, task, depths)
    return Score.of([row for row in here if _letters(row.layout) == layout])


def _retrieved(rows: Sequence[Result], task: str | None, depths: Sequence[float]) -> list[Result]:
    named = [f"retrieval-generate-{one}" for one in ([task] if task else TASKS)]
    return [row for row in rows if row.task in named and row.depth in depths]


def _cell(score: Score | None) -> Cell:
    return Cell("–") if score is None else Cell(percent(score.value, 0), score.bounds)


def _named(rows: Sequence[Result], layout: str) -> str:
    """A layout with a mark if it is what was measured to be the best."""
    return layout + " *" * (layout in (_chosen(rows, 1), _chosen(rows, 2)))


def within(rows: Sequence[Result]) -> list[Section]:
    """A table for each task: layouts down, as they are and adapted across."""
    plain, trained = _of(rows, "layouts"), _of(rows, "adapted")
    order = _layouts(plain)
    head = [
        Cell("layout", "* kept by measured selection"),
        Cell("far"),
        Cell("near"),
        Cell("adapted, far"),
        Cell("adapted, near"),
    ]
    sections: list[str | Table | Figure] = [
        f"Prompts of {TRAINED} tokens, answers by greedy generation, windows of {WINDOW}. Far: the evidence at depths "
        "0 and 0.5, beyond the window, 40 samples; near: at depth 1, just before the question, 20 samples. Wilson's "
        "95 % intervals beside them."
    ]
    for task in TASKS:
        body = [
            [
                Cell(_named(plain, layout)),
                *(_cell(_score(of, layout, task, depths)) for of in (plain, trained) for depths in (FAR, NEAR)),
            ]
            for layout in order
        ]
        sections.append(Table(task, head, body))
    return [Section("Within the trained length", sections)] if order else []


def further(rows: Sequence[Result]) -> list[Section]:
    """A table of lengths beyond the trained one."""
    here = _of(rows, "beyond")
    lengths = sorted({row.length for row in here if row.length is not None})
    tasks = [task for task in TASKS if _retrieved(here, task, DEPTHS)]
    head = [Cell("loaded"), *(Cell(f"{task}, {length:,}") for task in tasks for length in lengths)]
    body = []
    for model, layout in dict.fromkeys((row.model, row.layout) for row in here):
        cells = []
        for task in tasks:
            for length in lengths:
                of = [row for row in here if (row.model, row.length) == (model, length)]
                cells.append(_cell(Score.of([row for row in _retrieved(of, task, DEPTHS) if row.layout == layout])))
        body.append([Cell(layout + ADAPTED * model.endswith(ADAPTED)), *cells])
    prose = f"The model was trained on {TRAINED} tokens. Depths 0, 0.5 and 1 together, 10 samples each."
    return [Section(f"To {4 * TRAINED:,} tokens", [prose, Table("", head, body)])] if body else []


def findings(rows: Sequence[Result]) -> list[Section]:
    """What holds and what does not, in a line for each budget."""
    said = []
    for part, when in (("layouts", "As it is"), ("adapted", "Adapted")):
        here = _of(rows, part)
        for count in (2, 1):
            if not (ranked := _ranked(here, count)):
                continue
            best, worst = (_plain(_score(here, one, None)) for one in (ranked[-1], ranked[0]))
            line = f"{when}, {count} of {LAYERS} layers global: the best offset is {ranked[-1]} with {best} "
            line += f"of the far answers, the worst {ranked[0]} with {worst}"
            lost = [one for one in ranked if (score := _score(here, one, None)) and score.value < LOST]
            line += f"; {len(lost)} of {len(ranked)} measured offsets find less than {percent(LOST, 0)}"
            kept = _chosen(_of(rows, "layouts"), count)
            said.append(
                line + (f". Measured selection kept {kept}: {_plain(_score(here, kept, None))}." if kept else ".")
            )
    whole = _score(_of(rows, "layouts"), FULL, None)
    said = ([f"Dense: {_plain(whole)} of the far answers."] if whole else []) + said
    return [Section("What the layouts keep", [*said, f"Over {', '.join(TASKS)} together, with 95 % intervals."])]


def _ranked(rows: Sequence[Result], count: int) -> list[str]:
    """The offsets of a stride that were measured, from the worst to the best by the far answers of all tasks."""
    scores = {one: score for one in STRIDES if _globals(one) == count and (score := _score(rows, one, None))}
    return sorted(scores, key=lambda one: scores[one].value)


def _plain(score: Score | None) -> str:
    return "not measured" if score is None else f"{percent(score.value, 0)} ({score.bounds})"


def picture(rows: Sequence[Result]) -> str:
    """Bars of the far answers: layouts across, tasks side by side; as they are, and adapted."""
    plain = _of(rows, "layouts")

    def bars(part: str, title: str) -> Callable[[Axes], None]:
        here = _of(rows, part)
        order = _layouts(here)

        def plot(axes: Axes) -> None:
            for i, task in enumerate(TASKS):
                found = [(k, score) for k, layout in enumerate(order) if (score := _score(here, layout, task))]
                at = [k + (i - (len(TASKS) - 1) / 2) * 0.26 for k, _ in found]
                axes.bar(at, [score.value for _, score in found], 0.24, color=figures.HUES[i], label=task)
                low_high = [[s.value - s.low for _, s in found], [s.high - s.value for _, s in found]]
                axes.errorbar(at, [s.value for _, s in found], low_high, fmt="none", ecolor=figures.INK, elinewidth=0.7)
            axes.set_xticks(range(len(order)), [_named(plain, one) for one in order], rotation=60)
            axes.set_ylim(0, 1.02)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
            axes.set_title(title, fontsize=9)

        return plot

    return figures.draw("retrieval-layouts", bars("layouts", "as it is"), bars("adapted", "adapted"))


def write_page(rows: Sequence[Result]) -> None:
    """The page and its picture.

    Raises:
        ZebraError: no rows.
    """
    if not rows:
        raise ZebraError(f"there are no rows in {FILE}. Measure first: python benchmarks/retrieval.py")
    caption = f"Far answers in {TRAINED} tokens by layout; whiskers are 95 % intervals, * was kept by selection"
    parts = [*findings(rows), *within(rows), *further(rows)]
    parts[0].blocks.append(Figure("layouts", "", caption))
    verdict = [
        [
            Cell(
                f"examples/{MODEL.name} under stripes, adapted to them, and beyond its length. Measured by "
                "benchmarks/retrieval.py, which also wrote this page from the rows in "
                f"benchmarks/results/{FILE.name}: run says the part, then model, layout, task, length and depth."
            )
        ]
    ]
    atomic_write(PICTURE, figures.standalone(picture(rows)))
    atomic_write(PAGE, page.markdown("../images/retrieval", "Retrieval", verdict, [*parts, method(rows)]))


def main(arguments: list[str]) -> None:
    if unknown := [one for one in arguments if one not in (*PARTS, "--page")]:
        raise ZebraError(f"parts are {', '.join(PARTS)}, or --page alone; got {', '.join(unknown)}.")
    for part in [] if "--page" in arguments else arguments or PARTS:
        rows: list[Result] = []  # what was there stays until the first new rows are
        for found in PARTS[part]():
            rows += found
            kept = [row for row in _read() if row.run != part]
            write_results(FILE, sorted([*kept, *rows], key=lambda row: [*PARTS].index(row.run)))
    write_page(_read())


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of lengths beyond the model: that is what is measured
    try:
        main(sys.argv[1:])
    except ZebraError as refusal:
        sys.exit(f"retrieval: {refusal}")
