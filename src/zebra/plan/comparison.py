"""Compare the costs of full attention, stripes and Self-Extend, as a JSON tree and as terminal tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from zebra.errors import ZebraError
from zebra.plan import fit
from zebra.plan.cost import Run, bytes_moved, flops, pairs, trained_parameters
from zebra.plan.devices import MEASURED, Device
from zebra.plan.families import FAMILIES
from zebra.plan.memory import cached_tokens, kv_bytes, memory, snapshot_bytes
from zebra.plan.parallel import Parallel, check_parallel, device_memory, received_bytes
from zebra.stripes import GLOBAL, visible_pairs

LENGTHS = tuple(2**i for i in range(10, 21))
"""1K to 1M tokens, the lengths of the figure."""
COUNT = {"E": 1e18, "P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "": 1.0}
BYTES = {"TiB": 2.0**40, "GiB": 2.0**30, "MiB": 2.0**20, "KiB": 2.0**10, "B": 1.0}
TIME = {"s": 1.0, "ms": 1e-3, "µs": 1e-6, "ns": 1e-9}
"""The units of the tables, from the largest."""


def variants(run: Run) -> dict[str, Run]:
    """The run with full attention and with its stripes, and each of them with Self-Extend where the run has it."""
    plain = replace(run, self_extend=None)
    by_name = {"full": replace(plain, stripes=None)}
    striped = str(run.stripes) + ", full decode" * run.full_decode
    if run.stripes:
        by_name[striped] = plain
    if run.self_extend:
        extended = f"Self-Extend {run.self_extend}"
        by_name[extended] = replace(run, stripes=None)
        if run.stripes:
            by_name[f"{striped} + {extended}"] = run
    return by_name


def compare(
    run: Run,
    device: Device,
    *,
    budget: int | None = None,
    seconds: float | None = None,
    parallel: Parallel | None = None,
) -> dict[str, Any]:
    """The plan as a JSON tree, in bytes, FLOPs and seconds.

    Args:
        budget: memory in bytes; the tree also has the largest length and batch that fit.
        seconds: time of the run. With it or with `budget` the tree suggests a layout that meets both.
        parallel: how devices share the run; the tree then has the memory of one of them and the bytes it receives.

    Raises:
        ZebraError: `budget` or `seconds` together with `parallel`; what `check_parallel` raises.
    """
    if parallel is not None:
        check_parallel(run, parallel)
        if budget is not None or seconds is not None:
            raise ZebraError(
                "--memory and --seconds support only one device, not --parallel. Leave them out, or --parallel."
            )
    d = run.decoder
    recorded = ("length", "batch", "dtype", "phase", "checkpointing", "lora")
    plan: dict[str, Any] = {
        "model": {
            "name": d.name,
            "parameters": d.num_parameters,
            "by_part": d.parameters_by_part(),
            "exact": d.family in FAMILIES,
        },
        "settings": {name: getattr(run, name) for name in recorded} | {"memory": budget, "seconds": seconds},
        "device": {name: getattr(device, name) for name in ("name", "source", "bandwidth", "flops", "memory")},
        "layouts": [_costs(name, one, device, budget, parallel) for name, one in variants(run).items()],
        "complexity": complexity(run),
    }
    if parallel is not None:
        plan["parallel"] = asdict(parallel) | {"devices": parallel.devices}
    if budget is not None or seconds is not None:
        suggested = fit.suggest_layout(replace(run, self_extend=None), budget=budget, seconds=seconds, device=device)
        plan["suggested_layout"] = suggested and str(suggested.stripes or "full")
    return plan


def _costs(name: str, run: Run, device: Device, budget: int | None, parallel: Parallel | None) -> dict[str, Any]:
    computed, moved = flops(run), bytes_moved(run)
    costs: dict[str, Any] = {
        "layout": name,
        "global_layers": run.count(GLOBAL),
        "pairs": pairs(run),
        "flops": _with_total(computed),
        "bytes": _with_total(moved),
        "seconds": _with_total(device.seconds(run)),
        "intensity": sum(computed.values()) / sum(moved.values()),
        "memory": _with_total(memory(run)),
    }
    if run.phase == "train":
        costs["trained"] = trained_parameters(run)
    else:
        costs |= {"kv_bytes": kv_bytes(run), "snapshot_bytes": snapshot_bytes(run)}
    if parallel is not None:
        costs["memory"] = _with_total(device_memory(run, parallel))
        costs["received"] = _with_total(received_bytes(run, parallel))
    if budget is not None:
        costs |= {"largest_length": fit.largest_length(run, budget), "largest_batch": fit.largest_batch(run, budget)}
    return costs


def _with_total(parts: dict[str, Any]) -> dict[str, Any]:
    return parts | {"total": sum(parts.values())}


def complexity(run: Run) -> list[dict[str, Any]]:
    """The Zebra paper's table of time and memory by kind of attention, with the numbers at this run's length.

    Per layer, in visible pairs and in tokens cached after N (the formulas are recalled; the numbers are counted):

        global   time O(N^2)                      memory O(N)
        local    time O(N w)                      memory O(w)
        grouped  time O(N^2 / g + (1 - 1/g) N w)  memory O(N / g + (1 - 1/g) w)
    """
    n, d = run.length, run.decoder
    kinds = [("global", "N²", "N", float(visible_pairs(n)), float(n))]
    if run.stripes:
        w, sinks = run.stripes.window, run.stripes.sinks
        one = Run(decoder=d, stripes=run.stripes, length=n)
        kinds.append(("local", "N w", "w", float(visible_pairs(n, w, sinks)), float(min(n, w - 1) + sinks)))
        grouped = (pairs(one) / d.layers, cached_tokens(one) / d.layers)
        kinds.append(("grouped", "N²/g + (1 − 1/g) N w", "N/g + (1 − 1/g) w", *grouped))
        if others := run.stripes.orders:
            kinds[-1:] = [(kind, *order, float(run.stripes.pairs(kind, n)), float(n)) for kind, order in others.items()]
    if run.self_extend:
        near_keys = min(n, run.self_extend.window - 1)  # cached without values, so each counts as half a token
        kinds.append(("Self-Extend", "N²", "N + W/2", float(visible_pairs(n)), n + near_keys / 2))
    return [
        {"kind": kind, "time": f"O({time})", "memory": f"O({space})", "pairs": count, "cached_tokens": cached}
        | {"pairs_of_global": count / visible_pairs(n), "cached_of_global": cached / n}
        for kind, time, space, count, cached in kinds
    ]


def curves(run: Run, device: Device) -> dict[str, dict[str, list[float]]]:
    """Attention FLOPs, KV bytes and seconds over LENGTHS for each variant; Self-Extend only as far as it reaches."""
    by_name: dict[str, dict[str, list[float]]] = {}
    for name, one in variants(run).items():
        reach = fit.largest_length(one, 2**80)
        runs = [replace(one, length=n) for n in LENGTHS if n <= reach]
        by_name[name] = {
            "length": [r.length for r in runs],
            "attention": [flops(r)["attention"] for r in runs],
            "kv": [kv_bytes(replace(r, phase="decode", checkpointing=False, lora=None)) for r in runs],
            "seconds": [sum(device.seconds(r).values()) for r in runs],
        }
    return by_name


# The terminal


def headline(plan: dict[str, Any]) -> str:
    """Describe the model, the run and the device of the tables, in two lines."""
    model, settings, device = plan["model"], plan["settings"], plan["device"]
    phase = {"train": "a training step over", "prefill": "prefill of", "decode": "one token after"}[settings["phase"]]
    note = "" if model["exact"] else ", estimated as a Llama: its family is not in the table"
    ceilings = "ceilings measured" if device["source"] == MEASURED else "the vendor's peaks, which no run reaches"
    batch = f" x {settings['batch']:,} sequences" if settings["batch"] > 1 else ""
    what = f"{phase} {settings['length']:,} tokens{batch}, {settings['dtype']}"
    what += f", LoRA of rank {settings['lora']}" if settings["lora"] else ""
    what += ", activation checkpointing" if settings["checkpointing"] else ""
    if shared := plan.get("parallel"):
        sizes = (
            " x ".join(f"{name} {shared[name]}" for name in ("data", "shard", "sequence")) + ", ring" * shared["ring"]
        )
        what += f"; shared by {shared['devices']:,} devices ({sizes}), costs of all devices of one sequence"
    return f"{model['name']}: {model['parameters']:,} parameters{note}\n{what}; {device['name']}, {ceilings}"


def tables(plan: dict[str, Any]) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    """Head and body of each table of a plan: costs by part, memory and what fits, and the kinds of attention."""
    columns = plan["layouts"]
    names = tuple(column["layout"] for column in columns)
    cost = [_line("visible pairs", [column["pairs"] for column in columns], COUNT)]
    for title, key, units in (("FLOPs", "flops", COUNT), ("bytes moved", "bytes", BYTES), ("time", "seconds", TIME)):
        for part in columns[0][key]:
            name = f"[bold]{title}[/]" if part == "total" else f"{title}, {part}"
            cost.append(_line(name, [column[key][part] for column in columns], units))
    cost.append(("FLOPs per byte", *(f"{column['intensity']:,.1f}" for column in columns)))
    space = []
    for part in columns[0]["memory"]:
        name = f"[bold]{part}[/]" if part == "total" else part
        space.append(_line(name, [column["memory"][part] for column in columns], BYTES))
    if "snapshot_bytes" in columns[0]:
        space.append(_line("plus a snapshot", [column["snapshot_bytes"] for column in columns], BYTES))
    received = dict.fromkeys(part for column in reversed(columns) for part in column.get("received", ()))
    for part in received:
        name = "[bold]received[/]" if part == "total" else f"received, {part}"
        space.append(_line(name, [column["received"].get(part, 0) for column in columns], BYTES))
    if "largest_length" in columns[0]:
        budget = with_unit(plan["settings"]["memory"], BYTES)
        for size in ("length", "batch"):
            space.append((f"largest {size} in {budget}", *(f"{column[f'largest_{size}']:,}" for column in columns)))
    kinds: list[tuple[str, ...]] = []
    for kind in plan["complexity"]:
        computed = _with_share(with_unit(kind["pairs"], COUNT), kind["pairs_of_global"])
        cached = _with_share(f"{kind['cached_tokens']:,.0f}", kind["cached_of_global"])
        kinds.append((kind["kind"], kind["time"], computed, kind["memory"], cached))
    return [
        (("cost", *names), cost),
        (("memory of one device", *names), space),
        (("attention, mean per layer", "time", "pairs", "memory", "tokens cached"), kinds),
    ]


def _line(title: str, values: Sequence[float], units: Mapping[str, float]) -> tuple[str, ...]:
    """A row of a table; each number is followed by its ratio to the first column's, where the two differ."""
    first = values[0]
    return (title, *(_with_share(with_unit(value, units), value / first if first else 1.0) for value in values))


def _with_share(cell: str, share: float) -> str:
    return cell if abs(share - 1) < 0.005 else f"{cell} [dim]{share:.2f}[/]"


def with_unit(value: float, units: Mapping[str, float]) -> str:
    """Format a number in the largest unit that it reaches: 1.41 T, 13.50 GiB, 3.20 ms; in the smallest as an int."""
    for name, unit in units.items():
        if value >= unit > min(units.values()):
            return f"{value / unit:,.2f} {name}"
    return f"{value / unit:,.0f} {name}".rstrip()
