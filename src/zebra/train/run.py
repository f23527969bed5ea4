"""One training, from its recipe to its results.

run/recipe.yaml      the resolved recipe, and run/inputs.json beside it (zebra.train.directory)
run/before.jsonl     results of the source before any training, unchanged and with its new stripes and rope
run/checkpoints/     the Trainer's checkpoints; a run resumes only from those with the file COMPLETE
run/model/           the trained checkpoint, loadable by plain transformers; run/model.json, digests of its files
run/results.jsonl    all results, written last: a run that has it is done

`adapt`, `tune` and `pretrain` add what differs: what the training starts from, and the data to train and evaluate on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, Trainer

from zebra.data.encoding import tokenizer_digest
from zebra.files import check_inputs
from zebra.model.compiled import compile_layers
from zebra.model.load import best_device, load
from zebra.model.load_options import loaded_layout_name
from zebra.model.local import layout_name, set_local_attention
from zebra.progress import console
from zebra.results import Result, read_results, write_results
from zebra.train import directory
from zebra.train.processes import check_processes, is_first_process
from zebra.train.recipe import Recipe
from zebra.train.run_results import common_columns, cost_results, local_attention_for, trainer_state, training_results
from zebra.train.saves import is_intact
from zebra.train.step_memory import resolve_checkpointing
from zebra.train.trainer import Evaluation, run_trainer


@dataclass
class Start(ABC):
    """What a training starts from: a checkpoint (`zebra.train.source`) or random weights (`zebra.train.pretrain`)."""

    recipe: Recipe
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase

    @property
    def name(self) -> str:
        """The name of the model in results."""
        return str(Path(self.recipe.run) / "model")

    @property
    def rope(self) -> str | None:
        """The change of the rope, which results name after the layout; None without one."""
        return None

    def digests(self) -> dict[str, object]:
        """Digests, by name, of what it reads besides the recipe's files."""
        return {"tokenizer": tokenizer_digest(self.tokenizer)}

    def untrained(self) -> Iterator[tuple[PreTrainedModel, str | None]]:
        """The models to evaluate before training, each with its change of the rope."""
        return iter(())

    @abstractmethod
    def build(self) -> PreTrainedModel:
        """Build the model for the first step."""

    def restore(self, checkpoint: Path) -> PreTrainedModel:
        """Load one of the Trainer's checkpoints, and add what `config.json` cannot express."""
        model, local = load(checkpoint), local_attention_for(self.recipe)
        if local:
            set_local_attention(model, local)
        return model

    @abstractmethod
    def export(self, model: PreTrainedModel, tokens: int) -> None:
        """Write the trained model to `run/model`, atomically; `tokens` is the number of tokens trained on."""

    def exported(self) -> PreTrainedModel:
        """Load the model of `run/model`."""
        return load(Path(self.recipe.run) / "model")


@dataclass
class TrainingData(ABC):
    """The data to train and evaluate on: texts (`zebra.train.texts`) or conversations (`zebra.train.sft`)."""

    recipe: Recipe

    @abstractmethod
    def trainer(self, model: PreTrainedModel, checkpoints: Path) -> Trainer:
        """The Trainer that trains the model on these data."""

    @abstractmethod
    def evaluate(self, model: PreTrainedModel, columns: dict[str, Any]) -> list[Result]:
        """Evaluate a model during training."""

    def measure(self, model: PreTrainedModel, columns: dict[str, Any]) -> list[Result]:
        """Evaluate a model before and after training."""
        return self.evaluate(model, columns)

    @abstractmethod
    def composition(self, columns: dict[str, Any]) -> list[Result]:
        """Results that say what the training data consist of."""


