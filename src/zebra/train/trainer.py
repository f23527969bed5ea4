"""The Hugging Face Trainer, as every training uses it: its arguments, its checkpoints, its progress bar.

Only its loss and its evaluation are replaced (`zebra.train.texts`, `zebra.train.sft`); gradient accumulation, DDP and
token counting are the Trainer's.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from zebra.errors import ZebraError, first_line
from zebra.model.finite import check_finite
from zebra.model.quantization import quantization_of
from zebra.progress import bar, console
from zebra.results import Result
from zebra.signals import Terminated, collected
from zebra.train.muon import muon
from zebra.train.parallel import ShardedStates, sharing
from zebra.train.processes import tokens_per_step
from zebra.train.recipe import Recipe, Training
from zebra.train.saves import EndsOnSignal, Saves, diverged, remove_damaged, unreadable_states


def check_machine(train: Training) -> None:
    """Check that this machine can run a recipe.

    Raises:
        ZebraError: the recipe needs a GPU, and there is none.
    """
    if train.device == "cuda" and not torch.cuda.is_available():
        raise ZebraError(
            "train.device cuda requires a GPU, and this machine has none. Run the recipe on a machine with a GPU, or "
            "slowly on this CPU with --set train.device=best."
        )


def trainable_config(config: PreTrainedConfig, name: str) -> PreTrainedConfig:
    """The config to train: without attention dropout, which no kernel supports.

    Raises:
        ZebraError: quantised weights, or a router's auxiliary loss.
    """
    if (method := quantization_of(config)) is not None:
        raise ZebraError(
            f"{name} is quantised ({method}), and quantised weights cannot be trained. Use the checkpoint before "
            "quantisation; zebra generate and zebra evaluate support this one."
        )
    if getattr(config, "output_router_logits", False):
        raise ZebraError(
            f"training does not support the router's auxiliary loss, which {name} sets (output_router_logits). "
            "Set output_router_logits to false in its config to train without it."
        )
    if getattr(config, "attention_dropout", 0.0):
        console.print(f"attention dropout is not supported: attention_dropout {config.attention_dropout} is set to 0")
        config.attention_dropout = 0.0
    return config


def run_trainer(trainer: Trainer, recipe: Recipe, model: PreTrainedModel, *callbacks: TrainerCallback) -> None:
    """Train from the newest complete checkpoint in the Trainer's directory, with a progress bar.

    Raises:
        ZebraError: one process that sees several GPUs; a loss or weights that are not finite; a step that does not fit
            into memory; states of a checkpoint that cannot be read; another process that ended.
        Terminated: SIGTERM came; the step is saved.
    """
    checkpoints = Path(trainer.args.output_dir)
    if trainer.args.n_gpu > 1:
        raise ZebraError(
            f"a process must see only one GPU; this one sees {trainer.args.n_gpu}. Start one process for each GPU with "
            "`torchrun --nproc-per-node`, or set CUDA_VISIBLE_DEVICES=0."
        )
    total = recipe.train.max_steps * tokens_per_step(recipe)
    with collected(signal.SIGTERM) as received, bar("training", total, "tokens") as advance:
        trainer.remove_callback(PrinterCallback)
        if trainer.is_world_process_zero():
            remove_damaged(checkpoints)
        trainer.accelerator.wait_for_everyone()
        newest = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
        states, saves = ShardedStates(newest, recipe.parallel.shard > 1), Saves(recipe.train.save_total_limit)
        ending = EndsOnSignal(received)
        own = states, saves, _ShowProgress(advance), ending
        for callback in (*own, *callbacks):  # evaluations last: their time does not count as a step's
            trainer.add_callback(callback)
        with (
            _tied_weights_expected(model),
            _memory_errors(recipe),
            _lost_processes(),
            sharing(model, recipe),
            unreadable_states(newest),
        ):
            trainer.train(resume_from_checkpoint=newest)
    if ending.ended:
        step, of = trainer.state.global_step, recipe.train.max_steps
        raise Terminated(f"terminated at step {step} of {of}, which is saved; run the same command again to continue.")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # removes autocast from its forward


def check_loss(loss: Tensor, trainer: Trainer) -> None:
    """Check that a loss is finite, before a step would ruin the weights.

    Raises:
        ZebraError: it is not; at the first step the error names what in the model is not finite.
    """
    if not trainer.state.global_step:
        check_finite(loss, trainer.accelerator.unwrap_model(trainer.model))
    if not bool(loss.isfinite()):
        step, where = trainer.state.global_step + 1, Path(trainer.args.output_dir)
        raise ZebraError(diverged("the loss is", step, trainer.optimizer.param_groups[0]["lr"], where))


@contextmanager
def _memory_errors(recipe: Recipe) -> Iterator[None]:
    """Turn torch's error for a step that does not fit into memory into one line with remedies."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        words = ("out of memory", "can't allocate memory", "alloc_failed")
        if not isinstance(error, MemoryError) and not any(word in str(error).lower() for word in words):
            raise
        train = recipe.train
        remedies = {
            "halve train.per_device_train_batch_size and double train.gradient_accumulation_steps, which is the same "
            "step": train.per_device_train_batch_size > 1,
            "set train.activation_checkpointing": not train.activation_checkpointing,
            "lower train.length": True,
        }
        raise ZebraError(
            f"a forward and backward pass of {train.per_device_train_batch_size:,} x {train.length:,} tokens does not "
            f"fit into memory ({first_line(error)}). Do one of these: "
            f"{'; '.join(remedy for remedy, helps in remedies.items() if helps)}. --dry-run estimates what fits."
        ) from None


