"""Long-context adaptation training (LCAT, Zebra section 4): a checkpoint, striped, trained on long rows, measured.

run/recipe.yaml     the resolved recipe, and run/inputs.json beside it (zebra.train.directory)
run/before.jsonl    the source by position, as it was, and with the new stripes and rope without training
run/checkpoints/    the Trainer's; only those with the mark COMPLETE are resumed from
run/model/          the adapted checkpoint, loadable by plain transformers
run/rows.jsonl      every row, written last: a run that has it is done
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from zebra import records
from zebra.data.corpus import Corpus
from zebra.model.checkpoint import check_weights, digest, fingerprint, load_tokenizer, read_config
from zebra.model.families import layout, striped
from zebra.model.hosts import load
from zebra.model.rope import as_rope, refuse_changing_rope, settled
from zebra.records import Row
from zebra.refusal import Refusal
from zebra.stripes import Stripes
from zebra.train import directory, lora
from zebra.train.export import export, reload
from zebra.train.measuring import common, cost_rows, measure, trainer_state, training_rows
from zebra.train.recipe import AdaptRecipe
from zebra.train.texts import Texts, data_rows, read_texts
from zebra.train.trainer import check_machine, fit, is_complete, precision, trainable


def adapt(recipe: AdaptRecipe) -> list[Row]:
    """Run a recipe from where it stands, and return its rows.

    Raises:
        Refusal: what cannot be served, before any training: the checkpoint, the layout, the texts, a run directory
            of another recipe.
    """
    config, tokenizer = _open(recipe)
    with directory.occupied(recipe) as run, precision(recipe.train):
        return _run(run, recipe, config, tokenizer)


def _run(run: Path, recipe: AdaptRecipe, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    if (run / "rows.jsonl").exists() and (done := records.read(run / "rows.jsonl")):
        return done
    texts = read_texts(recipe, tokenizer)
    inputs = {
        "source": digest(recipe.model),
        "text": texts.digest,
        "tokenizer": fingerprint(tokenizer),
        "processes": directory.processes(),
    }
    directory.record(run, recipe, inputs)
    before = _before(run, recipe, texts.held_out)
    if not (run / "model").exists():
        _train(run, recipe, config, texts)
    if not directory.is_first_process():
        return []
    history = trainer_state(run, recipe)["log_history"]
    after = measure(recipe, texts.held_out, run / "model", reload(recipe), recipe.rope) if recipe.evaluate else []
    found = [
        *data_rows(recipe, texts.lines, model=recipe.model, layout=layout(config), **common(recipe)),
        *before,
        *training_rows(recipe, config, history, recipe.rope),
        *after,
        *cost_rows(recipe, config, recipe.model),
    ]
    records.write(run / "rows.jsonl", found)
    return found


def _open(recipe: AdaptRecipe) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """The config to train, striped, with its rope and long enough, and the tokenizer."""
    check_machine(recipe.train)
    config = read_config(recipe.model)
    if not Path(recipe.model).is_dir():
        raise Refusal(f"the model of a recipe is a directory; got {recipe.model}. Download the checkpoint first.")
    tokenizer = load_tokenizer(recipe.model, config)
    config = adapted(recipe, config)
    check_weights(recipe.model, config)
    if recipe.data.append_eos and tokenizer.eos_token_id is None:
        raise Refusal(
            f"data.append_eos is set, but the tokenizer of {recipe.model} has no end-of-text token. Unset it."
        )
    return config, tokenizer


def adapted(recipe: AdaptRecipe, config: PreTrainedConfig) -> PreTrainedConfig:
    """The config that a recipe makes of its source's.

    Raises:
        Refusal: a layout or a rope that does not fit, a router that wants a loss of its own.
    """
    if recipe.stripes is not None:
        config = striped(config, Stripes.parse(recipe.stripes))
    config = _with_rope(recipe, config)
    config.max_position_embeddings = max(config.max_position_embeddings, recipe.train.length)
    return trainable(config, recipe.model)


def _with_rope(recipe: AdaptRecipe, config: PreTrainedConfig) -> PreTrainedConfig:
    rope = as_rope(recipe.rope)
    reach = rope.reaches(config)
    if reach is not None and reach < recipe.train.length:
        raise Refusal(
            f"the rope {rope} reaches {reach:,} positions of a model of {config.max_position_embeddings:,}, and "
            f"train.length is {recipe.train.length:,}. Take a factor of at least "
            f"{math.ceil(recipe.train.length / config.max_position_embeddings)}."
        )
    config = settled(rope.changed(config))
    refuse_changing_rope(config)
    return config


# Measuring


def _before(run: Path, recipe: AdaptRecipe, held_out: Corpus | None) -> list[Row]:
    if recipe.evaluate is None:
        return []
    kept = run / "before.jsonl"
    if not kept.exists():
        source = Path(recipe.model)
        rows = measure(recipe, held_out, source, load(source))
        if recipe.stripes is not None or recipe.rope is not None:
            model = load(source, stripes=recipe.stripes, rope=recipe.rope)
            rows += measure(recipe, held_out, source, model, recipe.rope)
        records.write(kept, rows)
    return records.read(kept)


# Training


def _train(run: Path, recipe: AdaptRecipe, config: PreTrainedConfig, texts: Texts) -> None:
    """Train, and write the adapted checkpoint."""
    last = run / "checkpoints" / f"checkpoint-{recipe.train.steps}"
    if is_complete(last):  # a kill came between the last step and the export
        model = load(last) if recipe.lora is None else lora.reload(_source(recipe, config), last)
        writes = directory.is_first_process()
    else:
        model = _source(recipe, config)
        if recipe.lora is not None:
            model = lora.wrap(model, recipe.lora, seed=recipe.train.seed)
        with directory.writing(run):
            writes = fit(recipe, model, texts.rows, texts.held_out, run / "checkpoints")
    if writes:
        tokens = trainer_state(run, recipe)["num_input_tokens_seen"]
        with directory.writing(run):
            export(recipe, model, steps=recipe.train.steps, tokens=tokens, rope=recipe.rope or "none")


def _source(recipe: AdaptRecipe, config: PreTrainedConfig) -> PreTrainedModel:
    """The checkpoint to train, with its new config."""
    model = load(
        recipe.model,
        stripes=recipe.stripes,
        rope=recipe.rope,
        dtype=getattr(torch, recipe.lora.frozen) if recipe.lora else torch.float32,
        attention_dropout=config.attention_dropout,
    )
    # Only now: the rope was made from what they were.
    model.config.max_position_embeddings = config.max_position_embeddings
    model.config.rope_parameters = config.rope_parameters
    return model
