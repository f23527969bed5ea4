"""Long-context adaptation training (LCAT, Zebra section 4): a checkpoint, striped, trained on long rows, measured.

run/recipe.yaml     the resolved recipe, and run/inputs.json beside it (zebra.train.directory)
run/before.jsonl    the source by position, as it was, and with the new stripes and rope without training
run/checkpoints/    the Trainer's; only those with the mark COMPLETE are resumed from
run/model/          the adapted checkpoint, loadable by plain transformers
run/rows.jsonl      every row, written last: a run that has it is done
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from zebra import records
from zebra.data.corpus import Corpus
from zebra.data.packing import Rows
from zebra.evaluate.perplexity import Score, as_rows, perplexity
from zebra.kernels.precision import fast_float32
from zebra.model.checkpoint import check_weights, digest, fingerprint, load_tokenizer, read_config, read_local
from zebra.model.families import DENSE, striped, stripes_of
from zebra.model.hosts import best_device, device_name, load
from zebra.model.loading import described
from zebra.model.local import Local, layout_with
from zebra.model.rope import as_rope, refuse_changing_rope, settled
from zebra.progress import console
from zebra.records import Row
from zebra.refusal import Refusal
from zebra.stripes import LOCAL, Stripes, visible_pairs
from zebra.train import directory, lora
from zebra.train.export import export, reload
from zebra.train.recipe import AdaptRecipe
from zebra.train.texts import data_rows, read_texts
from zebra.train.trainer import fit, is_complete


def adapt(recipe: AdaptRecipe) -> list[Row]:
    """Run a recipe from where it stands, and return its rows.

    Raises:
        Refusal: what cannot be served, before any training: the checkpoint, the layout, the texts, a run directory
            of another recipe.
    """
    config, tokenizer = _open(recipe)
    faster = fast_float32() if recipe.train.fast_float32 else contextlib.nullcontext()
    with directory.occupied(recipe) as run, faster:
        return _run(run, recipe, config, tokenizer)


def _run(run: Path, recipe: AdaptRecipe, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    if (run / "rows.jsonl").exists() and (done := records.read(run / "rows.jsonl")):
        return done
    rows, held_out, lines, text = read_texts(recipe, tokenizer)
    inputs = {
        "source": digest(recipe.model),
        "text": text,
        "tokenizer": fingerprint(tokenizer),
        "processes": directory.processes(),
    }
    directory.record(run, recipe, inputs)
    before = _before(run, recipe, held_out)
    if not (run / "model").exists():
        _train(run, recipe, config, rows, held_out)
    if not directory.is_first_process():
        return []
    history = _trainer_state(run, recipe)["log_history"]
    after = _measure(recipe, held_out, run / "model", reload(recipe), recipe.rope) if recipe.evaluate else []
    found = [
        *data_rows(recipe, lines, layout_with(config, local_for(recipe)), **_common(recipe)),
        *before,
        *_training_rows(recipe, config, history),
        *after,
        *_cost_rows(recipe, config),
    ]
    records.write(run / "rows.jsonl", found)
    return found


def _open(recipe: AdaptRecipe) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """The config to train, striped, with its rope and long enough, and the tokenizer."""
    if recipe.train.device == "cuda" and not torch.cuda.is_available():
        raise Refusal(
            "the recipe is for a GPU (train.device: cuda) and there is none here. Run it where there is one; "
            "with --set train.device=best it would run on this CPU, at a CPU's speed."
        )
    if recipe.train.fast_float32 and best_device() != "cpu":
        raise Refusal("train.fast_float32 is a switch of CPUs: on a GPU it would mean TF32. Unset it.")
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
    if getattr(config, "output_router_logits", False):
        raise Refusal(
            f"{recipe.model} asks for its router's auxiliary loss (output_router_logits), and adaptation trains on the "
            "language loss alone. Set output_router_logits to false in its config.json to train so."
        )
    if recipe.stripes is not None:
        config = striped(config, Stripes.parse(recipe.stripes))
    config = _with_rope(recipe, config)
    config.max_position_embeddings = max(config.max_position_embeddings, recipe.train.length)
    if config.attention_dropout:
        console.print(f"no kernel drops attention weights: attention_dropout of {config.attention_dropout} becomes 0")
        config.attention_dropout = 0.0
    return config


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
        rows = _measure(recipe, held_out, source, load(source))
        if recipe.stripes is not None or recipe.rope is not None:
            model = load(source, stripes=recipe.stripes, rope=recipe.rope)
            rows += _measure(recipe, held_out, source, model, recipe.rope)
        records.write(kept, rows)
    return records.read(kept)


def _measure(
    recipe: AdaptRecipe, held_out: Corpus | None, checkpoint: Path, model: PreTrainedModel, rope: str | None = None
) -> list[Row]:
    """Rows of one checkpoint by position, and how fast it read; `rope` stands beside the layout."""
    assert recipe.evaluate is not None
    assert held_out is not None
    model.to(best_device())
    start = time.perf_counter()
    asked = recipe.evaluate
    scores = perplexity(model, held_out, length=asked.length, convention=asked.convention, seed=recipe.train.seed)
    seconds = time.perf_counter() - start
    common = _common(recipe) | {"model": str(checkpoint), "layout": described(model, rope)}
    rows = as_rows(scores, recipe.evaluate.length, recipe.evaluate.convention, **common)
    speed = rows[-1].n / seconds if rows[-1].n else 0.0
    return [
        *rows,
        Row(
            task="speed",
            metric="evaluation_tokens_per_second",
            value=speed,
            length=recipe.evaluate.length,
            n=rows[-1].n,
            **common,
        ),
    ]


def local_for(recipe: AdaptRecipe) -> Local:
    """What local layers are trained with: the sinks of the recipe's layout, else what the source's zebra.json says."""
    own = read_local(recipe.model)
    return own if recipe.stripes is None else replace(own, sinks=Stripes.parse(recipe.stripes).sinks)


def _common(recipe: AdaptRecipe) -> dict[str, Any]:
    return {"run": Path(recipe.run).name, "seed": recipe.train.seed, "device": device_name(best_device())}


def _training_rows(recipe: AdaptRecipe, config: PreTrainedConfig, history: list[dict[str, Any]]) -> list[Row]:
    """The loss against tokens, and the evaluations on the way."""
    common = _common(recipe) | {"layout": layout_with(config, local_for(recipe), recipe.rope)}
    rows: list[Row] = []
    for entry in history:
        at = common | {"model": f"{recipe.run}@{entry['step']}"}
        if "loss" in entry:
            rows.append(
                Row(
                    task="train",
                    metric="loss",
                    value=entry["loss"],
                    length=recipe.train.length,
                    n=entry["num_input_tokens_seen"],
                    **at,
                )
            )
        if "by_position" in entry and recipe.evaluate is not None:
            scores = [Score(**score) for score in entry["by_position"]]
            rows += as_rows(scores, recipe.evaluate.length, recipe.evaluate.convention, **at)
    return rows


def _cost_rows(recipe: AdaptRecipe, config: PreTrainedConfig) -> list[Row]:
    """What one text of the longest measured length costs in attention, dense and striped: exact counts."""
    length = max(recipe.train.length, recipe.evaluate.length if recipe.evaluate else 0)
    stripes = stripes_of(config)
    n = config.num_hidden_layers
    local = (stripes.layer_types(n) if stripes else ()).count(LOCAL)
    window = stripes.window if stripes else length
    does = local_for(recipe)
    rows = []
    for name, locals_ in dict.fromkeys([(DENSE, 0), (layout_with(config, does), local)]):
        pairs = (n - locals_) * visible_pairs(length) + locals_ * visible_pairs(length, window, does.sinks)
        held = length if does.full_decode else min(length, window - 1) + does.sinks
        kept = (n - locals_) * length + locals_ * held
        for metric, value in (("layers", n), ("attention_pairs", pairs), ("cached_tokens", kept)):
            rows.append(
                Row(
                    task="cost",
                    metric=metric,
                    value=value,
                    length=length,
                    model=recipe.model,
                    layout=name,
                    **_common(recipe),
                )
            )
    return rows


# Training


def _train(run: Path, recipe: AdaptRecipe, config: PreTrainedConfig, rows: Rows, held_out: Corpus | None) -> None:
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
            writes = fit(recipe, model, rows, held_out, run / "checkpoints")
    if writes:
        tokens = _trainer_state(run, recipe)["num_input_tokens_seen"]
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


def _trainer_state(run: Path, recipe: AdaptRecipe) -> dict[str, Any]:
    """What the Trainer wrote of itself after the last step."""
    path = run / "checkpoints" / f"checkpoint-{recipe.train.steps}" / "trainer_state.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise Refusal(
            f"{path} is gone or damaged, and with it the losses of the run. Remove {run / 'model'} to train on from "
            "the last whole checkpoint, or name another run."
        ) from None
