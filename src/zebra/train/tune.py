"""Long instruction tuning (LIT, Zebra section 4): a checkpoint trained on the answers of short and long conversations.

run/recipe.yaml     the resolved recipe, and run/inputs.json beside it (zebra.train.directory)
run/before.jsonl    the loss on the suites' answers, as it was, and with the new stripes and rope without training
run/checkpoints/    the Trainer's; only those with the mark COMPLETE are resumed from
run/model/          the tuned checkpoint with its chat template, loadable by plain transformers
run/results.jsonl      every row, written last: a run that has it is done
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from zebra.data.composition import KindStats
from zebra.data.encoding import tokenizer_digest
from zebra.errors import ZebraError
from zebra.evaluate.answers import AnswerScore, answer_score
from zebra.model.checkpoint import checkpoint_digest
from zebra.model.load import best_device, load
from zebra.model.load_options import loaded_layout_name
from zebra.model.local import layout_name
from zebra.results import Result, read_results, write_results
from zebra.train import directory, measuring
from zebra.train.adapt import open_source, train
from zebra.train.chat import Chat
from zebra.train.export import reload
from zebra.train.instructions import Instructions, read_instructions
from zebra.train.measuring import columns_of, cost_rows, local_for, trainer_state, training_rows
from zebra.train.texts import data_rows
from zebra.train.tune_recipe import TuneRecipe

try:
    from zebra.train.sft import fit_answers
except ImportError as error:
    raise ZebraError(f"tuning needs trl and datasets ({error}). Run pip install 'zebra-llm[tune]'.") from None


def tune(recipe: TuneRecipe) -> list[Result]:
    """Run a recipe from where it stands, and return its rows.

    Raises:
        ZebraError: what cannot be served, before any training: the checkpoint, its chat template, the conversations, a
            run directory of another recipe.
    """
    config, tokenizer = open_source(recipe)
    chat = Chat(tokenizer, recipe.chat_template, recipe.model)
    with directory.occupied(recipe) as run:
        return _run(run, recipe, config, chat)


def _run(run: Path, recipe: TuneRecipe, config: PreTrainedConfig, chat: Chat) -> list[Result]:
    if (run / "results.jsonl").exists() and (done := read_results(run / "results.jsonl")):
        return done
    data = read_instructions(recipe, chat, lambda: load(recipe.model).to(best_device()))
    inputs = {
        "source": checkpoint_digest(recipe.model),
        "conversations": data.digest,
        "tokenizer": tokenizer_digest(chat.tokenizer),
        "processes": directory.processes(),
    }
    directory.record(run, recipe, inputs)
    before = measuring.before(run, recipe, partial(_measure, recipe, data))
    if not (run / "model").exists():
        train(
            run,
            recipe,
            config,
            lambda model: fit_answers(recipe, model, chat.tokenizer, data.rows, data.suites, run / "checkpoints"),
            lambda model: _finished(recipe, model, config, chat),
        )
    if not directory.is_first_process():
        return []
    history = trainer_state(run, recipe)["log_history"]
    after = _measure(recipe, data, run / "model", reload(recipe), recipe.rope) if recipe.evaluate else []
    layout = layout_name(config, local_for(recipe))
    found = [
        *data_rows(recipe, data.lines, model=recipe.model, layout=layout, **columns_of(recipe)),
        *_made_of(recipe, data.rows.portions(), layout),
        *_counted(recipe, data.counts, layout),
        *before,
        *training_rows(recipe, config, history, partial(_on_the_way, recipe), recipe.rope),
        *after,
        *cost_rows(recipe, config, recipe.model),
    ]
    write_results(run / "results.jsonl", found)
    return found


_OF_THE_TRAINER = ("pad_token_id", "bos_token_id", "eos_token_id", "router_aux_loss_coef", "output_router_logits")


def _finished(recipe: TuneRecipe, model: Any, config: PreTrainedConfig, chat: Chat) -> dict[str, str]:
    """Undo what trl wrote into the configs for itself, let generation stop where answers end, give the template."""
    host = model.get_base_model() if hasattr(model, "get_base_model") else model
    for name in _OF_THE_TRAINER:
        if hasattr(config, name):
            setattr(host.config, name, getattr(config, name))
    try:
        generation = GenerationConfig.from_pretrained(recipe.model)
    except OSError:  # the source has none: its class makes one of the config
        generation = GenerationConfig.from_model_config(config)
    ends = generation.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if chat.stop is not None and chat.stop not in ends:
        generation.eos_token_id = [*ends, chat.stop]
    host.generation_config = generation
    return {} if recipe.chat_template is None else {"chat_template.jinja": chat.template}


# Measuring


def _measure(
    recipe: TuneRecipe, data: Instructions, checkpoint: Path, model: PreTrainedModel, rope: str | None = None
) -> list[Result]:
    model.to(best_device())
    common = columns_of(recipe) | {"model": str(checkpoint), "layout": loaded_layout_name(model, rope)}
    return [
        _answer_row(recipe, answer_score(name, model, found, seed=recipe.train.seed), common)
        for name, found in data.suites.items()
    ]


def _answer_row(recipe: TuneRecipe, score: AnswerScore, common: dict[str, Any]) -> Result:
    return Result(
        task=f"answers-{score.suite}",
        metric="answer_loss",
        value=score.loss,
        low=score.low,
        high=score.high,
        n=score.tokens,
        length=recipe.train.length,
        **common,
    )


def _made_of(recipe: TuneRecipe, portions: list[KindStats], layout: str) -> list[Result]:
    """What is trained on by kind and length: `position_from` and `position_to` bound the conversation's tokens."""
    return [
        Result(
            task=f"instructions-{one.kind}",
            metric=metric,
            value=value,
            n=one.samples,
            position_from=one.low,
            position_to=one.high,
            length=recipe.train.length,
            model=recipe.model,
            layout=layout,
            **columns_of(recipe),
        )
        for one in portions
        for metric, value in (("samples", one.samples), ("tokens", one.tokens), ("answer_tokens", one.answer_tokens))
    ]


def _counted(recipe: TuneRecipe, counts: dict[str, int], layout: str) -> list[Result]:
    """What the gate found and what was cut."""
    common = columns_of(recipe) | {"model": recipe.model, "layout": layout, "length": recipe.train.length}
    return [Result(task="quality", metric=name, value=count, **common) for name, count in counts.items()]


def _on_the_way(recipe: TuneRecipe, entry: dict[str, Any], at: dict[str, Any]) -> list[Result]:
    """The suites, where the Trainer's history has them."""
    return [_answer_row(recipe, AnswerScore(**score), at) for score in entry.get("answers", [])]
