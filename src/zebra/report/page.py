"""The parts of a page, and its two renderings: a self-contained HTML file, and Markdown with figures beside it."""

from __future__ import annotations

import html as markup
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import jinja2
from markupsafe import Markup, escape

from zebra.report.figures import ACCENT, Figure
from zebra.report.series import number
from zebra.results import COLUMNS, Result

_FEW = 12
"""Up to so many results behind a number are named with their values."""
_FIRST = ("value", "metric", "task")
_DESCRIBED = ("metric", "value", "low", "high", "length", "depth", "n")
"""What a part of a figure says of its result."""


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


class Section(NamedTuple):
    """A heading and what stands under it; without blocks it is left out."""

    title: str
    blocks: list[str | Table | Figure]


def figures_of(sections: Iterable[Section]) -> list[Figure]:
    """The figures of some sections, in their order."""
    return [block for section in sections for block in section.blocks if isinstance(block, Figure)]


class Chapter(NamedTuple):
    """Results that another package presents on a page: their name in its title, their summary and their sections."""

    name: str
    summary: Line
    sections: list[Section]
    results: Sequence[Result]


class Links:
    """Where the numbers of a page link to: `#result-17` for one result, `#from-3` for a list of several."""

    def __init__(self, results: Sequence[Result]) -> None:
        self.results = results
        self.several: dict[tuple[int, ...], int] = {}
        """Places of results to the number of their list; whole once all numbers of the page are linked."""
        self._place = {id(result): i for i, result in enumerate(results, start=1)}

    def to(self, results: Iterable[Result]) -> str:
        """The address of what a number rests on; empty where that is no result of the page."""
        places = tuple(sorted({self._place[id(result)] for result in results if id(result) in self._place}))
        if len(places) < 2:
            return f"#result-{places[0]}" if places else ""
        return f"#from-{self.several.setdefault(places, len(self.several) + 1)}"

    def named(self, places: tuple[int, ...]) -> list[tuple[int, int, str]]:
        """The results behind a number: a few with their values, many as spans from first to last."""
        if len(places) <= _FEW:
            return [(i, i, number(self.results[i - 1].value)) for i in places]
        spans = [[i for _, i in span] for _, span in groupby(enumerate(places), lambda at: at[1] - at[0])]
        return [(span[0], span[-1], "") for span in spans]


def result_columns(results: Sequence[Result]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Columns as text by name: those in which all results are alike, with their value, and the others."""
    columns = {name.replace("_", " "): [plain(getattr(one, name)) for one in results] for name in (*_FIRST, *COLUMNS)}
    if any(result.origin for result in results):
        origins = [(result.origin or "").rpartition(":") for result in results]
        columns |= {"file": [file for file, _, _ in origins], "line": [line for _, _, line in origins]}
    alike = {name: texts[0] for name, texts in columns.items() if len(results) > 1 and len(set(texts)) == 1}
    different = {name: texts for name, texts in columns.items() if name not in alike}
    return {name: text for name, text in alike.items() if text != "–"}, different


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
        columns = {name: getattr(result, name) for name in _DESCRIBED}
        text = ", ".join(f"{name} {plain(value)}" for name, value in columns.items() if value is not None)
        return f'<a href="{links.to([result])}"><title>{escape(text)}</title>'

    svg = re.sub(r'<a href="@(\d+)">', link, figure.svg)
    role = "group" if "<a " in svg else "img"  # what stands inside an image cannot be reached
    return Markup(svg.replace("<svg", f'<svg role="{role}" aria-label="{escape(figure.caption)}"', 1))


def markdown(stem: str, title: str, summary: Sequence[Line], sections: list[Section]) -> str:
    """The page as Markdown without its list of results, its figures the files `<stem>-<name>.svg`."""
    lines = ["".join(cell.text for cell in line).strip() for line in summary]
    blocks = [f"# {_escaped(title)}", *(f"**{_escaped(line)}**" for line in lines)]
    for section in sections:
        blocks.append(f"## {_escaped(section.title)}")
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


def plain(value: Any) -> str:
    """A column's value as text."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {version}" for name, version in value.items())
    return "–" if value is None else f"{value:.9g}" if isinstance(value, float) else str(value)
