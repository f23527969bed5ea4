"""Load a checkpoint with attention "zebra" and the bounded cache, or convert it to stripes."""

from __future__ import annotations

import inspect
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel

from zebra.engines import warning
from zebra.errors import ZebraError, check_names, first_line
from zebra.files import atomic_directory
from zebra.model.attention import NAME
from zebra.model.checkpoint import (
    own_fields,
    read_config,
    read_local_attention,
    write_config,
    write_zebra_json,
)
from zebra.model.checkpoint_files import check_conversion, check_dtype
from zebra.model.default_cache import with_default_cache
from zebra.model.families import FULL, layout, model_class, stripes_of, with_stripes
from zebra.model.gguf import as_directory
from zebra.model.local import LocalAttention, check_sinks, set_local_attention, warn_settings_outside_config
from zebra.model.quantization import (
    LOADING_ERRORS,
    cannot_load,
    check_quantization,
    quantization_of,
    set_dequantised_dtype,
)
from zebra.model.rope import Rope, as_rope, changes_with_length, check_fixed_rope, length_dependent_rope_hook
from zebra.model.self_extend import resolve_self_extend, set_self_extend
from zebra.model.weights import check_weights, copy_other_files, share_files
from zebra.positions import SelfExtend
from zebra.provenance import processor
from zebra.stripes import Stripes

_log = logging.getLogger(__name__)


def best_device() -> str:
    """The GPU of this process (a launcher sets LOCAL_RANK) if there is one, else the CPU."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def device_memory(device: str) -> int | None:
    """The total memory of a device in bytes; None where the system does not tell."""
    if device.startswith("cuda"):
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def read_device(name: str | None) -> str:
    """Check that this machine has a device, and return its name; the best device where None.

    Raises:
        ZebraError: no such device here.
    """
    if name is None:
        return best_device()
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()  # "meta" has no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ZebraError(
            f"device {name!r} is not available: {first_line(error)}. Run `zebra doctor` to list devices."
        ) from None
    return str(device)


def read_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A floating-point dtype by its name, such as "bfloat16".

    Raises:
        ZebraError: any other name.
    """
    name = str(dtype).removeprefix("torch.")
    check_dtype(name)
    return getattr(torch, name)


