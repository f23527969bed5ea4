"""The decoder of the from-scratch study (Zebra, arXiv 2312.08618, section 3): kinds of attention × position embeddings.

    global    every layer sees all earlier tokens             rotary     rotated queries and keys
    local     every layer sees the last `window`              alibi      scores lowered by slope × distance
    summary   the last `window`, and the mean of each block   absolute   a learned vector added to each embedding
              of `summary_block` tokens before it             none       no signal but the causal mask
    grouped   layer i is global where i % stride = 0,
              else local

Its layers are those of CWM, a Llama with `layer_types`: RMSNorm before attention and MLP, SwiGLU, no biases. Embeddings
are tied by default. With rotary positions and no summary layers, `zebra convert` writes it as a stock CWM checkpoint.
Importing this module registers it with transformers, and its routes with `zebra.model.routes`.
"""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    LlamaConfig,
)
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.cwm.modeling_cwm import (
    CwmDecoderLayer,
    CwmForCausalLM,
    CwmPreTrainedModel,
    CwmRMSNorm,
    CwmRotaryEmbedding,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from zebra.errors import ZebraError
from zebra.model.override import set_override
from zebra.model.routes import READS_LAYER_TYPES, WITHOUT_END_TOKENS, Condition, Route, register_route
from zebra.stripes import GLOBAL, LOCAL
from zebra.study.layout import NAME, SUMMARY, SummaryStripes, summary_stripes
from zebra.study.summary import SummaryAttention

KINDS = ("global", "local", SUMMARY)
ATTENTIONS = (*KINDS, "grouped")
POSITIONS = ("absolute", "alibi", "rotary", "none")


def attention_kinds(attention: str, layers: int, stride: int = 4) -> list[str]:
    """The kind of each layer: the same for all, or with `grouped` global for layers 0, `stride`, 2 `stride`, ...

    Raises:
        ValueError: another name, or a stride below 1 or above the number of layers.
    """
    if attention not in ATTENTIONS:
        raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}; got {attention!r}.")
    if attention != "grouped":
        return [attention] * layers
    if not 1 <= stride <= layers:
        raise ValueError(f"a group must have from 1 to {layers} layers; got {stride}.")
    return ["global" if i % stride == 0 else "local" for i in range(layers)]


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """ALiBi's slope of each head, m_h = 2^(-8 h / H) for h = 1 .. H (arXiv 2108.12409, section 3).

    Where H is not a power of two the authors' code interpolates; this is the formula for any H.
    """
    return tuple(2.0 ** (-8 * h / heads) for h in range(1, heads + 1))


