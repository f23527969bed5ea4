"""The protocol of every benchmark: correctness first, paired turns, medians, memory from fresh processes.

gate       each variant of ours is compared with the naive formula; if one fails, nothing is measured
turns      turn 0: a b c   warms up
           turn 1: a b c   each variant once, so that a change of the machine's speed affects all alike
           turn 2: a b c   ... `repeats` turns; the median, with the least and the most
memory     each variant alone in a process of its own: `zebra_bench.peak_memory`
"""

from __future__ import annotations

import importlib
import os
import pickle
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from zebra.errors import ZebraError
from zebra.measure import TOLERANCE, ceiling_results, measure_ceilings, paired_seconds
from zebra.model.load import device_name, read_device
from zebra.plan.devices import Device, find_device
from zebra.progress import bar
from zebra.results import Result
from zebra_bench.configs import FAST, RUN, BenchmarkConfig

Call = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a variant does in one turn.

    Attributes:
        prepare: makes what is not timed (a model, a mask) and returns the call that is timed. The call returns its
            outputs, gradients included.
        prepared_is_extra: whether what it prepares counts as extra memory, as a mask does; a model is an input.
        whole_process: whether the peak of the whole process is measured, and no time.
        suffix: of the metrics' names: `_forward_backward`.
        calls: how many times the call repeats the workload; the time is divided by it.
        tokens: processed in that time.
        useful_flops: FLOPs of the pairs that the mask allows.
        counts_flops: whether torch's FLOP counter sees every product of it.
        planned: the plan's seconds.
    """

    prepare: Callable[[], Call]
    prepared_is_extra: bool = False
    whole_process: bool = False
    suffix: str = ""
    calls: int = 1
    tokens: int | None = None
    useful_flops: float | None = None
    counts_flops: bool = False
    planned: Callable[[Device], float] | None = None


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to do the same workloads.

    Attributes:
        name: the model of its results.
        gate: the relative error against the formula; None for variants that are not ours.
        may_fail: whether it is another's and may not run here; then it is left out, with its error message.
    """

    name: str
    layout: str
    workloads: tuple[Workload, ...]
    gate: Callable[[], float] | None = None
    may_fail: bool = False


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """The variants of a config, and one line for each variant that is left out."""

    task: str
    variants: tuple[Variant, ...]
    left_out: tuple[str, ...] = ()


def benchmark_of(config: BenchmarkConfig) -> Benchmark:
    """The benchmark of a config. The process keeps the config's device and float32 matmul precision."""
    if ":" in (device := read_device(config.device)):
        torch.cuda.set_device(device)  # torch's clock waits for the current device
    torch.set_float32_matmul_precision(config.matmul_precision)
    benchmark: Benchmark = importlib.import_module(config.module).benchmark(config)
    variants = (replace(variant, name=variant.name + _precision(config)) for variant in benchmark.variants)
    return replace(benchmark, variants=tuple(variants))


def run_benchmark(config: BenchmarkConfig) -> tuple[list[Result], tuple[str, ...]]:
    """The results of a config, and what was left out.

    Raises:
        ZebraError: a variant of ours that differs from the formula; nothing is measured then. Memory that cannot be
            measured is left out instead: the times exist by then.
    """
    device = read_device(config.device)
    benchmark = runnable(benchmark_of(config))
    ceilings = ceilings_for(config, device)
    gate(benchmark.variants, config.dtype)
    pairs = [(variant, workload) for variant in benchmark.variants for workload in variant.workloads]
    results, left_out = [], list(benchmark.left_out)
    with bar("measuring", config.repeats + 1 + len(pairs), "turns") as advance:
        times = milliseconds(benchmark.variants, config.repeats, done=lambda: advance(1))
        ceilings = highest(ceilings, ceilings_for(config, device))
        for variant, workload in pairs:
            memory = None
            try:
                memory = peak_bytes(config, variant.name, workload.suffix) if config.memory else None
            except ZebraError as error:
                left_out.append(str(error))
            common = {
                "run": RUN,
                "model": variant.name,
                "layout": variant.layout,
                "task": f"bench {benchmark.task}, {config.dtype}",
                "length": getattr(config, "length", None),
                "seed": config.seed,
                "device": device_name(device),
            }
            own_times = times.get((variant.name, workload.suffix), [])
            results += results_of(workload, own_times, memory, ceilings, config.dtype, common)
            advance(1)
    relevant = [one for one in ceiling_results(ceilings, run=RUN) if one.model.startswith((config.dtype, "copy"))]
    return results + [replace(one, model=one.model + _precision(config)) for one in relevant], tuple(left_out)


def results_of(
    workload: Workload, times: list[float], memory: int | None, ceilings: Device, dtype: str, common: dict[str, Any]
) -> list[Result]:
    """The results of one variant and workload: the time first, then what follows from it, and the memory."""
    if workload.whole_process:
        return [] if memory is None else [Result(metric="peak_bytes" + workload.suffix, value=memory, **common)]
    spread: Any = {"n": len(times), "low": min(times), "high": max(times)}
    median = statistics.median(times)
    time = Result(metric="milliseconds" + workload.suffix, value=median, **spread, **common)
    numbers = rates(workload, median, ceilings, dtype) | {"extra_bytes": memory}
    return [time] + [
        Result(metric=metric + workload.suffix, value=value, **common)
        for metric, value in numbers.items()
        if value is not None
    ]


