"""Training from scratch: a config of transformers, a tokenizer, text and generated recall, trained and measured.

run/recipe.yaml, run/inputs.json, run/checkpoints/, run/model/, run/results.jsonl    as in zebra.train.adapt
run/tokenizer/      the tokenizer, where the recipe trains one
"""

from __future__ import annotations

import difflib
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from zebra.data.encoding import tokenizer_digest
from zebra.data.recall import RecallDataset
from zebra.errors import ZebraError, first_line
from zebra.files import atomic_directory
from zebra.model.attention import NAME
from zebra.model.checkpoint import load_tokenizer, write_config, write_zebra_json
from zebra.model.default_cache import with_default_cache
from zebra.model.families import layer_kinds, model_class, route_of, with_stripes
from zebra.model.load import load
from zebra.model.local import LocalAttention, layout_name, local_attention_of, set_local_attention
from zebra.model.self_extend import check_learned_positions
from zebra.results import Result, read_results, write_results
from zebra.stripes import GLOBAL, Stripes
from zebra.train import directory
from zebra.train.measuring import (
    by_position,
    columns_of,
    cost_rows,
    local_for,
    measure,
    trainer_state,
    training_rows,
)
from zebra.train.recipe import NewTokenizer, PretrainRecipe
from zebra.train.texts import Texts, data_rows, read_texts
from zebra.train.tokenizer import texts_of, train_tokenizer
from zebra.train.trainer import check_machine, fit, is_complete, tokens_per_step, trainable


def pretrain(recipe: PretrainRecipe) -> list[Result]:
    """Run a recipe from where it stands, and return its rows.

    Raises:
        ZebraError: what cannot be served, before any training: the config, the tokenizer, the texts, a run directory of
            another recipe. During it: a loss that is not finite.
    """
    check_machine(recipe.train)
    config_of(recipe)
    with directory.occupied(recipe) as run:
        return _run(run, recipe)


def _run(run: Path, recipe: PretrainRecipe) -> list[Result]:
    if (run / "results.jsonl").exists() and (done := read_results(run / "results.jsonl")):
        return done
    tokenizer = _tokenizer(run, recipe)
    config = config_of(recipe, tokenizer)
    texts = read_texts(recipe, tokenizer)
    check_step(recipe, texts)
    inputs = {"text": texts.digest, "tokenizer": tokenizer_digest(tokenizer), "processes": directory.processes()}
    directory.record(run, recipe, inputs)
    if not (run / "model").exists():
        _train(run, recipe, config, tokenizer, texts)
    if not directory.is_first_process():
        return []
    at = {"model": str(run / "model"), "layout": layout_name(config, local_for(recipe))} | columns_of(recipe)
    found = [
        *data_rows(recipe, texts.lines, **at),
        *training_rows(recipe, config, trainer_state(run, recipe)["log_history"], by_position(recipe)),
        *(measure(recipe, texts.held_out, run / "model", load(run / "model")) if recipe.evaluate else []),
        *cost_rows(recipe, config, str(run / "model")),
    ]
    write_results(run / "results.jsonl", found)
    return found


# The model and its tokenizer


def config_of(recipe: PretrainRecipe, tokenizer: PreTrainedTokenizerBase | None = None) -> PreTrainedConfig:
    """The config that a recipe's `model` describes, with its stripes, and with what it leaves to the tokenizer.

    Raises:
        ZebraError: a model_type or a field that transformers does not have, a family or a layout that zebra does not
            serve, a model too short for the rows, a vocabulary of another size than the tokenizer's, a layout that
            contradicts the sizes.
    """
    given = dict(recipe.model)
    kind = given.pop("model_type")
    if kind not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(kind), CONFIG_MAPPING.keys(), n=1)
        raise ZebraError(f"transformers has no model_type {kind!r}" + (f"; did you mean {near[0]}?" if near else "."))
    known = {f.name for f in fields(CONFIG_MAPPING[kind])}
    if unknown := sorted(set(given) - known):
        near = difflib.get_close_matches(unknown[0], sorted(known), n=1)
        raise ZebraError(
            f"a config of {kind} has no field {unknown[0]}" + (f"; did you mean {near[0]}?" if near else ".")
        )
    if recipe.stripes is not None and given.get("attention_kinds") is not None:
        raise ZebraError("model.attention_kinds and stripes both name the layers' kinds. Leave one of them out.")
    if tokenizer is None and isinstance(recipe.tokenizer, str):
        tokenizer = load_tokenizer(recipe.tokenizer)
    given = {"max_position_embeddings": recipe.train.length} | _tokens(recipe, tokenizer) | given
    try:
        config = AutoConfig.for_model(kind, **given)
        route_of(config)
        if recipe.stripes is not None:
            config = with_stripes(config, Stripes.parse(recipe.stripes))
        with torch.device("meta"):
            model_class(config)(config)
    except (StrictDataclassError, ValueError, TypeError, RuntimeError, ArithmeticError, KeyError) as error:
        raise ZebraError(f"the fields of model describe no {kind}: {first_line(error)}") from None
    if config.max_position_embeddings < recipe.train.length:
        raise ZebraError(
            f"model.max_position_embeddings is {config.max_position_embeddings:,}, fewer than train.length, "
            f"{recipe.train.length:,}. Leave it out to take train.length."
        )
    read = max(recipe.longest, (recipe.evaluate and recipe.evaluate.beyond) or 0)
    check_learned_positions(config, read)
    _check_layout(recipe, config)
    return trainable(config, "model")


