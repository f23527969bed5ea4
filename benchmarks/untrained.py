"""Perplexity of stripes that nothing was trained for: sinks, full attention while decoding, a larger window.

python benchmarks/untrained.py      the example checkpoint, on the text that the demo is measured on

Three tables of rows in benchmarks/results/untrained.jsonl, after each measurement; docs/untrained.md shows them:

    within      contexts of the trained length, by position
    decoded     the same, half of it read as a prompt and the other half decoded behind it, teacher-forced
    beyond      four times the trained length, with Self-Extend in the global layers

Some minutes on one core. Only the intervals are drawn at random, by seed 0.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from zebra import records
from zebra.evaluate.perplexity import rows_of
from zebra.model.checkpoint import read_config
from zebra.records import Row
from zebra.train.recipe import AdaptRecipe, read_recipe

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "examples" / "stories260K"
ROWS = ROOT / "benchmarks" / "results" / "untrained.jsonl"
PATTERNS = ("GL", "GLLL")


def layouts(window: int) -> list[dict[str, Any]]:
    """What `rows_of` is asked for: no stripes, and for each pattern its window with and without sinks, and doubled."""
    found: list[dict[str, Any]] = [{}]
    for pattern in PATTERNS:
        found += [{"stripes": f"{pattern}:{window}{sinks}"} for sinks in ("", "+4", "+16")]
        found.append({"stripes": f"{pattern}:{window}", "window": 2 * window})
        found.append({"stripes": f"{pattern}:{window}+4", "window": 2 * window})
    return found


def variants(trained: int) -> list[dict[str, Any]]:
    """Every measurement, in the order of the tables."""
    short = layouts(trained // 8)
    full = [{"stripes": f"{pattern}:{trained // 8}{sinks}"} for pattern in PATTERNS for sinks in ("", "+4")]
    decoded = [*short, *(one | {"full_decode": True} for one in full)]
    extended = [{"self_extend": f"auto:{4 * trained}", **one} for one in layouts(trained // 8)]
    return [
        *({"lengths": [trained], **one} for one in short),
        *({"lengths": [trained], "prompt": trained // 2, **one} for one in decoded),
        *({"lengths": [4 * trained], **one} for one in extended),
    ]


def main() -> None:
    asked = read_recipe(ROOT / "recipes" / "demo.yaml", AdaptRecipe).evaluate
    assert asked is not None
    rows: list[Row] = []
    for variant in variants(read_config(str(CHECKPOINT)).max_position_embeddings):
        found = rows_of(
            CHECKPOINT,
            [str(ROOT / file) for file in asked.files],
            convention=asked.convention,
            separator=asked.separator,
            join=asked.join,
            run="untrained",
            device="cpu",
            **variant,
        )
        rows += [replace(row, model=CHECKPOINT.name) for row in found]
        records.write(ROWS, rows)
        for row in found:
            print(
                f"{row.task:32} {row.layout:48} {row.position_from:>5}-{row.position_to:<5} {row.value:8.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
