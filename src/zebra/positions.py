"""Self-Extend's map of distances (arXiv 2401.01325, section 3): near ones exact, far ones grouped by a floor division.

    relative(i, j) = i - j                                            if i - j < W     near
                   = floor(i / G) - floor(j / G) + W - floor(W / G)   otherwise        far

A model trained at L tokens then meets no distance of L or more up to a text of `reach` tokens. Positions
count the real tokens of a sequence, without padding. Every function takes ints and tensors alike. The paper's figure, a
model of L = 7 that reads ten tokens with W = 4 and G = 2; rows are queries, columns keys, a bar parts far from near:

    i = 3        3 2 1 0
    i = 4    4 | 3 2 1 0
    i = 5    4 4 | 3 2 1 0
    i = 6    5 5 4 | 3 2 1 0
    i = 7    5 5 4 4 | 3 2 1 0
    i = 8    6 6 5 5 4 | 3 2 1 0
    i = 9    6 6 5 5 4 4 | 3 2 1 0
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from zebra.errors import ZebraError

if TYPE_CHECKING:
    from torch import Tensor

LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Types of rope whose frequencies change with the text's length."""

LARGEST_FACTOR = 1e12
"""Of a rope; a larger one is a mistake."""

Position = TypeVar("Position", int, "Tensor")
"""An int, or an integer tensor that broadcasts against the other positions."""


def relative(i: Position, j: Position, group: int, window: int) -> Position:
    """The distance that the model sees between a query at `i` and a key at `j <= i`."""
    far = grouped_query(i, group, window) - grouped_key(j, group)
    near = i - j < window
    return near * (i - j) + (1 - near * 1) * far  # not `where`, which ints do not have


def grouped_query(i: Position, group: int, window: int) -> Position:
    """The position of a query towards its far keys: floor(i / G) + W - floor(W / G)."""
    return i // group + window - window // group


def grouped_key(j: Position, group: int) -> Position:
    """The position of a key towards queries far from it: floor(j / G)."""
    return j // group


