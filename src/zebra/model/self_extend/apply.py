"""Self-Extend for a loaded model: what of it each layer gets, and whether this host can have it at all.

What turning again needs hangs on each global layer's attention module as `extension`. Local layers never look beyond
their window and stay as they are, and so do layers without a rope. config.json cannot say any of it, so a saved
checkpoint has nothing of it.

No list of families decides: the model runs one token at several positions, and each layer shows how it turns it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from zebra.errors import ZebraError, first_line
from zebra.kernels import Mask, attend
from zebra.model.cache import StripedCache
from zebra.model.local import LocalAttention, local_attention_of
from zebra.model.override import get_override, overrides_of, overriding_attention, set_override
from zebra.model.rope import changes_with_length
from zebra.model.self_extend.layer import GroupedRotation, SelfExtendAttention, rotate, rotation_between
from zebra.positions import SelfExtend, refuse_no_global, refuse_rope


def resolve_self_extend(self_extend: SelfExtend | str, config: PreTrainedConfig) -> SelfExtend:
    """The setting for a model, `auto:TARGET` reckoned for its trained length.

    Raises:
        ZebraError: a window at or beyond the trained length, a rope that changes with length, no trained length.
    """
    text = config.get_text_config()
    trained = getattr(text, "max_position_embeddings", None)
    if not trained:
        raise ZebraError(
            f"Self-Extend starts from the length that a model was trained at, and the config of this {text.model_type} "
            "has no max_position_embeddings. Pass max_position_embeddings=LENGTH."
        )
    refuse_rope(text.model_type, None if getattr(text, "alibi", False) else changes_with_length(text) or "default")
    setting = SelfExtend.parse(self_extend, trained) if isinstance(self_extend, str) else self_extend
    setting.check(trained)
    return setting


def longest_text(config: PreTrainedConfig, setting: SelfExtend | None = None) -> int | None:
    """The longest text that a model was trained for, or reaches with Self-Extend; None where its config has no say."""
    trained = getattr(config.get_text_config(), "max_position_embeddings", None)
    return trained if setting is None or trained is None else setting.reach(trained)


def check_learned_positions(config: PreTrainedConfig, length: int) -> None:
    """Refuse a text that is longer than a table of learned positions, which nothing can be read beyond.

    Raises:
        ZebraError: it is.
    """
    rows = config.max_position_embeddings if getattr(config, "position_embedding", None) == "absolute" else length
    if length > rows:
        raise ZebraError(
            f"this model has {rows:,} learned positions, and {length:,} tokens are to be read. Take fewer, or a model "
            "with other positions."
        )


def set_self_extend(model: PreTrainedModel, setting: SelfExtend) -> None:
    """Hang Self-Extend on the global layers of a loaded model, after trying that each one's rope can be turned again.

    Raises:
        ZebraError: no global layer with a rope, a host that cannot run on our cache, and what `attention_layers`
            refuses.
    """
    trained = model.config.get_text_config().max_position_embeddings
    if "summary" in (getattr(model.config, "attention_kinds", None) or ()):
        raise ZebraError(
            "Self-Extend maps the positions of tokens; summary layers read means of many. Load it without."
        )
    ropes: dict[str, GroupedRotation] = {}
    for layer in attention_layers(model):
        if layer.rope is None or layer.frequencies is None:
            continue
        first = layer.rope not in ropes
        rope = ropes.setdefault(layer.rope, GroupedRotation(layer.frequencies, setting, trained))
        set_override(layer.module, SelfExtendAttention(rope, layer.module.layer_idx, first=first))
    if not ropes:
        one_window = getattr(model.config, "sliding_window", None) and not hasattr(model.config, "layer_types")
        remedy = ", or with sliding_window=None, as the window is the checkpoint's own for all layers" * bool(
            one_window
        )
        refuse_no_global(model.config.model_type, f"Load it without Self-Extend{remedy}.")
    _try_cache(model)


def self_extend_of(model: nn.Module) -> SelfExtend | None:
    """The setting that a model was loaded with."""
    return next((found.rope.setting for found in _extensions(model)), None)


def bounded_cache(model: PreTrainedModel) -> StripedCache:
    """The cache that `generate` takes after `zebra.load`, for those who call the model themselves."""
    windows = {found.layer: found.rope.setting.window for found in _extensions(model)}
    local = local_attention_of(model)
    return StripedCache(model.config, windows, sinks=local.sinks, full_decode=local.full_decode)


def _extensions(model: nn.Module) -> list[SelfExtendAttention]:
    return [override for override in overrides_of(model) if isinstance(override, SelfExtendAttention)]


@dataclass(frozen=True)
class AttentionLayer:
    """An attention module: its window and sinks where it is local, and the rope that turns its queries and keys, by the
    name of the buffer that holds the frequencies; None where nothing turns them.
    """

    module: Any
    window: int | None
    sinks: int
    rope: str | None
    frequencies: Tensor | None


def attention_layers(model: PreTrainedModel, *, local: bool = False) -> list[AttentionLayer]:
    """The global attention layers of a model, the local ones too where asked, as they show themselves when tried.

    Raises:
        ZebraError: no rotary embedding; attention that is not reached by a registered function, or gets no positions;
            values of another size than keys; a layer whose queries and keys are turned in another way.
    """
    known = _frequencies(model)
    found = []
    for call in _heard(model):
        if local or call.window is None:
            name = _rope_of(call, known, model)
            hung = get_override(call.module)
            sinks = hung.sinks if isinstance(hung, LocalAttention) else 0
            found.append(AttentionLayer(call.module, call.window, sinks, name, known[name] if name else None))
    return found


@dataclass(frozen=True)
class _Call:
    """What one attention module was handed when it was tried: the same token at each of `positions`."""

    module: Any
    query: Tensor
    key: Tensor
    positions: Tensor
    window: int | None


class _Listener:
    def __init__(self) -> None:
        self.calls: list[_Call] = []

    def attend(
        self, module: Any, positions: Tensor | None, q: Tensor, k: Tensor, v: Tensor, mask: Mask, /, **arguments: Any
    ) -> tuple[Tensor, Tensor | None]:
        if positions is None:
            raise ZebraError("Self-Extend needs the positions, which this host does not hand to its attention.")
        if v.shape[-1] != q.shape[-1]:
            raise ZebraError(
                f"Self-Extend takes heads of one size; here keys have {q.shape[-1]} and values {v.shape[-1]}."
            )
        self.calls.append(_Call(module, q, k, positions, mask.window))
        return attend(q, k, v, mask, **arguments)


@torch.no_grad()
def _heard(model: PreTrainedModel) -> list[_Call]:
    """What each attention module gets for one token, alone, at several positions, beyond the trained length too.

    Alone it attends to itself only, so that nothing but the rope can tell its positions apart, in any layer.
    """
    listener, text = _Listener(), model.config.get_text_config()
    trained = text.max_position_embeddings
    positions = torch.tensor([0, 1, 17, trained - 1, 3 * trained + 5], device=model.device)[:, None]
    with overriding_attention(model.modules(), listener):
        try:
            model(torch.full_like(positions, text.vocab_size // 3), position_ids=positions, use_cache=False)
        except ZebraError:
            raise
        except _CANNOT_RUN as error:
            raise ZebraError(
                f"a {model.config.model_type} cannot be tried for Self-Extend, one token at several positions: "
                f"{first_line(error)}. Load it without, or in another dtype."
            ) from None
    if not listener.calls:
        raise ZebraError(
            f"the attention of a {model.config.model_type} is not one of transformers' registered functions."
        )
    return listener.calls


@torch.no_grad()
def _try_cache(model: PreTrainedModel) -> None:
    """Refuse a host that cannot run on our cache, whose extended layers hand keys through it unread."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    try:
        model(ids, past_key_values=bounded_cache(model), use_cache=True)
    except _CANNOT_RUN as error:
        raise ZebraError(
            f"a {model.config.model_type} cannot run with the cache of Self-Extend: {first_line(error)}"
        ) from None


