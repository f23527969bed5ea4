"""The table of routes: which class of transformers runs which family with stripes. It needs no torch.

A conversion changes only `config.json`. Where the source's own class ignores `layer_types`, the target is a stock class
with the same tensors that reads them; plain transformers and vLLM load it without zebra.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zebra.errors import ZebraError
from zebra.stripes import GLOBAL, LOCAL

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Condition:
    """A property that some members of a family have.

    Attributes:
        description: what such a member has; {target} stands for the route's target.
        holds: whether a config has it.
    """

    description: str
    holds: Callable[[PreTrainedConfig], bool]


@dataclass(frozen=True)
class Route:
    """How a family runs with stripes, or why it does not.

    Attributes:
        family: the source's `model_type`.
        target: the `model_type` of the stock class that reads its tensors and each layer's kind; None where there is
            none.
        reason: why this target, or why there is none.
        fields: config fields that the target needs besides layer_types and sliding_window.
        unsupported: members of the family that this route cannot take; the family's next route may.
        fixed_kinds: where it holds, a layer keeps its kind and only the window may change, because its rope depends on
            the kind.
    """

    family: str
    target: str | None
    reason: str
    fields: Callable[[PreTrainedConfig], dict[str, Any]] = lambda config: {}
    unsupported: tuple[Condition, ...] = ()
    fixed_kinds: Condition | None = None


def _window_in_use(config: PreTrainedConfig) -> dict[str, Any]:
    return {"use_sliding_window": True}


def _window_for_vllm_too(config: PreTrainedConfig) -> dict[str, Any]:
    """transformers reads only layer_types; unless `max_window_layers` is 0, vLLM would run every layer full."""
    return _window_in_use(config) | {"max_window_layers": 0}


def _rope_in_every_layer(config: PreTrainedConfig) -> dict[str, Any]:
    return {"use_sliding_window": True, "no_rope_layers": [1] * config.num_hidden_layers}


def _rope_for_each_kind(config: PreTrainedConfig) -> dict[str, Any]:
    return {"rope_parameters": {kind: dict(config.rope_parameters) for kind in (GLOBAL, LOCAL)}}


def _experts_for_each_layer(config: PreTrainedConfig) -> dict[str, Any]:
    """Layers with experts: Qwen 3 MoE has a step and a list of exceptions, Mellum a list of all layers."""
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


_BIASED = Condition("biases in the attention projections, which {target} would drop", lambda c: bool(c.attention_bias))
WITHOUT_END_TOKENS = Condition("no bos_token_id or no eos_token_id: {target} would use its own", _lacks_token)
_BIDIRECTIONAL = Condition("bidirectional attention", lambda c: bool(getattr(c, "use_bidirectional_attention", False)))
_TWO_ROPES = Condition("global and local layers have different ropes", _rope_differs)
READS_LAYER_TYPES = "reads layer_types itself"
_NO_CLASS = "no stock class with {} reads layer_types"

ROUTES: tuple[Route, ...] = (
    Route("llama", "cwm", "llama ignores layer_types; cwm has its tensors", unsupported=(_BIASED, WITHOUT_END_TOKENS)),
    Route("llama", "smollm3", "smollm3 has its tensors, with and without biases", _rope_in_every_layer),
    Route("mistral", "cwm", "mistral ignores layer_types; cwm has its tensors", unsupported=(WITHOUT_END_TOKENS,)),
    Route("ministral", "ministral", READS_LAYER_TYPES),
    Route("cwm", "cwm", READS_LAYER_TYPES, unsupported=(WITHOUT_END_TOKENS,)),
    Route("smollm3", "smollm3", READS_LAYER_TYPES + "; layers without rope stay without", _window_in_use),
    Route("qwen2", "qwen2", READS_LAYER_TYPES, _window_for_vllm_too),
    Route("qwen3", "qwen3", READS_LAYER_TYPES, _window_for_vllm_too),
    Route("qwen2_moe", "qwen2_moe", READS_LAYER_TYPES, _window_in_use),
    Route("qwen3_moe", "mellum", "qwen3_moe ignores layer_types; mellum has its tensors", _experts_for_each_layer),
    Route("mellum", "mellum", READS_LAYER_TYPES, fixed_kinds=_TWO_ROPES),
    Route("gemma2", "gemma2", READS_LAYER_TYPES, unsupported=(_BIDIRECTIONAL,)),
    Route("gemma3_text", "gemma3_text", READS_LAYER_TYPES, unsupported=(_BIDIRECTIONAL,), fixed_kinds=_TWO_ROPES),
    Route(
        "cohere2", "cohere2", READS_LAYER_TYPES, fixed_kinds=Condition("only local layers have a rope", lambda c: True)
    ),
    Route("olmo2", "olmo3", "olmo2 ignores layer_types; olmo3 has its tensors", _rope_for_each_kind),
    Route("olmo3", "olmo3", READS_LAYER_TYPES, fixed_kinds=_TWO_ROPES),
    Route("granite_swa", "granite_swa", READS_LAYER_TYPES),
    Route("gpt_oss", "gpt_oss", READS_LAYER_TYPES),
    Route("phi3", None, _NO_CLASS.format("its fused projections (qkv_proj, gate_up_proj)")),
    Route("mixtral", None, _NO_CLASS.format("its experts") + "; minimax has them, and one window for all layers"),
    Route("granite", None, "the classes with its tensors lack its multipliers; granite_swa has those, but needs sinks"),
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
    """Add a route after those of ROUTES, such as for a family that is registered with transformers at run time."""
    _registered.append(route)


def routes_of(family: str) -> list[Route]:
    """The routes of a family by its `model_type`, in order."""
    return [route for route in (*ROUTES, *_registered) if route.family == family]


def check_family(family: str) -> None:
    """Check that a family is not known to have no route.

    Raises:
        ZebraError: it is.
    """
    routes = routes_of(family)
    if routes and all(route.target is None for route in routes):
        raise no_route(family, [route.reason for route in routes])


def no_route(family: str, reasons: list[str]) -> ZebraError:
    """The error for a checkpoint that none of its family's routes takes."""
    return ZebraError(f"this {family} checkpoint is not supported: {'; '.join(reasons)}. See docs/families.md.")


def table() -> str:
    """The routes in Markdown, as docs/families.md has them: `python -m zebra.model.routes`."""
    served = ["| family | runs as | because | not supported if it has | layers |", "|---|---|---|---|---|"]
    refused = ["| family | because |", "|---|---|"]
    for route in ROUTES:
        if route.target is None:
            refused.append(f"| `{route.family}` | {route.reason} |")
            continue
        unsupported = "; ".join(each.description.format(target=route.target) for each in route.unsupported) or "–"
        layers = f"keep their kind where {route.fixed_kinds.description}" if route.fixed_kinds else "any layout"
        served.append(f"| `{route.family}` | `{route.target}` | {route.reason} | {unsupported} | {layers} |")
    return "\n".join([*served, "", "Known, but not supported:", "", *refused])


if __name__ == "__main__":
    print(table())
