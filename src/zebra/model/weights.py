"""The weight files of a checkpoint: their names, whether they fit a config, and hard links to them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import re
import shutil
import zipfile
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from zebra.errors import ZebraError, first_line
from zebra.model.families import model_class
from zebra.model.gguf import as_directory
from zebra.model.quantization import quantization_of

_UNREADABLE = (SafetensorError, OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError)
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16


def digest_of_weights(path: str | os.PathLike[str]) -> dict[str, str]:
    """A hash of each weight file's size and of 64 evenly spread samples, by the file's path in the checkpoint."""
    digests = {}
    for name in _weight_files(Path(path)):
        file = Path(path) / name
        size = file.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        with file.open("rb") as opened:
            for i in range(_SAMPLES):
                opened.seek(size * i // _SAMPLES)
                digest.update(opened.read(_SAMPLE_BYTES))
        digests[name] = digest.hexdigest()
    return digests


def check_weights(path: str | os.PathLike[str], config: PreTrainedConfig) -> list[str]:
    """Check the weights of a checkpoint by their headers alone; return the files that transformers would load.

    Raises:
        ZebraError: no weights, a missing, corrupt or truncated shard, or one outside the directory; tensors that are
            missing, of another shape than the config says, or of integers.
    """
    directory = as_directory(path)
    files = _weight_files(directory)
    if absent := [name for name in files if not (directory / name).is_file()]:
        raise ZebraError(f"{path} lacks the shards {', '.join(absent)} that its index names. Copy them there.")
    headers: dict[str, _Header] = {}
    for name in files:
        try:
            headers |= _headers(directory / name)
        except _UNREADABLE as error:
            if "unsupported global" in str(error).lower():  # torch advises to load it anyway
                raise ZebraError(
                    f"{directory / name} is a pickle of more than tensors, which can run code when it is loaded. "
                    "Use model.safetensors instead."
                ) from None
            text = f"{directory / name} is corrupt or truncated: {first_line(error)}. Copy it again."
            raise ZebraError(text) from None
    _check_tensors(path, config, headers)
    return files


def _weight_files(directory: Path) -> list[str]:
    """The weight files, in transformers' order of preference, by their paths in the directory."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (directory / single).is_file():
            return [single]
        index = directory / f"{single}.index.json"
        if index.is_file():
            try:
                names = sorted({str(Path(name)) for name in json.loads(index.read_text())["weight_map"].values()})
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
                raise ZebraError(f"{index} is not an index of shards. Copy it from the source again.") from None
            for name in map(Path, names):
                if name.is_absolute() or ".." in name.parts or name.suffix != Path(single).suffix:
                    raise ZebraError(
                        f"{index}: a shard must be a {Path(single).suffix} file inside the checkpoint's directory; got "
                        f"{str(name)!r}. Move the shards there, and fix the index."
                    )
            return names
    raise ZebraError(f"{directory} has no weights: neither model.safetensors nor an index of shards. Copy them there.")


class _Header(NamedTuple):
    """A tensor's shape and dtype; dtype None for integers and 8-bit types, in which no model computes."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _headers(file: Path) -> dict[str, _Header]:
    """The header of each tensor in a file, without its values."""
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {name: _Header(tuple(s.get_shape()), _DTYPES.get(s.get_dtype())) for name, s in slices.items()}
    mapped = zipfile.is_zipfile(file)  # torch's older format cannot be mapped
    tensors = torch.load(file, map_location="meta", weights_only=True, mmap=mapped)
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError("it is not a dict of tensors")
    computed = _DTYPES.values()
    return {name: _Header(tuple(t.shape), t.dtype if t.dtype in computed else None) for name, t in tensors.items()}


def correct_by_weights(config: PreTrainedConfig, path: str | os.PathLike[str]) -> None:
    """Correct a config by the tensors on disk: whether the head is tied, and a missing dtype.

    Nothing is done where the weights cannot be read; `check_weights` gives the reason.
    """
    with suppress(ZebraError, *_UNREADABLE):
        if config.dtype is None:
            config.dtype = stored_dtype(path)
        if getattr(config, "tie_word_embeddings", False):
            ties = model_class(config)._tied_weights_keys or {}
            config.tie_word_embeddings = not _has_own_head(Path(path), ties)


def _has_own_head(directory: Path, ties: dict[str, str]) -> bool:
    """Whether a checkpoint has both a head and embeddings, with different values."""
    where = {name: directory / file for file in _weight_files(directory) for name in _headers(directory / file)}
    both = [pair for pair in ties.items() if {*pair} <= {*where}]
    pairs = [[_tensor(where[name], name) for name in names] for names in both]
    return any(head.shape != table.shape or bool((head != table).any()) for head, table in pairs)


def _tensor(file: Path, name: str) -> Tensor:
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(name)
    return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))[name]


def stored_dtype(path: str | os.PathLike[str]) -> torch.dtype:
    """The dtype of most of a checkpoint's parameters, whatever its config says; float32 where no tensor has floats."""
    sizes: Counter[torch.dtype] = Counter()
    for name in _weight_files(Path(path)):
        for header in _headers(Path(path) / name).values():
            if header.dtype is not None:
                sizes[header.dtype] += math.prod(header.shape)
    return max(sizes, key=sizes.__getitem__, default=torch.float32)


