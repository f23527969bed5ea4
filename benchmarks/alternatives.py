"""Perplexity by position without training, on the demo's text: the rope scaling of transformers, and Self-Extend.

python benchmarks/alternatives.py                 the example checkpoint: results and the picture
python benchmarks/alternatives.py CHECKPOINT      another one, on the same text: results named by its directory
python benchmarks/alternatives.py --picture       measure nothing; draw the picture again

Results go to benchmarks/results/alternatives.jsonl (alternatives-<name>.jsonl) after each measurement; the picture is
docs/images/alternatives.svg. A quarter of an hour on one core. Only the intervals are drawn at random, by seed 0.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from zebra.evaluate.perplexity import evaluate_perplexity
from zebra.model.checkpoint import read_config
from zebra.report.figures import Figure, plot_positions
from zebra.results import Result, read_results, write_results
from zebra.train.recipe import AdaptRecipe, read_recipe

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PICTURE = ROOT / "docs" / "images" / "alternatives.svg"
TIMES = (16, 8)
"""Lengths, as multiples of the trained one: the picture's, and the one that the demo adapts to."""


def variants(trained: int, length: int) -> list[dict[str, Any]]:
    """The arguments of `evaluate_perplexity`: as it is, three ropes, Self-Extend twice, stripes."""
    factor = length // trained
    auto = {"self_extend": f"auto:{length}"}
    ropes = [{"rope": name} for name in (f"linear:{factor}", "dynamic:1", f"yarn:{factor}")]  # dynamic goes by length
    return [{}, *ropes, auto, {"self_extend": f"32:{trained // 8}"}, {"stripes": f"GLLL:{trained // 4 + 1}", **auto}]


def measured(checkpoint: Path, length: int, variant: dict[str, Any]) -> list[Result]:
    """One variant at one length, on the evaluation text of the demo."""
    evaluation = read_recipe(ROOT / "recipes" / "demo.yaml", AdaptRecipe).evaluate
    assert evaluation is not None
    assert evaluation.files is not None
    results = evaluate_perplexity(
        checkpoint,
        [str(ROOT / file) for file in evaluation.files],
        lengths=[length],
        convention=evaluation.convention,
        separator=evaluation.separator,
        join=evaluation.join,
        bos=evaluation.bos,
        run="alternatives",
        **variant,
    )
    return [replace(row, model=checkpoint.name) for row in results]


def measure(checkpoint: Path, path: Path) -> None:
    trained = read_config(str(checkpoint)).max_position_embeddings
    rows: list[Result] = []
    for length in (times * trained for times in TIMES):
        for variant in variants(trained, length):
            results = measured(checkpoint, length, variant)
            rows += results
            write_results(path, rows)
            for row in results:
                print(f"{row.layout:32} {row.position_from:>6,}-{row.position_to:<6,} {row.value:10,.2f}", flush=True)


def picture(path: Path) -> None:
    """The longest length, without the variants that set Self-Extend by hand or add stripes."""
    rows = list(read_results(path))
    longest = max(row.length or 0 for row in rows)
    shown = list(dict.fromkeys(row.layout for row in rows if row.length == longest))[:5]
    shown.sort(key=lambda layout: layout != "full" and "self-extend" not in layout)  # ours gets the first hue
    group = [row for layout in shown for row in rows if (row.length, row.layout) == (longest, layout)]

    def plot(axes: Axes) -> None:
        plot_positions(axes, group)

    PICTURE.write_text(Figure("alternatives", [plot]).standalone, encoding="utf-8")


def main(argument: str | None = None) -> None:
    example = ROOT / "examples" / "stories260K"
    if argument == "--picture":
        return picture(RESULTS / "alternatives.jsonl")
    checkpoint = Path(argument) if argument else example
    path = RESULTS / (
        "alternatives.jsonl" if checkpoint == example else f"alternatives-{checkpoint.name.lower()}.jsonl"
    )
    measure(checkpoint, path)
    if checkpoint == example:
        picture(path)
    return None


if __name__ == "__main__":
    main(*sys.argv[1:2])
