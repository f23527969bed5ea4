"""transformers' hybrid KV cache with truly bounded memory, and with spare room instead of a copy for every token.

`StripedCache` differs from `DynamicCache` only in these two ways (`cache_layers`), and has layers of its own for
Self-Extend, sinks and full decoding (`opaque_layers`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from zebra.model.cache_layers import CuttableLayer, GrowingLayer, Tail, TrimmedSlidingLayer
from zebra.model.opaque_layers import FullDecodeLayer, SelfExtendLayer, SinkLayer


class StripedCache(DynamicCache):
    """`DynamicCache(config=...)` with zebra's layers: the default of `generate` after `zebra.load`.

    `zebra.model.self_extend.bounded_cache` reads the arguments off a loaded model.

    Args:
        windows: by layer index, the neighbour window of each layer that has Self-Extend.
        sinks: number of sinks in each local layer.
        full_decode: whether local layers keep all keys, for decoded tokens to see.
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
        """Set how many tokens of each sequence, padding counted, are the prompt; those after them are decoded."""
        for layer in self.layers:
            if isinstance(layer, FullDecodeLayer):
                layer.prompt_length = tokens

    def tails(self) -> list[Tail] | None:
        """Copies of what local layers and Self-Extend's near keys hold now, with which `cut` can return to this length.

        None where a layer is not one of zebra's.
        """
        return [layer.tail() for layer in self.layers] if self._is_cuttable() else None

    def cut(self, length: int, tails: Sequence[Tail | None] | None = None) -> StripedCache | None:
        """A cache of the first `length` tokens, which shares storage until it appends; this one does not change.

        Args:
            tails: what `tails` returned at this length. Without them a layer can be cut only while it holds all
                tokens.

        Returns:
            None where a layer has dropped tokens that it needs.
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
        return all(isinstance(layer, CuttableLayer) for layer in self.layers)

    def kv_bytes(self) -> int:
        """Bytes of storage that all layers of the cache hold now."""
        return kv_bytes(vars(layer) for layer in self.layers if layer.is_initialized)


def kv_bytes(layers: Iterable[Mapping[str, Any]]) -> int:
    """Bytes of storage behind the keys and values of cache layers, or of their tails; shared storage counts once."""
    names = ("keys", "values", "near", "sink_keys", "sink_values")
    states = (layer[name] for layer in layers for name in names if isinstance(layer.get(name), Tensor))
    return sum({one.data_ptr(): one.nbytes() for one in (state.untyped_storage() for state in states)}.values())
