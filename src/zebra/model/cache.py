"""The host's hybrid cache, truly bounded, and grown with slack instead of copied at every token.

    global layer    [k0 k1 k2 k3 k4 k5 k6 k7 ...|    ]     grows with the text, a quarter of it at a time
    local layer                      [k5 k6 k7|  ]         the last window - 1, and a quarter of that to move in
    extended layer  [f0 f1 f2 f3 f4 f5 f6 f7 ...|    ]     Self-Extend's: keys turned to their grouped positions, and
                                     [k5 k6 k7|  ]         the last W - 1 as they came; values once
    with sinks      [k0 k1]          [k5 k6 k7|  ]         a local layer, and each row's first real tokens
    whole layer     [k0 k1 k2 k3 k4 k5 k6 k7 ...|    ]     a local layer that sees all while it decodes

The host's own local layer shows `window - 1` keys but, after a long prefill, still holds the storage of all of them
through a view; and both of its layers copy everything they hold for each new token. `StripedCache` differs from
`DynamicCache` in these two things alone, and in layers of its own for Self-Extend, sinks and full decoding.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from zebra.kernels.sinks import NO_POSITION, Sinks


class _Room:
    """The room behind the tokens that a layer holds: appending a few writes in place.

    Only behind the very tensor that was handed out last: what was reordered, cropped or put there by another is copied,
    so that two caches that share a beginning never write into each other.
    """

    def __init__(self) -> None:
        self._handed: weakref.ref[Tensor] | None = None

    def __reduce__(self) -> tuple[type[_Room], tuple[()]]:
        return _Room, ()

    def append(self, held: Tensor, new: Tensor, keep: int | None = None) -> Tensor:
        """`held` (B, K, n, D) or empty, then `new` (B, K, t, D); in a buffer of at most n + t tokens or 1.25 of what is
        kept: all of them, or the last `keep`.
        """
        if held.numel() == 0:
            return new.clone(memory_format=torch.contiguous_format)
        unlike = held.dtype != new.dtype or held.shape[:2] != new.shape[:2]
        if unlike or torch.is_grad_enabled():  # a write in place would spoil what a backward needs
            return torch.cat([held, new], dim=-2)
        n, t, size = held.shape[-2], new.shape[-2], held.shape[-1]
        foreign = held.is_inference() and not torch.is_inference_mode_enabled()  # torch forbids writing into it
        if self._handed is not None and self._handed() is held and not foreign:
            start, capacity = held.storage_offset() // size, held.stride(1) // size
            if start + n + t <= capacity:
                grown = held.as_strided((*held.shape[:2], n + t, size), held.stride(), held.storage_offset())
                grown[:, :, n:] = new
                return self._hand(grown)
        kept = n + t if keep is None else min(n + t, keep)
        # Another prefill as long as this one is not to be expected.
        slack = max(0, kept + kept // 4 - (n + t)) if t <= n // 4 else 0
        buffer = held.new_empty(*held.shape[:2], n + t + slack, size)
        buffer[:, :, :n], buffer[:, :, n : n + t] = held, new
        return self._hand(buffer[:, :, : n + t])

    def last(self, states: Tensor, count: int) -> Tensor:
        """The last `count` tokens, copied where the buffer behind them is more than a quarter, or a token, larger."""
        kept = states[:, :, max(0, states.shape[-2] - count) :]
        room = kept.shape[-2] + max(1, kept.shape[-2] // 4)
        if kept.untyped_storage().nbytes() > room * states[:, :, :1].numel() * states.element_size():
            return kept.clone()
        return self._hand(kept) if self._handed is not None and self._handed() is states else kept

    def _hand(self, states: Tensor) -> Tensor:
        self._handed = weakref.ref(states)
        return states


class GrowingLayer(DynamicLayer):
    """The host's global layer, grown with slack."""

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._rooms = _Room(), _Room()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new keys and values; return all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._rooms[0].append(self.keys, key_states)
        self.values = self._rooms[1].append(self.values, value_states)
        return self.keys, self.values


