"""The from-scratch study's results and its page, docs/results/study.md.

python benchmarks/study.py runs/study            publishes the results of the run, then writes the page
python benchmarks/study.py extend runs/study     reads the finished rotary models to their longest context again, with
                                                 Self-Extend; a model that was read is not read again
python benchmarks/study.py costs RECIPE          times a training step of each kind of attention at 1,024 to 16,384
                                                 tokens, publishes that, then writes the page: minutes, on a machine
                                                 that does nothing else
python benchmarks/study.py                       writes the page again

`zebra study recipes/study-cpu.yaml` makes the run. Results are published in benchmarks/results/study.jsonl, pictures in
docs/images/study-*.svg.
"""

from __future__ import annotations

import sys
from pathlib import Path

from study_page import write_page
from zebra.errors import ZebraError
from zebra.model.checkpoint import load_tokenizer
from zebra.model.load import best_device, load
from zebra.model.load_options import loaded_layout_name
from zebra.progress import bar
from zebra.results import Result, append_results, read_results, write_results
from zebra.study.cells import recipes_of
from zebra.study.recipe import StudyRecipe
from zebra.train.measuring import common_columns
from zebra.train.recipe import PretrainRecipe
from zebra.train.recipe_file import read_recipe
from zebra.train.texts import read_texts
from zebra_bench import study as bench
from zebra_bench.published import stored_results

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "study.jsonl"
PAGE = ROOT / "docs" / "results" / "study.md"
IMAGES = ROOT / "docs" / "images"
EXTENDED = "self-extend.jsonl"
"""A run's results with Self-Extend, beside those of its cells."""
TIMED = [
    "recipe.train.length=16384",
    "recipe.train.per_device_train_batch_size=1",
    "cells=[{attention: [global, summary, local], position: rotary, length: [1024, 4096, 16384]}, "
    "{attention: grouped, group: [2, 4], position: rotary, length: [1024, 4096, 16384]}]",
]
"""What `costs` changes of a grid: a step has 16,384 tokens, in sequences of each length."""

FINDINGS = [
    "Of the grid 25 of 47 trainings are done. Under rotary positions: all layers global, one of two, one of four, "
    "none, and local with summaries, in three or four seeds. Under absolute and ALiBi positions, and trained at "
    "256 tokens: all global and one of two, in one seed each (all global, absolute: two). Without positions: all "
    "global, one seed. The recipe's bar, that with seed 0 the global model beats the local one at positions 512 "
    "to 1,024 on text and on recall, is passed (docs/log.md).",
    "Recall is the perplexity of digits that a document told under a key, by the tokens since: 1 where they are "
    "looked up, 10 where they are guessed. Models with global layers look up, local ones guess. Beyond the "
    "trained length the first do worse than guess, until Self-Extend reads them: then text and recall are as "
    "within it.",
    "On text every rotary model with global layers is better than every local one, in code and, less, in prose "
    "(benchmarks/results/study-texts.jsonl): claims 1 and 3 hold on both. The fewer of the layers are global, the "
    "better, and the less it differs by seed: at positions 512 to 1,024 one of four has 15.63 to 15.90, one of "
    "two 15.59 to 17.50, all of them 16.54 to 20.97. The last is wide, most of it in code, so that claim 2 is "
    "open.",
    "Summaries of 16 tokens before the window read text a little better than the window alone (22.34 to 22.76 by "
    "seed; 23.28 to 23.41), and far worse than any rotary model with global layers; digits they do not look up "
    "(9.82).",
    "Of one or two seeds each: learned positions differ most by seed. Where all layers are global, one of two "
    "seeds learned neither text nor to look up (35.81 and 7.85; the other 19.75 and 3.20); one of two layers "
    "global has 16.51 and 1.05. ALiBi looks up best within the trained length (1.02), and its text goes on beyond "
    "it (17.71 at 2,048 to 4,096, where rotary has 100 without Self-Extend). With one of two layers global its "
    "text is as bad as a local model's (23.61), though it looks up. Without positions a global model looks up "
    "(1.03), and its text is the worst of all that were trained at 1,024 (44.98). Models trained at 256 tokens "
    "read text worse than local ones soon after; with Self-Extend they read sixteen times as far (22.75 and "
    "21.76) and look up (2.48, 2.32).",
]
LIMITS = [
    "The models have eight layers of 96, three heads, 0.94 million parameters and a vocabulary of 512 tokens of "
    "byte-level BPE. Of 20 million tokens the first tenth is recall alone, then 30 % of the sequences; the rest is "
    "half books, half code: the books are read three times, the code six. The paper's models have 117 and 345 million "
    "parameters (recalled). recipes/study-117m.yaml and -345m.yaml have this design at those sizes; they were not run.",
    "Text is one novel and six files of one code base, unseen in training. Recall is learned in training: it shows how "
    "far a layout can look up, not whether text alone would teach it.",
    "Where three seeds leave a claim open, two more may be added. The intervals do not account for that look. Nor for "
    "the bar: as seed 0 of full and local attention passed it, the set-up was accepted; they count as evidence too.",
    "Summary layers were timed on code of the study's own, which is exact and slow. Their seconds say nothing of the "
    "method; since then their runs of blocks are read by the C++ kernel.",
    "Two earlier grids of 0.23 million parameters and 2 to 6 million tokens of novels decided nothing, for global "
    "attention had not learned to look back. Their results are benchmarks/results/study-tiny.jsonl and "
    "study-longer.jsonl.",
]
"""What results cannot say."""


