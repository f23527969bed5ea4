"""Published models by name: what a cost depends on in their config.json, so that no download is needed."""

from __future__ import annotations

from typing import Any

from zebra.errors import ZebraError

_LLAMA3 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
_LLAMA31 = {
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
_GPT2 = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, "tie_word_embeddings": True}

SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
    },
    "llama-3-8b": _LLAMA3 | {"max_position_embeddings": 8192, "rope_theta": 500000.0},
    "llama-3.1-8b": _LLAMA3 | _LLAMA31,
    "llama-3.1-70b": _LLAMA3
    | _LLAMA31
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "qwen3-4b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    },
    # GPT-2 small and medium, the two sizes of the from-scratch study; their first names counted 117M and 345M.
    "gpt2-117m": _GPT2 | {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "gpt2-345m": _GPT2 | {"n_embd": 1024, "n_layer": 24, "n_head": 16},
}


def shape(name: str) -> dict[str, Any]:
    """The config fields of a published model.

    Raises:
        ZebraError: a name that is not in the table.
    """
    if name not in SHAPES:
        raise ZebraError(f"there is no built-in shape {name!r}. Choose one of {', '.join(SHAPES)}.")
    return dict(SHAPES[name])
