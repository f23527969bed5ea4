"""The host's class with our cache: what `zebra.load` returns, under the host's own name."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from zebra.errors import ZebraError
from zebra.model.attention import NAME
from zebra.model.cache import StripedCache
from zebra.model.checkpoint import update_zebra_json
from zebra.model.local import local_attention_of, warn_settings_outside_config
from zebra.model.self_extend import bounded_cache, self_extend_of

_log = logging.getLogger(__name__)


@functools.cache
def with_default_cache(cls: Any) -> Any:
    """The host's class, whose `generate` makes our bounded cache where the caller names none.

    Two more say before they act what would else be lost in silence: Self-Extend, sinks and full decoding.
    """

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The host's `generate`, with the bounded cache of `zebra.model.cache` as its default."""
        return cls.generate(self, *args, **kwargs | _cached(self, args, kwargs))

    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The host's `save_pretrained`."""
        if (setting := self_extend_of(self)) is not None:
            _log.warning("config.json cannot say Self-Extend: load what is saved with self_extend=%r.", str(setting))
        warn_settings_outside_config(local_attention_of(self))
        found = cls.save_pretrained(self, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            update_zebra_json(
                Path(args[0] if args else kwargs["save_directory"]), self.config, local_attention_of(self)
            )
        return found

    def set_attn_implementation(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The host's `set_attn_implementation`."""
        if (setting := self_extend_of(self)) is not None:
            _log.warning('Self-Extend %s lives in attention "%s" and is dropped under any other.', setting, NAME)
        if (local := local_attention_of(self)) and [*args, *kwargs.values()][:1] != [NAME]:
            _log.warning('%s of local layers live in attention "%s" and are lost under any other.', local, NAME)
        return cls.set_attn_implementation(self, *args, **kwargs)

    def reduce(self: Any) -> Any:
        """Pickled as the host's class and made anew from it: this class has no name that pickle could find."""
        return _blank, (cls,), self.__dict__

    # The name stays the host's: it is saved as the checkpoint's architecture.
    own = {
        "generate": generate,
        "save_pretrained": save_pretrained,
        "set_attn_implementation": set_attn_implementation,
        "__reduce__": reduce,
    }
    return type(cls.__name__, (cls,), own | {name: getattr(cls, name) for name in _SAME})


_SAME = ("__module__", "__qualname__", "__doc__")


def _cached(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The cache for a call of `generate`: ours where the caller names none, told where the prompt ends."""
    named = kwargs.get("generation_config") or (args[1] if len(args) > 1 and args[1] else model.generation_config)
    cache, uses = kwargs.get("past_key_values"), kwargs.get("use_cache", named.use_cache) is not False
    if cache is None and uses and kwargs.get("cache_implementation", named.cache_implementation) is None:
        cache = bounded_cache(model) if model.config._attn_implementation == NAME else StripedCache(model.config)
        if named.is_assistant:  # the draft of assisted decoding takes tokens back
            cache.activate_past_recording()
    if not isinstance(cache, StripedCache):
        _refuse_without_cache(model, uses_cache=uses)
        return {}
    cache.set_prompt_length(_prompt_tokens(args, kwargs))
    return {"past_key_values": cache}


def _prompt_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Tokens of each row that `generate` is given."""
    given = [*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))]
    return max((states.shape[1] for states in given if states is not None), default=1)


def _refuse_without_cache(model: PreTrainedModel, *, uses_cache: bool) -> None:
    local = local_attention_of(model)
    if local and model.config._attn_implementation == NAME and (uses_cache or local.full_decode):
        raise ZebraError(
            f"this model has {local} in its local layers, which rest on the cache that its generate makes; got "
            f"{'another cache' if uses_cache else 'use_cache=False'}. Leave that out, or load without them."
        )


def _blank(cls: Any) -> Any:
    made = with_default_cache(cls)
    return made.__new__(made)
