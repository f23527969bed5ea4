"""Self-Extend's distances (arXiv 2401.01325, section 3): exact when near, grouped by floor division when far.

    relative(i, j) = i - j                                            if i - j < W     near
                   = floor(i / G) - floor(j / G) + W - floor(W / G)   otherwise        far

In a text of up to `reach` tokens, a model trained at L tokens then sees no distance of L or more. Positions count the
real tokens of a sequence, without padding. The paper's figure shows a model with L = 7 that reads ten tokens with W = 4
and G = 2. Rows are queries, columns are keys, and a bar separates far keys from near ones:

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
"""The rope types whose frequencies change with the length of the text."""

LARGEST_FACTOR = 1e12
"""A larger factor of a rope is taken for a mistake."""

Position = TypeVar("Position", int, "Tensor")
"""An int, or an integer tensor that broadcasts against the other positions."""


def relative(i: Position, j: Position, group: int, window: int) -> Position:
    """The distance that the model sees between a query at `i` and a key at `j <= i`; ints or tensors."""
    far = grouped_query(i, group, window) - grouped_key(j, group)
    near = i - j < window
    return near * (i - j) + (1 - near * 1) * far  # not torch.where, which takes no ints


def grouped_query(i: Position, group: int, window: int) -> Position:
    """The position at which a query attends to its far keys: floor(i / G) + W - floor(W / G)."""
    return i // group + (window - window // group)


def grouped_key(j: Position, group: int) -> Position:
    """The position of a key for the queries far from it: floor(j / G)."""
    return j // group


def sink_query(i: Position, group: int, window: int) -> Position:
    """The position from which a query sees the sinks of a local layer: min(i, floor(i / G) + W - floor(W / G)).

    That is i wherever i <= W. Sinks keep their positions, so the first token is as far away as in a global layer: less
    than L in a text within the reach. No distance is negative if there are at most W sinks.
    """
    far = grouped_query(i, group, window)
    return min(i, far) if isinstance(i, int) else i.minimum(far)


@dataclass(frozen=True)
class SelfExtend:
    """The settings of Self-Extend: beyond a neighbour window, each group of `group` tokens shares one position.

    Attributes:
        group: G; 1 changes nothing.
        window: W, the keys that a query sees at their exact distance, its own included: `0 <= i - j < W`.
        log_scale: multiply the query at position p by max(1, ln(p + 1) / ln L), as the authors did for long passkeys.

    Raises:
        ZebraError: a group or window that is no whole number from 1 to 2^31 - 1.

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
                    "Self-Extend requires a group G and a window W, both integers from 1 to 2^31 - 1; "
                    f"got {self.group!r}:{self.window!r}. Use for example 8:1024."
                )

    @classmethod
    def parse(cls, text: str, trained: int | None = None) -> SelfExtend:
        """Parse `G:W` or `G:W:log`, as `str()` prints it, or `auto:TARGET`, which needs the trained length `trained`.

        Raises:
            ZebraError: a string in another notation; a target that `suggest` rejects.
        """
        match = re.fullmatch(r"\s*(?:(auto)|([0-9]{1,10}))\s*:\s*([0-9]{1,10})\s*(:\s*log)?\s*", str(text))
        if match is None or (match[1] and (trained is None or match[4])):
            raise ZebraError(
                f"Self-Extend must be GROUP:WINDOW, or auto:TARGET if the trained length is known; got {text!r}. "
                "Use for example 8:1024 or auto:16384."
            )
        if match[1] and trained is not None:
            return suggest(trained, int(match[3]))
        return cls(int(match[2]), int(match[3]), log_scale=match[4] is not None)

    def __str__(self) -> str:
        return f"{self.group}:{self.window}" + (":log" if self.log_scale else "")

    def reach(self, trained: int) -> int:
        """The longest text in which a model trained at L tokens sees only distances below L.

        G (L - W + floor(W / G)), which is (L - W) G + W where G divides W; L itself for G = 1.
        """
        return trained if self.group == 1 else self.group * (trained - self.window + self.window // self.group)

    def check(self, trained: int) -> None:
        """Check that the window is below the trained length, so that distances are left for the far keys.

        Raises:
            ZebraError: it is not.
        """
        if self.window >= trained:
            raise ZebraError(
                f"Self-Extend's window must be below the trained length; got {self} for "
                f"a model trained at {trained:,} tokens. Lower the window, for example to {max(1, trained // 4)}."
            )

    def check_sinks(self, sinks: int) -> None:
        """Check that the number of sinks of local layers is at most W, so that no distance is negative (`sink_query`).

        Raises:
            ZebraError: it is larger.
        """
        if sinks > self.window:
            raise ZebraError(
                "Self-Extend requires at most as many sinks as keys in its window, so that no distance is negative; "
                f"got {sinks} sinks and {self}. Use fewer sinks or a larger window."
            )

    def query_scale(self, positions: Tensor, trained: int) -> Tensor:
        """The factor of `log_scale`, max(1, ln(p + 1) / ln L), at each position p: float64, shaped like `positions`."""
        return ((positions + 1).double().log() / math.log(trained)).clamp(min=1.0)


def suggest(trained: int, target: int) -> SelfExtend:
    """The settings with which a model trained at L = `trained` tokens reads N = `target`, by the authors' sizing rule.

    W is a quarter of L, and G >= 2 is the smallest power of two with W + (N - W) / G <= L / 2. The authors keep this
    largest distance below one half to two thirds of L, because larger ones are trained less, and often find a larger
    group better. For L = 4,096 the rule gives their own settings: 16:1024 at 16K, 32:1024 at 25K.

    Raises:
        ZebraError: a trained length below 8; a target that is not longer than it, or not below 2^31.
    """
    if trained < 8:
        raise ZebraError(
            f"auto:TARGET of Self-Extend requires a trained length of at least 8 tokens; this model has {trained}. "
            "Use GROUP:WINDOW, or drop Self-Extend."
        )
    if not trained < target < 2**31:
        raise ZebraError(
            f"the target of Self-Extend must be above the trained length and below 2^31; got {target:,} for a model "
            f"trained at {trained:,} tokens. Change the target, or drop Self-Extend."
        )
    window = trained // 4
    smallest = (target - window) / (trained / 2 - window)
    return SelfExtend(1 << max(1, math.ceil(math.log2(smallest))), window)


def ropes_of(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rope parameters in a config's fields, older names included: one dict, or one for each kind of layer."""
    parameters = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    return [one for one in parameters.values() if isinstance(one, dict)] or [parameters]


def rope_type(parameters: Mapping[str, Any]) -> str:
    """The type of a rope, by its current name."""
    kind = str(parameters.get("rope_type") or parameters.get("type") or "default")
    return "longrope" if kind == "su" else kind


def reach_of(longest: int, fields: Mapping[str, Any]) -> int:
    """The longest text that a model was made for, from all fields of its config that say so.

    With M = max_position_embeddings, and the rope's factor f and original_max_position_embeddings L (M where absent):

        yarn                max(M, f L)         Qwen's instructions leave M at L; in DeepSeek and gpt-oss M = f L
        llama3, longrope    M if M > L else f L     in Llama 3.2 and Phi-3 M is the length, f is no ratio of lengths
        dynamic             f M
        any other           M                   in Gemma 3 M already includes the linear factor

    The largest of these over all ropes counts, and Vicuna's max_sequence_length where it is larger still.

    Args:
        longest: M.
        fields: the config's fields, which may have older names.
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
    """Check that Self-Extend can rotate a model's queries and keys again; `zebra.load` and `zebra plan` share it.

    Args:
        family: the model's `model_type`, for the message.
        kind: the `rope_type` of its config; None for a model without rotary embeddings.

    Raises:
        ZebraError: no rope, dynamic NTK, longrope.
    """
    if kind is None:
        raise ZebraError(
            f"Self-Extend requires rotary embeddings as transformers implements them, and this {family} has none: its "
            "positions are learned, ALiBi, or computed in the attention itself."
        )
    if kind in LENGTH_DEPENDENT:
        raise ZebraError(
            f"Self-Extend does not support the rope type {kind} of this {family}: its frequencies change with the "
            "text's length, so cached keys cannot be rotated again. It supports default, linear, llama3 and yarn."
        )


def no_global_layer(family: str, remedy: str = "Use a layout with a global layer, or drop Self-Extend.") -> ZebraError:
    """The error for a model in which no layer is left to extend."""
    return ZebraError(
        f"this {family} has no global layer with a rotary embedding, so Self-Extend has nothing to extend: a "
        f"local layer sees its window and its sinks. {remedy}"
    )
