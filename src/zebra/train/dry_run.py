"""What a recipe would do and need, before it is run: shapes, tokens, steps, memory.

    weights + gradients + the optimiser's moments + activations + a chunk of logits

Weights, gradients and moments are counted exactly. Activations are *measured*: one global and one local layer of the
model's real widths run here over a few tokens, and what autograd saves is counted; it grows in proportion to the
tokens, in every kernel of ours. What an allocator wastes and a launcher's buffers are not in it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from zebra.data.documents import find_files
from zebra.errors import ZebraError
from zebra.model.attention import NAME
from zebra.model.checkpoint import read_config
from zebra.model.compiled import decoder_layers
from zebra.model.families import attention_pairs, layer_kinds, model_class, stripes_of
from zebra.model.local import layout_name
from zebra.plan.cost import Run
from zebra.plan.decoder import Decoder, decoder_from_config
from zebra.plan.memory import activation_memory
from zebra.plan.parallel import Parallel, split_memory
from zebra.plan.shapes import shape
from zebra.shards import Shards
from zebra.stripes import GLOBAL, LOCAL, Stripes, visible_pairs
from zebra.train import lora
from zebra.train.directory import data_groups
from zebra.train.measuring import local_attention_for
from zebra.train.muon import split
from zebra.train.pretrain import config_of
from zebra.train.recipe import AdaptRecipe, CheckpointRecipe, Lora, PretrainRecipe, Recipe
from zebra.train.source import adapted_config
from zebra.train.trainer import tokens_per_step
from zebra.train.tune_recipe import TuneRecipe

_Known = AdaptRecipe | TuneRecipe | PretrainRecipe

_PROBE = 64
"""Tokens over which activations are measured."""


@dataclass(frozen=True)
class DryRun:
    """An estimate of a recipe: facts in the order in which they are shown, and bytes by part for one device."""

    facts: dict[str, str]
    memory: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes on one device."""
        return sum(self.memory.values())


def dry_run(recipe: _Known) -> DryRun:
    """Estimate a recipe without its weights and without its text.

    Raises:
        ZebraError: neither the checkpoint nor a built-in shape of that name is here; a config that `adapt`, `tune` or
            `pretrain` reject.
    """
    config = _config(recipe)
    parameters, trained, memory = _weights(recipe, config)
    memory |= _activations(recipe, config)
    return DryRun(_facts(recipe, config, parameters, trained), memory)


def _config(recipe: _Known) -> PreTrainedConfig:
    if isinstance(recipe, PretrainRecipe):
        return config_of(recipe)
    if Path(recipe.model).exists():
        return adapted_config(recipe, read_config(recipe.model))
    if recipe.shape is None:
        raise ZebraError(
            f"there is no checkpoint at {recipe.model}, and the recipe names no built-in shape to estimate by. "
            "Download the checkpoint, or add a shape."
        )
    return adapted_config(recipe, AutoConfig.for_model(**shape(recipe.shape)))


