"""Fetch the keys and values of other processes: one all-to-all in each layer, and one more for sinks.

In the backward pass the reverse all-to-all sends the gradients back to the tokens' owners, which add them up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed._functional_collectives import all_to_all_single, all_to_all_single_autograd, wait_tensor

from zebra.kernels import Mask
from zebra.shards import Shards


def fetch(
    key: Tensor, value: Tensor, shards: Shards, window: int | None, group: dist.ProcessGroup
) -> list[tuple[Tensor, Tensor]]:
    """The keys and values that the queries of each of this process's two chunks see (`Shards.seen`).

    Args:
        key, value: (B, K, n, D) of the shard.

    Returns:
        For each chunk, keys and values (B, K, S, D), all views of one tensor.
    """
    gather = _Gather(shards, window, group, key.shape[3])
    first_key, first_value, second_key, second_value = _Fetch.apply(torch.cat([key, value], dim=3), gather)
    return [(first_key, first_value), (second_key, second_value)]


@dataclass(frozen=True)
class _Gather:
    """Which tokens go where, so that a process has all that it sees, each once and in order."""

    shards: Shards
    window: int | None
    group: dist.ProcessGroup
    width: int

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    def runs(self, reader: int) -> tuple[range, ...]:
        """The tokens that a process sees, its own among them."""
        first, second = self.shards.seen(reader, self.window)
        return (first, second) if first.stop < second.start else (range(first.start, second.stop),)

    def pieces(self, owner: int, reader: int) -> list[tuple[slice, slice]]:
        """The tokens of `owner` that `reader` sees: slices of the owner's shard, and of what the reader sees."""
        pieces, before = [], 0
        for run in self.runs(reader):
            for at, held in zip((0, self.shards.chunk), self.shards.held(owner), strict=True):
                start, stop = max(held.start, run.start), min(held.stop, run.stop)
                if start < stop:
                    place, comes = at - held.start, before - run.start
                    pieces.append((slice(place + start, place + stop), slice(comes + start, comes + stop)))
            before += len(run)
        return pieces

    def exchange(self, states: Tensor, into: Tensor, *, back: bool = False) -> None:
        """Add the tokens of all shards (B, K, n, 2 D) to what this process sees (B, K, m, 2 D); `back` the reverse."""
        processes = range(self.shards.processes)
        sent = [[place for place, _ in self.pieces(self.rank, reader)] for reader in processes]
        received = [[place for _, place in self.pieces(owner, self.rank)] for owner in processes]
        if back:
            sent, received = received, sent
        for source, place in zip(sent[self.rank], received[self.rank], strict=True):
            into[:, :, place] += states[:, :, source]
        sent[self.rank], received[self.rank] = [], []
        rows = states.permute(2, 0, 1, 3)
        outgoing = torch.cat([rows[:0], *(rows[place] for places in sent for place in places)])
        outgoing_sizes, sizes = ([sum(x.stop - x.start for x in places) for places in one] for one in (sent, received))
        arrived = wait_tensor(all_to_all_single(outgoing.contiguous(), sizes, outgoing_sizes, self.group))
        places = [place for places in received for place in places]
        for place, part in zip(places, arrived.split([x.stop - x.start for x in places]), strict=True):
            into[:, :, place] += part.permute(1, 2, 0, 3)


