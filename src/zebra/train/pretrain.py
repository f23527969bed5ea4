"""Training from scratch: a transformers config, a tokenizer, text, and generated documents of recall.

run/tokenizer/    the tokenizer, where the recipe trains one
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from zebra.errors import ZebraError, did_you_mean, first_line
from zebra.files import atomic_directory
from zebra.model.attention import NAME
from zebra.model.checkpoint import load_tokenizer, write_config, write_zebra_json
from zebra.model.checkpoint_files import check_fields
from zebra.model.context import check_learned_positions
from zebra.model.default_cache import with_default_cache
from zebra.model.families import layer_kinds, model_class, route_of, with_stripes
from zebra.model.local import LocalAttention, local_attention_of, set_local_attention
from zebra.results import Result
from zebra.stripes import GLOBAL, Stripes
from zebra.train.directory import has_trained
from zebra.train.processes import is_first_process
from zebra.train.recipe import NewTokenizer, PretrainRecipe
from zebra.train.recipe_file import as_recipe
from zebra.train.run import Start, run_recipe
from zebra.train.run_results import local_attention_for
from zebra.train.texts import read_texts
from zebra.train.tokenizer import tokenizer_texts, train_tokenizer
from zebra.train.trainer import check_machine, trainable_config


def pretrain(recipe: PretrainRecipe | str | os.PathLike[str]) -> list[Result]:
    """Train from scratch and return the results; an interrupted run resumes.

    Args:
        recipe: the recipe, or the path of its file.

    Raises:
        ZebraError: what `read_recipe` raises; before any training, a config, a tokenizer or texts that cannot be used,
            or a run directory of another recipe; during it, a loss that is not finite.
    """
    settings = as_recipe(recipe, PretrainRecipe)
    check_machine(settings.train)
    config_of(settings)

    def start_of(run: Path) -> RandomStart:
        if isinstance(settings.tokenizer, str) or (has_trained(run) and (run / "tokenizer").is_dir()):
            tokenizer = load_tokenizer(settings.tokenizer if isinstance(settings.tokenizer, str) else run / "tokenizer")
        else:
            tokenizer = train_tokenizer(tokenizer_texts(settings), settings.tokenizer)
        return RandomStart(settings, config_of(settings, tokenizer), tokenizer)

    return run_recipe(settings, start_of, lambda start: read_texts(settings, start.tokenizer))


@dataclass
class RandomStart(Start):
    """A start from random weights, drawn with the recipe's seed."""

    recipe: PretrainRecipe

    def build(self) -> PreTrainedModel:
        """The model with random weights. Its tokenizer is saved, so that a resumed run does not train it again."""
        run = Path(self.recipe.run)
        tokenizer = run / "tokenizer"
        if not has_trained(run) and is_first_process():
            shutil.rmtree(tokenizer, ignore_errors=True)  # from an earlier start that saved no checkpoint
            with atomic_directory(tokenizer) as staging:
                self.tokenizer.save_pretrained(staging)
        return random_model(self.config, seed=self.recipe.train.seed, local=local_attention_for(self.recipe))

    def export(self, model: PreTrainedModel, tokens: int) -> None:
        """Write `run/model` in the recipe's dtype."""
        run, steps = Path(self.recipe.run), self.recipe.train.max_steps
        with atomic_directory(run / "model") as staging:
            model.to(getattr(torch, self.recipe.dtype))
            model.config.use_cache = True  # the Trainer turns it off
            model.save_pretrained(staging)
            shutil.copytree(run / "tokenizer", staging, dirs_exist_ok=True)  # saving a loaded one changes its files
            write_config(model.config, staging)
            local = local_attention_of(model)
            write_zebra_json(staging, model.config, local, source=None, steps=steps, tokens=tokens)


