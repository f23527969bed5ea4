"""Stripes in a GGUF file: which llama.cpp architecture has a family's tensors and a sliding window in some layers.

Two architectures read the kind of every layer (`attention.sliding_window_pattern`, one bool per layer). Every family
with the same tensors can run as one of them. The others read a period, whose last layer is global:

    granite_swa   Llama's tensors and rope. Its attention sinks are learned logits; -10,000 turns them off.
    mellum        Norms of queries and keys, as in Qwen 3, and experts. A dense layer becomes a single expert.
    gemma2, gemma3, cohere2, olmo2, gpt-oss    Run as themselves, with periods such as LG or LLLG only.

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
"""The logit of a learned attention sink that takes no attention: in float32 its softmax weight is 0."""


class Target(NamedTuple):
    """The llama.cpp architecture that runs a model with stripes.

    Attributes:
        name: llama.cpp's name of it.
        every_layer: whether it reads each layer's kind; otherwise it reads a period.
        rewrite: returns additional metadata, and the tensors in the form that the architecture reads.
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
    """Permute the rows of queries and keys: Qwen 2 rotates pairs (r, r + D / 2), granite_swa neighbours."""
    more, tensors = _as_granite(model)
    every = model.own("attention.head_count")
    heads = {"attn_q": every, "attn_k": model.own("attention.head_count_kv") or every}
    for name, tensor in tensors.items():
        projection = name.split(".")[2] if name.startswith("blk.") else ""
        if projection in heads:
            tensors[name] = tensor.paired_rows(heads[projection])
    return more, tensors


def _as_mellum(model: GgufModel) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    tensors = {"output.weight": model.tensors["token_embd.weight"]} | model.tensors  # it needs an untied head
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
        raise ZebraError(f"this Gemma has an untied head, which llama.cpp's gemma2 does not support. {REMEDY}")
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
"""The architecture that runs a model with stripes, by the model's own architecture."""


def check_architecture(architecture: str) -> Target:
    """The entry of `TARGETS` for an architecture.

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
    """Rewrite a model for llama.cpp with a layout. Tensor values do not change, so quantised weights stay exact.

    Raises:
        ZebraError: no architecture runs this model, or this layout of it; attention sinks; a scaled rope that llama.cpp
            would not apply to local layers.
    """
    if stripes.sinks:
        raise ZebraError(
            f"llama.cpp does not support sinks that are tokens; the layout is {stripes}. Leave out "
            f"+{stripes.sinks}, or serve the folder with zebra."
        )
    target = check_architecture(model.architecture)
    kinds = stripes.layer_types(model.own("block_count"))
    rewritten, tensors = target.rewrite(model)
    scaled = model.own("rope.scaling.type") not in (None, "none") or "rope_freqs.weight" in model.tensors
    if scaled and model.architecture.startswith("qwen3") and LOCAL in kinds:
        raise ZebraError(
            f"this model has a scaled rope, but llama.cpp's mellum scales only that of global layers. {REMEDY}"
        )
    pattern: list[bool] | int = [kind == LOCAL for kind in kinds]
    if not target.every_layer:
        pattern = period_of(kinds, f"llama.cpp's {target.name}")
    window = {"attention.sliding_window": stripes.window, "attention.sliding_window_pattern": pattern}
    return model.renamed(target.name, rewritten | window, tensors)