def _check_layout(recipe: PretrainRecipe, config: PreTrainedConfig) -> None:
    """A training from scratch chooses its sizes: a layout that they leave no meaning is a mistake.

    Raises:
        ZebraError: a group larger than the depth, a window beyond the rows.
    """
    pattern, layers = recipe.stripes and Stripes.parse(recipe.stripes).pattern, config.num_hidden_layers
    if pattern and len(pattern) > layers:
        raise ZebraError(
            f"stripes {recipe.stripes} has groups of {len(pattern)} layers, and the model has {layers}. "
            f"Take a group of at most {layers}."
        )
    window, rows = getattr(config, "sliding_window", None), recipe.train.length
    if window and window > rows and {*layer_kinds(config)} != {GLOBAL}:
        raise ZebraError(
            f"the window of {window:,} tokens is beyond train.length, {rows:,}: local layers would see all of a row. "
            f"Take a window of at most {rows:,}."
        )


def _tokens(recipe: PretrainRecipe, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """What a config takes from the tokenizer; of one that is yet to be trained that is its size."""
    size = recipe.tokenizer.vocab_size if isinstance(recipe.tokenizer, NewTokenizer) else len(tokenizer or ())
    if recipe.model.get("vocab_size", size) != size:
        raise ZebraError(
            f"model.vocab_size is {recipe.model['vocab_size']:,}, and the tokenizer has {size:,} tokens. "
            "Leave it out to take the tokenizer's."
        )
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
    return {"vocab_size": size} | ids


def _tokenizer(run: Path, recipe: PretrainRecipe) -> PreTrainedTokenizerBase:
    if isinstance(recipe.tokenizer, str):
        return load_tokenizer(recipe.tokenizer)
    if (run / "tokenizer").is_dir():
        return load_tokenizer(run / "tokenizer")
    return train_tokenizer(texts_of(recipe), recipe.tokenizer)


# Training


def check_step(recipe: PretrainRecipe, texts: Texts) -> None:
    """Refuse a text with fewer rows than one step takes: there is nothing to learn a language from."""
    length, step = recipe.train.length, tokens_per_step(recipe) // recipe.train.length
    there = len(texts.rows.text if isinstance(texts.rows, RecallDataset) else texts.rows)
    if texts.lines:  # a mixture repeats its sources until its rows are full
        there = min(there, sum(line.tokens for line in texts.lines) // length)
    if there < step:
        raise ZebraError(
            f"the text has {there:,} rows of {length:,} tokens, fewer than the {step:,} of one step. "
            "Give more text, or take shorter or fewer rows."
        )


def _train(
    run: Path,
    recipe: PretrainRecipe,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    texts: Texts,
) -> None:
    """Train, and write the checkpoint."""
    if not (run / "tokenizer").exists() and directory.is_first_process():
        with atomic_directory(run / "tokenizer") as aside:
            tokenizer.save_pretrained(aside)
    last = run / "checkpoints" / f"checkpoint-{recipe.train.max_steps}"
    if is_complete(last):  # a kill came between the last step and the export
        model: Any = load(last)
        writes = directory.is_first_process()
    else:
        model = _random(config, local_for(recipe), recipe.train.seed)
        with directory.writing(run):
            writes = fit(recipe, model, texts.rows, texts.held_out, run / "checkpoints")
    if not writes:
        return
    tokens = trainer_state(run, recipe)["num_input_tokens_seen"]
    with directory.writing(run), atomic_directory(run / "model") as aside:
        model.to(getattr(torch, recipe.dtype))
        model.config.use_cache = True  # the Trainer turns it off for itself
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        write_config(model.config, aside)
        write_zebra_json(
            aside, model.config, local_attention_of(model), source=None, steps=recipe.train.max_steps, tokens=tokens
        )


def _random(config: PreTrainedConfig, local: LocalAttention, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        host: Any = with_default_cache(model_class(config))  # type: ignore[arg-type]
        model: PreTrainedModel = host._from_config(config, attn_implementation=NAME, dtype=torch.float32)
    if local:
        set_local_attention(model, local)
    return model