class _Fetch(torch.autograd.Function):
    """Views of one tensor of all that is seen; their gradients return to the owners, which add them up in float32."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, gather: _Gather) -> tuple[Tensor, ...]:
        count = sum(map(len, gather.runs(gather.rank)))
        seen = states.new_zeros(*states.shape[:2], count, states.shape[3])
        gather.exchange(states, seen)
        ctx.gather, ctx.shape = gather, states.shape
        return _parts(seen, gather)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gather, dtype = ctx.gather, gradients[0].dtype
        count = sum(map(len, gather.runs(gather.rank)))
        of_seen = gradients[0].new_zeros(*ctx.shape[:2], count, ctx.shape[3])
        for part, gradient in zip(_parts(of_seen, gather), gradients, strict=True):
            part += gradient
        of_states = of_seen.new_zeros(ctx.shape, dtype=torch.promote_types(dtype, torch.float32))
        gather.exchange(of_seen, of_states, back=True)
        return of_states.to(dtype), None


def _parts(seen: Tensor, gather: _Gather) -> tuple[Tensor, ...]:
    """The keys and the values that the first chunk sees, then those of the second, in all that a process sees."""
    first, second = (len(tokens) for tokens in gather.shards.seen(gather.rank, gather.window))
    chunks = seen[:, :, :first], seen[:, :, seen.shape[2] - second :]
    return tuple(part for chunk in chunks for part in chunk.tensor_split([gather.width], dim=3))


def sinks_before(
    whole: Mask, first_keys: list[int], sinks: int, shape: tuple[int, int], device: torch.device
) -> Tensor:
    """The sinks before the keys that each of some chunks sees: indices (B, chunks, sinks), -1 where there is none.

    They belong to the document of the first key that is seen. All other documents that a chunk sees begin after it.
    The last column is the token nearest to that key.

    Args:
        first_keys: the first key that each chunk sees.
        shape: B, and the number of tokens in the whole sequence.
    """
    start = torch.tensor(first_keys, device=device)[:, None]
    first = whole.first_tokens(shape[1], device).expand(shape)[:, first_keys, None]
    absent_columns = sinks - (start - first).clamp(0, sinks)
    indices = first + torch.arange(sinks, device=device) - absent_columns
    absent = indices < first
    if whole.keys is not None:
        inside = indices.clamp(0, shape[1] - 1)
        absent = absent | ~whole.keys.bool().gather(1, inside.flatten(1)).view_as(indices)
    return indices.masked_fill(absent, -1)


def fetch_tokens(states: Tensor, tables: list[Tensor], shards: Shards, rank: int, group: dist.ProcessGroup) -> Tensor:
    """Fetch single tokens from all processes: (B, K, s, D) from the shards (B, K, n, D); 0 where none is needed.

    tables: the indices of the tokens that each process needs, (B, s), -1 for none.
    """
    rows, c = states.transpose(1, 2), shards.chunk
    last = 2 * shards.processes - 1

    def places(reader: int, owner: int) -> tuple[Tensor, ...]:
        chunk = tables[reader] // c
        return torch.where((tables[reader] >= 0) & ((chunk == owner) | (chunk == last - owner)))

    outgoing = []
    for reader in range(shards.processes):
        entry, column = places(reader, rank)
        token = tables[reader][entry, column]
        outgoing.append(rows[entry, token % c + c * (token // c == last - rank)])
    incoming = [places(rank, owner) for owner in range(shards.processes)]
    sizes = [len(entry) for entry, _ in incoming], [len(part) for part in outgoing]
    arrived = all_to_all_single_autograd(torch.cat(outgoing).contiguous(), *sizes, group)
    at = tuple(torch.cat(parts) for parts in zip(*incoming, strict=True))
    tokens = rows.new_zeros(*tables[rank].shape, *rows.shape[2:]).index_put(at, arrived)
    return tokens.transpose(1, 2)


def with_sinks(seen: Mask, sinks: Tensor, keys: int) -> Mask:
    """The mask of fetched sinks (B, s), -1 for none, before the keys of `seen`."""
    if not sinks.shape[1]:
        return seen
    real = sinks >= 0
    of_keys = real.new_ones(len(sinks), keys) if seen.keys is None else seen.keys.bool()
    documents = seen.documents
    if documents is not None:  # the sinks are of the first document that is seen
        documents = torch.cat([documents[:, :1].expand_as(sinks), documents], dim=1)
    return replace(seen, keys=torch.cat([real, of_keys], dim=1), documents=documents)
