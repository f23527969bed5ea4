"""Training on texts: the Trainer with the language loss, measured by perplexity by position."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerControl, TrainingArguments

from zebra.data.recall import RecallDataset
from zebra.evaluate.perplexity import Score, perplexity, results_of
from zebra.model.load import best_device
from zebra.model.load_options import loaded_layout_name
from zebra.model.loss import head_of, summed_loss, without_logits
from zebra.results import Result
from zebra.train.measuring import common_columns, source_results
from zebra.train.recipe import TextRecipe
from zebra.train.texts import TrainingTexts
from zebra.train.trainer import log_evaluation, optimizer_of, refuse_diverged, training_arguments


@dataclass
class TextTraining:
    """A recipe's texts as what a training trains and is measured on: a `zebra.train.run.TrainingData`."""

    recipe: TextRecipe
    texts: TrainingTexts

    def __post_init__(self) -> None:
        self.digests = {"text": self.texts.digest}

    def trainer(self, model: PreTrainedModel, checkpoints: Path) -> Trainer:
        """The Trainer; sequences come in random order, but those that grow over the training in theirs."""
        arguments = training_arguments(self.recipe, checkpoints)
        if isinstance(self.texts.sequences, RecallDataset):
            arguments["train_sampling_strategy"] = "sequential"

        def loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
            total = summed_loss(outputs.hidden_states[-1], head_of(model), labels)
            refuse_diverged(total, trainer)
            return total / (num_items_in_batch if num_items_in_batch is not None else (labels[:, 1:] >= 0).sum())

        trainer = _TextTrainer(
            evaluation=self,
            model=model,
            args=TrainingArguments(**arguments),
            train_dataset=self.texts.sequences,
            eval_dataset=self.texts.held_out,
            data_collator=_collate,
            compute_loss_func=loss,
            optimizer_cls_and_kwargs=optimizer_of(self.recipe.train),
        )
        return trainer

    def scores(self, model: PreTrainedModel, length: int | None = None) -> list[Score]:
        """The perplexity of the held-out text by position, in contexts of `evaluate.length` or another length."""
        evaluation, held_out = self.recipe.evaluate, self.texts.held_out
        assert evaluation is not None
        assert held_out is not None
        return perplexity(
            model,
            held_out,
            length=length or evaluation.length,
            convention=evaluation.convention,
            first_bucket=evaluation.first_bucket,
            seed=self.recipe.train.seed,
        )

    def measure(self, checkpoint: Path, model: PreTrainedModel, rope: str | None) -> list[Result]:
        """The perplexity of a checkpoint by position, and how fast it read; `rope` stands beside the layout."""
        evaluation = self.recipe.evaluate
        assert evaluation is not None
        model.to(best_device())
        columns = common_columns(self.recipe)
        columns |= {"model": str(checkpoint), "layout": loaded_layout_name(model, rope)}
        length, beyond, convention = evaluation.length, evaluation.beyond, evaluation.convention
        start = time.perf_counter()
        results = results_of(self.scores(model), length, convention, **columns)
        seconds, tokens = time.perf_counter() - start, results[-1].n
        if beyond:
            results += results_of(self.scores(model, beyond), beyond, convention, **columns)
        speed = tokens / seconds if tokens else 0.0
        metric = "evaluation_tokens_per_second"
        return [*results, Result(task="speed", metric=metric, value=speed, length=length, n=tokens, **columns)]

    def logged_results(self, entry: dict[str, Any], columns: dict[str, Any]) -> list[Result]:
        """The perplexities of an entry of the Trainer's history, where it has them."""
        evaluation = self.recipe.evaluate
        if evaluation is None or "by_position" not in entry:
            return []
        scores = [Score(**score) for score in entry["by_position"]]
        return results_of(scores, evaluation.length, evaluation.convention, **columns)

    def composition(self, columns: dict[str, Any]) -> list[Result]:
        """What a mixture took of each source."""
        return source_results(self.texts.stats, length=self.recipe.train.length, **columns)


def _collate(sequences: list[dict[str, Tensor]]) -> dict[str, Any]:
    return {name: torch.stack([one[name] for one in sequences]) for name in sequences[0]} | without_logits()


class _TextTrainer(Trainer):
    """The Trainer, whose evaluation is the perplexity by position."""

    control: TrainerControl

    def __init__(self, *, evaluation: TextTraining, **arguments: Any):
        super().__init__(**arguments)
        self.evaluation = evaluation

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure the held-out text."""
        scores = self.evaluation.scores(self.model)
        entry = {"by_position": [asdict(score) for score in scores]}
        buckets = ", ".join(f"to {score.position_to}: {score.perplexity:.2f}" for score in scores[:-1])
        metrics = {"eval_perplexity": scores[-1].perplexity}
        return log_evaluation(self, entry, metrics, f"perplexity by position {buckets}")