def _weights(recipe: Recipe, config: PreTrainedConfig) -> tuple[int, int, dict[str, int]]:
    """Parameters, those that are trained, and bytes by part."""
    with torch.device("meta"):
        model: Any = model_class(config)(config)
        count = sum(p.numel() for p in model.parameters())
        if (low := _lora(recipe)) is not None:
            model = lora.wrap(model.to(getattr(torch, low.base_dtype)), low, seed=0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    one_moment = sum(p.numel() for p in split(model)[0]) if recipe.train.optimizer == "muon" else 0
    memory = {
        "weights": sum(p.numel() * p.element_size() for p in model.parameters()),
        "gradients": 4 * trained,
        "Muon and AdamW" if one_moment else "AdamW": 8 * trained - 4 * one_moment,
    }
    if (shards := _weight_shards(recipe)) > 1:  # two layers are whole at a time: one computes, one is fetched
        layers = [sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in decoder_layers(model)]
        gathered = memory["weights"] - sum(layers) + 2 * max(layers)
        memory = {name: -(-size // shards) for name, size in memory.items()} | {"weights gathered": gathered}
    return count, trained, memory


def _weight_shards(recipe: Recipe) -> int:
    """Processes over which weights are split."""
    return recipe.parallel.shard * recipe.parallel.sequence if recipe.parallel.shard > 1 else 1


def _activations(recipe: Recipe, config: PreTrainedConfig) -> dict[str, int]:
    """Bytes that autograd keeps for the backward of one forward pass on one device.

    With activation checkpointing that is each layer's input, and one layer's own while it is run again. Autocast
    keeps a bfloat16 copy of each float32 weight that it met.
    """
    length = Shards(recipe.train.length, recipe.parallel.sequence).length
    tokens = length * recipe.train.per_device_train_batch_size
    kinds, low = layer_kinds(config), _lora(recipe)
    # The residual stream is as wide as the embeddings, which autocast leaves alone.
    half = low is not None and low.base_dtype == "bfloat16" and "embeddings" not in low.modules_to_save
    saved = {kind: _saved_by_a_layer(recipe, config, kind if kind == GLOBAL else LOCAL) for kind in set(kinds)}
    cast, checkpointing = [saved[kind][1] for kind in kinds], recipe.train.activation_checkpointing
    extra = {kind: _extra_saved(recipe, config, kind) for kind in saved}
    parts = activation_memory(
        [tokens * saved[kind][0] + extra[kind] for kind in kinds],
        layer_input=tokens * config.hidden_size * (2 if half else 4),
        weights_cast=max(cast) if checkpointing and _weight_shards(recipe) > 1 else sum(cast),
        vocab_size=config.vocab_size,
        checkpointing=checkpointing,
    )
    return parts | _split(recipe, config)


def _extra_saved(recipe: Recipe, config: PreTrainedConfig, kind: str) -> int:
    """What a layer of another kind than global and local keeps beyond a local one: its layout counts it."""
    stripes = stripes_of(config)
    if stripes is None or kind not in stripes.orders:
        return 0
    heads, keys, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    sizes = {"heads": heads, "query_width": heads * size, "kv_width": keys * size}
    saved = stripes.extra_saved_bytes(kind, recipe.train.length, half=recipe.train.bf16, **sizes)
    return recipe.train.per_device_train_batch_size * saved


def _split(recipe: Recipe, config: PreTrainedConfig) -> dict[str, int]:
    """What processes that split sequences keep besides."""
    shared = recipe.parallel
    if shared.sequence == 1:
        return {}
    decoder = decoder_from_config(config.to_dict(), name="model")
    stripes = stripes_of(config)
    stripes = stripes and replace(stripes, sinks=local_attention_for(recipe).sinks)
    run = planned_step(recipe, decoder, stripes)
    return split_memory(run, Parallel(sequence=shared.sequence, ring=shared.ring))


def planned_step(recipe: Recipe, decoder: Decoder, stripes: Stripes | None) -> Run:
    """The forward and the backward pass of one device's batch, for the plan."""
    train = recipe.train
    return Run(
        decoder=decoder,
        stripes=stripes,
        length=train.length,
        batch=train.per_device_train_batch_size,
        dtype="bfloat16" if train.bf16 else "float32",
        phase="train",
        checkpointing=train.activation_checkpointing,
    )


def _saved_by_a_layer(recipe: Recipe, config: PreTrainedConfig, kind: str) -> tuple[int, int]:
    """Bytes for each token, and bytes whatever the tokens: what a second layer adds, at two lengths."""
    low = _lora(recipe)
    totals = []
    for layers in (1, 2):
        small = copy.deepcopy(config)
        small.num_hidden_layers, small.vocab_size = layers, 8
        small.pad_token_id = small.bos_token_id = small.eos_token_id = 0
        if getattr(small, "layer_types", None) is not None:
            small.layer_types = [kind] * layers
        if getattr(small, "attention_kinds", None) is not None:
            small.attention_kinds = [{GLOBAL: "global", LOCAL: "local"}[kind]] * layers
        with torch.device("meta"):
            dtype = getattr(torch, low.base_dtype) if low else torch.float32
            model: Any = model_class(small)._from_config(small, attn_implementation=NAME, dtype=dtype)
        model = model.to_empty(device="cpu").train()
        if low is not None:
            model = lora.wrap(model, low, seed=0)
        for tokens in (_PROBE, 2 * _PROBE):
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.train.bf16), saved_storages(model) as saved:
                model(torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
            totals.append(sum(saved.values()))
    short, long = totals[2] - totals[0], totals[3] - totals[1]
    grows = (long - short) // _PROBE
    return grows, max(0, short - grows * _PROBE)


@contextmanager
def saved_storages(model: torch.nn.Module) -> Iterator[dict[int, int]]:
    """Storages that autograd saves, the parameters' own left out: address to bytes."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}
    alive: list[Tensor] = []  # an address is not used again while its tensor lives

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def _lora(recipe: Recipe) -> Lora | None:
    return recipe.lora if isinstance(recipe, CheckpointRecipe) else None


def _facts(recipe: _Known, config: PreTrainedConfig, parameters: int, trained: int) -> dict[str, str]:
    train, n = recipe.train, config.num_hidden_layers
    kinds = layer_kinds(config)
    full = n * visible_pairs(train.length)
    local = local_attention_for(recipe)
    pairs = attention_pairs(config, train.length, local.sinks)
    step, sharing = tokens_per_step(recipe), recipe.parallel.sequence
    groups = "processes" if sharing == 1 else f"groups of {sharing} processes, which split sequences"
    groups += f"; {_weight_shards(recipe)} of them split the weights" * (recipe.parallel.shard > 1)
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
        "parameters": f"{parameters:,}, trained {trained:,} ({trained / parameters:.1%})",
        "a step": f"{step:,} tokens: {train.per_device_train_batch_size} sequences of {train.length:,} "
        f"x {train.gradient_accumulation_steps} passes x {data_groups(recipe)} {groups}",
        "training": f"{train.max_steps:,} steps, {train.max_steps * step:,} tokens",
        "attention": f"{pairs:,} pairs per sequence, {pairs / full:.0%} of full attention",
        "text": _text(recipe),
    }


def _text(recipe: _Known) -> str:
    data = recipe.data
    patterns = data.files or [pattern for source in data.sources or [] for pattern in source.files]
    try:
        files = find_files(patterns)
    except ZebraError as error:
        return f"not here: {error}"
    return f"{len(files):,} files, {sum(file.stat().st_size for file in files):,} bytes"
