"""transformers' hybrid cache, truly bounded, and grown with slack instead of copied at every token.

    global layer        [k0 k1 k2 k3 k4 k5 k6 k7 ...|    ]     grows with the text, a quarter of it at a time
    local layer                          [k5 k6 k7|  ]         the last window - 1, and a quarter of that to move in
    Self-Extend layer   [f0 f1 f2 f3 f4 f5 f6 f7 ...|    ]     keys rotated to their grouped positions, and
                                         [k5 k6 k7|  ]         the last W - 1 as they came; values once
    with sinks          [k0 k1]          [k5 k6 k7|  ]         a local layer, and each sequence's first real tokens
    with full decoding  [k0 k1 k2 k3 k4 k5 k6 k7 ...|    ]     a local layer that sees all while it decodes

transformers' own local layer shows `window - 1` keys but, after a long prefill, still holds the storage of all of them
through a view; and both of its layers copy everything they hold for each new token. `StripedCache` differs from
`DynamicCache` in these two things alone, and in layers of its own for Self-Extend, sinks and full decoding.

All keys and values are (B, K, tokens, D).
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NoReturn, Self

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from zebra.kernels.sinks import NO_POSITION, Sinks


class _GrowingBuffer:
    """Storage with room behind the tokens of a layer: appending a few writes in place.

    Only behind the very tensor that was handed out last: what was reordered, cropped or put there by another is copied,
    so that two caches that share a beginning never write into each other.
    """

    def __init__(self) -> None:
        self._latest: weakref.ref[Tensor] | None = None

    def __reduce__(self) -> tuple[type[_GrowingBuffer], tuple[()]]:
        return _GrowingBuffer, ()

    def append(self, states: Tensor, new: Tensor, limit: int | None = None) -> Tensor:
        """`states` (B, K, n, D) or empty, then `new` (B, K, t, D).

        The buffer has at most n + t tokens, or 1.25 of those that stay: all of them, or the last `limit`.
        """
        if states.numel() == 0:
            return new.clone(memory_format=torch.contiguous_format)
        unlike = states.dtype != new.dtype or states.shape[:2] != new.shape[:2]
        if unlike or torch.is_grad_enabled():  # a write in place would spoil what a backward needs
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
        # Another prefill as long as this one is not to be expected.
        slack = max(0, staying + staying // 4 - (n + t)) if t <= n // 4 else 0
        buffer = states.new_empty(*states.shape[:2], n + t + slack, size)
        buffer[:, :, :n], buffer[:, :, n : n + t] = states, new
        return self._remember(buffer[:, :, : n + t])

    def last(self, states: Tensor, count: int) -> Tensor:
        """The last `count` tokens, copied where the buffer behind them is more than a quarter, or a token, larger."""
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
"""What a cache layer holds of the end of a text alone, by the names of its attributes."""


class _CuttableLayer(DynamicLayer):
    """A layer that goes back to an earlier length without reading again: what it holds of all tokens is sliced.

    What it holds of the last tokens alone (`_TAIL`) comes from a copy that was taken at that length.
    """

    keys: Tensor
    values: Tensor
    _TAIL: ClassVar[tuple[str, ...]] = ()

    def tail(self) -> Tail:
        """Copies of what `cut` needs to come back to the length that the layer has now."""
        states = {name: getattr(self, name) for name in self._TAIL}
        return {name: state.clone() if isinstance(state, Tensor) else state for name, state in states.items()}

    def cut(self, length: int, tail: Tail | None = None) -> Self | None:
        """A layer with the first `length` tokens, which appends to storage of its own; this one stays as it is.

        Returns:
            None where tokens before `length` that it needs are gone, and no tail of that length brings them back.
        """
        if not self.is_initialized or length == self.get_seq_length():
            tail = {}
        elif tail is None and (tail := self._sliced_tail(length)) is None:
            return None
        layer = copy.copy(self)
        buffers = {name: _GrowingBuffer() for name, one in vars(self).items() if isinstance(one, _GrowingBuffer)}
        layer._set(buffers | tail)
        return layer

    def _set(self, attributes: Tail) -> None:
        for name, value in attributes.items():
            setattr(self, name, value)

    def _sliced_tail(self, length: int) -> Tail | None:
        """The tail at an earlier length, of what the layer holds now; None where that is not enough."""
        raise NotImplementedError


class GrowingLayer(_CuttableLayer):
    """transformers' global layer, grown with slack."""

    def __init__(self) -> None:
        super().__init__()
        self._key_buffer, self._value_buffer = _GrowingBuffer(), _GrowingBuffer()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """Append new keys and values (B, K, T, D); return all, (B, K, S, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._key_buffer.append(self.keys, key_states)
        self.values = self._value_buffer.append(self.values, value_states)
        return self.keys, self.values

    def cut(self, length: int, tail: Tail | None = None) -> Self | None:
        """As `_CuttableLayer.cut`, over the same tensors."""
        layer = super().cut(length, tail)
        if layer is not None and layer.is_initialized:
            layer.keys, layer.values = self.keys[:, :, :length], self.values[:, :, :length]
        return layer

    def _sliced_tail(self, length: int) -> Tail | None:
        return {}


class TrimmedSlidingLayer(DynamicSlidingWindowLayer, _CuttableLayer):
    """transformers' local layer, which lets go of the storage behind what it still needs.

    While past states are recorded (assisted decoding), everything stays until transformers crops it, as in its own.
    """

    _TAIL: ClassVar[tuple[str, ...]] = ("keys", "values", "cumulative_length")

    def __init__(self, sliding_window: int) -> None:
        super().__init__(sliding_window)
        self._key_buffer, self._value_buffer = _GrowingBuffer(), _GrowingBuffer()

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
        """Take back the last tokens, and let go of what is no longer needed."""
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


class _PerSequenceStates(DynamicLayer):
    """The batch operations of a cache layer, for its own tensors too: those named in `_STATES`, (B, ...) or None."""

    _STATES: ClassVar[tuple[str, ...]]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the beams in another order, (B)."""
        super().reorder_cache(beam_idx)
        self._replace_states(lambda states: states.index_select(0, beam_idx.to(states.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        super().batch_repeat_interleave(repeats)
        self._replace_states(lambda states: states.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences."""
        super().batch_select_indices(indices)
        self._replace_states(lambda states: states[indices, ...])

    def _replace_states(self, change: Callable[[Tensor], Tensor]) -> None:
        for name in self._STATES:
            states = getattr(self, name)
            if states is not None and states.numel():
                setattr(self, name, change(states))


class OpaqueKeys:
    """Keys on their way from the cache through transformers to attention "zebra", which alone can read them."""

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            'the cache of a model under Self-Extend, with sinks or with full decoding serves attention "zebra" alone; '
            f"after set_attn_implementation, or in another model, pass a DynamicCache. ({name} of opaque keys)"
        )


class PendingKeys(OpaqueKeys):
    """New keys on their way into a layer of Self-Extend.

    The cache knows no positions, so it hands them through transformers to the attention function, which rotates them
    and calls `layer.write`.

    Attributes:
        states: the new keys, (B, K, T, D).
    """

    def __init__(self, layer: SelfExtendLayer, states: Tensor):
        self.layer, self.states = layer, states


class SelfExtendLayer(_PerSequenceStates, GrowingLayer):
    """A global layer under Self-Extend: N far keys and N values, and W - 1 near keys; never two keys of all tokens.

    Attributes:
        keys: all, rotated to their grouped positions. near: the last W - 1, as transformers rotated them.
        offset: in the model's first such layer, the position of each sequence's tokens less their index, (B, 1).
    """

    _STATES = _TAIL = ("near", "offset")

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window
        self.record_past = False
        self.near = torch.tensor([])
        self.offset: Tensor | None = None
        self._near_buffer = _GrowingBuffer()

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
        """Append new keys (B, K, T, D); return those that the new queries see near, and all far ones."""
        self.keys = self._key_buffer.append(self.keys, far)
        new = near.shape[-2]
        near = self._near_buffer.append(self.near, near, None if self.record_past else self.window - 1)
        self.near = near if self.record_past else self._near_buffer.last(near, self.window - 1)
        return near[:, :, max(0, near.shape[-2] - (self.window - 1 + new)) :], self.keys

    def continues(self, offset: Tensor) -> bool:
        """Whether `offset` of new tokens, (B, 1), is that of the ones before; `NO_POSITION` is any."""
        before, self.offset = self.offset, offset.expand(len(self.values), 1)
        if before is None or torch.equal(before, self.offset):  # one call for each token
            return True
        self.offset = torch.where(offset == NO_POSITION, before, offset)
        return bool(((before == offset) | (before == NO_POSITION) | (offset == NO_POSITION)).all())

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens, and let go of the near keys that were recorded for it."""
        before = self.get_seq_length()
        super().crop(tokens_to_remove)
        if not self.is_initialized:
            return
        length = self.get_seq_length()
        self.offset = self.offset if length else None
        near = self.near.shape[-2] - (before - length) if self.near.numel() else 0
        if near < min(length, self.window - 1):
            raise RuntimeError(
                "tokens were taken back from a cache that had let go of the near keys before them. "
                "Call activate_past_recording first."
            )
        self.near = self._near_buffer.last(self.near[:, :, : max(0, near)], self.window - 1)

    def _sliced_tail(self, length: int) -> Tail | None:
        if self.near.shape[-2] < self.get_seq_length():
            return None
        return {"near": self.near[:, :, :length], "offset": self.offset if length else None}

    def reset(self) -> None:
        """Empty it. Transformers 5.17 would keep zeros in place of the tokens."""
        self.is_initialized = False
        super().reset()
        self.keys = self.values = self.near = torch.tensor([])
        self.offset = None


class SinkKeys(OpaqueKeys):
    """The keys of a local layer, and what its attention must know of them besides.

    Attributes:
        states: the keys that the new queries may see by the window, (B, K, n, D); all of them under full decoding.
        start: the index of the first of them in its sequence.
        prompt_length: tokens of a sequence that are read before decoding begins; None where nobody has set it.
        layer: the one whose `store` takes and gives the sinks; None under full decoding.
    """

    def __init__(self, states: Tensor, start: int, *, prompt_length: int | None = None, layer: SinkLayer | None = None):
        self.states, self.start, self.prompt_length, self.layer = states, start, prompt_length, layer


class FullDecodeLayer(GrowingLayer):
    """A local layer that keeps all keys, for models whose decoded tokens see all of them.

    Attributes:
        prompt_length: tokens that are read by the window before decoding begins.
    """

    prompt_length: int | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """Append new keys and values (B, K, T, D); return all."""
        keys, values = super().update(key_states, value_states)
        return SinkKeys(keys, 0, prompt_length=self.prompt_length), values


class SinkLayer(_PerSequenceStates, TrimmedSlidingLayer):
    """A local layer, and beside it a store of each sequence's first real tokens.

    Attributes:
        sink_keys, sink_values: (B, K, sinks, D), zeros where a sequence has no such token yet.
        positions: (B, sinks), their indices in the sequence; `NO_POSITION` where there is none.
    """

    _STATES = ("sink_keys", "sink_values", "positions", "_first_real")
    _TAIL = (*TrimmedSlidingLayer._TAIL, *_STATES, "_is_complete")

    def __init__(self, sliding_window: int, sinks: int) -> None:
        super().__init__(sliding_window)
        self.sinks = sinks
        self._clear()

    def _clear(self) -> None:
        self.sink_keys: Any = None
        self.sink_values: Any = None
        self.positions: Any = None
        self._first_real: Any = None  # (B), the index of each sequence's first real token
        self._is_complete = False
        self._unstored: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """Append keys and values (B, K, T, D); return those that the new queries may see. `store` takes the sinks."""
        keys, values = super().update(key_states, value_states)
        self._unstored = None if self._is_complete else (key_states, value_states)
        return SinkKeys(keys, self.cumulative_length - keys.shape[-2], layer=self), values

    def store(self, real: Tensor | None) -> Sinks:
        """Put those of the new tokens that are sinks into the store, and return it.

        Args:
            real: (B, T) bool, which of the new tokens are no padding; None where all are.
        """
        if self._unstored is not None:
            self._write(*self._unstored, real)
            self._unstored = None
        return Sinks(self.sink_keys.unsqueeze(2), self.sink_values.unsqueeze(2), self.positions.unsqueeze(1))

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
        # Not in place: a backward may need what was there, and another cache may share it.
        self.positions = self.positions.index_put((entries, slots), index[columns])
        self.sink_keys, self.sink_values = (
            sinks.transpose(1, 2).index_put((entries, slots), states.transpose(1, 2)[entries, columns]).transpose(1, 2)
            for sinks, states in ((self.sink_keys, keys), (self.sink_values, values))
        )
        self._is_complete = bool((self._first_real + self.sinks <= end).all())

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens, sinks among them too."""
        super().crop(tokens_to_remove)
        self._set(self._sinks_before(self.cumulative_length))

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
            "_is_complete": self._is_complete and bool((first + self.sinks <= end).all()),
        }

    def reset(self) -> None:
        """Empty it."""
        super().reset()
        self._clear()


class StripedCache(DynamicCache):
    """`DynamicCache(config=...)` with layers of ours: the default of `generate` after `zebra.load`.

    Args:
        windows: Self-Extend's neighbour window of each layer that has it. `zebra.model.self_extend.bounded_cache` reads
            the windows off a model, and what local layers need.
        sinks: of each local layer.
        full_decode: whether local layers keep all, for decoded tokens to see.
    """

    layers: list[Any]

    def __init__(
        self,
        config: PreTrainedConfig,
        windows: Mapping[int, int] | None = None,
        *,
        sinks: int = 0,
        full_decode: bool = False,
    ):
        super().__init__(config=config)
        for i, layer in enumerate(self.layers):
            if windows and i in windows:
                self.layers[i] = SelfExtendLayer(windows[i])
            elif type(layer) is DynamicSlidingWindowLayer:
                window = layer.sliding_window
                bounded = SinkLayer(window, sinks) if sinks else TrimmedSlidingLayer(window)
                self.layers[i] = FullDecodeLayer() if full_decode else bounded
            elif type(layer) is DynamicLayer:
                self.layers[i] = GrowingLayer()

    def set_prompt_length(self, tokens: int) -> None:
        """Set how many tokens of each sequence, padding counted, are the prompt; those behind them are decoded."""
        for layer in self.layers:
            if isinstance(layer, FullDecodeLayer):
                layer.prompt_length = tokens

    def tails(self) -> list[Tail] | None:
        """Copies of what local layers and Self-Extend's near keys hold now, for `cut` to come back to this length.

        None where a layer is none of ours.
        """
        return [layer.tail() for layer in self.layers] if self._is_cuttable() else None

    def cut(self, length: int, tails: Sequence[Tail | None] | None = None) -> StripedCache | None:
        """A cache of the first `length` tokens, which shares storage until it appends; this one stays as it is.

        Args:
            tails: those that were taken at this length; without them layers are cut as far as they hold it all.

        Returns:
            None where a layer has let go of what it needs.
        """
        if not self._is_cuttable():
            return None
        layers = [layer.cut(length, tail) for layer, tail in zip(self.layers, tails or [None] * len(self), strict=True)]
        if any(layer is None for layer in layers):
            return None
        cache = copy.copy(self)
        cache.layers = layers
        return cache

    def _is_cuttable(self) -> bool:
        return all(isinstance(layer, _CuttableLayer) for layer in self.layers)

    def kv_bytes(self) -> int:
        """Bytes of storage that the cache holds now, in all layers."""
        return kv_bytes(vars(layer) for layer in self.layers if layer.is_initialized)


def kv_bytes(layers: Iterable[Mapping[str, Any]]) -> int:
    """Bytes of storage behind the keys and values of cache layers, or of their tails; what they share counts once."""
    names = ("keys", "values", "near", "sink_keys", "sink_values")
    states = (layer[name] for layer in layers for name in names if isinstance(layer.get(name), Tensor))
    return sum({one.data_ptr(): one.nbytes() for one in (state.untyped_storage() for state in states)}.values())
