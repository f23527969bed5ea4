"""One training, from its recipe to its results.

run/recipe.yaml      the resolved recipe, and run/inputs.json beside it (zebra.train.directory)
run/before.jsonl     results of the source, as it was and with its new stripes and rope, before any training
run/checkpoints/     the Trainer's; only those with the mark COMPLETE are resumed from
run/model/           the trained checkpoint, loadable by plain transformers
run/results.jsonl    all results, written last: a run that has it is done

`adapt`, `tune` and `pretrain` say what differs: what the training starts from, and what it trains and is measured on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedConfig, PreTrainedModel, Trainer

from zebra.model.local import layout_name
from zebra.results import Result, read_results, write_results
from zebra.train import directory
from zebra.train.measuring import common_columns, cost_results, local_attention_for, trainer_state, training_results
from zebra.train.recipe import Recipe
from zebra.train.trainer import is_complete, run_trainer


class Start(Protocol):
    """What a training starts from: a checkpoint (`zebra.train.source`) or random weights (`zebra.train.pretrain`).

    Attributes:
        config: of the model that is trained.
        name: the model in results.
        rope: the change of rope that results name beside the layout.
    """

    config: PreTrainedConfig
    name: str
    rope: str | None

    def digests(self) -> dict[str, str]:
        """Digests of the files that it reads, by name."""

    def untrained(self) -> Iterator[tuple[PreTrainedModel, str | None]]:
        """The models that are measured before training, each with its change of rope."""

    def build(self) -> PreTrainedModel:
        """The model at the first step."""

    def restore(self, checkpoint: Path) -> PreTrainedModel:
        """The model of one of the Trainer's checkpoints."""

    def export(self, model: PreTrainedModel, tokens: int) -> None:
        """Write `run/model`, whole or not at all, of a model that was trained on so many tokens."""

    def exported(self) -> PreTrainedModel:
        """The model of `run/model`."""


class TrainingData(Protocol):
    """What is trained and measured on: texts (`zebra.train.text_training`) or conversations (`zebra.train.sft`).

    Attributes:
        digests: of all that is read, by name.
    """

    digests: dict[str, str]

    def trainer(self, model: PreTrainedModel, checkpoints: Path) -> Trainer:
        """The Trainer that trains the model on it."""

    def measure(self, checkpoint: Path, model: PreTrainedModel, rope: str | None) -> list[Result]:
        """Results of a model under the name of its checkpoint."""

    def logged_results(self, entry: dict[str, Any], columns: dict[str, Any]) -> list[Result]:
        """Results of an evaluation during training, from one entry of the Trainer's history."""

    def composition(self, columns: dict[str, Any]) -> list[Result]:
        """What the training data consist of."""


def run_recipe(recipe: Recipe, prepare: Callable[[Path], tuple[Start, TrainingData]]) -> list[Result]:
    """Run a recipe from where it stands, and return its results; none in any but the first process.

    Args:
        prepare: opens what the training starts from and reads its data, once this process holds the directory.

    Raises:
        ZebraError: a directory of another recipe or of other inputs; another process at work in it; a loss that is
            not finite; whatever `prepare` raises.
    """
    with directory.locked_run(recipe) as run:
        if (run / "results.jsonl").exists() and (results := read_results(run / "results.jsonl")):
            return results
        start, data = prepare(run)
        inputs = start.digests() | data.digests | {"processes": directory.processes()}
        directory.record_inputs(run, recipe, inputs)
        before = _before(run, recipe, start, data)
        if not (run / "model").exists():
            _train(run, recipe, start, data)
        if not directory.is_first_process():
            return []
        history = trainer_state(run, recipe)["log_history"]
        after = data.measure(run / "model", start.exported(), start.rope) if recipe.evaluate else []
        layout = layout_name(start.config, local_attention_for(recipe))
        results = [
            *data.composition(common_columns(recipe) | {"model": start.name, "layout": layout}),
            *before,
            *training_results(recipe, start.config, history, data.logged_results, start.rope),
            *after,
            *cost_results(recipe, start.config, start.name),
        ]
        write_results(run / "results.jsonl", results)
        return results


def _before(run: Path, recipe: Recipe, start: Start, data: TrainingData) -> list[Result]:
    """Results before training: measured once, then read."""
    file = run / "before.jsonl"
    if recipe.evaluate is None:
        return []
    if file.exists():
        return read_results(file)
    results = [result for model, rope in start.untrained() for result in data.measure(Path(start.name), model, rope)]
    if results:
        write_results(file, results)
    return results


def _train(run: Path, recipe: Recipe, start: Start, data: TrainingData) -> None:
    """Train, unless the last step is there already, and write the trained checkpoint."""
    last = run / "checkpoints" / f"checkpoint-{recipe.train.max_steps}"
    if is_complete(last):  # a kill came between the last step and the export
        model = start.restore(last)
    else:
        model = start.build()
        with directory.writing(run):
            run_trainer(data.trainer(model, run / "checkpoints"), recipe, model)
    if directory.is_first_process():
        with directory.writing(run):
            start.export(model, trainer_state(run, recipe)["num_input_tokens_seen"])
