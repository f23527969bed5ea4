"""The goals for zebra's speed and memory, measured on this machine: `make bench`.

python benchmarks/speed.py                            everything; an hour on two cores
python benchmarks/speed.py decode loss                only these parts; their results replace the earlier ones
python benchmarks/speed.py attention length=4096      one part with other sizes, shown on the terminal alone
python benchmarks/speed.py --page                     measure nothing; write the page again

Results go to benchmarks/results/cpu.jsonl (cuda.jsonl on a GPU); the page is docs/results/speed.md, which begins with
what benchmarks/speed_smollm2.py measured.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from speed_page import write_page
from zebra.cli import show
from zebra.errors import ZebraError
from zebra.measure import ceiling_results, measure_ceilings
from zebra.model.load import read_device
from zebra.results import Result
from zebra_bench.configs import (
    AttentionConfig,
    BenchmarkConfig,
    DecodeConfig,
    LossConfig,
    SelfExtendConfig,
    TrainStepConfig,
)
from zebra_bench.published import replace_run
from zebra_bench.runner import run_benchmark

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE, IMAGES = ROOT / "docs" / "results" / "speed.md", ROOT / "docs" / "images"

KIND = "cuda" if torch.cuda.is_available() else "cpu"
_BOTH = ("float32", "bfloat16")
PARTS: dict[str, tuple[BenchmarkConfig, ...]] = {
    "ceilings": (),
    "attention": tuple(AttentionConfig(dtype=dtype) for dtype in _BOTH),
    "switch": tuple(
        AttentionConfig(length=4096, memory=False, matmul_precision=precision) for precision in ("highest", "medium")
    ),
    "train-step": tuple(TrainStepConfig(dtype=dtype) for dtype in _BOTH),
    "decode": (DecodeConfig(),),
    "self-extend": (
        SelfExtendConfig(workload="attention", memory=False),
        SelfExtendConfig(workload="decode"),
        SelfExtendConfig(workload="chunks", layers=12, heads=12, intermediate_size=2048),
    ),
    "authors": (SelfExtendConfig(workload="authors", heads=2, memory=False),),  # more heads are only slower
    "loss": (LossConfig(),),
    "plan": (
        TrainStepConfig(length=2048, layers=6, heads=4, intermediate_size=704, memory=False),
        TrainStepConfig(length=2048, memory=False),
        TrainStepConfig(length=2048, layers=10, heads=10, intermediate_size=1728, memory=False),
    ),
}
"""What is measured; the results of a part have its name as their run."""

# Measuring


def measured(configs: Sequence[BenchmarkConfig], part: str) -> list[Result]:
    """The results of some configs, as those of a part."""
    results = [] if configs else ceiling_results(measure_ceilings(read_device(None)), run=part)
    for config in configs:
        own, left_out = run_benchmark(config)
        results += [replace(result, run=part) for result in own]
        for line in left_out:
            print(f"{part}, left out: {line}", file=sys.stderr)
    return results


def with_settings(config: BenchmarkConfig, settings: Sequence[str]) -> BenchmarkConfig:
    """The config with some fields set, each NAME=VALUE.

    Raises:
        ZebraError: no such field, or a value of another type.
    """
    values: dict[str, Any] = {}
    for name, _, text in (setting.partition("=") for setting in settings):
        if name not in [one.name for one in fields(config)]:
            raise ZebraError(f"the sizes are {', '.join(one.name for one in fields(config))}; got {name!r}.")
        default = getattr(config, name)
        try:
            values[name] = int(text) if type(default) is int else text == "true" if type(default) is bool else text
        except ValueError:
            raise ZebraError(f"{name} is a whole number; got {text!r}.") from None
    return replace(config, **values)


def main(arguments: list[str]) -> None:
    settings = [one for one in arguments if "=" in one]
    parts = [one for one in arguments if "=" not in one and one != "--page"]
    if unknown := [one for one in parts if one not in PARTS]:
        raise ZebraError(f"parts are {', '.join(PARTS)}, or --page alone; got {', '.join(unknown)}.")
    if settings:
        if len(parts) != 1 or not PARTS[parts[0]]:
            raise ZebraError(f"settings belong to one part that has sizes; got {', '.join(parts) or 'none'}.")
        configs = [with_settings(config, settings) for config in PARTS[parts[0]]]
        show.results(measured(configs, parts[0]), as_json=False)
        return
    parts = [] if "--page" in arguments else parts or [*PARTS]
    if len(parts) > 1:  # each in a process of its own: what one leaves in the heap changes the next one's times
        for part in parts:
            if subprocess.run([sys.executable, __file__, part]).returncode:
                raise ZebraError(f"{part} ended early. The results of the parts before it are written.")
        return
    for part in parts:
        print(part, file=sys.stderr)
        replace_run(RESULTS / f"{KIND}.jsonl", part, measured(PARTS[part], part), PARTS)
    write_page(RESULTS, PAGE, IMAGES)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ZebraError as error:
        sys.exit(f"speed: {error}")
