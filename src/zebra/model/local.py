r"""What the local layers of a loaded model do besides looking at their window, for models that were not trained for it.

    sinks         x . . . . . x x x      the first real tokens of a text are seen too (arXiv 2309.17453)
    full decode   x x x x x x x x x      the prompt is read by the window, decoded tokens see all before them

Neither has a word in config.json: they hang on the attention modules, and `zebra.json` beside a checkpoint keeps them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from zebra.errors import ZebraError
from zebra.kernels import Mask, attend
from zebra.kernels.sinks import sink_attention
from zebra.model.cache import SinkKeys
from zebra.model.families import FULL, layout, stripes_of
from zebra.model.override import overrides_of, set_override
from zebra.stripes import LOCAL

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LocalAttention:
    """What a local layer does; `zebra.model.attention` calls it in place of `attend`.

    Attributes:
        sinks: first real tokens of each row, or of each packed document, that are seen besides the window.
        full_decode: whether decoded tokens see all before them. Which tokens are decoded the cache is told
            (`StripedCache.reads`, by `generate`); where nobody said, those that come alone behind others.
    """

    sinks: int = 0
    full_decode: bool = False

    def __bool__(self) -> bool:
        return bool(self.sinks or self.full_decode)

    def __str__(self) -> str:
        told = [f"{self.sinks} sink{'s' * (self.sinks > 1)}"] if self.sinks else []
        return " and ".join([*told, "full decoding"] if self.full_decode else told)

    def attend(
        self,
        module: nn.Module,
        positions: Tensor | None,
        query: Tensor,
        key: Tensor | SinkKeys,
        value: Tensor,
        mask: Mask,
        /,
        **arguments: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """`attend` under the layer's window, with sinks for tokens that are read and all keys for decoded ones.

        Raises:
            ZebraError: keys from another cache, which has let go of those that are wanted.
        """
        new, start, kept, read = query.shape[2], 0, None, query.shape[2]
        if isinstance(key, SinkKeys):
            start, kept = key.start, key.sinks(None if mask.keys is None else mask.keys[:, -new:])
            read = self._read(key, new) if self.full_decode else new
            key = key.states
        else:
            self._check_past(mask, value.shape[2] - new)
        sunken = replace(mask, sinks=self.sinks)
        if read == new:
            return sink_attention(query, key, value, sunken, cached=kept, start=start, **arguments)
        decoded = attend(query[:, :, read:], key, value, mask.without_window(), **arguments)
        if read == 0:
            return decoded
        end = value.shape[2] - new + read
        out, lse = sink_attention(
            query[:, :, :read], key[:, :, :end], value[:, :, :end], sunken.before(end), **arguments
        )
        both = None if lse is None or decoded[1] is None else torch.cat([lse, decoded[1]], dim=2)
        return torch.cat([out, decoded[0]], dim=2), both

    def _read(self, held: SinkKeys, new: int) -> int:
        """How many of the new tokens are read, and not decoded."""
        past = held.start + held.states.shape[2] - new
        if held.prompt is None:
            return 0 if new == 1 and past > 0 else new
        return min(max(held.prompt - past, 0), new)

    def _check_past(self, mask: Mask, past: int) -> None:
        if past > 0 and mask.window is not None and (self.full_decode or past >= mask.window - 1):
            raise ZebraError(
                f"this model has {self} in its local layers, which keep them in the cache of zebra.load alone; got "
                "another cache with tokens in it. Leave cache_implementation out, or pass "
                "zebra.model.self_extend.bounded_cache(model)."
            )


def set_local_attention(model: PreTrainedModel, local: LocalAttention) -> None:
    """Hang it on the local layers of a loaded model.

    Raises:
        ZebraError: there are none; sinks under ALiBi.
    """
    if local.sinks and getattr(model.config, "position_embedding", None) == "alibi":
        raise ZebraError(f"{local} stand far away, and ALiBi lowers the scores of what is far away. Leave them out.")
    stripes = stripes_of(model.config)
    if stripes is None:
        raise ZebraError(
            f"{local} belong to local layers, and this layout is {FULL}. Give stripes, such as GLLL:512+4."
        )
    kinds = stripes.layer_types(model.config.num_hidden_layers)
    for module in _attention_modules(model):
        if kinds[module.layer_idx] == LOCAL:
            set_override(module, local)


def _attention_modules(model: nn.Module) -> Iterator[Any]:
    """What the host's attention functions are called with: all have a layer's number and the scale of its scores."""
    return (m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "scaling"))


def local_attention_of(model: nn.Module) -> LocalAttention:
    """What a model's local layers were loaded with."""
    return next(
        (override for override in overrides_of(model) if isinstance(override, LocalAttention)), LocalAttention()
    )


def layout_name(config: PreTrainedConfig, local: LocalAttention, rope: object = None) -> str:
    """The layout in the short notation, with a change of rope beside it: `GLLL:512+4 yarn:8, full decode`.

    A model of the study has its position embedding there: `GLLL:512 alibi`.
    """
    said = filter(None, (layout(config, local.sinks), getattr(config, "position_embedding", None), rope))
    return " ".join(map(str, said)) + (", full decode" if local.full_decode else "")


def warn_settings_outside_config(local: LocalAttention) -> None:
    """Say, before a checkpoint is written, what plain transformers will not know of it."""
    if local:
        _log.warning(
            "config.json cannot say %s: zebra.json beside it does, which zebra.load reads; plain transformers and "
            "vLLM run the checkpoint without.",
            local,
        )
