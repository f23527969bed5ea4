"""Two processes of a training, one of which is killed, or which the scheduler ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from conftest import adapt_recipe, losses

from zebra.results import read_results
from zebra.train.adapt import adapt

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]
RECIPE = {"evaluate": None, "train__save_steps": 1}


class Ended(NamedTuple):
    code: int
    stderr: str
    seconds: float


def launcher(run: Path) -> list[str]:
    recipe = adapt_recipe(run, parallel={"sequence": 2}, **RECIPE)
    file = run.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    options = ["--standalone", "--nproc-per-node=2", "-m", "zebra", "adapt", str(file)]
    return [sys.executable, "-m", "torch.distributed.run", *options]


def ranks(process: int) -> dict[int, int]:
    """The process of each rank that a launcher started."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    environments = {int(pid): Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in children}
    return {
        int(entry[5:]): pid
        for pid, environment in environments.items()
        for entry in environment
        if entry.startswith(b"RANK=")
    }


def ended_by(number: int, rank: int | None, run: Path) -> Ended:
    """Start a training, send a signal to a rank or to the launcher once a step is saved, and wait."""
    log = run.with_suffix(".log")
    with log.open("w") as stderr:
        process = subprocess.Popen(
            launcher(run), stdout=stderr, stderr=stderr, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    while not any(run.glob("checkpoints/*/COMPLETE")):
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    os.kill(process.pid if rank is None else ranks(process.pid)[rank], number)
    start = time.monotonic()
    code = process.wait(600)
    return Ended(code, log.read_text(), time.monotonic() - start)


def resumes(run: Path, tmp_path: Path) -> None:
    saved = {path.parent.name for path in run.glob("checkpoints/*/COMPLETE")}
    done = subprocess.run(launcher(run), capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "step 1/" not in done.stderr
    assert saved
    assert losses(read_results(run / "results.jsonl")) == pytest.approx(
        losses(adapt(adapt_recipe(tmp_path / "one", **RECIPE))), rel=1e-5
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_the_others_end_when_one_is_killed(rank: int, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = ended_by(signal.SIGKILL, rank, run)
    assert ended.code
    assert ended.seconds < 60
    assert f"rank      : {rank} " in ended.stderr
    assert "another process of this training ended" in ended.stderr
    assert "zebra/train" not in ended.stderr  # a traceback of ours
    resumes(run, tmp_path)


def test_a_scheduler_ends_all(tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = ended_by(signal.SIGTERM, None, run)
    assert ended.code
    assert "which is saved; run the same command again to continue" in ended.stderr
    resumes(run, tmp_path)
