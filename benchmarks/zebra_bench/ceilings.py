"""The ceilings that a benchmark is held against: from a file, or measured before and after its turns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from zebra.errors import ZebraError
from zebra.measure import measure_ceilings
from zebra.plan.devices import Device, find
from zebra_bench.subjects import Paired


def read(sizes: Paired, device: str) -> Device:
    """The file's ceilings, or measured ones.

    Raises:
        ZebraError: a file that holds no ceilings, or that lacks the dtype.
    """
    ceilings = find(sizes.ceilings) if sizes.ceilings else measure_ceilings(device, repeats=3)
    if sizes.dtype not in ceilings.flops:
        raise ZebraError(
            f"{ceilings.name} has no ceiling for {sizes.dtype}; it has {', '.join(ceilings.flops)}. Take another."
        )
    return ceilings


def highest(one: Device, two: Device) -> Device:
    """The larger of two measurements of each ceiling: what slowed the machine down meanwhile is no ceiling."""
    return replace(
        one,
        flops=_larger(one.flops, two.flops),
        bandwidth=max(one.bandwidth, two.bandwidth),
        attention={kind: _larger(rates, two.attention.get(kind, {})) for kind, rates in one.attention.items()},
    )


def _larger(one: Mapping[str, float], two: Mapping[str, float]) -> dict[str, float]:
    return {dtype: max(rate, two.get(dtype, 0.0)) for dtype, rate in one.items()}
