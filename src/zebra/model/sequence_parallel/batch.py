"""Split a batch into one shard for each process, and put the losses of its tokens back in order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad

from zebra.data.packing import IGNORE
from zebra.model.documents import PACKING_KWARGS, documents_of
from zebra.model.override import overrides_of
from zebra.model.sequence_parallel.attention import SequenceParallelAttention
from zebra.shards import Shards

WHOLE = ("sequence_keys", "sequence_documents", "sequence_positions")
"""Arguments of a forward pass for attention, of the whole sequence: which tokens are real, if there is padding, their
documents, if there are several, and their positions, in either case.
"""


def shard_batch(batch: Mapping[str, Any], rank: int, size: int) -> dict[str, Any]:
    """One process's shard of a batch, which all processes of its group hold whole.

    Args:
        batch: `input_ids` (B, N), optionally `attention_mask`, `position_ids` and `labels` (B, N), and the arguments
            that name packed documents (`zebra.model.documents`). All others are passed on.
        rank, size: this process's rank, and the number of processes that share the sequence.

    Returns:
        The model's arguments for the tokens of `Shards.held`, (B, n) each, and those of `WHOLE`. `labels` are
        (B, n + 1) for `zebra.model.loss`: an ignored one, then what each token predicts, also at the ends of chunks.
    """
    batch = dict(batch)
    packing = {name: batch.pop(name, None) for name in PACKING_KWARGS}
    ids, keys, positions = batch.pop("input_ids"), batch.pop("attention_mask", None), batch.pop("position_ids", None)
    count, tokens = ids.shape
    documents = documents_of(positions, None if keys is None else keys.bool(), (count, tokens), **packing)
    if positions is None:
        positions = torch.arange(tokens, device=ids.device)[None]
    shards = Shards(tokens, size)
    missing = shards.padded - tokens
    behind = positions[:, -1:] + torch.arange(1, missing + 1, device=ids.device)
    whole = {"input_ids": pad(ids, (0, missing)), "position_ids": torch.cat([positions, behind], dim=1)}
    shared: dict[str, Tensor] = {}
    if keys is not None and not bool(keys.all()):
        shared["sequence_keys"] = whole["attention_mask"] = pad(keys.bool(), (0, missing))
    if documents is not None:
        shared["sequence_documents"] = torch.cat([documents, documents[:, -1:].expand(-1, missing)], dim=1)
    if shared:
        shared["sequence_positions"] = whole["position_ids"]
    # A table of learned positions ends with the longest text; no token sees the padding's.
    whole["position_ids"] = whole["position_ids"].clamp(max=int(positions.max()))

    def own(tensor: Tensor) -> Tensor:
        return torch.cat([tensor[:, held.start : held.stop] for held in shards.held(rank)], dim=1)

    shard = {name: own(tensor) for name, tensor in whole.items()}
    if (labels := batch.pop("labels", None)) is not None:
        shard["labels"] = pad(own(pad(labels[:, 1:], (0, missing + 1), value=IGNORE)), (1, 0), value=IGNORE)
    return batch | shard | shared


def _group_of(model: nn.Module) -> dist.ProcessGroup | None:
    """The processes over which a model's sequences are split; None if it reads whole sequences."""
    return next((override.group for override in overrides_of(model, SequenceParallelAttention)), None)


def shard_for(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """This process's shard of a batch, or the batch itself if the model reads whole sequences."""
    group = _group_of(model)
    return dict(batch) if group is None else shard_batch(batch, dist.get_rank(group), dist.get_world_size(group))


def whole_losses(model: nn.Module, losses: Tensor, tokens: int) -> Tensor:
    """The losses of a batch, (B, `tokens`), from those that `token_losses` returns for its shard from `shard_for`."""
    group = _group_of(model)
    if group is None:
        return losses
    own = losses[:, 1:].contiguous()
    of_processes = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(of_processes, own, group)
    first, second = zip(*(shard.chunk(2, dim=1) for shard in of_processes), strict=True)
    nothing_before = losses.new_full((len(losses), 1), float("nan"))
    return torch.cat([nothing_before, *first, *reversed(second)], dim=1)[:, :tokens]
