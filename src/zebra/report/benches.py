"""Benchmarks on a page: a line for each variant and workload, what was predicted beside what was measured."""

from __future__ import annotations

from functools import partial

from zebra.report.page import Cell, Section, Table
from zebra.report.pivot import Results, Show, interval_cell, split, table
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


_RATES = {"flops_per_second": (1e9, "GFLOP/s"), "bytes_per_second": (1e9, "GB/s"), "bytes": (2**30, "GiB")}
_MEBIBYTES = partial(interval_cell, text=lambda value: number(value / 2**20))
_SHARE = partial(interval_cell, text=percent)
_COLUMNS: dict[str, tuple[Cell, Show]] = {
    _TIME: (Cell("milliseconds", "least–most"), interval_cell),
    "planned_milliseconds": (Cell("planned", "ms"), interval_cell),
    "extra_bytes": (Cell("extra", "MiB"), _MEBIBYTES),
    "peak_bytes": (Cell("whole process", "MiB"), _MEBIBYTES),
    "share_of_peak": (Cell("of the peak", "computed"), _SHARE),
    "useful_share_of_peak": (Cell("of the peak", "asked for"), _SHARE),
    "tokens_per_second": (Cell("tokens", "per second"), interval_cell),
}
"""The columns by the start of a metric; the rest of a metric's name is the workload."""


def benches(results: list[Result]) -> Section:
    """A table for each task and length of each run, and one of the ceilings of all."""
    several = len({one.run for one in results}) > 1
    ceilings = [one for one in results if one.task == CEILINGS]
    timed = split((one for one in results if one.task != CEILINGS), lambda one: (one.run, one.task, one.length))
    tables = [_table(here, f"{run}: " if several else "") for (run, *_), here in timed.items()]
    if ceilings:
        body = []
        for one in ceilings:
            size, unit = _RATES.get(one.metric, (1, one.metric))
            rate = Cell(f"{number(one.value / size)} {unit}", results=[one])
            body.append([Cell(one.model, one.run if several else ""), rate])
        tables.append(Table(f"ceilings of {ceilings[0].device}", [Cell(""), Cell("measured")], body))
    return Section("Measured speed", [HOW, *tables] if results else [])


def _split_metric(result: Result) -> tuple[str, str]:
    """A metric's column and its workload."""
    column = next((column for column in _COLUMNS if result.metric.startswith(column)), "")
    return column, result.metric.removeprefix(column)


def _table(results: list[Result], run: str) -> Table:
    by_metric = split(results, _split_metric)
    columns = split(results, lambda one: _split_metric(one)[0])

    def at(column: str, here: Results) -> list[Result]:
        return [one for one in here if _split_metric(one)[0] == column]

    def ratio(here: Results) -> Cell:
        """To the first line of the same workload."""
        both = [one for time in at(_TIME, here) for one in (by_metric[_split_metric(time)][0], time)]
        text = f"{both[1].value / both[0].value:.2f}" if both and both[0].value else "–"
        return Cell(text, results=both)

    lines = []
    variants = split(results, lambda one: (one.model, one.layout, _split_metric(one)[1]))
    for (model, layout, workload), here in variants.items():
        if at(_TIME, here) or at("peak_bytes", here):
            lines.append(([Cell(model, f"{layout} {_WORKLOADS.get(workload, workload)}".strip())], here))
    shown: list[tuple[Cell, Show]] = []
    for column, (head, show) in _COLUMNS.items():
        if column in columns:
            shown.append((head, lambda here, column=column, show=show: show(at(column, here))))  # type: ignore[misc]
        if column == _TIME and column in columns:
            shown.append((Cell("times", "the first"), ratio))
    length = "" if results[0].length is None else f", {results[0].length:,} tokens"
    title = run + results[0].task.removeprefix("bench ") + length
    return table(title, [Cell("variant", f"{FULL} or stripes")], lines, shown)
