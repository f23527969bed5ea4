"""benchmarks/gpu.py at toy sizes on a CPU, where the packages of a bare machine are missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from zebra.results import read_results

ROOT = Path(__file__).parent.parent
BARE = """
import sys

sys.modules.update(dict.fromkeys(("trl", "datasets", "peft", "matplotlib", "jinja2", "typer", "fastapi", "pytest")))
sys.path[:0] = ["src", "benchmarks"]
import gpu
gpu.main(sys.argv[1:])
"""


@pytest.mark.full
def test_make_gpu_runs_through_on_a_cpu_with_torch_and_transformers_alone(tmp_path: Path) -> None:
    out = tmp_path / "gpu.jsonl"
    for parts in (["attention"], ["attention", "decode", "step"]):  # a second run replaces the rows of the first
        command = [sys.executable, "-c", BARE, *parts, "--device", "cpu", "--out", str(out)]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=600)
    results = read_results(out)
    metrics = [(one.run, one.length, one.metric) for one in results if one.metric.startswith(("local", "self", "step"))]
    assert metrics == [
        ("attention", 300, "local_rate"),
        ("attention", 300, "self_extend_time"),
        ("attention", 600, "local_rate"),
        ("attention", 600, "self_extend_time"),
        ("step", 300, "step_over_plan"),
    ]
    assert all(one.value > 0 for one in results)
