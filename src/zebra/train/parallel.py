"""A Trainer whose processes share more than batches: they can split sequences, weights and optimiser states.

    processes = data x shard x sequence        adjacent ranks split a sequence; next come those that shard weights

    data       all weights, different sequences
    shard      FSDP2 (`torch.distributed.fsdp.fully_shard`): a layer's weights are gathered before it runs, and its
               gradients are reduce-scattered; each process steps on its own shard
    sequence   the tokens of a sequence are split (`zebra.model.sequence_parallel`); with `shard` the weights too

accelerate's plug-in shards only on GPUs, and on CPUs silently falls back to DDP. So the model is sharded here, and
accelerate only adds autocast. In a checkpoint the weights are in the stock format, gathered by the first process; each
process writes its shard of the optimiser's moments with torch's distributed checkpoint, as safetensors. Any number of
processes can resume from it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import AutocastKwargs
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState

from zebra.model.compiled import decoder_layers
from zebra.model.sequence_parallel import set_sequence_parallel, shard_batch
from zebra.train.processes import data_groups
from zebra.train.recipe import Parallel, Recipe

_MOMENTS, _SCHEDULE = "moments", "schedule.pt"
"""The names that a checkpoint of sharded weights has in place of the Trainer's states."""
_BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)


class ParallelTrainer(Trainer):
    """A Trainer whose processes may share sequences and weights.

    Args:
        parallel: how they share them.
    """

    def __init__(self, *args: Any, parallel: Parallel, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.parallel = parallel

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The Trainer's, but batch `i` goes to group `i` of the processes that split a sequence.

        accelerate gives each process its own batches. Its context parallelism would not, but it supports only sdpa and
        no sliding window.
        """
        loader = super().get_train_dataloader()
        if (sequence := self.parallel.sequence) > 1:
            loader.batch_sampler.num_processes //= sequence
            loader.batch_sampler.process_index //= sequence
        return loader

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        """The Trainer's, over this process's shard of the weights."""
        if self.parallel.shard > 1:
            shard_weights(self.model, self.parallel, self.accelerator.device.type)
            # Autocast's cache would keep the bfloat16 copies of all gathered weights to the end of the forward pass.
            self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
            # Prepared here, with autocast and without DDP, the model is not wrapped again.
            self.accelerator.prepare_model(self.model, device_placement=False, evaluation_mode=True)
        return super().create_optimizer(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The Trainer's, but sharded weights are gathered in the first process."""
        if self.parallel.shard == 1:
            super().save_model(output_dir, _internal_call)
            return
        frozen = not all(parameter.requires_grad for parameter in self.model.parameters())
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=frozen)
        weights = get_model_state_dict(self.model, options=options)
        for tied in getattr(self.model, "all_tied_weights_keys", ()):
            weights.pop(tied, None)
        if self.is_world_process_zero():
            self.model.save_pretrained(output_dir or self.args.output_dir, state_dict=weights)


def shard_weights(model: nn.Module, parallel: Parallel, device: str) -> None:
    """Shard the weights of a model over processes, in place: each becomes a DTensor, split along its first axis.

    Layers are gathered one by one, embeddings and the head for the whole step.
    """
    size = parallel.shard * parallel.sequence
    mesh = init_device_mesh(device, (dist.get_world_size() // size, size), mesh_dim_names=("data", "shard"))
    for module in (*decoder_layers(model), model):
        fully_shard(module, mesh=mesh if mesh["data"].size() > 1 else mesh["shard"])


class ShardedStates(TrainerCallback):
    """Saves the moments and the schedule of sharded weights, and loads them with any number of processes.

    Only the schedule is pickled, and it is loaded with `weights_only`. All random numbers of a training follow from its
    seed, so a checkpoint has no states of generators.

    Args:
        checkpoint: the checkpoint to resume from.
        is_sharded: whether the weights are sharded now.
    """

    def __init__(self, checkpoint: str | None, is_sharded: bool):
        self.checkpoint, self.is_sharded = None if checkpoint is None else Path(checkpoint), is_sharded

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, lr_scheduler: Any, **kwargs: Any
    ) -> None:
        """Load the states of the checkpoint; shard the states of whole weights, which the Trainer loaded."""
        optimizer = getattr(optimizer, "optimizer", optimizer)
        if self.checkpoint is not None and (self.checkpoint / _MOMENTS).is_dir():
            _read_moments(self.checkpoint / _MOMENTS, model, optimizer)
            lr_scheduler.load_state_dict(torch.load(self.checkpoint / _SCHEDULE, weights_only=True))
            for group, rate in zip(optimizer.param_groups, lr_scheduler.get_last_lr(), strict=True):
                group["lr"] = rate  # the scheduler sets it only after a step
        for parameter, states in optimizer.state.items():
            for name, value in states.items():
                if isinstance(parameter, DTensor) and not isinstance(value, DTensor) and value.shape == parameter.shape:
                    states[name] = distribute_tensor(value, parameter.device_mesh, parameter.placements)

    def on_save(
        self, args: Any, state: TrainerState, control: Any, model: Any, optimizer: Any, lr_scheduler: Any, **kwargs: Any
    ) -> None:
        """Write the moments and the schedule."""
        if not self.is_sharded:
            return
        where = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        writer = HuggingFaceStorageWriter(str(where / _MOMENTS), save_distributed=True)
        states = get_optimizer_state_dict(model, getattr(optimizer, "optimizer", optimizer), options=_BY_NAME)
        save(_tensors(states), storage_writer=writer)
        if state.is_world_process_zero:
            torch.save(lr_scheduler.state_dict(), where / _SCHEDULE)


def _read_moments(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    states = get_optimizer_state_dict(model, optimizer, options=_BY_NAME)
    moments = _tensors(states)
    with warnings.catch_warnings():  # a single process may resume from what several wrote
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)
        load(moments, storage_reader=HuggingFaceStorageReader(str(folder)))
    set_optimizer_state_dict(model, optimizer, states | moments, options=_BY_NAME)


def _tensors(states: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of an optimiser's states, its moments; the rest are settings of the recipe."""
    return {name: value for name, value in states.items() if isinstance(value, Tensor)}


def shard(batch: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """This process's shard of a batch."""
    size = recipe.parallel.sequence
    return dict(batch) if size == 1 else shard_batch(batch, dist.get_rank() % size, size)


@contextmanager
def sharing(model: PreTrainedModel, recipe: Recipe) -> Iterator[None]:
    """Within this context the model attends over sequences that processes split, if the recipe says so."""
    size = recipe.parallel.sequence
    if size > 1:
        mesh = init_device_mesh(model.device.type, (data_groups(recipe), size), mesh_dim_names=("data", "sequence"))
        set_sequence_parallel(model, mesh["sequence"].get_group(), ring=recipe.parallel.ring)
    with warnings.catch_warnings():  # the view is the empty `logits`, which nobody modifies
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
        yield
    if size > 1:
        set_sequence_parallel(model, None)
