"""Perplexity of stripes that nothing was trained for: sinks, full attention while decoding, a larger window.

python benchmarks/untrained.py      the example checkpoint, on the test text, its stories joined

Three tables of results in benchmarks/results/untrained.jsonl, after each measurement; docs/untrained.md shows them:

    within      contexts of the trained length, by position
    decoded     the same, half of it read as a prompt and the other half decoded after it, teacher-forced
    beyond      four times the trained length, with Self-Extend in the global layers

A quarter of an hour on one core that others use too. Only the intervals are drawn at random, by seed 0.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from zebra.evaluate.perplexity import evaluate_perplexity
from zebra.model.checkpoint import read_config
from zebra.results import Result, write_results

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "examples" / "stories260K"
ROWS = ROOT / "benchmarks" / "results" / "untrained.jsonl"
TEXT = ROOT / "examples" / "text" / "tinystories_test.txt"
PATTERNS = ("GL", "GLLL")

Variant = dict[str, Any]
"""Arguments of `evaluate_perplexity`."""


def striped(window: int, sinks: tuple[int, ...]) -> list[Variant]:
    """Each pattern with the window and each number of sinks."""
    return [{"stripes": f"{pattern}:{window}" + (f"+{s}" if s else "")} for pattern in PATTERNS for s in sinks]


def variants(trained: int) -> list[Variant]:
    """Every measurement, in the order of the tables."""
    window = trained // 8
    doubled = [one | {"window": 2 * window} for one in striped(window, (0, 4))]
    few = striped(window, (0, 4))
    decoded = [{}, *few, *(one | {"full_decode": True} for one in few)]
    return [
        *({"lengths": [trained], **one} for one in [{}, *striped(window, (0, 4, 16)), *doubled]),
        *({"lengths": [trained], "prompt": trained // 2, **one} for one in decoded),
        *(
            {"lengths": [4 * trained], "self_extend": f"auto:{4 * trained}", **one}
            for one in [{}, *striped(window, (0, 4, 16))]
        ),
    ]


def main() -> None:
    rows: list[Result] = []
    for variant in variants(read_config(str(CHECKPOINT)).max_position_embeddings):
        results = evaluate_perplexity(
            CHECKPOINT,
            [str(TEXT)],
            separator="<|endoftext|>",
            join=True,
            bos=False,
            run="untrained",
            device="cpu",
            **variant,
        )
        rows += [replace(row, model=CHECKPOINT.name) for row in results]
        write_results(ROWS, rows)
        for row in results:
            print(
                f"{row.task:32} {row.layout:48} {row.position_from:>5}-{row.position_to:<5} {row.value:8.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
