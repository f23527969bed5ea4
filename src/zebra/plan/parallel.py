"""One of several devices: the memory that it needs and the bytes that it receives, by formulas.

    devices = data x shard x sequence

    data       each group of devices trains on its own sequences, with all weights
    shard      weights, gradients and moments are sharded (FSDP2), over the devices of a sequence too
    sequence   the N tokens of a sequence are split, two chunks to each device (`zebra.shards`)

With a split sequence, in each forward pass of a layer, a device fetches the keys and values that its queries see and
other devices hold. In the backward pass it receives a gradient for each key and value that it sent. Activation
checkpointing repeats the forward pass. A ring (`zebra.model.sequence_parallel`) passes a global layer's keys and values
round once more in the backward pass, and holds those of two devices at a time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache

from zebra.errors import ZebraError
from zebra.plan.cost import BYTES, Run, trained_parameters
from zebra.plan.memory import memory
from zebra.shards import Shards
from zebra.stripes import LOCAL

_LARGEST = 10**6


@dataclass(frozen=True)
class Parallel:
    """How devices share a run: in how many parts they split the data, the weights, and the tokens of a sequence.

    ring: global layers pass keys and values round the devices of a sequence (ring attention), and do not gather them.
    """

    data: int = 1
    shard: int = 1
    sequence: int = 1
    ring: bool = False

    def __post_init__(self) -> None:
        if self.ring and self.sequence == 1:
            raise ZebraError("a ring requires at least 2 devices for a sequence; got 1. Add sequence=2.")
        for name, count in self.sizes.items():
            if not 1 <= count <= _LARGEST:
                raise ZebraError(f"{name} must be from 1 to {_LARGEST:,}; got {count}. Change it.")

    @classmethod
    def parse(cls, text: str) -> Parallel:
        """Read `shard=4,sequence=2` or `shard=4,sequence=2,ring`; another notation raises a ZebraError."""
        groups, ring = text.removesuffix(",ring"), text.endswith(",ring")
        sizes = dict(re.findall(r"(data|shard|sequence)=(\d{1,9})(?:,|$)", groups))
        if not sizes or ",".join(f"{name}={count}" for name, count in sizes.items()) != groups:
            raise ZebraError(
                "devices must be written as data=N, shard=N and sequence=N, with commas, and ring at the end; "
                f"got {text!r}. Write, for example, shard=4,sequence=2."
            )
        return cls(**{name: int(count) for name, count in sizes.items()}, ring=ring)

    def __str__(self) -> str:
        groups = ",".join(f"{name}={count}" for name, count in self.sizes.items() if count > 1) or "data=1"
        return groups + ",ring" * self.ring

    @property
    def sizes(self) -> dict[str, int]:
        """The three numbers by name."""
        return {"data": self.data, "shard": self.shard, "sequence": self.sequence}

    @property
    def devices(self) -> int:
        """The number of devices."""
        return self.data * self.shard * self.sequence

    @property
    def weight_shards(self) -> int:
        """The number of devices over which weights are sharded."""
        return self.shard * self.sequence if self.shard > 1 else 1


def check_parallel(run: Run, parallel: Parallel | None = None) -> None:
    """Check that devices can share a run, in this way if `parallel` is set.

    Raises:
        ZebraError: decoding, layers of other kinds than global and local, more devices than a sequence has tokens.
    """
    if run.phase == "decode":
        raise ZebraError("several devices do not support the phase decode. Choose the phase train or prefill.")
    if run.others:
        raise ZebraError(
            "several devices support only global and local layers; this layout has others. Plan one device."
        )
    if parallel is not None and parallel.sequence > run.length:
        raise ZebraError(
            f"each device of a sequence must have at least one token; got {parallel.sequence:,} devices for "
            f"{run.length:,} tokens. Lower sequence, or raise --length."
        )


def busiest(run: Run, processes: int) -> Run:
    """The part of a run that the last device of a split sequence computes: no other device has more visible pairs.

    Its two chunks are the middle of the sequence. In global layers all devices have the same number of pairs. In local
    layers a device has fewer if its first chunk begins less than a window after the start.
    """
    shards = Shards(run.length, processes)
    return run if processes == 1 else replace(run, length=shards.length, past=shards.held(processes - 1)[0].start)


@cache
def _traffic(shards: Shards, window: int | None, sinks: int) -> list[tuple[int, int]]:
    return shards.traffic(window, sinks)


def exchanged_bytes(run: Run, kind: str, processes: int) -> list[tuple[int, int]]:
    """Bytes of keys and values that each process receives and sends in one layer's forward pass, by process."""
    window, sinks = (run.stripes.window, run.stripes.sinks) if run.stripes and kind == LOCAL else (None, 0)
    token = run.batch * 2 * run.decoder.kv_width * BYTES[run.dtype]
    return [(token * got, token * sent) for got, sent in _traffic(Shards(run.length, processes), window, sinks)]