def runnable(benchmark: Benchmark) -> Benchmark:
    """The benchmark without the variants of others that do not run here."""
    variants, left_out = [], list(benchmark.left_out)
    for variant in benchmark.variants:
        try:
            if variant.may_fail:
                variant.workloads[0].prepare()()
        except Exception as error:  # whatever another's code raises is reported, and we go on
            lines = str(error).strip().splitlines() or [type(error).__name__]
            left_out.append(f"{variant.name}: {lines[0]}")
        else:
            variants.append(variant)
    return replace(benchmark, variants=tuple(variants), left_out=tuple(left_out))


def gate(variants: Iterable[Variant], dtype: str) -> None:
    """A fast wrong answer is no result.

    Raises:
        ZebraError: a variant of ours is farther from the formula than rounding explains.
    """
    for variant in variants:
        if variant.gate is None:
            continue
        error = variant.gate()
        # Below the highest precision torch may take matrix registers, which multiply bfloat16.
        exact = dtype != "float32" or torch.get_float32_matmul_precision() == "highest"
        tolerance = TOLERANCE[dtype if exact else "bfloat16"]
        if not error <= tolerance:
            raise ZebraError(
                f"{variant.name} is off by {error:.1e} of the formula, more than {tolerance:.0e} in {dtype}. "
                "Nothing was measured: fix it first."
            )


def milliseconds(
    variants: Sequence[Variant], repeats: int, done: Callable[[], object] = lambda: None
) -> dict[tuple[str, str], list[float]]:
    """Milliseconds of each variant and workload, turn by turn."""
    workloads = {(v.name, w.suffix): w for v in variants for w in v.workloads if not w.whole_process}
    seconds = paired_seconds({key: workload.prepare() for key, workload in workloads.items()}, repeats, done)
    return {key: [1000 * one / workloads[key].calls for one in times] for key, times in seconds.items()}


def rates(workload: Workload, median: float, ceilings: Device, dtype: str) -> dict[str, float | None]:
    """What follows from the median time, in milliseconds, and the ceilings."""
    possible = ceilings.flops[dtype] * median / 1000  # FLOPs that the device could have computed in that time
    return {
        "tokens_per_second": workload.tokens and 1000 * workload.tokens / median,
        "share_of_peak": executed_flops(workload) / possible if workload.counts_flops else None,
        "useful_share_of_peak": workload.useful_flops and workload.useful_flops / possible,
        "planned_milliseconds": 1000 * workload.planned(ceilings) if workload.planned else None,
    }


def executed_flops(workload: Workload) -> int:
    """FLOPs of the products that are computed, hidden pairs of a tile included."""
    call = workload.prepare()
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() // workload.calls


def peak_bytes(config: BenchmarkConfig, variant: str, suffix: str) -> int | None:
    """Peak memory of one variant and workload in a fresh process; None where the system does not report it.

    Raises:
        ZebraError: the process ended early, perhaps for lack of memory.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the other process needs what this one's allocator keeps
    question = pickle.dumps((config, variant, suffix, torch.get_num_threads()))
    command, environment = [sys.executable, "-m", "zebra_bench.peak_memory"], {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.run(command, input=question, capture_output=True, env=os.environ | environment)
    if process.returncode:
        lines = process.stderr.decode(errors="replace").strip().splitlines()
        reason = lines[-1] if lines else "no message: perhaps memory ran out"
        raise ZebraError(f"measuring the memory of {variant} ended with code {process.returncode}: {reason}")
    answer = process.stdout.split()[-1].decode()
    return None if answer == "unknown" else int(answer)


def ceilings_for(config: BenchmarkConfig, device: str) -> Device:
    """The ceilings in the config's file, or measured ones.

    Raises:
        ZebraError: a file that holds no ceilings, or that lacks the dtype.
    """
    ceilings = find_device(config.ceilings) if config.ceilings else measure_ceilings(device, repeats=3)
    if config.dtype not in ceilings.flops:
        raise ZebraError(
            f"{ceilings.name} has no ceiling for {config.dtype}; it has {', '.join(ceilings.flops)}. Choose another."
        )
    return ceilings


def highest(one: Device, two: Device) -> Device:
    """The larger of two measurements of each ceiling: what slowed the machine down meanwhile is no ceiling."""
    return replace(
        one,
        flops=_larger(one.flops, two.flops),
        bandwidth=max(one.bandwidth, two.bandwidth),
        attention={kind: _larger(rates, two.attention.get(kind, {})) for kind, rates in one.attention.items()},
        reading={kind: _larger(rates, two.reading.get(kind, {})) for kind, rates in one.reading.items()},
    )


def _larger(one: Mapping[str, float], two: Mapping[str, float]) -> dict[str, float]:
    return {dtype: max(rate, two.get(dtype, 0.0)) for dtype, rate in one.items()}


def _precision(config: BenchmarkConfig) -> str:
    return FAST * (config.matmul_precision != "highest")
