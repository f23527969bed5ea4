"""The protocol of every bench: gate, pairs that take turns, medians, memory from fresh processes, one number a row.

gate       each variant of ours against the naive formula; one failure and there is no row at all
turns      turn 0: a b c   warms up
           turn 1: a b c   each variant once, so that a change of the machine's speed hits all alike
           turn 2: a b c   ... `repeats` turns; the median, with the least and the most
memory     each variant alone in a process of its own: `zebra_bench.alone`
"""

from __future__ import annotations

import importlib
import os
import pickle
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from zebra.errors import ZebraError
from zebra.measure import TOLERANCE, ceiling_results, paired_seconds
from zebra.model.load import device_name, read_device
from zebra.plan.devices import Device
from zebra.progress import bar
from zebra.results import Result
from zebra_bench import ceilings
from zebra_bench.subjects import FAST, RUN, Paired

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
        may_fail: whether it is another's, and may not run here: then it is left out, with what it said.
    """

    name: str
    layout: str
    works: tuple[Work, ...]
    gate: Callable[[], float] | None = None
    may_fail: bool = False


@dataclass(frozen=True, kw_only=True)
class Case:
    """A subject at its sizes, its inputs made: what is paired, and in a line each what had to be left out and why."""

    task: str
    variants: tuple[Variant, ...]
    left_out: tuple[str, ...] = ()


def case_of(sizes: Paired) -> Case:
    """The subject's case, under its float32 matmul precision, which the process keeps."""
    torch.set_float32_matmul_precision(sizes.matmul_precision)
    case: Case = importlib.import_module(sizes.module).case(sizes)
    return replace(case, variants=tuple(replace(one, name=one.name + _suffix(sizes)) for one in case.variants))


def _suffix(sizes: Paired) -> str:
    return FAST * (sizes.matmul_precision != "highest")


def bench(sizes: Paired) -> tuple[list[Result], tuple[str, ...]]:
    """All rows of a subject, and what was left out.

    Raises:
        ZebraError: a variant of ours that computes something else than the formula; no row is made then. Memory that
            cannot be measured is left out: the times are there by then.
    """
    device = read_device(sizes.device)
    case = tried(case_of(sizes))
    peak = ceilings.read(sizes, device)
    gate(case.variants, sizes.dtype)
    pairs = [(variant, work) for variant in case.variants for work in variant.works]
    rows, left_out = [], list(case.left_out)
    with bar("measuring", sizes.repeats + 1 + len(pairs), "turns") as advance:
        taken = timings(case.variants, sizes.repeats, done=lambda: advance(1))
        peak = ceilings.highest(peak, ceilings.read(sizes, device))
        for variant, work in pairs:
            memory = None
            try:
                memory = alone(sizes, variant.name, work.suffix) if sizes.memory else None
            except ZebraError as refusal:
                left_out.append(str(refusal))
            flops = executed(variant, work) if work.counted else None
            found = _Measured(taken.get((variant.name, work.suffix), []), memory, flops)
            rows += _rows(sizes, case, variant, work, found, peak, device)
            advance(1)
    rests_on = [row for row in ceiling_results(peak, run=RUN) if row.model.startswith((sizes.dtype, "copy"))]
    rests_on = [replace(row, model=row.model + _suffix(sizes)) for row in rests_on]
    return rows + rests_on, tuple(left_out)


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
        error = variant.gate()
        if not error <= TOLERANCE[dtype]:
            raise ZebraError(
                f"{variant.name} is off by {error:.1e} of the formula, more than {TOLERANCE[dtype]:.0e} in {dtype}. "
                "Nothing was measured: mend it first."
            )


def timings(
    variants: Sequence[Variant], repeats: int, done: Callable[[], object] = lambda: None
) -> dict[tuple[str, str], list[float]]:
    """Milliseconds of each variant and work, turn by turn."""
    works = {(v.name, work.suffix): work for v in variants for work in v.works if not work.whole}
    seconds = paired_seconds({key: work.prepare() for key, work in works.items()}, repeats, done)
    return {key: [1000 * one / works[key].calls for one in taken] for key, taken in seconds.items()}


def executed(variant: Variant, work: Work) -> int:
    """FLOPs of the products that are really computed, hidden pairs of a tile included."""
    call = work.prepare()
    with FlopCounterMode(display=False) as counter:
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
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-m", "zebra_bench.alone"], input=asked, capture_output=True, env=environment
    )
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