_CANNOT_RUN = (AttributeError, RuntimeError, TypeError, ValueError)
"""How a host says that it cannot."""


def _frequencies(model: PreTrainedModel) -> dict[str, Tensor]:
    """The frequencies of each rope of a model, by the name of the buffer.

    Raises:
        ZebraError: there are none.
    """
    found = {
        name: buffer
        for name, buffer in model.named_buffers()
        if name.endswith("inv_freq") and not name.endswith("original_inv_freq")
    }
    refuse_rope(model.config.model_type, "default" if found else None)
    return found


_LIKE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def _rope_of(call: _Call, known: dict[str, Tensor], model: PreTrainedModel) -> str | None:
    """Which frequencies turn the queries and keys of a module; None where it does not turn them at all.

    Raises:
        ZebraError: none of the model's, by half-split pairs.
    """
    start = torch.zeros_like(call.positions)
    off = {}
    for name, frequencies in known.items():
        if 2 * frequencies.numel() <= call.query.shape[-1] and frequencies.ndim == 1:
            turn = rotation_between(frequencies.to(call.query.device).float(), start, call.positions, torch.float32)
            off[name] = max(
                _difference(rotate(states[:1].expand_as(states).float(), turn), states)
                for states in (call.query, call.key)
            )
    best = min(off, key=off.__getitem__, default=None)
    allowed = _LIKE[call.query.dtype]
    if max(_difference(states[:1].expand_as(states), states) for states in (call.query, call.key)) <= allowed:
        return None
    if best is None or off[best] > allowed:
        raise ZebraError(
            f"layer {call.module.layer_idx} of this {model.config.model_type} does not turn queries and keys in the "
            "planes of the dimensions (r, r + R) by its rope's frequencies: its rope is interleaved, or positions "
            "enter in another way too. Self-Extend could not turn them again."
        )
    return best


def _difference(found: Tensor, wanted: Tensor) -> float:
    return ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()
