"""Training steps on many devices: every way to share them, what each predicts, and the best.

    devices = data x shard x sequence          powers of two; a step has at most 2^24 tokens, or one sequence

    step = max(computing, weights and gradients on the wire) + keys and values on the wire

`zebra.plan.parallel` has the memory and the bytes of a device, `zebra.plan.devices` its ceilings and links. FSDP2
fetches weights while it computes; the keys and values of a layer are waited for. Those of a ring travel while it
computes too, and are waited for as well here. What is assumed besides is in `ASSUMPTIONS`, with its source.
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
        peak_share: of what the devices' peaks compute in the step's time, the FLOPs that it has.
    """

    parallel: Parallel
    memory: dict[str, int]
    received: dict[str, int]
    computing: float
    weights: float
    keys: float
    tokens: int
    peak_share: float
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
            f"{device.name} names no memory or no links between devices. Add memory and link to its file, such as "
            '"link": {"inside": 4.5e11, "across": 5e10, "node": 8}, or choose another device.'
        )
    ways = [_predict(run, device, device.link, device.memory, parallel) for parallel in _ways(run, devices)]

    def order(one: Prediction) -> tuple[bool, float, int]:
        """Of equally quick ways the one that receives the least."""
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
    # Copies of one part are one to a node; whole weights are reduced over all devices of a node together.
    among = link.gathering(parallel.devices) if shards == 1 else link.exchange(parallel.devices)
    weights = (received.get("weights", 0) + received.get("gradients", 0)) / link.gathering(shards)
    weights += received.get("gradients, copies", 0) / among
    keys = sum(count for part, count in received.items() if part.startswith("keys and values"))
    prediction = Prediction(
        parallel=parallel,
        memory=needed,
        received=received,
        computing=sum(device.seconds(busiest(run, parallel.sequence)).values()) / reached,
        weights=weights / WIRE,
        keys=keys / link.exchange(parallel.sequence) / WIRE,
        tokens=run.batch * run.length * sequences,
        peak_share=0.0,
        fits=sum(needed.values()) <= ALLOCATOR * memory,
    )
    peak = parallel.devices * device.flops[run.dtype] * prediction.seconds
    return replace(prediction, peak_share=sum(flops(run).values()) * sequences / peak)


def compare(run: Run, device: Device, counts: Sequence[int]) -> dict[str, Any]:
    """The plan of a cluster as a JSON tree: for each layout and number of devices every way, the best first."""
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
    """What the tables are about, in three lines."""
    model, settings, device = plan["model"], plan["settings"], plan["device"]
    what = f"training steps of sequences of {settings['length']:,} tokens, {settings['batch']:,} to a group, "
    what += settings["dtype"] + ", LoRA" * bool(settings["lora"])
    what += ", activation checkpointing" * settings["checkpointing"]
    link = device["link"]
    links = f"{link['inside'] / 1e9:,.0f} GB/s in a node of {link['node']}, {link['across'] / 1e9:,.0f} GB/s beyond"
    return (
        f"{model['name']}: {model['parameters']:,} parameters, {what}\n{device['name']}, {device['source']}; {links}\n"
        "sharing: data × shard × sequence; GiB: memory of a device; wire: GiB that it receives in a step; "
        "K/s: thousand tokens a second"
    )


def tables(plan: dict[str, Any]) -> tuple[tuple[str, ...], dict[str, list[tuple[str, ...]]]]:
    """A head, and a body for each layout: the best way of each number of devices; of one number alone, all ways.

    A way that does not fit has no time, and its limit is what fills most of its memory. A line has 80 characters.
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
    """Three digits, or all of a whole number."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
