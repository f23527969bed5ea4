"""A plan as a tree for JSON and as tables for the terminal: dense, striped and Self-Extend side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from zebra.plan import fit
from zebra.plan.cost import Run, flops, pairs, self_extend_pairs, traffic, trained
from zebra.plan.decoder import FAMILIES
from zebra.plan.devices import MEASURED, Device
from zebra.plan.memory import cached_tokens, kv_bytes, memory
from zebra.stripes import GLOBAL, visible_pairs

LENGTHS = tuple(2**i for i in range(10, 21))
"""1K to 1M, what the picture shows."""


@dataclass(frozen=True)
class Table:
    """A table of strings: the head, then the body's lines."""

    head: tuple[str, ...]
    body: list[tuple[str, ...]]


def variants(run: Run) -> dict[str, Run]:
    """The run's layout beside what it is compared with: dense, and Self-Extend over each, where it is asked for."""
    plain = replace(run, self_extend=None)
    found = {"full": replace(plain, stripes=None)}
    if run.stripes:
        found[str(run.stripes) + ", full decode" * run.full_decode] = plain
    if run.self_extend:
        extended = f"Self-Extend {run.self_extend}"
        found |= {
            extended if one.stripes is None else f"{name} + {extended}": replace(one, self_extend=run.self_extend)
            for name, one in list(found.items())
        }
    return found


def tree(run: Run, device: Device, *, budget: int | None, seconds: float | None) -> dict[str, Any]:
    """The plan as JSON has it. Bytes, FLOPs and seconds; `budget` and `seconds` are the user's limits."""
    d = run.decoder
    asked = {"length": run.length, "batch": run.batch, "dtype": run.dtype, "phase": run.phase}
    asked |= {"checkpointing": run.checkpointing, "lora": run.lora, "memory": budget, "seconds": seconds}
    found: dict[str, Any] = {
        "model": {"name": d.name, "parameters": d.size, "by_part": d.parameters(), "exact": d.family in FAMILIES},
        "asked": asked,
        "device": {"name": device.name, "source": device.source, "bandwidth": device.bandwidth}
        | {"flops": dict(device.flops), "memory": device.memory},
        "layouts": [_column(name, one, device, budget) for name, one in variants(run).items()],
        "complexity": complexity(run),
    }
    if budget is not None or seconds is not None:
        plain = replace(run, self_extend=None)
        meets = fit.mildest(plain, budget=budget, seconds=seconds, device=device)
        found["mildest_layout"] = meets and str(meets.stripes or "full")
    return found


def _column(name: str, run: Run, device: Device, budget: int | None) -> dict[str, Any]:
    computed, moved, taken, held = flops(run), traffic(run), device.seconds(run), memory(run)
    column: dict[str, Any] = {"layout": name, "global_layers": run.count(GLOBAL), "pairs": pairs(run)}
    column |= {"flops": _with_total(computed), "bytes": _with_total(moved), "seconds": _with_total(taken)}
    column |= {"intensity": sum(computed.values()) / sum(moved.values()), "memory": _with_total(held)}
    column |= {"trained": trained(run)} if run.phase == "train" else {"kv_bytes": kv_bytes(run)}
    if budget is not None:
        column |= {"largest_length": fit.largest_length(run, budget), "largest_batch": fit.largest_batch(run, budget)}
    return column


def _with_total(parts: dict[str, Any]) -> dict[str, Any]:
    return parts | {"total": sum(parts.values())}


def complexity(run: Run) -> list[dict[str, Any]]:
    """The paper's table of time and memory of the attention kinds, with the numbers of this run's length.

    Per layer, in pairs and in tokens cached after N (its formulas recalled; the numbers are counted):

        global   time O(N^2)                      memory O(N)
        local    time O(N w)                      memory O(w)
        grouped  time O(N^2 / g + (1 - 1/g) N w)  memory O(N / g + (1 - 1/g) w)
    """
    n, d = run.length, run.decoder
    rows = [("global", "N²", "N", float(visible_pairs(n)), float(n))]
    if run.stripes:
        w, sinks = run.stripes.window, run.stripes.sinks
        plain = replace(run, self_extend=None, full_decode=False)
        one = replace(plain, phase="prefill", batch=1, checkpointing=False, lora=None)
        rows.append(("local", "N w", "w", float(visible_pairs(n, w, sinks)), float(min(n, w - 1) + sinks)))
        grouped = (pairs(one) / d.layers, cached_tokens(one) / d.layers)
        rows.append(("grouped", "N²/g + (1 − 1/g) N w", "N/g + (1 − 1/g) w", *grouped))
        if others := run.stripes.orders:
            rows[-1:] = [(kind, *order, float(run.stripes.pairs(kind, n)), float(n)) for kind, order in others.items()]
    if run.self_extend:
        near = sum(self_extend_pairs(n, run.self_extend.window))
        twice = min(n, run.self_extend.window - 1)  # keys alone: half a token each
        rows.append(("Self-Extend", "N²", "N + W/2", float(near), n + twice / 2))
    return [
        {"kind": kind, "time": f"O({time})", "memory": f"O({held})", "pairs": count, "cached_tokens": cached}
        | {"pairs_of_global": count / visible_pairs(n), "cached_of_global": cached / n}
        for kind, time, held, count, cached in rows
    ]


