"""The ceilings of a device (peak compute and bandwidth), and the time that they predict.

    seconds of a part = max(FLOPs / peak, bytes / bandwidth),     seconds = their sum over the parts

(the roofline of Williams, Waterman and Patterson, 2009, part by part). With published peaks this is a lower bound that
no run reaches; with ceilings measured on the machine it is a prediction. A measured device has two more ceilings: the
rate of attention, whose softmax is not a matrix product, and the rates at which decoding reads weights and cached keys
(on a CPU, matrix-vector products reach a third of a copy's bandwidth).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from zebra.errors import ZebraError
from zebra.plan.cost import BYTES, Run, bytes_moved, flops, pairs_by_kind
from zebra.stripes import GLOBAL, LOCAL

PUBLISHED = "published"
MEASURED = "measured"
WEIGHTS, CACHE = "weights", "cache"


@dataclass(frozen=True)
class Link:
    """The rates at which one device receives data from others, in bytes/s.

    Attributes:
        inside: from devices of the same node.
        across: from other nodes; one device's share of the network.
        node: number of devices in a node.
    """

    inside: float
    across: float
    node: int = 8

    def gathering(self, group: int) -> float:
        """Bytes/s of data that all devices of a group need: it enters a node once, over the links of all devices."""
        return self.inside if group <= self.node else min(self.inside, self.node * self.across)

    def exchange(self, group: int) -> float:
        """Bytes/s of data that only one device of a group needs."""
        return self.inside if group <= self.node else min(self.inside, self.across)


@dataclass(frozen=True)
class Device:
    """The ceilings of a device.

    Attributes:
        flops: FLOP/s of dense matrix products by dtype.
        bandwidth, memory: bytes/s of the memory, and its bytes where known.
        source: whether the vendor published the ceilings or they were measured.
        attention: where measured, the FLOP/s of attention by kind of layer and dtype, counted over visible pairs.
        reading: where measured, the bytes/s at which decoding reads `weights` and `cache`, by dtype.
        link: the connection to other devices, where known.
    """

    name: str
    flops: Mapping[str, float]
    bandwidth: float
    memory: int | None = None
    source: str = PUBLISHED
    attention: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    reading: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    link: Link | None = None

    def seconds(self, run: Run) -> dict[str, float]:
        """The least time of each part of a run, in seconds.

        Raises:
            ZebraError: a dtype for which the device has no ceiling.
        """
        if run.dtype not in self.flops:
            raise ZebraError(
                f"{self.name} has no ceiling for {run.dtype}; it has {', '.join(self.flops)}. Choose another dtype."
            )
        peak, computed, visible = self.flops[run.dtype], flops(run), pairs_by_kind(run)
        computing = {part: count / peak for part, count in computed.items()}
        if run.phase == "train":  # head and loss are in float32 (`zebra.model.loss`)
            computing["head"] = computed["head"] / self.flops.get("float32", peak)
        computing["attention"] = 0.0
        for kind, count in visible.items():
            rates = self.attention.get(kind if kind == GLOBAL else LOCAL, {})
            computing["attention"] += computed["attention"] * count / sum(visible.values()) / rates.get(run.dtype, peak)
        of_token = self.reading if run.phase == "decode" else {}
        rates = {part: of_token.get(read, {}).get(run.dtype, self.bandwidth) for part, read in _READ.items()}
        return {
            part: max(computing.get(part, 0.0), moved / rates.get(part, self.bandwidth))
            for part, moved in bytes_moved(run).items()
        }


_READ = {"projections": WEIGHTS, "MLP": WEIGHTS, "head": WEIGHTS, "attention": CACHE}
"""What decoding mostly reads in each part."""


DEVICES: dict[str, Device] = {
    name: Device(
        name,
        {"float32": single * 1e12} | dict.fromkeys(("bfloat16", "float16"), half * 1e12),
        bandwidth * 1e9,
        memory * 10**9,
        link=Link(inside * 1e9, across * 1e9),
    )
    for name, half, single, bandwidth, memory, inside, across in (  # TFLOP/s, GB/s, GB, GB/s in one direction
        ("h100-sxm", 989.4, 66.9, 3350, 80, 450, 50),
        ("h200", 989.4, 66.9, 4800, 141, 450, 50),
        ("a100-80gb", 312, 19.5, 2039, 80, 300, 25),
        ("l40s", 362, 91.6, 864, 48, 32, 12.5),
        ("rtx-4090", 165.2, 82.6, 1008, 24, 32, 1.5625),
        ("rtx-3090", 71, 35.6, 936, 24, 32, 1.5625),
        ("mi300x", 1307, 163.4, 5300, 192, 448, 50),
    )
}
"""Peaks of the vendors' data sheets, none measured: no sparsity, accumulation in float32, float32 without TF32.

