"""trl's SFTTrainer, as tuning uses it: its collator packs, and its loss, evaluation and model card are ours.

The rows come ready, so trl prepares nothing. Its collator lays them end to end with positions that start again at each
conversation, which keeps them apart in every layer. Its own fused head is given up for `zebra.model.loss`: 8 times
quicker on a CPU in a 30th of the memory, and as exact (docs/log.md); both read the states of answers alone on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerControl
from trl import SFTConfig, SFTTrainer

from zebra.data.conversations import TokenizedConversation
from zebra.data.packing import IGNORE
from zebra.evaluate.answers import answer_score
from zebra.model.loss import head_of, summed_loss, without_logits
from zebra.progress import console
from zebra.train.instructions import AnswerRows
from zebra.train.trainer import arguments_of, optimizer_of, refuse_diverged, run
from zebra.train.tune_recipe import TuneRecipe


def fit_answers(
    recipe: TuneRecipe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: AnswerRows,
    suites: Mapping[str, Sequence[TokenizedConversation]],
    checkpoints: Path,
) -> bool:
    """Train a model on answers by a recipe, from the newest whole checkpoint where there is one.

    Returns:
        Whether this process is the one that writes results.
    """
    trainer = _TuneTrainer(
        suites=suites,
        model=model,
        args=_config(recipe, checkpoints),
        train_dataset=as_dataset(rows),
        eval_dataset=Dataset.from_dict({"suite": list(suites)}) if suites else None,  # only our `evaluate` reads them
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=optimizer_of(recipe.train),
    )
    return run(trainer, recipe, model)


def as_dataset(rows: AnswerRows) -> Dataset:
    """The rows as trl takes them, each made when it is asked for."""

    def made(batch: dict[str, list[int]]) -> dict[str, list[list[int]]]:
        found = [rows[i] for i in batch["row"]]
        return {name: [one[name] for one in found] for name in found[0]}

    return Dataset.from_dict({"row": list(range(len(rows)))}).with_transform(made)


def _config(recipe: TuneRecipe, checkpoints: Path) -> SFTConfig:
    return SFTConfig(
        **arguments_of(recipe, checkpoints),
        packing=True,
        packing_strategy="bfd",
        max_length=recipe.train.length,
        dataset_kwargs={"skip_prepare_dataset": True},
        router_aux_loss_coef=0.0,  # a router's loss is no part of ours
    )


class _TuneTrainer(SFTTrainer):
    """trl's trainer with our loss, and our evaluation: the loss on the answers of each suite."""

    control: TrainerControl

    def __init__(self, *, suites: Mapping[str, Sequence[TokenizedConversation]], **arguments: Any):
        super().__init__(**arguments)
        self.suites = suites

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The mean loss of the answers' tokens, over all processes and passes of a step."""
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
        """Measure the suites; the scores go into the Trainer's history, and so into its checkpoints."""
        scores = [answer_score(name, self.model, found, seed=self.args.seed) for name, found in self.suites.items()]
        self.log({"answers": [asdict(score) for score in scores]})
        if self.is_world_process_zero():
            said = ", ".join(f"{score.suite} {score.loss:.4f}" for score in scores)
            console.print(f"step {self.state.global_step}: loss on answers: {said}", highlight=False)
        metrics = {f"eval_{score.suite}_loss": score.loss for score in scores}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: the checkpoint's own stays."""
