"""Which family of transformers is striped how: a table of routes, and what it makes of a config.

A conversion changes `config.json` and nothing else. Where the source's own class ignores `layer_types`, the target is
a stock class with the same tensors that reads them; plain transformers and vLLM load it without us.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import transformers
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from zebra.errors import ZebraError
from zebra.stripes import GLOBAL, LOCAL, Stripes, visible_pairs

FULL = "full"
"""The layout of a model without stripes, as rows and tables call it."""


@dataclass(frozen=True)
class Limit:
    """What a route refuses: the words for it, and the question to a config."""

    says: str
    holds: Callable[[PreTrainedConfig], bool]


@dataclass(frozen=True)
class Route:
    """How a family is striped, or why it is not.

    Attributes:
        family: the source's `model_type`.
        target: the stock class that reads its tensors and each layer's kind, by its `model_type`; None where there is
            none.
        because: the reason of the choice, or of the refusal.
        writes: fields that the target needs besides layer_types and sliding_window.
        refuses: members of the family that this route cannot take; the family's next row may.
        fixed: where it holds, a layer keeps its kind and only the window is free, as its rope depends on the kind.
    """

    family: str
    target: str | None
    because: str
    writes: Callable[[PreTrainedConfig], dict[str, Any]] = lambda config: {}
    refuses: tuple[Limit, ...] = ()
    fixed: Limit | None = None


def _window_in_use(config: PreTrainedConfig) -> dict[str, Any]:
    return {"use_sliding_window": True}


def _rope_in_every_layer(config: PreTrainedConfig) -> dict[str, Any]:
    return {"use_sliding_window": True, "no_rope_layers": [1] * config.num_hidden_layers}


def _rope_for_each_kind(config: PreTrainedConfig) -> dict[str, Any]:
    return {"rope_parameters": {kind: dict(config.rope_parameters) for kind in (GLOBAL, LOCAL)}}


def _experts_for_each_layer(config: PreTrainedConfig) -> dict[str, Any]:
    """Qwen 3 MoE says which layers have experts by a step and a list of exceptions, Mellum by a list."""
    sparse = [
        i not in config.mlp_only_layers and config.num_experts > 0 and (i + 1) % config.decoder_sparse_step == 0
        for i in range(config.num_hidden_layers)
    ]
    return _rope_for_each_kind(config) | {"mlp_layer_types": ["sparse" if s else "dense" for s in sparse]}


def _lacks_token(config: PreTrainedConfig) -> bool:
    return any(getattr(config, f"{name}_token_id", None) is None for name in ("bos", "eos"))


def _rope_differs(config: PreTrainedConfig) -> bool:
    rope = config.rope_parameters or {}
    return rope.get(GLOBAL) != rope.get(LOCAL)


_BIASED = Limit("biases in the attention projections, which {target} would drop", lambda c: bool(c.attention_bias))
TOKENLESS = Limit("no bos_token_id or no eos_token_id: {target} would bring its own", _lacks_token)
_BOTH_WAYS = Limit("bidirectional attention", lambda c: bool(getattr(c, "use_bidirectional_attention", False)))
_TWO_ROPES = Limit("global and local layers have different ropes", _rope_differs)
READS = "reads layer_types itself"
_QUANTISED = Limit("quantised weights, which were not tried", lambda c: hasattr(c, "quantization_config"))
_NO_CLASS = "no stock class with {} reads layer_types"

ROUTES: tuple[Route, ...] = (
    Route("llama", "cwm", "llama ignores layer_types; cwm has its tensors", refuses=(_BIASED, TOKENLESS)),
    Route("llama", "smollm3", "smollm3 has its tensors, with and without biases", _rope_in_every_layer),
    Route("mistral", "cwm", "mistral ignores layer_types; cwm has its tensors", refuses=(TOKENLESS,)),
    Route("ministral", "ministral", READS),
    Route("cwm", "cwm", READS, refuses=(TOKENLESS,)),
    Route("smollm3", "smollm3", READS + "; layers without rope stay without", _window_in_use),
    Route("qwen2", "qwen2", READS, _window_in_use),
    Route("qwen3", "qwen3", READS, _window_in_use),
    Route("qwen2_moe", "qwen2_moe", READS, _window_in_use),
    Route("qwen3_moe", "mellum", "qwen3_moe ignores layer_types; mellum has its tensors", _experts_for_each_layer),
    Route("mellum", "mellum", READS, fixed=_TWO_ROPES),
    Route("gemma2", "gemma2", READS, refuses=(_BOTH_WAYS,)),
    Route("gemma3_text", "gemma3_text", READS, refuses=(_BOTH_WAYS,), fixed=_TWO_ROPES),
    Route("cohere2", "cohere2", READS, fixed=Limit("only local layers have a rope", lambda c: True)),
    Route("olmo2", "olmo3", "olmo2 ignores layer_types; olmo3 has its tensors", _rope_for_each_kind),
    Route("olmo3", "olmo3", READS, fixed=_TWO_ROPES),
    Route("granite_swa", "granite_swa", READS),
    Route("gpt_oss", "gpt_oss", READS, refuses=(_QUANTISED,)),
    Route("phi3", None, _NO_CLASS.format("its fused projections (qkv_proj, gate_up_proj)")),
    Route("mixtral", None, _NO_CLASS.format("its experts") + "; minimax has them, and one window for all layers"),
    Route("granite", None, "the classes with its tensors lack its multipliers; granite_swa has those, and wants sinks"),
    Route("cohere", None, "cohere2 has its tensors, but rotates local layers only"),
    Route("gemma", None, "the classes with its tensors neither scale embeddings nor add 1 to a norm's weight"),
    Route("gemma3", None, "it is a vision-language model; gemma3_text is its text model"),
    Route("olmo", None, _NO_CLASS.format("norms without weights")),
    Route("olmoe", None, "mellum has its tensors' names, but norms of one head's size"),
    Route("stablelm", None, _NO_CLASS.format("its layer norms")),
    Route("starcoder2", None, _NO_CLASS.format("its layer norms and biases")),
    Route("phi", None, _NO_CLASS.format("its layer norms and biases")),
    Route("gpt_neox", None, _NO_CLASS.format("its tensors")),
    Route("gpt2", None, _NO_CLASS.format("learned absolute positions")),
)
"""The family table: the first route of a family that takes a checkpoint serves it. docs/families.md has it."""
_registered: list[Route] = []


def register_route(route: Route) -> None:
    """Serve another family, such as one that is registered with transformers at run time, behind the rows of ROUTES."""
    _registered.append(route)


def _routes_of(family: str) -> list[Route]:
    return [row for row in (*ROUTES, *_registered) if row.family == family]


def route(config: PreTrainedConfig) -> Route:
    """The family's route.

    Raises:
        ZebraError: no route for the family, or none for this member of it, with the reason.
    """
    rows = _routes_of(config.model_type)
    if not rows:
        raise ZebraError(
            f"there is no route for the family {config.model_type!r}; routes exist for "
            f"{', '.join(dict.fromkeys(row.family for row in ROUTES if row.target))}. "
            "See CONTRIBUTING.md, how to add a host family."
        )
    reasons = []
    for row in rows:
        reason = unavailable(row) or next((_filled(li, row) for li in row.refuses if li.holds(config)), None)
        if reason is None:
            return row
        reasons.append(reason)
    raise ZebraError(
        f"this {config.model_type} checkpoint cannot be served: {'; '.join(reasons)}. See docs/families.md."
    )


def ignores_layer_types(config: PreTrainedConfig) -> bool:
    """Whether the family's own class is known to run every layer alike, whatever layer_types say."""
    rows = _routes_of(config.model_type)
    return bool(rows) and all(row.target != config.model_type for row in rows)


