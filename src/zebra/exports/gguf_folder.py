"""Convert a folder to a llama.cpp model without stripes, with the family's own architecture and tensor names.

`zebra.exports.llama_cpp` then adds stripes, as it does for a GGUF file.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from zebra.errors import ZebraError
from zebra.exports.gguf_model import GgufModel, GgufTensor
from zebra.exports.gguf_tokenizer import tokenizer_metadata
from zebra.exports.limits import REMEDY, other_activation, other_local_rope, scaled_local_rope
from zebra.gguf import ARCHITECTURES
from zebra.model.checkpoint import load_tokenizer
from zebra.stripes import GLOBAL, LOCAL

KINDS = {"f32": ("F32", 0), "f16": ("F16", 1), "bf16": ("BF16", 32), "q8_0": ("Q8_0", 7)}
"""Types of weight matrices: ggml's name, and the value of `general.file_type`."""


class Family(NamedTuple):
    """A model family in llama.cpp.

    Attributes:
        architecture: llama.cpp's name of it.
        names: the architecture of the package `gguf` whose table of tensor names fits.
        paired: whether llama.cpp's rope rotates pairs of neighbours (2r, 2r + 1); transformers' is (r, r + D / 2).
        unsupported: returns what llama.cpp cannot run of a config, or None.
        more: returns further metadata.
    """

    architecture: str
    names: str
    paired: bool = False
    unsupported: Callable[[PreTrainedConfig], str | None] = lambda config: None
    more: Callable[[PreTrainedConfig], dict[str, Any]] = lambda config: {}


def _rope_pattern(config: PreTrainedConfig) -> dict[str, Any]:
    return {"attention.rope_pattern": [bool(used) for used in config.no_rope_layers]}


def _softcaps(config: PreTrainedConfig) -> dict[str, Any]:
    names = {"attn_logit_softcapping", "final_logit_softcapping"}
    return {name: float(cap) for name in names if (cap := getattr(config, name, None))}


def _expert_sizes(config: PreTrainedConfig) -> dict[str, Any]:
    count = getattr(config, "num_local_experts", None) or config.num_experts
    width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    return {
        "expert_count": count,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": width,
    }


def _granite_scales(config: PreTrainedConfig) -> dict[str, Any]:
    scales = {
        "logit_scale": config.logits_scaling,
        "attention.scale": config.attention_multiplier,
        "embedding_scale": config.embedding_multiplier,
        "residual_scale": config.residual_multiplier,
    }
    rotated = {"attention.rope_pattern": [bool(base) for base in config.layer_rope_theta or ()]}
    return {name: float(scale) for name, scale in scales.items()} | (rotated if config.layer_rope_theta else {})


def _other_bases(config: PreTrainedConfig) -> str | None:
    bases = {base for base in config.layer_rope_theta or () if base}
    several = bases - {config.rope_parameters["rope_theta"]}
    return "layers with ropes of several bases" if several else None


def _gemma_faults(config: PreTrainedConfig) -> str | None:
    if config.query_pre_attn_scalar != config.head_dim:
        return f"a query_pre_attn_scalar of {config.query_pre_attn_scalar} with a head_dim of {config.head_dim}"
    if config.model_type == "gemma2" and not (config.final_logit_softcapping and config.attn_logit_softcapping):
        return "no softcap of its scores or logits"
    return scaled_local_rope(config)


def _experts(config: PreTrainedConfig) -> str | None:
    if not config.norm_topk_prob:
        return "experts whose weights do not sum to 1 (norm_topk_prob)"
    return "layers with and without experts" if {*config.mlp_layer_types} != {"sparse"} else None


def _mellum_faults(config: PreTrainedConfig) -> str | None:
    return _experts(config) or other_local_rope(config)


