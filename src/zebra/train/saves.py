"""The Trainer's checkpoints: which are complete, which are removed, and the one that SIGTERM asks for."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from zebra.errors import ZebraError
from zebra.files import atomic_write, file_digest, sync
from zebra.progress import console
from zebra.train.directory import COMPLETE


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint has its mark, and every file has the size that the mark records."""
    described = _read_mark(checkpoint)
    sizes = {name: one[0] for name, one in described.items()}
    return bool(described) and sizes == {name: one[0] for name, one in _described(checkpoint).items()}


def is_intact(checkpoint: Path) -> bool:
    """Whether a checkpoint is complete, and every file has the digest that the mark records."""
    return is_complete(checkpoint) and _read_mark(checkpoint) == _described(checkpoint, with_digests=True)


def remove_damaged(checkpoints: Path) -> None:
    """Remove incomplete checkpoints, which a kill inside a save leaves, and the newest ones that changed since."""
    for checkpoint in checkpoints.glob("checkpoint-*"):
        if checkpoint.is_dir() and not is_complete(checkpoint):
            shutil.rmtree(checkpoint)
    for step in sorted(_whole_steps(checkpoints), reverse=True):
        checkpoint = checkpoints / f"checkpoint-{step}"
        if is_intact(checkpoint):
            return
        console.print(f"{checkpoint} was damaged since it was saved and is removed; the checkpoint before it is used")
        shutil.rmtree(checkpoint)


def _read_mark(checkpoint: Path) -> dict[str, list[Any]]:
    try:
        mark = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))
        return {str(name): [int(size), str(digest)] for name, (size, digest) in mark.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _described(checkpoint: Path, *, with_digests: bool = False) -> dict[str, list[Any]]:
    """The size and the digest of each file except the mark."""
    files = [file for file in sorted(checkpoint.rglob("*")) if file.is_file() and file.name != COMPLETE]
    return {
        str(file.relative_to(checkpoint)): [file.stat().st_size, file_digest(file) if with_digests else ""]
        for file in files
    }


def _whole_steps(checkpoints: Path) -> list[int]:
    return [int(path.name.rpartition("-")[2]) for path in checkpoints.glob("checkpoint-*") if is_complete(path)]


def diverged(what: str, step: int, rate: float, checkpoints: Path) -> str:
    """The error message for a loss or weights that are not finite."""
    steps = _whole_steps(checkpoints)
    newest = f"The newest finite checkpoint is that of step {max(steps)}." if steps else "No checkpoint was saved yet."
    return (
        f"{what} not finite at step {step}, at a learning rate of {rate:.3g}. {newest} "
        "Start another run with a lower train.learning_rate or a longer train.warmup_steps."
    )


@contextmanager
def unreadable_states(checkpoint: str | None) -> Iterator[None]:
    """Turn the errors for damaged states, or pickles with code, which transformers does not load, into one line."""
    try:
        yield
    except (pickle.UnpicklingError, EOFError, RuntimeError, CheckpointException) as error:
        if checkpoint is None or (isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error)):
            raise
        raise ZebraError(
            f"a state in {checkpoint} (optimizer, scheduler or random numbers) is damaged, or would run code when "
            "loaded. Remove that folder and run the same command again to continue from the checkpoint before it."
        ) from None


class Saves(TrainerCallback):
    """Marks a finite checkpoint as complete when all of it is written, and keeps only the `limit` newest by step.

    The Trainer writes in place, so a kill leaves incomplete ones. The mark has the size and the digest of each file, so
    that damage is noticed.
    """

    def __init__(self, limit: int):
        self.limit, self.rate = limit, 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Save at the steps of this start's recipe; a resumed state has those of the start that saved it."""
        state.compute_steps(args, state.max_steps)

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Remember the learning rate."""
        self.rate = kwargs["optimizer"].param_groups[0]["lr"]  # at `on_save` the scheduler has already stepped

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Mark the checkpoint, and remove old ones.

        Raises:
            ZebraError: weights that are not finite.
        """
        if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
            raise ZebraError(diverged("the weights are", state.global_step, self.rate, Path(args.output_dir)))
        args.distributed_state.wait_for_everyone()
        if state.is_world_process_zero:
            where = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            sync(where.parent)  # the directory entry too
            atomic_write(where / COMPLETE, json.dumps(_described(where, with_digests=True), indent=2) + "\n")
            for step in sorted(_whole_steps(where.parent))[: -self.limit]:
                shutil.rmtree(where.with_name(f"checkpoint-{step}"), ignore_errors=True)


class EndsOnSignal(TrainerCallback):
    """Saves a checkpoint and stops after the step in which any of the processes received SIGTERM.

    transformers' `enable_jit_checkpoint` saves inside a step, without `on_save`, and each process on its own.
    """

    def __init__(self, received: list[int]):
        self.received, self.ended = received, False

    def on_step_end(self, args: TrainingArguments, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Ask the Trainer to save and to stop; before any end, log the losses since the last log."""
        if self._any_received(args):
            control.should_save = control.should_training_stop = True
        control.should_log |= control.should_training_stop

    def on_train_end(self, args: TrainingArguments, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Record whether a signal came, also during the last save."""
        self.ended = self._any_received(args)

    def _any_received(self, args: TrainingArguments) -> bool:
        flag = torch.tensor(float(bool(self.received)), device=args.device)
        if dist.is_initialized():
            dist.all_reduce(flag)
        return bool(flag)