_ROTARY = r"rotary_emb\.inv_freq$"
"""A buffer that older versions saved."""


def _check_tensors(path: str | os.PathLike[str], config: PreTrainedConfig, headers: dict[str, _Header]) -> None:
    try:
        with torch.device("meta"):
            model = model_class(config)(config)
    except Exception as error:  # of classes that expect other fields
        raise ZebraError(f"the config of {path} is not valid: {first_line(error)}. Copy it again.") from None
    if quantization_of(config) is not None:
        return _check_quantised(path, model, headers)
    # Either of two tied tensors may be the one that was saved.
    tied = dict(model.all_tied_weights_keys) if config.tie_word_embeddings else {}
    tied |= {second: first for first, second in tied.items()}
    # Experts are single tensors in the files, and stacked in the model.
    expected = revert_weight_conversion(model, model.state_dict())
    ignored = "|".join([*(model._keys_to_ignore_on_load_unexpected or ()), _ROTARY])
    unused = [name for name in headers if name not in expected and name not in tied and not re.search(ignored, name)]
    _check_numbers(path, expected, headers)
    if unused:
        raise ZebraError(
            f"{path}: the weights have {unused[0]} and {len(unused) - 1} more tensors that config.json does not "
            "describe, which would be dropped silently. Config and weights belong to different models."
        )
    for name, tensor in expected.items():
        header = headers.get(name)
        if header is not None and header.shape != tuple(tensor.shape):
            raise ZebraError(
                f"{path}: config.json requires {name} of shape {tuple(tensor.shape)}; the weights have {header.shape}. "
                "Config and weights belong to different models."
            )
        if header is None and tied.get(name) not in headers:
            raise ZebraError(
                f"{path}: the weights lack {name}, which config.json requires. "
                "Config and weights belong to different models, or a shard is missing."
            )


def _check_numbers(path: str | os.PathLike[str], expected: dict[str, Tensor], headers: dict[str, _Header]) -> None:
    """Check that no weight is quantised without a config that says so."""
    for name, header in headers.items():
        weight = name if name in expected else f"{name.rpartition('.')[0]}.weight"
        instead = weight == name or weight not in headers  # GPTQ has a qweight in place of a weight
        if header.dtype is None and instead and weight in expected and expected[weight].is_floating_point():
            raise ZebraError(
                f"{path}: {name} holds integers or 8-bit numbers, and config.json has no quantization_config that says "
                "how to read them. Copy it from the source again, or use the checkpoint before quantisation."
            )


def _check_quantised(path: str | os.PathLike[str], model: PreTrainedModel, headers: dict[str, _Header]) -> None:
    """As `_check_tensors`, by module: each method has tensors with names of its own in place of a module's weight."""
    modules, parameters = {name for name, _ in model.named_modules() if name}, model.state_dict()
    owners = {name.rpartition(".")[0] for name in parameters}
    parents = {name: [name[:i] for i, letter in enumerate(name) if letter == "."] for name in headers}
    unused = [name for name, above in parents.items() if not owners & {*above} and not modules & {*above[-1:]}]
    tied = {name.rpartition(".")[0] for name in model.all_tied_weights_keys}
    absent = sorted(owners - tied - {module for above in parents.values() for module in above})
    wrong = [
        name
        for name, tensor in parameters.items()
        if name in headers and headers[name].dtype and headers[name].shape != tuple(tensor.shape)
        if not any(other.startswith(f"{name}.") for other in headers)  # it is packed, and the other tensors say how
    ]
    for what, names in (("no module for", unused), ("no tensor for", absent), ("different shapes of", wrong)):
        if names:
            raise ZebraError(
                f"{path} is quantised, and its config and weights do not match: {what} {names[0]}. They belong to "
                "different models, or a shard is missing."
            )


def share_files(source: Path, target: Path, names: Sequence[str]) -> None:
    """Put files of a checkpoint, by their paths in it, into another: hard links where possible, else copies."""
    for name in names:
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        real = (source / name).resolve()  # the hub's cache holds symbolic links
        try:
            os.link(real, copy)
        except FileExistsError:
            raise
        except OSError:
            _copy_new(real, copy)


def copy_other_files(source: Path, target: Path, weights: Sequence[str]) -> None:
    """Copy the files beside a checkpoint's weights: the tokenizer, the generation config, the index of shards.

    Weights in any other format are left out.
    """
    leave = {"config.json", "zebra.json", *weights}
    for file in sorted(source.iterdir()):
        if file.is_dir() and file.name == "additional_chat_templates":
            shutil.copytree(file, target / file.name)
        elif file.is_file() and file.name not in leave and file.suffix not in WEIGHT_SUFFIXES:
            _copy_new(file, target / file.name)


WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack", ".onnx"}


def _copy_new(source: Path, target: Path) -> None:
    """Copy a file's content to a new file, never into an existing one, which may be a link to the source."""
    with source.open("rb") as read, target.open("xb") as written:
        shutil.copyfileobj(read, written, 1 << 24)
