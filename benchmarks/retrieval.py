"""How well the retrieval example retrieves under stripes and beyond its length: docs/results/retrieval.md.

python benchmarks/retrieval.py                       everything; half an hour on one core
python benchmarks/retrieval.py layouts beyond        only these parts; their results replace the earlier ones
python benchmarks/retrieval.py --page                measure nothing; write the page again

The part `layouts` measures every offset of the paper's strides, and the layers that `zebra.select` keeps global by
the loss of the answers. `adapted` trains the model further under some of these layouts, by
recipes/retrieval-adapt-cpu.yaml, which needs its books in data/books; existing runs are resumed. `beyond` reads more
than the trained length, with and without Self-Extend. Results go to benchmarks/results/retrieval-layouts.jsonl.
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
from zebra.report.page import Cell, Section, Table
from zebra.report.series import FULL, percent, stripes_of
from zebra.results import Result
from zebra.stripes import layer_letters
from zebra.train.adapt import adapt
from zebra.train.recipe import AdaptRecipe
from zebra.train.recipe_file import read_recipe
from zebra_bench.published import replace_run, stored_results

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


def measured(part: str, checkpoint: Path = MODEL, *, adapted: bool = False, **settings: Any) -> list[Result]:
    """Retrieval under some settings, as results of a part."""
    lengths = settings.setdefault("lengths", [TRAINED])
    settings = {"tasks": TASKS, "depths": DEPTHS, "samples": 20, "beyond": max(lengths) > TRAINED} | settings
    results = evaluate_retrieval(checkpoint, run=part, **settings)
    for result in results:
        print(
            f"{part:8} {result.layout:34} {result.task:28} {result.length:>6,} {result.depth:4} {result.value:6.0%}",
            flush=True,
        )
    return [replace(result, model=MODEL.name + ADAPTED * adapted) for result in results]


# The parts


def layouts() -> Iterator[list[Result]]:
    """Within the trained length, without training."""
    yield measured("layouts")
    chosen = []
    for count in (2, 1):
        selection = select(MODEL, count, window=WINDOW, length=TRAINED, tasks=list(TASKS), samples=32, seed=SEED)
        chosen.append(_letters(str(selection.stripes)))
        yield [replace(result, model=MODEL.name, run="layouts") for result in selection.results]
    for layout in dict.fromkeys([*STRIDES, *chosen]):
        yield measured("layouts", stripes=f"{layout}:{WINDOW}")


def adapted() -> Iterator[list[Result]]:
    """The chosen, the best and the worst layouts, after a short adaptation to each."""
    measured_layouts = _of(stored_results(FILE), "layouts")
    deciding = []
    for count in (1, 2):
        ranked = _ranked(measured_layouts, count)
        deciding += [*filter(None, [_chosen(measured_layouts, count)]), ranked[0], ranked[-1]]
    for layout in dict.fromkeys(deciding):
        yield measured("adapted", _adapted(layout), adapted=True)


def _adapted(layout: str) -> Path:
    """The checkpoint that the recipe makes for a layout, in runs/."""
    run, stripes = Path("runs") / f"retrieval-{layout}", "null" if layout == FULL else f"'{layout}:{WINDOW}'"
    adapt(read_recipe(RECIPE, AdaptRecipe, [f"run={run}", f"model={MODEL}", f"stripes={stripes}"]))
    return run / "model"


def beyond() -> Iterator[list[Result]]:
    """To four times the trained length: full attention, and the chosen layout of one global layer, adapted."""
    extended: dict[str, Any] = {"self_extend": f"auto:{4 * TRAINED}"}
    settings: dict[str, Any] = {"tasks": ("passkey", "lookup"), "lengths": [2 * TRAINED, 4 * TRAINED], "samples": 10}
    best = _chosen(_of(stored_results(FILE), "layouts"), 1)
    assert best is not None
    for self_extend in ({}, extended):
        yield measured("beyond", **settings, **self_extend)
        yield measured("beyond", _adapted(best), adapted=True, **settings, **self_extend)


PARTS = {"layouts": layouts, "adapted": adapted, "beyond": beyond}


# The page, from the results


def _of(results: Sequence[Result], part: str) -> list[Result]:
    return [result for result in results if result.run == part]


def _letters(layout: str) -> str:
    """A layout as its layers, such as LLGL; results have the shortest notation."""
    return layout if layout == FULL else layer_letters(stripes_of(layout).layer_types(LAYERS))


def _layouts(results: Sequence[Result]) -> list[str]:
    """The layouts of retrieval results, those with the most global layers first."""
    layouts = dict.fromkeys(_letters(result.layout) for result in results if result.task.startswith("retrieval"))
    return sorted(layouts, key=_globals, reverse=True)


def _chosen(results: Sequence[Result], count: int) -> str | None:
    """The layout that selection chose with `count` global layers."""
    greedy = [
        result for result in results if result.task.startswith("selection-greedy") and result.metric == "held_out_rise"
    ]
    return next((letters for result in greedy if _globals(letters := _letters(result.layout)) == count), None)


def _globals(letters: str) -> int:
    """How many of the model's layers are global."""
    return LAYERS if letters == FULL else letters.count("G")


