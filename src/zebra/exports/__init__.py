"""A striped checkpoint for other engines: a GGUF file for llama.cpp, folders for MLX, vLLM and SGLang."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import NamedTuple

from zebra.engines import TARGETS
from zebra.errors import ZebraError
from zebra.files import check_new_directory, check_writable
from zebra.gguf import is_gguf
from zebra.model.checkpoint_files import check_checkpoint, check_gguf_package
from zebra.stripes import Stripes

DTYPES = ("f32", "f16", "bf16", "q8_0")
"""Types of the matrices of a GGUF file that is written from a folder."""


class Exported(NamedTuple):
    """What an export wrote, the layout that it has, and the command that runs it."""

    target: str
    layout: str
    command: str


def check_export(
    checkpoint: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: str,
    stripes: Stripes | str | None = None,
    dtype: str | None = None,
) -> None:
    """Check what `export` is given, as far as that needs no torch.

    Raises:
        ZebraError: as `check_checkpoint` and `Stripes.parse`; an unknown engine or dtype, or a dtype where weights are
            copied as they are; a target that exists or cannot be written, or is no name of a GGUF file; no package
            gguf to write one.
    """
    if to not in TARGETS:
        raise ZebraError(f"there is no export to {to!r}; there is one to {', '.join(TARGETS)}. Choose one.")
    if not isinstance(stripes, Stripes | None):
        Stripes.parse(stripes)
    if dtype is not None and dtype not in DTYPES:
        raise ZebraError(f"matrices are written as {', '.join(DTYPES)}; got {dtype!r}. Choose one.")
    if dtype is not None and (to != "gguf" or is_gguf(checkpoint)):
        raise ZebraError("weights are copied as they are here. Leave out the dtype.")
    if (to == "gguf") != (Path(target).suffix == ".gguf"):
        kind = "a file that ends in .gguf" if to == "gguf" else "a folder"
        raise ZebraError(f"an export to {to} writes {kind}; got {target}. Name one.")
    if to == "gguf":
        check_gguf_package(target)
    check_checkpoint(checkpoint)
    check_new_directory(Path(os.path.abspath(target)))
    check_writable(target if to == "gguf" else Path(target) / "config.json")


def export(
    checkpoint: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    to: str,
    stripes: Stripes | str | None = None,
    dtype: str | None = None,
) -> Exported:
    """Write a checkpoint with stripes as another engine reads it.

    Args:
        checkpoint: a folder, or a GGUF file; to `gguf` the tensors of the latter are copied bit for bit.
        target: a file for `gguf`, else a folder; it appears whole or not at all.
        to: `gguf` (llama.cpp), `mlx`, `vllm` or `sglang`.
        stripes: a layout or its notation; None keeps that of the checkpoint, which must have one.
        dtype: of the matrices of a GGUF file from a folder; float16 where None.

    Raises:
        ZebraError: as `check_export` and `zebra.convert`; no stripes; sinks or full decoding; quantised weights that
            are not a GGUF file's; the engine cannot run this family with this layout exactly, with the reason.
    """
    check_export(checkpoint, target, to, stripes, dtype)
    from zebra.exports.folders import export_folder
    from zebra.model.families import stripes_of
    from zebra.model.load import converted_config
    from zebra.model.quantization import quantization_of

    serve = f"llama-server --model {shlex.quote(str(target))}"
    if to == "gguf" and is_gguf(checkpoint):
        from zebra.exports.gguf_file import export_file

        return Exported(str(target), str(export_file(checkpoint, target, stripes)), serve)
    config, local = converted_config(Path(checkpoint), stripes)
    layout = stripes_of(config)
    if layout is None:
        raise ZebraError(f"{checkpoint} has no stripes to export: its layout is full. Give stripes, such as GLLL:512.")
    if local:
        raise ZebraError(f"{local}: no other engine has them. Leave them out, or serve {checkpoint} with zebra.")
    if (method := quantization_of(config)) and to in ("gguf", "mlx"):
        raise ZebraError(f"{checkpoint} is quantised ({method}). Export the checkpoint before quantisation.")
    if to == "gguf":
        from zebra.exports.gguf_file import export_folder_as_file

        export_folder_as_file(checkpoint, target, config, dtype or "f16")
        return Exported(str(target), str(layout), serve)
    return Exported(str(target), str(layout), export_folder(checkpoint, Path(target), config, local, to))
