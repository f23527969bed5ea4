"""Caches by the tokens that they hold, so that a prompt is read from where an earlier text ends to be the same.

    stored    [ system | document | question | answer ]
    prompt    [ system | document | another question ]
                                  ^ cut here: global layers are sliced, the others come back from a snapshot

A local layer has let go of what stands before its window, and Self-Extend of its near keys. So it can be cut where a
snapshot of it was taken, and as long as its window holds the whole text. A snapshot is a copy of what these layers
hold, at most `window - 1` tokens (and sinks) of each; of global layers it needs nothing.
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
    """A cache, and what brings it back to earlier lengths.

    Attributes:
        cache: keys and values of one sequence.
        tokens: (n), those that the cache held when it was stored.
        snapshots: the tails of its layers at earlier lengths; none at lengths that it can be cut to without.
    """

    cache: StripedCache
    tokens: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    snapshots: dict[int, list[Tail]] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.cache.get_seq_length()

    def snapshot(self, most: int = 4) -> None:
        """Take a snapshot at the length that the cache has now, where one is needed to come back to it.

        Args:
            most: the number of snapshots; one too many lets go of the one whose loss leaves the smallest gap.
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
        """A text of at most `length` of the tokens, as many as there can be; None where there is none.

        It shares storage with this one until it grows, and neither changes the other.
        """
        lengths = [length, *(at for at in sorted(self.snapshots, reverse=True) if at <= length)]
        for at in lengths if length > 0 else []:
            if (cache := self.cache.cut(at, self.snapshots.get(at))) is not None:
                before = {one: tails for one, tails in self.snapshots.items() if one <= at}
                return CachedText(cache, self.tokens[:at], before)
        return None

    def layers(self) -> list[Tail]:
        """All that takes memory."""
        layers = [vars(layer) for layer in self.cache.layers if layer.is_initialized]
        return [*layers, *(tail for tails in self.snapshots.values() for tail in tails)]


class PrefixCache:
    """The caches of several texts, which serve prompts that begin like one of them.

    Args:
        model: of `zebra.load`.
        max_texts: how many are stored.
        max_bytes: of their keys and values, with snapshots; None for no bound. Beyond either bound the least recently
            used go. A cache that was taken belongs to the caller until it is put back, and counts no more.

    Attributes:
        lock: held while a model reads into a cache that was taken; who takes holds it until the cache is put back.

    Raises:
        ZebraError: no text may be stored.
    """

    def __init__(self, model: PreTrainedModel, *, max_texts: int = 1, max_bytes: int | None = None) -> None:
        if max_texts < 1 or (max_bytes is not None and max_bytes < 0):
            raise ZebraError(
                "a prefix cache stores at least 1 text, of at least 0 bytes; got "
                f"max_texts={max_texts}, max_bytes={max_bytes}. Raise them."
            )
        self.max_texts, self.max_bytes = max_texts, max_bytes
        self.lock = threading.Lock()
        self._model = model
        self._texts: list[CachedText] = []  # the most recently used last

    def __len__(self) -> int:
        return len(self._texts)

    def kv_bytes(self) -> int:
        """Bytes of storage of all texts and their snapshots; what they share counts once."""
        return _bytes(self._texts)

    def clear(self) -> None:
        """Let go of all."""
        self._texts.clear()

    def take(self, ids: Tensor) -> CachedText:
        """A cache that holds as many of the first tokens of a prompt as there are, but its last.

        A stored text that the prompt continues leaves the store. So does one that is cut and would be the next to go;
        any other is copied as it grows.

        Args:
            ids: (n), n at least 1.
        """
        ids = ids.cpu()
        best: CachedText | None = None
        source: CachedText | None = None
        for text in reversed(self._texts):
            common = min(_common(text.tokens, ids), len(ids) - 1)
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
            ids: (n) or longer; the first n are those that it holds.
        """
        text.tokens = ids.cpu()[: len(text)].clone()
        whole = len(text)
        others = [one for one in self._texts if _common(one.tokens, text.tokens) < len(one.tokens)]  # else it has them
        self._texts = [*others, text] if whole else others
        while len(self._texts) > self.max_texts or (self.max_bytes is not None and self.kv_bytes() > self.max_bytes):
            del self._texts[0]

    def _has_room(self, part: CachedText, text: CachedText) -> bool:
        """Whether a copy of a part of a text fits beside all that is stored."""
        size = _bytes([text]) * len(part) // len(text)
        fits = self.max_bytes is None or self.kv_bytes() + size <= self.max_bytes
        return fits and len(self._texts) < self.max_texts


def _bytes(texts: Iterable[CachedText]) -> int:
    return kv_bytes(layer for text in texts for layer in text.layers())


def _common(one: Tensor, other: Tensor) -> int:
    """The number of first tokens that two texts share."""
    shorter = min(len(one), len(other))
    differs = (one[:shorter] != other[:shorter]).nonzero()
    return int(differs[0]) if len(differs) else shorter
