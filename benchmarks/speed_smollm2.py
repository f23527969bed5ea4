"""Where the time goes in SmolLM2-135M: reading, a token, a training step, by part and beside the least it could take.

python benchmarks/speed_smollm2.py                            every part, the most important first: two hours of a core
python benchmarks/speed_smollm2.py prefill-8192-bfloat16      these parts alone
python benchmarks/speed_smollm2.py peers-prefill-8192-bfloat16 --checkpoint smollm2 --gguf smollm2-f16.gguf
python benchmarks/speed_smollm2.py --list                     the names of the parts

Weights are random ones of its shape, or those of --checkpoint. `--threads 1` is the default; 2 needs a quiet machine.
Results are in benchmarks/results/speed-smollm2.jsonl as soon as a part has ended, and what is there is not measured
again: delete its lines to measure anew. `python benchmarks/speed.py --page` writes docs/results/speed.md from them.

In a part all ways take turns in one process: full attention, two layouts of stripes, Self-Extend; among `peers` also
transformers with sdpa and eager attention, and llama.cpp (its server, --llama-server). Logits are compared first. Five
turns, three where one takes ten seconds; medians count. The parts of a call are those of the turn whose time is the
median, under torch's profiler; a token's time is taken without it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speed_parts import LLAMA, PARTS, Part
from speed_waterfalls import lines
from zebra import kernels
from zebra.errors import ZebraError
from zebra.measure import TOLERANCE, ceiling_results, measure_ceilings, relative_error
from zebra.model.load import device_name
from zebra.plan.cost import flops
from zebra.plan.devices import Device
from zebra.results import Result, append_results
from zebra_bench.llama_server import LlamaServer, llama_server
from zebra_bench.peak_memory import extra_bytes
from zebra_bench.published import stored_results
from zebra_bench.runner import Workload, highest
from zebra_bench.smollm2 import STEPS, Case, layout_of, load, prepare, tokens, write_random
from zebra_bench.waterfall import PARTS as WATERFALL
from zebra_bench.waterfall import floors, waterfall

RESULTS = Path(__file__).parent / "results" / "speed-smollm2.jsonl"
TASK = "bench SmolLM2-135M"
TURNS, FEW, LONG = 5, 3, 10.0
"""Turns; those where one takes so many seconds."""
WARM_UP = 2048
"""Tokens of a text that is read first, so that kernels are compiled and libraries loaded."""
CHECKED = 1281
"""Tokens of the text whose logits are compared: odd, and beyond the window."""


@dataclass(frozen=True)
class Turn:
    """One turn: milliseconds of a text, a token or a step; and those of its parts where they were looked at."""

    milliseconds: float
    parts: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Subject:
    """What takes turns with others.

    Attributes:
        model, layout: in the results.
        case: of the plan and the floors.
        turn: takes one; `profiled`, with its parts.
        trained: parameters.
    """

    model: str
    layout: str
    case: Case
    turn: Callable[[bool], Turn]
    trained: int = 0


def subject(case: Case, checkpoint: Path) -> Subject:
    """A model of ours or of transformers, compared with another way to compute the same, and warm."""
    model = load(case, checkpoint)
    if not case.training:
        check(case, model, checkpoint)
        prepare(replace(case, phase="prefill", length=min(case.length, WARM_UP)), model)()
    call, own = prepare(case, model), case.attention is None
    if case.phase == "decode" or case.length <= WARM_UP:
        call()

    def turn(profiled: bool) -> Turn:
        if profiled and own:
            seconds, parts = waterfall(model, call)
            return Turn(1e3 * seconds / case.calls, {name: 1e3 * one / case.calls for name, one in parts.items()})
        start = time.perf_counter()
        call()
        return Turn(1e3 * (time.perf_counter() - start) / case.calls)

    trained = sum(one.numel() for one in model.parameters() if one.requires_grad) if case.training else 0
    name = "zebra" if own else f"transformers, {case.attention}"
    return Subject(name, layout_of(case, model), case, turn, trained)


@torch.no_grad()
def check(case: Case, model: Any, checkpoint: Path) -> None:
    """Compare the logits of a short text with those of the formula, or of transformers with those of ours.

    Raises:
        ZebraError: they differ by more than rounding.
    """
    short = replace(case, phase="prefill", length=min(case.length, CHECKED))
    other = model if case.attention is None else load(replace(short, attention=None), checkpoint)
    logits = prepare(short, model)()
    with kernels.only("reference"):
        expected = prepare(replace(short, attention=None), other)()
    compare(f"{case.attention or 'zebra'}, {case.way}", logits, expected, case.dtype)


def compare(name: str, logits: Tensor, expected: Tensor, dtype: str) -> None:
    """Compare log-probabilities, (1, V) or those of some tokens.

    Raises:
        ZebraError: they differ by more than rounding.
    """
    error = relative_error([logits.float()], [expected.float()])
    print(f"  {name}: logits differ by {error:.1e}", file=sys.stderr)
    if not error <= TOLERANCE[dtype]:
        raise ZebraError(f"{name}: the logits are off by {error:.1e}, more than {TOLERANCE[dtype]:.0e}.")


def llama(part: Part, checkpoint: Path, server: LlamaServer) -> Subject:
    """llama.cpp, compared with ours."""
    case = Case(part.phase, part.length, "full", part.dtype)
    model = load(case, checkpoint)
    short = replace(case, phase="prefill", length=min(case.length, CHECKED))
    expected = server.log_probabilities(tokens(model, short.length)[0].tolist())
    own = prepare(short, model)().float().log_softmax(-1)[0, [*expected]]
    compare(LLAMA, torch.tensor([*expected.values()]), own, part.dtype)
    ids = tokens(model, part.length)[0].tolist()
    if part.phase == "decode":
        server.decode(ids, 1)

    def turn(profiled: bool) -> Turn:
        return Turn(server.decode(ids, STEPS + 1) if part.phase == "decode" else server.read(ids))

    return Subject("llama.cpp, f16", "full", case, turn)


def take_turns(part: Part, subjects: Sequence[Subject], most: int) -> dict[Subject, list[Turn]]:
    """One turn of each, then the next of each. Only in a token the profiler's own work shows: its turns are doubled."""
    decoding = part.phase == "decode"
    turns: dict[Subject, list[Turn]] = {one: [] for one in subjects}
    for number in range(most):
        for one in subjects:
            turns[one].append(one.turn(not decoding))
            if decoding and one.model == "zebra":
                turns[one].append(one.turn(True))
        slowest = max(turn.milliseconds for ones in turns.values() for turn in ones)
        print(f"  turn {number + 1}: {slowest / 1e3:.1f} s at most", file=sys.stderr)
        if number + 1 == FEW and slowest * (STEPS if decoding else 1) > LONG * 1e3:
            break
    return turns


