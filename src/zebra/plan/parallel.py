"""One of several devices: the memory that it needs, and the bytes that it receives, by formulas.

    devices = data x shard x sequence

    data       each group of devices trains on sequences of its own, with all weights
    shard      weights, gradients and moments are split (FSDP2), over the devices of a sequence too
    sequence   the N tokens of a sequence are split, n = ceil(N / P) to each (`zebra.model.sequence_parallel`)

The r-th device of a sequence fetches the keys and values of the tokens before its own that its queries see:

    local    min(w - 1, r n), and sinks that stand before them        global    r n

in each forward pass of a layer, and sends as many gradients back in the backward; its neighbours fetch from it in turn.
The last device fetches the most, so it is the one that counts. Activation checkpointing runs forward passes again.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace

from zebra.errors import ZebraError
from zebra.plan.cost import BYTES, Run, trained_parameters
from zebra.plan.memory import memory
from zebra.stripes import LOCAL

_LARGEST = 10**6


@dataclass(frozen=True)
class Parallel:
    """How devices share a training: how many groups of data, of weights, and of a sequence's tokens."""

    data: int = 1
    shard: int = 1
    sequence: int = 1

    def __post_init__(self) -> None:
        for name, count in asdict(self).items():
            if not 1 <= count <= _LARGEST:
                raise ZebraError(f"{name} counts processes, from 1 to {_LARGEST:,}; got {count}. Change it.")

    @classmethod
    def parse(cls, text: str) -> Parallel:
        """Read `shard=4,sequence=2`."""
        sizes = dict(re.findall(r"(data|shard|sequence)=(\d{1,9})(?:,|$)", text))
        if not sizes or ",".join(f"{name}={count}" for name, count in sizes.items()) != text:
            raise ZebraError(f"devices are shared as in shard=4,sequence=2, by data, shard, sequence; got {text!r}.")
        return cls(**{name: int(count) for name, count in sizes.items()})

    def __str__(self) -> str:
        return ",".join(f"{name}={count}" for name, count in asdict(self).items() if count > 1) or "data=1"

    @property
    def devices(self) -> int:
        """How many there are."""
        return self.data * self.shard * self.sequence

    @property
    def weight_shards(self) -> int:
        """Devices over which weights are split."""
        return self.shard * self.sequence if self.shard > 1 else 1


def check_parallel(run: Run) -> None:
    """Check that devices can share a run.

    Raises:
        ZebraError: decoding, layers of other kinds than global and local.
    """
    if run.phase == "decode":
        raise ZebraError("devices share a training or a prefill, not decoding. Choose the phase train or prefill.")
    if run.others:
        raise ZebraError("sequences are split in global and local layers; this layout has others. Plan one device.")


def fetched_tokens(run: Run, kind: str, processes: int) -> list[int]:
    """Tokens whose keys and values each process of a split sequence fetches in one layer of a kind."""
    n = -(-run.length // processes)
    starts = [r * n for r in range(processes)]
    if kind != LOCAL or run.stripes is None:
        return starts
    window, sinks = run.stripes.window, run.stripes.sinks
    return [min(start, window - 1) + min(max(start - window + 1, 0), sinks) for start in starts]


def fetched_bytes(run: Run, kind: str, processes: int) -> list[int]:
    """Bytes of keys and values that each process receives in one forward pass of one layer of a kind."""
    token = run.batch * 2 * run.decoder.kv_width * BYTES[run.dtype]
    return [count * token for count in fetched_tokens(run, kind, processes)]


def received_bytes(run: Run, parallel: Parallel) -> dict[str, int]:
    """Bytes that the busiest device receives in one pass or one training step, by part.

    Gradients of keys and values come back to those that sent them. FSDP2 gathers a layer's weights for the forward and
    for the backward, embeddings and the head once for both; each device receives the gradients of its shard. Gradients
    of copies of a shard, or of whole weights, are reduced in a ring. Exact where the shards of each weight are even.
    """
    training = run.phase == "train"
    parts: dict[str, int] = {}
    if parallel.sequence > 1:
        devices = [_keys_and_values(run, parallel.sequence, rank) for rank in range(parallel.sequence)]
        totals = [sum(device.values()) for device in devices]
        parts |= devices[totals.index(max(totals))]
    shards, size = parallel.weight_shards, 4 if training and not run.lora else BYTES[run.dtype]
    if shards > 1:
        outside = run.decoder.outside_layers
        gathered = (1 + training) * (run.decoder.num_parameters - outside) + outside
        parts["weights"] = gathered * size * (shards - 1) // shards
    if training and parallel.devices > 1:
        gradients, copies = 4 * trained_parameters(run), parallel.devices // shards
        if shards > 1:
            parts["gradients"] = gradients * (shards - 1) // shards
        if copies > 1:
            parts["gradients, copies"] = 2 * gradients // shards * (copies - 1) // copies
    return parts


def _keys_and_values(run: Run, processes: int, rank: int) -> dict[str, int]:
    """Bytes of keys and values, and of their gradients, that one process receives, by kind of layer."""
    training = run.phase == "train"
    parts = {}
    for kind in sorted(set(run.decoder.kinds(run.stripes))):
        fetched = (1 + (training and run.checkpointing)) * fetched_bytes(run, kind, processes)[rank]
        returned = training * _sent(run, kind, processes, rank)
        name = "local" if kind == LOCAL else "global"
        parts[f"keys and values, {name} layers"] = run.count(kind) * (fetched + returned)
    return parts


def _sent(run: Run, kind: str, processes: int, owner: int) -> int:
    """Bytes that a process sends of its keys and values in one forward, and so receives gradients of."""
    n, token = -(-run.length // processes), run.batch * 2 * run.decoder.kv_width * BYTES[run.dtype]
    window = run.stripes.window if run.stripes and kind == LOCAL else run.length + 1
    count = 0
    for reader in range(owner + 1, processes):
        first = max(0, reader * n - window + 1)
        count += min(n, max(0, (owner + 1) * n - first))
        if kind == LOCAL and run.stripes:  # the first tokens, those that stand before `first`
            count += max(0, min(run.stripes.sinks, first, (owner + 1) * n) - owner * n)
    return count * token


def device_memory(run: Run, parallel: Parallel) -> dict[str, int]:
    """Bytes by part on the device that needs the most: the last of a sequence.

    Under sharding two layers and the embeddings are whole for a while: one is computed, one is fetched ahead.
    Activation checkpointing then leaves the bfloat16 copies of one layer at a time.
    """
    sequence, shards = parallel.sequence, parallel.weight_shards
    parts = memory(replace(run, length=-(-run.length // sequence)))
    if shards > 1:
        for name in {"weights", "gradients", "AdamW"} & parts.keys():
            parts[name] = -(-parts[name] // shards)
        if run.checkpointing and "weights cast to bfloat16" in parts:
            parts["weights cast to bfloat16"] //= run.decoder.layers
        decoder, size = run.decoder, 4 if run.phase == "train" and not run.lora else BYTES[run.dtype]
        two_layers = 2 * (decoder.num_parameters - decoder.outside_layers) // decoder.layers
        parts["weights gathered"] = size * (two_layers + decoder.outside_layers)
    if sequence > 1:
        fetched = [fetched_bytes(run, kind, sequence)[-1] for kind in run.decoder.kinds(run.stripes)]
        held = run.phase == "train" and not run.checkpointing
        parts["keys and values fetched"] = sum(fetched) if held else max(fetched)
    return parts
