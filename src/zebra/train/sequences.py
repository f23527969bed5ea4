"""Sequences that several processes of a launcher share: the same batch to each of them, a shard of it to its model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer

from zebra.model.sequence_parallel import set_sequence_parallel, shard_batch
from zebra.train.directory import data_groups
from zebra.train.recipe import Recipe


class SharedBatches(Trainer):
    """A Trainer whose data loader hands the same batches to all processes that share a sequence.

    Args:
        sequence: how many they are. accelerate hands each process of its own batches; its context parallelism, which
            would not, takes sdpa alone, and knows no window.
    """

    def __init__(self, *args: Any, sequence: int = 1, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.sequence = sequence

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As the Trainer's; batch `i` goes to the group `i` of processes."""
        loader = super().get_train_dataloader()
        if self.sequence > 1:
            loader.batch_sampler.num_processes //= self.sequence
            loader.batch_sampler.process_index //= self.sequence
        return loader


def shard(batch: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """This process's shard of a batch."""
    size = recipe.parallel.sequence
    return dict(batch) if size == 1 else shard_batch(batch, dist.get_rank() % size, size)


@contextmanager
def splitting_sequences(model: PreTrainedModel, recipe: Recipe) -> Iterator[None]:
    """Within this context the model attends over sequences that processes share, where the recipe says so."""
    size = recipe.parallel.sequence
    if size == 1:
        yield
        return
    mesh = init_device_mesh(model.device.type, (data_groups(recipe), size), mesh_dim_names=("data", "sequence"))
    set_sequence_parallel(model, mesh["sequence"].get_group())
    yield
    set_sequence_parallel(model, None)
