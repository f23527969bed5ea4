"""Write a GGUF file with stripes: from another GGUF file, whose tensors are copied, or from a folder."""

from __future__ import annotations

import os

from transformers import PreTrainedConfig

from zebra.errors import ZebraError
from zebra.exports.gguf_folder import check_family, folder_model
from zebra.exports.gguf_model import GgufModel, read_model, write_model
from zebra.exports.llama_cpp import check_architecture, with_stripes
from zebra.model.families import stripes_of
from zebra.model.families import with_stripes as striped_config
from zebra.model.gguf import gguf_config
from zebra.model.load import load
from zebra.stripes import GLOBAL, LOCAL, Stripes


def layout_of(model: GgufModel) -> Stripes | None:
    """The layout in a model's metadata; None if it has none."""
    window, pattern = model.own("attention.sliding_window"), model.own("attention.sliding_window_pattern")
    if not window or pattern is None:
        return None
    if not isinstance(pattern, list):
        period, layers = int(pattern), range(model.own("block_count"))
        pattern = [not period or i % period < period - 1 for i in layers]
    return Stripes.of([LOCAL if local else GLOBAL for local in pattern], window)


def export_file(
    source: str | os.PathLike[str], target: str | os.PathLike[str], stripes: Stripes | str | None
) -> Stripes:
    """Copy a GGUF file with a layout (None: its own). The weights stay the same bit for bit.

    Returns:
        the layout that was written.

    Raises:
        ZebraError: no layout; as `zebra.model.families.with_stripes` and `zebra.exports.llama_cpp.with_stripes`.
    """
    model = read_model(source)
    check_architecture(model.architecture)
    layout = stripes if isinstance(stripes, Stripes | None) else Stripes.parse(stripes)
    layout = layout or layout_of(model)
    if layout is None:
        raise ZebraError(f"{source} has no stripes. Give them, such as GLLL:512; `zebra select` measures which.")
    striped_config(gguf_config(source), layout)  # checks the layout against the model, as for a folder
    write_model(with_stripes(model, layout), target)
    return layout


def export_folder_as_file(
    source: str | os.PathLike[str], target: str | os.PathLike[str], config: PreTrainedConfig, dtype: str
) -> Stripes:
    """Write a folder as a GGUF file with the stripes of its converted config, and matrices of a dtype.

    Returns:
        the layout that was written.

    Raises:
        ZebraError: as `folder_model` and `zebra.exports.llama_cpp.with_stripes`.
    """
    check_family(config, source)
    layout = stripes_of(config)
    assert layout is not None
    model = load(source, stripes=layout)
    write_model(with_stripes(folder_model(source, model, dtype), layout), target)
    return layout