class TrimmedSlidingLayer(DynamicSlidingWindowLayer):
    """The host's local layer, which lets go of the storage behind what it keeps.

    While past states are recorded (assisted decoding), everything is kept until the host crops it, as in the host.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, sliding_window: int) -> None:
        super().__init__(sliding_window)
        self._rooms = _Room(), _Room()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new keys and values; return those that the new queries may see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.cumulative_length += key_states.shape[-2]
        keep = None if self.record_past else self.sliding_window - 1
        keys = self._rooms[0].append(self.keys, key_states, keep)
        values = self._rooms[1].append(self.values, value_states, keep)
        first = max(0, keys.shape[-2] - (self.sliding_window - 1 + key_states.shape[-2]))
        if self.record_past:
            self.keys, self.values = keys, values
        else:
            self._keep(keys, values)
        return keys[:, :, first:], values[:, :, first:]

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens, and let go of what is no longer needed."""
        super().crop(tokens_to_remove)
        if self.is_initialized:
            self._keep(self.keys, self.values)

    def _keep(self, keys: Tensor, values: Tensor) -> None:
        # The host slices by -(window - 1), which for a window of 1 keeps everything.
        self.keys = self._rooms[0].last(keys, self.sliding_window - 1)
        self.values = self._rooms[1].last(values, self.sliding_window - 1)


class OpaqueKeys:
    """Keys on their way from the cache through the host to attention "zebra", which alone can unpack them."""

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            'the cache of a model under Self-Extend, with sinks or with full decoding serves attention "zebra" alone; '
            f"after set_attn_implementation, or in another model, pass a DynamicCache. ({name} of keys in a parcel)"
        )


class PendingKeys(OpaqueKeys):
    """New keys on their way into an extended layer. The cache knows no positions, so it hands them through the host to
    the attention function, which turns them, calls `write` and gets all keys back.
    """

    def __init__(self, layer: ExtendedLayer, states: Tensor):
        self._layer, self.states = layer, states

    def write(self, far: Tensor) -> tuple[Tensor, Tensor]:
        """Append the new keys, `far` being the same turned; return the near and the far keys, as
        `self_extend_attention` takes them.
        """
        return self._layer.write(self.states, far)

    def follow(self, shift: Tensor) -> bool:
        """Whether the new tokens go on where those of the layer end; see `ExtendedLayer.follow`."""
        return self._layer.follow(shift)


