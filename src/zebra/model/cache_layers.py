"""Cache layers for plain attention: keys and values of all tokens, or of those in the window, with spare room.

    global layer        [k0 k1 k2 k3 k4 k5 k6 k7 ...|    ]     grows with the text, by a quarter at a time
    local layer                          [k5 k6 k7|  ]         the last window - 1, and a quarter of that as room

The local layer of transformers keeps `window - 1` keys, but after a long prefill as a view, which holds the storage of
all of them. Both of its layers copy everything that they hold for each new token.

All keys and values are (B, K, tokens, D).
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class GrowingBuffer:
    """Storage with spare room behind a layer's tokens, so that a few more are appended in place.

    Only the tensor that it returned last is extended in place. Any other (reordered, cropped, set from outside) is
    copied, so that two caches with a common prefix never write into each other.
    """

    def __init__(self) -> None:
        self._latest: weakref.ref[Tensor] | None = None

    def __reduce__(self) -> tuple[type[GrowingBuffer], tuple[()]]:
        return GrowingBuffer, ()

    def append(self, states: Tensor, new: Tensor, limit: int | None = None) -> Tensor:
        """Append `new` (B, K, t, D) to `states` (B, K, n, D) or empty.

        The buffer has room for n + t tokens, or for up to 1.25 times those that stay (all, or the last `limit`).
        """
        if states.numel() == 0:
            return new.clone(memory_format=torch.contiguous_format)
        unlike = states.dtype != new.dtype or states.shape[:2] != new.shape[:2]
        if unlike or torch.is_grad_enabled():  # a backward needs what a write in place would change
            return torch.cat([states, new], dim=-2)
        n, t, size = states.shape[-2], new.shape[-2], states.shape[-1]
        read_only = states.is_inference() and not torch.is_inference_mode_enabled()  # torch forbids writing into it
        if self._is_latest(states) and not read_only:
            start, capacity = states.storage_offset() // size, states.stride(1) // size
            if start + n + t <= capacity:
                grown = states.as_strided((*states.shape[:2], n + t, size), states.stride(), states.storage_offset())
                grown[:, :, n:] = new
                return self._remember(grown)
        staying = n + t if limit is None else min(n + t, limit)
        # No room after many new tokens: another long prefill is not expected.
        slack = max(0, staying + staying // 4 - (n + t)) if t <= n // 4 else 0
        buffer = states.new_empty(*states.shape[:2], n + t + slack, size)
        buffer[:, :, :n], buffer[:, :, n : n + t] = states, new
        return self._remember(buffer[:, :, : n + t])

    def last(self, states: Tensor, count: int) -> Tensor:
        """The last `count` tokens, copied if their buffer is larger by more than a quarter and more than a token."""
        tail = states[:, :, max(0, states.shape[-2] - count) :]
        allowed = tail.shape[-2] + max(1, tail.shape[-2] // 4)
        if tail.untyped_storage().nbytes() > allowed * states[:, :, :1].numel() * states.element_size():
            return tail.clone()
        return self._remember(tail) if self._is_latest(states) else tail

    def _is_latest(self, states: Tensor) -> bool:
        return self._latest is not None and self._latest() is states

    def _remember(self, states: Tensor) -> Tensor:
        self._latest = weakref.ref(states)
        return states


Tail = dict[str, Any]
"""What a cache layer holds of the end of a text only, by attribute name."""


class CuttableLayer(DynamicLayer):
    """A layer that can return to an earlier length without another prefill: what it holds of all tokens is sliced.

    What it holds of the last tokens only (`_TAIL`) is restored from a copy that was taken at that length.
    """

    keys: Tensor
    values: Tensor
    _TAIL: ClassVar[tuple[str, ...]] = ()

    def tail(self) -> Tail:
        """Copies of what `cut` needs to return to the length that the layer has now."""
        states = {name: getattr(self, name) for name in self._TAIL}
        return {name: state.clone() if isinstance(state, Tensor) else state for name, state in states.items()}

    def cut(self, length: int, tail: Tail | None = None) -> Self | None:
        """A layer with the first `length` tokens, which appends to storage of its own; this one does not change.

        Returns:
            None where tokens before `length` that it needs are gone, and there is no tail of that length.
        """
        if not self.is_initialized or length == self.get_seq_length():
            tail = {}
        elif tail is None and (tail := self._sliced_tail(length)) is None:
            return None
        layer = copy.copy(self)
        buffers = {name: GrowingBuffer() for name, one in vars(self).items() if isinstance(one, GrowingBuffer)}
        layer.__dict__.update(buffers | tail)
        return layer

    def _sliced_tail(self, length: int) -> Tail | None:
        """The tail at an earlier length, from what the layer holds now; None where that is not enough."""
        raise NotImplementedError


class GrowingLayer(CuttableLayer):
    """transformers' global layer, with spare room to grow."""

    def __init__(self) -> None:
        super().__init__()
        self._key_buffer, self._value_buffer = GrowingBuffer(), GrowingBuffer()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """Append new keys and values (B, K, T, D); return all of them, (B, K, S, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._key_buffer.append(self.keys, key_states)
        self.values = self._value_buffer.append(self.values, value_states)
        return self.keys, self.values

    def cut(self, length: int, tail: Tail | None = None) -> Self | None:
        """As `CuttableLayer.cut`, over the same tensors."""
        layer = super().cut(length, tail)
        if layer is not None and layer.is_initialized:
            layer.keys, layer.values = self.keys[:, :, :length], self.values[:, :, :length]
        return layer

    def _sliced_tail(self, length: int) -> Tail | None:
        return {}


class TrimmedSlidingLayer(DynamicSlidingWindowLayer, CuttableLayer):
    """transformers' local layer, which frees the storage of the tokens that it no longer needs.

    While past states are recorded (assisted decoding), all tokens stay until transformers crops them, as in its own
    layer.
    """

    _TAIL: ClassVar[tuple[str, ...]] = ("keys", "values", "cumulative_length")

    def __init__(self, sliding_window: int) -> None:
        super().__init__(sliding_window)
        self._key_buffer, self._value_buffer = GrowingBuffer(), GrowingBuffer()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """Append new keys and values (B, K, T, D); return those that the new queries may see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.cumulative_length += key_states.shape[-2]
        limit = None if self.record_past else self.sliding_window - 1
        keys = self._key_buffer.append(self.keys, key_states, limit)
        values = self._value_buffer.append(self.values, value_states, limit)
        first = max(0, keys.shape[-2] - (self.sliding_window - 1 + key_states.shape[-2]))
        if self.record_past:
            self.keys, self.values = keys, values
        else:
            self._trim(keys, values)
        return keys[:, :, first:], values[:, :, first:]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, and free what is no longer needed."""
        super().crop(tokens_to_remove)
        if self.is_initialized:
            self._trim(self.keys, self.values)

    def _sliced_tail(self, length: int) -> Tail | None:
        if self.keys.shape[-2] < self.cumulative_length:
            return None
        return {"keys": self.keys[:, :, :length], "values": self.values[:, :, :length], "cumulative_length": length}

    def _trim(self, keys: Tensor, values: Tensor) -> None:
        # transformers slices by -(window - 1), which for a window of 1 is everything.
        self.keys = self._key_buffer.last(keys, self.sliding_window - 1)
        self.values = self._value_buffer.last(values, self.sliding_window - 1)


class PerSequenceStates(DynamicLayer):
    """The batch operations of a cache layer, for its own tensors too: those named in `_STATES`, (B, ...) or None."""

    _STATES: ClassVar[tuple[str, ...]]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the sequences by beam index, (B)."""
        super().reorder_cache(beam_idx)
        self._replace_states(lambda states: states.index_select(0, beam_idx.to(states.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        super().batch_repeat_interleave(repeats)
        self._replace_states(lambda states: states.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences at these indices."""
        super().batch_select_indices(indices)
        self._replace_states(lambda states: states[indices, ...])

    def _replace_states(self, change: Callable[[Tensor], Tensor]) -> None:
        for name in self._STATES:
            states = getattr(self, name)
            if states is not None and states.numel():
                setattr(self, name, change(states))
