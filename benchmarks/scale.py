"""Training on many devices by formulas: docs/results/scale.md and its picture, from `zebra plan --cluster`.

python benchmarks/scale.py        some seconds; nothing is measured
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

from zebra.errors import ZebraError
from zebra.files import atomic_write
from zebra.plan.cluster import ASSUMPTIONS, Prediction, predictions
from zebra.plan.comparison import BYTES, TIME, with_unit
from zebra.plan.cost import Run, pairs
from zebra.plan.decoder import read_decoder
from zebra.plan.devices import DEVICES
from zebra.plan.parallel import Parallel, busiest, device_memory, exchanged_bytes, received_bytes
from zebra.report import page
from zebra.report.figures import HUES, Figure
from zebra.report.page import Cell, Section, Table
from zebra.stripes import GLOBAL, LOCAL, Stripes

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "results" / "scale.md"
PICTURE = ROOT / "docs" / "images" / "scale-curves.svg"

MODELS = ("llama-3.1-8b", "llama-3.1-70b")
DEVICE = DEVICES["h100-sxm"]
LAYOUT, DEVICES_OF_CURVES = "GLLL:4096", 256
LENGTHS = tuple(2**exponent for exponent in range(13, 21))
COUNTS = tuple(2**exponent for exponent in range(3, 11))


def planned_run(model: str, layout: str | None, length: int) -> Run:
    stripes = None if layout is None else Stripes.parse(layout)
    return Run(decoder=read_decoder(model), stripes=stripes, length=length, phase="train", checkpointing=True)


@cache
def best(model: str, layout: str | None, length: int, devices: int) -> Prediction:
    """The quickest way that fits, or the one that needs the least memory."""
    return predictions(planned_run(model, layout, length), DEVICE, devices)[0]


# What breaks first


def breaking(model: str) -> Iterator[tuple[str, ...]]:
    """For each length what forces the next kind of sharing: a line of the table."""
    for length in LENGTHS:
        run = planned_run(model, LAYOUT, length)
        alone = sum(device_memory(run, Parallel()).values())
        sharded = sum(device_memory(run, Parallel(shard=DEVICES_OF_CURVES)).values())
        full, striped = (best(model, layout, length, DEVICES_OF_CURVES) for layout in (None, LAYOUT))
        yield (
            f"{length:,}",
            with_unit(alone, BYTES),
            with_unit(sharded, BYTES),
            *(f"{one.parallel.sequence}: {one.limit}" for one in (full, striped)),
            *(with_unit(one.key_seconds, TIME) for one in (full, striped)),
        )


def first_lengths(model: str) -> Iterator[str]:
    """The lengths at which something breaks, in sentences."""
    limit = 0.9 * (DEVICE.memory or 0)
    for what, shared in (
        ("one device", Parallel()),
        (f"{DEVICES_OF_CURVES} shards", Parallel(shard=DEVICES_OF_CURVES)),
    ):
        fits = [n for n in LENGTHS if sum(device_memory(planned_run(model, LAYOUT, n), shared).values()) <= limit]
        yield (f"up to {max(fits):,} tokens fit" if fits else "no length fits") + f" on {what}"


def gathered(model: str, length: int, sequence: int) -> tuple[str, ...]:
    """What a gather of all keys costs a device of a sequence beside a ring, and how even its pairs are."""
    run = planned_run(model, LAYOUT, length)
    local, whole = (max(got for got, _ in exchanged_bytes(run, kind, sequence)) for kind in (LOCAL, GLOBAL))
    gather = Parallel(shard=max(2, DEVICES_OF_CURVES // sequence), sequence=sequence)
    ring = replace(gather, ring=True)
    needed, by_ring = (sum(device_memory(run, way).values()) for way in (gather, ring))
    received, received_by_ring = (received_bytes(run, way)["keys and values, global layers"] for way in (gather, ring))
    held = device_memory(run, ring)["keys and values fetched"]
    last = replace(run, length=length // sequence, past=length - length // sequence)
    pairs_of = [f"{pairs(one) * sequence / pairs(run):.3f}" for one in (last, busiest(run, sequence))]
    sizes = [with_unit(count, BYTES) for count in (local, whole, held)]
    costs = f"{(needed - by_ring) / needed:.1%}", f"{received_by_ring / received:.2f}"
    return f"{length:,}", str(sequence), *sizes, *costs, *pairs_of


# The page


def way(one: Prediction) -> tuple[str, ...]:
    shared = f"{one.parallel.data} × {one.parallel.shard} × {one.parallel.sequence}" + ", ring" * one.parallel.ring
    if not one.fits:
        return shared, with_unit(sum(one.memory.values()), BYTES), "–", "–", "–", one.limit
    speed = (with_unit(one.seconds, TIME), f"{one.tokens_per_second:,.0f}", f"{one.peak_share:.0%}")
    return shared, with_unit(sum(one.memory.values()), BYTES), *speed, one.limit


WAY = ("data × shard × sequence", "memory", "step", "tokens/s", "of peak", "limit")


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> Table:
    return Table("", [Cell(name) for name in head], [[Cell(text) for text in line] for line in body])


def sections() -> list[Section]:
    parts = [
        Section("What is assumed", [f"{one[0].upper()}{one[1:]}." for one in (*ASSUMPTIONS, CALIBRATION)]),
        Section("Curves", [figure()]),
    ]
    for model in MODELS:
        shards, sequence, waiting = f"{DEVICES_OF_CURVES} shards", "devices per sequence, limit", "waiting for keys"
        sides = [f"{what}: {layout}" for what in (sequence, waiting) for layout in ("full", LAYOUT)]
        head = ("tokens", "memory, one device", f"memory, {shards}", *sides)
        parts.append(
            Section(
                f"What breaks first: {model}",
                [
                    f"Under {LAYOUT} with whole sequences, {' and '.join(first_lengths(model))}. Longer sequences must "
                    f"be split. Memory is that of one device, alone and as one of {DEVICES_OF_CURVES} shards. The "
                    f"other columns are of the best way to use {DEVICES_OF_CURVES} devices.",
                    table(head, breaking(model)),
                ],
            )
        )
    for model, length in ((MODELS[0], 2**16), (MODELS[1], 2**17), (MODELS[1], 2**20)):
        body = [
            (f"{count:,}", layout or "full", *way(best(model, layout, length, count)))
            for count in COUNTS
            for layout in (None, LAYOUT)
        ]
        parts.append(Section(f"{model}, {length:,} tokens", [table(("devices", "layout", *WAY), body)]))
    costs = [
        (model, *gathered(model, length, sequence))
        for model in MODELS
        for length, sequence in ((2**17, 8), (2**20, 32))
    ]
    names = (
        "model",
        "tokens",
        "devices per sequence",
        "local layer",
        "global layer, gather",
        "global layer, ring",
        "memory saved by the ring",
        "bytes received, ring / gather",
        "pairs in order",
        "pairs in zig-zag",
    )
    parts.append(
        Section(
            "Gathering keys and values, or a ring",
            [
                "The first columns are the keys and values that a device fetches for one layer. By a gather, a global "
                "layer holds all of them at once. A ring holds two shards: it computes with one while it receives the "
                "next. With activation checkpointing, only one layer's keys, values and their gradients are held at a "
                "time; the memory saved, a share of the device's, counts both. A ring receives more bytes, because "
                "the backward pass sends keys and values round again. Pairs are the (query, key) pairs of the device "
                "that has the most, over the mean: with shards in the order of the tokens, and in zig-zag as zebra "
                "splits them.",
                table(names, costs),
            ],
        )
    )
    return parts


CALIBRATION = (
    "calibrated on one machine only: on two CPU cores the same formulas planned 0.90, 0.92 and 0.97 of the measured "
    "time of training steps (docs/results/speed.md); a test counts the bytes that are sent; no GPU and no network was "
    "measured"
)


def figure() -> Figure:
    panels: dict[str, Callable[[Prediction], float]] = {
        f"tokens/s of {DEVICES_OF_CURVES} devices": lambda one: one.tokens_per_second,
        "of the devices' peak, %": lambda one: 100 * one.peak_share,
        "devices per sequence": lambda one: one.parallel.sequence,
    }
    plots = [partial(plot, title=title, value=value) for title, value in panels.items()]
    caption = "The best way to share a training run, by sequence length; lengths that do not fit are left out"
    return Figure("curves", plots, caption, height=2.9)


def plot(axes: Axes, title: str, value: Callable[[Prediction], float]) -> None:
    for color, model in zip((HUES[0], HUES[1]), MODELS, strict=True):
        for layout, style in ((None, ":"), (LAYOUT, "-")):
            ways = [(n, best(model, layout, n, DEVICES_OF_CURVES)) for n in LENGTHS]
            points = [(n, value(one)) for n, one in ways if one.fits]
            name = f"{model.removeprefix('llama-3.1-').upper()}, {layout or 'full'}"
            axes.plot(*zip(*points, strict=True), color=color, linestyle=style, marker="", label=name)
    axes.set_title(title, fontsize=9, loc="left", pad=8)
    axes.set_xscale("log", base=2)
    axes.set_xticks([2**13, 2**16, 2**20], ["8K", "64K", "1M"])
    axes.minorticks_off()
    axes.set_xlabel("tokens")
    if title.endswith("%"):
        axes.set_ylim(bottom=0)
    else:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))


def main() -> None:
    parts = sections()
    (curves,) = page.figures_of(parts)
    atomic_write(PICTURE, curves.standalone + "\n")
    summary = (
        f"Estimates by the formulas of zebra plan --cluster, for {DEVICE.name}: bfloat16 with float32 weights, AdamW, "
        "activation checkpointing, one sequence per group of devices. Nothing here ran on a cluster. Reproduce: python "
        "benchmarks/scale.py."
    )
    atomic_write(PAGE, page.markdown(f"../{PICTURE.parent.name}/scale", "Scale on paper", [[Cell(summary)]], parts))


if __name__ == "__main__":
    try:
        main()
    except ZebraError as error:
        sys.exit(f"scale: {error}")
