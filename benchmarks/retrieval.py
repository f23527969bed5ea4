"""What of the retrieval example's retrieval is left under stripes, and beyond its length, when nothing is trained.

python benchmarks/retrieval.py          ten minutes on two cores; rows in benchmarks/results/retrieval-layouts.jsonl

Layouts of local layers with a window of 128, all global but the named: every offset of the paper's strides, and the
layers that `zebra.select` keeps by the loss of the answers. Beyond its 1,024 tokens: as it is, the host's ropes, and
Self-Extend. A rope that changes with length cannot keep a cache, so dynamic NTK is not among them.
"""

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from zebra import records, select
from zebra.evaluate.retrieval import rows_of
from zebra.records import Row

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "examples" / "retrieval-3.5M"
FILE = ROOT / "benchmarks" / "results" / "retrieval-layouts.jsonl"
WINDOW, TRAINED, SEED = 128, 1024, 1
STRIDES = ("GL", "LG", "GLLL", "LGLL", "LLGL", "LLLG", "L")


def measured(lengths: list[int], tasks: tuple[str, ...] = ("passkey", "needle"), **given: Any) -> list[Row]:
    depths = [0.0, 0.5, 1.0]
    beyond = max(lengths) > TRAINED
    found = rows_of(MODEL, tasks=tasks, lengths=lengths, depths=depths, beyond=beyond, run=FILE.stem, **given)
    for row in found:
        print(f"{row.layout:34} {row.task:28} {row.length:>6,} {row.depth:4} {row.value:6.0%}", flush=True)
    return [replace(row, model=MODEL.name) for row in found]


def layouts() -> list[Row]:
    """Within the trained length."""
    rows, chosen = measured([512]), []
    for count in (2, 1):
        found = select(MODEL, count, window=WINDOW, length=512, tasks=["passkey", "needle"], samples=32, seed=SEED)
        chosen.append(str(found.stripes))
        rows += [replace(row, model=MODEL.name, run=FILE.stem) for row in found.rows]
    for layout in dict.fromkeys([*(f"{pattern}:{WINDOW}" for pattern in STRIDES), *chosen]):
        rows += measured([512], stripes=layout)
    return rows


def beyond() -> Iterator[list[Row]]:
    """To four times the trained length."""
    extended = {"self_extend": f"auto:{4 * TRAINED}"}
    for loading in (extended, {"stripes": f"GLLL:{WINDOW}", **extended}, {}, {"rope": "linear:4"}, {"rope": "yarn:4"}):
        yield measured([2 * TRAINED, 4 * TRAINED], ("passkey",), samples=10, **loading)


def main() -> None:
    rows = layouts()
    records.write(FILE, rows)
    for found in beyond():
        rows += found
        records.write(FILE, rows)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of lengths beyond the model: that is what is measured
    main()
