"""The page of the from-scratch study, docs/results/<name>.md, from the rows of a grid.

python benchmarks/study.py runs/study-tiny    the run's rows become benchmarks/results/study-tiny.jsonl, then the page
python benchmarks/study.py                    nothing is read but the rows that are published: every study's page again

`zebra study recipes/<name>.yaml` makes the run. Its pictures go to docs/images/<name>-*.svg.
"""

from __future__ import annotations

import sys
from pathlib import Path

from zebra import records
from zebra.records import Row
from zebra.refusal import Refusal
from zebra.report import page, study
from zebra.report.figures import standalone
from zebra.report.page import Figure, Section
from zebra.report.sections import method, others
from zebra.staged import write_whole

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ROOT / "docs" / "results"
IMAGES = ROOT / "docs" / "images"


def write_page(name: str, rows: list[Row], pages: Path, images: Path) -> None:
    """The Markdown and its pictures.

    Raises:
        Refusal: rows without a study.
    """
    studies, rest = study.parted(rows)
    if not studies:
        raise Refusal(f"the {len(rows):,} rows of {name} hold no study of two cells or more. Give the run of a grid.")
    parts = [section for i, one in enumerate(studies, start=1) for section in study.sections(one, i)]
    parts = [_short(section) for section in (*parts, method(rows), others(rest)) if section.blocks]
    for block in (block for section in parts for block in section.blocks if isinstance(block, Figure)):
        write_whole(images / f"{name}-{block.name}.svg", standalone(block.svg) + "\n")
    said = [line for one in studies for line in study.verdicts(one)]
    made = f"benchmarks/study.py wrote this page from the rows in benchmarks/results/{name}.jsonl."
    stem = f"../{images.name}/{name}"
    write_whole(pages / f"{name}.md", page.markdown(stem, f"The from-scratch study: {name}", [*said, made], parts))


def _short(section: Section) -> Section:
    """The page has one subject: its figures' names need not say it."""
    blocks = [b._replace(name=b.name.removeprefix("study-")) if isinstance(b, Figure) else b for b in section.blocks]
    return section._replace(blocks=blocks)


def main(arguments: list[str]) -> None:
    for run in map(Path, arguments):
        records.write(RESULTS / f"{run.name}.jsonl", records.read(run / "rows.jsonl"))
    names = [Path(run).name for run in arguments] or sorted(file.stem for file in RESULTS.glob("study-*.jsonl"))
    for name in names:
        write_page(name, records.read(RESULTS / f"{name}.jsonl"), PAGES, IMAGES)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Refusal as refusal:
        sys.exit(f"study: {refusal}")
