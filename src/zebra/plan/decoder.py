"""The sizes of a decoder, read from its config.json: all that its cost depends on.

    parameters = V h (embedding) + V h (head, unless tied) + L layers + final norm
    a layer    = h D (2 H + 2 K) + c h i (c = 3 for a gated MLP, 2 for a plain one) + norms + biases

h hidden, i intermediate, H query heads, K key-value heads, D head size, V vocabulary, L layers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zebra.errors import ZebraError
from zebra.plan.shapes import SHAPES, shape
from zebra.positions import LENGTH_DEPENDENT
from zebra.stripes import GLOBAL, LOCAL, Stripes


@dataclass(frozen=True)
class Family:
    """What the families differ in beside their sizes.

    Attributes:
        norms: weights of norms in a layer, in multiples of h, those of queries and keys left out.
        query_norm: whose width the norms of queries and keys have: a `head`, or `all` heads together.
        biases: biases of the `qkv` projections, of all `attention`, or of `all` linear maps and norms; None follows
            `attention_bias` and `mlp_bias` of the config.
        pattern: the layout where the config has a window and no layer_types, tiled; None where its host then has none.
        asks: whether a window counts only beside `use_sliding_window: true`.
        turned: the kinds of layer whose queries and keys a rotary embedding turns.
        tied: whether embedding and head are one where the config does not say.
        complete: adds to a decoder what only the family's configs say.
    """

    norms: int = 2
    query_norm: str | None = None
    biases: str | None = None
    gated: bool = True
    pattern: str | None = "L"
    asks: bool = False
    turned: str = "GL"
    tied: bool = False
    complete: Callable[[Decoder, Mapping[str, Any]], Decoder] | None = None


FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("mistral", "ministral", "mixtral", "phi3"), Family()),
    "llama": Family(pattern=None),
    "cwm": Family(pattern="GLLL"),
    "smollm3": Family(asks=True, tied=True),
    "qwen2": Family(biases="qkv", asks=True),
    **dict.fromkeys(("qwen3", "qwen3_moe"), Family(query_norm="head", asks=True)),
    "mellum": Family(query_norm="head"),
    "gemma2": Family(norms=4, pattern="LG", tied=True),
    "gemma3_text": Family(norms=4, query_norm="head", pattern="LLLLLG", tied=True),
    "cohere2": Family(norms=1, pattern="LLLG", turned="L", tied=True),
    "olmo2": Family(query_norm="all", pattern=None),
    "olmo3": Family(query_norm="all", pattern="LLLG"),
    "gpt2": Family(biases="all", gated=False, turned="", tied=True, pattern=None),
}
"""The families whose parameters are counted exactly, by `model_type`. Any other is reckoned as a Llama, and said so."""

LARGEST = 10**12
"""What any size of a config, a length or a batch may be: products of a few of them are still floats."""
_NAMES = {
    "num_hidden_layers": "n_layer",
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
}
"""GPT-2's words for the same."""


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A decoder's sizes.

    Attributes:
        experts, experts_per_token: of the MLP of `expert_layers` layers, each `expert_intermediate` wide; 0 where there
            are none.
        trained_length: tokens of context that its positions were trained for, by its config.
        rope: the type of its rotary embedding, None where it has none.
        learned_positions: rows of a table of positions that is added to the embedding.
        stripes: the layout that the config has of its own, None where every layer is global.
    """

    name: str
    family: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool
    trained_length: int
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    experts: int = 0
    experts_per_token: int = 0
    expert_intermediate: int = 0
    expert_layers: int = 0
    rope: str | None = "default"
    learned_positions: int = 0
    stripes: Stripes | None = None

    @property
    def style(self) -> Family:
        """The family's ways; a Llama's where the family is not in the table."""
        return FAMILIES.get(self.family, Family())

    @property
    def maps(self) -> int:
        """Matrices of an MLP: gate, up and down, or up and down."""
        return 3 if self.style.gated else 2

    @property
    def query_width(self) -> int:
        """H D, what the query projection gives."""
        return self.heads * self.head_size

    @property
    def kv_width(self) -> int:
        """K D, what the key projection gives, and the value projection."""
        return self.kv_heads * self.head_size

    def kinds(self, stripes: Stripes | None) -> tuple[str, ...]:
        """The kind of each layer under a layout."""
        return (GLOBAL,) * self.layers if stripes is None else stripes.layer_types(self.layers)

    def parameters(self) -> dict[str, int]:
        """Parameters by part; a tied head has none of its own."""
        h, hd, kd = self.hidden, self.query_width, self.kv_width
        projections = 2 * h * hd + 2 * h * kd + self.qkv_bias * (hd + 2 * kd) + self.out_bias * h
        dense = self.maps * h * self.intermediate
        dense += self.mlp_bias * ((self.maps - 1) * self.intermediate + h)
        sparse = self.experts * (self.maps * h * self.expert_intermediate + h)
        queries = {"head": 2 * self.head_size, "all": hd + kd, None: 0}[self.style.query_norm]
        every = self.style.biases == "all"  # of the norms too
        return {
            "embedding": (self.vocabulary + self.learned_positions) * h,
            "projections": self.layers * projections,
            "MLP": (self.layers - self.expert_layers) * dense + self.expert_layers * sparse,
            "norms": (1 + every) * (self.layers * self.style.norms * h + h) + self.layers * queries,
            "head": 0 if self.tied else self.vocabulary * h,
        }

    @property
    def size(self) -> int:
        """Parameters in all."""
        return sum(self.parameters().values())


def read(model: str | os.PathLike[str]) -> Decoder:
    """The decoder of a checkpoint's directory, a config.json, or a built-in name.

    Raises:
        ZebraError: no such file or name, no JSON object, a size that is missing or no whole number, latent attention or
            shared experts, layers of a kind that is neither global nor local.
    """
    path = Path(model)
    file = path / "config.json" if path.is_dir() else path
    if file.is_file():
        try:
            fields = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ZebraError(f"{file} is no JSON: {error}. Give a checkpoint's config.json.") from None
        if not isinstance(fields, dict):
            raise ZebraError(f"{file} is no config: it holds no JSON object. Give a checkpoint's config.json.")
        try:
            return decoder(fields, name=str(model))
        except ZebraError:
            raise
        except (TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
            raise ZebraError(f"{file} is no decoder's config: {type(error).__name__}, {error}. Mend it.") from None
    if str(model) in SHAPES:
        return decoder(shape(str(model)), name=str(model))
    raise ZebraError(
        f"there is no config.json at {model}, and no built-in model of that name. Give a checkpoint's directory, "
        f"its config.json, or one of {', '.join(SHAPES)}."
    )


def decoder(fields: Mapping[str, Any], *, name: str) -> Decoder:
    """The decoder of a config's fields; a multimodal config's text part. Raises as `read` does."""
    inner = fields.get("text_config")
    fields = inner if isinstance(inner, Mapping) and inner else fields
    unknown = ("kv_lora_rank", "shared_expert_intermediate_size", "n_shared_experts")
    if foreign := [key for key in unknown if fields.get(key)]:
        raise ZebraError(
            f"{name} has {foreign[0]}: latent attention and shared experts are not reckoned. Plan another."
        )
    family = str(fields.get("model_type", "llama"))
    style = FAMILIES.get(family, Family())
    layers, hidden, heads = (_whole(fields, key, name) for key in list(_NAMES)[:3])
    experts = next((key for key in ("num_experts", "num_local_experts") if fields.get(key)), None)
    kv_heads = _whole(fields, "num_key_value_heads", name, heads)
    if heads % kv_heads or (hidden % heads and fields.get("head_dim") is None):
        raise ZebraError(
            f"{name}: key-value heads divide the heads, and heads the hidden size unless there is a head_dim; got "
            f"{kv_heads}, {heads} and {hidden}. Mend its config.json."
        )
    tied = fields.get("tie_word_embeddings", style.tied)
    if not isinstance(tied, bool):
        raise ZebraError(f"{name}: tie_word_embeddings is true or false; got {tied!r}. Mend its config.json.")
    attention_bias = style.biases in ("attention", "all") or bool(fields.get("attention_bias"))
    sizes = Decoder(
        name=name,
        family=family,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_size=_whole(fields, "head_dim", name, hidden // heads),
        intermediate=_whole(fields, "intermediate_size", name, None if style.gated else 4 * hidden),
        vocabulary=_whole(fields, "vocab_size", name),
        tied=tied,
        trained_length=(longest := _whole(fields, "max_position_embeddings", name)),
        learned_positions=longest if style.biases == "all" else 0,
        qkv_bias=attention_bias or style.biases == "qkv",
        out_bias=attention_bias,
        mlp_bias=style.biases == "all" or bool(fields.get("mlp_bias")),
        rope=_rope(fields, style),
        stripes=_stripes(fields, style, layers, name),
        **(_experts(fields, experts, layers, name) if experts else {}),
    )
    return style.complete(sizes, fields) if style.complete else sizes


def _whole(fields: Mapping[str, Any], key: str, name: str, default: int | None = None) -> int:
    value = fields.get(key)
    if value is None:
        value = fields.get(_NAMES.get(key, key))
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST:
        found = "nothing" if value is None else repr(value)[:20]
        raise ZebraError(f"{name}: {key} is a whole number from 1 to 10^12; got {found}. Mend its config.json.")
    return value


def _experts(fields: Mapping[str, Any], key: str, layers: int, name: str) -> dict[str, int]:
    experts, each = _whole(fields, key, name), _whole(fields, "num_experts_per_tok", name)
    if each > experts:
        raise ZebraError(f"{name}: a token meets at most all {experts} experts; got {each}. Mend its config.json.")
    kinds = fields.get("mlp_layer_types")
    only, step = fields.get("mlp_only_layers") or (), fields.get("decoder_sparse_step") or 1
    sparse = kinds.count("sparse") if kinds else sum(i not in only and (i + 1) % step == 0 for i in range(layers))
    width = "moe_intermediate_size" if fields.get("moe_intermediate_size") else "intermediate_size"
    return {
        "experts": experts,
        "experts_per_token": each,
        "expert_intermediate": _whole(fields, width, name),
        "expert_layers": sparse,
    }


def _rope(fields: Mapping[str, Any], style: Family) -> str | None:
    """The type of the rope, of several that which changes with length; in older configs' words too."""
    if not style.turned or fields.get("alibi"):
        return None
    found = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    ropes = [one for one in (found, *found.values()) if isinstance(one, Mapping)]
    types = [str(one.get("rope_type") or one.get("type") or "default") for one in ropes]
    types = ["longrope" if kind == "su" else kind for kind in types]
    return next((kind for kind in types if kind in LENGTH_DEPENDENT), types[0])


def _stripes(fields: Mapping[str, Any], style: Family, layers: int, name: str) -> Stripes | None:
    """The config's own layout. An unused window is none (Qwen's `use_sliding_window: false`)."""
    window, kinds = fields.get("sliding_window"), fields.get("layer_types")
    if kinds is not None and (len(kinds) != layers or any(kind not in (GLOBAL, LOCAL) for kind in kinds)):
        raise ZebraError(
            f"{name}: layer_types names one of {GLOBAL} and {LOCAL} for each of the {layers} layers; got "
            f"{len(kinds)} of {', '.join(sorted(set(map(str, kinds))))}. Other kinds are not reckoned."
        )
    if not window or fields.get("use_sliding_window") is False:
        return None
    if kinds is None:
        if style.pattern is None or (style.asks and not fields.get("use_sliding_window")):
            return None
        first = fields.get("max_window_layers") or 0
        every = fields.get("sliding_window_pattern")
        pattern = "L" * (every - 1) + "G" if every and "G" in style.pattern else style.pattern
        tiled = Stripes(window=window, pattern=pattern).layer_types(layers)
        kinds = [kind if i >= first else GLOBAL for i, kind in enumerate(tiled)]
    return Stripes.of(kinds, window) if LOCAL in kinds else None
