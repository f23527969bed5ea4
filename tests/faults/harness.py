"""Commands of zebra under faults: for each case a folder, a run that is broken, one that is not, and what they left."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file

from zebra.train.saves import is_complete

HERE = Path(__file__).resolve().parent
_VARYING = re.compile(r"second|memory|_bytes")
"""Metrics that differ from run to run."""
JOURNALS = ("losses.jsonl", "measurements.jsonl")
"""Written line by line: what a kill left of the last line is not read."""


def compiled_injector(folder: Path) -> Path | None:
    """The library that breaks processes; None without a C compiler."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        return None
    library = folder / "injection.so"
    source = HERE / "injection.c"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


class Outcome(NamedTuple):
    """What a command returned, wrote and took."""

    code: int
    stdout: str
    stderr: str
    cpu_seconds: float
    megabytes: float
    changes: int
    hit: str


class Server:
    """The warm process."""

    def __init__(self, library: Path, work: Path):
        self.work, self._number = work, 0
        environment = os.environ | {
            "LD_PRELOAD": str(library),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "COLUMNS": "200",
        }
        command = [sys.executable, "-W", "ignore", str(HERE / "server.py")]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(
        self,
        arguments: tuple[str, ...],
        cwd: Path,
        kind: str = "",
        at: int = 0,
        *,
        folder: Path | None = None,
        seconds: float = 600,
        cpu_seconds: int = 300,
        megabytes: int = 0,
    ) -> Outcome:
        """Run a command, broken at the n-th change below a folder (`cwd` where None).

        Args:
            seconds, cpu_seconds, megabytes: after which it is killed, and more than which it cannot allocate.
        """
        counter = self.work / "counter"
        counter.unlink(missing_ok=True)
        streams = {name: str(self.work / name) for name in ("stdout", "stderr")}
        environment = {
            "FAULT_FOLDER": f"{folder or cwd}/",
            "FAULT_COUNTER": str(counter),
            "FAULT_KIND": kind,
            "FAULT_AT": str(at),
            "XDG_CACHE_HOME": str(cwd / "cache"),
            "MPLCONFIGDIR": str(self.work / "matplotlib"),
        }
        self._number += 1
        request = streams | {
            "number": self._number,
            "arguments": arguments,
            "cwd": str(cwd),
            "environment": environment,
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "megabytes": megabytes,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        reply: dict[str, Any] = {}
        while reply.pop("number", 0) != self._number:  # a test that was stopped left its reply
            reply = json.loads(self._process.stdout.readline())
        texts = {name: Path(path).read_text(errors="replace") for name, path in streams.items()}
        return Outcome(**texts, **reply, **_counted(counter))

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def _counted(counter: Path) -> dict[str, Any]:
    with counter.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as shared:
        count, _ = struct.unpack("ll", shared[:16])
        return {"changes": count, "hit": shared[16:].split(b"\0")[0].decode(errors="replace")}


@dataclass
class Command:
    """A command on tiny inputs.

    Attributes:
        arguments: of `zebra`; paths are relative to the case's folder, beside which `inputs` lies.
        weight: its share of the kills.
        done_is_refused: a second start is rejected where the first had finished.
    """

    name: str
    arguments: tuple[str, ...]
    weight: int
    done_is_refused: bool = False
    expected: dict[str, str] = field(default_factory=dict)
    unstable: set[str] = field(default_factory=set)
    changes: int = 0

    def learn(self, server: Server, folder: Path, times: int = 2) -> None:
        """What undisturbed runs leave, and how many changes they make; what differs between two is not compared."""
        for i in range(times):
            case = folder / f"{self.name}-undisturbed-{i}"
            case.mkdir(parents=True)
            done = server.run(self.arguments, case)
            assert done.code == 0, done.stderr
            self.changes = done.changes
            left = artefacts(case)
            if self.expected:
                differing = self.expected.keys() ^ left.keys()
                assert all("#" in name for name in differing), differing
                self.unstable |= differing | {name for name, one in left.items() if one != self.expected.get(name)}
            self.expected = left
            shutil.rmtree(case)


def artefacts(case: Path) -> dict[str, str]:
    """Of all that a command left in its folder, a digest: of a file, of each line of JSON Lines, of each tensor.

    Pages and pictures only exist, for they hold times. Of the Trainer's checkpoints only whole ones count.
    """
    entries: dict[str, str] = {}
    for file in sorted(case.rglob("*")):
        name = str(file.relative_to(case))
        checkpoint = next((one for one in file.parents if one.name.startswith("checkpoint-")), None)
        if not file.is_file() or (checkpoint is not None and not is_complete(checkpoint)):
            continue
        if file.suffix == ".jsonl":
            entries[name] = ""
            entries |= {f"{name}#{i}": _stable(line) for i, line in enumerate(file.read_text().splitlines())}
        elif file.suffix == ".safetensors":
            entries[name] = _digest(
                *(tensor.numpy(force=True).tobytes() for _, tensor in sorted(load_file(file).items()))
            )
        elif file.suffix in (".html", ".svg", ".md", ".log") or checkpoint is not None:
            entries[name] = ""
        else:
            entries[name] = _digest(file.read_bytes())
    return entries


def _stable(line: str) -> str:
    """A line without what differs from run to run: times, and the state of the sources."""
    try:
        columns = json.loads(line)
    except ValueError:
        return line
    columns = {name: value for name, value in columns.items() if name not in ("versions", "commit", "seconds")}
    if _VARYING.search(columns.get("metric", "")):
        del columns["value"]
    return json.dumps(columns)


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def half_written(command: Command, case: Path) -> list[str]:
    """What stands under the name of something finished and is not what an undisturbed run leaves there."""
    wrong = []
    for name, digest in artefacts(case).items():
        hidden = any(part.startswith(".") and part.endswith(".partial") for part in Path(name).parts)
        if hidden or name in command.unstable or command.expected.get(name) == digest:
            continue
        file, _, line = name.partition("#")
        is_torn_end = Path(file).name in JOURNALS and line and not (case / file).read_text().endswith("\n")
        if not is_torn_end and not (line and f"{file}#0" in command.unstable):
            wrong.append(name)
    return wrong


def saved(case: Path) -> dict[str, tuple[int, int]]:
    """What was reported as saved and is not to be made again: whole checkpoints and models, by inode and time."""
    files = [*case.rglob("checkpoint-*/COMPLETE"), *case.rglob("model/config.json")]
    files = [file for file in files if file.parent.name == "model" or is_complete(file.parent)]
    return {str(file): (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


def judged(command: Command, server: Server, case: Path, broken: Outcome, codes: tuple[int, ...]) -> list[str]:
    """What is wrong after a fault, and after the same command once more: nothing, it is hoped."""
    faults = []
    if broken.hit and broken.code not in codes:
        faults.append(f"exit code {broken.code}")
    if broken.code == 2 and len(_lines_of_error(broken)) != 1:
        faults.append("no single line of an error")
    if "Traceback" in broken.stderr:
        faults.append("a traceback")
    faults += [f"half-written: {name}" for name in half_written(command, case)]
    before = saved(case)
    again = server.run(command.arguments, case)
    refused = again.code == 2 and command.done_is_refused and "exists already" in again.stderr
    if again.code and not refused:
        faults.append(f"the next run: {again.code} {again.stderr[-500:]}")
    after = saved(case)
    faults += [f"lost or made again: {name}" for name in before if after.get(name) != before[name]]
    left = artefacts(case)
    for name in sorted(left.keys() ^ command.expected.keys()):
        if name not in command.unstable and f"{name.partition('#')[0]}#0" not in command.unstable:
            faults.append(f"{'missing' if name in command.expected else 'left over'}: {name}")
    for name, digest in left.items():
        if name not in command.unstable and command.expected.get(name, digest) != digest:
            faults.append(f"differs: {name}")
    return faults


def _lines_of_error(outcome: Outcome) -> list[str]:
    return [line for line in outcome.stderr.splitlines() if line.startswith("zebra: ")]
