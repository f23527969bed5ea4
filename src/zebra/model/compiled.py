"""Compile a model's layers with torch, one by one: elementwise work between matrix products becomes a few loops.

Layers of one kind share their compiled code, so that two compilations serve a model with stripes, however deep it is.
The code is in torch's own cache (TORCHINDUCTOR_CACHE_DIR), which outlives the process.
"""

from __future__ import annotations

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from zebra.errors import ZebraError


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers of a model.

    Raises:
        ZebraError: the model has no layer of the class GradientCheckpointingLayer of transformers.
    """
    layers: list[nn.Module] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ZebraError(
            "compile and parallel.shard require layers of transformers' class GradientCheckpointingLayer; "
            f"{type(model).__name__} has none. Remove these settings."
        )
    return layers


def compile_layers(model: nn.Module) -> None:
    """Compile each decoder layer in place, at its first call; names and weights stay as they are.

    Raises:
        ZebraError: as `decoder_layers` does.
    """
    for layer in decoder_layers(model):
        layer.compile()
