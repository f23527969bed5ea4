"""Training steps on many devices: every way to share them, what each predicts, and the best.

    devices = data x shard x sequence          powers of two; a step has at most 2^24 tokens, or one sequence

    step = max(computing, weights and gradients on the wire) + keys and values on the wire

`zebra.plan.parallel` has the memory and the bytes of a device, `zebra.plan.devices` its ceilings and links. FSDP2
fetches weights while it computes; the keys and values of a layer are waited for. The device that counts is the last of
a sequence, which has the most keys. What is assumed besides is in `ASSUMPTIONS`, with its source.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from zebra.errors import ZebraError
from zebra.plan.cost import Run, flops
from zebra.plan.devices import MEASURED, Device, Link
from zebra.plan.parallel import Parallel, check_parallel, device_memory, received_bytes

EFFICIENCY, WIRE, ALLOCATOR = 0.4, 0.8, 0.9
LARGEST_STEP = 2**24
_LARGEST = 2**20

ASSUMPTIONS = (
    f"matrix products and attention reach {EFFICIENCY:.0%} of published peaks (Llama 3 trained at 38 to 43 % on H100, "
    "arXiv 2407.21783); ceilings that were measured are reached",
    f"links reach {WIRE:.0%} of their data sheets; where a group spans nodes, gathered weights enter a node once, over "
    "the links of all its devices, and keys and values enter once for each device",
    "weights and gradients travel while others compute; keys and values are waited for",
    f"{ALLOCATOR:.0%} of a device's memory can be filled; weights of 4 bytes, gradients and AdamW's moments in float32",
    f"a step has at most {LARGEST_STEP:,} tokens, or one sequence: larger steps teach less for each token "
    "(arXiv 1812.06162)",
)


@dataclass(frozen=True)
class Prediction:
    """What a device of a cluster needs and how long a step takes.

    Attributes:
        memory, received: bytes by part, of the device that has the most.
        computing, weights, keys: seconds of a step; those of weights count gradients too.
        tokens: of a step, in all sequences.
        share: of the devices' published or measured peak that the step's FLOPs are.
    """

    parallel: Parallel
    memory: dict[str, int]
    received: dict[str, int]
    computing: float
    weights: float
    keys: float
    tokens: int
    share: float
    fits: bool

    @property
    def seconds(self) -> float:
        """Of a step."""
        return max(self.computing, self.weights) + self.keys

    @property
    def tokens_per_second(self) -> float:
        """Of all devices."""
        return self.tokens / self.seconds

    @property
    def limit(self) -> str:
        """What takes the most of a step, or that it does not fit."""
        if not self.fits:
            return f"memory: {max(self.memory, key=lambda part: self.memory[part])}"
        parts = {"computing": self.computing, "weights and gradients": self.weights, "keys and values": self.keys}
        return max(parts, key=lambda part: parts[part])


def parse_cluster(text: str) -> list[int]:
    """Numbers of devices: `8..1024` is 8, 16, 32 and so on to 1,024, and `64` that number.

    Raises:
        ZebraError: another notation; numbers that are no powers of two, from 1 to 2^20.
    """
    bounds = re.fullmatch(r"(\d{1,9})(?:\.\.(\d{1,9}))?", text)
    low, high = (int(bounds[1]), int(bounds[2] or bounds[1])) if bounds else (0, 0)
    if not 1 <= low <= high <= _LARGEST or low & (low - 1) or high & (high - 1):
        raise ZebraError(f"a cluster has 8..1024 devices, or 64: powers of two, at most {_LARGEST:,}; got {text!r}.")
    return [1 << exponent for exponent in range(low.bit_length() - 1, high.bit_length())]


def predictions(run: Run, device: Device, devices: int) -> list[Prediction]:
    """Every way in which so many devices can share a training, the quickest that fits first.

    Raises:
        ZebraError: another phase than training; a device whose memory or links are not known; what `check_parallel`
            raises.
    """
    if run.phase != "train":
        raise ZebraError(f"a cluster shares a training; got the phase {run.phase}. Add --phase train.")
    check_parallel(run)
    if device.memory is None or device.link is None:
        raise ZebraError(
            f"{device.name} names no memory or no links between devices. Add them, or choose another device."
        )
    found = [_predict(run, device, device.link, device.memory, parallel) for parallel in _ways(run, devices)]
    return sorted(
        found, key=lambda one: (not one.fits, -one.tokens_per_second if one.fits else sum(one.memory.values()))
    )


def _ways(run: Run, devices: int) -> Iterator[Parallel]:
    for exponent in range(devices.bit_length()):
        sequence = 1 << exponent
        groups = devices // sequence
        tokens = groups * run.batch * run.length
        if sequence > run.length or (groups > 1 and tokens > LARGEST_STEP):
            continue
        yield from (Parallel(groups // shard, shard, sequence) for shard in _powers(groups))
        # Weights may be split over the devices of a sequence alone.


def _powers(largest: int) -> list[int]:
    return [1 << exponent for exponent in range(largest.bit_length())]


def _predict(run: Run, device: Device, link: Link, memory: int, parallel: Parallel) -> Prediction:
    n = -(-run.length // parallel.sequence)
    own = replace(run, length=n, past=(parallel.sequence - 1) * n)
    reached = 1.0 if device.source == MEASURED else EFFICIENCY
    needed, received = device_memory(run, parallel), received_bytes(run, parallel)
    keys = {name: count for name, count in received.items() if name.startswith("keys and values")}
    shards = parallel.weight_shards
    # Copies of one part are one to a node; whole weights are reduced over all devices of a node together.
    among = link.gathering(parallel.devices) if shards == 1 else link.exchange(parallel.devices)
    weights = (received.get("weights", 0) + received.get("gradients", 0)) / link.gathering(shards)
    weights += received.get("gradients, copies", 0) / among
    computing, tokens = (
        sum(device.seconds(own).values()) / reached,
        run.batch * run.length * parallel.data * parallel.shard,
    )
    prediction = Prediction(
        parallel=parallel,
        memory=needed,
        received=received,
        computing=computing,
        weights=weights / WIRE,
        keys=sum(keys.values()) / (WIRE * link.exchange(parallel.sequence)),
        tokens=tokens,
        share=0.0,
        fits=sum(needed.values()) <= ALLOCATOR * memory,
    )
    whole = sum(flops(run).values()) * parallel.data * parallel.shard
    return replace(prediction, share=whole / (parallel.devices * device.flops[run.dtype] * prediction.seconds))
