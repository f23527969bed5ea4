"""A GGUF model in memory: metadata with its types, and tensors that are read lazily, when they are written.

Tensors of any type are copied as bytes, so quantised ones stay unchanged. Each row of a matrix has its own blocks, so
rows can be permuted without dequantising.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, ReaderTensor

from zebra.errors import ZebraError, first_line
from zebra.files import atomic_file

_ALIGNMENT = "general.alignment"


@dataclass(frozen=True)
class GgufTensor:
    """A tensor that is read when it is needed.

    Attributes:
        shape: in torch's order, the reverse of the file's.
        kind: ggml's type.
        read: returns its data. The last dimension is a row's, in bytes for types that numpy does not have.
    """

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    read: Callable[[], np.ndarray]

    @classmethod
    def of(cls, values: np.ndarray) -> GgufTensor:
        """A tensor of float32 values."""
        return cls(values.shape, GGMLQuantizationType.F32, lambda: values.astype(np.float32))

    @property
    def size(self) -> int:
        """Size in the file in bytes."""
        elements, width = GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // elements * width

    def paired_rows(self, heads: int) -> GgufTensor:
        """Permute the rows of each head for a rope that rotates neighbours: rows r and r + D / 2 become adjacent."""

        def read() -> np.ndarray:
            rows = self.read()
            halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
            return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))

        return GgufTensor(self.shape, self.kind, read)

    def as_one_expert(self) -> GgufTensor:
        """The same data with a leading dimension of one expert."""
        return GgufTensor((1, *self.shape), self.kind, self.read)


@dataclass
class GgufModel:
    """The contents of a GGUF file.

    Attributes:
        architecture: llama.cpp's name of the model family.
        metadata: values by full key, such as `llama.block_count`.
        tensors: by name, in the order of the file.
        types: GGUF types by key, with the element type of arrays. Keys without one get the type of their value.
    """

    architecture: str
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    types: dict[str, tuple[GGUFValueType, GGUFValueType | None]] = field(default_factory=dict)

    def own(self, key: str) -> Any:
        """The value of `{architecture}.{key}` in the metadata, or None."""
        return self.metadata.get(f"{self.architecture}.{key}")

    def renamed(self, architecture: str, more: Mapping[str, Any], tensors: dict[str, GgufTensor]) -> GgufModel:
        """The model with another architecture and other tensors; `more` is metadata by keys without the prefix."""

        def name(key: str) -> str:
            own = key.startswith(f"{self.architecture}.")
            return f"{architecture}.{key.removeprefix(f'{self.architecture}.')}" if own else key

        changed = {f"{architecture}.{key}": value for key, value in more.items()}
        return GgufModel(
            architecture,
            {name(key): value for key, value in self.metadata.items()} | changed,
            tensors,
            {name(key): types for key, types in self.types.items() if name(key) not in changed},
        )


def read_model(path: str | os.PathLike[str]) -> GgufModel:
    """Open a GGUF file; its tensors are memory-mapped.

    Raises:
        ZebraError: the file cannot be read, or has no `general.architecture`.
    """
    try:
        reader = GGUFReader(path)
        fields = {name: value for name, value in reader.fields.items() if not name.startswith("GGUF.")}
        metadata = {name: value.contents() for name, value in fields.items()}
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise ZebraError(f"{path} cannot be read: {first_line(error)}. Copy it again.") from None
    types = {name: _types(value.types) for name, value in fields.items()}
    tensors = {each.name: _mapped(each) for each in reader.tensors}
    architecture = metadata.pop("general.architecture", None)
    if not isinstance(architecture, str):
        raise ZebraError(
            f"a GGUF model must name its general.architecture; {path} has {architecture!r}. Export it again."
        )
    metadata.pop(_ALIGNMENT, None)  # files are written with the default alignment
    return GgufModel(architecture, metadata, tensors, types)


def _mapped(tensor: ReaderTensor) -> GgufTensor:
    return GgufTensor(tuple(int(n) for n in reversed(tensor.shape)), tensor.tensor_type, lambda: tensor.data)


def _types(types: list[GGUFValueType]) -> tuple[GGUFValueType, GGUFValueType | None]:
    return types[0], types[-1] if types[0] == GGUFValueType.ARRAY else None


def _type_of(value: Any) -> GGUFValueType:
    """The type that llama.cpp expects of a value: integers are unsigned, floats of single precision."""
    for kind, name in ((bool, "BOOL"), (int, "UINT32"), (float, "FLOAT32"), (str, "STRING"), (list, "ARRAY")):
        if isinstance(value, kind):
            return GGUFValueType[name]
    raise TypeError(f"GGUF has no type for {value!r}")


def write_model(model: GgufModel, path: str | os.PathLike[str]) -> None:
    """Write a GGUF file, completely or not at all, with one tensor at a time in memory."""
    with atomic_file(path) as aside, closing(GGUFWriter(None, model.architecture)) as writer:
        for key, value in model.metadata.items():
            kind, part = model.types.get(key, (_type_of(value), None))
            if kind == GGUFValueType.ARRAY and not value:  # the package cannot write empty arrays
                continue
            if kind == GGUFValueType.ARRAY and part is None:
                part = GGUFValueType.INT32 if type(value[0]) is int else _type_of(value[0])
            writer.add_key_value(key, value, kind, part)
        for name, tensor in model.tensors.items():
            writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), tensor.size, tensor.kind)
        writer.write_header_to_file(Path(aside))
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in model.tensors.values():
            writer.write_tensor_data(np.ascontiguousarray(tensor.read()))
