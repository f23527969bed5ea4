"""The parts of a page, and its two renderings: a self-contained HTML file, and Markdown with figures beside it."""

from __future__ import annotations

import html as markup
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import jinja2
from markupsafe import Markup, escape
from matplotlib.axes import Axes

from zebra.report.figures import ACCENT, draw
from zebra.report.links import Links, describe, result_columns
from zebra.results import Result


class Cell(NamedTuple):
    """A word or number, something dim beside it, the share of a bar under it, and the results that it rests on."""

    text: str
    dim: str = ""
    share: float | None = None  # of the longest bar in its column
    results: Sequence[Result] = ()
    dim_results: Sequence[Result] = ()  # where what is dim rests on others


@dataclass(frozen=True)
class Table:
    """Lines of cells under a head."""

    title: str
    head: list[Cell]
    body: list[list[Cell]]
    numeric: bool = True


Line = Sequence[Cell]
"""Prose with numbers in it."""


@dataclass(frozen=True)
class Figure:
    """Plots side by side as one SVG element; the name is part of its file's.

    Attributes:
        results: what it draws: a part of it whose `url` is `@2` links to the third of them.
        height: of a line of panels, in inches.
        columns: panels beside each other; all of them where None.
        widths: of the columns, in proportion.
    """

    name: str
    plots: Sequence[Callable[[Axes], None]]
    caption: str
    results: Sequence[Result] = ()
    height: float = 3.3
    columns: int | None = None
    widths: Sequence[float] | None = None

    @cached_property
    def svg(self) -> str:
        """The element."""
        return draw(self.name, *self.plots, height=self.height, columns=self.columns, widths=self.widths)


class Section(NamedTuple):
    """A heading and what stands under it; without blocks it is left out."""

    title: str
    blocks: list[str | Table | Figure]


class Chapter(NamedTuple):
    """Results that another package presents on a page: their name in its title, their summary and their sections."""

    name: str
    summary: Line
    sections: list[Section]
    results: Sequence[Result]


def html(title: str, summary: Sequence[Line], sections: list[Section], results: Sequence[Result] = ()) -> str:
    """The page as one HTML file that needs no other, at its end the results that its numbers link to."""
    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    alike, different = result_columns(results)
    page = pages.get_template("page.html.jinja").render(
        title=title,
        summary=summary,
        sections=sections,
        links=Links(results),
        alike=alike,
        different=different,
        accent=ACCENT,
        svg=_linked_svg,
        zip=zip,
    )
    return page + "\n"


def _linked_svg(figure: Figure, links: Links) -> Markup:
    """The figure's element, where its parts link to results, and with a description."""

    def link(place: re.Match[str]) -> str:
        result = figure.results[int(place[1])]
        return f'<a href="{links.to([result])}"><title>{escape(describe(result))}</title>'

    svg = re.sub(r'<a href="@(\d+)">', link, figure.svg)
    role = "group" if "<a " in svg else "img"  # what stands inside an image cannot be reached
    return Markup(svg.replace("<svg", f'<svg role="{role}" aria-label="{escape(figure.caption)}"', 1))


def markdown(stem: str, title: str, summary: Sequence[Line], sections: list[Section]) -> str:
    """The page as Markdown without its list of results, its figures the files `<stem>-<name>.svg`."""
    blocks = [f"# {_escaped(title)}", *(f"**{_escaped(''.join(cell.text for cell in line))}**" for line in summary)]
    for section in sections:
        blocks.append(f"## {section.title}")
        for block in section.blocks:
            if isinstance(block, Table):
                head = [_escaped(f"{cell.text} {cell.dim}".strip()) for cell in block.head]
                body = [[_escaped(f"{c.text} ({c.dim})" if c.dim else c.text) for c in line] for line in block.body]
                rule = ["---", *("---:" if block.numeric else "---" for _ in head[1:])]
                blocks += [_escaped(block.title)] if block.title else []
                blocks.append("\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *body)))
            elif isinstance(block, Figure):
                blocks.append(f"![{_escaped(block.caption)}]({quote(f'{stem}-{block.name}.svg')})")
            else:
                blocks.append(_escaped(block))
    return "\n\n".join(blocks) + "\n"


def _escaped(text: str) -> str:
    """Text as Markdown shows it unchanged, on one line."""
    return re.sub(r"([\\`*_\[\]|~#$])", r"\\\1", markup.escape(text.replace("\n", " "), quote=False))
