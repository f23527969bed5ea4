"""The processes of a launcher such as torchrun, and how they share a recipe's work."""

from __future__ import annotations

import os

from zebra.errors import ZebraError
from zebra.train.recipe import Recipe


def is_first_process() -> bool:
    """Whether this process is the one, among those of a launcher, that writes and prints."""
    return os.environ.get("RANK", "0") == "0"


def processes() -> int:
    """The number of processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_processes() -> int:
    """The number of these processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def check_processes(recipe: Recipe) -> None:
    """Check that the processes that the launcher started can share the recipe's work.

    Raises:
        ZebraError: their number is not a multiple of `parallel.shard` x `parallel.sequence`, or not data x shard x
            sequence; the launcher would shard weights too.
    """
    parallel, count = recipe.parallel, processes()
    sharing = parallel.shard * parallel.sequence
    planned = sharing * (parallel.data or max(1, count // sharing))
    if count != planned:
        sizes = {"shard": parallel.shard, "sequence": parallel.sequence, "data": parallel.data or 0}
        several = [f"parallel.{name} {size}" for name, size in sizes.items() if size > 1 or (name == "data" and size)]
        raise ZebraError(
            f"{' x '.join(several)} requires {'' if parallel.data else 'a multiple of '}"
            f"{sharing * (parallel.data or 1)} processes; {count} {'was' if count == 1 else 'were'} started. "
            f"Start it as `torchrun --nproc-per-node {planned} -m zebra ...`, or change parallel."
        )
    for engine in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true":
            option = f"--use_{engine.lower()}"
            raise ZebraError(
                f"a recipe shards weights by parallel.shard, but accelerate was started with {option}. Remove {option} "
                "from the command or from accelerate's config."
            )


def data_groups(recipe: Recipe) -> int:
    """How many groups of processes train on sequences of their own; without a launcher, the least that there may be."""
    return max(processes() // recipe.parallel.sequence, recipe.parallel.shard * (recipe.parallel.data or 1))


def sequences_per_step(recipe: Recipe) -> int:
    """The number of sequences in a full optimiser step, over all processes."""
    train = recipe.train
    return train.per_device_train_batch_size * train.gradient_accumulation_steps * data_groups(recipe)


def check_step(recipe: Recipe, sequences: int) -> None:
    """Check that the data fill at least one step; else steps would be smaller than the recipe says.

    Raises:
        ZebraError: the data have fewer sequences.
    """
    if sequences < (step := sequences_per_step(recipe)):
        raise ZebraError(
            f"the data have {sequences:,} sequences of {recipe.train.length:,} tokens, fewer than the {step:,} of one "
            "step. Give more data, or use shorter or fewer sequences."
        )


def sequences_of_training(recipe: Recipe) -> int:
    """The number of sequences in all optimiser steps."""
    return recipe.train.max_steps * sequences_per_step(recipe)


def tokens_per_step(recipe: Recipe) -> int:
    """The number of tokens in a full optimiser step, over all processes. The last step of an epoch may have fewer."""
    return recipe.train.length * sequences_per_step(recipe)
