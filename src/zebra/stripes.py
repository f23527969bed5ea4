"""Stripes: which layers use full attention and which a sliding window (Zebra, arXiv 2312.08618, section 3).

Recipes, the command line, results and file names share one short notation.

    GLLL:512          a pattern tiled over the depth: G attends globally, L to a window of 512 keys
    0,4,9,31:1024     a list of the global layers; all others attend to a window of 1,024 keys
    GLLL:512+4        local layers also see the first 4 tokens of a text, its attention sinks (arXiv 2309.17453)

The window counts the keys that a query sees, its own included: `0 <= i - j < window`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from zebra.errors import ZebraError

GLOBAL = "full_attention"
LOCAL = "sliding_attention"
"""A layer's kind as transformers writes it in `config.layer_types`."""


@dataclass(frozen=True)
class Stripes:
    """A layout of global and local layers: a tiled `pattern` or an explicit list of `global_layers`, and the `window`.

    Attributes:
        window: keys that a query of a local layer sees, its own included.
        pattern: letters G and L, or None.
        global_layers: indices counted from 0, or None. Exactly one of the two is set.
        sinks: number of first tokens of a text that local layers see besides the window. config.json has no field for
            them, so they are stored in `zebra.json`.

    A subclass may add other kinds of layers: it overrides `layer_types`, `pairs`, `extra_saved_bytes` and `orders`.

    Raises:
        ZebraError: a window below 1 or sinks below 0, or either from 2^31; an empty pattern or list; a letter that is
            neither G nor L; a repeated or negative layer. `layer_types` rejects a layer beyond the depth.

    Example:
        >>> Stripes.parse("GLLL:512").layer_types(5)[3:]
        ('sliding_attention', 'full_attention')
    """

    orders: ClassVar[Mapping[str, tuple[str, str]]] = {}
    """For each kind of layer besides global and local: its order of time and of memory, such as `("N w", "w")`."""

    window: int
    pattern: str | None = None
    global_layers: tuple[int, ...] | None = None
    sinks: int = 0

    def __post_init__(self) -> None:
        if not _is_int(self.window) or not 1 <= self.window < 2**31:
            raise ZebraError(
                "the window, the number of keys that a query sees including its own, must be an integer from 1 to "
                f"2^31 - 1; got {self.window!r}. Use a window such as 512."
            )
        if not _is_int(self.sinks) or not 0 <= self.sinks < 2**31:
            raise ZebraError(
                "sinks, the number of first tokens that local layers always see, must be an integer from 0 to "
                f"2^31 - 1; got {self.sinks!r}. Use a few, such as 4."
            )
        if (self.pattern is None) == (self.global_layers is None):
            raise ZebraError(
                "a layout must be either a pattern or a list of global layers; "
                f"got pattern={self.pattern!r} and global_layers={self.global_layers!r}. Give exactly one."
            )
        if self.pattern is not None and not re.fullmatch(r"[GL]+", self.pattern):
            raise ZebraError(
                f"a pattern must name at least one layer, with the letters G (global) and L (local); got "
                f"{self.pattern!r}. Use for example GLLL."
            )
        if self.global_layers is not None:
            layers = tuple(self.global_layers)
            if not layers:
                raise ZebraError(
                    "a list of global layers must name at least one layer; got none. "
                    f"For local layers only, use the pattern L:{self.window}."
                )
            if len(set(layers)) != len(layers) or not all(_is_int(i) and i >= 0 for i in layers):
                raise ZebraError(
                    f"global layers must be distinct integers of at least 0; got {list(layers)}. Name each layer once."
                )
            object.__setattr__(self, "global_layers", tuple(sorted(layers)))

    @classmethod
    def grouped(cls, *, stride: int, window: int) -> Stripes:
        """The paper's layout: layer `i` is global iff `i % stride == 0`, so each group starts with its global layer."""
        if not _is_int(stride) or stride < 1:
            raise ZebraError(
                f"the stride, the number of layers in a group, must be an integer of at least 1; got {stride!r}. "
                "Use 4 for one global layer in four."
            )
        return cls(window=window, pattern="G" + "L" * (stride - 1))

    @classmethod
    def parse(cls, text: str) -> Stripes:
        """Parse the notation that `str()` prints: `GLLL:512`, `0,4,9,31:1024`, `GLLL:512+4`."""
        number = "[0-9]{1,100}"  # int() rejects thousands of digits
        layers_of = rf"\s*(?:([A-Za-z]+)|({number}(?:\s*,\s*{number})*))\s*"
        match = re.fullmatch(rf"{layers_of}:\s*(-?{number})\s*(?:\+\s*({number})\s*)?", str(text))
        if match is None:
            raise ZebraError(
                f"stripes must be written PATTERN:WINDOW or LAYERS:WINDOW, optionally with +SINKS; got {text!r}. "
                "Use for example GLLL:512, 0,4,9,31:1024, or GLLL:512+4."
            )
        pattern, layers, window, sinks = match.groups(default="")
        if pattern:
            return cls(window=int(window), pattern=pattern.upper(), sinks=int(sinks or 0))
        return cls(window=int(window), global_layers=tuple(int(i) for i in layers.split(",")), sinks=int(sinks or 0))

    @classmethod
    def of(cls, layer_types: Sequence[str], window: int, sinks: int = 0) -> Stripes:
        """The layout with these layer types: a pattern if one repeats or is the paper's, else the global layers."""
        if isinstance(layer_types, str):
            raise ZebraError(
                f"layer types must be a list with one entry per layer; got {layer_types!r}. "
                f'Use Stripes.parse("{layer_types}:{window}").'
            )
        letters = layer_letters(layer_types)
        for period in range(1, len(letters) + 1):
            pattern = letters[:period]
            tiles = all(letters[i] == pattern[i % period] for i in range(len(letters)))
            if tiles and (2 * period <= len(letters) or re.fullmatch("GL*|L", pattern)):
                return cls(window=window, pattern=pattern, sinks=sinks)
        global_layers = tuple(i for i, letter in enumerate(letters) if letter == "G")
        return cls(window=window, global_layers=global_layers, sinks=sinks)

    def layer_types(self, n: int) -> tuple[str, ...]:
        """The kind of each of `n` layers, as in `config.layer_types`."""
        if n < 1:
            raise ZebraError(
                f"a model must have at least one layer; got {n}. Check num_hidden_layers in its config.json."
            )
        if self.pattern is not None:
            return tuple(GLOBAL if self.pattern[i % len(self.pattern)] == "G" else LOCAL for i in range(n))
        layers = self.global_layers or ()
        if layers[-1] >= n:
            raise ZebraError(
                f"the layout {self} names layer {layers[-1]}, but the model has {n} layers, counted from 0 to {n - 1}. "
                f"Name layers up to {n - 1}."
            )
        return tuple(GLOBAL if i in layers else LOCAL for i in range(n))

    def pairs(self, kind: str, length: int) -> int:
        """The number of (query, key) pairs that one layer of a kind computes over a text of `length` tokens."""
        return visible_pairs(length, self.window, self.sinks) if kind == LOCAL else visible_pairs(length)

    def extra_saved_bytes(
        self, kind: str, length: int, *, heads: int, query_width: int, kv_width: int, half: bool
    ) -> int:
        """Bytes that autograd saves for one sequence in a layer of another kind, beyond those of a global or local one.

        Args:
            query_width, kv_width: (key-value) heads times head dimension.
            half: whether matrix products are computed in bfloat16.
        """
        return 0

    def __str__(self) -> str:
        layers = self.pattern if self.pattern is not None else ",".join(str(i) for i in self.global_layers or ())
        return f"{layers}:{self.window}" + (f"+{self.sinks}" if self.sinks else "")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def layer_letters(layer_types: Iterable[str]) -> str:
    """Layer types as a pattern: G for a global layer, L for any other."""
    return "".join("G" if kind == GLOBAL else "L" for kind in layer_types)


def visible_pairs(length: int, window: int | None = None, sinks: int = 0) -> int:
    """The number of (query, key) pairs that a causal layer computes over `length` tokens, with or without a window.

        sum over i of min(i + 1, window)  =  w (w + 1) / 2 + (N - w) w,    w = min(window, N)

    Each query i >= w also sees the min(i - w + 1, s) sinks that its window no longer covers. Their sum is that of a
    window of s over N - w tokens. A global layer (`window=None`) has N (N + 1) / 2.
    """
    w = length if window is None else min(window, length)
    band = w * (w + 1) // 2 + (length - w) * w
    return band + (visible_pairs(length - w, sinks) if sinks and w < length else 0)