Links: NVLink 4 and 3, Infinity Fabric, or PCIe 4.0 x16. Network: one adapter per device, of 400 Gbit/s for H100, H200
and MI300X, 200 Gbit/s for A100 and 100 Gbit/s for L40S; for RTX cards one of 100 Gbit/s per node of eight.
"""


def find_device(device: str | os.PathLike[str]) -> Device:
    """Find a device in the table by name, or read its ceilings from a JSON file.

    The file holds `name`, `flops` (FLOP/s by dtype), `bandwidth` (bytes/s) and, if they are known, `memory` (bytes),
    `attention` (FLOP/s by kind of layer, full_attention and sliding_attention, and dtype), `reading` (bytes/s by
    weights and cache, and dtype) and `link`, the fields of `Link`.

    Raises:
        ZebraError: neither a name nor a file, or a file that holds something else.
    """
    if str(device) in DEVICES:
        return DEVICES[str(device)]
    path = Path(device)
    if not path.is_file():
        raise ZebraError(
            f"there is no device {str(device)!r} in the table, and no such file of ceilings. Choose one of "
            f"{', '.join(DEVICES)}, or give a JSON file with name, flops by dtype and bandwidth."
        )
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        peaks = {dtype: float(rate) for dtype, rate in tree["flops"].items()}
        attention, reading = (
            {
                kind: {dtype: float(rate) for dtype, rate in rates.items()}
                for kind, rates in (tree.get(name) or {}).items()
            }
            for name in ("attention", "reading")
        )
        memory = None if tree.get("memory") is None else int(tree["memory"])
        link = None if tree.get("link") is None else Link(**tree["link"])
        measured = Device(
            str(tree["name"]), peaks, float(tree["bandwidth"]), memory, MEASURED, attention, reading, link
        )
        sizes = [1 if memory is None else memory, *(() if link is None else map(float, asdict(link).values()))]
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise ZebraError(
            f"{path} is not a file of ceilings: {type(error).__name__} {error}. Give a JSON object with name, "
            "flops (FLOP/s by dtype), bandwidth (bytes/s), optional memory (bytes), attention (FLOP/s by kind, dtype), "
            "reading (bytes/s by weights and cache, dtype), link (bytes/s inside a node and across, devices of a node)."
        ) from None
    everywhere = [peaks, *attention.values(), *reading.values()]
    rates = [measured.bandwidth, *sizes, *(rate for rates in everywhere for rate in rates.values())]
    unknown = (
        set().union(*everywhere) - set(BYTES) or set(attention) - {GLOBAL, LOCAL} or set(reading) - {WEIGHTS, CACHE}
    )
    if not peaks or unknown or not all(0 < rate < float("inf") for rate in rates):
        raise ZebraError(
            f"{path}: ceilings must be positive rates for {', '.join(BYTES)}, with a positive memory and link if "
            f"present; got flops {peaks} and bandwidth {measured.bandwidth:g}. Measure again."
        )
    return measured
