"""Measure this machine: its ceilings, and one local layer against torch's sdpa (`zebra doctor --measure`).

    flops       2 size^3 / seconds of a square matrix product, by dtype
    attention   14 D H visible pairs / seconds of a layer's forward and backward pass, global and local
    bandwidth   2 bytes / seconds of a large copy, which reads and writes
    reading     bytes / seconds of weights in matrix-vector products, and of the KV cache in one token's attention

A ceiling is the best that the device can do, so it takes the shortest time of a few repeats. The local layer and sdpa
take turns, and their times are medians.
"""

from __future__ import annotations

import itertools
import math
import statistics
import timeit
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.utils import benchmark

from zebra.errors import ZebraError
from zebra.files import atomic_write
from zebra.kernels import Mask, attend
from zebra.model.load import device_memory, device_name, read_device
from zebra.plan.devices import CACHE, MEASURED, WEIGHTS, Device
from zebra.progress import bar
from zebra.results import Result, to_json
from zebra.stripes import GLOBAL, LOCAL, visible_pairs

Name = TypeVar("Name", bound=Hashable)

HEADS, HEAD_DIM = 8, 64
"""The sizes of the attention layers that are measured."""

TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
"""The largest relative error, in the Frobenius norm, of a kernel against another implementation, by dtype."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SUPPORTED = 0.25
"""A dtype counts as not supported by the device if its rate is below this share of float32's."""


def measure(device: str | None = None, *, size: int | None = None, repeats: int = 5) -> tuple[Device, list[Result]]:
    """Measure the ceilings of a device and the times of one local layer, with a progress bar, in about ten seconds.

    Args:
        device: if None, a GPU where there is one.
        size: rows of the largest matrices, and tokens of the layers; if None 2,048 on a CPU and 8,192 on a GPU.

    Raises:
        ZebraError: no such device, or a local layer that differs from sdpa.
    """
    device = read_device(device)
    size = size or _size(device)
    # torch's clock waits for the current GPU.
    current = torch.cuda.device(device) if device.startswith("cuda") else nullcontext()
    with bar("measuring", 2, "steps") as advance, current:
        ceilings = measure_ceilings(device, size=size, repeats=repeats)
        advance(1)
        dtype = "bfloat16" if device.startswith("cuda") and "bfloat16" in ceilings.flops else "float32"
        layer = local_layer(device, dtype, size=size, repeats=repeats)
        advance(1)
    return ceilings, ceiling_results(ceilings, run="doctor") + layer