def run_recipe(
    recipe: Recipe, start_of: Callable[[Path], Start], read: Callable[[Start], TrainingData]
) -> list[Result]:
    """Run a recipe, from its newest complete checkpoint if it has one, and return its results (in the first process).

    A recipe with more steps than the run began with continues the run, if neither its learning rate nor its data depend
    on the number of steps.

    Args:
        start_of: returns what the training starts from; it gets the run's directory, which is locked.
        read: reads the data; not called for a finished run.

    Raises:
        ZebraError: a directory of another recipe or of other inputs; another process that works in it; a loss that is
            not finite; what `start_of` and `read` raise.
    """
    check_processes(recipe)
    with directory.locked_run(recipe) as run:
        start, longer = start_of(run), directory.is_longer(run, recipe)
        is_finished = (run / "results.jsonl").exists() and not longer
        results = read_results(run / "results.jsonl") if is_finished else []
        inputs = directory.inputs_of(recipe, start.digests(), finished=bool(results))
        if directory.has_trained(run):
            check_inputs(run / "inputs.json", inputs, instead="name another run", partly=bool(results))
            directory.check_export(run)
        if results:
            return results
        data = read(start)
        if longer and is_first_process():
            directory.reopen(run)
        directory.record_inputs(run, recipe, inputs)
        before = _before(run, recipe, start, data)
        shared, local = common_columns(recipe), local_attention_for(recipe)
        columns = shared | {"layout": layout_name(start.config, local, start.rope)}
        if longer or not (run / "model").exists():
            _train(run, start, data, columns)
        if not is_first_process():
            return []
        directory.record_export(run)
        history = trainer_state(run, recipe)["log_history"]
        after = _measured(str(run / "model"), start.exported(), start.rope, data) if recipe.evaluate else []
        results = [
            *data.composition(shared | {"model": start.name, "layout": layout_name(start.config, local)}),
            *before,
            *training_results(recipe, history, columns),
            *after,
            *cost_results(recipe, start.config, start.name),
        ]
        write_results(run / "results.jsonl", results)
        return results


def _before(run: Path, recipe: Recipe, start: Start, data: TrainingData) -> list[Result]:
    """The results before training: evaluated once, and read from the file after that."""
    file = run / "before.jsonl"
    if recipe.evaluate is None:
        return []
    if file.exists():
        return [replace(one, run=run.name) for one in read_results(file)]  # the directory may have been moved
    results = [one for model, rope in start.untrained() for one in _measured(start.name, model, rope, data)]
    if results:
        write_results(file, results)
    return results


def _measured(name: str, model: PreTrainedModel, rope: str | None, data: TrainingData) -> list[Result]:
    model.to(best_device())
    columns = common_columns(data.recipe) | {"model": name, "layout": loaded_layout_name(model, rope)}
    return data.measure(model, columns)


def _train(run: Path, start: Start, data: TrainingData, columns: dict[str, Any]) -> None:
    """Train, unless there is a checkpoint of the last step, and write the trained model."""
    recipe = start.recipe
    last = run / "checkpoints" / f"checkpoint-{recipe.train.max_steps}"
    if is_intact(last):  # a kill came between the last step and the export
        model = start.restore(last)
    else:
        data.recipe = recipe = resolve_checkpointing(recipe, start.config)
        if recipe != start.recipe and recipe.train.activation_checkpointing and is_first_process():
            console.print("activation checkpointing is on: a step does not fit into this machine's memory without it.")
        model = start.build()
        if recipe.train.compile:
            compile_layers(model)
        trainer = data.trainer(model, run / "checkpoints")
        callbacks = []
        if recipe.evaluate and recipe.evaluate.eval_steps:

            def evaluate(model: PreTrainedModel, step: int) -> list[Result]:
                return data.evaluate(model, columns | {"model": f"{recipe.run}@{step}"})

            callbacks.append(Evaluation(recipe.evaluate.eval_steps, evaluate))
        with directory.writing(run):
            run_trainer(trainer, recipe, model, *callbacks)
        if recipe.parallel.shard > 1 and is_first_process():
            del model, trainer  # it has only a shard of the weights; the checkpoint has all
            model = start.restore(last)
    if is_first_process():
        with directory.writing(run):
            (run / "model.json").unlink(missing_ok=True)
            start.export(model, trainer_state(run, recipe)["num_input_tokens_seen"])
