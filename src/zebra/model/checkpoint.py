"""A checkpoint's files: whole or rejected when they are read, whole or absent when they are written."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import cached_file

from zebra.errors import ZebraError, first_line
from zebra.files import atomic_write
from zebra.model.checkpoint_files import check_checkpoint, read_json_object
from zebra.model.families import ignores_layer_types, model_class, route_of, stripes_of
from zebra.model.local import LocalAttention, layout_name
from zebra.provenance import git_commit, versions


def read_config(path: str | os.PathLike[str], *, routed: bool = True, **kwargs: Any) -> PreTrainedConfig:
    """The config of a checkpoint on disk or in the hub's cache.

    Args:
        routed: whether the family needs a route, as it does for stripes; else its own class serves it as it is.
        kwargs: keyword arguments of `from_pretrained`, fields of the config among them.

    Raises:
        ZebraError: no checkpoint there, a broken config.json, a family without a route, or a config whose stripes its
            own class would ignore while its cache obeys them (`generate` would be silently wrong).
    """
    check_checkpoint(path, kwargs.get("subfolder", ""))
    hub = {name: kwargs[name] for name in _HUB if name in kwargs}
    try:
        config = AutoConfig.from_pretrained(path, **hub)
        changes = {name: kwargs[name] for name in own_fields(config) if name in kwargs}
        if changes:
            config = AutoConfig.from_pretrained(path, **hub, **changes)
    except (OSError, ValueError, TypeError, KeyError, StrictDataclassError) as error:
        text = " ".join(str(error).split()) if isinstance(error, StrictDataclassError) else first_line(error)
        raise ZebraError(f"the config of {path} cannot be read: {text}") from None
    if routed:
        route_of(config)
    elif type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ZebraError(f"{path} is a {config.model_type}, of which transformers has no causal language model.")
    if getattr(config, "layer_types", None) is not None and ignores_layer_types(config):
        raise ZebraError(
            f"{path} is a {config.model_type} with layer_types, which its class ignores while its cache obeys them. "
            "Remove layer_types from its config.json, then run `zebra convert`."
        )
    return config


_HUB = ("subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download")
"""Keyword arguments of `from_pretrained` that locate a file in the hub."""


def own_fields(config: PreTrainedConfig) -> set[str]:
    """The fields that a config's class has besides those of every config."""
    return {f.name for f in fields(type(config))} - {f.name for f in fields(PreTrainedConfig)}