def publish(results: list[Result]) -> None:
    """Results in the place of those that were published: of the run's models, of steps' costs, or of both."""
    replaced = {*map(_is_timed, results)}
    others = [one for one in stored_results(RESULTS) if _is_timed(one) not in replaced]
    write_results(RESULTS, sorted([*others, *results], key=_is_timed))


def _is_timed(one: Result) -> bool:
    return one.task.startswith("bench ")


def extend(run: Path) -> None:
    """Read rotary models of a run to their longest context with Self-Extend, on text and on recall."""
    file = run / EXTENDED
    done = {one.run for one in stored_results(file)}
    recipes = [read_recipe(cell.parent / "recipe.yaml", PretrainRecipe) for cell in sorted(run.glob("cells/*/model"))]
    todo = [recipe for recipe in recipes if _extends(recipe) and Path(recipe.run).name not in done]
    with bar("models", len(todo), "models") as advance:
        for recipe in todo:
            append_results(file, _extended(recipe, run / "cells" / Path(recipe.run).name / "model"))
            advance(1, note=Path(recipe.run).name)


def _extends(recipe: PretrainRecipe) -> bool:
    kinds, evaluation = recipe.model["attention_kinds"], recipe.evaluate
    is_rotary = recipe.model["position_embedding"] == "rotary" and "global" in kinds
    return is_rotary and evaluation is not None and bool(evaluation.beyond)


def _extended(recipe: PretrainRecipe, checkpoint: Path) -> list[Result]:
    assert recipe.evaluate is not None
    assert recipe.evaluate.beyond is not None
    length = recipe.evaluate.beyond
    model = load(checkpoint, self_extend=f"auto:{length}").to(best_device())
    texts = read_texts(recipe, load_tokenizer(checkpoint))
    name = str(Path(recipe.run) / "model")  # as in the cell's own results, wherever the run is now
    columns = common_columns(recipe) | {"model": name, "layout": loaded_layout_name(model)}
    return [*texts.evaluate(model, columns, length), *texts.recall(model, columns, length)]


def main(arguments: list[str]) -> None:
    match arguments:
        case []:
            pass
        case ["extend", run]:
            extend(Path(run))
            return
        case ["costs", recipe]:
            results, left_out = bench.costs(recipes_of(read_recipe(recipe, StudyRecipe, TIMED)), run="study")
            for line in left_out:
                print(f"left out: {line}", file=sys.stderr)
            publish(results)
        case [run] if (Path(run) / "results.jsonl").is_file():
            publish([*read_results(Path(run) / "results.jsonl"), *stored_results(Path(run) / EXTENDED)])
        case _:
            raise ZebraError(
                f"{' '.join(arguments)!r} is no command, and no run with a results.jsonl. See the head of the file."
            )
    write_page(read_results(RESULTS), PAGE, IMAGES, FINDINGS, LIMITS)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ZebraError as error:
        sys.exit(f"study: {error}")
