"""Training on conversations: trl's SFTTrainer, measured by the loss on the answers of suites.

trl's collator packs; the loss, the evaluation and the model card are ours. The sequences come ready, so trl prepares
nothing. Its collator lays them end to end with positions that start again at each conversation, which keeps them apart
in every layer. Its own fused head is replaced by `zebra.model.loss`: 8 times quicker on a CPU in a 30th of the memory,
and as exact (docs/log.md); both read the states of answers alone on a GPU.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerControl
from trl import SFTConfig, SFTTrainer

from zebra.data.packing import IGNORE
from zebra.evaluate.answers import AnswerScore, answer_score
from zebra.model.load import best_device
from zebra.model.load_options import loaded_layout_name
from zebra.model.loss import head_of, summed_loss, without_logits
from zebra.results import Result
from zebra.train.instructions import AnswerSequences, TrainingConversations
from zebra.train.measuring import common_columns, source_results
from zebra.train.trainer import log_evaluation, optimizer_of, refuse_diverged, training_arguments
from zebra.train.tune_recipe import TuneRecipe


@dataclass
class ConversationTraining:
    """A recipe's conversations as what a training trains and is measured on: a `zebra.train.run.TrainingData`."""

    recipe: TuneRecipe
    tokenizer: PreTrainedTokenizerBase
    conversations: TrainingConversations

    def __post_init__(self) -> None:
        self.digests = {"conversations": self.conversations.digest}

    def trainer(self, model: PreTrainedModel, checkpoints: Path) -> SFTTrainer:
        """trl's trainer, which trains on answers alone."""
        suites = self.conversations.suites
        arguments = SFTConfig(
            **training_arguments(self.recipe, checkpoints),
            packing=True,
            packing_strategy="bfd",
            max_length=self.recipe.train.length,
            dataset_kwargs={"skip_prepare_dataset": True},
            router_aux_loss_coef=0.0,  # a router's loss is no part of ours
        )
        return _AnswerTrainer(
            evaluation=self,
            model=model,
            args=arguments,
            train_dataset=as_dataset(self.conversations.sequences),
            eval_dataset=Dataset.from_dict({"suite": list(suites)}) if suites else None,  # only our `evaluate` reads it
            processing_class=self.tokenizer,
            optimizer_cls_and_kwargs=optimizer_of(self.recipe.train),
        )

    def scores(self, model: PreTrainedModel) -> list[AnswerScore]:
        """The loss on the answers of each suite."""
        suites, seed = self.conversations.suites, self.recipe.train.seed
        return [answer_score(name, model, conversations, seed=seed) for name, conversations in suites.items()]

    def measure(self, checkpoint: Path, model: PreTrainedModel, rope: str | None) -> list[Result]:
        """The loss on the answers of each suite; `rope` stands beside the layout."""
        model.to(best_device())
        columns = common_columns(self.recipe)
        columns |= {"model": str(checkpoint), "layout": loaded_layout_name(model, rope)}
        return [self._answer_result(score, columns) for score in self.scores(model)]

    def logged_results(self, entry: dict[str, Any], columns: dict[str, Any]) -> list[Result]:
        """The losses of an entry of the Trainer's history, where it has them."""
        return [self._answer_result(AnswerScore(**score), columns) for score in entry.get("answers", [])]

    def composition(self, columns: dict[str, Any]) -> list[Result]:
        """What a mixture took of each source, what is trained on by kind and length, and what the gate found.

        `position_from` and `position_to` bound the tokens of a conversation.
        """
        columns = columns | {"length": self.recipe.train.length}
        by_kind = [
            Result(
                task=f"instructions-{stats.kind}",
                metric=metric,
                value=value,
                n=stats.samples,
                position_from=stats.low,
                position_to=stats.high,
                **columns,
            )
            for stats in self.conversations.sequences.kind_stats()
            for metric, value in (
                ("samples", stats.samples),
                ("tokens", stats.tokens),
                ("answer_tokens", stats.answer_tokens),
            )
        ]
        counts = self.conversations.counts.items()
        quality = [Result(task="quality", metric=name, value=count, **columns) for name, count in counts]
        return [*source_results(self.conversations.stats, **columns), *by_kind, *quality]

    def _answer_result(self, score: AnswerScore, columns: dict[str, Any]) -> Result:
        return Result(
            task=f"answers-{score.suite}",
            metric="answer_loss",
            value=score.loss,
            low=score.low,
            high=score.high,
            n=score.tokens,
            length=self.recipe.train.length,
            **columns,
        )


def as_dataset(sequences: AnswerSequences) -> Dataset:
    """The sequences as trl takes them, each built when it is read."""

    def build(batch: dict[str, list[int]]) -> dict[str, list[list[int]]]:
        chosen = [sequences[i] for i in batch["sequence"]]
        return {name: [one[name] for one in chosen] for name in chosen[0]}

    return Dataset.from_dict({"sequence": list(range(len(sequences)))}).with_transform(build)


class _AnswerTrainer(SFTTrainer):
    """trl's trainer with our loss, and our evaluation: the loss on the answers of each suite."""

    control: TrainerControl

    def __init__(self, *, evaluation: ConversationTraining, **arguments: Any):
        super().__init__(**arguments)
        self.evaluation = evaluation

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The mean loss of the answers' tokens, over all processes and passes of a step.

        Args:
            inputs: `input_ids`, `labels` and `position_ids`, (B, T) each; tokens outside answers have the label -100.

        Returns:
            A scalar.
        """
        ids, labels = inputs["input_ids"], inputs["labels"]
        outputs = model(ids, position_ids=inputs["position_ids"], **without_logits(ids.device))
        total = summed_loss(outputs.hidden_states[-1], head_of(self.accelerator.unwrap_model(model)), labels)
        refuse_diverged(total, self)
        if num_items_in_batch is None:
            return total / (labels[:, 1:] != IGNORE).sum().clamp(min=1)
        count = torch.as_tensor(num_items_in_batch, device=total.device).clamp(min=1)
        shares = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1  # DDP takes the mean
        return total * shares / count

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure the suites."""
        scores = self.evaluation.scores(self.model)
        entry = {"answers": [asdict(score) for score in scores]}
        message = "loss on answers: " + ", ".join(f"{score.suite} {score.loss:.4f}" for score in scores)
        return log_evaluation(self, entry, {f"eval_{score.suite}_loss": score.loss for score in scores}, message)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the checkpoint keeps its own card."""
