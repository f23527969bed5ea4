"""Read the header of a GGUF file of llama.cpp, and derive the fields of a config.json. Weights are not read.

    "GGUF" | version | number of tensors | number of pairs
    pairs: key, type, value | tensors: name, dims, type, offset | padding | data

Of arrays of strings (vocabulary, merges) only the length is read. Format: ggml's docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from zebra.errors import ZebraError

ARCHITECTURES = {
    "llama": "llama",  # Mistral, SmolLM and others too
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
}
"""The supported architectures, each with its `model_type` in transformers."""

_EMBEDDING = "token_embd.weight"
ROPE_FACTORS = "rope_freqs.weight"
"""The tensor (D / 2,) that divides the rope's frequencies; Llama 3.1 has it in place of metadata."""

_FIELDS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_OF_GEMMA = {
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_TOKENS = {"bos": "bos", "eos": "eos", "padding": "pad"}
_ROPE = {
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
_OTHER = {"attention.value_length", "rope.dimension_count", "rope.freq_base", "rope.scaling.type", "vocab_size"}
_OTHER |= {"rope.scaling.finetuned", "attention.sliding_window_pattern"}
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
"""Layers of the 27B Gemmas: their `query_pre_attn_scalar`, which no file has, is hidden_size / heads, else head_dim."""

ORIGINAL = "Use the original checkpoint instead."
"""The remedy if a GGUF file lacks information."""


class TensorInfo(NamedTuple):
    """The shape, type and position of a tensor in a GGUF file."""

    shape: tuple[int, ...]  # in torch's order
    kind: int  # ggml's number of its type
    start: int  # byte offset in the file


@dataclass(frozen=True)
class GgufHeader:
    """The header of a GGUF file.

    Attributes:
        metadata: values by full key; for an array of strings its length.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the model's family."""
        return str(self.metadata.get("general.architecture"))

    def unread_keys(self) -> list[str]:
        """The architecture's metadata keys that this module does not know: they may change the model."""
        prefix = f"{self.architecture}."
        known = {*_fields_of(self.architecture), *_ROPE, *_OTHER}
        return sorted(key for key in self.metadata if key.startswith(prefix) and key.removeprefix(prefix) not in known)


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a path has the suffix .gguf and is not a directory; the file need not exist."""
    return Path(path).suffix.lower() == ".gguf" and not Path(path).is_dir()


def read_header(path: str | os.PathLike[str]) -> GgufHeader:
    """Read the header of a GGUF file.

    Raises:
        ZebraError: no such file, another format or version, a damaged header, one part of several, no model, or an
            architecture that is not supported.
    """
    path = Path(path)
    if not path.is_file():
        raise ZebraError(f"there is no file {path}. Give the path of a GGUF file, or of a directory.")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = GgufHeader(path, *_parse(data))
    except (struct.error, ValueError, OverflowError, KeyError) as error:  # ValueError: an empty file, broken UTF-8
        raise ZebraError(
            f"{path} is not a GGUF file of version 2 or 3, or it is damaged: {error}. Copy it again."
        ) from None
    parts = header.metadata.get("split.count", 0)
    if parts not in (0, 1) or (re.search(r"-\d{5}-of-\d{5}\.gguf$", path.name) and parts != 1):
        raise ZebraError(
            f"{path} is one of {parts or 'several'} parts. Merge them: llama-gguf-split --merge {path.name} whole.gguf."
        )
    kind = header.metadata.get("general.type", "model")
    if kind != "model" or header.architecture not in ARCHITECTURES:
        what = f"of architecture {header.architecture!r}" if kind == "model" else f"of type {kind!r}"
        raise ZebraError(
            f"{path} is a GGUF file {what}; the supported architectures are {', '.join(ARCHITECTURES)}. {ORIGINAL}"
        )
    return header


_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class _Reader:
    """Reads consecutive little-endian values."""

    def __init__(self, data: mmap.mmap):
        self.data, self.position = data, 0

    def numbers(self, codes: str) -> tuple[Any, ...]:
        """The next numbers, by the format codes of `struct`."""
        values = struct.unpack_from(f"<{codes}", self.data, self.position)
        self.position += struct.calcsize(f"<{codes}")
        return values

    def string(self) -> str:
        """The next string."""
        (length,) = self.numbers("Q")
        if length > len(self.data) - self.position:
            raise ValueError(f"a string of {length} bytes")
        self.position += length
        return self.data[self.position - length : self.position].decode()

    def value(self, kind: int) -> Any:
        """The next value of a GGUF type; for an array of strings its length."""
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return _shortest(*self.numbers(_SCALARS[kind])) if kind == 6 else self.numbers(_SCALARS[kind])[0]
        kind, length = self.numbers("IQ")
        if length > len(self.data):
            raise ValueError(f"an array of {length} values")
        if kind != _STRING:
            return list(self.numbers(f"{length}{_SCALARS[kind]}"))
        for _ in range(length):
            self.position += 8 + struct.unpack_from("<Q", self.data, self.position)[0]
        return length


def _parse(data: mmap.mmap) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    reader = _Reader(data)
    magic, version, tensors, pairs = reader.numbers("4sIQQ")
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"it begins with {magic!r} and version {version}")
    metadata = {reader.string(): reader.value(*reader.numbers("I")) for _ in range(pairs)}
    table = []
    for _ in range(tensors):
        name, (dimensions,) = reader.string(), reader.numbers("I")
        table.append((name, reader.numbers(f"{dimensions}Q")[::-1], *reader.numbers("IQ")))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"an alignment of {alignment!r}")
    start = -(-reader.position // alignment) * alignment
    return metadata, {name: TensorInfo(shape, kind, start + offset) for name, shape, kind, offset in table}


def _shortest(value: float) -> float:
    """The shortest decimal that rounds to the same float32: 1e-05 in place of 9.999999747378752e-06."""
    bits = struct.pack("<f", value)
    decimals = (float(f"{value:.{digits}g}") for digits in range(1, 10))
    return next((short for short in decimals if struct.pack("<f", short) == bits), value)


def config_fields(header: GgufHeader) -> dict[str, Any]:
    """The fields of the model's config.json.

    transformers can build a config from GGUF too, but without rope scaling and head_dim, and it needs torch.

    Raises:
        ZebraError: a size that is missing or differs between layers; heads that are rotated in part; a rope that a
            config cannot describe.
    """
    prefix = f"{header.architecture}."
    metadata = {key.removeprefix(prefix): value for key, value in header.metadata.items() if key.startswith(prefix)}
    values, names = {key: _one(value) for key, value in metadata.items()}, _fields_of(header.architecture)
    fields = {name: values[key] for key, name in names.items() if values.get(key)}
    numbers = (*names, *_ROPE, "rope.freq_base", "rope.dimension_count", "attention.value_length")
    others = [names.get(key, key) for key in numbers if not isinstance(values.get(key, 0), int | float)]
    sizes = ("max_position_embeddings", "num_hidden_layers", "hidden_size", "num_attention_heads")
    if absent := others + [name for name in sizes if not fields.get(name)]:
        raise ZebraError(f"{header.path} does not have {absent[0]} as one number for all layers. {ORIGINAL}")
    embedding = header.tensors.get(_EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise ZebraError(f"{header.path} has no matrix {_EMBEDDING}. {ORIGINAL}")
    rotated = values.get("rope.dimension_count", fields["hidden_size"] // fields["num_attention_heads"])
    head_dim = fields.setdefault("head_dim", rotated)
    if (
        values.get("rope.dimension_count", head_dim) != head_dim
        or values.get("attention.value_length", head_dim) != head_dim
    ):
        raise ZebraError(
            f"{header.path} has partial RoPE or a different width of values, which is not supported. {ORIGINAL}"
        )
    if header.architecture in ("llama", "qwen3"):
        fields["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
    if header.architecture in _LAYERS_OF_27B:
        largest = fields["num_hidden_layers"] == _LAYERS_OF_27B[header.architecture]
        heads = fields["num_attention_heads"]
        fields["query_pre_attn_scalar"] = fields["hidden_size"] // heads if largest else head_dim
    tokens = {name: header.metadata.get(f"tokenizer.ggml.{key}_token_id") for key, name in _TOKENS.items()}
    return {
        "model_type": ARCHITECTURES[header.architecture],
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "rope_parameters": _rope(header, values, head_dim),
        **{f"{name}_token_id": token for name, token in tokens.items()},
        **fields,
    }


def _fields_of(architecture: str) -> dict[str, str]:
    return _FIELDS | (_OF_GEMMA if architecture in _LAYERS_OF_27B else {})


def _one(value: Any) -> Any:
    """The common value of all layers; None if they differ."""
    if not isinstance(value, list):
        return value
    return value[0] if len({*value}) == 1 else None


def _rope(header: GgufHeader, values: dict[str, Any], head_dim: int) -> dict[str, Any]:
    theta, kind = values.get("rope.freq_base", 10000.0), values.get("rope.scaling.type", "none")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if ROPE_FACTORS in header.tensors:
        rope |= _llama3_rope(header, theta, head_dim)
    elif kind in ("linear", "yarn"):
        rope |= {"rope_type": kind} | {name: values[key] for key, name in _ROPE.items() if key in values}
    elif kind != "none":
        raise ZebraError(
            f"{header.path} has rope type {kind!r}, which its metadata does not describe completely. {ORIGINAL}"
        )
    if header.architecture == "gemma3":  # the rope of local layers is fixed, and not in the file
        return {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    return rope


def _llama3_rope(header: GgufHeader, theta: float, head_dim: int) -> dict[str, Any]:
    """The fields of a Llama 3.1 rope from its factors: 1 for high frequencies, `factor` for low, a ramp between."""
    shape, kind, start = header.tensors[ROPE_FACTORS]
    count, factors = head_dim // 2, tuple[float, ...]()
    if kind == 0 and shape == (count,) and start + 4 * count <= header.path.stat().st_size:
        with header.path.open("rb") as file:
            file.seek(start)
            factors = struct.unpack(f"<{count}f", file.read(4 * count))
    if factors and theta > 0 and all(0 < factor < math.inf for factor in factors):
        rope = {"factor": max(factors), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        turns = [8192 / (2 * math.pi * theta ** (2 * i / head_dim)) for i in range(count)]  # in the original context
        ramps = [min(max((turn - 1) / 3, 0), 1) for turn in turns]
        expected = [1 / ((1 - ramp) / rope["factor"] + ramp) for ramp in ramps]
        if all(math.isclose(*pair, rel_tol=1e-4) for pair in zip(factors, expected, strict=True)):
            return {"rope_type": "llama3", "original_max_position_embeddings": 8192} | rope
    raise ZebraError(f"{header.path}: {ROPE_FACTORS} is not the rope of Llama 3.1, the only one supported. {ORIGINAL}")