def random_model(
    config: PreTrainedConfig,
    *,
    seed: int,
    local: LocalAttention = LocalAttention(),  # noqa: B008  # frozen
) -> PreTrainedModel:
    """A model with float32 weights, initialised by transformers with a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        cls: Any = with_default_cache(model_class(config))  # type: ignore[arg-type]
        model: PreTrainedModel = cls._from_config(config, attn_implementation=NAME, dtype=torch.float32)
    if local:
        set_local_attention(model, local)
    return model


def config_of(recipe: PretrainRecipe, tokenizer: PreTrainedTokenizerBase | None = None) -> PreTrainedConfig:
    """The config that a recipe's `model` describes, with its stripes, and with what it leaves to the tokenizer.

    Raises:
        ZebraError: a model_type or a field that transformers does not have, a family or a layout that zebra does not
            serve, a model too short for the sequences, a vocabulary of another size than the tokenizer's, a layout that
            contradicts the sizes.
    """
    sizes = dict(recipe.model)
    kind = sizes.pop("model_type")
    if kind not in CONFIG_MAPPING:
        remedy = did_you_mean(str(kind), sorted(CONFIG_MAPPING), "use one that it has.")
        raise ZebraError(f"transformers has no model_type {kind!r}; {remedy}")
    known = [field.name for field in fields(CONFIG_MAPPING[kind])]
    if unknown := sorted({*sizes} - {*known}):
        remedy = did_you_mean(unknown[0], sorted(known), "remove it.")
        raise ZebraError(f"a config of {kind} has no field {unknown[0]}; {remedy}")
    if recipe.stripes is not None and sizes.get("attention_kinds") is not None:
        raise ZebraError("model.attention_kinds and stripes cannot both be set. Remove one of them.")
    if tokenizer is None and isinstance(recipe.tokenizer, str):
        tokenizer = load_tokenizer(recipe.tokenizer)
    sizes = {"max_position_embeddings": recipe.train.length} | _vocabulary(recipe, tokenizer) | sizes
    check_fields(sizes, "model")  # before a config class computes with them
    try:
        config = AutoConfig.for_model(kind, **sizes)
        check_fields(config.to_dict(), "model")
        route_of(config)
        if recipe.stripes is not None:
            config = with_stripes(config, Stripes.parse(recipe.stripes))
        with torch.device("meta"):
            model_class(config)(config)
    except (StrictDataclassError, ValueError, TypeError, RuntimeError, ArithmeticError, KeyError) as error:
        raise ZebraError(f"the fields of model are not a valid {kind}: {first_line(error)}") from None
    if config.max_position_embeddings < recipe.train.length:
        raise ZebraError(
            f"model.max_position_embeddings must be at least train.length, {recipe.train.length:,}; got "
            f"{config.max_position_embeddings:,}. Remove it to use train.length."
        )
    check_learned_positions(config, max(recipe.longest, (recipe.evaluate and recipe.evaluate.beyond) or 0))
    _check_layout(recipe, config)
    return trainable_config(config, "model")


def _check_layout(recipe: PretrainRecipe, config: PreTrainedConfig) -> None:
    """Check that the layout fits the model's depth and the sequences: in training from scratch all three are chosen.

    Raises:
        ZebraError: a pattern longer than the depth, a window longer than the sequences.
    """
    pattern, layers = recipe.stripes and Stripes.parse(recipe.stripes).pattern, config.num_hidden_layers
    if pattern and len(pattern) > layers:
        raise ZebraError(
            f"stripes {recipe.stripes} has groups of {len(pattern)} layers, but the model has only {layers}. "
            f"Use groups of at most {layers}."
        )
    window, length = getattr(config, "sliding_window", None), recipe.train.length
    if window and window > length and {*layer_kinds(config)} != {GLOBAL}:
        raise ZebraError(
            f"the window of {window:,} tokens is longer than train.length, {length:,}: local layers would see whole "
            f"sequences. Use a window of at most {length:,}."
        )


def _vocabulary(recipe: PretrainRecipe, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """The config fields that follow from the tokenizer; before it is trained, only its size."""
    size = recipe.tokenizer.vocab_size if isinstance(recipe.tokenizer, NewTokenizer) else len(tokenizer or ())
    if recipe.model.get("vocab_size", size) != size:
        raise ZebraError(
            f"model.vocab_size must be that of the tokenizer, {size:,}; got {recipe.model['vocab_size']:,}. "
            "Remove it to use the tokenizer's."
        )
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
    return {"vocab_size": size} | ids
