"""How each layer of a model rotates its queries and keys, probed with one token at several positions.

No list of families decides whether a model can have Self-Extend. A token that is alone attends to itself only, so that
only the rope distinguishes its positions, and each layer shows which frequencies rotate it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from zebra.errors import ZebraError, first_line
from zebra.kernels import Mask, attend
from zebra.model.local import local_attention_of
from zebra.model.override import overriding_attention
from zebra.model.self_extend.layer import NO_POSITION_IDS, rotate, rotation_between
from zebra.positions import refuse_rope

CANNOT_RUN = (AttributeError, RuntimeError, TypeError, ValueError)
"""The errors by which a model of transformers shows that it cannot run."""


@dataclass(frozen=True)
class AttentionLayer:
    """An attention module: its window and sinks where it is local, and what rotates its queries and keys.

    Attributes:
        rope: the name of the buffer that holds the frequencies; None where nothing rotates them.
        frequencies: (R), those of `rope`.
    """

    module: Any
    window: int | None
    sinks: int
    rope: str | None
    frequencies: Tensor | None


def attention_layers(model: PreTrainedModel, *, local: bool = False) -> list[AttentionLayer]:
    """The global attention layers of a model, and with `local` the local ones too.

    Raises:
        ZebraError: no rotary embedding; attention that is not reached by a registered function, or gets no positions;
            values of another size than keys; a layer whose queries and keys are rotated in another way.
    """
    ropes, sinks = _frequencies(model), local_attention_of(model).sinks
    layers = []
    for call in _probe(model):
        if local or call.window is None:
            rope = _rope_of(call, ropes, model)
            own_sinks = 0 if call.window is None else sinks
            layers.append(AttentionLayer(call.module, call.window, own_sinks, rope, ropes[rope] if rope else None))
    return layers


@dataclass(frozen=True)
class _Call:
    """What one attention module was given: the same token at each of N positions.

    Attributes:
        query: (N, H, 1, D). key: (N, K, 1, D). positions: (N, 1).
    """

    module: Any
    query: Tensor
    key: Tensor
    positions: Tensor
    window: int | None


class ProbeAttention:
    """An attention override that records its calls and then attends as without it."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []

    def attend(
        self,
        module: nn.Module,
        positions: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Mask,
        /,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As `AttentionOverride.attend`, of query (B, H, T, D), key and value (B, K, S, D)."""
        if positions is None:
            raise ZebraError(NO_POSITION_IDS)
        if value.shape[-1] != query.shape[-1]:
            raise ZebraError(
                f"Self-Extend takes heads of one size; here keys have {query.shape[-1]} and values {value.shape[-1]}."
            )
        self.calls.append(_Call(module, query, key, positions, mask.window))
        return attend(query, key, value, mask, **kwargs)


@torch.no_grad()
def _probe(model: PreTrainedModel) -> list[_Call]:
    """The call of each attention module for one token, alone, at several positions, beyond the trained length too."""
    probe, text = ProbeAttention(), model.config.get_text_config()
    trained = text.max_position_embeddings
    positions = torch.tensor([0, 1, 17, trained - 1, 3 * trained + 5], device=model.device)[:, None]
    with overriding_attention(model.modules(), probe):
        try:
            model(torch.full_like(positions, text.vocab_size // 3), position_ids=positions, use_cache=False)
        except ZebraError:
            raise
        except CANNOT_RUN as error:
            raise ZebraError(
                f"a {model.config.model_type} cannot be tried for Self-Extend, one token at several positions: "
                f"{first_line(error)}. Load it without, or in another dtype."
            ) from None
    if not probe.calls:
        raise ZebraError(
            f"the attention of a {model.config.model_type} is not one of transformers' registered functions."
        )
    return probe.calls


def _frequencies(model: PreTrainedModel) -> dict[str, Tensor]:
    """The frequencies (R) of each rope of a model, by the name of the buffer.

    Raises:
        ZebraError: there are none.
    """
    ropes = {
        name: buffer
        for name, buffer in model.named_buffers()
        if name.endswith("inv_freq") and not name.endswith("original_inv_freq")
    }
    refuse_rope(model.config.model_type, "default" if ropes else None)
    return ropes


_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def _rope_of(call: _Call, ropes: dict[str, Tensor], model: PreTrainedModel) -> str | None:
    """Which frequencies rotate the queries and keys of a module; None where nothing rotates them.

    Raises:
        ZebraError: none of the model's, by half-split pairs.
    """
    start = torch.zeros_like(call.positions)
    errors = {}
    for name, frequencies in ropes.items():
        if 2 * frequencies.numel() <= call.query.shape[-1] and frequencies.ndim == 1:
            rotation = rotation_between(frequencies.to(call.query.device).float(), start, call.positions, torch.float32)
            errors[name] = max(
                _relative_error(rotate(states[:1].expand_as(states).float(), rotation), states)
                for states in (call.query, call.key)
            )
    best = min(errors, key=errors.__getitem__, default=None)
    tolerance = _TOLERANCE[call.query.dtype]
    if max(_relative_error(states[:1].expand_as(states), states) for states in (call.query, call.key)) <= tolerance:
        return None
    if best is None or errors[best] > tolerance:
        raise ZebraError(
            f"layer {call.module.layer_idx} of this {model.config.model_type} does not rotate queries and keys in the "
            "planes of the dimensions (r, r + R) by its rope's frequencies: its rope is interleaved, or positions "
            "enter in another way too. Self-Extend could not rotate them again."
        )
    return best


def _relative_error(states: Tensor, expected: Tensor) -> float:
    return ((states.float() - expected.float()).norm() / expected.float().norm()).item()
