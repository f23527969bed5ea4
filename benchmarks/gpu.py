"""Everything for a session of fifteen minutes on a GPU: `make gpu`, or from source alone

PYTHONPATH=src:benchmarks python benchmarks/gpu.py                   GPU tests, then every part
PYTHONPATH=src:benchmarks python benchmarks/gpu.py decode step       these parts
PYTHONPATH=src:benchmarks python benchmarks/gpu.py --device cpu      toy sizes, so that every line runs where no GPU is

attention   a layer's forward and backward at 16K, 64K and 128K tokens: our local layer by varlen and by flex, torch's
            causal flash attention, and the forward of Self-Extend
decode      a token after 128K cached ones, beside the bytes that it reads over the measured bandwidth
step        a striped training step of some layers of Llama-2-7B's width at 64K, beside the plan

It needs torch and transformers, and pytest for the tests; trl, datasets and the like are not imported. Each result is
compared with the formula first. Rows go to benchmarks/results/gpu.jsonl as soon as a part has ended, and replace those
of an earlier run.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from zebra.errors import ZebraError
from zebra.kernels import Mask
from zebra.kernels.self_extend import self_extend_attention
from zebra.measure import TOLERANCE, measure_ceilings, paired_seconds, relative_error
from zebra.model.load import device_name, read_device
from zebra.plan.cost import bytes_moved
from zebra.results import Result
from zebra.stripes import Stripes, visible_pairs
from zebra_bench import generation, train_step
from zebra_bench.attention import attend_with, forward_backward, inputs, own_kernels
from zebra_bench.configs import AttentionConfig, DecodeConfig, StripedConfig, TrainStepConfig
from zebra_bench.models import plan_run
from zebra_bench.published import replace_run
from zebra_bench.runner import Benchmark, Call, gate

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "gpu.jsonl"


@dataclass(frozen=True)
class Sizes:
    """What is measured on a device.

    Attributes:
        attention: a layer, measured at `lengths`.
        decode, step: a model; a token after its length, a training step on it.
    """

    lengths: tuple[int, ...]
    attention: AttentionConfig
    decode: DecodeConfig
    step: TrainStepConfig
    repeats: int


_WIDTH: Any = {"stripes": "GLLL:4096", "heads": 32, "head_dim": 128, "dtype": "bfloat16", "vocab_size": 32000}
_TOY: Any = {"heads": 4, "head_dim": 16, "dtype": "float32", "vocab_size": 97, "layers": 2, "intermediate_size": 32}
SIZES = {
    "cuda": Sizes(
        (16384, 65536, 131072),
        AttentionConfig(window=4096, heads=32, key_value_heads=8, head_dim=128, dtype="bfloat16"),
        DecodeConfig(length=131072, layers=8, key_value_heads=8, intermediate_size=14336, **_WIDTH),
        TrainStepConfig(length=65536, layers=4, intermediate_size=11008, **_WIDTH),
        5,
    ),
    "cpu": Sizes(
        (300, 600),
        AttentionConfig(window=64, heads=4, key_value_heads=2, head_dim=16),
        DecodeConfig(length=2100, key_value_heads=2, stripes="GL:64", **_TOY),
        TrainStepConfig(length=300, stripes="GL:64", **_TOY),
        1,
    ),
}  # fmt: skip
"""By the kind of device; those of a CPU are toys."""
GOALS = {
    "local_rate": ("a local layer's FLOP rate, of that of torch's flash", 0.60, True),
    "self_extend_time": ("Self-Extend's time, of plain causal attention's", 1.25, False),
    "decode_over_bytes": ("a token's time, of its bytes over the bandwidth", 1.25, False),
    "step_over_plan": ("a step's time, of the plan's", 1 / 0.85, False),
}
"""By metric: what it says, the bound, and whether more is better."""

Calls = Mapping[str, Callable[[], object]]


def attention(sizes: Sizes, device: str) -> Iterator[Result]:
    """Milliseconds of a layer, and the rates by visible pairs."""
    config = replace(sizes.attention, device=device)
    window = config.window
    for length in sizes.lengths:
        own = _local_kernels(config, length)
        tensors = inputs(config, length)
        q, k, v, _ = tensors
        calls: dict[str, Callable[[], object]] = {
            f"zebra, {name}": partial(forward_backward, partial(attend_with, name, window), tensors) for name in own
        }
        calls["torch, flash, causal"] = partial(forward_backward, _flash, tensors)
        calls["torch, flash, causal, forward"] = partial(_flash, q, k, v)
        calls["zebra, Self-Extend, forward"] = partial(_self_extend, window, q, k, v)
        _check_attention(config, own)
        task = f"bench attention: window {window}, {config.heads} heads of {config.head_dim}"
        times = dict(_milliseconds(calls, sizes.repeats))
        for name, spread in times.items():
            yield _row("attention", name, task, "milliseconds", length, device, **spread)
        pairs = {"local": visible_pairs(length, window), "global": visible_pairs(length)}
        full = pairs["global"] / times["torch, flash, causal"]["value"]
        for name in own:
            rate = pairs["local"] / times[f"zebra, {name}"]["value"] / full
            yield _row("attention", f"zebra, {name}", task, "local_rate", length, device, value=rate)
        both = (times[f"{name}, forward"]["value"] for name in ("zebra, Self-Extend", "torch, flash, causal"))
        ratio = next(both) / next(both)
        yield _row("attention", "zebra, Self-Extend", task, "self_extend_time", length, device, value=ratio)


def _local_kernels(config: AttentionConfig, length: int) -> list[str]:
    """The kernels for a GPU that serve a local layer here; tiles elsewhere."""
    names = ("varlen", "flex") if read_device(config.device).startswith("cuda") else ("banded",)
    return [one for one in own_kernels(inputs(config, min(length, 512)), config.window) if one in names]


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _self_extend(window: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Near and far parts; the rotation of the far ones does not matter to the time."""
    return self_extend_attention(q, k, q, k, v, Mask(), window=window)[0]


