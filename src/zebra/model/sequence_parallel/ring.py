r"""Global attention by a ring: shards of keys and values go round, and each process merges its attention over them.

    step            0            1            2            3         P = 4; each process passes on what it holds
    process 0    0 7 \|       1 6  b       2 5  b       3 4  b       chunks of keys, and the queries that see them:
    process 1    1 6 \|       2 5  b       3 4  b       0   a b      \| causal, b the second chunk, a b both
    process 2    2 5 \|       3 4  b       0   a b      1   a b
    process 3    3 4 \|       0   a b      1   a b      2   a b      so each step has 2 c^2 pairs in every process

(Ring attention, arXiv 2310.01889, over `zebra.shards`.) Both key chunks of a later process are seen only by the second
chunk of queries. Of an earlier process, the first is seen by all queries and the second by none, so the second is not
passed on. The ring sends as much as a gather, and the same again in the backward pass. Each step's output is merged by
its log-sum-exp. Its gradients follow from the merged output and log-sum-exp,

    p_ij = exp(s_ij - lse_i),    ds_ij = p_ij (<do_i, v_j> - <do_i, out_i> + dlse_i)

and those of keys and values go back to the process that owns them, which adds them up in float32.

Another process's chunk is seen whole. `attend` is causal, so own keys follow it, hidden, one for each query:

    [ slot: 2 c of keys | own 2 c ]    queries are the last ones: b over [slot | a], a b over [c of the slot | a b]
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed._functional_collectives import all_to_all_single
from torch.nn.functional import pad

from zebra.kernels import Mask, attend, gradients
from zebra.kernels.merging import merge
from zebra.shards import Shards


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    whole: Mask,
    *,
    group: dist.ProcessGroup,
    scale: float | None = None,
    softcap: float | None = None,
    with_lse: bool = False,
    **arguments: Any,
) -> tuple[Tensor, Tensor | None]:
    """Causal attention over a sequence that is split over a group of processes.

    Args:
        query: (B, H, n, D), the shard's. key, value: (B, K, n, D).
        whole: padding and documents of the whole sequence, (B, P n).

    Returns:
        out: (B, H, n, D). lse: (B, H, n), None without `with_lse`.

    Raises:
        NotImplementedError: other arguments of `attend`, such as ALiBi's slopes.
    """
    if others := [name for name, value in arguments.items() if value is not None]:
        raise NotImplementedError(f"ring attention does not support the argument {', '.join(others)}")
    ring = _Ring(group, whole, query.shape[2] // 2, query.shape[3])
    scale = query.shape[3] ** -0.5 if scale is None else scale
    out, lse = _RingAttention.apply(query, torch.cat([key, value], dim=3), ring, scale, softcap)
    return out, lse if with_lse else None


class _Step(NamedTuple):
    """What a process attends to in one step; the last keys are hidden unless it owns them.

    Attributes:
        owner: the process that owns the keys.
        queries: the queries of the shard that see them.
        keys, values: (B, K, S, D).
        seen: how many of the keys, from the first on, are the owner's.
    """

    owner: int
    queries: slice
    keys: Tensor
    values: Tensor
    mask: Mask
    seen: int


@dataclass(frozen=True)
class _Ring:
    """The order of the steps, over shards of two chunks of `chunk` tokens, with keys of size `width`."""

    group: dist.ProcessGroup
    whole: Mask
    chunk: int
    width: int

    def steps(self, states: Tensor) -> Iterator[_Step]:
        """Yield each step, from a shard (B, K, n, 2 D) of keys and values; the next one's are sent in the meantime."""
        rank, size, n = self.rank, self.size, 2 * self.chunk
        own = states.permute(2, 0, 1, 3)
        rows = torch.cat([torch.zeros_like(own), own])
        held = rows[n:]
        for owner in ((rank + step) % size for step in range(size)):
            following, coming = (owner + 1) % size, None
            if following != rank:
                before = (rank - 1) % size
                passed = held[: self.count(owner, before)]
                coming = self.send(passed, before, (rank + 1) % size, self.count(following, rank))
            yield self._step(rows, owner)
            if coming is not None:
                held = rows[n - len(coming) : n].copy_(coming)

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group)

    def count(self, owner: int, reader: int) -> int:
        """How many of the owner's tokens, from its first one on, the reader sees."""
        return self.chunk if owner < reader else 2 * self.chunk

    def send(self, rows: Tensor, reader: int, source: int, count: int) -> Tensor:
        """Send `rows` to the process `reader` of the group, and receive `count` rows from `source`."""
        outgoing, incoming = [0] * self.size, [0] * self.size
        outgoing[reader], incoming[source] = len(rows), count
        coming: Tensor = all_to_all_single(rows.contiguous(), incoming, outgoing, self.group)
        return coming

    def _step(self, rows: Tensor, owner: int) -> _Step:
        rank, n, count = self.rank, 2 * self.chunk, self.count(owner, self.rank)
        queries = slice(self.chunk if owner > rank else 0, n)
        hidden = 0 if owner == rank else n - queries.start
        states = rows[n:] if owner == rank else rows[n - count : n + hidden]
        states = states.permute(1, 2, 0, 3)
        keys, values = states[..., : self.width], states[..., self.width :]
        return _Step(owner, queries, keys, values, self._mask(owner, count, hidden, states), count)

    def _mask(self, owner: int, count: int, hidden: int, states: Tensor) -> Mask:
        """The mask of the owner's first `count` tokens, and of `hidden` hidden keys after them."""
        shards, whole = Shards(self.size * 2 * self.chunk, self.size), self.whole
        of_owner = shards.held(owner)[: count // self.chunk]
        of_queries = shards.held(self.rank)[2 - hidden // self.chunk :]

        def of(tensor: Tensor, ranges: Iterable[range]) -> Tensor:
            return torch.cat([tensor[:, tokens.start : tokens.stop] for tokens in ranges], dim=1)

        keys = None if whole.keys is None else of(whole.keys, of_owner)
        if hidden:
            every = torch.ones(len(states), count, dtype=torch.bool, device=states.device)
            keys = pad(every if keys is None else keys, (0, hidden))
        documents = None if whole.documents is None else of(whole.documents, (*of_owner, *of_queries))
        return Mask(keys=keys, documents=documents)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, states: Tensor, ring: _Ring, scale: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(query.dtype, torch.float32)
        out, lse = torch.zeros_like(query, dtype=wide), query.new_full(query.shape[:3], float("-inf"), dtype=wide)
        for step in ring.steps(states):
            at = (slice(None), slice(None), step.queries)
            part, part_lse = attend(query[at], step.keys, step.values, step.mask, scale=scale, softcap=softcap)
            assert part_lse is not None
            out[at], merged_lse = merge(out[at], lse[at], part, part_lse)
            assert merged_lse is not None
            lse[at] = merged_lse
        out = out.to(query.dtype)
        ctx.save_for_backward(query, states, out, lse)
        ctx.ring, ctx.scale, ctx.softcap = ring, scale, softcap
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        (query, states, out, lse), ring = ctx.saved_tensors, ctx.ring
        of_query = torch.zeros_like(query, dtype=lse.dtype)
        of_states = torch.zeros_like(states.permute(2, 0, 1, 3), dtype=lse.dtype)
        for step in ring.steps(states):
            at = (slice(None), slice(None), step.queries)
            results = (x[at].contiguous() for x in (out, lse, grad_out, grad_lse))
            arguments = {"scale": ctx.scale, "softcap": ctx.softcap}
            dq, dk, dv = gradients(query[at], step.keys, step.values, step.mask, *results, **arguments)
            of_query[at] += dq
            home = torch.cat([dk, dv], dim=3)[:, :, : step.seen].permute(2, 0, 1, 3)
            if step.owner != ring.rank:
                reader = (2 * ring.rank - step.owner) % ring.size  # in this step it has this process's keys
                home = ring.send(home, step.owner, reader, ring.count(ring.rank, reader))
            of_states[: len(home)] += home
        return of_query.to(query.dtype), of_states.permute(1, 2, 0, 3).to(states.dtype), None, None, None
