r"""Striped sequence parallelism: a sequence's tokens are split over processes, and attention fetches what it sees.

    chunk         0     1     2     3     4     5     6     7        `zebra.shards`: two chunks for each process
    process       0     1     2     3     3     2     1     0
    local            ~~]   ~~]   ~~]         ~~]   ~~]   ~~]         the w - 1 keys before each chunk
    global        ~~~~~~]                 (process 2)   ~~~]         all keys before the second one

Everything but attention works on single tokens, so the model runs on its shard unchanged. In every layer one
all-to-all brings the keys and values that the shard's queries see and other processes hold (`exchange`). A window that
is longer than a chunk reaches over several processes. Nothing later than a query is ever sent. With P processes and
chunks of c tokens, this many elements are exchanged for each sequence and layer, once in the forward and once in the
backward pass (`zebra.plan.parallel`):

    2 K D sum over processes r of    (2 P - 2 - r) c global,    at most 2 (w - 1) local

Sinks add the first tokens of the one document that may have begun before a chunk's keys. They are put directly before
those keys, as if nothing were between: no query of the chunk has them in its window, here or in the whole sequence.

Global layers may pass keys and values round a ring instead (`ring`), and then never hold more than two shards of them.

The oracle is one process. Ring attention (arXiv 2310.01889) and Ulysses (arXiv 2309.14509) split full attention.
"""

from __future__ import annotations

from zebra.model.sequence_parallel.attention import set_sequence_parallel
from zebra.model.sequence_parallel.batch import WHOLE, shard_batch, shard_for, whole_losses

__all__ = [
    "WHOLE",
    "set_sequence_parallel",
    "shard_batch",
    "shard_for",
    "whole_losses",
]
