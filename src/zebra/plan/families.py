"""What differs between families of decoders apart from their sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zebra.plan.decoder import Decoder


@dataclass(frozen=True)
class FamilyTraits:
    """What differs between families apart from their sizes.

    Attributes:
        norms: weights of a layer's norms in multiples of h, without the norms of queries and keys.
        query_norm: what a norm of queries and keys spans: one `head`, or `all` heads together; None without norms.
        biases: which linear maps have biases: `qkv`, or `all` (norms too); None where the config says it.
        gated: whether the MLP has a gate projection.
        pattern: that of a config with a window and no layer_types; None where transformers makes no layer local then.
        opt_in_window: whether a window counts only with `use_sliding_window: true`.
        rotated: the kinds of layer, G and L, whose queries and keys have a rotary embedding.
        tied: whether embedding and head share their weights where the config does not say.
        sinks: whether each head has a learned sink score, in every layer.
        expert_biases: whether router and experts have biases.
        shared_expert: whether all tokens also use a shared expert, with a gate.
        complete: adds to a decoder what only configs of this family say.
    """

    norms: int = 2
    query_norm: str | None = None
    biases: str | None = None
    gated: bool = True
    pattern: str | None = "L"
    opt_in_window: bool = False
    rotated: str = "GL"
    tied: bool = False
    sinks: bool = False
    expert_biases: bool = False
    shared_expert: bool = False
    complete: Callable[[Decoder, Mapping[str, Any]], Decoder] | None = None


FAMILIES: dict[str, FamilyTraits] = {
    **dict.fromkeys(("mistral", "ministral", "mixtral", "phi3"), FamilyTraits()),
    "llama": FamilyTraits(pattern=None),
    "cwm": FamilyTraits(pattern="GLLL"),
    "smollm3": FamilyTraits(opt_in_window=True, tied=True),
    "qwen2": FamilyTraits(biases="qkv", opt_in_window=True),
    "qwen2_moe": FamilyTraits(biases="qkv", opt_in_window=True, shared_expert=True),
    **dict.fromkeys(("qwen3", "qwen3_moe"), FamilyTraits(query_norm="head", opt_in_window=True)),
    "mellum": FamilyTraits(query_norm="head"),
    "gemma2": FamilyTraits(norms=4, pattern="LG", tied=True),
    "gemma3_text": FamilyTraits(norms=4, query_norm="head", pattern="LLLLLG", tied=True),
    "cohere2": FamilyTraits(norms=1, pattern="LLLG", rotated="L", tied=True),
    "olmo2": FamilyTraits(query_norm="all", pattern=None),
    "olmo3": FamilyTraits(query_norm="all", pattern="LLLG"),
    "granite_swa": FamilyTraits(pattern="GLLL", tied=True, sinks=True),
    "gpt_oss": FamilyTraits(pattern="LG", sinks=True, expert_biases=True),
    "gpt2": FamilyTraits(biases="all", gated=False, rotated="", tied=True, pattern=None),
}
"""The families whose parameters are counted exactly, by `model_type`. Any other counts as a Llama of its sizes."""
