r"""What local layers see besides their window, for models that were not trained for it.

    sinks         x . . . . . x x x      the first real tokens of a text are seen too (arXiv 2309.17453)
    full decode   x x x x x x x x x      the prompt is read with the window, decoded tokens see all before them

config.json has no field for either. Both are attention overrides, and a checkpoint stores them in its `zebra.json`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from zebra.errors import ZebraError
from zebra.kernels import Mask, attend
from zebra.kernels.merging import join
from zebra.kernels.sinks import SinkRotation, sink_attention
from zebra.model.families import layout, stripes_of
from zebra.model.opaque_layers import SinkKeys
from zebra.model.override import attention_modules, names_of_other_overrides, overrides_of, set_override
from zebra.stripes import LOCAL, Stripes

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LocalAttention:
    """The attention override of a local layer.

    Attributes:
        sinks: number of first real tokens of each sequence, or packed document, that are seen besides the window.
        full_decode: whether decoded tokens see all tokens before them. The cache knows which tokens are decoded
            (`StripedCache.set_prompt_length`, which `generate` calls). If that was not set, a single new token after
            others counts as decoded.
        rotation: gives sinks outside the window the distances of Self-Extend.
    """

    sinks: int = 0
    full_decode: bool = False
    rotation: SinkRotation | None = field(default=None, compare=False, repr=False)

    def __bool__(self) -> bool:
        return bool(self.sinks or self.full_decode)

    def __str__(self) -> str:
        sinks = [f"{self.sinks} sink{'s' * (self.sinks > 1)}"] if self.sinks else []
        return " and ".join([*sinks, "full decoding"] if self.full_decode else sinks)

    def attend(
        self,
        module: nn.Module,
        positions: Tensor | None,
        query: Tensor,
        key: Tensor | SinkKeys,
        value: Tensor,
        mask: Mask,
        /,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As `AttentionOverride.attend`: the prompt with window and sinks, decoded tokens with all keys.

        Args:
            query: (B, H, T, D). value: (B, K, S, D).
            key: (B, K, S, D), or the keys of a cache layer with sinks or full decoding.

        Raises:
            ZebraError: keys from another cache, which drops some that are needed.
        """
        new, start, sinks, prompt = query.shape[2], 0, None, query.shape[2]
        if isinstance(key, SinkKeys):
            if key.layer is not None:
                sinks = key.layer.store(None if mask.keys is None else mask.keys[:, -new:])
            prompt = self._prompt_tokens(key, new) if self.full_decode else new
            start, key = key.start, key.states
        elif (past := value.shape[2] - new) > 0 and mask.window and (self.full_decode or past >= mask.window - 1):
            raise ZebraError(
                f"this model has {self} in its local layers and so requires the cache of zebra.load; got another cache "
                "with tokens in it. Remove cache_implementation, or pass "
                "zebra.model.self_extend.bounded_cache(model)."
            )
        with_sinks = replace(mask, sinks=self.sinks)
        attend_with_sinks: Any = partial(sink_attention, rotation=self.rotation, **kwargs)
        if prompt == new:
            cached = sinks if start > 0 else None  # else the keys include them
            return attend_with_sinks(query, key, value, with_sinks, cached=cached, start=start)
        decoded = attend(query[:, :, prompt:], key, value, replace(mask, window=None), **kwargs)
        if prompt == 0:
            return decoded
        end = value.shape[2] - new + prompt
        query, key, value, mask = query[:, :, :prompt], key[:, :, :end], value[:, :, :end], with_sinks.sliced(end=end)
        return join(attend_with_sinks(query, key, value, mask), decoded)

    def _prompt_tokens(self, keys: SinkKeys, new: int) -> int:
        """How many of the new tokens belong to the prompt."""
        past = keys.start + keys.states.shape[2] - new
        if keys.prompt_length is None:
            return 0 if new == 1 and past > 0 else new
        return min(max(keys.prompt_length - past, 0), new)


def supports_sinks(config: PreTrainedConfig) -> bool:
    """Whether local layers may have sinks: not under ALiBi, which lowers distant scores."""
    return getattr(config, "position_embedding", None) != "alibi"


def check_sinks(config: PreTrainedConfig, local: LocalAttention | Stripes) -> None:
    """Check that a model supports the sinks of a layout.

    Raises:
        ZebraError: sinks under ALiBi.
    """
    if local.sinks and not supports_sinks(config):
        raise ZebraError(f"sinks are not supported with ALiBi, which lowers distant scores; got {local}. Remove them.")


def set_local_attention(model: PreTrainedModel, local: LocalAttention) -> None:
    """Set the override on the local layers of a loaded model.

    Raises:
        ZebraError: no local layers; sinks under ALiBi; Self-Extend, which must come after.
    """
    check_sinks(model.config, local)
    if others := names_of_other_overrides(model, LocalAttention):
        raise ZebraError(
            f"{local} must be set before other overrides of attention; this model has {others}. Pass both to "
            "zebra.load."
        )
    stripes = stripes_of(model.config)
    kinds = stripes.layer_types(model.config.num_hidden_layers) if stripes else ()
    if LOCAL not in kinds:
        raise ZebraError(
            f"only local layers support {local}; the layout {layout(model.config)} has none. Give stripes, such as "
            "GLLL:512+4."
        )
    for module in attention_modules(model):
        if kinds[module.layer_idx] == LOCAL:
            set_override(module, local)


def local_attention_of(model: nn.Module) -> LocalAttention:
    """The sinks and full decoding that a model's local layers were loaded with."""
    return next(overrides_of(model, LocalAttention), LocalAttention())


def layout_name(config: PreTrainedConfig, local: LocalAttention, rope: object = None) -> str:
    """The layout in the short notation, followed by a change of the rope: `GLLL:512+4 yarn:8, full decode`.

    A config that names its position embedding adds it: `GLLL:512 alibi`.
    """
    parts = filter(None, (layout(config, local.sinks), getattr(config, "position_embedding", None), rope))
    return " ".join(map(str, parts)) + (", full decode" if local.full_decode else "")


def warn_settings_outside_config(local: LocalAttention) -> None:
    """Warn, before a checkpoint is written, about settings that plain transformers will not read."""
    if local:
        _log.warning(
            "config.json has no field for %s, so zebra.json stores the setting. zebra.load reads it; plain "
            "transformers and vLLM run the checkpoint without.",
            local,
        )
