"""Checkpoints as models: loaded with attention "zebra" and the bounded cache, converted to stripes."""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel

from zebra.model.attention import NAME
from zebra.model.checkpoint import (
    check_weights,
    copy_companions,
    first_line,
    link,
    read_config,
    read_config_and_rest,
    write_card,
    write_config,
)
from zebra.model.extend import bounded_cache, extend, resolved, setting_of
from zebra.model.families import host_class, striped
from zebra.model.rope import Rope, as_rope, changes_with_length, refuse_changing_rope, whole_texts_only
from zebra.positions import SelfExtend
from zebra.refusal import Refusal
from zebra.staged import refuse_existing, staged
from zebra.stripes import Stripes

_log = logging.getLogger(__name__)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def best_device() -> str:
    """A GPU where there is one: this process's own, under a launcher."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def read_device(name: str | None) -> str:
    """A device of this machine by its name, the best one where None.

    Raises:
        Refusal: no such device here.
    """
    if name is None:
        return best_device()
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise Refusal(
            f"there is no device {name!r} here: {first_line(error)}. `zebra doctor` lists those that are."
        ) from None
    return str(device)


def read_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A floating-point dtype by its name.

    Raises:
        Refusal: another name.
    """
    known = {str(kind).removeprefix("torch."): kind for kind in DTYPES}
    found = known.get(dtype) if isinstance(dtype, str) else dtype if dtype in DTYPES else None
    if found is None:
        raise Refusal(f"a dtype is one of {', '.join(known)}; got {str(dtype)!r}. Choose one.")
    return found


def device_name(device: torch.device | str) -> str:
    """The device as rows name it."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"


@functools.cache
def _with_striped_cache(cls: Any) -> Any:
    """The host's class, whose `generate` makes our bounded cache where the caller names none.

    Two more say before they act what would else be lost in silence: Self-Extend.
    """

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The host's `generate`, with the bounded cache of `zebra.model.cache` as its default."""
        named = kwargs.get("generation_config") or (args[1] if len(args) > 1 and args[1] else self.generation_config)
        wants_own = (
            kwargs.get("past_key_values") is None
            and kwargs.get("use_cache", named.use_cache) is not False
            and kwargs.get("cache_implementation", named.cache_implementation) is None
        )
        if wants_own:
            kwargs["past_key_values"] = bounded_cache(self)
            if named.is_assistant:  # the draft of assisted decoding takes tokens back
                kwargs["past_key_values"].activate_past_recording()
        return cls.generate(self, *args, **kwargs)

    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The host's `save_pretrained`."""
        if (setting := setting_of(self)) is not None:
            _log.warning("config.json cannot say Self-Extend: load what is saved with self_extend=%r.", str(setting))
        return cls.save_pretrained(self, *args, **kwargs)

    def set_attn_implementation(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The host's `set_attn_implementation`."""
        if (setting := setting_of(self)) is not None:
            _log.warning('Self-Extend %s lives in attention "%s" and is dropped under any other.', setting, NAME)
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


def _blank(cls: Any) -> Any:
    made = _with_striped_cache(cls)
    return made.__new__(made)


_TAKEN = {
    "attn_implementation": f'it runs attention "{NAME}"; for another use from_pretrained of transformers',
    "config": "it reads and stripes the checkpoint's own; give stripes, and fields of the config by name",
    "output_loading_info": "it reads that itself and refuses a checkpoint that lacks tensors",
}


def load(
    path: str | os.PathLike[str],
    *,
    stripes: Stripes | str | None = None,
    rope: Rope | str | None = None,
    self_extend: SelfExtend | str | None = None,
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
        self_extend: Self-Extend in the global layers, or its notation such as "8:1024" or "auto:16384". A family
            without a route is served too, without stripes, if its rope can be turned again, which is tried here.
            Neither config.json nor a saved checkpoint can say it, and `set_attn_implementation` would drop it.
        from_pretrained_arguments: as `from_pretrained` has them: dtype, device_map, revision, subfolder, ..., and
            fields of the config by name.

    Raises:
        Refusal: no or a corrupt checkpoint, a family without a route, a layout or a rope that does not fit the model,
            an argument that loading takes itself; under Self-Extend what `zebra.model.extend` refuses.
    """
    for name, why in _TAKEN.items():
        if name in from_pretrained_arguments:
            raise Refusal(f"zebra.load takes no {name}: {why}.")
    routed = self_extend is None or stripes is not None
    config, rest = read_config_and_rest(path, routed=routed, **from_pretrained_arguments)
    if stripes is not None:
        config = striped(config, Stripes.parse(stripes) if isinstance(stripes, str) else stripes)
    config = as_rope(rope).changed(config)
    setting = None if self_extend is None else resolved(self_extend, config)
    if Path(path).exists() and "variant" not in rest:
        check_weights(Path(path) / rest.get("subfolder", ""), config)
    model = _loaded(path, config, rest)
    if changes_with_length(config):
        model.register_forward_pre_hook(whole_texts_only, with_kwargs=True)
    if setting is not None:
        extend(model, setting)
    return model


def _loaded(path: str | os.PathLike[str], config: PreTrainedConfig, rest: dict[str, Any]) -> PreTrainedModel:
    host: Any = host_class(config)
    try:
        model, info = _with_striped_cache(host).from_pretrained(
            path, config=config, attn_implementation=NAME, output_loading_info=True, **rest
        )
    except (OSError, SafetensorError) as error:
        raise Refusal(f"the checkpoint {path} cannot be loaded: {first_line(error)}") from None
    except KeyError as error:
        if error.args != (NAME,):
            raise
        raise Refusal(
            f"the attention of a {config.model_type} is not one of transformers' registered functions, so Self-Extend "
            "cannot reach it."
        ) from None
    if info["missing_keys"]:
        raise Refusal(f"{path}: the weights lack {', '.join(sorted(info['missing_keys']))}. Config and weights differ.")
    return model


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
    made = as_rope(rope).changed(striped(config, stripes))
    refuse_changing_rope(made)
    check_target(source, target)
    write_linked(source, target, made, rope=str(as_rope(rope)))
    return target


def check_target(source: Path, target: Path) -> None:
    """Refuse a target that a conversion could not write, before work that goes ahead of it.

    Raises:
        Refusal: it exists, or is the source.
    """
    if target.exists() and source.exists() and source.samefile(target):
        raise Refusal(f"source and target are the same directory, {source}. Name another target.")
    refuse_existing(Path(os.path.abspath(target)))


def write_linked(source: Path, target: Path, config: PreTrainedConfig, **more: Any) -> None:
    """Write a checkpoint that shares its source's weight files and has another config, whole or not at all.

    Args:
        more: what its zebra.json says besides.
    """
    weights = check_weights(source, config)
    with staged(target) as aside:
        for file in weights:
            link(file, aside / file.name)
        copy_companions(source, aside, weights)
        write_config(config, aside)
        write_card(aside, config, source=source, **more)
