"""The parts of a page, and its two renderings: self-contained HTML, and Markdown with figures in files beside it."""

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
"""Up to this many results behind a number are listed with their values."""
_FIRST = ("value", "metric", "task")
_DESCRIBED = ("metric", "value", "low", "high", "length", "depth", "n")
"""The columns of a result that the tooltip in a figure shows."""


class Cell(NamedTuple):
    """A text, a dimmed note beside it, the length of a bar under it, and the results from which the text comes."""

    text: str
    dim: str = ""
    share: float | None = None  # of the longest bar in its column
    results: Sequence[Result] = ()
    dim_results: Sequence[Result] = ()  # where the note comes from other results


@dataclass(frozen=True)
class Table:
    """A head and rows of cells; `numeric` aligns all columns but the first to the right."""

    title: str
    head: list[Cell]
    body: list[list[Cell]]
    numeric: bool = True


Line = Sequence[Cell]
"""A sentence with numbers in it."""


class Section(NamedTuple):
    """A heading and the blocks under it; a section without blocks is left out of the page."""

    title: str
    blocks: list[str | Table | Figure]


def figures_of(sections: Iterable[Section]) -> list[Figure]:
    """The figures of some sections, in their order."""
    return [block for section in sections for block in section.blocks if isinstance(block, Figure)]


class Chapter(NamedTuple):
    """Results that another package presents on a page: a name for the page's title, a summary and sections."""

    name: str
    summary: Line
    sections: list[Section]
    results: Sequence[Result]


class Links:
    """Where the numbers of a page link to: `#result-17` for one result, `#from-3` for a list of several."""

    def __init__(self, results: Sequence[Result]) -> None:
        self.results = results
        self.several: dict[tuple[int, ...], int] = {}
        """The number of each list, by the places of its results; complete once all numbers of the page are linked."""
        self._place = {id(result): i for i, result in enumerate(results, start=1)}

    def to(self, results: Iterable[Result]) -> str:
        """The address of the results behind a number; empty where none of them is on the page."""
        places = tuple(sorted({self._place[id(result)] for result in results if id(result) in self._place}))
        if len(places) < 2:
            return f"#result-{places[0]}" if places else ""
        return f"#from-{self.several.setdefault(places, len(self.several) + 1)}"

    def named(self, places: tuple[int, ...]) -> list[tuple[int, int, str]]:
        """The results behind a number as (first, last, value): few one by one, many as ranges without a value."""
        if len(places) <= _FEW:
            return [(i, i, number(self.results[i - 1].value)) for i in places]
        spans = [[i for _, i in span] for _, span in groupby(enumerate(places), lambda at: at[1] - at[0])]
        return [(span[0], span[-1], "") for span in spans]


def result_columns(results: Sequence[Result]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Columns as text, by name: the value of each column in which all results agree, and all values of the others."""
    columns = {name.replace("_", " "): [plain(getattr(one, name)) for one in results] for name in (*_FIRST, *COLUMNS)}
    if any(result.origin for result in results):
        origins = [(result.origin or "").rpartition(":") for result in results]
        columns |= {"file": [file for file, _, _ in origins], "line": [line for _, _, line in origins]}
    alike = {name: texts[0] for name, texts in columns.items() if len(results) > 1 and len(set(texts)) == 1}
    different = {name: texts for name, texts in columns.items() if name not in alike}
    return {name: text for name, text in alike.items() if text != "–"}, different


def html(title: str, summary: Sequence[Line], sections: list[Section], results: Sequence[Result] = ()) -> str:
    """Render the page as self-contained HTML; at its end are the results that its numbers link to."""
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
    """The figure's SVG element, with links to results, their tooltips and a description."""

    def link(place: re.Match[str]) -> str:
        result = figure.results[int(place[1])]
        columns = {name: getattr(result, name) for name in _DESCRIBED}
        text = ", ".join(f"{name} {plain(value)}" for name, value in columns.items() if value is not None)
        return f'<a href="{links.to([result])}"><title>{escape(text)}</title>'

    svg = re.sub(r'<a href="@(\d+)">', link, figure.svg)
    role = "group" if "<a " in svg else "img"  # screen readers do not reach links inside an image
    return Markup(svg.replace("<svg", f'<svg role="{role}" aria-label="{escape(figure.caption)}"', 1))


def markdown(stem: str, title: str, summary: Sequence[Line], sections: list[Section]) -> str:
    """Render the page as Markdown without the list of results; its figures are the files `<stem>-<name>.svg`."""
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
    """Escape text so that Markdown shows it unchanged, on one line."""
    return re.sub(r"([\\`*_\[\]|~#$])", r"\\\1", markup.escape(text.replace("\n", " "), quote=False))


def plain(value: Any) -> str:
    """A column's value as text."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {version}" for name, version in value.items())
    return "–" if value is None else f"{value:.9g}" if isinstance(value, float) else str(value)
