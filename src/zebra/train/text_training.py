"""Training on texts: the Trainer with the language loss, measured by perplexity by position."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments, default_data_collator

from zebra.data.recall import RecallDataset
from zebra.evaluate.perplexity import perplexity, results_of
from zebra.model.loss import head_of, summed_loss, without_logits
from zebra.results import Result
from zebra.train.measuring import source_results
from zebra.train.recipe import TextRecipe
from zebra.train.run import TrainingData
from zebra.train.texts import TrainingTexts
from zebra.train.trainer import optimizer_of, refuse_diverged, training_arguments


@dataclass
class TextTraining(TrainingData):
    """A recipe's texts as what a training trains and is measured on."""

    recipe: TextRecipe
    texts: TrainingTexts

    def trainer(self, model: PreTrainedModel, checkpoints: Path) -> Trainer:
        """The Trainer; sequences come in random order, but those that grow over the training in theirs."""
        arguments = training_arguments(self.recipe, checkpoints)
        if isinstance(self.texts.sequences, RecallDataset):
            arguments["train_sampling_strategy"] = "sequential"

        def loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
            total = summed_loss(outputs.hidden_states[-1], head_of(model), labels)
            refuse_diverged(total, trainer)
            return total / (num_items_in_batch if num_items_in_batch is not None else (labels[:, 1:] >= 0).sum())

        trainer = Trainer(
            model=model,
            args=TrainingArguments(**arguments),
            train_dataset=self.texts.sequences,
            data_collator=lambda sequences: default_data_collator(sequences) | without_logits(),
            compute_loss_func=loss,
            optimizer_cls_and_kwargs=optimizer_of(self.recipe.train),
        )
        return trainer

    def evaluate(self, model: PreTrainedModel, columns: dict[str, Any], length: int | None = None) -> list[Result]:
        """The perplexity of the held-out text by position, in contexts of `evaluate.length` or another length."""
        evaluation, held_out = self.recipe.evaluate, self.texts.held_out
        assert evaluation is not None
        assert held_out is not None
        length = length or evaluation.length
        scores = perplexity(
            model,
            held_out,
            length=length,
            convention=evaluation.convention,
            first_bucket=evaluation.first_bucket,
            seed=self.recipe.train.seed,
        )
        return results_of(scores, length, evaluation.convention, **columns)

    def measure(self, model: PreTrainedModel, columns: dict[str, Any]) -> list[Result]:
        """The perplexity by position, how fast the model read, and the perplexity beyond."""
        evaluation = self.recipe.evaluate
        assert evaluation is not None
        start = time.perf_counter()
        results = self.evaluate(model, columns)
        seconds, tokens = time.perf_counter() - start, results[-1].n
        if evaluation.beyond:
            results += self.evaluate(model, columns, evaluation.beyond)
        speed = tokens / seconds if tokens else 0.0
        columns = columns | {"length": evaluation.length, "n": tokens}
        return [*results, Result(task="speed", metric="evaluation_tokens_per_second", value=speed, **columns)]

    def composition(self, columns: dict[str, Any]) -> list[Result]:
        """What a mixture took of each source."""
        return source_results(self.texts.stats, length=self.recipe.train.length, **columns)
