"""What attention fetches of other processes' tokens: in each layer one all-to-all, and one more for sinks.

In the backward the same all-to-all, reversed, brings the gradients home, where autograd adds them up.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd

from zebra.kernels import Mask
from zebra.shards import Shards


def fetch(states: Tensor, shards: Shards, window: int | None, rank: int, group: dist.ProcessGroup) -> Tensor:
    """All tokens that a process sees, once each and in their order: (B, K, m, D) from the shards (B, K, n, D).

    The first ones are those that its first chunk sees, the last ones those of its second (`Shards.seen`).
    """

    def pieces(owner: int, reader: int) -> list[tuple[range, slice]]:
        """Of what `reader` fetches the tokens of `owner`, and where they stand in its shard."""
        if owner == reader:
            return []
        overlaps = []
        for at, held in zip((0, shards.chunk), shards.held(owner), strict=True):
            for tokens in shards.fetched(reader, window):
                both = range(max(held.start, tokens.start), min(held.stop, tokens.stop))
                if both:
                    overlaps.append((both, slice(at + both.start - held.start, at + both.stop - held.start)))
        return overlaps

    rows, processes = states.permute(2, 0, 1, 3), range(shards.processes)
    outgoing = [[rows[place] for _, place in pieces(rank, reader)] for reader in processes]
    incoming = [[tokens for tokens, _ in pieces(owner, rank)] for owner in processes]
    got = _exchange([torch.cat([rows[:0], *parts]) for parts in outgoing], [sum(map(len, x)) for x in incoming], group)
    ranges = [tokens for parts in incoming for tokens in parts]
    fetched = dict(zip((x.start for x in ranges), got.split([len(x) for x in ranges]) if ranges else (), strict=True))
    own = dict(zip((held.start for held in shards.held(rank)), rows.chunk(2), strict=True))
    in_order = [part for _, part in sorted((fetched | own).items(), key=lambda item: item[0])]
    # Whoever fetches nothing still takes part in the backward: its empty tensor stands in the graph.
    return torch.cat([part.permute(1, 2, 0, 3) for part in (got[:0], *in_order)], dim=2)


def _exchange(outgoing: list[Tensor], incoming: list[int], group: dist.ProcessGroup) -> Tensor:
    """Rows (m_r, ...) to each process r of the group, and from each its rows, `incoming` many, in order."""
    sizes = [len(rows) for rows in outgoing]
    return all_to_all_single_autograd(torch.cat(outgoing).contiguous(), incoming, sizes, group)


def sinks_before(
    whole: Mask, first_keys: list[int], sinks: int, shape: tuple[int, int], device: torch.device
) -> Tensor:
    """For each of some chunks the sinks that stand before the keys that it sees: indices (B, chunks, sinks), or -1.

    They belong to the document of the first key that is seen. All other documents that a chunk sees begin behind it.
    The last column is the token nearest to that key.

    Args:
        first_keys: the first key that each chunk sees.
        shape: B and the tokens of the whole sequence.
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
    """Single tokens from wherever they are: (B, K, s, D) from the shards (B, K, n, D); 0 where none is needed.

    tables: the tokens that each process needs, (B, s), -1 for none.
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
    sources = [places(rank, owner) for owner in range(shards.processes)]
    got = _exchange(outgoing, [len(entry) for entry, _ in sources], group)
    at = tuple(torch.cat(parts) for parts in zip(*sources, strict=True))
    tokens = rows.new_zeros(*tables[rank].shape, *rows.shape[2:]).index_put(at, got)
    return tokens.transpose(1, 2)


def with_sinks(seen: Mask, sinks: Tensor, keys: int) -> Mask:
    """The mask of fetched sinks (B, s), -1 for none, in front of the keys of `seen`."""
    if not sinks.shape[1]:
        return seen
    real = sinks >= 0
    of_keys = real.new_ones(len(sinks), keys) if seen.keys is None else seen.keys.bool()
    documents = seen.documents
    if documents is not None:  # sinks belong to the first document that is seen
        documents = torch.cat([documents[:, :1].expand_as(sinks), documents], dim=1)
    return replace(seen, keys=torch.cat([real, of_keys], dim=1), documents=documents)
