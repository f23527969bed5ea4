"""What training leaves: a whole checkpoint for plain transformers, or a peft adapter over one."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from zebra.errors import ZebraError
from zebra.files import atomic_directory
from zebra.model.checkpoint import copy_other_files, read_config, write_config, write_zebra_json
from zebra.model.load import load, write_converted
from zebra.model.local import local_attention_of
from zebra.model.verify import TOLERANCE
from zebra.train.recipe import CheckpointRecipe


def export(recipe: CheckpointRecipe, model: Any, files: Mapping[str, str], **fields: Any) -> None:
    """Write `run/model`, whole or not at all, in the source's dtype.

    A LoRA is merged into a whole checkpoint where the recipe says so, and what was written is read again and compared
    with the adapter; else it stays an adapter, over the converted source in `run/base`.

    Args:
        model: the trained model, a PeftModel under LoRA.
        files: written beside it, name to text, in the place of the source's.
        fields: of its zebra.json.

    Raises:
        ZebraError: a merged checkpoint that differs from its adapter.
    """
    run = Path(recipe.run)
    if recipe.lora is None:
        with atomic_directory(run / "model") as staging:
            _write(recipe, model, staging, **fields)
            _write_files(staging, files)
    elif recipe.lora.merge:
        expected = _logits(model.float())
        with atomic_directory(run / "model") as staging:
            _write(recipe, model.merge_and_unload(safe_merge=True), staging, **fields)
            _write_files(staging, files)
            merged = _logits(load(staging, dtype=torch.float32).to(expected.device))
            difference = ((merged - expected).abs().max() / expected.abs().max()).item()
            if not difference <= TOLERANCE[_dtype(recipe)]:
                raise ZebraError(f"the merged checkpoint differs from its adapter by {difference:.1e} of the logits.")
    else:
        base = run / "base"
        shutil.rmtree(base, ignore_errors=True)  # of a killed export
        local = local_attention_of(model)
        write_converted(Path(recipe.model), base, _as_source(recipe, model.get_base_model().config), local)
        model.peft_config["default"].base_model_name_or_path = str(base.resolve())
        with atomic_directory(run / "model") as staging:
            model.save_pretrained(staging)
            write_zebra_json(staging, model.get_base_model().config, local, source=Path(recipe.model), **fields)
            _write_files(staging, files)


def _write_files(folder: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def _write(recipe: CheckpointRecipe, model: PreTrainedModel, staging: Path, **fields: Any) -> None:
    source = Path(recipe.model)
    model.to(_dtype(recipe))
    _as_source(recipe, model.config)
    model.save_pretrained(staging)
    written = {file.name for file in staging.iterdir()}
    stale = [file for file in source.iterdir() if file.name in written or file.name.endswith(".index.json")]
    copy_other_files(source, staging, stale)
    write_config(model.config, staging)
    write_zebra_json(staging, model.config, local_attention_of(model), source=source, **fields)


def _as_source(recipe: CheckpointRecipe, config: PreTrainedConfig) -> PreTrainedConfig:
    """The Trainer turns the cache off in the config, for itself."""
    config.use_cache = read_config(recipe.model).use_cache
    return config


def _dtype(recipe: CheckpointRecipe) -> torch.dtype:
    """The source's; a checkpoint that does not say is float32."""
    dtype = read_config(recipe.model).dtype
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype or "float32")


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    model.eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, 256), generator=generator).to(model.device)
    return model(ids, use_cache=False).logits.float()
