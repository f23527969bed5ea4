"""Set Self-Extend on a loaded model.

Each global layer with a rope gets an attention override. Local layers never look beyond their window, except at sinks,
which they then see from grouped positions. Layers without a rope stay as they are. config.json has no field for
Self-Extend, so a saved checkpoint is without it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from zebra.errors import ZebraError, first_line
from zebra.model.cache import StripedCache
from zebra.model.context import context_length
from zebra.model.local import LocalAttention, local_attention_of
from zebra.model.override import names_of_other_overrides, overrides_of, set_override
from zebra.model.rope import changes_with_length
from zebra.model.self_extend.layer import GroupedRotation, SelfExtendAttention
from zebra.model.self_extend.probe import CANNOT_RUN, attention_layers
from zebra.positions import SelfExtend, check_rotatable_rope, no_global_layer


def resolve_self_extend(self_extend: SelfExtend | str, config: PreTrainedConfig) -> SelfExtend:
    """The setting for a model, with `auto:TARGET` computed from the model's longest text.

    Raises:
        ZebraError: another notation; a config without max_position_embeddings; ALiBi, or a rope that changes with
            length; a window at or beyond the trained length.
    """
    text = config.get_text_config()
    trained = context_length(config)
    if not trained:
        raise ZebraError(
            f"Self-Extend requires the length that a model was trained at; the config of this {text.model_type} has "
            "no max_position_embeddings. Pass max_position_embeddings=LENGTH."
        )
    check_rotatable_rope(
        text.model_type, None if getattr(text, "alibi", False) else changes_with_length(text) or "default"
    )
    setting = self_extend if isinstance(self_extend, SelfExtend) else SelfExtend.parse(self_extend, trained)
    setting.check(trained)
    return setting


def set_self_extend(model: PreTrainedModel, setting: SelfExtend) -> None:
    """Set Self-Extend on the global layers of a loaded model, after a test that each one's rope can be rotated again.

    Raises:
        ZebraError: no global layer with a rope, a model that cannot run with zebra's cache, layers with other
            overrides; as `attention_layers`.
    """
    trained = context_length(model.config)
    assert trained is not None  # `resolve_self_extend` checked it
    if others := names_of_other_overrides(model, LocalAttention, SelfExtendAttention):
        raise ZebraError(
            f"Self-Extend cannot be combined with other overrides of attention; this model has {others}. Load it "
            "without them."
        )
    local = local_attention_of(model)
    setting.check_sinks(local.sinks)
    rotations: dict[str, GroupedRotation] = {}
    extended: set[str] = set()
    for layer in attention_layers(model, local=bool(local.sinks)):
        if layer.rope is None:
            continue
        rope, _, buffer = layer.rope.rpartition(".")
        rotation = GroupedRotation(model.get_submodule(rope), buffer, setting, trained)
        rotation = rotations.setdefault(layer.rope, rotation)
        if layer.window is None:
            first = layer.rope not in extended
            extended.add(layer.rope)
            set_override(layer.module, SelfExtendAttention(rotation, layer.module.layer_idx, first=first))
        else:
            set_override(layer.module, replace(local, rotation=rotation))
    if not extended:
        remedy = "Load it without Self-Extend."
        if getattr(model.config, "sliding_window", None) and not hasattr(model.config, "layer_types"):
            remedy += " Or pass sliding_window=None to disable the window that the checkpoint has for all layers."
        raise no_global_layer(model.config.model_type, remedy)
    try:
        with torch.no_grad():
            ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
            model(ids, past_key_values=bounded_cache(model), use_cache=True)
    except CANNOT_RUN as error:
        raise ZebraError(
            f"a {model.config.model_type} does not support the cache of Self-Extend: {first_line(error)}"
        ) from None


def self_extend_of(model: nn.Module) -> SelfExtend | None:
    """The setting that a model was loaded with; None without Self-Extend."""
    return next((override.rotation.setting for override in overrides_of(model, SelfExtendAttention)), None)


def bounded_cache(model: PreTrainedModel) -> StripedCache:
    """The cache that `generate` uses after `zebra.load`, for code that calls the model directly."""
    extended = overrides_of(model, SelfExtendAttention)
    windows = {override.layer_idx: override.rotation.setting.window for override in extended}
    local = local_attention_of(model)
    return StripedCache(model.config, windows, sinks=local.sinks, full_decode=local.full_decode)
