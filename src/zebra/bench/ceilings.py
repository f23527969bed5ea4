"""A device's ceilings, measured: FLOP/s of a large matrix product and of attention by dtype, bytes/s of a copy.

The least time of a few turns counts, not the median: a ceiling is what the device can do.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zebra.bench.subjects import FAST, RUN, Ceilings, Paired
from zebra.errors import ZebraError
from zebra.kernels import Mask, attend
from zebra.kernels.precision import fast_float32
from zebra.model.load import device_name, read_device
from zebra.plan.devices import MEASURED, Device, find
from zebra.results import Result, to_json
from zebra.stripes import GLOBAL, LOCAL, visible_pairs

if TYPE_CHECKING:
    from collections.abc import Iterator

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SANE = 0.25
"""A dtype that does less than this share of float32's rate is not one that the device does."""


def measure(device: str, *, size: int | None = None, repeats: int = 5, fast: bool = False) -> Device:
    """The ceilings of a device, with the float32 switch where `fast`. About two seconds.

    flops = 2 size^3 / seconds of a product,     bandwidth = 2 bytes / seconds of a copy (read and written)
    attention = 14 D H visible pairs / seconds of a layer's forward and backward, global or with a quarter as its window
    """
    size = size or (8192 if device.startswith("cuda") else 2048)
    with fast_float32() if fast else nullcontext():
        flops = dict(_products(device, size, repeats))
        attention = {
            kind: {dtype: _attention(device, size, repeats, _DTYPES[dtype], window) for dtype in flops}
            for kind, window in ((GLOBAL, None), (LOCAL, max(1, size // 4)))
        }
    copied = torch.empty(min(1 << 30, 64 * size * size), dtype=torch.uint8, device=device).fill_(1)
    into = torch.empty_like(copied)
    bandwidth = 2 * copied.nbytes / _least(lambda: into.copy_(copied), device, repeats)
    return Device(device_name(device), flops, bandwidth, _memory(device), MEASURED, attention)


def _attention(device: str, size: int, repeats: int, dtype: torch.dtype, window: int | None) -> float:
    """FLOP/s of visible pairs in a layer of `size` tokens and 8 heads of 64."""
    heads, head_size = 8, 64
    q, k, v, grad = torch.randn(4, 1, heads, size, head_size, device=device).to(dtype).requires_grad_()

    def step() -> None:
        out, _ = attend(q, k, v, Mask(window), with_lse=False)
        torch.autograd.grad(out, (q, k, v), grad)

    return 14 * head_size * heads * visible_pairs(size, window) / _least(step, device, repeats)


def _products(device: str, size: int, repeats: int) -> Iterator[tuple[str, float]]:
    """FLOP/s by dtype. Smaller products show first whether the device does the dtype at all."""
    single: dict[int, float] = {}
    for name, dtype in _DTYPES.items():
        for n in (max(1, size // 16), max(1, size // 4), size):
            a, b = torch.randn(2, n, n, device=device).to(dtype)
            # A small one takes microseconds, in which anything may come between.
            rate = 2 * n**3 / _least(partial(torch.mm, a, b), device, repeats * (size // n))
            if rate < _SANE * single.setdefault(n, rate):
                break
        else:
            yield name, rate


def _least(call: Callable[[], object], device: str, repeats: int) -> float:
    """The least seconds of a call, after one that warms up."""
    least = float("inf")
    for turn in range(repeats + 1):
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        least = min(least, time.perf_counter() - start if turn else least)
    return least


def wait(device: str) -> None:
    """Until a GPU has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _memory(device: str) -> int | None:
    if device.startswith("cuda"):
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def read(sizes: Paired, device: str) -> dict[bool, Device]:
    """The ceilings that a subject is held against, without and (where it is asked for) with the float32 switch.

    Raises:
        ZebraError: a file that is none, or one that lacks the dtype.
    """
    plain = find(sizes.ceilings) if sizes.ceilings else measure(device, repeats=3)
    if sizes.dtype not in plain.flops:
        raise ZebraError(
            f"{plain.name} has no ceiling for {sizes.dtype}; it has {', '.join(plain.flops)}. Take another."
        )
    return {False: plain} | ({True: measure(device, repeats=3, fast=True)} if sizes.fast_float32 else {})


def highest(one: Mapping[bool, Device], two: Mapping[bool, Device]) -> dict[bool, Device]:
    """The larger of two measurements of each: what slowed the machine meanwhile is no ceiling."""
    return {
        fast: replace(
            first,
            flops=_larger(first.flops, two[fast].flops),
            bandwidth=max(first.bandwidth, two[fast].bandwidth),
            attention={
                kind: _larger(rates, two[fast].attention.get(kind, {})) for kind, rates in first.attention.items()
            },
        )
        for fast, first in one.items()
    }


def _larger(one: Mapping[str, float], two: Mapping[str, float]) -> dict[str, float]:
    return {dtype: max(rate, two.get(dtype, 0.0)) for dtype, rate in one.items()}


def bench(sizes: Ceilings) -> tuple[Device, list[Result]]:
    """The ceilings, and the same as rows.

    Raises:
        ZebraError: the float32 switch asked for on a GPU.
    """
    device = read_device(sizes.device)
    if sizes.fast_float32 and device.startswith("cuda"):
        raise ZebraError(
            "--fast-float32 is a switch of CPUs: on a GPU it would mean TF32. Drop it, or add --device cpu."
        )
    found = measure(device, size=sizes.size, repeats=sizes.repeats, fast=sizes.fast_float32)
    common: Any = {"run": RUN, "layout": "", "task": "bench ceilings", "device": found.name}
    numbers: list[tuple[str, str, float]] = [
        (f"{dtype} products" + FAST * (sizes.fast_float32 and dtype == "float32"), "flops_per_second", rate)
        for dtype, rate in found.flops.items()
    ]
    numbers += attention_rates(found)
    numbers.append(("copy", "bytes_per_second", found.bandwidth))
    numbers += [("memory", "bytes", found.memory)] if found.memory is not None else []
    return found, [Result(model=name, metric=metric, value=value, **common) for name, metric, value in numbers]


def attention_rates(found: Device) -> list[tuple[str, str, float]]:
    """A device's rates of attention as (model, metric, value) of rows."""
    return [
        (f"{dtype} attention, {'global' if kind == GLOBAL else 'local'} layer", "flops_per_second", rate)
        for kind, rates in found.attention.items()
        for dtype, rate in rates.items()
    ]


def write(path: Path, found: Device) -> None:
    """The file that `zebra plan --device` reads, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tree = {
        "name": found.name,
        "flops": dict(found.flops),
        "attention": {kind: dict(rates) for kind, rates in found.attention.items()},
        "bandwidth": found.bandwidth,
        "memory": found.memory,
    }
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(to_json(tree, indent=2) + "\n", encoding="utf-8")
    os.replace(aside, path)
