"""The table of faults is the one that the results of `make faults` give."""

from __future__ import annotations

from conftest import ROOT

from faults.table import table


def test_the_page_has_the_table_of_the_results() -> None:
    counted = table(ROOT / "benchmarks" / "faults.jsonl")
    assert counted in (ROOT / "docs" / "reliability.md").read_text()
