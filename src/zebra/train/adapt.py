"""Long-context adaptation training (LCAT, Zebra section 4): a checkpoint, striped, trained on long rows, measured.

run/recipe.yaml     the resolved recipe; a second start of the same recipe resumes, of another is refused
run/before.jsonl    the source by position, as it was, and with the new stripes and rope without training
run/checkpoints/    the Trainer's; only those with the mark COMPLETE are resumed from
run/model/          the adapted checkpoint, loadable by plain transformers
run/rows.jsonl      every row, written last: a run that has it is done
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from zebra import records
from zebra.data.corpus import Corpus
from zebra.data.packing import Rows, pack
from zebra.evaluate.perplexity import Score, as_rows, perplexity, read_text
from zebra.model.checkpoint import (
    check_weights,
    copy_companions,
    load_tokenizer,
    read_config,
    write_card,
    write_config,
)
from zebra.model.families import DENSE, layout, striped, stripes_of
from zebra.model.hosts import best_device, device_name, load
from zebra.model.rope import Rope, refuse_changing_rope
from zebra.records import Row
from zebra.refusal import Refusal
from zebra.staged import staged
from zebra.stripes import LOCAL, Stripes, visible_pairs
from zebra.train.recipe import AdaptRecipe, TextSource
from zebra.train.trainer import COMPLETE, fit, tokens_per_step


def adapt(recipe: AdaptRecipe) -> list[Row]:
    """Run a recipe from where it stands, and return its rows.

    Raises:
        Refusal: what cannot be served, before any training: the checkpoint, the layout, the texts, a run directory
            of another recipe.
    """
    run = Path(recipe.run)
    config, tokenizer = _open(recipe)
    _claim(run, recipe)
    if (run / "rows.jsonl").exists():
        return records.read(run / "rows.jsonl")
    corpus = _corpus(recipe.data, tokenizer, recipe.data.cache)
    rows = pack(corpus, recipe.train.length, join=recipe.data.join, seed=recipe.train.seed)
    held_out = None
    if recipe.evaluate is not None:
        held_out = _corpus(recipe.evaluate, tokenizer, recipe.data.cache)
        if recipe.evaluate.join:
            held_out = held_out.joined(recipe.evaluate.length)
    _record_recipe(run, recipe)
    before = _before(run, recipe, held_out)
    if not (run / "model").exists():
        _train(run, recipe, config, rows, held_out)
    if os.environ.get("RANK", "0") != "0":  # under a launcher one process writes the results
        return []
    history = _trainer_state(run, recipe)["log_history"]
    after = _measure(recipe, held_out, run / "model") if recipe.evaluate else []
    found = [*before, *_training_rows(recipe, config, history), *after, *_cost_rows(recipe, config)]
    records.write(run / "rows.jsonl", found)
    return found


def _open(recipe: AdaptRecipe) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """The config to train, striped, with its rope and long enough, and the tokenizer."""
    config = read_config(recipe.model)
    if not Path(recipe.model).is_dir():
        raise Refusal(f"the model of a recipe is a directory; got {recipe.model}. Download the checkpoint first.")
    tokenizer = load_tokenizer(recipe.model, config)
    if recipe.stripes is not None:
        config = striped(config, Stripes.parse(recipe.stripes))
    config = _with_rope(recipe, config)
    if getattr(config, "output_router_logits", False):
        raise Refusal(
            f"{recipe.model} asks for its router's auxiliary loss (output_router_logits), and adaptation trains on the "
            "language loss alone. Set output_router_logits to false in its config.json to train so."
        )
    check_weights(recipe.model, config)
    if recipe.data.append_eos and tokenizer.eos_token_id is None:
        raise Refusal(
            f"data.append_eos is set, but the tokenizer of {recipe.model} has no end-of-text token. Unset it."
        )
    config.max_position_embeddings = max(config.max_position_embeddings, recipe.train.length)
    return config, tokenizer


def _with_rope(recipe: AdaptRecipe, config: PreTrainedConfig) -> PreTrainedConfig:
    rope = Rope.parse(recipe.rope or "none")
    reach = rope.reaches(config)
    if reach is not None and reach < recipe.train.length:
        raise Refusal(
            f"the rope {rope} reaches {reach:,} positions of a model of {config.max_position_embeddings:,}, and "
            f"train.length is {recipe.train.length:,}. Take a factor of at least "
            f"{math.ceil(recipe.train.length / config.max_position_embeddings)}."
        )
    config = rope.changed(config)
    refuse_changing_rope(config)
    return config


def _claim(run: Path, recipe: AdaptRecipe) -> None:
    """The run directory belongs to one recipe."""
    mine = run / "recipe.yaml"
    if mine.exists():
        theirs = AdaptRecipe.model_validate(yaml.safe_load(mine.read_text(encoding="utf-8")))
        if theirs != recipe:
            different = sorted(_flat(recipe.model_dump()).items() ^ _flat(theirs.model_dump()).items())
            raise Refusal(
                f"{run} holds a run of another recipe: {', '.join(sorted({name for name, _ in different}))} differ. "
                "Name another run, or remove the directory."
            )
    elif run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise Refusal(f"{run} exists and is no run of zebra: it has no recipe.yaml. Name another run.")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: repr(value)}
    return flat


def _record_recipe(run: Path, recipe: AdaptRecipe) -> None:
    run.mkdir(parents=True, exist_ok=True)
    aside = run / f".recipe.{os.getpid()}"
    aside.write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    os.replace(aside, run / "recipe.yaml")


def _corpus(source: TextSource, tokenizer: PreTrainedTokenizerBase, cache: str | None) -> Corpus:
    return read_text(source.files, tokenizer, separator=source.separator, append_eos=source.append_eos, cache=cache)


# Measuring


def _before(run: Path, recipe: AdaptRecipe, held_out: Corpus | None) -> list[Row]:
    if recipe.evaluate is None:
        return []
    kept = run / "before.jsonl"
    if not kept.exists():
        rows = _measure(recipe, held_out, Path(recipe.model))
        if recipe.stripes is not None or recipe.rope is not None:
            rows += _measure(recipe, held_out, Path(recipe.model), recipe.stripes, recipe.rope)
        records.write(kept, rows)
    return records.read(kept)


def _measure(
    recipe: AdaptRecipe, held_out: Corpus | None, checkpoint: Path, stripes: str | None = None, rope: str | None = None
) -> list[Row]:
    """Rows of one checkpoint by position, and how fast it read."""
    assert recipe.evaluate is not None
    assert held_out is not None
    model = load(checkpoint, stripes=stripes, rope=rope).to(best_device())
    start = time.perf_counter()
    asked = recipe.evaluate
    scores = perplexity(model, held_out, length=asked.length, convention=asked.convention, seed=recipe.train.seed)
    seconds = time.perf_counter() - start
    changed = checkpoint != Path(recipe.model) or rope is not None
    named = _named(recipe, model.config) if changed else layout(model.config)
    common = _common(recipe) | {"model": str(checkpoint), "layout": named}
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


def _named(recipe: AdaptRecipe, config: PreTrainedConfig) -> str:
    """The layout as rows call it, with the rope beside it that the recipe gives."""
    return " ".join(filter(None, (layout(config), recipe.rope)))


def _common(recipe: AdaptRecipe) -> dict[str, Any]:
    return {"run": Path(recipe.run).name, "seed": recipe.train.seed, "device": device_name(best_device())}


def _training_rows(recipe: AdaptRecipe, config: PreTrainedConfig, history: list[dict[str, Any]]) -> list[Row]:
    """The loss against tokens, and the evaluations on the way."""
    common = _common(recipe) | {"layout": _named(recipe, config)}
    step_tokens = tokens_per_step(recipe)
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
                    n=entry["step"] * step_tokens,
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
    rows = []
    for name, locals_ in dict.fromkeys([(DENSE, 0), (layout(config), local)]):
        pairs = (n - locals_) * visible_pairs(length) + locals_ * visible_pairs(length, window)
        kept = (n - locals_) * length + locals_ * min(length, window - 1)
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
    if (last / COMPLETE).exists():  # a kill came between the last step and the export
        _export(run, recipe, load(last))
        return
    model = load(recipe.model, stripes=recipe.stripes, rope=recipe.rope, dtype=torch.float32)
    model.config.max_position_embeddings = config.max_position_embeddings
    if fit(recipe, model, rows, held_out, run / "checkpoints"):
        _export(run, recipe, model)


def _trainer_state(run: Path, recipe: AdaptRecipe) -> dict[str, Any]:
    """What the Trainer wrote of itself after the last step."""
    path = run / "checkpoints" / f"checkpoint-{recipe.train.steps}" / "trainer_state.json"
    return json.loads(path.read_text(encoding="utf-8"))


def _export(run: Path, recipe: AdaptRecipe, model: PreTrainedModel) -> None:
    """Write the adapted checkpoint, whole or not at all."""
    source = Path(recipe.model)
    with staged(run / "model") as aside:
        model.save_pretrained(aside)
        written = {file.name for file in aside.iterdir()}
        copy_companions(source, aside, [file for file in source.iterdir() if file.name in written or _is_weights(file)])
        write_config(model.config, aside)
        write_card(
            aside,
            model.config,
            source=source,
            steps=recipe.train.steps,
            tokens=recipe.train.steps * tokens_per_step(recipe),
            rope=recipe.rope or "none",
        )


def _is_weights(file: Path) -> bool:
    return file.suffix in (".safetensors", ".bin") or file.name.endswith(".index.json")
