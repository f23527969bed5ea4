"""What a run measures: its loss on the way, its checkpoints by position, what its attention costs. As rows."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from zebra.data.corpus import Corpus
from zebra.errors import ZebraError
from zebra.evaluate.perplexity import Score, perplexity, results_of
from zebra.model.checkpoint import read_local_attention
from zebra.model.families import FULL, attention_pairs, layer_kinds
from zebra.model.load import best_device, device_name, load
from zebra.model.load_options import loaded_layout_name
from zebra.model.local import LocalAttention, layout_name
from zebra.results import Result, read_results, write_results
from zebra.stripes import LOCAL, Stripes, visible_pairs
from zebra.train.recipe import Recipe, SourceRecipe, TextRecipe


def measure(
    recipe: TextRecipe, held_out: Corpus | None, checkpoint: Path, model: PreTrainedModel, rope: str | None = None
) -> list[Result]:
    """Rows of one checkpoint by position, and how fast it read; `rope` stands beside the layout."""
    assert recipe.evaluate is not None
    assert held_out is not None
    model.to(best_device())
    asked = recipe.evaluate
    at = columns_of(recipe) | {"model": str(checkpoint), "layout": loaded_layout_name(model, rope)}
    by: dict[str, Any] = {"convention": asked.convention, "first_bucket": asked.first_bucket, "seed": recipe.train.seed}

    def read(length: int) -> list[Result]:
        scores = perplexity(model, held_out, length=length, **by)
        return results_of(scores, length, asked.convention, **at)

    start = time.perf_counter()
    rows = read(asked.length)
    seconds = time.perf_counter() - start
    speed = rows[-1].n / seconds if rows[-1].n else 0.0
    return [
        *rows,
        *(read(asked.beyond) if asked.beyond else []),
        Result(
            task="speed",
            metric="evaluation_tokens_per_second",
            value=speed,
            length=recipe.evaluate.length,
            n=rows[-1].n,
            **at,
        ),
    ]


def before(
    run: Path, recipe: SourceRecipe, measured: Callable[[Path, PreTrainedModel, str | None], list[Result]]
) -> list[Result]:
    """Rows of the source as it was, and with its new stripes and rope without training; measured once, then read."""
    if recipe.evaluate is None:
        return []
    kept = run / "before.jsonl"
    if not kept.exists():
        source = Path(recipe.model)
        rows = measured(source, load(source), None)
        if recipe.stripes is not None or recipe.rope is not None:
            rows += measured(source, load(source, stripes=recipe.stripes, rope=recipe.rope), recipe.rope)
        write_results(kept, rows)
    return read_results(kept)


def columns_of(recipe: Recipe) -> dict[str, Any]:
    """The columns that all rows of a run share."""
    return {"run": Path(recipe.run).name, "seed": recipe.train.seed, "device": device_name(best_device())}


def local_for(recipe: Recipe) -> LocalAttention:
    """What local layers are trained with: the sinks of the recipe's layout, else what a source's zebra.json says."""
    own = (
        read_local_attention(recipe.model)
        if isinstance(recipe, SourceRecipe) and Path(recipe.model).is_dir()
        else LocalAttention()
    )
    return own if recipe.stripes is None else replace(own, sinks=Stripes.parse(recipe.stripes).sinks)


def training_rows(
    recipe: Recipe,
    config: PreTrainedConfig,
    history: list[dict[str, Any]],
    evaluated: Callable[[dict[str, Any], dict[str, Any]], list[Result]],
    rope: str | None = None,
) -> list[Result]:
    """The loss against tokens, and the evaluations on the way.

    Args:
        history: the Trainer's.
        evaluated: rows of one of its entries, under the columns that they share.
    """
    shared = columns_of(recipe) | {"layout": layout_name(config, local_for(recipe), rope)}
    rows: list[Result] = []
    for entry in history:
        at = shared | {"model": f"{recipe.run}@{entry['step']}"}
        if "loss" in entry:
            seen = entry["num_input_tokens_seen"]
            rows.append(
                Result(task="train", metric="loss", value=entry["loss"], length=recipe.train.length, n=seen, **at)
            )
        rows += evaluated(entry, at)
    return rows


def by_position(recipe: TextRecipe) -> Callable[[dict[str, Any], dict[str, Any]], list[Result]]:
    """What `training_rows` makes of perplexities on the way."""

    def rows(entry: dict[str, Any], at: dict[str, Any]) -> list[Result]:
        if recipe.evaluate is None or "by_position" not in entry:
            return []
        scores = [Score(**score) for score in entry["by_position"]]
        return results_of(scores, recipe.evaluate.length, recipe.evaluate.convention, **at)

    return rows


def cost_rows(recipe: Recipe, config: PreTrainedConfig, model: str) -> list[Result]:
    """What one text of the longest measured length costs in attention, dense and striped: exact counts."""
    length, n, local = recipe.longest, config.num_hidden_layers, local_for(recipe)
    window = getattr(config, "sliding_window", None) or length
    held = length if local.full_decode else min(length, window - 1) + local.sinks
    cached = sum(held if kind == LOCAL else length for kind in layer_kinds(config))
    costs = {
        FULL: (n * visible_pairs(length), n * length),
        layout_name(config, local): (attention_pairs(config, length, local.sinks), cached),
    }
    rows = []
    for name, (pairs, tokens) in costs.items():
        counts = {"layers": n, "attention_pairs": pairs, "cached_tokens": tokens}
        rows += [
            Result(
                task="cost", metric=metric, value=value, length=length, model=model, layout=name, **columns_of(recipe)
            )
            for metric, value in counts.items()
        ]
    return rows


def trainer_state(run: Path, recipe: Recipe) -> dict[str, Any]:
    """What the Trainer wrote of itself after the last step."""
    path = run / "checkpoints" / f"checkpoint-{recipe.train.max_steps}" / "trainer_state.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ZebraError(
            f"{path} is gone or damaged, and with it the losses of the run. Remove {run / 'model'} to train on from "
            "the last whole checkpoint, or name another run."
        ) from None
