"""Cache layers whose keys only attention "zebra" can read: for Self-Extend, sinks and full decoding.

    Self-Extend         [f0 f1 f2 f3 f4 f5 f6 f7 ...|    ]     keys rotated to their grouped positions, and
                                         [k5 k6 k7|  ]         the last W - 1 as they came; values once
    sinks               [k0 k1]          [k5 k6 k7|  ]         a local layer, and each sequence's first real tokens
    full decoding       [k0 k1 k2 k3 k4 k5 k6 k7 ...|    ]     a local layer that sees all while it decodes

All keys and values are (B, K, tokens, D).
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from zebra.kernels.sinks import NO_POSITION, Sinks
from zebra.model.cache_layers import GrowingBuffer, GrowingLayer, PerSequenceStates, Tail, TrimmedSlidingLayer


class OpaqueKeys:
    """Keys on their way from the cache through transformers to attention "zebra", which alone can read them."""

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            'the cache of a model with Self-Extend, sinks or full decoding supports only attention "zebra"; '
            f"after set_attn_implementation, or in another model, pass a DynamicCache. ({name} of opaque keys)"
        )


class PendingKeys(OpaqueKeys):
    """New keys on their way into a cache layer of Self-Extend.

    The cache knows no positions, so it passes them through transformers to the attention function, which rotates them
    and calls `layer.write`.

    Attributes:
        states: the new keys, (B, K, T, D).
    """

    def __init__(self, layer: SelfExtendLayer, states: Tensor):
        self.layer, self.states = layer, states


class SelfExtendLayer(PerSequenceStates, GrowingLayer):
    """A global layer under Self-Extend: N far keys, N values and W - 1 near keys, instead of two keys for each token.

    Attributes:
        keys: all, rotated to their grouped positions. near: the last W - 1, as transformers rotated them.
        offset: in the model's first such layer, the position of each sequence's tokens minus their index, (B, 1).
    """

    _STATES = _TAIL = ("near", "offset")

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window
        self.record_past = False
        self.near = torch.tensor([])
        self.offset: Tensor | None = None
        self._near_buffer = GrowingBuffer()

    def activate_past_recording(self) -> None:
        """Keep all near keys until a crop."""
        self.record_past = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """Append values (B, K, T, D) and return all (B, K, S, D); the keys wait for the attention function."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.values = self._value_buffer.append(self.values, value_states)
        return PendingKeys(self, key_states), self.values

    def write(self, near: Tensor, far: Tensor) -> tuple[Tensor, Tensor]:
        """Append new keys (B, K, T, D); return the near keys of the new queries, and all far keys."""
        self.keys = self._key_buffer.append(self.keys, far)
        new = near.shape[-2]
        near = self._near_buffer.append(self.near, near, None if self.record_past else self.window - 1)
        self.near = near if self.record_past else self._near_buffer.last(near, self.window - 1)
        return near[:, :, max(0, near.shape[-2] - (self.window - 1 + new)) :], self.keys

    def continues(self, offset: Tensor) -> bool:
        """Whether the offset of new tokens, (B, 1), equals that of the earlier ones; `NO_POSITION` matches any."""
        before, self.offset = self.offset, offset.expand(len(self.values), 1)
        if before is None or torch.equal(before, self.offset):  # the common case, in one call
            return True
        self.offset = torch.where(offset == NO_POSITION, before, offset)
        return bool(((before == offset) | (before == NO_POSITION) | (offset == NO_POSITION)).all())

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, and the near keys that were recorded for this."""
        before = self.get_seq_length()
        super().crop(tokens_to_remove)
        if not self.is_initialized:
            return
        length = self.get_seq_length()
        self.offset = self.offset if length else None
        near = self.near.shape[-2] - (before - length) if self.near.numel() else 0
        if near < min(length, self.window - 1):
            raise RuntimeError(
                "tokens cannot be removed from a cache that has already dropped the near keys before them. "
                "Call activate_past_recording first."
            )
        self.near = self._near_buffer.last(self.near[:, :, : max(0, near)], self.window - 1)

    def _sliced_tail(self, length: int) -> Tail | None:
        if self.near.shape[-2] < self.get_seq_length():
            return None
        return {"near": self.near[:, :, :length], "offset": self.offset if length else None}

    def reset(self) -> None:
        """Empty the layer. transformers 5.17 would keep zeros in place of the tokens."""
        self.is_initialized = False
        super().reset()
        self.keys = self.values = self.near = torch.tensor([])
        self.offset = None


class SinkKeys(OpaqueKeys):
    """The keys of a local layer, and what its attention needs to know about them.

    Attributes:
        states: the keys that the window shows to the new queries, (B, K, n, D); all keys under full decoding.
        start: the index in the sequence of the first of these keys.
        prompt_length: tokens of a sequence that are read before decoding begins; None where it was not set.
        layer: the cache layer whose `store` holds the sinks; None under full decoding.
    """

    def __init__(self, states: Tensor, start: int, *, prompt_length: int | None = None, layer: SinkLayer | None = None):
        self.states, self.start, self.prompt_length, self.layer = states, start, prompt_length, layer


class FullDecodeLayer(GrowingLayer):
    """A local layer that keeps all keys, for models whose decoded tokens see all of them.

    Attributes:
        prompt_length: tokens that are read with the window before decoding begins; None where it was not set.
    """

    prompt_length: int | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """Append new keys and values (B, K, T, D); return all of them."""
        keys, values = super().update(key_states, value_states)
        return SinkKeys(keys, 0, prompt_length=self.prompt_length), values


class SinkLayer(PerSequenceStates, TrimmedSlidingLayer):
    """A local layer that also stores the keys and values of each sequence's first real tokens.

    Attributes:
        sink_keys, sink_values: (B, K, sinks, D), zeros where a sequence has no such token yet.
        positions: (B, sinks), their indices in the sequence; `NO_POSITION` where there is none.
    """

    _STATES = ("sink_keys", "sink_values", "positions", "_first_real")
    _TAIL = (*TrimmedSlidingLayer._TAIL, *_STATES, "_last")

    def __init__(self, sliding_window: int, sinks: int) -> None:
        super().__init__(sliding_window)
        self.sinks = sinks
        self._clear()

    def _clear(self) -> None:
        self.sink_keys: Any = None
        self.sink_values: Any = None
        self.positions: Any = None
        self._first_real: Any = None  # (B), the index of each sequence's first real token
        self._last: int | None = None  # the index of the last sink of all sequences, once all are stored
        self._unstored: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """Append keys and values (B, K, T, D); return those that the new queries may see. `store` adds the sinks."""
        keys, values = super().update(key_states, value_states)
        self._unstored = None if self._last is not None else (key_states, value_states)
        return SinkKeys(keys, self.cumulative_length - keys.shape[-2], layer=self), values

    def store(self, real: Tensor | None) -> Sinks:
        """Store the new tokens that are sinks, and return all sinks so far.

        Args:
            real: (B, T) bool, False where a new token is padding; None if all are real.
        """
        if self._unstored is not None:
            self._write(*self._unstored, real)
            self._unstored = None
        keys, values = self.sink_keys.unsqueeze(2), self.sink_values.unsqueeze(2)
        return Sinks(keys, values, self.positions.unsqueeze(1), self._last)

    def _write(self, keys: Tensor, values: Tensor, real: Tensor | None) -> None:
        batch, heads, new, size = keys.shape
        if self.positions is None:
            self.sink_keys = keys.new_zeros(batch, heads, self.sinks, size)
            self.sink_values = values.new_zeros(batch, heads, self.sinks, values.shape[3])
            self.positions = torch.full((batch, self.sinks), NO_POSITION, device=keys.device)
            self._first_real = torch.full((batch,), NO_POSITION, device=keys.device)
        end = self.cumulative_length
        index = torch.arange(end - new, end, device=keys.device)
        first = index[:1] if real is None else torch.where(real, index, NO_POSITION).amin(dim=1)
        self._first_real = torch.minimum(self._first_real, first)
        slot = index - self._first_real[:, None]
        is_sink = slot < self.sinks if real is None else (slot < self.sinks) & real
        entries, columns = is_sink.nonzero(as_tuple=True)
        slots = slot[entries, columns]
        # Not in place: a backward may need the old values, and another cache may share them.
        self.positions = self.positions.index_put((entries, slots), index[columns])
        self.sink_keys, self.sink_values = (
            sinks.transpose(1, 2).index_put((entries, slots), states.transpose(1, 2)[entries, columns]).transpose(1, 2)
            for sinks, states in ((self.sink_keys, keys), (self.sink_values, values))
        )
        is_complete = bool((self._first_real + self.sinks <= end).all())
        self._last = int(self.positions.max()) if is_complete else None

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, and the sinks among them."""
        super().crop(tokens_to_remove)
        self.__dict__.update(self._sinks_before(self.cumulative_length))

    def _sliced_tail(self, length: int) -> Tail | None:
        tail = super()._sliced_tail(length)
        return None if tail is None else tail | self._sinks_before(length)

    def _sinks_before(self, end: int) -> Tail:
        if self.positions is None:
            return {}
        first = self._first_real.masked_fill(self._first_real >= end, NO_POSITION)
        return {
            "positions": self.positions.masked_fill(self.positions >= end, NO_POSITION),
            "_first_real": first,
            "_last": self._last if bool((first + self.sinks <= end).all()) else None,
        }

    def reset(self) -> None:
        """Empty the layer."""
        super().reset()
        self._clear()
