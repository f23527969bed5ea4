"""Stripes in a GGUF file: which architecture of llama.cpp has a family's tensors and a window for some layers.

Two of them read the kind of every layer (`attention.sliding_window_pattern`, one bool a layer), and whatever has their
tensors can run as one of them. The others read a period, of which the last layer is global:

    granite_swa   Llama's tensors and rope; attention sinks, which are set to -10,000: their exponential is 0
    mellum        norms of queries and keys, as in Qwen 3, and experts; a dense layer is one expert that is always taken
    gemma2, gemma3, cohere2, olmo2, gpt-oss    themselves, LG or LLLG; where the global layer is not last, none

Read in llama.cpp's src/models, and run: docs/results/engines.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from zebra.errors import ZebraError
from zebra.exports.gguf_model import GgufModel, GgufTensor
from zebra.exports.limits import REMEDY, period_of
from zebra.stripes import LOCAL, Stripes

NO_SINK = -1e4
"""The logit of an attention sink that takes nothing: in float32 its exponential beside any score is 0."""


class Target(NamedTuple):
    """The architecture that runs a model with stripes.

    Attributes:
        name: llama.cpp's.
        every_layer: whether it reads each layer's kind, else a period.
        rewrite: the model's further metadata and its tensors, as the architecture has them.
    """

    name: str
    every_layer: bool
    rewrite: Callable[[GgufModel], tuple[dict[str, Any], dict[str, GgufTensor]]]


def _unchanged(model: GgufModel) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    return {}, model.tensors


def _as_granite(model: GgufModel) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    if model.own("expert_count"):
        raise ZebraError(f"this {model.architecture} has experts, which granite_swa lays out differently. {REMEDY}")
    heads = model.own("attention.head_count")
    sinks = GgufTensor.of(np.full(heads, NO_SINK))
    names = [f"blk.{i}.attn_sinks.weight" for i in range(model.own("block_count"))]
    return {"logit_scale": 1.0}, model.tensors | dict.fromkeys(names, sinks)


def _rotated_by_halves_as_granite(model: GgufModel) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """Qwen 2 rotates the planes (r, r + D / 2), granite_swa neighbours: the rows of queries and keys are moved."""
    more, tensors = _as_granite(model)
    every = model.own("attention.head_count")
    heads = {"attn_q": every, "attn_k": model.own("attention.head_count_kv") or every}
    for name, tensor in tensors.items():
        projection = name.split(".")[2] if name.startswith("blk.") else ""
        if projection in heads:
            tensors[name] = tensor.paired_rows(heads[projection])
    return more, tensors


def _as_mellum(model: GgufModel) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    tensors = {"output.weight": model.tensors["token_embd.weight"]} | model.tensors  # it reads a head of its own
    if model.own("expert_count"):
        return {}, tensors
    width = model.own("embedding_length")
    router = GgufTensor.of(np.zeros((1, width)))
    result = {}
    for name, tensor in tensors.items():
        block, _, part = name.removesuffix(".weight").rpartition(".ffn_")
        if part in ("gate", "up", "down"):
            result[f"{block}.ffn_{part}_exps.weight"] = tensor.as_one_expert()
        else:
            result[name] = tensor
    result |= {f"blk.{i}.ffn_gate_inp.weight": router for i in range(model.own("block_count"))}
    experts = {"expert_count": 1, "expert_used_count": 1}
    return experts | {"expert_feed_forward_length": model.own("feed_forward_length")}, result


def _with_head(model: GgufModel) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    return {}, {"output.weight": model.tensors["token_embd.weight"]} | model.tensors


def _gemma(model: GgufModel) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    if "output.weight" in model.tensors and model.architecture == "gemma2":
        raise ZebraError(f"this Gemma has a head of its own, and llama.cpp's gemma2 reads none. {REMEDY}")
    return {}, model.tensors


TARGETS: dict[str, Target] = {
    "llama": Target("granite_swa", True, _as_granite),
    "smollm3": Target("granite_swa", True, _as_granite),
    "qwen2": Target("granite_swa", True, _rotated_by_halves_as_granite),
    "granite_swa": Target("granite_swa", True, _unchanged),
    "qwen3": Target("mellum", True, _as_mellum),
    "qwen3moe": Target("mellum", True, _as_mellum),
    "mellum": Target("mellum", True, _as_mellum),
    "gemma2": Target("gemma2", False, _gemma),
    "gemma3": Target("gemma3", False, _gemma),
    "cohere2": Target("cohere2", False, _unchanged),
    "olmo2": Target("olmo2", False, _with_head),
    "gpt-oss": Target("gpt-oss", False, _with_head),
}
"""By the architecture of a model without stripes, the one that runs it with them."""


def check_architecture(architecture: str) -> Target:
    """The architecture that runs another with stripes.

    Raises:
        ZebraError: there is none.
    """
    if architecture not in TARGETS:
        raise ZebraError(
            f"llama.cpp has no architecture with the tensors of {architecture!r} and a window for some layers; those "
            f"of {', '.join(TARGETS)} have one. {REMEDY}"
        )
    return TARGETS[architecture]


def with_stripes(model: GgufModel, stripes: Stripes) -> GgufModel:
    """The model as llama.cpp runs it with a layout. Quantised tensors stay as they are, bit for bit.

    Raises:
        ZebraError: no architecture for it, or none for this layout; sinks; a rope that another layer kind would lose.
    """
    if stripes.sinks:
        raise ZebraError(
            f"llama.cpp has no attention sinks that are tokens, and the layout is {stripes}. Leave out "
            f"+{stripes.sinks}, or serve the folder with zebra."
        )
    target = check_architecture(model.architecture)
    kinds = stripes.layer_types(model.own("block_count"))
    rewritten, tensors = target.rewrite(model)
    scaled = model.own("rope.scaling.type") not in (None, "none") or "rope_freqs.weight" in model.tensors
    if scaled and model.architecture.startswith("qwen3") and LOCAL in kinds:
        raise ZebraError(
            f"this model has a scaled rope, and llama.cpp's mellum scales that of global layers alone. {REMEDY}"
        )
    pattern: list[bool] | int = [kind == LOCAL for kind in kinds]
    if not target.every_layer:
        pattern = period_of(kinds, f"llama.cpp's {target.name}")
    window = {"attention.sliding_window": stripes.window, "attention.sliding_window_pattern": pattern}
    return model.renamed(target.name, rewritten | window, tensors)
