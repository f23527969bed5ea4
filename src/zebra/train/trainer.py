"""The Hugging Face Trainer, as every training uses it: its loss, its evaluation, its checkpoints, its bar.

Nothing of the Trainer is replaced but `evaluate`, which measures by position. The loss goes in by `compute_loss_func`,
so that accumulation, DDP and token counting stay the Trainer's.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from zebra.data.corpus import Corpus
from zebra.data.packing import PackedSequences
from zebra.data.recall import RecallDataset
from zebra.errors import ZebraError
from zebra.evaluate.perplexity import perplexity
from zebra.model.loss import head_of, summed_loss, without_logits
from zebra.progress import bar, console
from zebra.train.directory import processes
from zebra.train.muon import muon
from zebra.train.recipe import Evaluation, Recipe, TextRecipe, Training

COMPLETE = "COMPLETE"
"""The mark that a checkpoint is whole, written last."""


def check_machine(train: Training) -> None:
    """Refuse a recipe that is for another machine."""
    if train.device == "cuda" and not torch.cuda.is_available():
        raise ZebraError(
            "the recipe is for a GPU (train.device: cuda) and there is none here. Run it where there is one; "
            "with --set train.device=best it would run on this CPU, at a CPU's speed."
        )


def trainable(config: PreTrainedConfig, name: str) -> PreTrainedConfig:
    """The config as it is trained: without dropout of attention weights, which no kernel has.

    Raises:
        ZebraError: a router that wants a loss of its own.
    """
    if getattr(config, "output_router_logits", False):
        raise ZebraError(
            f"{name} asks for its router's auxiliary loss (output_router_logits), and training is on the language loss "
            "alone. Set output_router_logits to false in its config to train so."
        )
    if getattr(config, "attention_dropout", 0.0):
        console.print(f"no kernel drops attention weights: attention_dropout of {config.attention_dropout} becomes 0")
        config.attention_dropout = 0.0
    return config


def fit(
    recipe: TextRecipe,
    model: PreTrainedModel,
    rows: PackedSequences | RecallDataset,
    held_out: Corpus | None,
    checkpoints: Path,
) -> bool:
    """Train a model by a recipe, from the newest whole checkpoint where there is one.

    Rows of text are drawn in random order; those that grow over the training come in theirs.

    Returns:
        Whether this process is the one that writes results.

    Raises:
        ZebraError: one process that sees several GPUs.
    """
    arguments = arguments_of(recipe, checkpoints)
    if isinstance(rows, RecallDataset):
        arguments["train_sampling_strategy"] = "sequential"

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        total = summed_loss(outputs.hidden_states[-1], head_of(model), labels)
        refuse_diverged(total, trainer)
        return total / (num_items_in_batch if num_items_in_batch is not None else (labels[:, 1:] >= 0).sum())

    trainer = _TextTrainer(
        evaluation=recipe.evaluate,
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=rows,
        eval_dataset=held_out,
        data_collator=_collate,
        compute_loss_func=loss,
        optimizer_cls_and_kwargs=optimizer_of(recipe.train),
    )
    return run(trainer, recipe, model)


def run(trainer: Trainer, recipe: Recipe, model: PreTrainedModel) -> bool:
    """Train from the newest whole checkpoint of the trainer's directory, with a bar and marks; see `fit`."""
    checkpoints = Path(trainer.args.output_dir)
    if trainer.args.n_gpu > 1:
        raise ZebraError(
            f"one process sees {trainer.args.n_gpu} GPUs. Start one process for each with "
            "`torchrun --nproc-per-node`, or show one with CUDA_VISIBLE_DEVICES=0."
        )
    with bar("training", recipe.train.max_steps * tokens_per_step(recipe), "tokens") as advance:
        trainer.add_callback(_Mark())
        trainer.add_callback(_Show(advance))
        trainer.remove_callback(PrinterCallback)
        if trainer.is_world_process_zero():
            _remove_broken(checkpoints)
        trainer.accelerator.wait_for_everyone()
        with _tied_weights_expected(model):
            trainer.train(resume_from_checkpoint=_newest(checkpoints))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # its forward ran under autocast
    return trainer.is_world_process_zero()


def refuse_diverged(loss: Tensor, trainer: Trainer) -> None:
    """Refuse a loss that is not finite, before the step that would spoil the weights."""
    if not bool(loss.isfinite()):
        step, where = trainer.state.global_step + 1, Path(trainer.args.output_dir)
        raise ZebraError(_diverged("the loss is", step, trainer.optimizer.param_groups[0]["lr"], where))


def _diverged(what: str, step: int, rate: float, checkpoints: Path) -> str:
    good = [int(found.name.rpartition("-")[2]) for found in checkpoints.glob("checkpoint-*") if is_complete(found)]
    kept = f"The newest finite checkpoint is that of step {max(good)}." if good else "No checkpoint was saved yet."
    return (
        f"{what} not finite at step {step}, at a learning rate of {rate:.3g}. {kept} "
        "Start another run with a lower train.learning_rate or a longer train.warmup_steps."
    )