class Score(NamedTuple):
    """A share of answers with its interval, from one result or from several with equally many samples."""

    value: float
    low: float
    high: float

    @property
    def bounds(self) -> str:
        """The interval in percent."""
        return f"{100 * self.low:.0f}–{100 * self.high:.0f}"

    @classmethod
    def of(cls, results: Sequence[Result]) -> Score | None:
        """The mean; None without results."""
        if not results:
            return None
        value = sum(result.value for result in results) / len(results)
        return cls(value, *wilson(value, sum(result.n or 0 for result in results)))


def _score(results: Sequence[Result], layout: str, task: str | None, depths: Sequence[float] = FAR) -> Score | None:
    here = _retrieved(results, task, depths)
    return Score.of([result for result in here if _letters(result.layout) == layout])


def _retrieved(results: Sequence[Result], task: str | None, depths: Sequence[float]) -> list[Result]:
    named = [f"retrieval-generate-{one}" for one in ([task] if task else TASKS)]
    return [result for result in results if result.task in named and result.depth in depths]


def _cell(score: Score | None) -> Cell:
    return Cell("–") if score is None else Cell(percent(score.value, 0), score.bounds)


def _named(results: Sequence[Result], layout: str) -> str:
    """A layout, with a mark if selection chose it."""
    return layout + " *" * (layout in (_chosen(results, 1), _chosen(results, 2)))


