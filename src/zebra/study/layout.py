"""Layouts with summary layers: what each layer sees and costs. Importing this lets `zebra.plan` read study models.

It imports no torch, because `zebra plan` does not load it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from zebra.errors import ZebraError
from zebra.plan.decoder import Decoder
from zebra.plan.families import FAMILIES, FamilyTraits
from zebra.stripes import Stripes, visible_pairs

NAME = "zebra_study"
"""The `model_type` of the study's decoder."""
SUMMARY = "summary"
"""The kind of a layer that sees its window, and the mean of each block before that (`zebra.study.summary`)."""
QUERIES = 1024
"""The number of queries for which a summary layer computes scores over all finished blocks at a time."""


@dataclass(frozen=True)
class SummaryStripes(Stripes):
    """A layout in which some layers are summary layers: `GSSL:32/16` has a window of 32 and blocks of 16 tokens.

    `summaries` are their indices. In `pattern`, which has a letter for each layer here, they are G: transformers takes
    them for global layers.

    Raises:
        ZebraError: a block below 1; what `Stripes` raises.
    """

    orders: ClassVar[Mapping[str, tuple[str, str]]] = {SUMMARY: ("N (w + N/b)", "N")}

    block: int = 1
    summaries: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.block, bool) or not isinstance(self.block, int) or self.block < 1:
            raise ZebraError(f"summary_block must be an integer of at least 1; got {self.block!r}. Fix config.json.")

    def layer_types(self, n: int) -> tuple[str, ...]:
        """The kind of each layer: those of transformers, and SUMMARY."""
        return tuple(SUMMARY if i in self.summaries else kind for i, kind in enumerate(super().layer_types(n)))

    def pairs(self, kind: str, length: int) -> int:
        """Pairs of a query and a key, or the mean of a block, in one layer over one text."""
        return summary_pairs(length, self.window, self.block) if kind == SUMMARY else super().pairs(kind, length)

    def extra_saved_bytes(
        self, kind: str, length: int, *, heads: int, query_width: int, kv_width: int, half: bool
    ) -> int:
        """Bytes that autograd saves for one sequence in a summary layer, beyond those of a local layer.

        Per token 8 HD (with autocast 14 HD) + 12 H + 9. Per block 16, and 8 KD for its means. Per token and block that
        its chunk of 1,024 queries sees 8 H + 1, for scores, weights and mask. Where heads share keys, each chunk
        instead saves a copy of the means for each head, 8 HD. Where the C++ kernel computes the layer
        (`zebra.kernels.native.attend_ranges`), no scores are saved, and this is an overestimate.
        """
        if kind != SUMMARY or length < self.window + self.block:
            return 0
        starts = range(0, length, QUERIES)
        ends = [min(length, start + QUERIES) for start in starts]
        reaches = [max(0, (end - self.window) // self.block) for end in ends]
        seen = sum((end - start) * reach for start, end, reach in zip(starts, ends, reaches, strict=True))
        each, blocks = (14 if half else 8) * query_width + 12 * heads + 9, -(-length // self.block)
        means = 8 * kv_width * blocks if kv_width == query_width else 8 * query_width * sum(reaches)
        return length * each + 16 * blocks + means + seen * (8 * heads + 1)

    def __str__(self) -> str:
        letters = ("S" if i in self.summaries else letter for i, letter in enumerate(self.pattern or ""))
        return f"{''.join(letters)}:{self.window}/{self.block}"


def summary_pairs(length: int, window: int, block: int) -> int:
    """Pairs of a query and a key or mean in one text: the window, and each block that lies wholly before it.

    sum over queries i of min(i + 1, w) + max(0, floor((i + 1 - w) / b))
    """
    whole, rest = divmod(max(0, length - window), block)
    return visible_pairs(length, window) + block * whole * (whole - 1) // 2 + whole * (rest + 1)


def summary_stripes(kinds: Sequence[str], window: int, block: int) -> SummaryStripes | None:
    """The layout of layers of the kinds `global`, `local` and `summary`; None if none is a summary layer."""
    summaries = tuple(i for i, kind in enumerate(kinds) if kind == SUMMARY)
    pattern = "".join("L" if kind == "local" else "G" for kind in kinds)
    return SummaryStripes(window, pattern, block=block, summaries=summaries) if summaries else None


def _with_study_fields(decoder: Decoder, fields: Mapping[str, Any]) -> Decoder:
    """Add what only a config of the study has: the position embedding and the summary layers."""
    position, kinds = fields.get("position_embedding", "rotary"), fields.get("attention_kinds") or ()
    stripes = summary_stripes(kinds, fields.get("sliding_window", 0), fields.get("summary_block", 64))
    return replace(
        decoder,
        rope=decoder.rope if position == "rotary" else None,
        learned_positions=decoder.trained_length if position == "absolute" else 0,
        stripes=stripes or decoder.stripes,
    )


FAMILIES[NAME] = FamilyTraits(tied=True, complete=_with_study_fields)
