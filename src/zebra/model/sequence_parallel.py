r"""Striped sequence parallelism: the tokens of a sequence are split over processes, and attention fetches what it sees.

    process      0          1          2          3
    tokens    [0 .. n)  [n .. 2n)  [2n .. 3n)  [3n .. 4n)      n = ceil(N / P)
    local               ~~]        ~~]         ~~]             each fetches the w - 1 keys before its first token
    global              ~~~~~~~~]  ~~~~~~~~~~~~~~~~~~~]        each fetches all keys before its first token

Everything but attention works on single tokens, so the model runs on its shard as it is. In every layer one
all-to-all brings the keys and values that the shard's queries see and that others hold; in the backward the same
all-to-all, reversed, brings their gradients home, where autograd adds them up. A window longer than a shard reaches
over several processes. Nothing later than a query is ever sent. What crosses, in numbers for a sequence and a layer:

    2 K D sum over processes r of min(reach, r n),     reach = w - 1 local, N global

once in the forward and once in the backward (`zebra.plan.parallel`). Sinks add the first tokens of the one document
that may have begun before the fetched keys. They stand right in front of those, as if nothing were between: no query of
the shard has them in its window, neither so nor in the whole sequence.

The naive twin is one process. Ring attention (arXiv 2310.01889) and Ulysses (arXiv 2309.14509) split full attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.nn.functional import pad
from transformers import PreTrainedModel

from zebra.errors import ZebraError
from zebra.kernels import Mask, attend, autocast
from zebra.kernels.sinks import sink_attention
from zebra.model.documents import PACKING_KWARGS, documents_of
from zebra.model.local import LocalAttention
from zebra.model.loss import IGNORE
from zebra.model.override import (
    AttentionOverride,
    get_override,
    names_of_other_overrides,
    overrides_of,
    set_override,
)
from zebra.model.rope import changes_with_length
from zebra.model.self_extend.layer import SelfExtendAttention

WHOLE_KEYS, WHOLE_DOCUMENTS = "sequence_keys", "sequence_documents"
"""Arguments of a forward that attention gets: which tokens of the whole sequence are real, and their documents."""


def shard_length(tokens: int, size: int) -> int:
    """The tokens of a shard, ceil(N / P): the last shards of a length that does not divide end in padding."""
    return -(-tokens // size)


def shard_batch(batch: Mapping[str, Any], rank: int, size: int) -> dict[str, Any]:
    """What one process gives its model of a batch that all processes of its group hold whole.

    Args:
        batch: `input_ids` (B, N) and, where there are any, `attention_mask`, `position_ids` and `labels` (B, N), and
            the arguments that name packed documents (`zebra.model.documents`). Others are passed on.
        rank, size: this process among those that share the sequence.

    Returns:
        The arguments of the model, (B, n) each. `labels` are (B, n + 1), from the shard's first token to the one behind
        its last, so that the loss of `zebra.model.loss` predicts across the border.
    """
    batch = dict(batch)
    packing = {name: batch.pop(name, None) for name in PACKING_KWARGS}
    ids, keys, positions = batch.pop("input_ids"), batch.pop("attention_mask", None), batch.pop("position_ids", None)
    count, tokens = ids.shape
    documents = documents_of(positions, None if keys is None else keys.bool(), (count, tokens), **packing)
    if positions is None:
        positions = torch.arange(tokens, device=ids.device)[None]
    length = shard_length(tokens, size)
    start, missing = rank * length, size * length - tokens
    behind = positions[:, -1:] + torch.arange(1, missing + 1, device=ids.device)
    whole = {"input_ids": pad(ids, (0, missing)), "position_ids": torch.cat([positions, behind], dim=1)}
    shared: dict[str, Tensor] = {}
    if keys is not None and not bool(keys.all()):
        shared[WHOLE_KEYS] = whole["attention_mask"] = pad(keys.bool(), (0, missing))
    if documents is not None:
        shared[WHOLE_DOCUMENTS] = torch.cat([documents, documents[:, -1:].expand(-1, missing)], dim=1)
    shards = {name: tensor[:, start : start + length].contiguous() for name, tensor in whole.items()}
    if (labels := batch.pop("labels", None)) is not None:
        shards["labels"] = pad(labels, (0, missing + 1), value=IGNORE)[:, start : start + length + 1].contiguous()
    return batch | shards | shared


def set_sequence_parallel(model: PreTrainedModel, group: dist.ProcessGroup | None) -> None:
    """Make a loaded model attend over sequences whose shards (`shard_batch`) the processes of a group hold in order.

    None makes it read whole sequences again.

    Raises:
        ZebraError: a rope that changes with the length, which a shard does not know; layers that attend by others means
            than a window, sinks and Self-Extend.
    """
    if kind := changes_with_length(model.config):
        raise ZebraError(
            f"a rope of type {kind} changes its frequencies with the text's length, which no process of a split "
            "sequence knows. Take yarn, linear, llama3 or base, or parallel.sequence of 1."
        )
    if others := names_of_other_overrides(model, LocalAttention, SelfExtendAttention, SequenceParallelAttention):
        raise ZebraError(f"layers with {others} cannot split a sequence over processes. Take parallel.sequence of 1.")
    for module in model.modules():
        # An attention module of transformers: it has the index of its layer, and the scale of its scores.
        if hasattr(module, "layer_idx") and hasattr(module, "scaling"):
            own = get_override(module)
            own = own.own if isinstance(own, SequenceParallelAttention) else own
            set_override(module, own if group is None else SequenceParallelAttention(group, own))


def _group_of(model: nn.Module) -> dist.ProcessGroup | None:
    """The processes over which a model's sequences are split; None where it reads whole ones."""
    return next((override.group for override in overrides_of(model, SequenceParallelAttention)), None)


