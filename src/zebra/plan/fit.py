"""What fits: the largest length and batch in a memory budget, and the layout that loses the fewest visible pairs."""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import replace

from zebra.errors import ZebraError
from zebra.plan.cost import Run, pairs
from zebra.plan.devices import Device
from zebra.plan.memory import memory
from zebra.stripes import Stripes

STRIDES = range(2, 9)
WINDOWS = (512, 1024, 2048, 4096, 8192, 16384)
_MOST = 2**30
"""The largest length and batch that are tried."""

_UNITS = {"": 1, "B": 1} | {f"{prefix}B": 1000**i for i, prefix in enumerate("KMGT", 1)}
_UNITS |= {f"{prefix}IB": 1024**i for i, prefix in enumerate("KMGT", 1)}


def parse_bytes(text: str) -> int:
    """Read an amount of memory in bytes: 80GiB, 24GB, 512MiB, 1000B; without a unit bytes, and then at least 1 MiB."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS or not 0 < float(match[1]) < 1e18:
        raise ZebraError(f"memory must be a positive number and a unit; got {text!r}. Write 80GiB, 24GB or 512MiB.")
    if not match[2] and float(match[1]) < 2**20:
        raise ZebraError(
            f"memory without a unit is in bytes and must be at least 1 MiB; got {text!r}. Write {match[1]}GiB or "
            f"{match[1]}MiB."
        )
    return int(float(match[1]) * _UNITS[match[2].upper()])


def largest_length(run: Run, budget: int) -> int:
    """The largest length whose memory is at most `budget` bytes, all else as in `run`; 0 where not one token fits.

    With Self-Extend it is at most the length that Self-Extend reaches.
    """
    most = _MOST
    if run.self_extend:
        most = min(most, run.self_extend.reach(run.decoder.trained_length) - (run.phase == "decode"))
    return bisect_right(range(1, most + 1), budget, key=lambda n: sum(memory(replace(run, length=n)).values()))


def largest_batch(run: Run, budget: int) -> int:
    """The largest batch whose memory is at most `budget` bytes, all else as in `run`; 0 where not one sequence fits."""
    return bisect_right(range(1, _MOST + 1), budget, key=lambda n: sum(memory(replace(run, batch=n)).values()))


def suggest_layout(run: Run, *, budget: int | None = None, seconds: float | None = None, device: Device) -> Run | None:
    """The layout with the most visible pairs that meets the budgets of bytes and seconds; None where none does.

    The cheapest layout would always have the largest stride and the smallest window, so the one that loses the fewest
    pairs is chosen: full attention where it fits, else one of the paper's layouts with strides 2 to 8 and windows of
    512 to 16,384.

    Raises:
        ZebraError: `seconds` that are not positive.
    """
    if seconds is not None and not seconds > 0:
        raise ZebraError(f"a budget of time must be a positive number of seconds; got {seconds:g}. Raise it.")
    layouts = [Stripes.grouped(stride=g, window=w) for g in STRIDES for w in WINDOWS if w < run.length]
    for candidate in sorted((replace(run, stripes=stripes) for stripes in (None, *layouts)), key=pairs, reverse=True):
        if (budget is None or sum(memory(candidate).values()) <= budget) and (
            seconds is None or sum(device.seconds(candidate).values()) <= seconds
        ):
            return candidate
    return None
