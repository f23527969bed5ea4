"""Export striped checkpoints to other engines: a GGUF file for llama.cpp, a folder for MLX, vLLM or SGLang."""

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
"""Types of the weight matrices in a GGUF file that is written from a folder."""


class Exported(NamedTuple):
    """The path that an export wrote, its layout, and the shell command that runs it."""

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
    """Check the arguments of `export`, as far as that needs no torch.

    Raises:
        ZebraError: as `check_checkpoint` and `Stripes.parse`; an unknown engine or dtype; a dtype for an export that
            copies the weights unchanged; a target that exists, cannot be written, or does not have the suffix that
            the engine needs; the package gguf is not installed.
    """
    if to not in TARGETS:
        raise ZebraError(f"an export must be to one of {', '.join(TARGETS)}; got {to!r}. Choose one.")
    if not isinstance(stripes, Stripes | None):
        Stripes.parse(stripes)
    if dtype is not None and dtype not in DTYPES:
        raise ZebraError(f"the dtype of an export must be one of {', '.join(DTYPES)}; got {dtype!r}. Choose one.")
    if dtype is not None and (to != "gguf" or is_gguf(checkpoint)):
        raise ZebraError(
            "only an export of a folder to gguf has a dtype; others copy the weights. Leave out the dtype."
        )
    if (to == "gguf") != (Path(target).suffix == ".gguf"):
        kind = "a file that ends in .gguf" if to == "gguf" else "a folder"
        raise ZebraError(f"the target of an export to {to} must be {kind}; got {target}. Change the target.")
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
    """Write a checkpoint with stripes in the format of another engine.

    Args:
        checkpoint: a folder or a GGUF file. From GGUF to `gguf` the tensors are copied bit for bit.
        target: a file for `gguf`, otherwise a folder; it appears complete or not at all.
        to: `gguf` (llama.cpp), `mlx`, `vllm` or `sglang`.
        stripes: a layout or its notation; None keeps that of the checkpoint, which must have one.
        dtype: type of the weight matrices in a GGUF file that is written from a folder, from `DTYPES`; None means f16.

    Returns:
        the path, the layout, and the shell command that runs the export.

    Raises:
        ZebraError: as `check_export` and `zebra.convert`; no stripes; attention sinks or full decoding; quantised
            weights to `gguf` or `mlx`, except from a GGUF file; an engine that cannot run this family with this
            layout exactly, with the reason.
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
        raise ZebraError(f"other engines do not support {local}. Leave them out, or serve {checkpoint} with zebra.")
    if (method := quantization_of(config)) and to in ("gguf", "mlx"):
        raise ZebraError(f"{checkpoint} is quantised ({method}). Export the checkpoint before quantisation.")
    if to == "gguf":
        from zebra.exports.gguf_file import export_folder_as_file

        export_folder_as_file(checkpoint, target, config, dtype or "f16")
        return Exported(str(target), str(layout), serve)
    return Exported(str(target), str(layout), export_folder(checkpoint, Path(target), config, local, to))