def curves(run: Run, device: Device) -> dict[str, dict[str, list[float]]]:
    """Attention FLOPs, KV bytes and seconds over LENGTHS, for each variant; Self-Extend ends where its reach ends."""
    found: dict[str, dict[str, list[float]]] = {}
    for name, one in variants(replace(run, length=1)).items():
        reach = fit.largest_length(one, 2**80)
        at = [replace(one, length=n) for n in LENGTHS if n <= reach]
        found[name] = {
            "length": [r.length for r in at],
            "attention": [flops(r)["attention"] for r in at],
            "kv": [kv_bytes(replace(r, phase="decode", checkpointing=False, lora=None)) for r in at],
            "seconds": [sum(device.seconds(r).values()) for r in at],
        }
    return found


def tables(plan: dict[str, Any]) -> list[Table]:
    """The tables of a plan's tree: costs by part, memory, what fits, the kinds of attention."""
    columns = plan["layouts"]
    names = tuple(column["layout"] for column in columns)
    cost = [_line("visible pairs", columns, lambda c: c["pairs"], counted)]
    sums = (("FLOPs", "flops", counted), ("bytes moved", "bytes", sized), ("time", "seconds", timed))
    for title, part, show in sums:
        cost += [
            _line(f"{title}, {name}" if name != "total" else f"[bold]{title}[/]", columns, _take(part, name), show)
            for name in columns[0][part]
        ]
    cost.append(("FLOPs for a byte", *(f"{column['intensity']:,.1f}" for column in columns)))
    held = [
        _line(f"[bold]{name}[/]" if name == "total" else name, columns, _take("memory", name), sized)
        for name in columns[0]["memory"]
    ]
    if "largest_length" in columns[0]:
        budget = sized(plan["asked"]["memory"])
        for what in ("length", "batch"):
            held.append((f"largest {what} in {budget}", *(f"{column[f'largest_{what}']:,}" for column in columns)))
    kinds: list[tuple[str, ...]] = []
    for row in plan["complexity"]:
        computed = _share(counted(row["pairs"]), row["pairs_of_global"])
        cached = _share(f"{row['cached_tokens']:,.0f}", row["cached_of_global"])
        kinds.append((row["kind"], row["time"], computed, row["memory"], cached))
    head = ("attention, a layer's mean", "time", "pairs", "memory", "tokens cached")
    return [Table(("cost", *names), cost), Table(("memory of one device", *names), held), Table(head, kinds)]


def _take(part: str, name: str) -> Callable[[dict[str, Any]], float]:
    return lambda column: column[part][name]


def _line(
    title: str, columns: Sequence[dict[str, Any]], value: Callable[[Any], float], show: Callable[[float], str]
) -> tuple[str, ...]:
    """A line of a table; beside each number its share of the first column's, where it differs."""
    first = value(columns[0])
    cells = [show(value(column)) for column in columns]
    shares = [value(column) / first if first else 1.0 for column in columns]
    return (title, *(_share(cell, share) for cell, share in zip(cells, shares, strict=True)))


def _share(cell: str, share: float) -> str:
    return cell if abs(share - 1) < 0.005 else f"{cell} [dim]{share:.2f}[/]"


def headline(plan: dict[str, Any]) -> str:
    """What the tables are of, in two lines."""
    model, asked, device = plan["model"], plan["asked"], plan["device"]
    training = [f"LoRA of rank {asked['lora']}"] if asked["lora"] else []
    training += ["activation checkpointing"] if asked["checkpointing"] else []
    what = {"train": "a training step over", "prefill": "reading", "decode": "one token after"}[asked["phase"]]
    note = "" if model["exact"] else ", reckoned as a Llama: its family is not in the table"
    ceilings = "ceilings measured" if device["source"] == MEASURED else "the vendor's peaks, which no run reaches"
    first = f"{model['name']}: {model['parameters']:,} parameters{note}"
    rows = f" x {asked['batch']:,} rows" if asked["batch"] > 1 else ""
    second = f"{what} {asked['length']:,} tokens{rows}, {asked['dtype']}"
    return f"{first}\n{', '.join([second, *training])}; {device['name']}, {ceilings}"


def counted(value: float) -> str:
    """A number with its thousands in letters."""
    for unit, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:,.2f} {letter}"
    return f"{value:,.0f}"


def sized(value: float) -> str:
    """Bytes in words."""
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= unit:
            return f"{value / unit:,.2f} {name}"
    return f"{value:,.0f} B"


def timed(seconds: float) -> str:
    """Seconds in words."""
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= unit:
            return f"{seconds / unit:,.2f} {name}"
    return f"{seconds * 1e6:,.1f} µs"
