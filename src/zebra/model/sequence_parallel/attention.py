"""Attention over split sequences: each chunk's queries attend to all keys that they see."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from zebra.errors import ZebraError
from zebra.kernels import Mask, attend, autocast
from zebra.kernels.merging import join
from zebra.kernels.sinks import sink_attention
from zebra.model.local import LocalAttention
from zebra.model.override import (
    AttentionOverride,
    attention_modules,
    get_override,
    names_of_other_overrides,
    overrides_of,
    set_override,
)
from zebra.model.rope import changes_with_length
from zebra.model.self_extend.layer import NO_POSITION_IDS, SelfExtendAttention
from zebra.model.sequence_parallel.exchange import fetch, fetch_tokens, sinks_before, with_sinks
from zebra.model.sequence_parallel.ring import ring_attention
from zebra.shards import Shards


def set_sequence_parallel(model: PreTrainedModel, group: dist.ProcessGroup | None, *, ring: bool = False) -> None:
    """Make a loaded model attend over sequences that are split over a group of processes by `shard_batch`.

    Args:
        group: None makes the model read whole sequences again.
        ring: global layers pass keys and values round a ring instead of gathering them.

    Raises:
        ZebraError: a rope that changes with the length, which a shard does not know; overrides other than those of
            sinks, full decoding and Self-Extend; a ring under Self-Extend or ALiBi.
    """
    if kind := changes_with_length(model.config):
        raise ZebraError(
            f"parallel.sequence requires a rope with fixed frequencies; those of type {kind} change with the length of "
            "the text. Use yarn, linear, llama3 or base, or set parallel.sequence to 1."
        )
    if others := names_of_other_overrides(model, LocalAttention, SelfExtendAttention, SequenceParallelAttention):
        raise ZebraError(f"parallel.sequence does not support layers with {others}. Set parallel.sequence to 1.")
    if ring and group is not None:
        _check_ring(model)
    for module in attention_modules(model):
        own = get_override(module)
        own = own.own if isinstance(own, SequenceParallelAttention) else own
        set_override(module, own if group is None else SequenceParallelAttention(group, own, ring))


def _check_ring(model: PreTrainedModel) -> None:
    """Reject Self-Extend and ALiBi, whose scores depend on how far away a key is."""
    wrapped = [override.own for override in overrides_of(model, SequenceParallelAttention)]
    of_layers = [*overrides_of(model, SelfExtendAttention), *wrapped]
    extended = any(isinstance(override, SelfExtendAttention) for override in of_layers)
    alibi = getattr(model.config, "position_embedding", None) == "alibi"
    if extended or alibi:
        raise ZebraError(
            f"parallel.ring does not support {'ALiBi' if alibi else 'Self-Extend'}, where scores depend on the "
            "distance of a key. Remove parallel.ring: global layers then gather their keys."
        )


@dataclass(frozen=True)
class SequenceParallelAttention:
    """The attention override of every layer of a model whose sequences are split.

    Attributes:
        group: the processes that share a sequence, in the order of `Shards`.
        own: the layer's previous override; None where it attends by `zebra.kernels.attend`.
        ring: whether global layers pass keys and values round a ring.
    """

    group: dist.ProcessGroup
    own: AttentionOverride | None
    ring: bool = False

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
        sequence_positions: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As `AttentionOverride.attend`, over the shard's queries (B, H, n, D) and all keys that they see.

        Args:
            key, value: (B, K, n, D) of the shard.
            mask: that of the shard; only its window is used.
            sequence_keys, sequence_documents: (B, P n), of the whole sequence; None where all tokens are real, or in
                one document.
            sequence_positions: (1 or B, P n); None where all tokens are real and in one document.

        Raises:
            ZebraError: cached tokens.
        """
        length, size, rank = query.shape[2], dist.get_world_size(self.group), dist.get_rank(self.group)
        if not isinstance(key, Tensor) or key.shape[2] != length:
            raise ZebraError("a sequence that is split over processes cannot use cached tokens. Pass use_cache=False.")
        if not isinstance(self.own, SelfExtendAttention):
            query, key, value = autocast(query, key, value)  # as `attend` would, before they are sent
        whole = replace(mask, keys=sequence_keys, documents=sequence_documents)
        if self.ring and mask.window is None:
            return ring_attention(query, key, value, whole, group=self.group, **kwargs)
        shards = Shards(size * length, size)
        seen, fetched = shards.seen(rank, mask.window), fetch(key, value, shards, mask.window, self.group)
        masks = [whole.sliced(tokens.start, tokens.stop) for tokens in seen]
        run: Any = attend
        if isinstance(self.own, LocalAttention) and self.own.sinks and mask.window is not None:
            fetched, masks = self._behind_sinks(torch.cat([key, value], dim=3), whole, shards, fetched, masks)
            run = sink_attention
        results = []
        held = shards.held(rank)
        for own, tokens, queries, of_chunk, its_mask in zip(
            held, seen, query.chunk(2, dim=2), fetched, masks, strict=True
        ):
            if isinstance(self.own, LocalAttention) and self.own.rotation is not None:
                tokens_before = _tokens_before(own, whole, key.device)
                run = partial(sink_attention, rotation=self.own.rotation, tokens_before=tokens_before)
            if isinstance(self.own, SelfExtendAttention):
                up_to = _positions_up_to(positions, sequence_positions, held[0].start, tokens.stop)
                run = partial(self.own.attend, module, up_to)
            results.append(run(queries, *of_chunk, its_mask, **kwargs))
        return join(*results)

    def _behind_sinks(
        self, states: Tensor, whole: Mask, shards: Shards, fetched: list[tuple[Tensor, Tensor]], masks: list[Mask]
    ) -> tuple[list[tuple[Tensor, Tensor]], list[Mask]]:
        """The keys, values and masks for each of the two chunks, with the sinks put before the keys."""
        assert isinstance(self.own, LocalAttention)
        rank, sinks, shape = dist.get_rank(self.group), self.own.sinks, (len(states), shards.padded)
        width = fetched[0][0].shape[3]
        firsts = [[tokens.start for tokens in shards.seen(r, whole.window)] for r in range(shards.processes)]
        tables = [sinks_before(whole, one, sinks, shape, states.device) for one in firsts]
        tokens = fetch_tokens(states, [table.flatten(1) for table in tables], shards, rank, self.group)
        behind, its_masks = [], []
        for i, (of_chunk, mask) in enumerate(zip(fetched, masks, strict=True)):
            table = tables[rank][:, i]
            table = table if bool((table >= 0).any()) else table[:, :0]
            # Even an empty part stays in the graph: in the backward pass all processes take part in the exchange.
            first = tokens[:, :, i * sinks : i * sinks + table.shape[1]].tensor_split([width], dim=3)
            key, value = (torch.cat(parts, dim=2) for parts in zip(first, of_chunk, strict=True))
            behind.append((key, value))
            its_masks.append(replace(with_sinks(mask, table, key.shape[2] - table.shape[1]), sinks=sinks))
        return behind, its_masks


def _tokens_before(own: range, whole: Mask, device: torch.device) -> Tensor:
    """The number of real tokens before each token `own` of a sequence, in its document: (1 or B, n)."""
    first = whole.sliced(end=own.stop).first_tokens(own.stop, device)[:, own.start :]
    return torch.arange(own.start, own.stop, device=device) - first


def _positions_up_to(positions: Tensor | None, of_sequence: Tensor | None, start: int, end: int) -> Tensor:
    """The positions of the first `end` tokens of a sequence, (1 or B, end).

    Args:
        positions: of the shard, (1 or B, n), whose first token is token `start` of the sequence.
        of_sequence: of the whole sequence; None where they rise by 1 throughout.
    """
    if of_sequence is not None:
        return of_sequence[:, :end]
    if positions is None:
        raise ZebraError(NO_POSITION_IDS)
    return positions[:, :1] + torch.arange(-start, end - start, device=positions.device)