class ExtendedLayer(GrowingLayer):
    """A global layer under Self-Extend: N far keys and N values, and W - 1 near keys; never two keys of all tokens.

    Attributes:
        keys: all, turned to their grouped positions. near: the last W - 1, rotated to the host's.
        shift: in the model's first extended layer, what the host's positions are above the places in each row.
    """

    near: Tensor
    shift: Tensor | None = None

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window
        self.record_past = False
        self._near_room = _Room()

    def activate_past_recording(self) -> None:
        """Keep all near keys until a crop."""
        self.record_past = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make it empty, of the states' dtype and device."""
        super().lazy_initialization(key_states, value_states)
        self.near = torch.tensor([], dtype=self.dtype, device=self.device)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """Append the values; the keys wait for the attention function."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.values = self._rooms[1].append(self.values, value_states)
        return PendingKeys(self, key_states), self.values

    def write(self, exact: Tensor, far: Tensor) -> tuple[Tensor, Tensor]:
        """Append new keys; return those that the new queries see near, and all far ones."""
        self.keys = self._rooms[0].append(self.keys, far)
        near = self._near_room.append(self.near, exact, None if self.record_past else self.window - 1)
        first = max(0, near.shape[-2] - (self.window - 1 + exact.shape[-2]))
        self.near = near if self.record_past else self._near_room.last(near, self.window - 1)
        return near[:, :, first:], self.keys

    def follow(self, shift: Tensor) -> bool:
        """Whether `shift` of new tokens, (1 or B, 1), is that of the ones before; `NO_POSITION` is any."""
        before, self.shift = self.shift, shift
        if before is None or torch.equal(before, shift):  # one call for each token
            return True
        self.shift = torch.where(shift == NO_POSITION, before, shift)
        return bool(((before == shift) | (before == NO_POSITION) | (shift == NO_POSITION)).all())

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens, and let go of the near keys that were kept for it."""
        held = self.get_seq_length()
        super().crop(tokens_to_remove)
        if not self.is_initialized:
            return
        left = self.get_seq_length()
        self.shift = self.shift if left else None
        kept = self.near.shape[-2] - (held - left) if self.near.numel() else 0
        if kept < min(left, self.window - 1):
            raise RuntimeError(
                "tokens were taken back from a cache that had let go of the near keys before them. "
                "Call activate_past_recording first."
            )
        self.near = self._near_room.last(self.near[:, :, : max(0, kept)], self.window - 1)

    def reset(self) -> None:
        """Empty it. Transformers 5.17 would keep zeros in place of the tokens."""
        self.is_initialized = False
        super().reset()
        self.keys = self.values = self.near = torch.tensor([])
        self.shift = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the beams in another order."""
        self.near = self.near.index_select(0, beam_idx.to(self.near.device))
        self._rows(lambda shift: shift.index_select(0, beam_idx.to(shift.device)))
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self.near = self.near.repeat_interleave(repeats, dim=0)
        self._rows(lambda shift: shift.repeat_interleave(repeats, dim=0))
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self.near = self.near[indices, ...]
        self._rows(lambda shift: shift[indices, ...])
        super().batch_select_indices(indices)

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.shift is not None and len(self.shift) > 1:  # else one for all rows
            self.shift = change(self.shift)


class SinkKeys(OpaqueKeys):
    """The keys of a local layer, and what its attention must know of them besides.

    Attributes:
        states: the keys that the new queries may see by the window; all of them in a whole layer.
        start: the place of the first of them in its row.
        prompt: tokens of a row that are read before decoding begins; None where nobody said.
    """

    def __init__(self, states: Tensor, start: int, *, prompt: int | None = None, keeper: SinkLayer | None = None):
        self.states, self.start, self.prompt, self._keeper = states, start, prompt, keeper

    def sinks(self, real: Tensor | None) -> Sinks | None:
        """The row's sinks, those of the new tokens included; None where `states` begin with the row.

        Args:
            real: (B, T) bool, which of the new tokens are no padding; None where all are.
        """
        if self._keeper is None:
            return None
        kept = self._keeper.keep(real)
        return kept if self.start > 0 else None


class WholeLayer(GrowingLayer):
    """A local layer that keeps all keys, for models whose decoded tokens see all of them.

    Attributes:
        prompt: tokens that are read by the window before decoding begins.
    """

    prompt: int | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """Append new keys and values; return all."""
        keys, values = super().update(key_states, value_states)
        return SinkKeys(keys, 0, prompt=self.prompt), values


class SinkLayer(TrimmedSlidingLayer):
    """A local layer, and beside it a store of each row's first real tokens.

    Attributes:
        sink_keys, sink_values: (B, K, sinks, D), zeros where a row has no such token yet.
        places: (B, sinks), where in their row they stand; `NO_POSITION` where there is none.
    """

    _STORE = ("sink_keys", "sink_values", "places", "_first")

    def __init__(self, sliding_window: int, sinks: int) -> None:
        super().__init__(sliding_window)
        self.sinks = sinks
        self._empty()

    def _empty(self) -> None:
        self.sink_keys: Any = None
        self.sink_values: Any = None
        self.places: Any = None
        self._first: Any = None  # (B), the place of each row's first real token
        self._full = False
        self._new: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """Append new keys and values; return those that the new queries may see. The sinks wait to hear of padding."""
        keys, values = super().update(key_states, value_states)
        self._new = None if self._full else (key_states, value_states)
        return SinkKeys(keys, self.cumulative_length - keys.shape[-2], keeper=self), values

    def keep(self, real: Tensor | None) -> Sinks:
        """Put those of the new tokens that are sinks into the store; return the store."""
        if self._new is not None:
            self._store(*self._new, real)
            self._new = None
        return Sinks(self.sink_keys.unsqueeze(2), self.sink_values.unsqueeze(2), self.places.unsqueeze(1))

    def _store(self, keys: Tensor, values: Tensor, real: Tensor | None) -> None:
        batch, heads, new, size = keys.shape
        if self.places is None:
            self.sink_keys = keys.new_zeros(batch, heads, self.sinks, size)
            self.sink_values = values.new_zeros(batch, heads, self.sinks, values.shape[3])
            self.places = torch.full((batch, self.sinks), NO_POSITION, device=keys.device)
            self._first = torch.full((batch,), NO_POSITION, device=keys.device)
        end = self.cumulative_length
        place = torch.arange(end - new, end, device=keys.device)
        begins = place[:1] if real is None else torch.where(real, place, NO_POSITION).amin(dim=1)
        self._first = torch.minimum(self._first, begins)
        slot = place - self._first[:, None]
        taken = slot < self.sinks if real is None else (slot < self.sinks) & real
        rows, columns = taken.nonzero(as_tuple=True)
        slots = slot[rows, columns]
        # Not in place: a backward may need what was there, and another cache may share it.
        self.places = self.places.index_put((rows, slots), place[columns])
        self.sink_keys, self.sink_values = (
            store.transpose(1, 2).index_put((rows, slots), states.transpose(1, 2)[rows, columns]).transpose(1, 2)
            for store, states in ((self.sink_keys, keys), (self.sink_values, values))
        )
        self._full = bool((self._first + self.sinks <= end).all())

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens, sinks among them too."""
        super().crop(tokens_to_remove)
        if self.places is not None:
            self.places = self.places.masked_fill(self.places >= self.cumulative_length, NO_POSITION)
            self._first = self._first.masked_fill(self._first >= self.cumulative_length, NO_POSITION)
            self._full = self._full and bool((self._first + self.sinks <= self.cumulative_length).all())

    def reset(self) -> None:
        """Empty it."""
        super().reset()
        self._empty()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the beams in another order."""
        super().reorder_cache(beam_idx)
        self._rows(lambda store: store.index_select(0, beam_idx.to(store.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        super().batch_repeat_interleave(repeats)
        self._rows(lambda store: store.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        super().batch_select_indices(indices)
        self._rows(lambda store: store[indices, ...])

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.places is not None:
            for name in self._STORE:
                setattr(self, name, change(getattr(self, name)))


class StripedCache(DynamicCache):
    """`DynamicCache(config=...)` with layers of ours: the default of `generate` after `zebra.load`.

    Args:
        windows: Self-Extend's neighbour window for each layer that is extended; `zebra.model.self_extend.bounded_cache`
            reads them off a model, and what local layers need.
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
        self.layers = [_ours(layer, sinks, full_decode) for layer in self.layers]
        for i, window in (windows or {}).items():
            self.layers[i] = ExtendedLayer(window)

    def reads(self, prompt: int) -> None:
        """Say that the first `prompt` tokens of each row, padding counted, are read, and those behind them decoded."""
        for layer in self.layers:
            if isinstance(layer, WholeLayer):
                layer.prompt = prompt

    def kv_bytes(self) -> int:
        """Bytes of storage that the cache holds now, in all layers."""
        return sum(
            states.untyped_storage().nbytes()
            for layer in self.layers
            if layer.is_initialized
            for name in ("keys", "values", "near", "sink_keys", "sink_values")
            if (states := getattr(layer, name, None)) is not None
        )


def _ours(layer: Any, sinks: int, full_decode: bool) -> Any:
    if type(layer) is DynamicSlidingWindowLayer:
        if full_decode:
            return WholeLayer()
        window = layer.sliding_window
        return SinkLayer(window, sinks) if sinks else TrimmedSlidingLayer(window)
    return GrowingLayer() if type(layer) is DynamicLayer else layer
