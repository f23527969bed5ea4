"""The layout of a config: set by the family's route, read back, and counted."""

from __future__ import annotations

from dataclasses import fields, replace

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from zebra.errors import ZebraError
from zebra.model.routes import ROUTES, Route, no_route, routes_of
from zebra.stripes import GLOBAL, LOCAL, Stripes, visible_pairs

FULL = "full"
"""The layout of a model without stripes, as results and tables call it."""


def route_of(config: PreTrainedConfig) -> Route:
    """The first route of the family that takes this config.

    Raises:
        ZebraError: no route for the family, or none for this member of it, with the reason.
    """
    routes = routes_of(config.model_type)
    if not routes:
        raise ZebraError(
            f"the model family {config.model_type!r} is not supported; supported families are "
            f"{', '.join(dict.fromkeys(route.family for route in ROUTES if route.target))}. "
            "See CONTRIBUTING.md, how to add a model family."
        )
    reasons = [_reason_against(route, config) for route in routes]
    if None in reasons:
        return routes[reasons.index(None)]
    raise no_route(config.model_type, [str(reason) for reason in reasons])


def _reason_against(route: Route, config: PreTrainedConfig) -> str | None:
    """Why a route cannot take a config, or None where it can."""
    if route.target is None:
        return route.reason
    if route.target not in CONFIG_MAPPING:
        version = transformers.__version__
        return f"it runs as {route.target}, which transformers {version} does not have; upgrade transformers"
    descriptions = (each.description for each in route.unsupported if each.holds(config))
    return next((f"it has {description.format(target=route.target)}" for description in descriptions), None)


def ignores_layer_types(config: PreTrainedConfig) -> bool:
    """Whether the family's own class is known to ignore layer_types and run all layers alike."""
    routes = routes_of(config.model_type)
    return bool(routes) and all(route.target != config.model_type for route in routes)


def with_stripes(config: PreTrainedConfig, stripes: Stripes) -> PreTrainedConfig:
    """The config of the same model with these stripes, with every field set, as class defaults differ.

    Raises:
        ZebraError: no route, a layer beyond the model, a layer of another kind where the family's rope forbids it,
            layers of other kinds than global and local, a field with a value that the target's class does not take.
    """
    route = route_of(config)
    if others := sorted({*layer_kinds(config)} - {GLOBAL, LOCAL}):
        raise ZebraError(
            f"stripes support only global and local layers; this model was trained with {', '.join(others)} layers, "
            f"{layout(config)}. Remove the stripes."
        )
    layer_types = stripes.layer_types(config.num_hidden_layers)
    fixed = route.fixed_kinds
    if fixed is not None and fixed.holds(config) and list(layer_types) != list(config.layer_types):
        raise ZebraError(
            f"in this {config.model_type} checkpoint {fixed.description}, so each layer must keep its kind and only "
            f"the window can change; got {stripes}. Use {Stripes.of(config.layer_types, stripes.window)}."
        )
    target_class = type(AutoConfig.for_model(route.target))
    source_only = {f.name for f in fields(type(config))} - {f.name for f in fields(target_class)}
    dropped = source_only | {"model_type", "architectures", "transformers_version"}
    values = {name: value for name, value in config.to_dict().items() if name not in dropped}
    values |= route.fields(config) | {"layer_types": list(layer_types), "sliding_window": stripes.window}
    values["head_dim"] = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    try:
        target = target_class(**values)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise ZebraError(
            f"a field of this {config.model_type} is not valid in {route.target}, the class that runs it with stripes: "
            f"{' '.join(str(error).split())}. Fix its config.json."
        ) from None
    target.architectures = [model_class(target).__name__]
    return target


def stripes_of(config: PreTrainedConfig) -> Stripes | None:
    """The layout of a config; None where every layer is global.

    A config class with other kinds of layers than global and local has its layout in a property `stripes`.
    """
    if (own := getattr(config, "stripes", None)) is not None:
        return own
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = [LOCAL if window else GLOBAL] * config.num_hidden_layers
    return Stripes.of(kinds, window) if window and LOCAL in kinds else None


def layout(config: PreTrainedConfig, sinks: int = 0) -> str:
    """The layout in the short notation; `full` where every layer is global."""
    stripes = stripes_of(config)
    return FULL if stripes is None else str(replace(stripes, sinks=sinks))


def layer_kinds(config: PreTrainedConfig) -> tuple[str, ...]:
    """The kind of each layer: one of transformers, or another that the config's class has."""
    n, stripes = config.num_hidden_layers, stripes_of(config)
    return stripes.layer_types(n) if stripes else (GLOBAL,) * n


def attention_pairs(config: PreTrainedConfig, length: int, sinks: int = 0) -> int:
    """The number of (query, key) pairs in all layers over a text of `length` tokens."""
    stripes = stripes_of(config)
    if stripes is None:
        return config.num_hidden_layers * visible_pairs(length)
    stripes = replace(stripes, sinks=sinks)
    return sum(stripes.pairs(kind, length) for kind in stripes.layer_types(config.num_hidden_layers))


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The stock class of transformers that runs a config."""
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