def shard_for(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """This process's shard of a batch, or the batch itself where the model reads whole sequences."""
    group = _group_of(model)
    return dict(batch) if group is None else shard_batch(batch, dist.get_rank(group), dist.get_world_size(group))


def whole_losses(model: nn.Module, losses: Tensor, tokens: int) -> Tensor:
    """The losses of a batch of (B, `tokens`), from what `token_losses` returns for `shard_for` of it."""
    group = _group_of(model)
    if group is None:
        return losses
    own = losses[:, 1:].contiguous()
    shards = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shards, own, group)
    return torch.cat([losses.new_full((len(losses), 1), float("nan")), *shards], dim=1)[:, :tokens]


@dataclass(frozen=True)
class SequenceParallelAttention:
    """The attention override of every layer of a model whose sequences are split.

    Attributes:
        group: the processes that share a sequence, in the order of its shards.
        own: the override that the layer had; None where it attends by `zebra.kernels.attend`.
    """

    group: dist.ProcessGroup
    own: AttentionOverride | None

    def attend(
        self,
        module: nn.Module,
        positions: Tensor | None,
        query: Tensor,
        key: Any,
        value: Tensor,
        mask: Mask,
        /,
        *,
        sequence_keys: Tensor | None = None,
        sequence_documents: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As `AttentionOverride.attend`, over the shard's queries (B, H, n, D) and all keys that they see.

        Args:
            key, value: (B, K, n, D) of the shard.
            mask: that of the shard, of which the window counts.
            sequence_keys, sequence_documents: (B, P n), or None where all tokens are real, or of one document.

        Raises:
            ZebraError: cached tokens; packed documents under Self-Extend.
        """
        length = query.shape[2]
        if not isinstance(key, Tensor) or key.shape[2] != length:
            raise ZebraError("a sequence that is split over processes is read whole. Pass use_cache=False.")
        if not isinstance(self.own, SelfExtendAttention):
            key, value = autocast(key, value)  # as `attend` would, before they travel
        rank, size = dist.get_rank(self.group), dist.get_world_size(self.group)
        whole = replace(mask, keys=sequence_keys, documents=sequence_documents)
        states, width = torch.cat([key, value], dim=3), key.shape[3]
        starts = [_first_key(r * length, mask.window) for r in range(size)]
        fetched = [_fetch(states, starts, rank, self.group), states]
        seen = whole.sliced(starts[rank], (rank + 1) * length)
        sinks = self.own.sinks if isinstance(self.own, LocalAttention) and mask.window is not None else 0
        if sinks:
            tables = _sinks_before(whole, starts, sinks, (len(key), size * length), key.device)
            first_tokens = _fetch_tokens(states, tables, rank, self.group)
            own_sinks = tables[rank] if bool((tables[rank] >= 0).any()) else tables[rank][:, :0]
            # None of them still stands in the graph: in the backward all processes exchange.
            fetched.insert(0, first_tokens[:, :, : own_sinks.shape[1]])
            seen = _with_sinks(seen, own_sinks, (rank + 1) * length - starts[rank])
        states = torch.cat(fetched, dim=2)
        key, value = states[..., :width], states[..., width:]
        if isinstance(self.own, SelfExtendAttention):
            if sequence_documents is not None:
                raise ZebraError(
                    "Self-Extend reads one document of a sequence that is split over processes; got packed ones. "
                    "Load the model without Self-Extend, or take parallel.sequence of 1."
                )
            return self.own.attend(module, positions, query, key, value, seen, **kwargs)
        if sinks:
            return sink_attention(query, key, value, replace(seen, sinks=sinks), **kwargs)
        return attend(query, key, value, seen, **kwargs)


def _first_key(start: int, window: int | None) -> int:
    """The first key that the query at `start` sees."""
    return 0 if window is None else max(0, start - window + 1)


def _fetch(states: Tensor, starts: list[int], rank: int, group: dist.ProcessGroup) -> Tensor:
    """The states of the tokens before this shard that it sees: (B, K, m, D) from the shards (B, K, n, D).

    starts: the first token that each process sees.
    """
    length = states.shape[2]

    def overlap(owner: int, reader: int) -> slice:
        """What `reader` sees of the tokens of `owner`."""
        first = length if owner >= reader else min(max(starts[reader] - owner * length, 0), length)
        return slice(first, length)

    rows = states.permute(2, 0, 1, 3)
    outgoing = [rows[overlap(rank, reader)] for reader in range(len(starts))]
    incoming = [length - overlap(owner, rank).start for owner in range(len(starts))]
    return _exchange(outgoing, incoming, group).permute(1, 2, 0, 3)


def _exchange(outgoing: list[Tensor], incoming: list[int], group: dist.ProcessGroup) -> Tensor:
    """Rows (m_r, ...) to each process r of the group, and from each its rows, `incoming` many, in order."""
    sizes = [len(rows) for rows in outgoing]
    return all_to_all_single_autograd(torch.cat(outgoing).contiguous(), incoming, sizes, group)


def _sinks_before(
    whole: Mask, starts: list[int], sinks: int, shape: tuple[int, int], device: torch.device
) -> list[Tensor]:
    """For each process the sinks that stand before the keys that it sees: indices (B, sinks), -1 where there is none.

    They belong to the document of the first key that is seen. All other documents that a shard sees begin behind it.
    The last column is the token nearest to that key.

    Args:
        starts: the first key that each process sees.
        shape: B and P n.
    """
    first_tokens = whole.first_tokens(shape[1], device).expand(shape)
    tables = []
    for start in starts:
        first = first_tokens[:, start, None]
        absent_columns = sinks - (start - first).clamp(0, sinks)
        indices = first + torch.arange(sinks, device=device) - absent_columns
        absent = indices < first
        if whole.keys is not None:
            absent = absent | ~whole.keys.bool().gather(1, indices.clamp(0, shape[1] - 1))
        tables.append(indices.masked_fill(absent, -1))
    return tables


def _fetch_tokens(states: Tensor, tables: list[Tensor], rank: int, group: dist.ProcessGroup) -> Tensor:
    """Single tokens from wherever they are: (B, K, s, D) from the shards (B, K, n, D); 0 where none is needed.

    tables: the tokens that each process needs, (B, s), -1 for none.
    """
    length = states.shape[2]
    rows = states.transpose(1, 2)

    def places(reader: int, owner: int) -> tuple[Tensor, ...]:
        return torch.where((tables[reader] >= 0) & (tables[reader] // length == owner))

    outgoing = []
    for reader in range(len(tables)):
        entry, column = places(reader, rank)
        outgoing.append(rows[entry, tables[reader][entry, column] - rank * length])
    sources = [places(rank, owner) for owner in range(len(tables))]
    got = _exchange(outgoing, [len(entry) for entry, _ in sources], group)
    at = tuple(torch.cat(parts) for parts in zip(*sources, strict=True))
    tokens = rows.new_zeros(*tables[rank].shape, *rows.shape[2:]).index_put(at, got)
    return tokens.transpose(1, 2)


def _with_sinks(seen: Mask, sinks: Tensor, keys: int) -> Mask:
    """The mask of fetched sinks (B, s), -1 for none, in front of the keys of `seen`."""
    if not sinks.shape[1]:
        return seen
    real = sinks >= 0
    of_keys = real.new_ones(len(sinks), keys) if seen.keys is None else seen.keys.bool()
    documents = seen.documents
    if documents is not None:  # sinks belong to the first document that is seen
        documents = torch.cat([documents[:, :1].expand_as(sinks), documents], dim=1)
    return replace(seen, keys=torch.cat([real, of_keys], dim=1), documents=documents)
