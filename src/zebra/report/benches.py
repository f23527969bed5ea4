"""Benchmarks on a page: a line for each variant and work, what was predicted beside what was measured."""

from __future__ import annotations

from zebra.report.page import Cell, Section, Table
from zebra.report.pivot import Column, Results, pivot_table, split, value_cell
from zebra.report.series import FULL, number, percent
from zebra.results import Result

CEILINGS = "bench ceilings"
"""The task of the device's own limits."""
_TIME = "milliseconds"
_PEAK = "peak_bytes"
_WORKS = {
    "": "",
    "_forward_backward": "forward + backward",
    "_prefill_attention": "prefill, attention alone",
    "_decode_attention": "decode, attention alone",
    "_decode": "decode",
    "_chunks": "prefill in chunks",
}
HOW = (
    "Times are medians over turns, which the variants took one after another in one process, with the least and the "
    "most beside them. The ratio is to the first line of the same workload. The planned time is the roofline estimate "
    "under the ceilings measured on this machine. Extra memory is the peak of a fresh process beyond inputs and "
    "outputs; that of a whole process includes libraries, weights and cache. Of the peak: the share of the matrix "
    "product rate that was computed, and of that what the mask asks for."
)
"""How its tables are to be read."""
Variant = tuple[str, str, str]
"""Model, layout and work."""


def benches(results: list[Result]) -> Section:
    """Measured time and memory."""
    return Section("Measured speed", [HOW, *bench_tables(results)] if results else [])


def bench_tables(results: list[Result]) -> list[Table]:
    """A table for each task and length, and one of ceilings."""
    several = len({one.run for one in results}) > 1
    ceilings = [one for one in results if one.task == CEILINGS]
    timed = split((one for one in results if one.task != CEILINGS), lambda one: (one.run, one.task, one.length))
    tables = [_table(here, several=several) for here in timed.values()]
    if ceilings:
        body = [[Cell(one.model, one.run if several else ""), Cell(_rate(one), results=[one])] for one in ceilings]
        tables.append(Table(f"ceilings of {ceilings[0].device}", [Cell(""), Cell("measured")], body))
    return tables


def _table(results: list[Result], *, several: bool) -> Table:
    places: dict[tuple[Variant, str], Results] = {}
    lines: dict[Variant, list[Cell]] = {}
    first: dict[str, Result] = {}
    for one in results:
        metric = next((metric for metric in _COLUMNS if one.metric.startswith(metric)), "")
        work = one.metric.removeprefix(metric)
        line = one.model, one.layout, work
        places[line, metric] = [one]
        if metric == _TIME:
            places[line, "ratio"] = [first.setdefault(work, one), one]
        if metric in (_TIME, _PEAK):
            lines[line] = [Cell(one.model, " ".join(filter(None, (one.layout, _WORKS.get(work, work)))))]
    columns = {key: column for key, column in _COLUMNS.items() if any(key == metric for _, metric in places)}
    length = "" if results[0].length is None else f", {results[0].length:,} tokens"
    title = (f"{results[0].run}: " if several else "") + results[0].task.removeprefix("bench ") + length
    return pivot_table(title, [Cell("variant", f"{FULL} or stripes")], lines, columns, places)


def _ratio(results: Results) -> Cell:
    if not results or not results[0].value:
        return Cell("–")
    return Cell(f"{results[1].value / results[0].value:.2f}", results=results)


def _mebibytes(results: Results) -> Cell:
    return value_cell(results, lambda value: number(value / 2**20))


def _percent(results: Results) -> Cell:
    return value_cell(results, percent)


_COLUMNS = {
    _TIME: Column(Cell("milliseconds", "least–most")),
    "ratio": Column(Cell("times", "the first"), _ratio),
    "planned_milliseconds": Column(Cell("planned", "ms"), value_cell),
    "extra_bytes": Column(Cell("extra", "MiB"), _mebibytes),
    _PEAK: Column(Cell("whole process", "MiB"), _mebibytes),
    "share_of_peak": Column(Cell("of the peak", "computed"), _percent),
    "useful_share_of_peak": Column(Cell("of the peak", "asked for"), _percent),
    "tokens_per_second": Column(Cell("tokens", "per second"), value_cell),
}
"""The columns by the start of a metric; the rest of a metric's name is the work."""


def _rate(result: Result) -> str:
    size, unit = {
        "flops_per_second": (1e9, "GFLOP/s"),
        "bytes_per_second": (1e9, "GB/s"),
        "bytes": (2**30, "GiB"),
    }.get(result.metric, (1, result.metric))
    return f"{number(result.value / size)} {unit}"
