"""Training on many devices: predict time and memory of a step for every way to split it, the best way first.

    devices = data x shard x sequence          powers of two; a step has at most 2^24 tokens, unless data = shard = 1

    step = max(compute, transfer of weights and gradients) + transfer of keys and values

`zebra.plan.parallel` has the memory of a device and the bytes it receives, `zebra.plan.devices` its peak rates and
links. FSDP2 overlaps the transfer of weights with compute. The transfer of keys and values counts as not overlapped,
although a ring overlaps it in part. The other assumptions are in `ASSUMPTIONS`, with their sources.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from zebra.errors import ZebraError
from zebra.plan.comparison import TIME, variants, with_unit
from zebra.plan.cost import Run, flops
from zebra.plan.devices import MEASURED, Device, Link
from zebra.plan.parallel import Parallel, busiest, check_parallel, device_memory, received_bytes
from zebra.stripes import GLOBAL

EFFICIENCY, WIRE, ALLOCATOR = 0.4, 0.8, 0.9
LARGEST_STEP = 2**24
_LARGEST = 2**20

ASSUMPTIONS = (
    f"matrix products and attention reach {EFFICIENCY:.0%} of published peaks (Llama 3 trained at 38 to 43 % on H100, "
    "arXiv 2407.21783), and all of measured ceilings",
    f"links reach {WIRE:.0%} of their data sheets; if a group spans nodes, gathered weights enter a node once, over "
    "the links of all its devices, and keys and values enter once for each device",
    "sending weights and gradients overlaps with computing; sending keys and values does not",
    f"{ALLOCATOR:.0%} of a device's memory can be used; weights, gradients and AdamW's moments are in float32",
    f"a step has at most {LARGEST_STEP:,} tokens, or one sequence: with larger steps each token teaches less "
    "(arXiv 1812.06162)",
)


@dataclass(frozen=True)
class Prediction:
    """The memory and the traffic of a device, and the time of a training step, for one way to split it.

    Attributes:
        memory, received: bytes by part, on the device that has the most.
        compute_seconds: of a step.
        weight_seconds, key_seconds: of the transfers of a step: weights and gradients, keys and values.
        tokens: tokens of a step, in all sequences.
        peak_share: FLOPs of the step, recomputation included, over those that the devices' peaks allow in its time.
        fits: whether the memory is at most 90 % (`ALLOCATOR`) of the device's.
    """

    parallel: Parallel
    memory: dict[str, int]
    received: dict[str, int]
    compute_seconds: float
    weight_seconds: float
    key_seconds: float
    tokens: int
    peak_share: float
    fits: bool

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        return max(self.compute_seconds, self.weight_seconds) + self.key_seconds

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all devices together."""
        return self.tokens / self.seconds

    @property
    def limit(self) -> str:
        """What takes most of the step's time; where it does not fit, what takes most of the memory."""
        if not self.fits:
            return f"memory: {max(self.memory, key=lambda part: self.memory[part])}"
        parts = {
            "computing": self.compute_seconds,
            "weights and gradients": self.weight_seconds,
            "keys and values": self.key_seconds,
        }
        return max(parts, key=lambda part: parts[part])


def parse_cluster(text: str) -> list[int]:
    """Read numbers of devices: `8..1024` is 8, 16, 32 and so on up to 1,024, and `64` is 64 alone.

    Raises:
        ZebraError: another notation, or numbers that are not powers of two from 1 to 2^20.
    """
    bounds = re.fullmatch(r"(\d{1,9})(?:\.\.(\d{1,9}))?", text)
    low, high = (int(bounds[1]), int(bounds[2] or bounds[1])) if bounds else (0, 0)
    if not 1 <= low <= high <= _LARGEST or low & (low - 1) or high & (high - 1):
        raise ZebraError(
            f"the number of devices must be a power of two of at most {_LARGEST:,}, or a range of these; got {text!r}. "
            "Write, for example, 64 or 8..1024."
        )
    return [1 << exponent for exponent in range(low.bit_length() - 1, high.bit_length())]


def predictions(run: Run, device: Device, devices: int) -> list[Prediction]:
    """Predict every way to split a training step over `devices` devices.

    The ways that fit come first, the fastest first; the others follow, the one that needs the least memory first.

    Raises:
        ZebraError: a phase other than training; a device whose memory or links are not known; what `check_parallel`
            raises.
    """
    if run.phase != "train":
        raise ZebraError(f"a cluster requires the phase train; got {run.phase}. Add --phase train.")
    check_parallel(run)
    if device.memory is None or device.link is None:
        raise ZebraError(
            f"a cluster requires a device with memory and link; {device.name} lacks one. Add both to its file, such as "
            '"link": {"inside": 4.5e11, "across": 5e10, "node": 8}, or choose another device.'
        )
    ways = [_predict(run, device, device.link, device.memory, parallel) for parallel in _ways(run, devices)]

    def order(one: Prediction) -> tuple[bool, float, int]:
        """Sort key; of equally good ways the one that receives the fewest bytes is first."""
        slowness = -round(one.tokens_per_second, 3) if one.fits else sum(one.memory.values())
        return not one.fits, slowness, sum(one.received.values())

    return sorted(ways, key=order)


