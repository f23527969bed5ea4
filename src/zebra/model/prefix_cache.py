"""A prefix cache: KV caches of earlier texts, so that a prompt is read only from where it differs from one of them.

    stored    [ system | document | question | answer ]
    prompt    [ system | document | another question ]
                                  ^ cut here: global layers are sliced, the others restored from a snapshot

A local layer has dropped the tokens before its window, and Self-Extend its older near keys. Such a layer can be cut
where a snapshot was taken, and while its window holds the whole text. A snapshot is a copy of what these layers hold:
at most `window - 1` tokens (and the sinks) in each. Global layers need none.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from zebra.errors import ZebraError
from zebra.model.cache import StripedCache, kv_bytes
from zebra.model.cache_layers import Tail
from zebra.model.self_extend import bounded_cache


@dataclass(eq=False)
class CachedText:
    """A cache, and the snapshots with which it can return to earlier lengths.

    Attributes:
        cache: keys and values of one sequence.
        tokens: (n), the tokens that the cache held when it was stored.
        snapshots: the tails of its layers by earlier length, for those where it cannot be cut without.
    """

    cache: StripedCache
    tokens: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    snapshots: dict[int, list[Tail]] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.cache.get_seq_length()

    def snapshot(self, most: int = 4) -> None:
        """Take a snapshot at the length that the cache has now, if one is needed to return to it.

        Args:
            most: how many snapshots to keep; beyond it the one that leaves the smallest gap is dropped.
        """
        length = len(self)
        if length < 2 or self.cache.cut(length - 1) is not None or (tails := self.cache.tails()) is None:
            return
        self.snapshots[length] = tails
        if len(self.snapshots) > most:
            lengths = [0, *sorted(self.snapshots)]
            gaps = {at: after - before for before, at, after in zip(lengths, lengths[1:], lengths[2:], strict=False)}
            del self.snapshots[min(gaps, key=gaps.__getitem__)]

    def cut(self, length: int) -> CachedText | None:
        """A text of the first `length` tokens, or of fewer where the cache cannot be cut there; None if nowhere.

        It shares storage with this one until it grows, and neither changes the other.
        """
        lengths = [length, *(at for at in sorted(self.snapshots, reverse=True) if at <= length)]
        for at in lengths if length > 0 else []:
            if (cache := self.cache.cut(at, self.snapshots.get(at))) is not None:
                before = {one: tails for one, tails in self.snapshots.items() if one <= at}
                return CachedText(cache, self.tokens[:at], before)
        return None

    def layers(self) -> list[Tail]:
        """The attributes of all layers and snapshots, which are all that takes memory."""
        layers = [vars(layer) for layer in self.cache.layers if layer.is_initialized]
        return [*layers, *(tail for tails in self.snapshots.values() for tail in tails)]


class PrefixCache:
    """The caches of several texts, for prompts that begin like one of them.

    Args:
        model: what `zebra.load` returned.
        max_texts: how many texts are stored at most.
        max_bytes: of keys and values, with snapshots, at most; None for no bound. Beyond either bound the least
            recently used are dropped. A cache that was taken belongs to the caller until it is put back, and does not
            count.

    Attributes:
        lock: hold it from `take` to `put`, while a model reads into the cache.

    Raises:
        ZebraError: `max_texts` below 1, or `max_bytes` below 0.
    """

    def __init__(self, model: PreTrainedModel, *, max_texts: int = 1, max_bytes: int | None = None) -> None:
        if max_texts < 1 or (max_bytes is not None and max_bytes < 0):
            raise ZebraError(
                "max_texts must be at least 1, and max_bytes None or at least 0; got "
                f"max_texts={max_texts}, max_bytes={max_bytes}. Raise them."
            )
        self.max_texts, self.max_bytes = max_texts, max_bytes
        self.lock = threading.Lock()
        self._model = model
        self._texts: list[CachedText] = []  # the most recently used last

    def __len__(self) -> int:
        return len(self._texts)

    def kv_bytes(self) -> int:
        """Bytes of storage of all texts and their snapshots; shared storage counts once."""
        return _bytes(self._texts)

    def clear(self) -> None:
        """Drop all texts."""
        self._texts.clear()

    def take(self, ids: Tensor) -> CachedText:
        """Take a cache of as many of a prompt's first tokens as are stored, but never of its last token.

        A stored text that the prompt continues leaves the store. So does one that is cut and would be dropped next. Any
        other stays, and the part that is returned is copied when it grows.

        Args:
            ids: (n), n at least 1.
        """
        ids = ids.cpu()
        best: CachedText | None = None
        source: CachedText | None = None
        for text in reversed(self._texts):
            common = min(shared_tokens(text.tokens, ids), len(ids) - 1)
            cut = text if common == len(text.tokens) else text.cut(common)
            if cut is not None and len(cut) > len(best or ()):
                best, source = cut, text
        if best is None or source is None:
            return CachedText(bounded_cache(self._model))
        stays = best is not source and (self._texts[0] is not source or self._has_room(best, source))
        self._texts.remove(source)
        if stays:
            self._texts.append(source)
        if best is source:
            best.snapshot()
        return best

    def put(self, ids: Tensor, text: CachedText) -> None:
        """Store a cache that was taken.

        Args:
            ids: (n), the tokens that it holds, and perhaps more after them.
        """
        text.tokens = ids.cpu()[: len(text)].clone()
        # A stored text that is a prefix of this one is no longer needed.
        others = [one for one in self._texts if shared_tokens(one.tokens, text.tokens) < len(one.tokens)]
        self._texts = [*others, text] if len(text) else others
        while len(self._texts) > self.max_texts or (self.max_bytes is not None and self.kv_bytes() > self.max_bytes):
            del self._texts[0]

    def _has_room(self, part: CachedText, text: CachedText) -> bool:
        """Whether a copy of a part of a text fits in addition to all that is stored."""
        size = _bytes([text]) * len(part) // len(text)
        fits = self.max_bytes is None or self.kv_bytes() + size <= self.max_bytes
        return fits and len(self._texts) < self.max_texts


def _bytes(texts: Iterable[CachedText]) -> int:
    return kv_bytes(layer for text in texts for layer in text.layers())


def shared_tokens(one: Tensor, other: Tensor) -> int:
    """The length of the common prefix of two texts, (n) and (m)."""
    shorter = min(len(one), len(other))
    differs = (one[:shorter] != other[:shorter]).nonzero()
    return int(differs[0]) if len(differs) else shorter
