"""Estimate the memory of a training step on one device, before it is run.

    weights + gradients + the optimiser's moments + activations + a chunk of logits

Weights, gradients and moments are counted exactly. Activations are *measured*: one global and one local layer of the
model's real widths run here over a few tokens, and what autograd saves is counted. It grows linearly with the tokens in
all of zebra's kernels. Fragmentation, temporary tensors of the backward pass and buffers of a launcher are not counted.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from zebra.model.attention import NAME
from zebra.model.compiled import decoder_layers
from zebra.model.families import layer_kinds, model_class, stripes_of
from zebra.model.load import best_device, device_memory
from zebra.plan.cost import Run
from zebra.plan.decoder import Decoder, decoder_from_config
from zebra.plan.memory import activation_memory
from zebra.plan.parallel import Parallel, split_memory
from zebra.shards import Shards
from zebra.stripes import GLOBAL, LOCAL, Stripes
from zebra.train import lora
from zebra.train.muon import split
from zebra.train.processes import local_processes
from zebra.train.recipe import CheckpointRecipe, Lora, Recipe
from zebra.train.run_results import local_attention_for

_Recipe = TypeVar("_Recipe", bound=Recipe)

_PROBE = 64
"""The shorter of the two lengths, in tokens, at which activations are measured."""
USABLE = 0.75
"""The share of a device's memory that an estimate may fill. A LoRA step of SmolLM2-135M took 1.2 times its estimate."""


@dataclass(frozen=True)
class StepMemory:
    """The memory of one device in a step: the numbers of all and of trained parameters, and bytes by part."""

    parameters: int
    trained: int
    by_part: dict[str, int]


def step_memory(recipe: Recipe, config: PreTrainedConfig) -> StepMemory:
    """Estimate a step of a model with this config; its weights are not read."""
    parameters, trained, weights = _weights(recipe, config)
    return StepMemory(parameters, trained, weights | _activations(recipe, config))


def resolve_checkpointing(recipe: _Recipe, config: PreTrainedConfig) -> _Recipe:
    """The recipe with `train.activation_checkpointing` on or off: `auto` is on if a step does not fit without it.

    A step fits if its estimate is at most `USABLE` of the device's memory; processes on one CPU share that equally. It
    depends on nothing else, so all processes of a training decide alike.
    """
    if recipe.train.activation_checkpointing != "auto":
        return recipe
    device = best_device()
    memory = device_memory(device)
    without = _with_checkpointing(recipe, False)
    if memory is None:
        return without
    share = memory // (local_processes() if device == "cpu" else 1)
    fits = sum(step_memory(without, config).by_part.values()) <= USABLE * share
    return without if fits else _with_checkpointing(recipe, True)


def _with_checkpointing(recipe: _Recipe, checkpointing: bool) -> _Recipe:
    train = recipe.train.model_copy(update={"activation_checkpointing": checkpointing})
    return recipe.model_copy(update={"train": train})


def _weights(recipe: Recipe, config: PreTrainedConfig) -> tuple[int, int, dict[str, int]]:
    """The numbers of all and of trained parameters, and bytes by part."""
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
    if (shards := weight_shards(recipe)) > 1:  # two layers are gathered at a time: one computes, one is prefetched
        layers = [sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in decoder_layers(model)]
        gathered = memory["weights"] - sum(layers) + 2 * max(layers)
        memory = {name: -(-size // shards) for name, size in memory.items()} | {"weights gathered": gathered}
    return count, trained, memory


def weight_shards(recipe: Recipe) -> int:
    """The number of processes over which weights are sharded."""
    return recipe.parallel.shard * recipe.parallel.sequence if recipe.parallel.shard > 1 else 1


def _activations(recipe: Recipe, config: PreTrainedConfig) -> dict[str, int]:
    """Bytes that autograd saves in one forward pass on one device, by part.

    With activation checkpointing these are each layer's input, and the activations of one layer while it is recomputed.
    Autocast keeps a bfloat16 copy of each float32 weight that it used.
    """
    length = Shards(recipe.train.length, recipe.parallel.sequence).length
    tokens = length * recipe.train.per_device_train_batch_size
    kinds, low = layer_kinds(config), _lora(recipe)
    # The residual stream has the dtype of the embeddings, which autocast does not change.
    half = low is not None and low.base_dtype == "bfloat16" and "embeddings" not in low.modules_to_save
    saved = {kind: _saved_by_a_layer(recipe, config, kind if kind == GLOBAL else LOCAL) for kind in set(kinds)}
    cast, checkpointing = [saved[kind][1] for kind in kinds], recipe.train.activation_checkpointing is True
    extra = {kind: _extra_saved(recipe, config, kind) for kind in saved}
    parts = activation_memory(
        [tokens * saved[kind][0] + extra[kind] for kind in kinds],
        layer_input=tokens * config.hidden_size * (2 if half else 4),
        weights_cast=max(cast) if checkpointing and weight_shards(recipe) > 1 else sum(cast),
        vocab_size=config.vocab_size,
        checkpointing=checkpointing,
    )
    return parts | _split(recipe, config)


def _extra_saved(recipe: Recipe, config: PreTrainedConfig, kind: str) -> int:
    """Bytes that a layer of another kind than global and local saves beyond a local one, as its layout counts them."""
    stripes = stripes_of(config)
    if stripes is None or kind not in stripes.orders:
        return 0
    heads, keys, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    sizes = {"heads": heads, "query_width": heads * size, "kv_width": keys * size}
    saved = stripes.extra_saved_bytes(kind, recipe.train.length, half=recipe.train.bf16, **sizes)
    return recipe.train.per_device_train_batch_size * saved


def _split(recipe: Recipe, config: PreTrainedConfig) -> dict[str, int]:
    """Bytes that splitting sequences adds, by part."""
    shared = recipe.parallel
    if shared.sequence == 1:
        return {}
    decoder = decoder_from_config(config.to_dict(), name="model")
    stripes = stripes_of(config)
    stripes = stripes and replace(stripes, sinks=local_attention_for(recipe).sinks)
    run = planned_step(recipe, decoder, stripes)
    return split_memory(run, Parallel(sequence=shared.sequence, ring=shared.ring))


def planned_step(recipe: Recipe, decoder: Decoder, stripes: Stripes | None) -> Run:
    """The forward and backward pass of one device's batch, as a run that `zebra.plan` estimates."""
    train = recipe.train
    return Run(
        decoder=decoder,
        stripes=stripes,
        length=train.length,
        batch=train.per_device_train_batch_size,
        dtype="bfloat16" if train.bf16 else "float32",
        phase="train",
        checkpointing=train.activation_checkpointing is True,
    )


def _saved_by_a_layer(recipe: Recipe, config: PreTrainedConfig, kind: str) -> tuple[int, int]:
    """Bytes per token, and constant bytes, that a layer saves: what a second layer adds, at two lengths."""
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
        model.tie_weights()  # `to_empty` has made two tensors of tied ones
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
    """The storages that autograd saves, except the parameters': address to bytes."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}
    alive: list[Tensor] = []  # keeps tensors alive, so that no address is used twice

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