def unavailable(row: Route) -> str | None:
    """Why a row serves nobody here: there is no route, or the installed transformers lacks its class."""
    if row.target is None:
        return row.because
    if row.target not in CONFIG_MAPPING:
        return f"it runs as {row.target}, which transformers {transformers.__version__} does not have; install a newer"
    return None


def _filled(limit: Limit, row: Route) -> str:
    return "it has " + limit.says.format(target=row.target)


def with_stripes(config: PreTrainedConfig, stripes: Stripes) -> PreTrainedConfig:
    """The config of the same model with these stripes, every field written out: class defaults differ.

    Raises:
        ZebraError: no route, a layer beyond the model, a layer of another kind where the family's rope forbids it,
            layers of other kinds than global and local.
    """
    taken = route(config)
    if others := sorted({*layer_kinds(config)} - {GLOBAL, LOCAL}):
        raise ZebraError(
            f"stripes are of global and local layers, and this model has {', '.join(others)} layers, "
            f"{layout(config)}: it was trained with them and would be another. Leave the stripes out."
        )
    layer_types = stripes.layer_types(config.num_hidden_layers)
    _check_kinds(taken, config, stripes, layer_types)
    target_class = type(AutoConfig.for_model(taken.target))
    known = {f.name for f in fields(target_class)}
    foreign = {f.name for f in fields(type(config))} - known
    kept = {
        name: value
        for name, value in config.to_dict().items()
        if name not in foreign | {"model_type", "architectures", "transformers_version"}
    }
    kept |= taken.writes(config) | {"layer_types": list(layer_types), "sliding_window": stripes.window}
    kept["head_dim"] = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    made = target_class(**kept)
    made.architectures = [model_class(made).__name__]
    return made