def split_memory(run: Run, parallel: Parallel) -> dict[str, int]:
    """Bytes that splitting a sequence adds on the device that needs the most, by part.

    Autograd saves the keys and values that a layer gathered, the outputs of both chunks, and their concatenation. A
    ring saves nothing, and holds the keys and values of two devices at a time. Outside training, and under activation
    checkpointing, only one layer's are held at a time.

    Gradients of one layer's keys and values, where g bytes were gathered: those of the chunks (g), their sum (g), those
    sent back (g) and received (g / 2), less the freed keys and values (g). In a ring, in units of a shard's keys and
    values: those of one step (3/2), those sent and received (2), the next keys and values (1), and a sum in float32.
    """
    kinds, tokens = run.decoder.kinds(run.stripes), run.batch * Shards(run.length, parallel.sequence).length
    size, training = BYTES[run.dtype], run.phase == "train"
    all_layers = training and not run.checkpointing
    gathering = [kind for kind in kinds if kind == LOCAL or not parallel.ring]
    passed_on = tokens * 2 * run.decoder.kv_width if len(gathering) < len(kinds) else 0  # values of a shard, in a ring
    in_ring = 2 * passed_on * size
    received = {
        kind: [got for got, _ in exchanged_bytes(run, kind, parallel.sequence)] for kind in sorted(set(gathering))
    }
    one_layer = max(map(max, received.values()), default=0)
    fetched, joining = max(one_layer, in_ring), min(1, len(gathering))
    if all_layers:
        of_kinds = ([gathering.count(kind) * one for one in got] for kind, got in received.items())
        fetched = max(map(sum, zip(*of_kinds, strict=True)), default=0) + in_ring
        joining = len(gathering)
    parts = {
        "keys and values fetched": fetched,
        "outputs joined": joining * tokens * run.decoder.query_width * size,
    }
    if training:
        gradients = max(5 * one_layer // 2, 9 * passed_on * size // 2 + 4 * passed_on)
        parts["gradients of keys and values"] = gradients
    return parts


def received_bytes(run: Run, parallel: Parallel) -> dict[str, int]:
    """Bytes that the busiest device receives in one prefill or one training step, by part.

    Gradients of keys and values return to the device that sent those. FSDP2 gathers a layer's weights for the forward
    and again for the backward pass, the weights outside the layers once for both, and reduce-scatters the gradients.
    Copies of a shard, or of all weights, all-reduce their gradients in a ring. Exact where each weight splits evenly.
    """
    training = run.phase == "train"
    parts: dict[str, int] = {}
    if parallel.sequence > 1:
        devices = _keys_and_values(run, parallel)
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


def _keys_and_values(run: Run, parallel: Parallel) -> list[dict[str, int]]:
    """Bytes of keys and values, and of their gradients, that each process receives, by kind of layer."""
    training = run.phase == "train"
    devices: list[dict[str, int]] = [{} for _ in range(parallel.sequence)]
    for kind in sorted(set(run.decoder.kinds(run.stripes))):
        name, ring = ("local", False) if kind == LOCAL else ("global", parallel.ring)
        passes = 1 + training * (run.checkpointing + ring)
        for device, (got, sent) in zip(devices, exchanged_bytes(run, kind, parallel.sequence), strict=True):
            device[f"keys and values, {name} layers"] = run.count(kind) * (passes * got + training * sent)
    return devices


def device_memory(run: Run, parallel: Parallel) -> dict[str, int]:
    """Bytes by part on the device that needs the most.

    With sharded weights, two layers (one to compute, one prefetched) and all weights outside the layers are gathered at
    a time. With activation checkpointing too, there are bfloat16 copies of only one layer's weights at a time.
    """
    sequence, shards = parallel.sequence, parallel.weight_shards
    parts = memory(replace(run, length=Shards(run.length, sequence).length) if sequence > 1 else run)
    if shards > 1:
        for name in {"weights", "gradients", "AdamW"} & parts.keys():
            parts[name] = -(-parts[name] // shards)
        if run.checkpointing and "weights cast to bfloat16" in parts:
            parts["weights cast to bfloat16"] //= run.decoder.layers
        decoder, size = run.decoder, 4 if run.phase == "train" and not run.lora else BYTES[run.dtype]
        two_layers = 2 * (decoder.num_parameters - decoder.outside_layers) // decoder.layers
        parts["weights gathered"] = size * (two_layers + decoder.outside_layers)
    return parts | (split_memory(run, parallel) if sequence > 1 else {})
