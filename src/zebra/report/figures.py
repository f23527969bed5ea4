"""The figures of a page, as SVG elements that take the colour of the text around them."""

from __future__ import annotations

import html as markup
import io
import itertools
import math
import re
from collections.abc import Callable, Mapping

import matplotlib
import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

from zebra.report.series import FULL, Group, Span, interval, labels, span_name
from zebra.results import Result
from zebra.stripes import GLOBAL

INK = "#010203"
"""What figures draw in the colour of the text; it becomes `currentColor`, so that a figure follows light and dark."""
HUES = ("#e2571e", "#2a93a8", "#8b68d6", "#b8860b", "#d0488a", "#4f9d50")
ACCENT = HUES[0]

_MOST = 1e30
_LEGEND_LINE = 0.19  # inches
_MARKERS = "osD^v"
_FEW = 4


def draw(name: str, *plots: Callable[[Axes], None], height: float = 3.3) -> str:
    """Plots side by side, as an SVG element in the colour of the text around it, whose ids no other figure has.

    Panels share the legend, which is the first one's.
    """
    style = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9, "lines.linewidth": 1.8}
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    with matplotlib.style.context(["default", style]):
        figure = Canvas(figsize=(7.2, height), layout="constrained")
        panels = figure.subplots(1, len(plots), squeeze=False)[0]
        for axes, plot in zip(panels, plots, strict=True):
            plot(axes)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
        handles, names = panels[0].get_legend_handles_labels()
        columns = max(1, min(len(names), 100 // (max(map(len, names), default=0) + 7)))
        figure.set_figheight(height + _LEGEND_LINE * max(0, math.ceil(len(names) / columns) - 1))
        legend = figure.legend(
            *(handles, names),
            loc="outside upper left",
            ncols=columns,
            frameon=False,
            borderaxespad=0,
            handlelength=2.8,
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    svg = file.getvalue()
    svg = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL
    )
    svg = svg.replace("xlink:href", "href").replace(INK, "currentColor")
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", svg)
    width, high = figure.get_size_inches() * 72
    return re.sub(r"<svg[^>]*>", f'<svg viewBox="0 0 {width:g} {high:g}">', svg, count=1).strip()


def standalone(svg: str) -> str:
    """The element as a file of its own, without links, in black or white by the reader's preference."""
    svg = re.sub(r"</?a\b[^>]*>", "", svg)
    style = "<style>svg{color:#1b1b1b}@media(prefers-color-scheme:dark){svg{color:#e8e8e8}}</style>"
    return re.sub(r"<svg([^>]*)>", rf'<svg xmlns="http://www.w3.org/2000/svg"\1>{style}', svg, count=1)


def plot_positions(axes: Axes, group: Group) -> None:
    """Perplexity over positions, a line for each series; where they are few, its interval as a band."""
    buckets = group.buckets
    left = buckets[0][0] or buckets[0][1] / 2  # a logarithmic axis has no 0
    trained = {(series.run, series.layout) for series in group.scores if series.trained}
    makers = {series.run for series in group.scores if series.made}
    inks = itertools.cycle(("-", ":", "-."))
    styles: dict[tuple[str, str], tuple[str, str]] = {}
    for (series, scores), label in zip(group.scores.items(), labels(group.scores).values(), strict=True):
        place = (series.run, series.layout)
        if series.layout == FULL and not series.trained:
            (color, marker), line = (INK, "o"), next(inks)
        else:
            color, marker = styles.setdefault(place, _style(len(styles)))
            after = series.made if series.run in makers else series.trained
            line = "--" if place in trained and not after else "-"
        here = [(max(a, left), b, scores[a, b]) for a, b in buckets if (a, b) in scores]
        x = [math.sqrt(a * b) for a, b, _ in here]
        y = [_finite(row.value) for *_, row in here]
        axes.plot(x, y, line, color=color, marker=marker, markersize=4, label=label)
        if len(group.scores) <= _FEW:
            low, high = zip(*(interval(row) or (math.nan, math.nan) for *_, row in here), strict=True)
            axes.fill_between(x, [*map(_finite, low)], [*map(_finite, high)], color=color, alpha=0.15, linewidth=0)
    edges = [left, *(end for _, end in buckets)]
    axes.set_xscale("log", base=2)
    axes.set_xlim(left, edges[-1])
    axes.xaxis.set_major_locator(FixedLocator(edges))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{buckets[0][0]:,}", *(f"{edge:,}" for edge in edges[1:])])
    axes.set_xlabel("position (tokens of context)")
    _scale_perplexity(axes, [row.value for scores in group.scores.values() for row in scores.values()])


def _style(i: int) -> tuple[str, str]:
    """Colour and marker of a line; another marker once the colours are used up."""
    return HUES[i % len(HUES)], _MARKERS[i // len(HUES) % len(_MARKERS)]


def plot_lengths(axes: Axes, lines: list[tuple[str, dict[int, float]]], threshold: float) -> None:
    """Shares over lengths, a line for each label, and a threshold."""
    for i, (label, points) in enumerate(lines):
        color, marker = _style(i)
        values = [_finite(value) for value in points.values()]
        axes.plot([*points], values, color=color, marker=marker, markersize=4, label=label)
    axes.axhline(threshold, color=INK, linestyle="--", linewidth=1, alpha=0.6)
    axes.set_xscale("log", base=2)
    ticks = sorted({length for _, points in lines for length in points})
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{length:,}" for length in ticks])
    axes.set_xlabel("length (tokens)")
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")


def plot_loss(axes: Axes, losses: list[Result], named: Mapping[str, tuple[str, str]] | None = None) -> None:
    """Training loss over tokens, a line for each run: by its own name, or by the name and the colour that are given."""
    for i, run in enumerate(dict.fromkeys(row.run for row in losses)):
        here = [row for row in losses if row.run == run]
        x = [row.n or 0 for row in here]
        label, color = (named or {}).get(run, (run, HUES[i % len(HUES)]))
        axes.plot(x, [_finite(row.value) for row in here], color=color, label=label)
    axes.set_ylabel("training loss")
    _scale_trained(axes, "tokens")


def plot_way(axes: Axes, points: dict[float, dict[Span, Result]], buckets: list[Span], unit: str) -> None:
    """Perplexity over training, a line for each bucket of positions."""
    for i, bucket in enumerate(buckets, start=1):
        here = [(at, _finite(scores[bucket].value)) for at, scores in points.items() if bucket in scores]
        color = to_rgba(HUES[0], 0.25 + 0.75 * i / len(buckets))
        axes.plot(*zip(*here, strict=True), color=color, marker="o", markersize=3.5, label=span_name(bucket))
    _scale_trained(axes, unit)
    _scale_perplexity(axes, [row.value for scores in points.values() for row in scores.values()])


def _scale_trained(axes: Axes, unit: str) -> None:
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda value, _: _short(value))
    axes.set_xlabel(f"{unit} trained on")


def _scale_perplexity(axes: Axes, values: list[float]) -> None:
    """Logarithmic where the values differ by more than a factor of 4."""
    axes.set_ylabel("perplexity")
    found = [value for value in values if 0 < value < _MOST]
    if found and max(found) > 4 * min(found):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")


def _finite(value: float) -> float:
    """What can be drawn; beyond it, ticks cannot be laid out."""
    return value if abs(value) < _MOST else math.nan


def _short(value: float) -> str:
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{letter}"
    return f"{value:g}"


def strips(layouts: dict[tuple[str, int], tuple[str, ...]], windows: list[int]) -> str:
    """The masks of the two kinds, schematic, and under them a strip of layers for each layout, which is a link."""
    parts = [*_mask(0, "ink", "global layer", ["reads every token", "before it"], window=10)]
    if windows:
        sizes = " or ".join(f"{window:,}" for window in windows)
        parts += _mask(330, "accent", "local layer", [f"reads the last {sizes}", "tokens, itself included"], window=3)
    y = 150
    for i, ((layout, n), kinds) in enumerate(layouts.items()):
        counted = f"{kinds.count(GLOBAL)} of {n} layers global"
        named = f'<tspan class="strong">{markup.escape(layout)}</tspan>  {counted}'
        parts.append(f'<a href="@{i}"><text x="0" y="{y}">{named}</text></a>')
        step = min(48.0, 720 / n)
        for layer, kind in enumerate(kinds):
            style = "ink" if kind == GLOBAL else "accent"
            parts.append(_rect(layer * step, y + 10, step - min(3, step / 5), 26, style))
        y += 70
    style = (
        f".ink{{fill:currentColor}}.accent{{fill:{ACCENT}}}.faint{{fill:currentColor;opacity:.1}}"
        "text{font:13px system-ui,sans-serif;fill:currentColor}.strong{font-weight:600}"
    )
    return f'<svg viewBox="0 0 720 {y - 24}"><style>{style}</style>{"".join(parts)}</svg>'


def _mask(x: float, style: str, name: str, words: list[str], *, window: int) -> list[str]:
    """Ten tokens: a row for each that reads, a column for each that may be read."""
    cells = [(i, j) for i in range(10) for j in range(10)]
    parts = [_rect(x + 12 * j, 12 * i, 10.5, 10.5, style if 0 <= i - j < window else "faint") for i, j in cells]
    parts.append(f'<text class="strong" x="{x + 136}" y="46">{name}</text>')
    return [*parts, *(f'<text x="{x + 136}" y="{66 + 18 * i}">{word}</text>' for i, word in enumerate(words))]


def _rect(x: float, y: float, width: float, height: float, style: str) -> str:
    return f'<rect class="{style}" x="{x:g}" y="{y:g}" width="{width:.4g}" height="{height:g}"/>'
