"""Benchmark results as tables: a line for each variant and work, what was predicted beside what was measured."""

from __future__ import annotations

from collections.abc import Callable

from zebra.report.page import Cell, Section, Table
from zebra.report.series import FULL, interval, number, percent
from zebra.results import Result

CEILINGS = "bench ceilings"
"""The task of their rows."""
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
    "Times are medians of turns that the variants took one after another in one process, with the least and the most "
    "beside them; the ratio is to the first line of the same work. The plan's time is the roofline's, from the "
    "ceilings measured on this machine. Extra memory is the peak of a fresh process beyond inputs and outputs; that "
    "of a whole process has libraries, weights and cache in it. Of the "
    "peak: the share of the matrix product rate that was computed, and of it what the mask asks for."
)
"""How its tables are to be read."""


def benches(rows: list[Result]) -> Section:
    """Measured time and memory."""
    return Section("Measured speed", [HOW, *bench_tables(rows)] if rows else [])


def bench_tables(rows: list[Result]) -> list[Table]:
    """A table for each task and length, and one of ceilings."""
    several = len({row.run for row in rows}) > 1
    places = dict.fromkeys((row.run, row.task, row.length) for row in rows if row.task != CEILINGS)
    tables = [
        _table([row for row in rows if (row.run, row.task, row.length) == place], several=several) for place in places
    ]
    if found := [row for row in rows if row.task == CEILINGS]:
        body = [[Cell(row.model, row.run if several else ""), Cell(_rate(row), results=[row])] for row in found]
        tables.append(Table(f"ceilings of {found[0].device}", [Cell(""), Cell("measured")], body))
    return tables


def _table(rows: list[Result], *, several: bool) -> Table:
    found = {(row.model, row.layout, row.metric): row for row in rows}
    lines = [
        (row.model, row.layout, row.metric.removeprefix(metric))
        for row in rows
        for metric in (_TIME, _PEAK)
        if row.metric.startswith(metric)
    ]
    first: dict[str, Result] = {}
    for row in rows:
        if row.metric.startswith(_TIME):
            first.setdefault(row.metric.removeprefix(_TIME), row)

    def cell(line: tuple[str, str, str], metric: str, show: Callable[[Result], Cell]) -> Cell:
        model, layout, work = line
        row = found.get((model, layout, metric + work))
        return Cell("–") if row is None else show(row)

    columns: list[tuple[Cell, str, Callable[[Result], Cell]]] = [
        (Cell("milliseconds", "least–most"), _TIME, _time),
        (Cell("times", "the first"), _TIME, lambda row: _ratio(row, first[row.metric.removeprefix(_TIME)])),
        (Cell("planned", "ms"), "planned_milliseconds", lambda row: Cell(number(row.value), results=[row])),
        (Cell("extra", "MiB"), "extra_bytes", lambda row: Cell(number(row.value / 2**20), results=[row])),
        (Cell("whole process", "MiB"), _PEAK, lambda row: Cell(number(row.value / 2**20), results=[row])),
        (Cell("of the peak", "computed"), "share_of_peak", lambda row: Cell(percent(row.value), results=[row])),
        (Cell("of the peak", "asked for"), "useful_share_of_peak", lambda row: Cell(percent(row.value), results=[row])),
        (Cell("tokens", "per second"), "tokens_per_second", lambda row: Cell(number(row.value), results=[row])),
    ]
    columns = [column for column in columns if any(row.metric.startswith(column[1]) for row in rows)]
    body = []
    for model, layout, work in lines:
        name = Cell(model, " ".join(filter(None, (layout, _WORKS.get(work, work)))))
        body.append([name, *(cell((model, layout, work), metric, show) for _, metric, show in columns)])
    length = "" if rows[0].length is None else f", {rows[0].length:,} tokens"
    head = [Cell("variant", f"{FULL} or stripes"), *(head for head, _, _ in columns)]
    run = f"{rows[0].run}: " if several else ""
    return Table(run + rows[0].task.removeprefix("bench ") + length, head, body)


def _time(row: Result) -> Cell:
    bounds = interval(row)
    return Cell(number(row.value), "–".join(map(number, bounds)) if bounds else "", results=[row])


def _ratio(row: Result, first: Result) -> Cell:
    return Cell(f"{row.value / first.value:.2f}", results=[row, first]) if first.value else Cell("–")


def _rate(row: Result) -> str:
    size, unit = {
        "flops_per_second": (1e9, "GFLOP/s"),
        "bytes_per_second": (1e9, "GB/s"),
        "bytes": (2**30, "GiB"),
    }.get(row.metric, (1, row.metric))
    return f"{number(row.value / size)} {unit}"