def device_name(device: torch.device | str) -> str:
    """The name of a device in results; a processor's ends in the number of threads that torch uses."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{processor()}, {threads} thread{'s' * (threads != 1)}"


_REJECTED = {
    "attn_implementation": f'it uses attention "{NAME}"; for another, use from_pretrained of transformers',
    "config": "it reads and changes that of the checkpoint; pass stripes, and fields of the config by name",
    "output_loading_info": "it checks that itself and rejects a checkpoint with missing tensors; leave it out",
    "trust_remote_code": "it runs only model classes of transformers, never code of a checkpoint; leave it out",
}


def load(
    path: str | os.PathLike[str],
    *,
    stripes: Stripes | str | None = None,
    rope: Rope | str | None = None,
    self_extend: SelfExtend | str | None = None,
    window: int | None = None,
    full_decode: bool | None = None,
    **from_pretrained_arguments: Any,
) -> PreTrainedModel:
    """Load a checkpoint as a transformers model with attention "zebra", and with stripes where given.

    Its class is a stock class of transformers, with the bounded cache as the default of `generate`: the model trains,
    saves, generates and evaluates like any other. Do not call `set_attn_implementation` on it: transformers would then
    compute local layers at full cost, and sinks, full decoding and Self-Extend would be lost.

    Args:
        path: a directory that transformers saved, a GGUF file, or the name of a model on the hub, OWNER/NAME.
        stripes: a layout, or its notation such as "GLLL:512", or "GLLL:512+4" with sinks. None keeps the checkpoint's
            layout, and the sinks in its zebra.json.
        rope: a change of the rope, or its notation such as "yarn:8"; see `zebra.model.rope`. A model whose rope changes
            with length (dynamic NTK) reads whole texts only, without a cache.
        self_extend: Self-Extend in the global layers, or its notation such as "8:1024" or "auto:16384". A family
            without a route can have it too, without stripes, if its rope can be rotated again, which is tested here.
            config.json has no field for it: a saved checkpoint is without it, and `set_attn_implementation` drops it.
        window: a window for the local layers in place of the layout's, commonly a larger one.
        full_decode: local layers read the prompt with their window but keep all keys, and decoded tokens see all of
            them. Cache and decoding then cost as much as full attention. None takes the checkpoint's zebra.json.
        from_pretrained_arguments: arguments of `from_pretrained`: dtype, device_map, revision, subfolder, ..., and
            fields of the config by name.

    Raises:
        ZebraError: no checkpoint, or a corrupt one; quantised weights that transformers cannot load here; a family
            without a route; a layout or a rope that does not fit the model; a window or full decoding without local
            layers; an argument that `load` sets itself; with Self-Extend as `resolve_self_extend` and
            `set_self_extend`.
    """
    for name, why in _REJECTED.items():
        if from_pretrained_arguments.get(name, False) is not False:
            raise ZebraError(f"zebra.load does not accept {name}: {why}.")
    if not isinstance(full_decode, bool | None):
        raise ZebraError(f"full_decode must be True, False or None; got {full_decode!r}. Choose one.")
    if isinstance(dtype := from_pretrained_arguments.get("dtype"), str | torch.dtype) and dtype != "auto":
        read_dtype(dtype)
    routed = self_extend is None or stripes is not None or window is not None
    config = read_config(path, routed=routed, **from_pretrained_arguments)
    ours = {*own_fields(config), *_REJECTED}
    rest = {name: value for name, value in from_pretrained_arguments.items() if name not in ours}
    config, local = _layout(
        config, read_local_attention(path, **from_pretrained_arguments), stripes, window, full_decode
    )
    config = as_rope(rope).apply(config)
    setting = None if self_extend is None else resolve_self_extend(self_extend, config)
    path = as_directory(path, **from_pretrained_arguments)
    check_quantization(path, config)
    if "variant" not in rest:
        check_weights(path / rest.get("subfolder", ""), config)
    model = _loaded(path, config, rest)
    if changes_with_length(config):
        model.register_forward_pre_hook(length_dependent_rope_hook, with_kwargs=True)
    if local:
        set_local_attention(model, local)
    if setting is not None:
        set_self_extend(model, setting)
        if local.full_decode:
            _log.warning(
                "with full decoding, local layers see all keys at their exact distances, also with Self-Extend: beyond "
                "the trained length these are new to the model. Leave out full_decode for such texts."
            )
    return model


def _layout(
    config: PreTrainedConfig,
    local: LocalAttention,
    stripes: Stripes | str | None,
    window: int | None,
    full_decode: bool | None,
) -> tuple[PreTrainedConfig, LocalAttention]:
    """The config with the chosen layout, and the attention of its local layers; `local` is the checkpoint's own."""
    if stripes is not None:
        stripes = stripes if isinstance(stripes, Stripes) else Stripes.parse(stripes)
        config, local = with_stripes(config, stripes), replace(local, sinks=stripes.sinks)
    if window is not None:
        current = stripes_of(config)
        if current is None:
            raise ZebraError(
                f"a window of {window} requires local layers, but this layout is {FULL}. Give stripes, such as "
                f"GLLL:{window}."
            )
        config = with_stripes(config, replace(current, window=window))
    if full_decode is not None:
        local = replace(local, full_decode=full_decode)
    explicit = full_decode or (stripes is not None and stripes.sinks)
    return config, local if explicit or stripes_of(config) is not None else LocalAttention()


