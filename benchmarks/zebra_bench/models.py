"""Random models of the host for the subjects that need one, and the same for the plan."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel

import zebra.model.attention  # noqa: F401  registers "zebra"
from zebra.model.families import model_class, with_stripes
from zebra.model.load import read_device, read_dtype
from zebra.plan.cost import Run
from zebra.plan.decoder import decoder
from zebra.stripes import Stripes
from zebra_bench.subjects import Paired


def config(sizes: Any, stripes: Stripes | None) -> PreTrainedConfig:
    """A Llama of these sizes, in the class that a conversion to these stripes gives it."""
    made = LlamaConfig(
        vocab_size=getattr(sizes, "words", 16),
        hidden_size=sizes.heads * sizes.head_size,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=getattr(sizes, "layers", 1),
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_size,
        max_position_embeddings=sizes.length + 1024,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return made if stripes is None else with_stripes(made, stripes)


def random_model(sizes: Any, made: PreTrainedConfig, attention: str, dtype: torch.dtype | None = None) -> Any:
    """A model with random weights, the same for the same seed whatever the attention."""
    torch.manual_seed(sizes.seed)
    dtype = dtype or read_dtype(sizes.dtype)
    host: type[PreTrainedModel] = model_class(made)
    model = host._from_config(made, attn_implementation=attention, dtype=dtype)
    return model.to(read_device(sizes.device)).eval()


def random_tokens(sizes: Any, length: int) -> Tensor:
    """Words (batch, length)."""
    torch.manual_seed(sizes.seed)
    return torch.randint(3, sizes.words, (sizes.batch, length)).to(read_device(sizes.device))


def planned(sizes: Paired, made: PreTrainedConfig, stripes: Stripes | None, phase: str) -> Run:
    """The same run for the plan."""
    d: Any = decoder(made.to_dict(), name="random")
    length = getattr(sizes, "length", 1)
    return Run(decoder=d, stripes=stripes, length=length, batch=sizes.batch, dtype=sizes.dtype, phase=phase)


def named(sizes: Any) -> str:
    """The model's sizes in words, for a task."""
    keys = f", {sizes.kv_heads} of keys," if sizes.kv_heads != sizes.heads else ""
    layers = f"{sizes.layers} layers of hidden size" if hasattr(sizes, "layers") else "hidden size"
    rows = f", {sizes.batch} rows" if sizes.batch > 1 else ""
    return f"{layers} {sizes.heads * sizes.head_size}, {sizes.heads} heads{keys} of {sizes.head_size}{rows}"
