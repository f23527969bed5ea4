"""What several engines cannot run of a config. Nothing here needs the package gguf: MLX and vLLM do without it."""

from __future__ import annotations

from transformers import PreTrainedConfig

from zebra.errors import ZebraError
from zebra.stripes import GLOBAL, LOCAL

REMEDY = "Serve the folder with zebra or transformers instead."


def other_activation(config: PreTrainedConfig) -> str | None:
    """An activation other than the family's own, which engines hard-code; None if it is the same."""
    own = ("gelu_pytorch_tanh",) if config.model_type.startswith("gemma") else ("silu", "swish")
    used = getattr(config, "hidden_activation", None) or config.hidden_act
    return None if used in own else f"the activation {used}"


def scaled_local_rope(config: PreTrainedConfig) -> str | None:
    """A scaled rope of local layers, which engines that scale only global layers cannot run; None if unscaled."""
    local = config.rope_parameters.get(LOCAL, {})
    return None if local.get("rope_type", "default") == "default" else "a rope of local layers that is scaled"


def other_local_rope(config: PreTrainedConfig) -> str | None:
    """A rope of local layers that is scaled, or has another base than that of global layers; None if neither."""
    local, whole = config.rope_parameters[LOCAL], config.rope_parameters[GLOBAL]
    plain = scaled_local_rope(config) is None and local["rope_theta"] == whole["rope_theta"]
    return None if plain else "a rope of local layers that is scaled or has another base"


def period_of(layer_types: tuple[str, ...], reader: str) -> int:
    """The period of layers in which only the last of each period is global; 0 if all layers are local.

    Args:
        reader: the name of the engine, for the error.

    Raises:
        ZebraError: the layers have no such period.
    """
    local = [kind == LOCAL for kind in layer_types]
    if all(local):
        return 0
    for period in range(1, len(local) + 1):
        if all(each == (i % period < period - 1) for i, each in enumerate(local)):
            return period
    raise ZebraError(
        f"{reader} requires a period whose last layer is global, such as LG or LLLG; the layers are "
        f"{''.join('L' if each else 'G' for each in local)}. Choose such a layout, or serve the folder with zebra."
    )
