"""Long instruction tuning (LIT, Zebra section 4): train a checkpoint on the answers of short and long conversations.

The written checkpoint has its chat template.
"""

from __future__ import annotations

import os

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from zebra.errors import missing_package
from zebra.model.gguf import as_directory
from zebra.model.load import best_device, load
from zebra.results import Result
from zebra.train.chat import Chat
from zebra.train.recipe_file import as_recipe
from zebra.train.run import run_recipe
from zebra.train.source import CheckpointStart, read_source
from zebra.train.tune_recipe import TuneRecipe

try:
    from zebra.train.instructions import read_instructions
except ImportError as error:
    raise missing_package("tuning", f"trl and datasets ({error})", "tune") from None


def tune(recipe: TuneRecipe | str | os.PathLike[str], *, trust_remote_code: bool = False) -> list[Result]:
    """Run instruction tuning and return its results; an interrupted run resumes.

    Args:
        recipe: the recipe, or the path of its file.
        trust_remote_code: allow a tokenizer that is Python code in the checkpoint.

    Raises:
        ZebraError: what `read_recipe` raises; before any training, a checkpoint, a chat template or conversations that
            cannot be used, or a run directory of another recipe; during it, a loss that is not finite.
    """
    settings = as_recipe(recipe, TuneRecipe)
    config, tokenizer = read_source(settings, trust_remote_code)
    chat = Chat(tokenizer, settings.chat_template, settings.model)
    start = CheckpointStart(settings, config, tokenizer, lambda model: _finish(settings, model, config, chat))
    return run_recipe(
        settings,
        lambda run: start,
        lambda _: read_instructions(settings, chat, lambda: load(settings.model).to(best_device())),
    )


_CHANGED_BY_TRL = ("pad_token_id", "bos_token_id", "eos_token_id", "router_aux_loss_coef", "output_router_logits")


def _finish(recipe: TuneRecipe, model: PreTrainedModel, config: PreTrainedConfig, chat: Chat) -> dict[str, str]:
    """Undo trl's changes of the config, make generation stop where answers end, and return the template's file."""
    for name in _CHANGED_BY_TRL:
        if hasattr(config, name):
            setattr(model.config, name, getattr(config, name))
    try:
        generation = GenerationConfig.from_pretrained(as_directory(recipe.model))
    except OSError:  # the source has no generation_config.json
        generation = GenerationConfig.from_model_config(config)
    ends = generation.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if chat.stop is not None and chat.stop not in ends:
        generation.eos_token_id = [*ends, chat.stop]
    model.generation_config = generation
    return {} if recipe.chat_template is None else {"chat_template.jinja": chat.template}