@contextmanager
def _lost_processes() -> Iterator[None]:
    """Turn a collective's error after another process ended into one line; the launcher's report names its rank."""
    try:
        yield
    except RuntimeError as error:
        if not dist.is_initialized() or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise ZebraError(
            f"another process of this training ended, which rank {dist.get_rank()} noticed ({first_line(error)}). The "
            "launcher names it. Run the same command again to continue from the last complete checkpoint."
        ) from None


@contextmanager
def _tied_weights_expected(model: PreTrainedModel) -> Iterator[None]:
    """Silence the Trainer's warning that a tied weight, which is saved once, is missing from its checkpoint."""
    expected = f"{sorted(model.all_tied_weights_keys)}."

    def is_other(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return "missing keys in the checkpoint" not in message or not message.endswith(expected)

    log = logging.getLogger("transformers.trainer")
    log.addFilter(is_other)
    try:
        yield
    finally:
        log.removeFilter(is_other)


def training_arguments(recipe: Recipe, checkpoints: Path) -> dict[str, Any]:
    """The `TrainingArguments` of a recipe: keys of `train` with the same names, and what follows from the others."""
    train, known = recipe.train, {field.name for field in fields(TrainingArguments)}
    arguments = {name: value for name, value in train.model_dump().items() if name in known}
    checkpointing = "activation_checkpointing"
    if checkpointing not in known:  # up to transformers 5.17 it has another name
        checkpointing = "gradient_checkpointing"
        arguments[checkpointing] = train.activation_checkpointing
    if train.activation_checkpointing:
        arguments[f"{checkpointing}_kwargs"] = {"use_reentrant": False}  # trl's default is True
    return arguments | {
        "output_dir": str(checkpoints),
        "ddp_find_unused_parameters": False,  # all have gradients, as a layer's experts are one tensor
        "use_cpu": not torch.cuda.is_available(),
        "data_seed": train.seed,
        "save_only_model": recipe.parallel.shard > 1,  # `ShardedStates` writes the rest
        "save_total_limit": None,  # `Saves` removes old ones: the Trainer goes by the clock, which may be set back
        "include_num_input_tokens_seen": "all",
        "train_sampling_strategy": "random",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def optimizer_of(train: Training) -> tuple[Any, dict[str, Any]] | None:
    """The optimiser in the form that the Trainer takes; None for the Trainer's own AdamW."""
    if train.optimizer == "adamw":
        return None
    return muon, {
        "lr": train.learning_rate,
        "betas": (train.adam_beta1, train.adam_beta2),
        "weight_decay": train.weight_decay,
    }


class Evaluation(TrainerCallback):
    """Evaluates the model every `steps` steps and after the last; the results go into the Trainer's log history."""

    def __init__(self, steps: int, evaluate: Callable[[PreTrainedModel, int], list[Result]]):
        self.steps, self.evaluate = steps, evaluate

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Evaluate and print, if it is time."""
        if state.global_step % self.steps and state.global_step < state.max_steps:
            return
        results = self.evaluate(kwargs["model"], state.global_step)
        state.log_history.append({"step": state.global_step, "results": [result.columns() for result in results]})
        if state.is_world_process_zero:
            names = [f"{one.position_from}–{one.position_to}" if one.position_to else one.task for one in results]
            values = ", ".join(f"{name} {one.value:.4f}" for name, one in zip(names, results, strict=True))
            console.print(f"step {state.global_step}: {results[0].metric} {values}")


class _ShowProgress(TrainerCallback):
    """Advances the progress bar; without a terminal, prints a line at each log."""

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
        if "loss" in logs and state.is_world_process_zero:
            self.advance(note=f"step {state.global_step}, loss {logs['loss']:.3f}")
            if not console.is_terminal:
                left = (state.max_steps - state.global_step) * self.seconds / self.steps
                console.print(
                    f"step {state.global_step}/{state.max_steps}, loss {logs['loss']:.4f}, "
                    f"{self.tokens / self.seconds:,.0f} tokens/s, {left:,.0f} s left"
                )
