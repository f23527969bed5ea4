"""What a run measures: its loss on the way, its checkpoints by position, what its attention costs. As rows."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from zebra.data.corpus import Corpus
from zebra.evaluate.perplexity import Score, as_rows, perplexity
from zebra.model.families import DENSE, layout, stripes_of
from zebra.model.hosts import best_device, device_name
from zebra.records import Row
from zebra.refusal import Refusal
from zebra.stripes import LOCAL, visible_pairs
from zebra.train.recipe import Recipe


def measure(
    recipe: Recipe, held_out: Corpus | None, checkpoint: Path, model: PreTrainedModel, rope: str | None = None
) -> list[Row]:
    """Rows of one checkpoint by position, and how fast it read; `rope` stands beside the layout."""
    assert recipe.evaluate is not None
    assert held_out is not None
    model.to(best_device())
    start = time.perf_counter()
    asked = recipe.evaluate
    scores = perplexity(model, held_out, length=asked.length, convention=asked.convention, seed=recipe.train.seed)
    seconds = time.perf_counter() - start
    at = common(recipe) | {"model": str(checkpoint), "layout": _named(model.config, rope)}
    rows = as_rows(scores, recipe.evaluate.length, recipe.evaluate.convention, **at)
    speed = rows[-1].n / seconds if rows[-1].n else 0.0
    return [
        *rows,
        Row(
            task="speed",
            metric="evaluation_tokens_per_second",
            value=speed,
            length=recipe.evaluate.length,
            n=rows[-1].n,
            **at,
        ),
    ]


def _named(config: PreTrainedConfig, rope: str | None) -> str:
    """The layout as rows call it, with the rope beside it that the recipe gives."""
    return " ".join(filter(None, (layout(config), rope)))


def common(recipe: Recipe) -> dict[str, Any]:
    """What every row of a run has."""
    return {"run": Path(recipe.run).name, "seed": recipe.train.seed, "device": device_name(best_device())}


def training_rows(
    recipe: Recipe, config: PreTrainedConfig, history: list[dict[str, Any]], rope: str | None = None
) -> list[Row]:
    """The loss against tokens, and the evaluations on the way."""
    shared = common(recipe) | {"layout": _named(config, rope)}
    rows: list[Row] = []
    for entry in history:
        at = shared | {"model": f"{recipe.run}@{entry['step']}"}
        if "loss" in entry:
            rows.append(
                Row(
                    task="train",
                    metric="loss",
                    value=entry["loss"],
                    length=recipe.train.length,
                    n=entry["num_input_tokens_seen"],
                    **at,
                )
            )
        if "by_position" in entry and recipe.evaluate is not None:
            scores = [Score(**score) for score in entry["by_position"]]
            rows += as_rows(scores, recipe.evaluate.length, recipe.evaluate.convention, **at)
    return rows


def cost_rows(recipe: Recipe, config: PreTrainedConfig, model: str) -> list[Row]:
    """What one text of the longest measured length costs in attention, dense and striped: exact counts."""
    length = max(recipe.train.length, recipe.evaluate.length if recipe.evaluate else 0)
    stripes = stripes_of(config)
    n = config.num_hidden_layers
    local = (stripes.layer_types(n) if stripes else ()).count(LOCAL)
    window = stripes.window if stripes else length
    rows = []
    for name, locals_ in dict.fromkeys([(DENSE, 0), (layout(config), local)]):
        pairs = (n - locals_) * visible_pairs(length) + locals_ * visible_pairs(length, window)
        kept = (n - locals_) * length + locals_ * min(length, window - 1)
        for metric, value in (("layers", n), ("attention_pairs", pairs), ("cached_tokens", kept)):
            rows.append(
                Row(
                    task="cost",
                    metric=metric,
                    value=value,
                    length=length,
                    model=model,
                    layout=name,
                    **common(recipe),
                )
            )
    return rows


def trainer_state(run: Path, recipe: Recipe) -> dict[str, Any]:
    """What the Trainer wrote of itself after the last step."""
    path = run / "checkpoints" / f"checkpoint-{recipe.train.steps}" / "trainer_state.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise Refusal(
            f"{path} is gone or damaged, and with it the losses of the run. Remove {run / 'model'} to train on from "
            "the last whole checkpoint, or name another run."
        ) from None
