"""`python tests/faults/table.py CASES`: the table of docs/reliability.md, from the lines that `make faults` wrote."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

KINDS = {
    "kill": "kill -9",
    "term": "SIGTERM",
    "torn": "half a write, then kill -9",
    "full": "disk full from then on",
    "broken": "disk broken from then on",
    "readonly": "read-only from then on",
    "clock": "clock back by a day",
}


def table(file: Path) -> str:
    """For each command and kind of fault, the cases that survived and those that were tried."""
    cases = [json.loads(line) for line in file.read_text().splitlines()]
    cases = [case for case in cases if case["hit"]]  # behind the last write a full disk is none
    tried = Counter((case["command"], case["kind"]) for case in cases)
    survived = Counter((case["command"], case["kind"]) for case in cases if not case["faults"])
    commands = sorted({case["command"] for case in cases})
    lines = ["| | " + " | ".join(KINDS.values()) + " |", "|---|" + "---:|" * len(KINDS)]
    for command in (*commands, "all"):
        cells = []
        for kind in KINDS:
            names = commands if command == "all" else [command]
            good, all_ = (sum(counts[name, kind] for name in names) for counts in (survived, tried))
            cells.append(f"{good} of {all_}" if all_ else "")
        lines.append(f"| {command} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
