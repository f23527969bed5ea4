"""SmolLM2-135M as the subject of benchmarks, ours and in transformers: random weights, or those of a checkpoint.

    prefill     a text of `length` tokens read into the cache, and the logits of its last token
    decode      a token after `length` cached ones
    step        a training step on `length` tokens: forward, loss, backward, AdamW
    lora-step   the same of low-rank updates (rank 16) and the norms

In bfloat16 a step is autocast over float32 weights, and what LoRA freezes is bfloat16, as in `zebra adapt`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

import zebra
from zebra.model.loss import head_of, summed_loss, without_logits
from zebra.model.self_extend import bounded_cache, self_extend_of
from zebra.plan.cost import Run
from zebra.plan.decoder import read_decoder
from zebra.plan.shapes import shape
from zebra.stripes import Stripes
from zebra.train.lora import wrap
from zebra.train.recipe import Lora
from zebra_bench.generation import fill
from zebra_bench.waterfall import label

WAYS = ("full", "GL:1024", "GLLL:1024", "Self-Extend")
PHASES = ("prefill", "decode", "step", "lora-step")
STEPS = 8
"""Tokens that a call of decode makes."""
RANK = 16


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        phase: of PHASES. length: tokens of the text, or those that are cached.
        way: of WAYS. dtype: float32 or bfloat16.
        attention: None for zebra, else transformers' own implementation of this name, with its cache and its loss.
    """

    phase: str
    length: int
    way: str
    dtype: str
    attention: str | None = None

    @property
    def training(self) -> bool:
        """Whether it is a step."""
        return self.phase.endswith("step")

    @property
    def calls(self) -> int:
        """How many tokens or texts a call computes; its time is divided by it."""
        return STEPS if self.phase == "decode" else 1

    @property
    def stripes(self) -> Stripes | None:
        """The layout."""
        return Stripes.parse(self.way) if ":" in self.way else None

    def plan(self, checkpoint: Path) -> Run:
        """The same for the plan, Self-Extend left out: it changes neither pairs nor products."""
        phase = "train" if self.training else self.phase
        lora = RANK if self.phase == "lora-step" else None
        decoder = read_decoder(str(checkpoint))
        return Run(decoder=decoder, stripes=self.stripes, length=self.length, dtype=self.dtype, phase=phase, lora=lora)


def write_random(folder: Path, **sizes: int) -> None:
    """A checkpoint of random weights in SmolLM2-135M's shape, in bfloat16; `sizes` are fields of its config."""
    fields = {name: value for name, value in shape("smollm2-135m").items() if name != "model_type"} | sizes
    torch.manual_seed(0)
    config = LlamaConfig(**fields, bos_token_id=1, eos_token_id=2, pad_token_id=2, rms_norm_eps=1e-5)
    LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def load(case: Case, checkpoint: Path) -> Any:
    """The model of a case."""
    autocast = case.phase == "step"
    dtype = torch.float32 if autocast else getattr(torch, case.dtype)
    if case.attention is not None:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, attn_implementation=case.attention)
    else:
        extended = f"auto:{2 * case.length + 8192}" if case.way == "Self-Extend" else None
        model = zebra.load(checkpoint, stripes=case.stripes, self_extend=extended, dtype=dtype)
    if case.phase == "lora-step":
        return wrap(model, Lora.model_validate({"r": RANK, "modules_to_save": ["norms"]}), seed=0).train()
    return model.train(case.training)


def tokens(model: Any, length: int) -> Tensor:
    """Token ids (1, length)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, model.config.vocab_size, (1, length), generator=generator)


def prepare(case: Case, model: Any) -> Callable[[], Tensor]:
    """The call that is timed; it returns the logits of the last token (1, V), or the loss ()."""
    return (
        _step(case, model) if case.training else _decode(case, model) if case.phase == "decode" else _read(case, model)
    )


def _cache(case: Case, model: Any) -> Any:
    return bounded_cache(model) if case.attention is None else DynamicCache(config=model.config)


def _read(case: Case, model: Any) -> Callable[[], Tensor]:
    ids = tokens(model, case.length)

    @torch.no_grad()
    def read() -> Tensor:
        logits: Tensor = model(ids, past_key_values=_cache(case, model), use_cache=True, logits_to_keep=1).logits
        return logits[0]

    return read


@torch.no_grad()
def _decode(case: Case, model: Any) -> Callable[[], Tensor]:
    """Behind random keys and values, put into the cache as a prefill would."""
    ids, config = tokens(model, 1), model.config
    states = torch.empty(1, config.num_key_value_heads, case.length, config.head_dim, dtype=model.dtype)
    torch.manual_seed(0)
    cache = fill(_cache(case, model), config.num_hidden_layers, states)

    @torch.no_grad()
    def decode() -> Tensor:
        for _ in range(STEPS):
            logits: Tensor = model(ids, past_key_values=cache, use_cache=True).logits
        return logits[0]

    return decode


def _step(case: Case, model: Any) -> Callable[[], Tensor]:
    ids = tokens(model, case.length)
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    bfloat16 = torch.autocast("cpu", torch.bfloat16) if case.dtype == "bfloat16" else contextlib.nullcontext()

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with bfloat16:
            loss = _own_loss(model, ids) if case.attention is None else model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        with label("optimizer"):
            optimizer.step()
        return loss.detach()

    return step


def _own_loss(model: Any, ids: Tensor) -> Tensor:
    states = model(ids, **without_logits()).hidden_states[-1]
    with label("head"):
        return summed_loss(states, head_of(model), ids) / ids[:, 1:].numel()


def layout_of(case: Case, model: Any) -> str:
    """The layout as results name it, with Self-Extend's group and window."""
    setting = self_extend_of(model)
    return f"full, self-extend {setting}" if setting else case.way