@contextmanager
def _tied_weights_expected(model: PreTrainedModel) -> Iterator[None]:
    """Keep the Trainer from warning that a tied weight, which is saved once, is missing from its checkpoint."""
    tied = f"{sorted(model.all_tied_weights_keys)}."

    def other(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not ("missing keys in the checkpoint" in message and message.endswith(tied))

    log = logging.getLogger("transformers.trainer")
    log.addFilter(other)
    try:
        yield
    finally:
        log.removeFilter(other)


def tokens_per_step(recipe: Recipe) -> int:
    """Tokens of one full optimiser step, over all processes. The last one of a pass over the rows may have fewer."""
    train = recipe.train
    return train.length * train.per_device_train_batch_size * train.gradient_accumulation_steps * processes()


def arguments_of(recipe: Recipe, checkpoints: Path) -> dict[str, Any]:
    """The host's `TrainingArguments` of a recipe."""
    train = recipe.train
    every = recipe.evaluate.eval_steps if recipe.evaluate else None
    return dict(
        output_dir=str(checkpoints),
        max_steps=train.max_steps,
        per_device_train_batch_size=train.per_device_train_batch_size,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.lr_scheduler_type,
        warmup_steps=train.warmup_steps,
        weight_decay=train.weight_decay,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        max_grad_norm=train.max_grad_norm,
        bf16=train.bf16,
        use_cpu=not torch.cuda.is_available(),
        seed=train.seed,
        data_seed=train.seed,
        logging_steps=train.logging_steps,
        save_steps=train.save_steps,
        save_total_limit=train.save_total_limit,
        eval_strategy="steps" if every else "no",
        eval_steps=every,
        include_num_input_tokens_seen="all",
        train_sampling_strategy="random",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        **_recompute(train.gradient_checkpointing),
    )


def optimizer_of(train: Training) -> tuple[Any, dict[str, Any]] | None:
    """The optimiser as the Trainer takes it; None for its own."""
    if train.optimizer == "adamw":
        return None
    return muon, {
        "lr": train.learning_rate,
        "betas": (train.adam_beta1, train.adam_beta2),
        "weight_decay": train.weight_decay,
    }


def _recompute(wanted: bool) -> dict[str, Any]:
    """Transformers after 5.17 calls gradient checkpointing by its other name."""
    known = {f.name for f in fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: wanted} | ({f"{name}_kwargs": {"use_reentrant": False}} if wanted else {})  # trl's default is True


def _collate(rows: list[dict[str, Tensor]]) -> dict[str, Any]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]} | without_logits()


class _TextTrainer(Trainer):
    """The Trainer, whose evaluation is the perplexity by position."""

    control: TrainerControl

    def __init__(self, *, evaluation: Evaluation | None, **arguments: Any):
        super().__init__(**arguments)
        self.evaluation = evaluation

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure the held-out text; the scores go into the Trainer's history, and so into its checkpoints."""
        assert self.evaluation is not None
        asked = self.evaluation
        scores = perplexity(
            self.model,
            self.eval_dataset,
            length=asked.length,
            convention=asked.convention,
            first_bucket=asked.first_bucket,
            seed=self.args.seed,
        )
        self.log({"by_position": [asdict(score) for score in scores]})
        metrics = {"eval_perplexity": scores[-1].perplexity}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class _Mark(TrainerCallback):
    """Marks a good checkpoint when all of it is written: the Trainer writes in place, so a kill leaves broken ones.

    The mark holds the size of each file, so that one which is damaged later is told from a whole one.
    """

    rate = 0.0

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.rate = kwargs["optimizer"].param_groups[0]["lr"]  # the schedule has moved on when it is saved

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
            raise ZebraError(_diverged("the weights are", state.global_step, self.rate, Path(args.output_dir)))
        args.distributed_state.wait_for_everyone()
        if state.is_world_process_zero:
            where = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            for file in filter(Path.is_file, where.rglob("*")):  # sharded saves have folders
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
            (where / COMPLETE).write_text(json.dumps(_sizes(where)), encoding="utf-8")


class _Show(TrainerCallback):
    """Feeds the bar; without a terminal, a line for each log."""

    def __init__(self, advance: Callable[..., None]):
        self.advance = advance
        self.began = self.seconds = 0.0
        self.tokens = self.steps = self.shown = 0

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.shown = state.num_input_tokens_seen
        self.advance(self.shown)

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        new, self.shown = state.num_input_tokens_seen - self.shown, state.num_input_tokens_seen
        self.advance(new)
        self.tokens, self.steps = self.tokens + new, self.steps + 1
        self.seconds += time.perf_counter() - self.began

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        if "loss" in logs:
            self.advance(note=f"step {state.global_step}, loss {logs['loss']:.3f}")
            if not console.is_terminal:
                left = (state.max_steps - state.global_step) * self.seconds / self.steps
                console.print(
                    f"step {state.global_step}/{state.max_steps}, loss {logs['loss']:.4f}, "
                    f"{self.tokens / self.seconds:,.0f} tokens/s, {left:,.0f} s left"
                )
        if "by_position" in logs:
            text = ", ".join(f"to {s['position_to']}: {s['perplexity']:.2f}" for s in logs["by_position"][:-1])
            console.print(f"step {state.global_step}: perplexity by position {text}")


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint has its mark, and every file the size that it had then."""
    try:
        return json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8")) == _sizes(checkpoint)
    except (OSError, ValueError):
        return False


def _sizes(checkpoint: Path) -> dict[str, int]:
    files = [file for file in sorted(checkpoint.rglob("*")) if file.is_file() and file.name != COMPLETE]
    return {str(file.relative_to(checkpoint)): file.stat().st_size for file in files}


def _remove_broken(checkpoints: Path) -> None:
    """Remove checkpoints that a kill inside a save left, or that were damaged since."""
    for found in checkpoints.glob("checkpoint-*"):
        if found.is_dir() and not is_complete(found):
            shutil.rmtree(found)


def _newest(checkpoints: Path) -> str | None:
    return get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
