"""Long-context adaptation (LCAT, Zebra section 4): give a checkpoint stripes, train it on long text, and measure it."""

from __future__ import annotations

import os

from zebra.results import Result
from zebra.train.recipe import AdaptRecipe
from zebra.train.recipe_file import as_recipe
from zebra.train.run import run_recipe
from zebra.train.source import CheckpointStart, read_source
from zebra.train.texts import read_texts


def adapt(recipe: AdaptRecipe | str | os.PathLike[str], *, trust_remote_code: bool = False) -> list[Result]:
    """Run an adaptation and return its results; an interrupted run resumes.

    Args:
        recipe: the recipe, or the path of its file.
        trust_remote_code: allow a tokenizer that is Python code in the checkpoint.

    Raises:
        ZebraError: what `read_recipe` raises; before any training, a checkpoint, a layout or texts that cannot be used,
            or a run directory of another recipe; during it, a loss that is not finite.
    """
    settings = as_recipe(recipe, AdaptRecipe)
    start = CheckpointStart(settings, *read_source(settings, trust_remote_code))
    return run_recipe(settings, lambda run: start, lambda _: read_texts(settings, start.tokenizer))
