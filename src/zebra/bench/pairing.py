"""The protocol of every bench: gate, pairs that take turns, medians, memory from fresh processes, one number a row.

gate       each variant of ours against the naive formula; one failure and there is no row at all
turns      turn 0: a b c   warms up
           turn 1: a b c   each variant once, so that a change of the machine's speed hits all alike
           turn 2: a b c   ... `repeats` turns; the median, with the least and the most
memory     each variant alone in a process of its own: `zebra.bench.alone`
"""

from __future__ import annotations

import contextlib
import importlib
import math
import pickle
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from zebra.bench import ceilings
from zebra.bench.ceilings import wait
from zebra.bench.subjects import FAST, RUN, Paired
from zebra.errors import ZebraError
from zebra.kernels.precision import fast_float32
from zebra.model.load import device_name, read_device
from zebra.plan.devices import Device
from zebra.progress import bar
from zebra.results import Result

TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
"""The relative error, in the Frobenius norm, that a variant of ours may have against the formula."""

Call = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a variant does in one turn.

    Attributes:
        prepare: makes what is not to be timed (a model, a mask) and returns the call that is timed. That returns its
            outputs, gradients among them.
        prepares_extra: whether what it prepares counts as extra memory, as a mask does; a model is an input.
        whole: whether the peak of its whole process is all that is measured, and no time.
        suffix: behind the names of the metrics: `_forward_backward`.
        calls: what the call does so many times; the time is divided by it.
        tokens: that one such time serves.
        useful: FLOPs that the mask asks for.
        counted: whether every product of it is one that torch's counter of FLOPs sees exactly.
        planned: the plan's seconds.
    """

    prepare: Callable[[], Call]
    prepares_extra: bool = False
    whole: bool = False
    suffix: str = ""
    calls: int = 1
    tokens: int | None = None
    useful: float | None = None
    counted: bool = False
    planned: Callable[[Device], float] | None = None


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to do the same work.

    Attributes:
        name: the row's model.
        gate: the relative error against the formula; None for what is not ours.
        fast: whether it runs with the faster float32 products.
        may_fail: whether it is another's, and may not run here: then it is left out, with what it said.
    """

    name: str
    layout: str
    works: tuple[Work, ...]
    gate: Callable[[], float] | None = None
    fast: bool = False
    may_fail: bool = False


@dataclass(frozen=True, kw_only=True)
class Case:
    """A subject at its sizes, its inputs made: what is paired, and in a line each what had to be left out and why."""

    task: str
    variants: tuple[Variant, ...]
    left_out: tuple[str, ...] = ()


def case_of(sizes: Paired) -> Case:
    """The subject's case, with each variant once more under the float32 switch where that is asked for."""
    case: Case = importlib.import_module(sizes.module).case(sizes)
    if not sizes.fast_float32:
        return case
    if not str(read_device(sizes.device)).startswith("cpu"):
        raise ZebraError(
            "--fast-float32 is a switch of CPUs: on a GPU it would mean TF32. Drop it, or add --device cpu."
        )
    with fast_float32() as on:
        if not on:
            reason = "fast float32: its products are not accurate on this machine"
            return replace(case, left_out=(*case.left_out, reason))
    twins = (replace(variant, name=variant.name + FAST, fast=True) for variant in case.variants)
    return replace(case, variants=(*case.variants, *twins))


def bench(sizes: Paired) -> tuple[list[Result], tuple[str, ...]]:
    """All rows of a subject, and what was left out.

    Raises:
        ZebraError: a variant of ours that computes something else than the formula; no row is made then. Memory that
            cannot be measured is left out: the times are there by then.
    """
    device = read_device(sizes.device)
    peaks = ceilings.read(sizes, device)
    case = tried(case_of(sizes))
    gate(case.variants, sizes.dtype)
    pairs = [(variant, work) for variant in case.variants for work in variant.works]
    rows, left_out = [], list(case.left_out)
    with bar("measuring", sizes.repeats + 1 + len(pairs), "turns") as advance:
        taken = timings(case.variants, sizes.repeats, device, done=lambda: advance(1))
        peaks = ceilings.highest(peaks, ceilings.read(sizes, device))
        for variant, work in pairs:
            memory = None
            try:
                memory = alone(sizes, variant.name, work.suffix) if sizes.memory else None
            except ZebraError as refusal:
                left_out.append(str(refusal))
            flops = executed(variant, work) if work.counted else None
            found = _Measured(taken.get((variant.name, work.suffix), []), memory, flops)
            rows += _rows(sizes, case, variant, work, found, peaks[variant.fast], device)
            advance(1)
    return rows + _ceilings(sizes, peaks), tuple(left_out)


def _ceilings(sizes: Paired, peaks: Mapping[bool, Device]) -> list[Result]:
    """What the shares and the plan rest on."""
    rows = []
    for fast, found in peaks.items():
        common: Any = {"run": RUN, "layout": "", "task": "bench ceilings", "device": found.name}
        named = [*((f"{dtype} products", "flops_per_second", rate) for dtype, rate in found.flops.items())]
        named += ceilings.attention_rates(found)
        named = [one for one in named if one[0].startswith(sizes.dtype)]
        named += [("copy", "bytes_per_second", found.bandwidth)] if not fast else []
        rows += [
            Result(model=name + FAST * fast, metric=metric, value=value, **common) for name, metric, value in named
        ]
    return rows


