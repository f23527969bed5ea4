"""Benchmarks on a page: a line for each variant and workload, what was predicted beside what was measured."""

from __future__ import annotations

from zebra.report.page import Cell, Section, Table
from zebra.report.pivot import Results, Show, interval_cell, split, table, value_cell
from zebra.report.series import FULL, number, percent
from zebra.results import Result

CEILINGS = "bench ceilings"
"""The task of the device's own limits."""
_TIME = "milliseconds"
HOW = (
    "Times are medians over turns, which the variants took one after another in one process, with the least and the "
    "most beside them. The ratio is to the first line of the same workload. The planned time is the roofline estimate "
    "under the ceilings measured on this machine. Extra memory is the peak of a fresh process beyond inputs and "
    "outputs; that of a whole process includes libraries, weights and cache. Of the peak: the share of the matrix "
    "product rate that was computed, and of that what the mask asks for."
)
_WORKLOADS = {
    "_forward_backward": "forward + backward",
    "_prefill_attention": "prefill, attention alone",
    "_decode_attention": "decode, attention alone",
    "_decode": "decode",
    "_chunks": "prefill in chunks",
}


def benches(results: list[Result]) -> Section:
    """A table for each task and length, and one of ceilings."""
    several = len({one.run for one in results}) > 1
    groups = split(results, lambda one: (one.task == CEILINGS, one.run, one.task, one.length))
    tables = [_table(here, several=several) for (is_ceiling, *_), here in groups.items() if not is_ceiling]
    ceilings = [one for one in results if one.task == CEILINGS]
    if ceilings:
        body = [[Cell(one.model, one.run if several else ""), Cell(_rate(one), results=[one])] for one in ceilings]
        tables.append(Table(f"ceilings of {ceilings[0].device}", [Cell(""), Cell("measured")], body))
    return Section("Measured speed", [HOW, *tables] if results else [])


def _mebibytes(results: Results) -> Cell:
    return value_cell(results, lambda value: number(value / 2**20))


def _share(results: Results) -> Cell:
    return value_cell(results, percent)


_COLUMNS: dict[str, tuple[Cell, Show]] = {
    _TIME: (Cell("milliseconds", "least–most"), interval_cell),
    "planned_milliseconds": (Cell("planned", "ms"), value_cell),
    "extra_bytes": (Cell("extra", "MiB"), _mebibytes),
    "peak_bytes": (Cell("whole process", "MiB"), _mebibytes),
    "share_of_peak": (Cell("of the peak", "computed"), _share),
    "useful_share_of_peak": (Cell("of the peak", "asked for"), _share),
    "tokens_per_second": (Cell("tokens", "per second"), value_cell),
}
"""The columns by the start of a metric; the rest of a metric's name is the workload."""


def _split_metric(result: Result) -> tuple[str, str]:
    """A metric's column and its workload."""
    column = next((column for column in _COLUMNS if result.metric.startswith(column)), "")
    return column, result.metric.removeprefix(column)


def _table(results: list[Result], *, several: bool) -> Table:
    by_metric = split(results, _split_metric)

    def at(here: Results, column: str) -> list[Result]:
        return [one for one in here if _split_metric(one)[0] == column]

    def ratio(here: Results) -> Cell:
        """To the first line of the same workload."""
        both = [by_metric[_split_metric(one)][0] for one in at(here, _TIME)] + at(here, _TIME)
        if not both or not both[0].value:
            return Cell("–")
        return Cell(f"{both[1].value / both[0].value:.2f}", results=both)

    lines = [
        ([Cell(model, " ".join(filter(None, (layout, _WORKLOADS.get(workload, workload)))))], here)
        for (model, layout, workload), here in split(
            results, lambda one: (one.model, one.layout, _split_metric(one)[1])
        ).items()
        if at(here, _TIME) or at(here, "peak_bytes")
    ]
    columns: list[tuple[Cell, Show]] = []
    for column, (head, show) in _COLUMNS.items():
        if at(results, column):
            columns.append((head, lambda here, column=column, show=show: show(at(here, column))))  # type: ignore[misc]
            columns += [(Cell("times", "the first"), ratio)] if column == _TIME else []
    length = "" if results[0].length is None else f", {results[0].length:,} tokens"
    title = (f"{results[0].run}: " if several else "") + results[0].task.removeprefix("bench ") + length
    return table(title, [Cell("variant", f"{FULL} or stripes")], lines, columns)


def _rate(result: Result) -> str:
    size, unit = {
        "flops_per_second": (1e9, "GFLOP/s"),
        "bytes_per_second": (1e9, "GB/s"),
        "bytes": (2**30, "GiB"),
    }.get(result.metric, (1, result.metric))
    return f"{number(result.value / size)} {unit}"