@dataclass(frozen=True)
class SelfExtend:
    """Self-Extend's setting: groups of `group` tokens share a position beyond a neighbour window of `window`.

    Attributes:
        group: G; 1 changes nothing.
        window: W, the keys that a query sees at their exact distance, its own included: `0 <= i - j < W`.
        log_scale: multiply the query at position p by max(1, ln(p + 1) / ln L), as the authors did for long passkeys.

    Raises:
        ZebraError: a group or a window below 1.

    Example:
        >>> SelfExtend.parse("8:1024").reach(4096)
        25600
    """

    group: int
    window: int
    log_scale: bool = False

    def __post_init__(self) -> None:
        for count in (self.group, self.window):
            if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count < 2**31:
                raise ZebraError(
                    "Self-Extend takes a group G and a window W, whole numbers of at least 1; "
                    f"got {self.group!r}:{self.window!r}. Write for example 8:1024."
                )

    @classmethod
    def parse(cls, text: str, trained: int | None = None) -> SelfExtend:
        """Read the notation that `str()` prints, `G:W` or `G:W:log`; `auto:TARGET` needs `trained`, the trained length.

        Raises:
            ZebraError: another notation; a target that `suggest` rejects.
        """
        match = re.fullmatch(r"\s*(?:(auto)|([0-9]{1,10}))\s*:\s*([0-9]{1,10})\s*(:\s*log)?\s*", str(text))
        if match is None or (match[1] and (trained is None or match[4])):
            raise ZebraError(
                f"Self-Extend is written GROUP:WINDOW, or auto:TARGET where the trained length is known; got {text!r}. "
                "Write for example 8:1024 or auto:16384."
            )
        if match[1] and trained is not None:
            return suggest(trained, int(match[3]))
        return cls(int(match[2]), int(match[3]), log_scale=match[4] is not None)

    def __str__(self) -> str:
        return f"{self.group}:{self.window}" + (":log" if self.log_scale else "")

    def reach(self, trained: int) -> int:
        """The longest text of a model trained at L tokens: the largest whose every mapped distance is below L.

        G (L - W + floor(W / G)), which is (L - W) G + W where G divides W.
        """
        return trained if self.group == 1 else self.group * (trained - self.window + self.window // self.group)

    def check(self, trained: int) -> None:
        """Check that the window leaves a model trained at `trained` tokens something for the far part.

        Raises:
            ZebraError: W at or beyond the trained length.
        """
        if self.window >= trained:
            raise ZebraError(
                f"Self-Extend's window is below the trained length, which it shares with the far part; got {self} for "
                f"a model trained at {trained:,} tokens. Lower the window, for example to {max(1, trained // 4)}."
            )

    def query_scale(self, positions: Tensor, trained: int) -> Tensor:
        """max(1, ln(p + 1) / ln L) at each position p, in float64 and the shape of `positions`; for `log_scale`."""
        return ((positions + 1).double().log() / math.log(trained)).clamp(min=1.0)


def suggest(trained: int, target: int) -> SelfExtend:
    """The setting that reads `target` tokens with a model trained at `trained`, by the authors' sizing rule.

    W is a quarter of the trained length L, and G the smallest power of two with W + (N - W) / G <= L / 2: the authors
    keep this largest distance below one half to two thirds of L, as farther ones are trained less, and often find a
    larger group better. For L = 4,096 it gives their own settings: 16:1024 at 16K, 32:1024 at 25K.

    Raises:
        ZebraError: a target within the trained length, a trained length below 8.
    """
    if trained < 8:
        raise ZebraError(
            f"Self-Extend divides a trained length of at least 8 tokens; this model's is {trained}. Drop it."
        )
    if not trained < target < 2**31:
        raise ZebraError(
            f"a target of Self-Extend is beyond the trained length and below 2^31; got {target:,} for a model trained "
            f"at {trained:,} tokens, which reads that much as it is. Raise the target, or drop Self-Extend."
        )
    window = trained // 4
    smallest = (target - window) / (trained / 2 - window)
    return SelfExtend(1 << max(1, math.ceil(math.log2(smallest))), window)


def ropes_of(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The parameters of each rope of a config's fields: one, or one for each kind of layer; older configs' too."""
    parameters = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    return [one for one in parameters.values() if isinstance(one, dict)] or [parameters]


def rope_type(parameters: Mapping[str, Any]) -> str:
    """The type of a rope, by its name of today."""
    kind = str(parameters.get("rope_type") or parameters.get("type") or "default")
    return "longrope" if kind == "su" else kind


def reach_of(longest: int, fields: Mapping[str, Any]) -> int:
    """The longest text that a model was made for, by all fields of its config that say so.

    With M = max_position_embeddings, and a rope's factor f and original_max_position_embeddings L, M where absent:

        yarn                max(M, f L)         Qwen's instruction leaves M at L; of DeepSeek and gpt-oss M = f L
        llama3, longrope    M if M > L else f L     of Llama 3.2 and Phi-3 M is the length, and f is no ratio of lengths
        dynamic             f M
        any other           M, or Vicuna's max_sequence_length    of Gemma 3 M holds the linear factor already

    Several ropes, one for each kind of layer, reach as far as the one that reaches farthest.

    Args:
        longest: M.
        fields: of the config, which may have older names.
    """
    reaches = [longest, fields.get("max_sequence_length") or 0]
    for rope in ropes_of(fields):
        kind, factor = rope_type(rope), rope.get("factor")
        scale = factor if isinstance(factor, int | float) and 1 <= factor <= LARGEST_FACTOR else 1
        name = "original_max_position_embeddings"
        before = longest if kind == "dynamic" else fields.get(name) or rope.get(name) or longest
        if kind in ("yarn", "dynamic") or (kind in ("llama3", "longrope") and longest <= before):
            reaches.append(round(scale * before))
    return max(reaches)


def check_rotatable_rope(family: str, kind: str | None) -> None:
    """Check that a model's positions can be rotated again; `zebra.load` and `zebra plan` share the message.

    Args:
        kind: the `rope_type` of its config, None where its positions are no rotary embedding.

    Raises:
        ZebraError: no rope, dynamic NTK, longrope.
    """
    if kind is None:
        raise ZebraError(
            f"Self-Extend rotates rotary embeddings, and this {family} has none of transformers' kind: its positions "
            "are learned, ALiBi, or computed in the attention itself."
        )
    if kind in LENGTH_DEPENDENT:
        raise ZebraError(
            f"this {family} has a rope of type {kind}, whose frequencies change with the text's length, so that cached "
            "keys could not be rotated again. Self-Extend serves default, linear, llama3 and yarn."
        )


def no_global_layer(family: str, remedy: str = "Take a layout with a global layer, or drop Self-Extend.") -> ZebraError:
    """The error for a model in which no layer is left to extend."""
    return ZebraError(
        f"this {family} has no global layer with a rotary embedding, so Self-Extend has nothing to extend: local "
        f"layers never look beyond their window. {remedy}"
    )