def common_columns(part: Part, model: str, layout: str) -> dict[str, Any]:
    """Columns of all results of a subject."""
    return {
        "run": part.name,
        "model": model,
        "layout": layout,
        "task": f"{TASK}: {part.phase}, {part.dtype}",
        "length": part.length,
        "seed": 0,
        "device": device_name("cpu"),
    }


def rows(part: Part, one: Subject, turns: Sequence[Turn], run: Any, ceilings: Device) -> Iterator[Result]:
    """Of one subject: the median, its parts and their floors."""
    common = common_columns(part, one.model, one.layout)
    timed = [turn.milliseconds for turn in turns if part.phase != "decode" or turn.parts is None]
    spread: Any = {"low": min(timed), "high": max(timed), "n": len(timed)}
    median = statistics.median(timed)
    yield Result(metric="milliseconds", value=median, **spread, **common)
    possible = ceilings.flops[part.dtype] * median / 1e3
    yield Result(metric="share_of_peak", value=sum(flops(run).values()) / possible, **common)
    if part.phase == "decode":
        yield Result(metric="planned_milliseconds", value=1e3 * sum(ceilings.seconds(run).values()), **common)
    profiled = sorted((turn for turn in turns if turn.parts), key=lambda turn: turn.milliseconds)
    if not profiled:
        return
    middle = profiled[(len(profiled) - 1) // 2]
    least = floors(run, ceilings, one.trained)
    yield Result(metric="profiled_milliseconds", value=middle.milliseconds, **common)
    for name in WATERFALL:
        assert middle.parts is not None
        if middle.parts[name] or least[name]:
            yield Result(metric=f"milliseconds, {name}", value=middle.parts[name], **common)
            yield Result(metric=f"floor_milliseconds, {name}", value=1e3 * least[name], **common)


def measure(part: Part, options: argparse.Namespace, checkpoint: Path) -> list[Result]:
    """The results of a part."""

    def ceilings() -> Device:
        decoding = part.phase == "decode"  # the plan's token needs the rates at which one reads
        return measure_ceilings("cpu", repeats=3, dtypes=(part.dtype, "float32"), attention=decoding)

    if part.memory:
        return [row for case in part.cases for row in memory(part, case, options, checkpoint)]
    before = ceilings()
    with ExitStack() as stack:
        subjects = [subject(case, checkpoint) for case in part.cases]
        if LLAMA in part.peers and options.gguf:
            context = part.length + 64
            server = stack.enter_context(
                llama_server(options.llama_server, options.gguf, context, torch.get_num_threads())
            )
            subjects.append(llama(part, checkpoint, server))
        turns = take_turns(part, subjects, options.turns)
    highest_ceilings = highest(before, ceilings())
    results = [replace(one, seed=0) for one in ceiling_results(highest_ceilings, run=part.name)]
    for one, own in turns.items():
        results += rows(part, one, own, one.case.plan(checkpoint), highest_ceilings)
    return results


def memory(part: Part, case: Case, options: argparse.Namespace, checkpoint: Path) -> list[Result]:
    """Peak bytes of one call beyond the model, in a process of its own, and the milliseconds of that one call."""
    own = [f"{part.phase}", str(part.length), case.way, part.dtype, case.attention or ""]
    command = [sys.executable, __file__, "--checkpoint", str(checkpoint), "--threads", str(options.threads)]
    answer = subprocess.run([*command, "--extra-bytes", *own], capture_output=True, text=True, check=True)
    name = "zebra" if case.attention is None else f"transformers, {case.attention}"
    layout, extra, milliseconds = answer.stdout.strip().rsplit(" ", 2)
    common = common_columns(part, name, layout)
    values = {"extra_bytes": int(extra), "milliseconds": float(milliseconds)}
    return [Result(metric=metric, value=value, n=1, **common) for metric, value in values.items()]


def print_extra_bytes(case: Case, checkpoint: Path) -> None:
    """The layout of a case, the bytes of its call, and its milliseconds."""
    model = load(case, checkpoint)
    prepare(replace(case, length=300), model)()
    call, seconds = prepare(case, model), [0.0]

    def timed() -> list[Tensor]:
        start = time.perf_counter()
        output = call()
        seconds[0] = time.perf_counter() - start
        return [output]

    extra = extra_bytes(Workload(prepare=lambda: timed), "cpu")
    print(layout_of(case, model), extra, 1e3 * seconds[0])


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--gguf", type=Path, help="of the same weights, in 16 bits")
    parser.add_argument("--llama-server", default="llama-server")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--extra-bytes", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as zebra's commands do
    names = {part.name: part for part in PARTS}
    if unknown := set(options.parts) - set(names):
        raise ZebraError(f"parts are {', '.join(names)}; got {', '.join(sorted(unknown))}.")
    if options.list:
        print(*names, sep="\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        if (checkpoint := options.checkpoint) is None:
            write_random(checkpoint := Path(folder))
        if options.extra_bytes:
            phase, length, way, dtype, attention = options.extra_bytes
            print_extra_bytes(Case(phase, int(length), way, dtype, attention or None), checkpoint)
            return
        for name, part in names.items():
            present = {(one.run, one.device) for one in stored_results(options.out)}
            if (not options.parts or name in options.parts) and (name, device_name("cpu")) not in present:
                print(name, file=sys.stderr)
                results = measure(part, options, checkpoint)
                append_results(options.out, results)
                print(*lines(results), sep="\n", flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ZebraError as error:
        sys.exit(f"speed_smollm2: {error}")
