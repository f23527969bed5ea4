"""Benchmarks on a page: a row for each variant and workload, with the prediction beside the measurement."""

from __future__ import annotations

import itertools
from functools import partial

from zebra.report.page import Cell, Section, Table
from zebra.report.pivot import Results, Show, interval_cell, split, table
from zebra.report.series import number, percent
from zebra.results import Result

HOW = (
    "Times are medians over turns, which the variants took one after another in one process, with the least and the "
    "most beside them. The ratio is to the first line of the same workload. The planned time is the roofline estimate "
    "under the ceilings measured on this machine. Extra bytes are the peak of a fresh process beyond inputs and "
    "outputs; peak bytes, of a whole process, include libraries, weights and cache. Of the peak of matrix products: "
    "the share that was computed, and the useful share, what the mask asks for."
)
_UNITS = {
    "milliseconds": ("least–most", 1),
    "planned_milliseconds": ("", 1),
    "extra_bytes": ("MiB", 2**20),
    "peak_bytes": ("MiB", 2**20),
    "share_of_peak": ("", 1),
    "useful_share_of_peak": ("", 1),
    "tokens_per_second": ("", 1),
    "flops_per_second": ("GFLOP/s", 1e9),
    "bytes_per_second": ("GB/s", 1e9),
    "bytes": ("GiB", 2**30),
}
"""For each column, named by the prefix of its metrics, the note in its head and the divisor of its values.

The rest of a metric's name is the workload.
"""


def benches(results: list[Result]) -> Section:
    """A table for each task and length of a run; the task `bench ceilings` has the limits of the device."""
    tables = map(_table, split(results, lambda one: (one.run, one.task, one.length)).values())
    return Section("Measured speed", [HOW, *tables] if results else [])


def _column(result: Result) -> str:
    return next((column for column in _UNITS if result.metric.startswith(column)), result.metric)


def _show(here: Results, column: str) -> Cell:
    _, size = _UNITS.get(column, ("", 1))
    same = [one for one in here if _column(one) == column]
    return interval_cell(same, percent if "share" in column else lambda value: number(value / size))


def _table(results: list[Result]) -> Table:
    first, by_metric = results[0], split(results, lambda one: one.metric)

    def ratio(here: Results) -> Cell:
        """The ratio to the first row of the same workload."""
        both = [one for time in here if _column(time) == "milliseconds" for one in (by_metric[time.metric][0], time)]
        if not both or not both[0].value:
            return Cell("–")
        return Cell(f"{both[1].value / both[0].value:.2f}", results=both)

    def variant(one: Result) -> tuple[str, str]:
        workload = one.metric.removeprefix(_column(one)).replace("_", " ")
        return one.model, f"{one.layout}{workload}".strip()

    lines = [
        ([Cell(*names)], list(filter(None, once)))
        for names, here in split(results, variant).items()
        for once in itertools.zip_longest(*split(here, lambda one: one.metric).values())  # measured again: one more row
    ]
    columns: list[tuple[Cell, Show]] = []
    for column in split(results, _column):
        columns.append((Cell(column.replace("_", " "), _UNITS.get(column, ("",))[0]), partial(_show, column=column)))
        if column == "milliseconds":
            columns.append((Cell("times", "the first"), ratio))
    name = first.task.removeprefix("bench ") + ("" if first.length is None else f", {first.length:,} tokens")
    title = name if name.startswith(first.run) else f"{first.run}: {name}"
    return table(title, [Cell("variant")], lines, columns)
