"""Rows of local attention on this machine, to benchmarks/results/: `make bench`."""

from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from zebra import records
from zebra.bench import local_attention

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    table = Table("what", "length", "variant", "median ms", "min", "max", "times banded")
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for length in (1024, 4096, 16384):
            made = local_attention(length=length, window=512, heads=4, dtype=dtype)
            rows += made
            for row in made:
                numbers = [f"{x:,.1f}" for x in (row.value, row.low, row.high)]
                table.add_row(row.task, f"{length:,}", row.model, *numbers, f"{row.value / made[0].value:.1f}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    records.write(RESULTS / f"attention-{device}.jsonl", rows)
    Console().print(table)


if __name__ == "__main__":
    main()