def tried(case: Case) -> Case:
    """The case without the variants of others that do not run here; why stands in a line each."""
    kept, left_out = [], list(case.left_out)
    for variant in case.variants:
        try:
            if variant.may_fail:
                variant.works[0].prepare()()
        except Exception as error:  # what another's code raises is its own affair: it is said, and we go on
            said = str(error).strip().splitlines() or [type(error).__name__]
            left_out.append(f"{variant.name}: {said[0]}")
        else:
            kept.append(variant)
    return replace(case, variants=tuple(kept), left_out=tuple(left_out))


def gate(variants: Iterable[Variant], dtype: str) -> None:
    """A fast wrong answer is no result.

    Raises:
        ZebraError: a variant of ours is farther from the formula than rounding explains.
    """
    for variant in variants:
        if variant.gate is None:
            continue
        with within(variant):
            error = variant.gate()
        if not error <= TOLERANCE[dtype]:
            raise ZebraError(
                f"{variant.name} is off by {error:.1e} of the formula, more than {TOLERANCE[dtype]:.0e} in {dtype}. "
                "Nothing was measured: mend it first."
            )


def within(variant: Variant) -> contextlib.AbstractContextManager[Any]:
    """The setting that a variant runs in."""
    return fast_float32() if variant.fast else contextlib.nullcontext()


def timings(
    variants: Sequence[Variant], repeats: int, device: str, done: Callable[[], object] = lambda: None
) -> dict[tuple[str, str], list[float]]:
    """Milliseconds of each variant and work, turn by turn."""
    timed = [(v, work) for v in variants for work in v.works if not work.whole]
    calls = {(v.name, work.suffix): work.prepare() for v, work in timed}
    taken: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for turn in range(repeats + 1):
        for variant, work in timed:
            key = variant.name, work.suffix
            with within(variant):
                wait(device)
                start = time.perf_counter()
                calls[key]()
                wait(device)
                seconds = time.perf_counter() - start
            if turn:  # the first one warms up
                taken[key].append(1000 * seconds / work.calls)
        done()
    return taken


def executed(variant: Variant, work: Work) -> int:
    """FLOPs of the products that are really computed, hidden pairs of a tile included."""
    call = work.prepare()
    with within(variant), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() // work.calls


def alone(sizes: Paired, variant: str, suffix: str) -> int | None:
    """Peak bytes beyond inputs and outputs, in a fresh process; None where the system does not tell.

    Raises:
        ZebraError: the process ended early, of too little memory perhaps.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what this process keeps for later, the other one needs
    asked = pickle.dumps((sizes, variant, suffix, torch.get_num_threads()))
    done = subprocess.run([sys.executable, "-m", "zebra.bench.alone"], input=asked, capture_output=True)
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no word: perhaps memory ran out"]
        raise ZebraError(f"measuring the memory of {variant} ended with code {done.returncode}: {last[0]}")
    return int(found) if (found := done.stdout.split()[-1].decode()) != "unknown" else None


@dataclass(frozen=True)
class _Measured:
    times: list[float]
    memory: int | None
    executed: int | None


def _rows(
    sizes: Paired, case: Case, variant: Variant, work: Work, found: _Measured, peak: Device, device: str
) -> list[Result]:
    """The numbers of one variant and work: the time first, and what stands beside it."""
    common: Any = {
        "run": RUN,
        "model": variant.name,
        "layout": variant.layout,
        "task": f"bench {case.task}, {sizes.dtype}",
        "length": getattr(sizes, "length", None),
        "seed": sizes.seed,
        "device": device_name(device),
    }
    if work.whole:
        held = found.memory
        return [] if held is None else [Result(metric="peak_bytes" + work.suffix, value=held, **common)]
    median = statistics.median(found.times)
    most = peak.flops[sizes.dtype] * median / 1000  # FLOPs that the device could have done meanwhile
    numbers: dict[str, float | None] = {
        "tokens_per_second": work.tokens and 1000 * work.tokens / median,
        "extra_bytes": found.memory,
        "share_of_peak": found.executed and found.executed / most,
        "useful_share_of_peak": work.useful and work.useful / most,
        "planned_milliseconds": 1000 * work.planned(peak) if work.planned else None,
    }
    spread: Any = {"n": len(found.times), "low": min(found.times), "high": max(found.times)}
    rows = [Result(metric="milliseconds" + work.suffix, value=median, **spread, **common)]
    return rows + [
        Result(metric=name + work.suffix, value=value, **common) for name, value in numbers.items() if value is not None
    ]


def relative_error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest of the tensors' errors, each in the Frobenius norm over the norm of what is wanted; NaN if one is."""
    pairs = zip(found, wanted, strict=True)
    errors = [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs]
    return max(errors, key=lambda error: (math.isnan(error), error))  # `max` alone passes over NaN
