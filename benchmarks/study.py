"""The page of a from-scratch study, docs/results/<name>.md, from the results of its grid.

python benchmarks/study.py runs/study-tiny                    publishes the run's results, then writes the page
python benchmarks/study.py costs recipes/study-tiny-cpu.yaml  times and weighs a training step of each cell, publishes
                                                              that in the place of what was published, then writes the
                                                              page: minutes, on a machine that does nothing else
python benchmarks/study.py                                    writes the pages of all published studies again

`zebra study recipes/<name>.yaml` makes the run. Results are published in benchmarks/results/<name>.jsonl, pictures in
docs/images/<name>-*.svg.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from zebra.errors import ZebraError
from zebra.files import atomic_write
from zebra.report import page
from zebra.report.figures import Figure
from zebra.report.method import method, others
from zebra.report.page import Cell, Section
from zebra.results import Result, read_results, write_results
from zebra.study.cells import recipes_of
from zebra.study.page import chapters
from zebra.study.recipe import StudyRecipe
from zebra.train.recipe_file import read_recipe
from zebra_bench import study as bench

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ROOT / "docs" / "results"
IMAGES = ROOT / "docs" / "images"

CAVEATS = {
    "study-tiny": [
        "The models have four layers, a hidden size of 64, four heads and 0.23 million parameters, and a vocabulary of "
        "512 tokens of byte-level BPE. They were trained for 2,000 steps of 1,024 tokens on 15 novels and memoirs of "
        "9.9 million characters (recipes/study-tiny-cpu.yaml), and measured on one book, The Railway Children. The "
        "paper's models have 117 million parameters and more, and sequences of 1,024 tokens and more (recalled).",
        "Global attention has not learned to use its context after so few tokens: it starts from an even mean over all "
        "of them, and ends 6 % behind local attention. Claims that a global model should win are compared with that "
        "model: they fail for it, or stay open. With three times the steps it is level with local attention "
        "(docs/results/study-longer.md).",
        "Three seeds were planned. They left the first claims open, so each cell that decides a claim has five in the "
        "end; the intervals do not account for that. Training at 1,024 has three seeds, every other cell one.",
        "Grouped attention gains 2 to 3 % on local attention. It has that gain at some 64 tokens of context, keeps it "
        "to the end of the trained length, and loses it beyond.",
        "ALiBi's four heads have the slopes 1/4, 1/16, 1/64 and 1/256. Each learned position was trained 4,000 times. "
        "The verdicts on both are about this size and not about the method.",
        "Groups have two layers. With groups of four, only the first of the four layers would be global; but finding "
        "a token in the context takes a lower layer that has read what stands before it.",
        "A step of so small a model consists of calls and not of arithmetic. The plan counts arithmetic and bytes and "
        "predicts a quarter of the time, and every kind of attention takes about as long. Long texts show what "
        "attention pairs cost (docs/results/speed.md).",
    ],
    "study-longer": [
        "The main cells of the tiny study (docs/results/study-tiny.md) with 6,000 steps instead of 2,000, a warm-up "
        "three times as long, and no other change (recipes/study-longer-cpu.yaml). The question is whether the "
        "findings depend on how short the training is. For global attention they do: there it ends 6 % behind local "
        "attention, here it is level with it, and seeds no longer tell the two apart.",
        "Two pages of one set-up are two looks at it. This one was made because the first left claims open.",
    ],
}
"""What a reader of a published study must know that its results cannot say."""


def write_page(name: str, results: list[Result], pages: Path, images: Path) -> None:
    """The Markdown and its pictures.

    Raises:
        ZebraError: results without a study.
    """
    parts = chapters(results)
    if not parts:
        raise ZebraError(
            f"the {len(results):,} results of {name} hold no study of two cells or more. Give the run of a grid."
        )
    known = {id(one) for part in parts for one in part.results}
    rest = [one for one in results if id(one) not in known]
    caveats = Section("What to keep in mind", list(CAVEATS.get(name, [])))
    sections = [caveats, *(one for part in parts for one in part.sections), method(results), others(rest)]
    sections = [_short(section) for section in sections if section.blocks]
    for block in (block for section in sections for block in section.blocks if isinstance(block, Figure)):
        atomic_write(images / f"{name}-{block.name}.svg", block.standalone + "\n")
    origin = [Cell(f"benchmarks/study.py wrote this page from the results in benchmarks/results/{name}.jsonl.")]
    summary, stem = [*(part.summary for part in parts), origin], f"../{images.name}/{name}"
    atomic_write(pages / f"{name}.md", page.markdown(stem, f"The from-scratch study: {name}", summary, sections))


def _short(section: Section) -> Section:
    """The page has one subject: its figures' names need not say it."""
    blocks = [replace(b, name=b.name.removeprefix("study-")) if isinstance(b, Figure) else b for b in section.blocks]
    return section._replace(blocks=blocks)


def publish(name: str, results: list[Result]) -> None:
    """Results of a study in the place of those that were published: of its runs, of its costs, or of both."""
    file = RESULTS / f"{name}.jsonl"
    replaced = {*map(_is_timed, results)}
    others = [one for one in read_results(file) if _is_timed(one) not in replaced] if file.is_file() else []
    write_results(file, sorted([*others, *results], key=_is_timed))


def _is_timed(one: Result) -> bool:
    return one.task.startswith("bench ")


def costs(grid: StudyRecipe) -> str:
    """Measure the cells of a grid, publish their results, and return its name."""
    name = Path(grid.run).name
    results, left_out = bench.costs(recipes_of(grid), run=name)
    for line in left_out:
        print(f"left out: {line}", file=sys.stderr)
    publish(name, results)
    return name


def main(arguments: list[str]) -> None:
    names = []
    if arguments[:1] == ["costs"]:
        names += [costs(read_recipe(path, StudyRecipe)) for path in arguments[1:]]
    else:
        for run in map(Path, arguments):
            publish(run.name, read_results(run / "results.jsonl"))
            names.append(run.name)
    for name in names or sorted(file.stem for file in RESULTS.glob("study-*.jsonl")):
        write_page(name, read_results(RESULTS / f"{name}.jsonl"), PAGES, IMAGES)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ZebraError as error:
        sys.exit(f"study: {error}")
