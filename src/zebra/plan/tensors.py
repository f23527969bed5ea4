"""What config.json does not say about a checkpoint's weights, read from the headers of its safetensors files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zebra.errors import ZebraError

_LARGEST_HEADER, _CHUNK = 10**8, 1 << 22
_OUTSIDE_LAYERS = ("embed", "lm_head", "wte", "wpe", "norm", "ln_")
"""Parts of the names of tensors that belong to no linear map of a layer. Quantisers usually leave these as they are."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's dtype and shape, and its place: the bytes [start, end) of a file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """The tensors of a directory's safetensors files by name; none where it has no such files.

    Raises:
        ZebraError: a file that is corrupt or absent.
    """
    tensors: dict[str, StoredTensor] = {}
    index = directory / "model.safetensors.index.json"
    try:
        files = {"model.safetensors"}
        if not (directory / "model.safetensors").is_file():
            files = (
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) if index.is_file() else set()
            )
        for file in sorted(directory / name for name in files):
            tensors |= _header(file)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ZebraError(f"the weights of {directory} cannot be read: {error}. Copy them again.") from None
    return tensors


def _header(file: Path) -> dict[str, StoredTensor]:
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        if size > _LARGEST_HEADER:
            raise ValueError(f"{file.name} has no safetensors header")
        fields: dict[str, Any] = json.loads(opened.read(size))
    fields.pop("__metadata__", None)
    first = 8 + size
    return {
        name: StoredTensor(file, one["dtype"], tuple(one["shape"]), *(first + at for at in one["data_offsets"]))
        for name, one in fields.items()
    }


def has_own_head(tensors: dict[str, StoredTensor]) -> bool:
    """Whether the head is stored beside the embeddings with other values, so that the two are not tied."""
    head = tensors.get("lm_head.weight")
    table = next((one for name, one in tensors.items() if name.endswith(("embed_tokens.weight", "wte.weight"))), None)
    if head is None or table is None:
        return False
    return (head.dtype, head.shape) != (table.dtype, table.shape) or _differ(head, table)


def _differ(one: StoredTensor, other: StoredTensor) -> bool:
    with one.file.open("rb") as first, other.file.open("rb") as second:
        first.seek(one.start)
        second.seek(other.start)
        sizes = [min(_CHUNK, one.end - at) for at in range(one.start, one.end, _CHUNK)]
        return any(first.read(size) != second.read(size) for size in sizes)


def layer_bytes(tensors: dict[str, StoredTensor]) -> int:
    """Bytes of the linear maps of all layers, with the scales and other tensors that a quantiser adds."""
    return sum(
        one.end - one.start for name, one in tensors.items() if not any(part in name for part in _OUTSIDE_LAYERS)
    )
