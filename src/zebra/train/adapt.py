"""Long-context adaptation training (LCAT, Zebra section 4): a checkpoint, striped, trained on long rows, measured.

run/recipe.yaml     the resolved recipe, and run/inputs.json beside it (zebra.train.directory)
run/before.jsonl    the source by position, as it was, and with the new stripes and rope without training
run/checkpoints/    the Trainer's; only those with the mark COMPLETE are resumed from
run/model/          the adapted checkpoint, loadable by plain transformers
run/results.jsonl      every row, written last: a run that has it is done
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from zebra.data.encoding import tokenizer_digest
from zebra.errors import ZebraError
from zebra.model.checkpoint import check_weights, checkpoint_digest, load_tokenizer, read_config
from zebra.model.families import with_stripes
from zebra.model.load import load
from zebra.model.local import layout_name
from zebra.model.rope import as_rope, refuse_changing_rope, with_explicit_yarn_factor
from zebra.results import Result, read_results, write_results
from zebra.stripes import Stripes
from zebra.train import directory, lora, measuring
from zebra.train.export import export, reload
from zebra.train.measuring import (
    by_position,
    columns_of,
    cost_rows,
    local_for,
    measure,
    trainer_state,
    training_rows,
)
from zebra.train.recipe import AdaptRecipe, SourceRecipe
from zebra.train.texts import data_rows, read_texts
from zebra.train.trainer import check_machine, fit, is_complete, trainable


def adapt(recipe: AdaptRecipe) -> list[Result]:
    """Run a recipe from where it stands, and return its rows.

    Raises:
        ZebraError: what cannot be served, before any training: the checkpoint, the layout, the texts, a run directory
            of another recipe.
    """
    config, tokenizer = open_source(recipe)
    with directory.occupied(recipe) as run:
        return _run(run, recipe, config, tokenizer)


def _run(run: Path, recipe: AdaptRecipe, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> list[Result]:
    if (run / "results.jsonl").exists() and (done := read_results(run / "results.jsonl")):
        return done
    texts = read_texts(recipe, tokenizer)
    inputs = {
        "source": checkpoint_digest(recipe.model),
        "text": texts.digest,
        "tokenizer": tokenizer_digest(tokenizer),
        "processes": directory.processes(),
    }
    directory.record(run, recipe, inputs)
    before = measuring.before(run, recipe, partial(measure, recipe, texts.held_out))
    if not (run / "model").exists():
        train(run, recipe, config, lambda model: fit(recipe, model, texts.rows, texts.held_out, run / "checkpoints"))
    if not directory.is_first_process():
        return []
    history = trainer_state(run, recipe)["log_history"]
    after = measure(recipe, texts.held_out, run / "model", reload(recipe), recipe.rope) if recipe.evaluate else []
    at = {"model": recipe.model, "layout": layout_name(config, local_for(recipe))} | columns_of(recipe)
    found = [
        *data_rows(recipe, texts.lines, **at),
        *before,
        *training_rows(recipe, config, history, by_position(recipe), recipe.rope),
        *after,
        *cost_rows(recipe, config, recipe.model),
    ]
    write_results(run / "results.jsonl", found)
    return found


def open_source(recipe: SourceRecipe) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """The config to train, striped, with its rope and long enough, and the tokenizer."""
    check_machine(recipe.train)
    config = read_config(recipe.model)
    if not Path(recipe.model).is_dir():
        raise ZebraError(f"the model of a recipe is a directory; got {recipe.model}. Download the checkpoint first.")
    tokenizer = load_tokenizer(recipe.model, config)
    config = adapted(recipe, config)
    check_weights(recipe.model, config)
    return config, tokenizer


def adapted(recipe: SourceRecipe, config: PreTrainedConfig) -> PreTrainedConfig:
    """The config that a recipe makes of its source's.

    Raises:
        ZebraError: a layout or a rope that does not fit, a router that wants a loss of its own.
    """
    if recipe.stripes is not None:
        config = with_stripes(config, Stripes.parse(recipe.stripes))
    config = _with_rope(recipe, config)
    config.max_position_embeddings = max(config.max_position_embeddings, recipe.train.length)
    return trainable(config, recipe.model)


def _with_rope(recipe: SourceRecipe, config: PreTrainedConfig) -> PreTrainedConfig:
    rope = as_rope(recipe.rope)
    reach = rope.reaches(config)
    if reach is not None and reach < recipe.train.length:
        raise ZebraError(
            f"the rope {rope} reaches {reach:,} positions of a model of {config.max_position_embeddings:,}, and "
            f"train.length is {recipe.train.length:,}. Take a factor of at least "
            f"{math.ceil(recipe.train.length / config.max_position_embeddings)}."
        )
    config = with_explicit_yarn_factor(rope.apply(config))
    refuse_changing_rope(config, "training")
    return config


# Training


def train(
    run: Path,
    recipe: SourceRecipe,
    config: PreTrainedConfig,
    fit: Callable[[Any], bool],
    finish: Callable[[Any], dict[str, str]] = lambda model: {},
) -> None:
    """Train by `fit`, unless the last step is there already, and write the trained checkpoint.

    Args:
        finish: what is done to the trained model before it is written, and the files that are written beside it.
    """
    last = run / "checkpoints" / f"checkpoint-{recipe.train.max_steps}"
    if is_complete(last):  # a kill came between the last step and the export
        model = load(last) if recipe.lora is None else lora.reload(striped_source(recipe, config), last)
        writes = directory.is_first_process()
    else:
        model = striped_source(recipe, config)
        if recipe.lora is not None:
            model = lora.wrap(model, recipe.lora, seed=recipe.train.seed)
        with directory.writing(run):
            writes = fit(model)
    if writes:
        tokens = trainer_state(run, recipe)["num_input_tokens_seen"]
        with directory.writing(run):
            export(
                recipe, model, finish(model), steps=recipe.train.max_steps, tokens=tokens, rope=recipe.rope or "none"
            )


def striped_source(recipe: SourceRecipe, config: PreTrainedConfig) -> PreTrainedModel:
    """The checkpoint to train, with its new config."""
    model = load(
        recipe.model,
        stripes=recipe.stripes,
        rope=recipe.rope,
        dtype=getattr(torch, recipe.lora.base_dtype) if recipe.lora else torch.float32,
        attention_dropout=config.attention_dropout,
    )
    # Only now: the rope was made from what they were.
    model.config.max_position_embeddings = config.max_position_embeddings
    model.config.rope_parameters = config.rope_parameters
    return model
