"""The picture of a plan: attention, cache and time over the length, a line for each layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

from zebra.plan.sheet import duration
from zebra.report.figures import HUES, INK, drawn, standalone

Curves = Mapping[str, Mapping[str, list[float]]]


def write_picture(path: Path, curves: Curves, *, phase: str, device: str) -> None:
    """Write the three panels as an SVG file.

    Args:
        curves: for each layout the lists `length`, `attention` (FLOPs), `kv` (bytes) and `seconds`.
    """
    what = {"train": "a training step", "prefill": "reading the text", "decode": "one token more"}[phase]
    panels = (
        _panel(curves, "attention", f"attention of {what}", _flops),
        _panel(curves, "kv", "keys and values, cached", _bytes),
        _panel(curves, "seconds", f"{what}, {device}", duration),
    )
    path.write_text(standalone(drawn("plan", *panels)), encoding="utf-8")


def _panel(curves: Curves, name: str, title: str, show: Callable[[float], str]) -> Callable[[Axes], None]:
    def plot(axes: Axes) -> None:
        for i, (layout, curve) in enumerate(curves.items()):
            extended = "Self-Extend" in layout
            striped = not layout.startswith(("dense", "Self-Extend"))
            color = HUES[0] if striped else INK
            style = (0, (1, 1.6)) if extended else "-"
            axes.plot(curve["length"], curve[name], color=color, linestyle=style, label=layout, zorder=3 - i / 10)
        _scale(axes, show)
        axes.set_title(title, fontsize=9, loc="left")

    return plot


def _scale(axes: Axes, show: Callable[[float], str]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator([2.0**i for i in (10, 14, 17, 20)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 2**10:g}K" if value < 2**20 else f"{value / 2**20:g}M")
    axes.yaxis.set_major_locator(LogLocator(numticks=7))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: show(value))
    axes.set_xlabel("tokens")


def _flops(value: float) -> str:
    for unit, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= unit:
            return f"{value / unit:g} {letter}FLOP"
    return f"{value:g}"


def _bytes(value: float) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= unit:
            return f"{value / unit:g} {name}"
    return f"{value:g} B"