@strict
class StudyConfig(LlamaConfig):
    """The config of a Llama with a kind of attention for each layer, and a position embedding.

    Attributes:
        attention_kinds: for each layer `global`, `local` or `summary`; by default taken from `layer_types`, where a
            summary layer is `full_attention`, because it keeps all keys.
        position_embedding: `absolute`, `alibi`, `rotary` or `none`.
        window: keys that a local or summary layer sees, the query's own included; another name of `sliding_window`.
        summary_block: tokens in a block.
        intermediate_size: of the SwiGLU; by default 8/3 of the hidden size, rounded up to a multiple of 16.

    Raises:
        StrictDataclassError: another number of kinds than of layers; an unknown name; a window or a block longer than
            `max_position_embeddings`; heads that do not divide the hidden size, or key-value heads the heads.
    """

    model_type = NAME
    attribute_map = {"window": "sliding_window"}  # noqa: RUF012

    hidden_size: int = 768
    intermediate_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    attention_kinds: list[str] | None = None
    position_embedding: str = "rotary"
    sliding_window: int | None = None
    summary_block: int = 64
    layer_types: list[str] | None = None
    max_position_embeddings: int = 4096
    rope_parameters: dict[str, Any] | None = None
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("hidden_size", "num_attention_heads", "num_key_value_heads"):
            if (size := getattr(self, name)) is not None and size < 1:
                raise ValueError(f"{name} must be at least 1; got {size}.")
        if self.intermediate_size is None:
            self.intermediate_size = -(-8 * self.hidden_size // 48) * 16
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        if self.attention_kinds is None:
            layer_types = self.layer_types or [GLOBAL] * self.num_hidden_layers
            self.attention_kinds = ["local" if kind == LOCAL else "global" for kind in layer_types]
        self.layer_types = [LOCAL if kind == "local" else GLOBAL for kind in self.attention_kinds]
        super().__post_init__(**kwargs)

    def validate_study(self) -> None:
        """Check that the fields fit together."""
        kinds, longest = self.attention_kinds or [], self.max_position_embeddings
        if unknown := {*kinds} - {*KINDS}:
            raise ValueError(f"attention_kinds must be of {', '.join(KINDS)}; got {', '.join(sorted(unknown))}.")
        if self.position_embedding not in POSITIONS:
            raise ValueError(
                f"position_embedding must be one of {', '.join(POSITIONS)}; got {self.position_embedding!r}."
            )
        if {*kinds} != {"global"}:
            window = self.sliding_window
            if window is None or not 1 <= window <= longest:
                raise ValueError(f"local layers must have a window from 1 to the {longest} positions; got {window}.")
        if SUMMARY in kinds and not 1 <= self.summary_block <= longest:
            raise ValueError(f"summary_block must be from 1 to {longest}; got {self.summary_block}.")
        heads, key_value_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % (key_value_heads or 1):
            raise ValueError(f"num_key_value_heads must divide num_attention_heads; got {key_value_heads} and {heads}.")

    @property
    def stripes(self) -> SummaryStripes | None:
        """The layout if there are summary layers, else None: then `layer_types` says it all."""
        return summary_stripes(self.attention_kinds or [], self.sliding_window or 0, self.summary_block)

    @property
    def needs_zebra(self) -> bool:
        """Whether only attention "zebra" can compute it."""
        return self.position_embedding == "alibi" or self.stripes is not None


class StudyPreTrainedModel(CwmPreTrainedModel):
    """The base class of the study's models, as transformers expects it."""

    config: StudyConfig
    config_class = StudyConfig
    _can_compile_fullgraph = False

    def __init__(self, config: StudyConfig, *args: Any, **kwargs: Any):
        from zebra.model.attention import NAME as ZEBRA  # imported here, so that reading a config does not register it

        if config._attn_implementation is None:
            config._attn_implementation = ZEBRA
        if config.needs_zebra and config._attn_implementation != ZEBRA:
            raise ValueError(
                f'ALiBi and summary layers require attn_implementation="{ZEBRA}"; got {config._attn_implementation!r}. '
                "Leave attn_implementation out."
            )
        super().__init__(config, *args, **kwargs)


class StudyModel(StudyPreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: StudyConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        if config.position_embedding == "absolute":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        if config.position_embedding == "rotary":
            self.rotary_emb = CwmRotaryEmbedding(config)
        self.layers = nn.ModuleList([CwmDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        for kind, layer in zip(config.attention_kinds or [], self.layers, strict=True):
            attention: Any = layer.self_attn
            if kind == SUMMARY:
                attention.sliding_window = config.sliding_window
                set_override(attention, SummaryAttention(config.summary_block))
        self.norm = CwmRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Compute hidden states: input_ids (B, T) or inputs_embeds (B, T, hidden) to (B, T, hidden)."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds, not both or neither.")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(past, past + hidden.shape[1], device=hidden.device)[None]
        if self.config.position_embedding == "absolute":
            longest, last = self.config.max_position_embeddings, int(position_ids.max())
            if last >= longest:
                raise ZebraError(
                    f"this model has {longest} learned positions; got position {last}. Use a shorter text."
                )
            hidden = hidden + self.embed_positions(position_ids)
        masks: Any = attention_mask
        if not isinstance(masks, dict):  # `generate` has made the masks for a cache of fixed size
            inputs = {"config": self.config, "inputs_embeds": hidden, "attention_mask": attention_mask}
            inputs |= {"past_key_values": past_key_values, "position_ids": position_ids}
            masks = {GLOBAL: create_causal_mask(**inputs)}
            if LOCAL in (self.config.layer_types or []):
                masks[LOCAL] = create_sliding_window_causal_mask(**inputs)
        kwargs |= self._positions(hidden, position_ids)
        kwargs |= {"position_ids": position_ids, "past_key_values": past_key_values}
        for kind, layer in zip(self.config.layer_types or [], self.layers, strict=True):
            hidden = layer(hidden, attention_mask=masks[kind], **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=past_key_values)

    def _positions(self, hidden: Tensor, position_ids: Tensor) -> dict[str, Any]:
        """Arguments of the layers: cos and sin (without a rope 1 and 0 in int8, which promotes no dtype), slopes."""
        if self.config.position_embedding == "rotary":
            return {"position_embeddings": self.rotary_emb(hidden, position_ids)}
        ones = hidden.new_ones(1, 1, 1, dtype=torch.int8)
        inputs: dict[str, Any] = {"position_embeddings": (ones, torch.zeros_like(ones))}
        if self.config.position_embedding == "alibi":
            inputs["slopes"] = hidden.new_tensor(alibi_slopes(self.config.num_attention_heads), dtype=torch.float32)
        return inputs


class StudyForCausalLM(StudyPreTrainedModel, GenerationMixin):
    """The decoder with its head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: StudyConfig):
        super().__init__(config)
        self.model = StudyModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    forward = CwmForCausalLM.forward
    """The logits and, with labels, the loss; `generate` only passes arguments that its signature names."""


_NOT_ROTARY = Condition("positions that are not rotary", lambda c: c.position_embedding != "rotary")
_SUMMARIES = Condition("summary layers", lambda c: c.stripes is not None)

AutoConfig.register(StudyConfig.model_type, StudyConfig)
AutoModel.register(StudyConfig, StudyModel)
AutoModelForCausalLM.register(StudyConfig, StudyForCausalLM)
register_route(Route(NAME, "cwm", "cwm has its tensors", unsupported=(_NOT_ROTARY, _SUMMARIES, WITHOUT_END_TOKENS)))
register_route(Route(NAME, NAME, READS_LAYER_TYPES, fields=lambda config: {"attention_kinds": None}))
