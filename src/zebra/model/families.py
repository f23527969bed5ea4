"""Which family of transformers is striped how: a table of routes, and what it makes of a config.

A conversion changes `config.json` and nothing else. Where the source's own class ignores `layer_types`, the target is
a stock class with the same tensors that reads them; plain transformers and vLLM load it without us.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from zebra.refusal import Refusal
from zebra.stripes import GLOBAL, LOCAL, Stripes

DENSE = "dense"
"""The layout of a model without stripes, as rows and tables call it."""


@dataclass(frozen=True)
class Route:
    """How a family is striped: the stock class that reads its tensors and a layer's kind, and what to write for it."""

    target: str
    because: str
    writes: tuple[tuple[str, Any], ...] = ()
    refuses: Callable[[PreTrainedConfig], str | None] = lambda config: None


def _no_route_to_cwm(config: PreTrainedConfig) -> str | None:
    if getattr(config, "attention_bias", False):
        return "it has biases in its attention projections, which the stock class cwm would drop"
    for token in ("bos_token_id", "eos_token_id"):
        if getattr(config, token, None) is None:
            return f"its config.json has no {token}, and the stock class cwm would bring its own; write the right one"
    return None


ROUTES: dict[str, Route] = {
    "llama": Route("cwm", "llama ignores layer_types; cwm has the same tensors", refuses=_no_route_to_cwm),
    "mistral": Route("cwm", "mistral ignores layer_types; cwm has the same tensors", refuses=_no_route_to_cwm),
    "cwm": Route("cwm", "reads layer_types itself", refuses=_no_route_to_cwm),
    "qwen2": Route("qwen2", "reads layer_types itself", writes=(("use_sliding_window", True),)),
    "qwen3": Route("qwen3", "reads layer_types itself", writes=(("use_sliding_window", True),)),
}
"""The family table: `model_type` of the source to its route. The contract tests walk it."""


def route(config: PreTrainedConfig) -> Route:
    """The family's route.

    Raises:
        Refusal: no route for the family, or none for this member of it, with the reason.
    """
    found = ROUTES.get(config.model_type)
    if found is None:
        raise Refusal(
            f"there is no route for the family {config.model_type!r}; routes exist for {', '.join(ROUTES)}. "
            "See CONTRIBUTING.md, how to add a host family."
        )
    reason = found.refuses(config)
    if reason is not None:
        raise Refusal(f"this {config.model_type} checkpoint cannot be served: {reason}.")
    return found


def striped(config: PreTrainedConfig, stripes: Stripes) -> PreTrainedConfig:
    """The config of the same model with these stripes, every field written out: class defaults differ."""
    taken = route(config)
    layer_types = stripes.layer_types(config.num_hidden_layers)
    target_class = type(AutoConfig.for_model(taken.target))
    known = {f.name for f in fields(target_class)}
    foreign = {f.name for f in fields(type(config))} - known
    kept = {
        name: value
        for name, value in config.to_dict().items()
        if name not in foreign | {"model_type", "architectures", "transformers_version"}
    }
    kept |= dict(taken.writes) | {"layer_types": list(layer_types), "sliding_window": stripes.window}
    kept["head_dim"] = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    made = target_class(**kept)
    made.architectures = [host_class(made).__name__]
    return made


def stripes_of(config: PreTrainedConfig) -> Stripes | None:
    """The layout that a config asks for; None where every layer is global."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = [LOCAL if window else GLOBAL] * config.num_hidden_layers
    return Stripes.of(kinds, window) if window and LOCAL in kinds else None


def layout(config: PreTrainedConfig) -> str:
    """The layout in the short notation, `dense` where every layer is global."""
    return str(stripes_of(config) or DENSE)


def host_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The stock class that runs a config."""
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
