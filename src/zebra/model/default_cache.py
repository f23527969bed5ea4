"""A transformers model class whose `generate` uses zebra's cache by default: the class that `zebra.load` returns."""

from __future__ import annotations

import functools
import inspect
import logging
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from zebra.errors import ZebraError
from zebra.model.attention import NAME
from zebra.model.cache import StripedCache
from zebra.model.checkpoint import update_zebra_json
from zebra.model.local import local_attention_of, warn_settings_outside_config
from zebra.model.self_extend import bounded_cache, self_extend_of
from zebra.progress import only_errors

_log = logging.getLogger(__name__)
LENGTH_REMINDER = "transformers.generation.stopping_criteria"
"""The logger that warns about `max_position_embeddings`."""


@functools.cache
def with_default_cache(cls: Any) -> Any:
    """A subclass of the same name whose `generate` uses zebra's bounded cache where the caller passes none.

    Two more of its methods warn before Self-Extend, sinks and full decoding would be lost.
    """

    class Model(cls):
        __doc__, __module__, __qualname__ = cls.__doc__, cls.__module__, cls.__qualname__

        def generate(self, *args: Any, **kwargs: Any) -> Any:
            """transformers' `generate`, with the bounded cache of `zebra.model.cache` as its default.

            Under Self-Extend, transformers' warning about the trained length is off: zebra's names the reach.
            """
            extended = self_extend_of(self) is not None
            with only_errors(LENGTH_REMINDER) if extended else nullcontext():
                return super().generate(*args, **kwargs | _cache_kwargs(self, args, kwargs))

        def save_pretrained(
            self, save_directory: str | os.PathLike[str], *args: Any, push_to_hub: bool = False, **kwargs: Any
        ) -> None:
            """transformers' `save_pretrained`, then zebra.json, and only then the upload of `push_to_hub`."""
            local = local_attention_of(self)
            if (setting := self_extend_of(self)) is not None:
                _log.warning(
                    "config.json has no field for Self-Extend: load the checkpoint with self_extend=%r.", str(setting)
                )
            warn_settings_outside_config(local)
            of_hub = inspect.signature(cls.push_to_hub).parameters
            super().save_pretrained(save_directory, *args, **kwargs)
            if kwargs.get("is_main_process", True):
                update_zebra_json(Path(save_directory), self.config, local)
                if push_to_hub:
                    for_hub = {name: value for name, value in kwargs.items() if name in of_hub}
                    self.push_to_hub(**{"repo_id": Path(save_directory).name} | for_hub)

        def set_attn_implementation(self, *args: Any, **kwargs: Any) -> Any:
            """transformers' `set_attn_implementation`, with a warning about settings that are lost."""
            if (setting := self_extend_of(self)) is not None:
                _log.warning('Self-Extend %s requires attention "%s" and is lost with any other.', setting, NAME)
            if (local := local_attention_of(self)) and [*args, *kwargs.values()][:1] != [NAME]:
                _log.warning('%s of local layers require attention "%s" and are lost with any other.', local, NAME)
            return super().set_attn_implementation(*args, **kwargs)

        def __reduce__(self) -> Any:
            """Pickle by the class of transformers: pickle cannot find this one by its name."""
            return _empty_instance, (cls,), self.__dict__

    Model.__name__ = cls.__name__  # it is saved as the checkpoint's architecture
    return Model


def _empty_instance(cls: Any) -> Any:
    subclass = with_default_cache(cls)
    return subclass.__new__(subclass)


def _cache_kwargs(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The cache for a call of `generate`, zebra's where the caller passes none, with the length of the prompt."""
    config = kwargs.get("generation_config") or (args[1] if len(args) > 1 and args[1] else model.generation_config)

    def setting(name: str) -> Any:  # the model's where the config has none
        value = kwargs.get(name, getattr(config, name))
        return getattr(model.generation_config, name) if value is None and name not in kwargs else value

    cache, uses_cache = kwargs.get("past_key_values"), setting("use_cache") is not False
    # "hybrid" in Gemma's generation_config.json is the default of an older transformers, and counts as none here.
    if cache is None and uses_cache and setting("cache_implementation") in (None, "hybrid"):
        cache = bounded_cache(model) if model.config._attn_implementation == NAME else StripedCache(model.config)
        if config.is_assistant:  # the draft of assisted decoding takes tokens back
            cache.activate_past_recording()
    if not isinstance(cache, StripedCache):
        local = local_attention_of(model)
        if local and model.config._attn_implementation == NAME and (uses_cache or local.full_decode):
            raise ZebraError(
                f"this model has {local} in its local layers and so requires the cache that generate creates; got "
                f"{'another cache' if uses_cache else 'use_cache=False'}. Leave that out, or load without {local}."
            )
        return {}
    prompts = [*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))]
    cache.set_prompt_length(max((prompt.shape[1] for prompt in prompts if prompt is not None), default=1))
    return {"past_key_values": cache}
