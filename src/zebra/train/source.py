"""A training that starts from a checkpoint: its config with new stripes and rope, its weights, and its export."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from zebra.errors import ZebraError
from zebra.files import atomic_directory
from zebra.model.checkpoint import (
    checkpoint_digests,
    load_tokenizer,
    read_config,
    write_config,
    write_zebra_json,
)
from zebra.model.context import context_length
from zebra.model.families import model_class, with_stripes
from zebra.model.gguf import as_directory
from zebra.model.load import load, write_converted
from zebra.model.load_options import loaded_layout_name
from zebra.model.local import layout_name, local_attention_of
from zebra.model.rope import as_rope, check_fixed_rope, with_explicit_yarn_factor
from zebra.model.verify import TOLERANCE
from zebra.model.weights import check_weights, copy_other_files, stored_dtype
from zebra.stripes import Stripes
from zebra.train import lora
from zebra.train.recipe import CheckpointRecipe
from zebra.train.run import Start
from zebra.train.run_results import local_attention_for
from zebra.train.trainer import check_machine, trainable_config


def read_source(
    recipe: CheckpointRecipe, trust_remote_code: bool = False
) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """The config to train, with the recipe's stripes and rope and a sufficient length, and the tokenizer.

    Args:
        trust_remote_code: allow a tokenizer that is Python code in the checkpoint.

    Raises:
        ZebraError: no GPU where the recipe needs one; no checkpoint, or a damaged one; what `adapted_config` and
            `lora.check_targets` raise.
    """
    check_machine(recipe.train)
    config = read_config(recipe.model)
    tokenizer = load_tokenizer(recipe.model, config, trust_remote_code=trust_remote_code)
    config = adapted_config(recipe, config)
    check_weights(recipe.model, config)
    if recipe.lora is not None:
        with torch.device("meta"):
            lora.check_targets(model_class(config)(config), recipe.lora)
    return config, tokenizer


def adapted_config(recipe: CheckpointRecipe, config: PreTrainedConfig) -> PreTrainedConfig:
    """The config to train, from that of the source.

    Raises:
        ZebraError: a layout or a rope that does not fit; quantised weights, or a router's auxiliary loss.
    """
    if recipe.stripes is not None:
        config = with_stripes(config, Stripes.parse(recipe.stripes))
    rope, trained = as_rope(recipe.rope), config.max_position_embeddings
    config = with_explicit_yarn_factor(rope.apply(config))
    check_fixed_rope(config, "training")
    reach, length = context_length(config) or 0, recipe.train.length
    if rope.kind not in ("none", "base") and reach < length:
        raise ZebraError(
            f"the rope {rope} extends the model's {trained:,} positions to {reach:,}, but train.length is {length:,}. "
            f"Use a factor of at least {math.ceil(length / trained)}."
        )
    if length > config.max_position_embeddings:
        config.max_position_embeddings = max(reach, length)
    return trainable_config(config, recipe.model)


@dataclass
class CheckpointStart(Start):
    """A start from the checkpoint `recipe.model`, to train in full or with LoRA.

    Attributes:
        finish: changes the trained model before it is written; returns the texts of further files, by name.
    """

    recipe: CheckpointRecipe
    finish: Callable[[PreTrainedModel], Mapping[str, str]] = lambda model: {}

    @property
    def name(self) -> str:
        """The path or name of the checkpoint."""
        return self.recipe.model

    @property
    def rope(self) -> str | None:
        """The recipe's change of the rope."""
        return self.recipe.rope

    def digests(self) -> dict[str, object]:
        """Digests of the source's files, including its tokenizer's."""
        return {"source": checkpoint_digests(self.recipe.model)}

    def untrained(self) -> Iterator[tuple[PreTrainedModel, str | None]]:
        """The unchanged source, and the source with its new stripes and rope if these change it."""
        source = load(self.recipe.model)
        layout = loaded_layout_name(source)
        yield source, None
        del source
        if layout != layout_name(self.config, local_attention_for(self.recipe), self.rope):
            yield load(self.recipe.model, stripes=self.recipe.stripes, rope=self.rope), self.rope

    def build(self) -> PreTrainedModel:
        """The source with its new config, wrapped with LoRA if the recipe says so."""
        model, low_rank = self._source(), self.recipe.lora
        return model if low_rank is None else lora.wrap(model, low_rank, seed=self.recipe.train.seed)

    def restore(self, checkpoint: Path) -> PreTrainedModel:
        """Load a checkpoint of the Trainer; with LoRA, the source with that adapter."""
        return super().restore(checkpoint) if self.recipe.lora is None else lora.reload(self._source(), checkpoint)

    def export(self, model: Any, tokens: int) -> None:
        """Write `run/model`, atomically, in the source's dtype.

        With `lora.merge` an adapter is merged into the source's weights; otherwise it is written as an adapter of the
        converted source in `run/base`. With LoRA, what was written is loaded and compared with the trained model.

        Raises:
            ZebraError: the logits of the written and the trained model differ.
        """
        run, source, low_rank = Path(self.recipe.run), Path(self.recipe.model), self.recipe.lora
        files_of_source = as_directory(source)
        dtype, trained = stored_dtype(files_of_source), model
        base = run / "base" if low_rank is not None and not low_rank.merge else None
        # On the CPU: in float32 the model may not fit on the device where it was trained.
        expected = None if low_rank is None else _logits(trained.to("cpu", torch.float32))
        if base is not None:
            model = trained.get_base_model()
        elif low_rank is not None:
            model = self._source(torch.float32)
            lora.add_updates(model, trained)
        files, config, local = self.finish(model), model.config, local_attention_of(model)
        config.use_cache = read_config(source).use_cache  # the Trainer turns it off
        if base is not None:
            shutil.rmtree(base, ignore_errors=True)  # from a killed export
            write_converted(source, base, config, local)
            # The path as in the recipe, so that a project can move; with "./", or it could be a model id of the Hub.
            name = str(base) if base.is_absolute() else f"./{base}"
            trained.peft_config["default"].base_model_name_or_path = name
        with atomic_directory(run / "model") as staging:
            if base is None:
                _write_whole(model, dtype, files_of_source, staging)
            else:
                trained.save_pretrained(staging)
            steps, rope = self.recipe.train.max_steps, self.rope or "none"
            write_zebra_json(staging, config, local, source=source, steps=steps, tokens=tokens, rope=rope)
            for name, text in files.items():
                (staging / name).write_text(text, encoding="utf-8")
            if low_rank is not None and expected is not None:
                del model
                tolerance = max(TOLERANCE[dtype], TOLERANCE[getattr(torch, low_rank.base_dtype)])
                written = load(base or staging, dtype=torch.float32)
                written = written if base is None else lora.reload(written, staging)
                _check_written(written, expected, tolerance)

    def exported(self) -> PreTrainedModel:
        """Load the model of `run/model`; an adapter is merged."""
        if self.recipe.lora is None or self.recipe.lora.merge:
            return super().exported()
        run = Path(self.recipe.run)
        return lora.reload(load(run / "base"), run / "model").merge_and_unload()

    def _source(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Load the source with its new config, in `dtype` or else in the dtype of training."""
        model = load(
            self.recipe.model,
            stripes=self.recipe.stripes,
            rope=self.rope,
            dtype=dtype or getattr(torch, self.recipe.lora.base_dtype if self.recipe.lora else "float32"),
            attention_dropout=self.config.attention_dropout,
        )
        # Only after loading, which computes the rope from the old values.
        model.config.max_position_embeddings = self.config.max_position_embeddings
        model.config.rope_parameters = self.config.rope_parameters
        return model


def _write_whole(model: PreTrainedModel, dtype: torch.dtype, source: Path, target: Path) -> None:
    model.to(dtype)
    model.save_pretrained(target)
    written = {file.name for file in target.iterdir()}
    stale = [file.name for file in source.iterdir() if file.name in written or file.name.endswith(".index.json")]
    copy_other_files(source, target, stale)
    write_config(model.config, target)


def _check_written(model: PreTrainedModel, expected: Tensor, tolerance: float) -> None:
    difference = ((_logits(model) - expected).abs().max() / expected.abs().max()).item()
    if not difference <= tolerance:
        raise ZebraError(f"the logits of the written checkpoint differ from the trained model's by {difference:.1e}.")


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    model.eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, 256), generator=generator).to(model.device)
    return model(ids, use_cache=False).logits.float()