def _check_attention(config: AttentionConfig, names: list[str]) -> None:
    """Check each kernel, gradients too, and Self-Extend with one rotation for both parts, against the formula.

    Raises:
        ZebraError: one differs by more than rounding.
    """
    tensors = inputs(config, config.window + 129)

    def computed(name: str) -> list[Tensor]:
        return forward_backward(partial(attend_with, name, config.window), tensors)

    expected, (q, k, v, _) = computed("reference"), tensors
    errors = {name: relative_error(computed(name), expected) for name in names}
    errors["Self-Extend"] = relative_error([_self_extend(config.window, q, k, v)], [_flash(q, k, v)])
    tolerance = TOLERANCE[config.dtype]
    if wrong := {name: error for name, error in errors.items() if not error <= tolerance}:
        raise ZebraError(f"off by more than {tolerance:.0e}: {wrong}. Nothing was measured.")


def decode(sizes: Sizes, device: str) -> Iterator[Result]:
    """A token of a striped model after its cache, beside the bytes that it must read."""
    config = replace(sizes.decode, device=device)
    (spread,) = dict(_milliseconds({"": _checked(generation.benchmark(config), config.dtype)}, sizes.repeats)).values()
    spread = {name: value if name == "n" else value / generation.STEPS for name, value in spread.items()}
    bandwidth = measure_ceilings(device, repeats=3, dtypes=(config.dtype,), attention=False).bandwidth
    run = plan_run(config, Stripes.parse(config.stripes), "decode")
    least = 1e3 * sum(bytes_moved(run).values()) / bandwidth
    yield from _beside("decode", config, device, spread, least, "decode_over_bytes")


def step(sizes: Sizes, device: str) -> Iterator[Result]:
    """A training step of a striped model, beside the plan under ceilings measured here."""
    config = replace(sizes.step, device=device)
    call = _checked(train_step.benchmark(config), config.dtype)
    (spread,) = dict(_milliseconds({"": call}, min(3, sizes.repeats))).values()
    seconds = measure_ceilings(device, repeats=3).seconds(plan_run(config, Stripes.parse(config.stripes), "train"))
    yield from _beside("step", config, device, spread, 1e3 * sum(seconds.values()), "step_over_plan")


def _checked(benchmark: Benchmark, dtype: str) -> Call:
    """The call of our own variant, which is compared with eager attention first."""
    own = benchmark.variants[0]
    gate([own], dtype)
    return own.workloads[0].prepare()


def _beside(
    run: str, config: StripedConfig, device: str, spread: dict[str, Any], least: float, ratio: str
) -> Iterator[Result]:
    task = f"bench {run}: {config.layers} layers of {config.heads} heads, {config.stripes}, {config.dtype}"
    yield _row(run, "zebra", task, "milliseconds", config.length, device, **spread)
    yield _row(run, "zebra", task, "planned_milliseconds", config.length, device, value=least)
    yield _row(run, "zebra", task, ratio, config.length, device, value=spread["value"] / least)


PARTS: dict[str, Callable[[Sizes, str], Iterator[Result]]] = {"attention": attention, "decode": decode, "step": step}


def _milliseconds(calls: Calls, repeats: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The median of each, with the least and the most."""
    for name, seconds in paired_seconds(calls, repeats).items():
        low, value, high = (1e3 * of(seconds) for of in (min, statistics.median, max))
        yield name, {"value": value, "low": low, "high": high, "n": repeats}


def _row(run: str, model: str, task: str, metric: str, length: int, device: str, **numbers: Any) -> Result:
    return Result(
        run=run, model=model, layout="", task=task, metric=metric, length=length, seed=0, device=device_name(device),
        **numbers,
    )  # fmt: skip


def run_tests() -> None:
    """The tests of the kernels on a GPU; a failure is told, and what follows still runs."""
    if find_spec("pytest") is None:
        print("tests, left out: pytest is not installed", file=sys.stderr)
        return
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "gpu", str(ROOT / "tests" / "test_kernels_on_gpu.py")]
    print(f"tests ended with code {subprocess.run([*command, '-p', 'no:cacheprovider'], cwd=ROOT).returncode}")


def line(one: Result) -> str:
    """A result for the terminal, with its verdict where it has a goal."""
    text = f"{one.run}  {one.length:,} tokens  {one.model}: {one.metric} {one.value:,.3f}"
    if one.metric in GOALS and one.device != device_name("cpu"):
        says, bound, more = GOALS[one.metric]
        met = one.value >= bound if more else one.value <= bound
        text += f"   {'met' if met else 'MISSED'}: {says}, {'at least' if more else 'at most'} {bound:.2f}"
    return text


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}, and tests; all of them without")
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    device = read_device(options.device)
    kind = "cuda" if device.startswith("cuda") else "cpu"
    if unknown := set(options.parts) - {*PARTS, "tests"}:
        raise ZebraError(f"parts are tests, {', '.join(PARTS)}; got {', '.join(sorted(unknown))}.")
    start = time.monotonic()
    if "tests" in (options.parts or ["tests"]):
        run_tests()
    for name, part in PARTS.items():
        if name in (options.parts or PARTS):
            results = list(part(SIZES[kind], device))
            replace_run(options.out, name, results, PARTS)
            print(*map(line, results), sep="\n", flush=True)
            print(f"{name}: {time.monotonic() - start:,.0f} s so far", file=sys.stderr)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ZebraError as error:
        sys.exit(f"gpu: {error}")
