"""The results of a run other than its evaluations: its losses, its mixture, the cost of its attention."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from zebra.data.mixture import SourceStats
from zebra.errors import ZebraError
from zebra.model.checkpoint import read_local_attention
from zebra.model.families import FULL, attention_pairs, layer_kinds
from zebra.model.load import best_device, device_name
from zebra.model.local import LocalAttention, layout_name
from zebra.results import Result
from zebra.stripes import LOCAL, Stripes, visible_pairs
from zebra.train.recipe import CheckpointRecipe, Recipe


def common_columns(recipe: Recipe) -> dict[str, Any]:
    """The columns that have the same value in all results of a run."""
    return {"run": Path(recipe.run).name, "seed": recipe.train.seed, "device": device_name(best_device())}


def local_attention_for(recipe: Recipe) -> LocalAttention:
    """The local attention to train with: the source's (zebra.json), with the sinks of the recipe's layout, if any."""
    local = LocalAttention()
    if isinstance(recipe, CheckpointRecipe):
        try:
            local = read_local_attention(recipe.model)
        except ZebraError:
            if recipe.shape is None or Path(recipe.model).exists():  # else it is a dry run without the checkpoint
                raise
    return local if recipe.stripes is None else replace(local, sinks=Stripes.parse(recipe.stripes).sinks)


def training_results(recipe: Recipe, history: list[dict[str, Any]], columns: dict[str, Any]) -> list[Result]:
    """The training loss by tokens, and the evaluations during training, from the Trainer's history."""
    results: list[Result] = []
    for entry in sorted(history, key=lambda entry: (entry["step"], "results" in entry)):  # losses of a step first
        now = {"run": columns["run"], "model": f"{recipe.run}@{entry['step']}"}  # the run may have been moved
        if "loss" in entry:
            loss = {"task": "train", "metric": "loss", "value": entry["loss"], "length": recipe.train.length}
            results.append(Result(n=entry["num_input_tokens_seen"], **loss, **columns | now))
        results += [Result(**result | now) for result in entry.get("results", ())]
    return results


def source_results(stats: Sequence[SourceStats], **columns: Any) -> list[Result]:
    """What a mixture took from each source, as results of the task `data-<source>`."""
    return [
        Result(task=f"data-{split.source.name}", metric=metric, value=value, n=len(split.train), **columns)
        for split, drawn, share in stats
        for metric, value in {
            "share_asked": split.source.share,
            "share": share,
            "tokens": split.tokens,
            "tokens_drawn": drawn,
            "epochs": drawn / split.tokens,
            "duplicates": split.duplicates,
            "held_out": len(split.held_out),
        }.items()
    ]


def cost_results(recipe: Recipe, config: PreTrainedConfig, model: str) -> list[Result]:
    """The attention pairs and cached tokens of one text of length `recipe.longest`, full and striped: exact counts."""
    length, layers, local = recipe.longest, config.num_hidden_layers, local_attention_for(recipe)
    window = getattr(config, "sliding_window", None) or length
    per_local_layer = length if local.full_decode else min(length, window - 1) + local.sinks
    cached = sum(per_local_layer if kind == LOCAL else length for kind in layer_kinds(config))
    costs = {
        FULL: (layers * visible_pairs(length), layers * length),
        layout_name(config, local): (attention_pairs(config, length, local.sinks), cached),
    }
    columns = common_columns(recipe) | {"model": model, "length": length}
    return [
        Result(task="cost", metric=metric, value=value, layout=layout, **columns)
        for layout, (pairs, tokens) in costs.items()
        for metric, value in (("layers", layers), ("attention_pairs", pairs), ("cached_tokens", tokens))
    ]


def trainer_state(run: Path, recipe: Recipe) -> dict[str, Any]:
    """The state that the Trainer saved after the last step.

    Raises:
        ZebraError: the file is missing or damaged.
    """
    path = run / "checkpoints" / f"checkpoint-{recipe.train.max_steps}" / "trainer_state.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise ZebraError(
            f"{path} is missing or damaged, and with it the losses of the run. Remove {run / 'model'} to continue from "
            "the last complete checkpoint, or name another run."
        ) from None
