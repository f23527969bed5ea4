"""The picture of a plan: attention, cache and time over the length, a line for each layout."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

from zebra.errors import ZebraError
from zebra.report.figures import HUES, INK, draw, standalone

Curves = Mapping[str, Mapping[str, list[float]]]

_PANELS = (
    ("attention", "attention in {phase}, FLOPs", ((1e18, " E"), (1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"))),
    ("kv", "keys and values, cached", ((1e12, " TB"), (1e9, " GB"), (1e6, " MB"), (1e3, " kB"))),
    ("seconds", "time of {phase}, {device}", ((1.0, " s"), (1e-3, " ms"), (1e-6, " µs"))),
)
"""Each panel's list in the curves, its title and its units."""


def write_picture(path: Path, curves: Curves, *, phase: str, device: str) -> None:
    """Write the panels as an SVG file.

    Args:
        curves: for each layout the lists `length`, `attention` (FLOPs), `kv` (bytes) and `seconds`; dense first.

    Raises:
        ZebraError: a name that does not end in .svg.
    """
    if path.suffix != ".svg":
        raise ZebraError(
            f"the picture is an SVG file; got the name {path.name!r}. Write to {path.with_suffix('.svg')}."
        )
    plots = (_panel(curves, name, title.format(phase=phase, device=device), units) for name, title, units in _PANELS)
    path.write_text(standalone(draw("plan", *plots, height=2.9)), encoding="utf-8")


def _panel(curves: Curves, name: str, title: str, units: tuple[tuple[float, str], ...]) -> Callable[[Axes], None]:
    def plot(axes: Axes) -> None:
        hues = itertools.cycle(HUES)
        for layer, (layout, curve) in enumerate(curves.items(), start=2):
            color = INK if layout == "full" else next(hues)
            style = (0, (1, 1.2)) if "Self-Extend" in layout else "-"  # it lies upon its base
            axes.plot(curve["length"], curve[name], color=color, linestyle=style, label=layout, zorder=layer)
        _say_how_much_less(axes, list(curves.values()), name)
        _scale(axes, units)
        axes.set_title(title, fontsize=9, loc="left", pad=8)

    return plot


def _say_how_much_less(axes: Axes, curves: list[Mapping[str, list[float]]], name: str) -> None:
    """In the corner, how many times less the second layout costs than the first at the right end."""
    dense, striped = curves[0][name][-1], curves[1][name][-1]
    if dense > 1.05 * striped:
        text = f"{dense / striped:.1f}× less at 1M"
        axes.text(0.04, 0.92, text, transform=axes.transAxes, color=HUES[0], fontsize=8)


def _scale(axes: Axes, units: tuple[tuple[float, str], ...]) -> None:
    def show(value: float, _: float) -> str:
        unit, name = next((unit for unit in units if value >= unit[0] * 0.999), units[-1])
        return f"{value / unit:,.4g}{name}"

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlim(2**10, 2**20)
    axes.xaxis.set_major_locator(FixedLocator([2.0**i for i in (10, 15, 20)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 2**10:g}K" if value < 2**20 else f"{value / 2**20:g}M")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1,) if high > 100 * low else (1, 2, 5), numticks=8))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(show)
    axes.set_xlabel("tokens")
