"""Estimate a recipe without running it: shapes, tokens, steps, memory (`zebra.train.step_memory`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from zebra.data.documents import find_files
from zebra.errors import ZebraError
from zebra.hub import is_hub_name
from zebra.model.checkpoint import read_config
from zebra.model.families import attention_pairs, layer_kinds, model_class
from zebra.model.local import layout_name
from zebra.plan.shapes import shape
from zebra.stripes import GLOBAL, LOCAL, visible_pairs
from zebra.train.pretrain import config_of
from zebra.train.processes import data_groups, tokens_per_step
from zebra.train.recipe import AdaptRecipe, PretrainRecipe
from zebra.train.run_results import local_attention_for
from zebra.train.source import adapted_config
from zebra.train.step_memory import StepMemory, resolve_checkpointing, step_memory, weight_shards
from zebra.train.tune_recipe import TuneRecipe

_Known = AdaptRecipe | TuneRecipe | PretrainRecipe


@dataclass(frozen=True)
class DryRun:
    """An estimate of a recipe: facts in the order of display, and the memory of one device in bytes by part."""

    facts: dict[str, str]
    memory: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes on one device."""
        return sum(self.memory.values())


def dry_run(recipe: _Known) -> DryRun:
    """Estimate a recipe without reading weights or text.

    Raises:
        ZebraError: no checkpoint, and no known built-in shape in its place; a config that `adapt`, `tune` or
            `pretrain` rejects.
    """
    config = _config(recipe)
    resolved = resolve_checkpointing(recipe, config)
    memory = step_memory(resolved, config)
    facts = _facts(recipe, config, memory)
    if recipe.train.activation_checkpointing == "auto":
        facts["activation checkpointing"] = "on" if resolved.train.activation_checkpointing else "off"
        facts["activation checkpointing"] += ", chosen by the memory of this machine"
    return DryRun(facts, memory.by_part)


def _config(recipe: _Known) -> PreTrainedConfig:
    if isinstance(recipe, PretrainRecipe):
        return config_of(recipe)
    if Path(recipe.model).exists() or (recipe.shape is None and is_hub_name(recipe.model)):
        return adapted_config(recipe, read_config(recipe.model))
    if recipe.shape is None:
        raise ZebraError(
            f"an estimate requires a checkpoint or a built-in shape; there is no checkpoint at {recipe.model}, and "
            "shape is not set. Download the checkpoint, or set shape."
        )
    return adapted_config(recipe, AutoConfig.for_model(**shape(recipe.shape)))


def _facts(recipe: _Known, config: PreTrainedConfig, memory: StepMemory) -> dict[str, str]:
    train, n = recipe.train, config.num_hidden_layers
    kinds = layer_kinds(config)
    full = n * visible_pairs(train.length)
    local = local_attention_for(recipe)
    pairs = attention_pairs(config, train.length, local.sinks)
    step, sharing = tokens_per_step(recipe), recipe.parallel.sequence
    groups = "processes" if sharing == 1 else f"groups of {sharing} processes, which share sequences"
    groups += f"; weights sharded over {weight_shards(recipe)} processes" * (recipe.parallel.shard > 1)
    names = {GLOBAL: "global", LOCAL: "local"} | {kind: kind for kind in sorted({*kinds} - {GLOBAL, LOCAL})}
    *counts, last = [f"{kinds.count(kind)} {name}" for kind, name in names.items()]
    positions = {"positions": getattr(config, "position_embedding", "rotary")}
    if positions["positions"] == "rotary":
        positions = {"rope": ", ".join(f"{k} {v}" for k, v in config.rope_parameters.items())}
    heads = f"{config.num_attention_heads} query and {config.num_key_value_heads} key-value heads"
    return {
        "model": f"{model_class(config).__name__}, {n} layers of {config.hidden_size:,}, {heads}",
        "layout": f"{layout_name(config, local)}, {', '.join(counts)} and {last} layers",
        **positions,
        "parameters": f"{memory.parameters:,}, trained {memory.trained:,} ({memory.trained / memory.parameters:.1%})",
        "a step": f"{step:,} tokens: {train.per_device_train_batch_size} sequences of {train.length:,} "
        f"x {train.gradient_accumulation_steps} passes x {data_groups(recipe)} {groups}",
        "training": f"{train.max_steps:,} steps, {train.max_steps * step:,} tokens",
        "attention": f"{pairs:,} pairs per sequence, {pairs / full:.0%} of full attention",
        "text": _text(recipe),
    }


def _text(recipe: _Known) -> str:
    try:
        files = find_files([pattern for source in recipe.data.by_source for pattern in source.files])
    except ZebraError as error:
        return f"not available: {error}"
    return f"{len(files):,} files, {sum(file.stat().st_size for file in files):,} bytes"
