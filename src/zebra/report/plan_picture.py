"""The figure of a plan: attention, KV cache and time over the length, a line for each layout."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogLocator

from zebra.errors import ZebraError
from zebra.files import atomic_write
from zebra.report.figures import HUES, INK, Figure

Curves = Mapping[str, Mapping[str, list[float]]]


def write_picture(path: Path, curves: Curves, *, phase: str, device: str) -> None:
    """Write the three panels as an SVG file.

    Args:
        curves: for each layout the lists `length`, `attention` (FLOPs), `kv` (bytes) and `seconds`; full first.

    Raises:
        ZebraError: a name that does not end in .svg.
    """
    if path.suffix != ".svg":
        raise ZebraError(
            f"the picture must be an .svg file; got the name {path.name!r}. Write to {path.with_suffix('.svg')}."
        )
    panels = [
        ("attention", f"attention in {phase}, FLOPs", ""),
        ("kv", "keys and values, cached", "B"),
        ("seconds", f"time of {phase}, {device}", "s"),
    ]
    plots = [partial(_plot, curves=curves, name=name, title=title, unit=unit) for name, title, unit in panels]
    atomic_write(path, Figure("plan", plots, height=2.9).standalone)


def _plot(axes: Axes, curves: Curves, name: str, title: str, unit: str) -> None:
    """A curve for each layout; in the corner, how many times less the second one costs at the right end."""
    hues = itertools.cycle(HUES)
    for layer, (layout, curve) in enumerate(curves.items(), start=2):
        color = INK if layout == "full" else next(hues)
        style = (0, (1, 1.2)) if "Self-Extend" in layout else "-"  # dotted: it covers the curve without Self-Extend
        axes.plot(curve["length"], curve[name], color=color, linestyle=style, marker="", label=layout, zorder=layer)
    full, striped = (curve[name][-1] for curve in list(curves.values())[:2])
    if full > 1.05 * striped:
        text = f"{full / striped:.1f}× less at 1M"
        axes.text(0.04, 0.92, text, transform=axes.transAxes, color=HUES[0], fontsize=8)
    axes.set_title(title, fontsize=9, loc="left", pad=8)
    axes.set_xscale("log", base=2)
    axes.set(yscale="log", xlim=(2**10, 2**20), xlabel="tokens")
    axes.set_xticks([2**10, 2**15, 2**20], ["1K", "32K", "1M"])
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1,) if high > 100 * low else (1, 2, 5), numticks=8))
    axes.yaxis.set_major_formatter(EngFormatter(unit))
    axes.minorticks_off()