def _check_kinds(taken: Route, config: PreTrainedConfig, stripes: Stripes, wanted: tuple[str, ...]) -> None:
    if taken.fixed is None or not taken.fixed.holds(config) or list(wanted) == list(config.layer_types):
        return
    raise ZebraError(
        f"in this {config.model_type} checkpoint {taken.fixed.says}, so each layer keeps its kind and only the window "
        f"may change; {stripes} moves layers. Use {Stripes.of(config.layer_types, stripes.window)}."
    )


def stripes_of(config: PreTrainedConfig) -> Stripes | None:
    """The layout that a config asks for; None where every layer is global.

    A config class whose layers are of other kinds than global and local says its layout by a property `stripes`.
    """
    if (own := getattr(config, "stripes", None)) is not None:
        return own
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = [LOCAL if window else GLOBAL] * config.num_hidden_layers
    return Stripes.of(kinds, window) if window and LOCAL in kinds else None


def layout(config: PreTrainedConfig, sinks: int = 0) -> str:
    """The layout in the short notation, `full` where every layer is global."""
    stripes = stripes_of(config)
    return FULL if stripes is None else str(replace(stripes, sinks=sinks))


def layer_kinds(config: PreTrainedConfig) -> tuple[str, ...]:
    """Each layer's kind: those of transformers, and others that the config's class may have."""
    n, stripes = config.num_hidden_layers, stripes_of(config)
    return stripes.layer_types(n) if stripes else (GLOBAL,) * n


def attention_pairs(config: PreTrainedConfig, length: int, sinks: int = 0) -> int:
    """Pairs of a query and what it sees, in all layers over one text."""
    stripes = stripes_of(config)
    if stripes is None:
        return config.num_hidden_layers * visible_pairs(length)
    stripes = replace(stripes, sinks=sinks)
    return sum(stripes.pairs(kind, length) for kind in stripes.layer_types(config.num_hidden_layers))


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The stock class that runs a config."""
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def table() -> str:
    """The family table in Markdown, as docs/families.md has it: `python -m zebra.model.families`."""
    served = ["| family | runs as | because | refused where it has | layers |", "|---|---|---|---|---|"]
    refused = ["| family | because |", "|---|---|"]
    for row in ROUTES:
        if row.target is None:
            refused.append(f"| `{row.family}` | {row.because} |")
            continue
        limits = "; ".join(limit.says.format(target=row.target) for limit in row.refuses) or "–"
        layers = f"keep their kind where {row.fixed.says}" if row.fixed else "any layout"
        served.append(f"| `{row.family}` | `{row.target}` | {row.because} | {limits} | {layers} |")
    return "\n".join([*served, "", "Known and refused:", "", *refused])


if __name__ == "__main__":
    print(table())
