"""Checkpoints as models: loaded with attention "zebra" and the bounded cache, converted to stripes."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from zebra.model.attention import NAME
from zebra.model.cache import StripedCache
from zebra.model.checkpoint import (
    check_weights,
    copy_companions,
    first_line,
    link,
    read_config,
    write_card,
    write_config,
)
from zebra.model.families import host_class, striped
from zebra.model.rope import Rope, changes_with_length, refuse_changing_rope, whole_texts_only
from zebra.refusal import Refusal
from zebra.staged import staged
from zebra.stripes import Stripes


def best_device() -> str:
    """A GPU where there is one: this process's own, under a launcher."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def device_name(device: torch.device | str) -> str:
    """The device as rows name it."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"


@functools.cache
def _with_striped_cache(cls: Any) -> Any:
    """The host's class, whose `generate` makes our bounded cache where the caller names none."""

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The host's `generate`, with the bounded cache of `zebra.model.cache` as its default."""
        named = kwargs.get("generation_config") or (args[1] if len(args) > 1 and args[1] else self.generation_config)
        wants_own = (
            kwargs.get("past_key_values") is None
            and kwargs.get("use_cache", named.use_cache) is not False
            and kwargs.get("cache_implementation", named.cache_implementation) is None
        )
        if wants_own:
            kwargs["past_key_values"] = StripedCache(self.config)
        return cls.generate(self, *args, **kwargs)

    # The name stays the host's: it is saved as the checkpoint's architecture.
    made = type(
        cls.__name__,
        (cls,),
        {"generate": generate, "__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__},
    )
    return made


def load(
    path: str | os.PathLike[str],
    *,
    stripes: Stripes | str | None = None,
    rope: Rope | str | None = None,
    self_extend: Any = None,
    **from_pretrained_arguments: Any,
) -> PreTrainedModel:
    """A checkpoint as a transformers model that runs attention "zebra", with stripes where asked.

    It is the host's own class: it trains, saves, generates and evaluates like any other. `generate` uses the bounded
    cache. Do not call `set_attn_implementation` on it: the host would then compute local layers densely.

    Args:
        path: a directory that transformers saved, or a name in the hub.
        stripes: a layout, or its notation such as "GLLL:512"; None keeps what the checkpoint has.
        rope: a change of the rope, or its notation such as "yarn:8"; see `zebra.model.rope`. A model whose rope changes
            with length (dynamic NTK) reads whole texts only: it refuses a cache.
        self_extend: reserved for Self-Extend, which this version does not have: must be None.
        from_pretrained_arguments: handed to `from_pretrained` (dtype, device_map, ...).

    Raises:
        Refusal: no or a corrupt checkpoint, a family without a route, a layout or a rope that does not fit the model.
    """
    if self_extend is not None:
        raise Refusal("Self-Extend is not in this version of zebra; self_extend must be None. Use stripes alone.")
    if "attn_implementation" in from_pretrained_arguments:
        raise Refusal(
            f'zebra.load runs attention "{NAME}"; for another attn_implementation use from_pretrained of transformers.'
        )
    config = read_config(path)
    if stripes is not None:
        config = striped(config, Stripes.parse(stripes) if isinstance(stripes, str) else stripes)
    config = _as_rope(rope).changed(config)
    if Path(path).exists():
        check_weights(path, config)
    host: Any = host_class(config)
    try:
        model, info = _with_striped_cache(host).from_pretrained(
            path, config=config, attn_implementation=NAME, output_loading_info=True, **from_pretrained_arguments
        )
    except (OSError, SafetensorError) as error:
        raise Refusal(f"the checkpoint {path} cannot be loaded: {first_line(error)}") from None
    if info["missing_keys"]:
        raise Refusal(f"{path}: the weights lack {', '.join(sorted(info['missing_keys']))}. Config and weights differ.")
    if changes_with_length(config):
        model.register_forward_pre_hook(whole_texts_only, with_kwargs=True)
    return model


def _as_rope(rope: Rope | str | None) -> Rope:
    return rope if isinstance(rope, Rope) else Rope.parse(rope or "none")


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    stripes: Stripes | str,
    *,
    rope: Rope | str | None = None,
) -> Path:
    """A copy of a checkpoint with stripes, which plain transformers loads: only its config.json differs.

    Weight files are hard links where the file system allows, copies elsewhere; never rewritten. `zebra.json` beside
    them keeps layout, source and versions. The target appears whole or not at all.

    Raises:
        Refusal: what `load` refuses, a rope that changes with length, a target that exists or is the source.
    """
    source, target = Path(source), Path(target)
    stripes = Stripes.parse(stripes) if isinstance(stripes, str) else stripes
    config = read_config(source)
    made = _as_rope(rope).changed(striped(config, stripes))
    refuse_changing_rope(made)
    weights = check_weights(source, config)
    if target.exists() and source.samefile(target):
        raise Refusal(f"source and target are the same directory, {source}. Name another target.")
    with staged(target) as aside:
        for file in weights:
            link(file, aside / file.name)
        copy_companions(source, aside, weights)
        write_config(made, aside)
        write_card(aside, made, source=source, rope=str(_as_rope(rope)))
    return target
