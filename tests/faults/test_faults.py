"""Commands that are killed, torn apart, or out of disk lose nothing that was saved, and load nothing half-written.

`make test` breaks two commands a few times. `make faults` breaks ten of them at some 300 moments, and appends a line
for each to the file FAULTS_RESULTS, from which `table.py` makes the table of docs/reliability.md.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from faults.commands import commands, write_inputs
from faults.harness import Command, Outcome, Server, compiled_injector, judged

CODES = {
    "kill": (-signal.SIGKILL,),
    "torn": (-signal.SIGKILL,),
    "term": (128 + signal.SIGTERM,),
    "full": (2,),
    "broken": (2,),
    "readonly": (2,),
    "clock": (0,),
}
"""The exit codes that each kind of fault may have."""
SHARES = {"kill": 0.6, "term": 0.4, "torn": 0.15, "full": 0.25, "broken": 0.05, "readonly": 0.05, "clock": 0.05}
"""Cases of each kind, as a share of a command's weight; the weights of all are 200, those of kill and term are one."""


class Bench(NamedTuple):
    server: Server
    folder: Path
    known: dict[str, Command]

    def command(self, name: str) -> Command:
        """A command whose undisturbed runs are known."""
        if name not in self.known:
            command = commands()[name]
            command.learn(self.server, self.folder, 1 + (name == "compare"))  # which fills a time
            self.known[name] = command
        return self.known[name]

    def break_at(self, command: Command, kind: str, moment: float) -> tuple[Outcome, list[str]]:
        """Break a command at a moment from 0 to 1, run it once more, and say what is wrong."""
        case = self.folder / f"{command.name}-{kind}-{moment:.4f}"
        case.mkdir()
        broken = self.server.run(command.arguments, case, kind, 1 + int(moment * command.changes))
        of_a_cell = (2,) * (command.name == "study")  # whose process is another than the command's
        faults = judged(command, self.server, case, broken, CODES[kind] + of_a_cell)
        if not faults:
            shutil.rmtree(case)
        _record(command=command.name, kind=kind, moment=moment, hit=broken.hit, code=broken.code, faults=faults)
        return broken, faults


def _record(**case: object) -> None:
    if file := os.environ.get("FAULTS_RESULTS"):
        with Path(file).open("a") as lines:
            lines.write(json.dumps(case) + "\n")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("faults")
    library = compiled_injector(folder)
    if library is None:
        pytest.skip("no C compiler: cc, gcc or clang")
    write_inputs(folder / "inputs")
    server = Server(library, folder)
    yield Bench(server, folder, {})
    server.close()


def moments() -> list[Any]:
    """Command, kind and moment of each case, in an order that is fixed and mixed; a command's are one process's."""
    draw = random.Random(22)
    cases = [
        (command.name, kind, draw.random())
        for command in commands().values()
        for kind, share in SHARES.items()
        for _ in range(max(1, round(command.weight * share)))
    ]
    draw.shuffle(cases)
    cases.sort(key=lambda case: case[1] not in ("kill", "term"))
    return [pytest.param(*case, marks=pytest.mark.xdist_group(case[0])) for case in cases]


@pytest.mark.faults
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("name", "kind", "moment"), moments())
def test_a_broken_command_loses_nothing(name: str, kind: str, moment: float, bench: Bench) -> None:
    broken, faults = bench.break_at(bench.command(name), kind, moment)
    assert not faults, f"{broken.hit}\n{broken.stderr[-2000:]}"


@pytest.mark.full
def test_broken_commands_lose_nothing(bench: Bench) -> None:
    """The short form, in one test and so in one process."""
    for name, kind, moment in (("convert", "kill", 0.6), ("adapt", "torn", 0.4), ("adapt", "full", 0.5)):
        broken, faults = bench.break_at(bench.command(name), kind, moment)
        assert broken.hit
        assert not faults, f"{broken.hit}\n{broken.stderr[-2000:]}"