def within(results: Sequence[Result]) -> list[Section]:
    """A table for each task: layouts down, as they are and adapted across."""
    plain, trained = _of(results, "layouts"), _of(results, "adapted")
    order = _layouts(plain)
    head = [
        Cell("layout (* chosen by zebra.select)"),
        Cell("far"),
        Cell("near"),
        Cell("adapted, far"),
        Cell("adapted, near"),
    ]
    sections: list[str | Table | figures.Figure] = [
        f"Prompts have {TRAINED} tokens, local layers a window of {WINDOW}. Answers are generated greedily. Far: the "
        "evidence is at depths 0 and 0.5, outside the window, 40 samples. Near: it is at depth 1, just before the "
        "question, 20 samples. In brackets: Wilson's 95 % intervals."
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


def further(results: Sequence[Result]) -> list[Section]:
    """A table of lengths beyond the trained one."""
    here = _of(results, "beyond")
    lengths = sorted({result.length for result in here if result.length is not None})
    tasks = [task for task in TASKS if _retrieved(here, task, DEPTHS)]
    head = [Cell("loaded as"), *(Cell(f"{task}, {length:,}") for task in tasks for length in lengths)]
    body = []
    for model, layout in dict.fromkeys((result.model, result.layout) for result in here):
        cells = []
        for task in tasks:
            for length in lengths:
                of = [result for result in here if (result.model, result.length) == (model, length)]
                cells.append(
                    _cell(Score.of([result for result in _retrieved(of, task, DEPTHS) if result.layout == layout]))
                )
        body.append([Cell(layout + ADAPTED * model.endswith(ADAPTED)), *cells])
    prose = f"The model was trained on {TRAINED} tokens. Each value is of 10 samples at each depth: 0, 0.5 and 1."
    return [Section(f"Up to {4 * TRAINED:,} tokens", [prose, Table("", head, body)])] if body else []


def findings(results: Sequence[Result]) -> list[Section]:
    """A line for each part and number of global layers."""
    lines = []
    for part, when in (("layouts", "Not adapted"), ("adapted", "Adapted")):
        here = _of(results, part)
        for count in (2, 1):
            if not (ranked := _ranked(here, count)):
                continue
            best, worst = (_plain(_score(here, one, None)) for one in (ranked[-1], ranked[0]))
            line = f"{when}, {count} of {LAYERS} layers global: the best offset is {ranked[-1]} with {best}, "
            line += f"the worst {ranked[0]} with {worst}"
            lost = [one for one in ranked if (score := _score(here, one, None)) and score.value < LOST]
            line += f"; {len(lost)} of {len(ranked)} measured offsets find less than {percent(LOST, 0)}"
            if chosen := _chosen(_of(results, "layouts"), count):
                line += f". zebra.select chose {chosen}: {_plain(_score(here, chosen, None))}"
            lines.append(line + ".")
    whole = _score(_of(results, "layouts"), FULL, None)
    far = (
        f"The share of correct answers where the evidence is outside the window of {WINDOW} tokens, for "
        f"{', '.join(TASKS)} together, with 95 % intervals."
    )
    full = [f"Full attention: {_plain(whole)}."] if whole else []
    return [Section("Which layouts keep retrieval", [far, *full, *lines])]


def _ranked(results: Sequence[Result], count: int) -> list[str]:
    """The offsets of a stride that were measured, from the worst to the best by the far answers of all tasks."""
    scores = {one: score for one in STRIDES if _globals(one) == count and (score := _score(results, one, None))}
    return sorted(scores, key=lambda one: scores[one].value)


def _plain(score: Score | None) -> str:
    return "not measured" if score is None else f"{percent(score.value, 0)} ({score.bounds})"


def picture(results: Sequence[Result]) -> figures.Figure:
    """Bars of the far answers: layouts across, tasks side by side; as they are, and adapted."""
    plain = _of(results, "layouts")

    def bars(part: str, title: str) -> Callable[[Axes], None]:
        here = _of(results, part)
        order = _layouts(here)

        def plot(axes: Axes) -> None:
            for i, task in enumerate(TASKS):
                scores = [(k, score) for k, layout in enumerate(order) if (score := _score(here, layout, task))]
                at = [k + (i - (len(TASKS) - 1) / 2) * 0.26 for k, _ in scores]
                axes.bar(at, [score.value for _, score in scores], 0.24, color=figures.HUES[i], label=task)
                low_high = [[s.value - s.low for _, s in scores], [s.high - s.value for _, s in scores]]
                axes.errorbar(
                    at, [s.value for _, s in scores], low_high, fmt="none", ecolor=figures.INK, elinewidth=0.7
                )
            axes.set_xticks(range(len(order)), [_named(plain, one) for one in order], rotation=60)
            axes.set_ylim(0, 1.02)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
            axes.set_title(title, fontsize=9)

        return plot

    return figures.Figure("retrieval-layouts", [bars("layouts", "not adapted"), bars("adapted", "adapted")])


def write_page(results: Sequence[Result]) -> None:
    """The page and its picture.

    Raises:
        ZebraError: no results.
    """
    if not results:
        raise ZebraError(f"there are no results in {FILE}. Measure first: python benchmarks/retrieval.py")
    caption = f"Far answers in {TRAINED} tokens by layout; whiskers are 95 % intervals, * was chosen by zebra.select"
    parts = [*findings(results), *within(results), *further(results)]
    parts[0].blocks.append(figures.Figure("layouts", [], caption))
    verdict = [
        [
            Cell(
                f"How well examples/{MODEL.name} retrieves with stripes, before and after adaptation, and beyond its "
                "trained length. Reproduce: python benchmarks/retrieval.py. The results are in "
                f"benchmarks/results/{FILE.name}; the run of a result names its part of the benchmark."
            )
        ]
    ]
    atomic_write(PICTURE, picture(results).standalone)
    atomic_write(PAGE, page.markdown("../images/retrieval", "Retrieval", verdict, [*parts, method(results)]))


def main(arguments: list[str]) -> None:
    if unknown := [one for one in arguments if one not in (*PARTS, "--page")]:
        raise ZebraError(f"parts are {', '.join(PARTS)}, or --page alone; got {', '.join(unknown)}.")
    for part in [] if "--page" in arguments else arguments or PARTS:
        results: list[Result] = []  # the earlier results stay until the first new ones exist
        for new in PARTS[part]():
            results += new
            replace_run(FILE, part, results, PARTS)
    write_page(stored_results(FILE))


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of lengths beyond the model, which are measured here
    try:
        main(sys.argv[1:])
    except ZebraError as error:
        sys.exit(f"retrieval: {error}")