def load_tokenizer(path: str | os.PathLike[str], config: PreTrainedConfig | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory.

    Args:
        config: of the model whose tokens it makes.

    Raises:
        ZebraError: there is none that can be read, or it makes ids that the model has no embedding for.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
        largest = max(tokenizer.get_vocab().values())
    except Exception as error:  # a broken tokenizer.json ends in a bare Exception of the tokenizers library
        raise ZebraError(f"the tokenizer of {path} cannot be read: {first_line(error)}") from None
    if config is not None and largest >= config.vocab_size:
        raise ZebraError(
            f"the tokenizer of {path} makes ids up to {largest}, but the model has {config.vocab_size} embeddings. "
            "Use the tokenizer that the model was trained with."
        )
    return tokenizer


_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16


def checkpoint_digest(path: str | os.PathLike[str]) -> str:
    """A hash that distinguishes checkpoints: of config.json, and of 64 evenly spread samples of each weight file."""
    directory = Path(path)
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for file in _weight_files(directory):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as opened:
            for i in range(_SAMPLES):
                opened.seek(size * i // _SAMPLES)
                digest.update(opened.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def check_weights(path: str | os.PathLike[str], config: PreTrainedConfig) -> list[Path]:
    """The weight files that transformers would load from a checkpoint on disk, after reading their headers.

    Raises:
        ZebraError: no weights, a missing, corrupt or truncated shard, tensors that are missing or of another shape than
            the config says.
    """
    files = _weight_files(Path(path))
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise ZebraError(f"{path} lacks the shards {', '.join(absent)} that its index names. Copy them there.")
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            shapes |= _shapes(file)
        except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise ZebraError(f"{file} is corrupt or truncated: {first_line(error)}. Copy it again.") from None
    _check_shapes(path, config, shapes)
    return files


def _weight_files(where: Path) -> list[Path]:
    """In transformers' order of preference; it reads no other index, such as one of the original format."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (where / single).is_file():
            return [where / single]
        index = where / f"{single}.index.json"
        if index.is_file():
            try:
                return [where / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
            except (ValueError, KeyError, AttributeError, TypeError):
                raise ZebraError(f"{index} is not an index of shards. Copy it from the source again.") from None
    raise ZebraError(f"{where} has no weights: neither model.safetensors nor an index of shards. Copy them there.")


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Each tensor's shape, without reading the tensor."""
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    mapped = zipfile.is_zipfile(file)  # torch's older format cannot be mapped
    tensors = torch.load(file, map_location="meta", weights_only=True, mmap=mapped)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


_ROTARY = r"rotary_emb\.inv_freq$"
"""A buffer that older versions saved."""


def _check_shapes(path: str | os.PathLike[str], config: PreTrainedConfig, shapes: dict[str, tuple[int, ...]]) -> None:
    try:
        with torch.device("meta"):
            model = model_class(config)(config)
    except (ValueError, TypeError, RuntimeError, ArithmeticError, IndexError) as error:
        raise ZebraError(f"the config of {path} describes no model: {first_line(error)}. Copy it again.") from None
    # Of two tied tensors either may be the one that was saved.
    tied = dict(model.all_tied_weights_keys) if config.tie_word_embeddings else {}
    tied |= {second: first for first, second in tied.items()}
    # Experts lie one by one in the files, and together in the model.
    expected = revert_weight_conversion(model, model.state_dict())
    ignored = "|".join([*(model._keys_to_ignore_on_load_unexpected or ()), _ROTARY])
    unused = [name for name in shapes if name not in expected and name not in tied and not re.search(ignored, name)]
    if unused:
        raise ZebraError(
            f"{path}: the weights have {unused[0]} and {len(unused) - 1} more tensors that config.json does not ask "
            "for, which would be dropped in silence. Config and weights are of different models."
        )
    for name, tensor in expected.items():
        if name in shapes and shapes[name] != tuple(tensor.shape):
            raise ZebraError(
                f"{path}: config.json asks for {name} of shape {tuple(tensor.shape)}, the weights have {shapes[name]}. "
                "Config and weights are of different models."
            )
        if name not in shapes and tied.get(name) not in shapes:
            raise ZebraError(
                f"{path}: the weights lack {name}, which config.json asks for. "
                "Config and weights are of different models, or a shard is gone."
            )


def copy_other_files(source: Path, target: Path, weights: Sequence[Path]) -> None:
    """Copy the files beside a checkpoint's weights: the tokenizer, the generation config, the index of shards.

    Weights in other formats are left out.
    """
    leave = {"config.json", "zebra.json", *(file.name for file in weights)}
    for file in sorted(source.iterdir()):
        if file.is_dir() and file.name == "additional_chat_templates":
            shutil.copytree(file, target / file.name)
        elif file.is_file() and file.name not in leave and file.suffix not in _WEIGHTS:
            shutil.copyfile(file, target / file.name)


_WEIGHTS = {".safetensors", ".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack", ".onnx"}


def link_or_copy(source: Path, target: Path) -> None:
    """Make a hard link where the file system allows one, a copy elsewhere."""
    real = source.resolve()  # the hub's cache holds symbolic links
    try:
        os.link(real, target)
    except OSError:
        shutil.copyfile(real, target)


def write_config(config: PreTrainedConfig, directory: Path) -> None:
    """Write config.json with every field of its class, defaults too: another version's defaults may differ."""
    whole = config.to_dict()
    values = config.to_diff_dict() | {name: whole[name] for name in own_fields(config) if name in whole}
    values.pop("_name_or_path", None)
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    (directory / "config.json").write_text(text, encoding="utf-8")


def write_zebra_json(
    directory: Path, config: PreTrainedConfig, local: LocalAttention, *, source: Path | None, **more: Any
) -> None:
    """Write zebra.json: the layout, with what config.json cannot express, its origin and the versions.

    Args:
        source: the checkpoint that it was made from; None for a model from scratch.
        more: further fields.
    """
    origin = {
        "source": source and str(source),
        "source_config_sha256": source and hashlib.sha256((source / "config.json").read_bytes()).hexdigest(),
    }
    _write_json(directory / "zebra.json", _layout_fields(config, local) | origin | more)


def update_zebra_json(directory: Path, config: PreTrainedConfig, local: LocalAttention) -> None:
    """Update the layout in a checkpoint's zebra.json; write a new one only where config.json cannot express it all."""
    file = directory / "zebra.json"
    before = read_json_object(file, _MEND) if file.is_file() else {}
    if local or before:
        _write_json(file, before | _layout_fields(config, local))


def read_local_attention(path: str | os.PathLike[str], **kwargs: Any) -> LocalAttention:
    """The sinks and full decoding in a checkpoint's zebra.json; neither where it has none.

    Args:
        kwargs: keyword arguments of `from_pretrained`.

    Raises:
        ZebraError: a zebra.json that is broken.
    """
    absent = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors", "gated_repo")}
    hub = {name: kwargs[name] for name in _HUB if name in kwargs}
    file = cached_file(str(path), "zebra.json", **hub, **absent)
    values = {} if file is None else read_json_object(Path(file), _MEND)
    sinks, full_decode = values.get("sinks", 0), values.get("full_decode", False)
    if isinstance(sinks, bool) or not isinstance(sinks, int) or sinks < 0 or not isinstance(full_decode, bool):
        raise ZebraError(
            f"{file}: sinks is a whole number of at least 0 and full_decode true or false; got {sinks!r} and "
            f"{full_decode!r}. Correct them, or remove the file to load without."
        )
    return LocalAttention(sinks, full_decode)


_MEND = "Correct it, or remove it to load without its settings."


def _layout_fields(config: PreTrainedConfig, local: LocalAttention) -> dict[str, Any]:
    stripes = stripes_of(config)
    return {
        "layout": layout_name(config, local),
        "window": stripes.window if stripes else None,
        "window_counts": "keys that a query sees, its own included: 0 <= i - j < window",
        "layer_types": getattr(config, "layer_types", None),
        "sinks": local.sinks,
        "full_decode": local.full_decode,
        "only_here": "sinks and full_decode: config.json has no fields for them; what reads it alone runs without",
        "versions": versions(),
        "commit": git_commit(),
    }


def _write_json(file: Path, values: dict[str, Any]) -> None:
    atomic_write(file, json.dumps(values, indent=2) + "\n")
