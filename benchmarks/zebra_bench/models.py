"""Random models of transformers for the benchmarks that need one, and the same models for the plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel

import zebra.model.attention  # noqa: F401  registers "zebra"
from zebra.model.families import model_class, with_stripes
from zebra.model.load import read_device, read_dtype
from zebra.model.loss import head_of, summed_loss, without_logits
from zebra.plan.cost import Run
from zebra.plan.decoder import decoder_from_config
from zebra.plan.devices import Device
from zebra.stripes import Stripes
from zebra_bench.configs import HeadsConfig, ModelConfig


def llama_config(config: ModelConfig, stripes: Stripes | None) -> PreTrainedConfig:
    """A Llama of these sizes, in the class that a conversion to these stripes gives it."""
    llama = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.heads * config.head_dim,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.length + 1024,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return llama if stripes is None else with_stripes(llama, stripes)


def random_model(
    config: ModelConfig, model_config: PreTrainedConfig, attention: str, dtype: torch.dtype | None = None
) -> Any:
    """A model with random weights, the same for the same seed whatever the attention."""
    torch.manual_seed(config.seed)
    dtype = dtype or read_dtype(config.dtype)
    cls: type[PreTrainedModel] = model_class(model_config)
    model = cls._from_config(model_config, attn_implementation=attention, dtype=dtype)
    return model.to(read_device(config.device)).eval()


def random_tokens(config: ModelConfig, length: int) -> Tensor:
    """Token ids (B, T)."""
    torch.manual_seed(config.seed)
    return torch.randint(3, config.vocab_size, (config.batch_size, length)).to(read_device(config.device))


def own_loss(model: Any, tokens: Tensor) -> Tensor:
    """The mean loss by chunks of tokens, as in zebra's trainings; tokens (B, T)."""
    states = model(tokens, **without_logits(tokens.device)).hidden_states[-1]
    return summed_loss(states, head_of(model), tokens) / tokens[:, 1:].numel()


def plan_run(config: ModelConfig, stripes: Stripes | None, phase: str) -> Run:
    """The same run for the plan."""
    sizes: Any = decoder_from_config(llama_config(config, stripes).to_dict(), name="random")
    return Run(
        decoder=sizes,
        stripes=stripes,
        length=config.length,
        batch=config.batch_size,
        dtype=config.dtype,
        phase=phase,
    )


def planned_seconds(run: Run, *parts: str) -> Callable[[Device], float]:
    """The plan's seconds of some parts of a run, or of all, by the ceilings of a device."""

    def seconds(device: Device) -> float:
        by_part = device.seconds(run)
        return sum(by_part[part] for part in parts or by_part)

    return seconds


def sizes_in_words(config: ModelConfig) -> str:
    """The model's sizes for the name of a task."""
    layers = f"{config.layers} layers of hidden size" if config.layers > 1 else "hidden size"
    return f"{layers} {config.heads * config.head_dim}, {heads_in_words(config)}"


def heads_in_words(config: HeadsConfig) -> str:
    """Heads and batch size for the name of a task."""
    keys = f", {config.kv_heads} key-value heads," if config.kv_heads != config.heads else ""
    batch = f", batch of {config.batch_size}" if config.batch_size > 1 else ""
    return f"{config.heads} heads{keys} of {config.head_dim}{batch}"