_BY_LLAMA_CPP = (
    "Write the GGUF file of the model without stripes with llama.cpp's convert_hf_to_gguf.py, and export that with "
    "--stripes."
)
_LLAMA = Family("llama", "llama", paired=True)
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "ministral": _LLAMA,
    "cwm": _LLAMA,
    "smollm3": Family("smollm3", "smollm3", paired=True, more=_rope_pattern),
    "qwen2": Family("qwen2", "qwen2"),
    "qwen3": Family("qwen3", "qwen3"),
    "mellum": Family("mellum", "qwen3moe", unsupported=_mellum_faults, more=_expert_sizes),
    "gemma2": Family("gemma2", "gemma2", unsupported=_gemma_faults, more=_softcaps),
    "gemma3_text": Family("gemma3", "gemma3", unsupported=_gemma_faults, more=_softcaps),
    "cohere2": Family("cohere2", "cohere2", more=lambda config: {"logit_scale": float(config.logit_scale)}),
    "olmo3": Family("olmo2", "olmo2", unsupported=other_local_rope),
    "granite_swa": Family("granite_swa", "granite", True, _other_bases, _granite_scales),
    "gpt_oss": Family("gpt-oss", "gpt-oss", more=_expert_sizes),
}
"""The families that llama.cpp can run with stripes, by `model_type`."""


