"""The sizes of a decoder, from which its cost follows, read from its config.json.

    parameters = V h (embedding) + V h (head, unless tied) + L layers + final norm
    a layer    = h D (2 H + 2 K) + c h i (c = 3 for a gated MLP, 2 for a plain one) + norms + biases

h hidden size, i intermediate size, H query heads, K key-value heads, D head dimension, V vocabulary, L layers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from zebra.errors import ZebraError
from zebra.gguf import config_fields, is_gguf, read_header
from zebra.hub import hub_directory, is_hub_name
from zebra.plan.families import FAMILIES, FamilyTraits
from zebra.plan.shapes import SHAPES, shape
from zebra.plan.tensors import has_own_head, layer_bytes, stored_tensors
from zebra.positions import LENGTH_DEPENDENT, reach_of, rope_type, ropes_of
from zebra.stripes import GLOBAL, LOCAL, Stripes

LARGEST = 10**12
"""The largest size in a config, and the largest length and batch: products of a few of them still fit a float."""
_NAMES = {
    "num_hidden_layers": "n_layer",
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
}
"""GPT-2's names for the same fields."""


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A decoder's sizes.

    Attributes:
        tied: whether the head shares the weights of the embedding.
        experts, experts_per_token: of each of the `expert_layers` MoE layers, whose experts are
            `expert_intermediate_size` wide; 0 without experts.
        shared_expert_intermediate_size: the width of the expert that all tokens use; 0 without one.
        trained_length: tokens of context that its positions reach, see `zebra.positions.reach_of`.
        rope: the type of its rotary embedding; None without one.
        learned_positions: rows of the table of learned position embeddings; 0 without one.
        linear_bytes: mean bytes per weight of projections and MLPs in a quantised checkpoint; None in any other.
        stripes: the layout of the config itself, with the sinks of zebra.json; None where every layer is global.
        full_decode: whether local layers keep all keys, read from zebra.json too.
    """

    name: str
    family: str
    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    trained_length: int
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    experts: int = 0
    experts_per_token: int = 0
    expert_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    expert_layers: int = 0
    rope: str | None = "default"
    learned_positions: int = 0
    linear_bytes: float | None = None
    stripes: Stripes | None = None
    full_decode: bool = False

    @property
    def traits(self) -> FamilyTraits:
        """The family's traits; those of Llama where the family is not in the table."""
        return FAMILIES.get(self.family, FamilyTraits())

    @property
    def mlp_matrices(self) -> int:
        """Matrices of an MLP: gate, up and down, or up and down."""
        return 3 if self.traits.gated else 2

    @property
    def active_expert_width(self) -> int:
        """The widths of all experts that a token uses, added up."""
        return self.experts_per_token * self.expert_intermediate_size + self.shared_expert_intermediate_size

    @property
    def query_width(self) -> int:
        """H D, the width of the query projection."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """K D, the width of the key and of the value projection."""
        return self.kv_heads * self.head_dim

    def kinds(self, stripes: Stripes | None) -> tuple[str, ...]:
        """The kind of each layer under a layout."""
        return (GLOBAL,) * self.layers if stripes is None else stripes.layer_types(self.layers)

    def parameters_by_part(self) -> dict[str, int]:
        """Number of parameters by part; a tied head has none of its own."""
        h, hd, kd = self.hidden_size, self.query_width, self.kv_width
        projections = 2 * h * hd + 2 * h * kd + self.qkv_bias * (hd + 2 * kd) + self.out_bias * h
        projections += self.traits.sinks * self.heads
        dense = self.mlp_matrices * h * self.intermediate_size
        dense += self.mlp_bias * ((self.mlp_matrices - 1) * self.intermediate_size + h)
        i, shared = self.expert_intermediate_size, self.shared_expert_intermediate_size
        sparse = self.experts * (self.mlp_matrices * h * i + h) + (self.mlp_matrices * h * shared + h) * (shared > 0)
        sparse += self.traits.expert_biases * self.experts * ((self.mlp_matrices - 1) * i + h + 1)
        queries = {"head": 2 * self.head_dim, "all": hd + kd, None: 0}[self.traits.query_norm]
        every = self.traits.biases == "all"  # of the norms too
        return {
            "embedding": (self.vocab_size + self.learned_positions) * h,
            "projections": self.layers * projections,
            "MLP": (self.layers - self.expert_layers) * dense + self.expert_layers * sparse,
            "norms": (1 + every) * (self.layers * self.traits.norms * h + h) + self.layers * queries,
            "head": 0 if self.tied else self.vocab_size * h,
        }

    @property
    def outside_layers(self) -> int:
        """The number of parameters outside the layers: the embeddings, the last norm, the head."""
        parts = self.parameters_by_part()
        return parts["embedding"] + (1 + (self.traits.biases == "all")) * self.hidden_size + parts["head"]

    @property
    def num_parameters(self) -> int:
        """The number of parameters."""
        return sum(self.parameters_by_part().values())

    @property
    def linear_parameters(self) -> int:
        """The number of parameters of projections and MLPs, which a quantised checkpoint stores in fewer bytes."""
        parts = self.parameters_by_part()
        return parts["projections"] + parts["MLP"]


def read_decoder(model: str | os.PathLike[str]) -> Decoder:
    """Read a decoder from a checkpoint directory, a GGUF file, a config.json, a built-in name or a model id of the Hub.

    Of a model on the Hub only config.json is needed.

    Raises:
        ZebraError: what `hub_directory` raises; no such file or name, no JSON object, a size that is missing or not an
            integer, latent attention or unknown shared experts, layers that are neither global nor local, a quantised
            checkpoint without its safetensors files.
    """
    if is_gguf(model):
        return decoder_from_config(config_fields(read_header(model)), name=str(model))
    path = hub_directory(str(model), weights=False) if is_hub_name(model) else Path(model)
    file = path / "config.json" if path.is_dir() else path
    if file.is_file():
        try:
            fields = json.loads(file.read_text(encoding="utf-8"))
            return _as_stored(_with_settings(decoder_from_config(fields, name=str(model)), path), fields, path)
        except ZebraError:
            raise
        except (TypeError, ValueError, AttributeError, KeyError, IndexError, RecursionError) as error:
            raise ZebraError(f"{file} is not a decoder's config: {type(error).__name__}, {error}. Fix it.") from None
    if str(model) in SHAPES:
        return decoder_from_config(shape(str(model)), name=str(model))
    raise ZebraError(
        f"there is no config.json at {model}, and no built-in model of that name. Give a checkpoint's directory, "
        f"its config.json, or one of {', '.join(SHAPES)}."
    )


def _with_settings(decoder: Decoder, path: Path) -> Decoder:
    """Add what zebra.json says of the local layers, for which config.json has no field: sinks and full decoding."""
    file = path / "zebra.json"
    if decoder.stripes is None or not file.is_file():
        return decoder
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        sinks, full_decode = settings.get("sinks", 0), bool(settings.get("full_decode"))
    except (ValueError, AttributeError, RecursionError) as error:
        raise ZebraError(
            f"{file} cannot be read: {error}. Fix it, or remove it to plan without its settings."
        ) from None
    return replace(decoder, stripes=replace(decoder.stripes, sinks=sinks), full_decode=full_decode)


def _as_stored(decoder: Decoder, fields: Mapping[str, Any], path: Path) -> Decoder:
    """Add what the stored tensors show: whether the head has weights of its own, and the bytes of quantised weights."""
    tensors = stored_tensors(path) if path.is_dir() else {}
    if decoder.tied and has_own_head(tensors):
        decoder = replace(decoder, tied=False)
    if (quantization := fields.get("quantization_config")) is None:
        return decoder
    if not tensors:
        raise ZebraError(
            f"{path} is quantised ({quantization.get('quant_method')}), so its size is known only from its safetensors "
            "files. Give their directory, or remove quantization_config to plan it in 16 bits."
        )
    return replace(decoder, linear_bytes=layer_bytes(tensors) / decoder.linear_parameters)


def decoder_from_config(fields: Mapping[str, Any], *, name: str) -> Decoder:
    """The decoder of a config's fields, or of its `text_config`; raises what `read_decoder` raises."""
    fields = fields.get("text_config") or fields
    family = str(fields.get("model_type", "llama"))
    traits = FAMILIES.get(family, FamilyTraits())
    unknown = ["kv_lora_rank", "n_shared_experts", "n_routed_experts", "moe_num_experts"]
    unknown += ["shared_expert_intermediate_size"] * (not traits.shared_expert)
    if unsupported := [key for key in unknown if fields.get(key)]:
        raise ZebraError(
            f"{name} has {unsupported[0]}: latent attention and shared experts of such families cannot be estimated. "
            "Plan another model."
        )
    integer = partial(_integer, fields, name)
    layers, hidden, heads = map(integer, ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    experts = next((key for key in ("num_experts", "num_local_experts") if fields.get(key)), None)
    kv_heads = integer("num_key_value_heads", heads)
    if heads % kv_heads or (hidden % heads and fields.get("head_dim") is None):
        raise ZebraError(
            f"{name}: key-value heads must divide the heads, and heads the hidden size unless head_dim is set; got "
            f"{kv_heads}, {heads} and {hidden}. Fix its config.json."
        )
    tied = fields.get("tie_word_embeddings", traits.tied)
    if not isinstance(tied, bool):
        raise ZebraError(f"{name}: tie_word_embeddings must be true or false; got {tied!r}. Fix its config.json.")
    longest = integer("max_position_embeddings")
    attention_bias = traits.biases == "all" or bool(fields.get("attention_bias"))
    sizes = Decoder(
        name=name,
        family=family,
        layers=layers,
        hidden_size=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=integer("head_dim", hidden // heads),
        intermediate_size=integer("intermediate_size", None if traits.gated else 4 * hidden),
        vocab_size=integer("vocab_size"),
        tied=tied,
        trained_length=reach_of(longest, fields),
        learned_positions=longest if traits.biases == "all" else 0,
        qkv_bias=attention_bias or (traits.biases == "qkv" and fields.get("qkv_bias", True)),
        out_bias=attention_bias,
        mlp_bias=traits.biases == "all" or bool(fields.get("mlp_bias")),
        rope=_rope(fields, traits),
        stripes=_stripes(fields, traits, layers, name),
        **(_experts(fields, experts, layers, traits, name) if experts else {}),
    )
    return traits.complete(sizes, fields) if traits.complete else sizes


def _integer(fields: Mapping[str, Any], name: str, key: str, default: int | None = None) -> int:
    """Read a size from the fields of the config called `name`; the default where it is absent."""
    value = fields.get(key)
    if value is None:
        value = fields.get(_NAMES.get(key, key))
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST:
        shown = "nothing" if value is None else repr(value)[:20]
        raise ZebraError(f"{name}: {key} must be an integer from 1 to 10^12; got {shown}. Fix its config.json.")
    return value


def _experts(fields: Mapping[str, Any], key: str, layers: int, traits: FamilyTraits, name: str) -> dict[str, Any]:
    integer = partial(_integer, fields, name)
    experts, each = integer(key), integer("num_experts_per_tok")
    if each > experts:
        raise ZebraError(f"{name}: a token can use at most {experts} experts; got {each}. Fix its config.json.")
    kinds = fields.get("mlp_layer_types")
    only, step = fields.get("mlp_only_layers") or (), fields.get("decoder_sparse_step") or 1
    sparse = kinds.count("sparse") if kinds else sum(i not in only and (i + 1) % step == 0 for i in range(layers))
    width = "moe_intermediate_size" if fields.get("moe_intermediate_size") else "intermediate_size"
    return {
        "experts": experts,
        "experts_per_token": each,
        "expert_intermediate_size": integer(width),
        "shared_expert_intermediate_size": integer("shared_expert_intermediate_size") if traits.shared_expert else 0,
        "expert_layers": sparse,
    }


def _rope(fields: Mapping[str, Any], traits: FamilyTraits) -> str | None:
    """The rope type; of several, one that depends on the length, where there is one."""
    if not traits.rotated or fields.get("alibi"):
        return None
    types = [rope_type(rope) for rope in ropes_of(fields)]
    return next((kind for kind in types if kind in LENGTH_DEPENDENT), types[0])


def _stripes(fields: Mapping[str, Any], traits: FamilyTraits, layers: int, name: str) -> Stripes | None:
    """The layout of the config itself; a window that is switched off (`use_sliding_window: false`) is ignored."""
    window, kinds = fields.get("sliding_window"), fields.get("layer_types")
    if kinds is not None and (len(kinds) != layers or any(kind not in (GLOBAL, LOCAL) for kind in kinds)):
        raise ZebraError(
            f"{name}: layer_types must be {GLOBAL} or {LOCAL} for each of the {layers} layers; got "
            f"{len(kinds)} of {', '.join(sorted(set(map(str, kinds))))}. Other kinds cannot be estimated."
        )
    if not window or fields.get("use_sliding_window") is False:
        return None
    if kinds is None:
        if traits.pattern is None or (traits.opt_in_window and not fields.get("use_sliding_window")):
            return None
        first = fields.get("max_window_layers") or 0
        every = fields.get("sliding_window_pattern")
        pattern = "L" * (every - 1) + "G" if every and "G" in traits.pattern else traits.pattern
        tiled = Stripes(window=window, pattern=pattern).layer_types(layers)
        kinds = [kind if i >= first else GLOBAL for i, kind in enumerate(tiled)]
    return Stripes.of(kinds, window) if LOCAL in kinds else None