def _loaded(path: str | os.PathLike[str], config: PreTrainedConfig, rest: dict[str, Any]) -> PreTrainedModel:
    stock_class: Any = model_class(config)
    method = quantization_of(config)
    try:
        model, info = with_default_cache(stock_class).from_pretrained(
            path, config=config, attn_implementation=NAME, output_loading_info=True, **rest
        )
    except (OSError, SafetensorError) as error:
        raise ZebraError(f"the checkpoint {path} cannot be loaded: {first_line(error)}") from None
    except LOADING_ERRORS as error:
        if unknown := re.search(r"unexpected keyword argument '(\w+)'", str(error)):
            check_names([unknown[1]], [*inspect.signature(load).parameters, "dtype", "device_map", "revision"])
        if method is not None:
            raise cannot_load(path, method, first_line(error)) from None
        if not isinstance(error, KeyError) or error.args != (NAME,):
            raise
        raise ZebraError(
            f"Self-Extend requires a model that uses transformers' registered attention functions; a "
            f"{config.model_type} does not. Load it without Self-Extend."
        ) from None
    if info["missing_keys"]:
        raise ZebraError(
            f"{path}: the weights lack {', '.join(sorted(info['missing_keys']))}. Its config and weights do not match."
        )
    if method is not None:
        dtype = rest.get("dtype", "auto")
        set_dequantised_dtype(model, model.dtype if dtype in ("auto", None) else read_dtype(dtype))
    return model


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    stripes: Stripes | str | None = None,
    *,
    rope: Rope | str | None = None,
    full_decode: bool = False,
) -> Path:
    """Write a copy of a checkpoint with stripes, which plain transformers loads: only its config.json differs.

    Without stripes the layout stays, and the rope changes or a GGUF file becomes a checkpoint of transformers.

    Weight files are hard links where the file system allows it, else copies; they are never rewritten. `zebra.json`
    has the layout, the source, the versions, and what config.json has no field for: sinks and full decoding. A warning
    says that only `zebra.load` reads these. The target is written atomically, and its path returned.

    Raises:
        ZebraError: as `check_conversion` and `converted_config`; weights that `load` rejects.
    """
    check_conversion(source, Path(target), stripes, rope)
    source, target = Path(source), Path(target)
    config, local = converted_config(source, stripes, rope, full_decode)
    warn_settings_outside_config(local)
    if stripes_of(config) is not None and (text := warning(config.model_type)):
        _log.warning("%s", text)
    write_converted(source, target, config, local, rope=str(as_rope(rope)))
    return target


def converted_config(
    source: Path, stripes: Stripes | str | None, rope: Rope | str | None = None, full_decode: bool = False
) -> tuple[PreTrainedConfig, LocalAttention]:
    """The config that `convert` writes for a checkpoint, and the attention of its local layers.

    Raises:
        ZebraError: as `load`; a rope that changes with length; sinks or full decoding without local layers; sinks under
            ALiBi.
    """
    config, own = read_config(source, routed=stripes is not None), read_local_attention(source)
    own = own if stripes is None else LocalAttention()
    config, local = _layout(config, own, stripes, None, full_decode or None)
    config = as_rope(rope).apply(config)
    check_fixed_rope(config, "converting")
    check_sinks(config, local)
    if local and stripes_of(config) is None:
        raise ZebraError(f"only local layers support {local}; the layout {layout(config)} has none. Leave them out.")
    return config, local


def write_converted(source: Path, target: Path, config: PreTrainedConfig, local: LocalAttention, **more: Any) -> None:
    """Write, atomically, a checkpoint that shares its source's weight files and has another config.

    Args:
        local, more: for zebra.json.
    """
    with converted_folder(source, target, config, local, **more):
        pass


@contextmanager
def converted_folder(
    source: Path, target: Path, config: PreTrainedConfig, local: LocalAttention, **more: Any
) -> Iterator[Path]:
    """Yield the temporary directory that `write_converted` fills, before it is renamed to the target."""
    weights, files = check_weights(source, config), as_directory(source)
    with atomic_directory(target) as aside:
        share_files(files, aside, weights)
        copy_other_files(files, aside, weights)
        write_config(config, aside)
        write_zebra_json(aside, config, local, source=source, **more)
        yield aside
