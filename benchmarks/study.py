"""The page of a from-scratch study, docs/results/<name>.md, from the rows of its grid.

python benchmarks/study.py runs/study-tiny                    the run's rows are published, then the page is written
python benchmarks/study.py costs recipes/study-tiny-cpu.yaml  each cell's training step is timed and weighed: these rows
                                                              replace those that were published; minutes, nothing else
                                                              should run; then the page
python benchmarks/study.py                                    the pages of all studies again, from the published rows

`zebra study recipes/<name>.yaml` makes the run. Rows are published in benchmarks/results/<name>.jsonl, pictures in
docs/images/<name>-*.svg.
"""

from __future__ import annotations

import sys
from pathlib import Path

from zebra.errors import ZebraError
from zebra.files import atomic_write
from zebra.report import page
from zebra.report.figures import standalone
from zebra.report.method import method, others
from zebra.report.page import Cell, Figure, Section
from zebra.results import Result, read_results, write_results
from zebra.study.cells import parted
from zebra.study.page import sections, verdict
from zebra.study.recipe import StudyRecipe, recipes_of
from zebra.train.recipe import read_recipe
from zebra_bench import study as bench

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ROOT / "docs" / "results"
IMAGES = ROOT / "docs" / "images"

CAVEATS = {
    "study-tiny": [
        "Trained were four layers of 64 numbers in four heads, 0.23 million parameters, with 512 words of byte-level "
        "BPE, for 2,000 steps of 1,024 tokens, on 15 novels and memoirs of 9.9 million characters "
        "(recipes/study-tiny-cpu.yaml), and measured on one book, The Railway Children. The paper's models have 117 "
        "million parameters and more, and rows of 1,024 tokens and more (recalled).",
        "Global attention has not learned to use its context after so few tokens: it starts from an even mean over all "
        "of them, and ends 6 % behind local attention. Claims that a global model should win are held against that "
        "model: they fail for it, or stay open. With three times the steps it is level with local attention "
        "(docs/results/study-longer.md).",
        "Three seeds were planned. They left the first claims open, and five were run in the end of each cell that "
        "decides a claim, which the intervals do not know of. Training at 1,024 has three seeds, every other cell one.",
        "What grouped attention gains on local, 2 to 3 %, it has by some 64 tokens of context, keeps to the end of the "
        "trained length, and loses beyond it.",
        "ALiBi's four heads have the slopes 1/4, 1/16, 1/64 and 1/256. Learned positions have seen each place 4,000 "
        "times. The verdicts on both are about this size and not about the method.",
        "Groups are of two layers. Of four layers in groups of four only the first is global, and looking a word up in "
        "what was read takes a layer below that has read what stands before it.",
        "A step of so small a model is made of calls and not of arithmetic. The plan counts arithmetic and bytes, and "
        "says a quarter of the time; and every kind of attention takes about as long. What attention pairs cost shows "
        "in long texts (docs/results/speed.md).",
    ],
    "study-longer": [
        "The main cells of the tiny study (docs/results/study-tiny.md) with 6,000 steps for its 2,000, a warm-up three "
        "times as long, and nothing else changed (recipes/study-longer-cpu.yaml). It asks whether what that study "
        "found depends on how short its training is. For global attention it does: there it ends 6 % behind local "
        "attention, here it is level with it, and seeds no longer tell the two apart.",
        "Two pages of one set-up are two looks at it. This one was made because the first had left claims open.",
    ],
}
"""What a reader of a published study must know that its rows cannot say."""


def write_page(name: str, rows: list[Result], pages: Path, images: Path) -> None:
    """The Markdown and its pictures.

    Raises:
        ZebraError: rows without a study.
    """
    studies, rest = parted(rows)
    if not studies:
        raise ZebraError(
            f"the {len(rows):,} rows of {name} hold no study of two cells or more. Give the run of a grid."
        )
    parts = [section for i, one in enumerate(studies, start=1) for section in sections(one, i)]
    caveats = Section("What to keep in mind", list(CAVEATS.get(name, [])))
    parts = [_short(section) for section in (caveats, *parts, method(rows), others(rest)) if section.blocks]
    for block in (block for section in parts for block in section.blocks if isinstance(block, Figure)):
        atomic_write(images / f"{name}-{block.name}.svg", standalone(block.svg) + "\n")
    said = [verdict(one) for one in studies]
    made = [Cell(f"benchmarks/study.py wrote this page from the rows in benchmarks/results/{name}.jsonl.")]
    stem = f"../{images.name}/{name}"
    atomic_write(pages / f"{name}.md", page.markdown(stem, f"The from-scratch study: {name}", [*said, made], parts))


def _short(section: Section) -> Section:
    """The page has one subject: its figures' names need not say it."""
    blocks = [b._replace(name=b.name.removeprefix("study-")) if isinstance(b, Figure) else b for b in section.blocks]
    return section._replace(blocks=blocks)


def publish(name: str, rows: list[Result]) -> None:
    """Rows of a study in the place of those that were published: of its runs, or of their costs, or of both."""
    file = RESULTS / f"{name}.jsonl"
    new = {*map(_timed, rows)}
    kept = [row for row in read_results(file) if _timed(row) not in new] if file.is_file() else []
    write_results(file, sorted([*kept, *rows], key=_timed))


def _timed(row: Result) -> bool:
    return row.task.startswith("bench ")


def costs(grid: StudyRecipe) -> str:
    """Measure the cells of a grid, publish their rows, and return its name."""
    name = Path(grid.run).name
    rows, left_out = bench.costs(recipes_of(grid), run=name)
    for line in left_out:
        print(f"left out: {line}", file=sys.stderr)
    publish(name, rows)
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
    except ZebraError as refusal:
        sys.exit(f"study: {refusal}")
