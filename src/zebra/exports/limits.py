"""What several engines cannot run of a config. Nothing here needs the package gguf, which MLX and vLLM do without."""

from __future__ import annotations

from transformers import PreTrainedConfig

from zebra.errors import ZebraError
from zebra.stripes import GLOBAL, LOCAL

REMEDY = "Serve the folder with zebra or transformers instead."


def other_activation(config: PreTrainedConfig) -> str | None:
    """An activation that engines do not read of a config, as their code has the family's own; None where it is that."""
    own = ("gelu_pytorch_tanh",) if config.model_type.startswith("gemma") else ("silu", "swish")
    used = getattr(config, "hidden_activation", None) or config.hidden_act
    return None if used in own else f"the activation {used}"


def scaled_local_rope(config: PreTrainedConfig) -> str | None:
    """A scaled rope of local layers, where engines scale that of global ones alone."""
    local = config.rope_parameters.get(LOCAL, {})
    return None if local.get("rope_type", "default") == "default" else "a rope of local layers that is scaled"


def other_local_rope(config: PreTrainedConfig) -> str | None:
    """What engines with one base, and a scaling of global layers alone, cannot run; None where all is well."""
    local, whole = config.rope_parameters[LOCAL], config.rope_parameters[GLOBAL]
    plain = scaled_local_rope(config) is None and local["rope_theta"] == whole["rope_theta"]
    return None if plain else "a rope of local layers that is scaled or has another base"


def period_of(layer_types: tuple[str, ...], reader: str) -> int:
    """The period of the layers where the last of each is global; 0 where all are local.

    Args:
        reader: what reads periods alone, for the error.

    Raises:
        ZebraError: they have no such period.
    """
    local = [kind == LOCAL for kind in layer_types]
    if all(local):
        return 0
    for period in range(1, len(local) + 1):
        if all(each == (i % period < period - 1) for i, each in enumerate(local)):
            return period
    raise ZebraError(
        f"{reader} reads a period whose last layer is global, such as LG or LLLG; the layers are "
        f"{''.join('L' if each else 'G' for each in local)}. Choose such a layout, or serve the folder with zebra."
    )