def check_family(config: PreTrainedConfig, path: Any) -> Family:
    """The llama.cpp family of a config.

    Raises:
        ZebraError: llama.cpp has no such family with stripes, or cannot run this config of it.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ZebraError(
            f"llama.cpp has no architecture with the tensors of {config.model_type} and a window for some layers. "
            f"{REMEDY}"
        )
    if fault := other_activation(config) or family.unsupported(config):
        raise ZebraError(f"{path} has {fault}, which llama.cpp's {family.architecture} does not support. {REMEDY}")
    return family


def folder_model(path: str | os.PathLike[str], model: PreTrainedModel, dtype: str) -> GgufModel:
    """Convert a transformers model to llama.cpp's names, layouts and metadata, without stripes.

    Args:
        path: the folder with the tokenizer.
        dtype: type of the weight matrices, a key of `KINDS`; norms, biases and routers are float32.

    Raises:
        ZebraError: as `check_family` and `tokenizer_metadata`; a rope that llama.cpp has no metadata for.
    """
    config = model.config
    family = check_family(config, path)
    tensors = _tensors(model, family, GGMLQuantizationType[KINDS[dtype][0]])
    metadata = {f"{family.architecture}.{key}": value for key, value in _metadata(config, tensors).items()}
    metadata |= {f"{family.architecture}.{key}": value for key, value in family.more(config).items()}
    general = {"type": "model", "name": os.path.basename(os.path.abspath(path)), "file_type": KINDS[dtype][1]}
    generation = model.generation_config or GenerationConfig()
    ends = generation.eos_token_id if generation.eos_token_id is not None else config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    tokenizer = load_tokenizer(path, config)
    remedy = _BY_LLAMA_CPP if family.architecture in ARCHITECTURES else REMEDY
    words = tokenizer_metadata(tokenizer, config.vocab_size, ends, path, remedy)
    general = {f"general.{key}": value for key, value in (general | {"quantization_version": 2}).items()}
    return GgufModel(family.architecture, general | metadata | words, tensors)


def _metadata(config: PreTrainedConfig, tensors: dict[str, GgufTensor]) -> dict[str, Any]:
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    metadata = {
        "context_length": config.max_position_embeddings,
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": width,
        "attention.value_length": width,
        "vocab_size": config.vocab_size,
        "rope.dimension_count": width,
    }
    if (eps := getattr(config, "rms_norm_eps", None)) is not None:
        metadata["attention.layer_norm_rms_epsilon"] = float(eps)
    else:
        metadata["attention.layer_norm_epsilon"] = float(config.layer_norm_eps)
    return metadata | _rope(config, width, tensors)


def _rope(config: PreTrainedConfig, width: int, tensors: dict[str, GgufTensor]) -> dict[str, Any]:
    """The metadata of a rope. Llama 3.1's scaling is a tensor instead, which is added to `tensors`."""
    rope = config.rope_parameters
    local, rope = (rope[LOCAL], rope[GLOBAL]) if GLOBAL in rope else (rope, rope)
    metadata = {"rope.freq_base": float(rope["rope_theta"])}
    if local["rope_theta"] != rope["rope_theta"] or config.model_type == "gemma3_text":
        metadata["rope.freq_base_swa"] = float(local["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind == "llama3":
        tensors["rope_freqs.weight"] = GgufTensor.of(_llama3_factors(config, width))
    elif kind in ("linear", "yarn"):
        metadata |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
        if kind == "yarn":
            metadata["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
            for side, default in (("fast", 32.0), ("slow", 1.0)):
                metadata[f"rope.scaling.yarn_beta_{side}"] = float(rope.get(f"beta_{side}") or default)
            if rope.get("attention_factor") is not None or rope.get("mscale") or rope.get("truncate") is False:
                raise ZebraError(f"llama.cpp has no metadata for all of this rope: {rope}. {REMEDY}")
    elif kind != "default":
        raise ZebraError(f"llama.cpp has no metadata for a rope of type {kind}. {REMEDY}")
    return metadata


def _llama3_factors(config: PreTrainedConfig, width: int) -> np.ndarray:
    """The (D / 2,) factors by which llama.cpp divides the unscaled frequencies."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, width, 2).double() / width)
    return (plain / frequencies.double()).float().numpy()


def _tensors(model: PreTrainedModel, family: Family, kind: GGMLQuantizationType) -> dict[str, GgufTensor]:
    config = model.config
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.names)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    tied = config.tie_word_embeddings
    tensors: dict[str, GgufTensor] = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        for part, values in _parts(name, tensor, family):
            stem, dot, suffix = part.rpartition(".")
            written = _SINKS if stem.endswith("sinks") else names.get_name(stem)
            layer = f"blk.{part.split('.')[2]}." if written == _SINKS else ""
            if written is None:
                raise ZebraError(f"llama.cpp's {family.architecture} has no tensor for {name}. {REMEDY}")
            one = _stored(values, written + dot + suffix, kind)
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
            projection = stem.rpartition(".")[2]
            paired = family.paired and projection in heads
            tensors[layer + written + dot + suffix] = one.paired_rows(heads[projection]) if paired else one
    return tensors


_SINKS = "attn_sinks"


def _parts(name: str, tensor: Tensor, family: Family) -> list[tuple[str, Tensor]]:
    """Split and transpose a tensor as llama.cpp stores it; return names that end in .weight or .bias, with tensors."""
    if name.endswith("gate_up_proj_bias"):  # gpt-oss: gates and ups alternate, and weights are (in, out)
        stem = name.removesuffix("gate_up_proj_bias")
        return [(f"{stem}gate_proj.bias", tensor[..., ::2]), (f"{stem}up_proj.bias", tensor[..., 1::2])]
    if name.endswith("gate_up_proj") and family.architecture == "gpt-oss":
        stem, rows = name.removesuffix("gate_up_proj"), tensor.transpose(1, 2)
        return [(f"{stem}gate_proj.weight", rows[:, ::2]), (f"{stem}up_proj.weight", rows[:, 1::2])]
    if name.endswith("gate_up_proj"):
        stem = name.removesuffix("gate_up_proj")
        gate, up = tensor.chunk(2, dim=1)
        return [(f"{stem}gate_proj.weight", gate), (f"{stem}up_proj.weight", up)]
    if name.endswith("experts.down_proj"):
        return [(f"{name}.weight", tensor.transpose(1, 2) if family.architecture == "gpt-oss" else tensor)]
    if name.endswith("down_proj_bias"):
        return [(f"{name.removesuffix('_bias')}.bias", tensor)]
    if not name.endswith((".weight", ".bias")):
        name += ".weight"
    if family.architecture.startswith("gemma") and name.endswith("norm.weight"):
        tensor = tensor.float() + 1
    return [(name, tensor)]


def _stored(tensor: Tensor, name: str, kind: GGMLQuantizationType) -> GgufTensor:
    """A tensor in its type in the file: `kind` for matrices, or float16 where rows are not a multiple of its block."""
    if tensor.ndim == 1 or name.endswith(".bias") or "norm" in name or "ffn_gate_inp" in name:
        kind = GGMLQuantizationType.F32
    elif tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = GGMLQuantizationType.F16

    def read() -> np.ndarray:
        values = tensor.float().contiguous().numpy()
        if kind == GGMLQuantizationType.F16 and np.abs(values).max() > np.finfo(np.float16).max:
            raise ZebraError(f"{name} has values beyond the range of float16. Choose bf16 or f32.")
        return gguf.quantize(values, kind)

    return GgufTensor(tuple(tensor.shape), kind, read)