def measure_ceilings(
    device: str, *, size: int | None = None, repeats: int = 5, dtypes: Collection[str] = (), attention: bool = True
) -> Device:
    """Measure the ceilings of a device: FLOP/s of matrix products and of attention by dtype, bytes/s, memory.

    Args:
        dtypes: those to measure; all if empty.
        attention: also measure the rates of attention, and those at which decoding reads weights and the KV cache.
    """
    size = size or _size(device)
    flops = dict(_products(device, size, repeats, dtypes or _DTYPES))
    rates: dict[str, dict[str, float]] = {GLOBAL: {}, LOCAL: {}} if attention else {}
    for kind, dtype in itertools.product(rates, flops):
        window = max(1, size // 4) if kind == LOCAL else None
        seconds = _least(_layer(device, dtype, size, partial(_ours, window)), repeats)
        rates[kind][dtype] = 14 * HEAD_DIM * HEADS * visible_pairs(size, window) / seconds
    source = torch.empty(min(1 << 30, 64 * size * size), dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / _least(lambda: target.copy_(source), repeats)
    reading = dict(_reading(device, size, repeats, flops)) if attention else {}
    return Device(device_name(device), flops, bandwidth, device_memory(device), MEASURED, rates, reading=reading)


def local_layer(device: str, dtype: str, *, size: int, repeats: int) -> list[Result]:
    """Milliseconds of a local layer's forward and backward pass, with zebra's kernel and with sdpa and a band mask.

    Raises:
        ZebraError: outputs or gradients of the two differ by more than rounding.
    """
    window = max(1, size // 4)
    position = torch.arange(size, device=device)
    band = Mask(window).visible(position, position)
    attentions = {
        "zebra": partial(_ours, window),
        "sdpa, dense mask": partial(scaled_dot_product_attention, attn_mask=band),
    }
    calls = {name: _layer(device, dtype, size, attention) for name, attention in attentions.items()}
    error = relative_error(*(call() for call in calls.values()))
    if not error <= TOLERANCE[dtype]:
        raise ZebraError(f"zebra's local layer differs from sdpa by {error:.1e}, more than {TOLERANCE[dtype]:.0e}.")
    task = f"bench attention: window {window}, {HEADS} heads of {HEAD_DIM}, {dtype}"
    common: Any = {"run": "doctor", "layout": f"L:{window}", "task": task, "length": size, "n": repeats}
    common |= {"device": device_name(device), "metric": "milliseconds_forward_backward"}
    results = []
    for name, seconds in paired_seconds(calls, repeats).items():
        low, median, high = (1000 * f(seconds) for f in (min, statistics.median, max))
        results.append(Result(model=name, value=median, low=low, high=high, **common))
    return results


def paired_seconds(
    calls: Mapping[Name, Callable[[], object]], repeats: int, done: Callable[[], object] = lambda: None
) -> dict[Name, list[float]]:
    """Time calls that take turns, so that a change of the machine's speed affects all alike; in seconds.

    turn 0: a b c   warm-up
    turn 1: a b c   each call once; torch's clock waits for the accelerator
    turn 2: a b c   ... `repeats` turns; `done` is called after each turn
    """
    seconds: dict[Name, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            seconds[name].append(timeit.Timer(call, timer=benchmark.timer).timeit(number=1))
        done()
    return {name: times[1:] for name, times in seconds.items()}


def relative_error(results: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative error over pairs of tensors, ‖result − expected‖ / ‖expected‖; NaN if one is NaN."""
    pairs = zip(results, expected, strict=True)
    errors = [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs]
    return max(errors, key=lambda error: (math.isnan(error), error))  # `max` alone passes over NaN


def ceiling_results(ceilings: Device, *, run: str) -> list[Result]:
    """The ceilings of a device as results."""
    rates = {f"{dtype} products": rate for dtype, rate in ceilings.flops.items()}
    for kind, by_dtype in ceilings.attention.items():
        name = "global" if kind == GLOBAL else "local"
        rates |= {f"{dtype} attention, {name} layer": rate for dtype, rate in by_dtype.items()}
    numbers: list[tuple[str, str, float]] = [(name, "flops_per_second", rate) for name, rate in rates.items()]
    numbers.append(("copy", "bytes_per_second", ceilings.bandwidth))
    for kind, by_dtype in ceilings.reading.items():
        numbers += [(f"{dtype} {kind} of a token", "bytes_per_second", rate) for dtype, rate in by_dtype.items()]
    if ceilings.memory is not None:
        numbers.append(("memory", "bytes", ceilings.memory))
    common: Any = {"run": run, "layout": "", "task": "bench ceilings", "device": ceilings.name}
    return [Result(model=name, metric=metric, value=value, **common) for name, metric, value in numbers]


def write_ceilings(path: Path, ceilings: Device) -> None:
    """Write the file that `zebra plan --device` reads, atomically."""
    atomic_write(path, to_json(asdict(ceilings), indent=2) + "\n")


def _size(device: str) -> int:
    return 8192 if device.startswith("cuda") else 2048


def _products(device: str, size: int, repeats: int, dtypes: Collection[str]) -> Iterator[tuple[str, float]]:
    """FLOP/s by dtype. Smaller products come first, and show whether the device supports the dtype at all."""
    single: dict[int, float] = {}
    for name, dtype in _DTYPES.items():
        if name not in dtypes:
            continue
        for n in (max(1, size // 16), max(1, size // 4), size):
            a, b = torch.randn(2, n, n, device=device).to(dtype)
            # A small product takes microseconds, and any interruption doubles that: repeat it more often.
            rate = 2 * n**3 / _least(partial(torch.mm, a, b), repeats * (size // n))
            if rate < _SUPPORTED * single.setdefault(n, rate):
                break
        else:
            yield name, rate


@torch.no_grad()
def _reading(device: str, size: int, repeats: int, dtypes: Collection[str]) -> Iterator[tuple[str, dict[str, float]]]:
    """Bytes/s by dtype of reading weights, more than any hardware cache holds, and one layer's keys and values."""
    weights, cache = {}, {}
    for name in dtypes:
        dtype = _DTYPES[name]
        matrices = list(torch.randn(16, size, size, device=device).to(dtype))
        row = torch.randn(1, size, device=device).to(dtype)
        weights[name] = _bytes(matrices) / _least(partial(_rows, row, matrices), repeats)
        q = torch.randn(1, HEADS, 1, HEAD_DIM, device=device).to(dtype)
        k, v = torch.randn(2, 1, HEADS, 16 * size, HEAD_DIM, device=device).to(dtype)
        cache[name] = _bytes([k, v]) / _least(partial(_ours, None, q, k, v), repeats)
    yield WEIGHTS, weights
    yield CACHE, cache


def _rows(row: Tensor, matrices: Sequence[Tensor]) -> None:
    for matrix in matrices:
        linear(row, matrix)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _layer(
    device: str, dtype: str, size: int, attention: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Callable[[], Sequence[Tensor]]:
    """A call of one attention layer's forward and backward pass: the output and the gradients of q, k and v."""
    torch.manual_seed(0)
    q, k, v, grad = torch.randn(4, 1, HEADS, size, HEAD_DIM, device=device).to(_DTYPES[dtype]).requires_grad_()

    def step() -> Sequence[Tensor]:
        out = attention(q, k, v)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]

    return step


def _ours(window: int | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v, Mask(window), with_lse=False)[0]


def _least(call: Callable[[], object], repeats: int) -> float:
    """The shortest time of a call in seconds, after a warm-up."""
    return min(paired_seconds({"call": call}, repeats)["call"])
