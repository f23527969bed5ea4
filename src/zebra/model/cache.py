"""The host's hybrid cache, truly bounded: a local layer holds at most `window - 1` past tokens.

    global layer   [k0 k1 k2 k3 k4 k5 k6 k7 ...]     grows with the text
    local layer                     [k5 k6 k7]       the last window - 1, and no more storage than about twice that

The host's own local layer shows `window - 1` keys but, after a long prefill, still holds the storage of all of them
through a view. `StripedCache` differs from `DynamicCache` in that alone.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicSlidingWindowLayer


class TrimmedSlidingLayer(DynamicSlidingWindowLayer):
    """The host's local layer, which lets go of the storage behind what it keeps.

    While past states are recorded (assisted decoding), everything is kept until the host crops it, as in the host.
    """

    keys: Tensor
    values: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new keys and values; return those that the new queries may see."""
        seen = super().update(key_states, value_states, *args, **kwargs)
        if not self.record_past:
            self.keys, self.values = self._kept(self.keys), self._kept(self.values)
        return seen

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens, and let go of what is no longer needed."""
        super().crop(tokens_to_remove)
        if self.is_initialized:
            self.keys, self.values = self._kept(self.keys), self._kept(self.values)

    def _kept(self, states: Tensor) -> Tensor:
        # The host slices by -(window - 1), which for a window of 1 keeps everything.
        states = states[:, :, max(0, states.shape[-2] - (self.sliding_window - 1)) :]
        held = states.untyped_storage().nbytes()
        return states.clone() if held > 2 * states.numel() * states.element_size() else states


class StripedCache(DynamicCache):
    """`DynamicCache(config=...)` with trimmed local layers: the default of `generate` after `zebra.load`."""

    layers: list[Any]

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config=config)
        self.layers = [
            TrimmedSlidingLayer(layer.sliding_window) if type(layer) is DynamicSlidingWindowLayer else layer
            for layer in self.layers
        ]

    def kv_bytes(self) -> int:
        """Bytes of storage that the cache holds now, in all layers."""
        return sum(
            states.untyped_storage().nbytes()
            for layer in self.layers
            if layer.is_initialized
            for states in (layer.keys, layer.values)
        )
