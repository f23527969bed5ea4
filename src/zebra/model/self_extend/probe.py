"""Find out how each layer of a model rotates its queries and keys, with one token at several positions.

No list of families decides whether a model can have Self-Extend. A single token attends only to itself, so only the
rope depends on its position, and each layer shows which frequencies rotate it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from zebra.errors import ZebraError, first_line
from zebra.kernels import Mask, attend
from zebra.model.context import context_length
from zebra.model.local import local_attention_of
from zebra.model.override import overriding_attention
from zebra.model.self_extend.layer import NO_POSITION_IDS, rotate, rotation_between
from zebra.positions import check_rotatable_rope

_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
CANNOT_RUN = (AttributeError, RuntimeError, TypeError, ValueError)
"""The errors of a transformers model that cannot run."""


@dataclass(frozen=True)
class AttentionLayer:
    """An attention module, with its window and sinks if it is local, and what rotates its queries and keys.

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
        ZebraError: no rotary embedding; attention that is no registered function, or gets no positions; values of
            another head size than keys; a layer whose queries and keys are rotated in another way.
    """
    ropes = {
        name: buffer
        for name, buffer in model.named_buffers()
        if name.endswith("inv_freq") and not name.endswith("original_inv_freq")
    }
    text, family = model.config.get_text_config(), model.config.model_type
    check_rotatable_rope(family, "default" if ropes else None)
    probe, trained = ProbeAttention(model, ropes, local), context_length(model.config) or 0
    positions = torch.tensor([0, 1, 17, trained - 1, 3 * trained + 5], device=model.device)[:, None]
    with overriding_attention(model.modules(), probe), torch.no_grad():
        try:
            model(torch.full_like(positions, text.vocab_size // 3), position_ids=positions, use_cache=False)
        except ZebraError:
            raise
        except CANNOT_RUN as error:
            raise ZebraError(
                f"Self-Extend could not probe this {family} with one token at several positions: {first_line(error)}. "
                "Load it without Self-Extend, or in another dtype."
            ) from None
    if not probe.is_reached:
        raise ZebraError(f"the attention of a {family} does not use transformers' registered functions.")
    return probe.layers


class ProbeAttention:
    """An attention override that records what rotates each layer, for a single token at each of several positions.

    Attributes:
        ropes: the frequencies (R) of each rope of the model, by the name of the buffer.
        local: whether to record local layers too.
        is_reached: whether any layer attended.
    """

    def __init__(self, model: PreTrainedModel, ropes: dict[str, Tensor], local: bool) -> None:
        self.model, self.ropes, self.local = model, ropes, local
        self.sinks = local_attention_of(model).sinks
        self.layers: list[AttentionLayer] = []
        self.is_reached = False

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
        """As `AttentionOverride.attend`, for query (B, H, 1, D), key and value (B, K, 1, D)."""
        if positions is None:
            raise ZebraError(NO_POSITION_IDS)
        if value.shape[-1] != query.shape[-1]:
            raise ZebraError(
                f"Self-Extend requires keys and values of the same head size; got {query.shape[-1]} and "
                f"{value.shape[-1]}. Load the model without Self-Extend."
            )
        self.is_reached = True
        if self.local or mask.window is None:
            rope = self._rope_of(module, positions, (query, key))
            sinks = 0 if mask.window is None else self.sinks
            self.layers.append(AttentionLayer(module, mask.window, sinks, rope, self.ropes[rope] if rope else None))
        return attend(query, key, value, mask, **kwargs)

    def _rope_of(self, module: Any, positions: Tensor, vectors: tuple[Tensor, Tensor]) -> str | None:
        """Which frequencies rotate the queries and keys of a module; None where nothing rotates them.

        Raises:
            ZebraError: something other than the model's own frequencies in half-split pairs.
        """
        vectors_at_0 = [states[:1].expand_as(states).float() for states in vectors]
        tolerance = _TOLERANCE[vectors[0].dtype]
        if _largest_error(vectors_at_0, vectors) <= tolerance:
            return None
        errors = {}
        for name, frequencies in self.ropes.items():
            if 2 * frequencies.numel() <= vectors[0].shape[-1] and frequencies.ndim == 1:
                frequencies = frequencies.to(positions.device).float()
                rotation = rotation_between(frequencies, torch.zeros_like(positions), positions, torch.float32)
                errors[name] = _largest_error([rotate(states, rotation) for states in vectors_at_0], vectors)
        best = min(errors, key=errors.__getitem__, default=None)
        if best is None or errors[best] > tolerance:
            raise ZebraError(
                "Self-Extend requires a rope that rotates the dimensions (r, r + R) of queries and keys; layer "
                f"{module.layer_idx} of this {self.model.config.model_type} does not: its rope is interleaved, or "
                "positions enter in another way too. Load it without Self-Extend."
            )
        return best


def _largest_error(outputs: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    errors = ((x - y.float()).norm() / y.float().norm() for x, y in zip(outputs, expected, strict=True))
    return max(error.item() for error in errors)