def _ways(run: Run, devices: int) -> Iterator[Parallel]:
    for exponent in range(devices.bit_length()):
        sequence = 1 << exponent
        groups = devices // sequence
        tokens = groups * run.batch * run.length
        if sequence > run.length or (groups > 1 and tokens > LARGEST_STEP):
            continue
        rings = (False, True) if sequence > 1 and run.count(GLOBAL) else (False,)
        for shard in range(groups.bit_length()):
            yield from (Parallel(groups >> shard, 1 << shard, sequence, ring) for ring in rings)


def _predict(run: Run, device: Device, link: Link, memory: int, parallel: Parallel) -> Prediction:
    reached = 1.0 if device.source == MEASURED else EFFICIENCY
    needed, received = device_memory(run, parallel), received_bytes(run, parallel)
    shards, sequences = parallel.weight_shards, parallel.data * parallel.shard
    # Assumes one copy of a shard on each node: a device has only its own link. Whole weights use all links of a node.
    among = link.gathering(parallel.devices) if shards == 1 else link.exchange(parallel.devices)
    weights = (received.get("weights", 0) + received.get("gradients", 0)) / link.gathering(shards)
    weights += received.get("gradients, copies", 0) / among
    keys = sum(count for part, count in received.items() if part.startswith("keys and values"))
    prediction = Prediction(
        parallel=parallel,
        memory=needed,
        received=received,
        compute_seconds=sum(device.seconds(busiest(run, parallel.sequence)).values()) / reached,
        weight_seconds=weights / WIRE,
        key_seconds=keys / link.exchange(parallel.sequence) / WIRE,
        tokens=run.batch * run.length * sequences,
        peak_share=0.0,
        fits=sum(needed.values()) <= ALLOCATOR * memory,
    )
    peak = parallel.devices * device.flops[run.dtype] * prediction.seconds
    return replace(prediction, peak_share=sum(flops(run).values()) * sequences / peak)


def compare(run: Run, device: Device, counts: Sequence[int]) -> dict[str, Any]:
    """The plan as a JSON tree: for each number of devices and each layout every way to split it, the best first."""
    clusters: list[dict[str, Any]] = [
        {"layout": name, "devices": devices, "ways": [_tree(one) for one in predictions(layout, device, devices)]}
        for devices in counts
        for name, layout in variants(run).items()
    ]
    assert device.link is not None  # `predictions` has checked
    recorded = ("length", "batch", "dtype", "checkpointing", "lora")
    return {
        "model": {"name": run.decoder.name, "parameters": run.decoder.num_parameters},
        "settings": {name: getattr(run, name) for name in recorded},
        "device": {"name": device.name, "source": device.source, "memory": device.memory, "link": asdict(device.link)},
        "assumptions": ASSUMPTIONS,
        "clusters": clusters,
    }


def _tree(one: Prediction) -> dict[str, Any]:
    derived = ("seconds", "tokens_per_second", "limit")
    tree = {name: value for name, value in vars(one).items() if name != "parallel"}
    return asdict(one.parallel) | tree | {name: getattr(one, name) for name in derived}


def headline(plan: dict[str, Any]) -> str:
    """Describe the model, the step and the device of the tables, in three lines."""
    model, settings, device = plan["model"], plan["settings"], plan["device"]
    what = f"training steps of sequences of {settings['length']:,} tokens, {settings['batch']:,} per group, "
    what += settings["dtype"] + ", LoRA" * bool(settings["lora"])
    what += ", activation checkpointing" * settings["checkpointing"]
    link = device["link"]
    links = f"{link['inside'] / 1e9:,.0f} GB/s in a node of {link['node']}, {link['across'] / 1e9:,.0f} GB/s beyond"
    return (
        f"{model['name']}: {model['parameters']:,} parameters, {what}\n{device['name']}, {device['source']}; {links}\n"
        "sharing: data × shard × sequence; GiB: memory of a device; wire: GiB that it receives per step; "
        "K/s: thousand tokens per second"
    )


def tables(plan: dict[str, Any]) -> tuple[tuple[str, ...], dict[str, list[tuple[str, ...]]]]:
    """The head, and each layout's rows: the best way for each number of devices, or all ways for a single number.

    A way that does not fit has no time, and its limit is what takes most of the memory. A line has 80 characters.
    """
    several = len({cluster["devices"] for cluster in plan["clusters"]}) > 1
    head = ("devices", "sharing", "GiB", "wire", "step", "K/s", "peak", "limit")
    bodies: dict[str, list[tuple[str, ...]]] = {}
    for cluster in plan["clusters"]:
        for way in cluster["ways"][:1] if several else cluster["ways"]:
            speed = with_unit(way["seconds"], TIME), _short(way["tokens_per_second"] / 1e3), f"{way['peak_share']:.0%}"
            cells = (
                f"{cluster['devices']:,}",
                f"{way['data']}×{way['shard']}×{way['sequence']}" + " ring" * way["ring"],
                *(_short(sum(way[name].values()) / 2**30) for name in ("memory", "received")),
                *(speed if way["fits"] else ("–",) * 3),
                way["limit"].removeprefix("memory: "),
            )
            bodies.setdefault(cluster["layout"], []).append(cells)
    return head, bodies


def _short(value: float) -> str:
    """Format a number with three significant digits; from 100 on as a whole number."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
