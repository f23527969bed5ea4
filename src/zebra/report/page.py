"""What a page is made of, and its two renderings: a self-contained HTML file, and Markdown with figures beside it."""

from __future__ import annotations

import html as markup
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import quote

from zebra.report.figures import ACCENT
from zebra.report.links import Links
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


class Figure(NamedTuple):
    """An SVG element; its name is part of its file's.

    Its results are what it draws: a part of it that stands inside `<a href="@2">` links to the third of them.
    """

    name: str
    svg: str
    caption: str
    results: Sequence[Result] = ()


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


_CSS = f"""
:root {{ color-scheme: light dark; --paper: #fff; --ink: #1b1b1b; --pale: #6b6b6b; --line: #dedede; --stripe: #f5f5f4;
  --accent: {ACCENT} }}
@media (prefers-color-scheme: dark) {{ :root {{ --paper: #151515; --ink: #e8e8e8; --pale: #9c9c9c; --line: #353535;
  --stripe: #1e1e1e }} }}
* {{ box-sizing: border-box }}
body {{ margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.6 system-ui, sans-serif }}
body::before {{ content: ""; display: block; height: 14px; background: repeating-linear-gradient(90deg,
  var(--ink) 0 22px, transparent 22px 34px, var(--ink) 34px 40px, transparent 40px 58px, var(--ink) 58px 72px,
  transparent 72px 80px) }}
main {{ max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 5rem }}
h1 {{ font-size: 2.1rem; line-height: 1.2; letter-spacing: -.02em; margin: 0 0 1rem; overflow-wrap: anywhere }}
h2 {{ font-size: 1.25rem; letter-spacing: -.01em; margin: 3.5rem 0 .75rem }}
p {{ max-width: 42rem; margin: 0 0 1rem }}
.verdict {{ font-size: 1.2rem; line-height: 1.5; border-left: 4px solid var(--accent); padding-left: 1rem }}
figure {{ margin: 1.75rem 0 }}
.wide {{ overflow-x: auto }}
figure svg {{ display: block; width: 100%; min-width: 34rem; height: auto }}
figcaption {{ color: var(--pale); font-size: .85rem; padding: .5rem 0 }}
table {{ border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums }}
th, td {{ padding: .4rem .75rem; text-align: left; vertical-align: top }}
th {{ font-weight: 600; vertical-align: bottom; box-shadow: inset 0 -2px var(--ink) }}
tr {{ background: var(--paper) }}
tbody tr:nth-child(odd) {{ background: var(--stripe) }}
:is(.numeric, #rows table) :is(th, td):first-child {{ position: sticky; left: 0; background: inherit }}
.numeric th:not(:first-child), .numeric td:not(:first-child) {{ text-align: right }}
.numeric td:not(:first-child) {{ white-space: nowrap }}
a {{ color: inherit; text-decoration: underline dotted var(--pale) 1px; text-underline-offset: .2em }}
a:hover, a:focus-visible {{ color: var(--accent); text-decoration: underline solid }}
svg a:hover, svg a:focus-visible {{ outline: 2px solid var(--ink) }}
small {{ display: block; color: var(--pale); font-size: .8rem; font-weight: 400 }}
.bar {{ display: block; height: 8px; margin: .35rem 0 .15rem auto; background: var(--accent) }}
tr:first-child .bar {{ background: var(--ink) }}
.words td:first-child {{ font-weight: 600; white-space: nowrap }}
.words td {{ overflow-wrap: anywhere }}
.numeric td:first-child {{ min-width: 7.25rem }}
.list td, .list th {{ white-space: nowrap; font-size: .8rem; padding: .25rem .6rem }}
figure .list td:nth-child(n+3) {{ white-space: normal; min-width: 9rem }}
summary {{ cursor: pointer; padding: .5rem 0; font-weight: 600 }}
details small {{ display: inline }}
details ol {{ font-size: .9rem; padding-left: 3rem; margin: 0 0 1rem }}
#rows :target {{ background: color-mix(in srgb, var(--accent) 25%, var(--paper)); scroll-margin: 40vh 0 }}
"""


def html(title: str, verdict: Sequence[Line], sections: list[Section], rows: Sequence[Result] = ()) -> str:
    """The page as one HTML file that needs no other."""
    links = Links(rows)
    body = [f"<h1>{markup.escape(title)}</h1>"]
    for line in verdict:
        body.append(f'<p class="verdict">{"".join(_linked(cell.text, cell.results, links) for cell in line)}</p>')
    for section in sections:
        body.append(f"<section>\n<h2>{section.title}</h2>")
        for block in section.blocks:
            if isinstance(block, Table):
                body.append(_html_table(block, links))
            elif isinstance(block, Figure):
                body.append(_html_figure(block, links))
            else:
                body.append(f"<p>{markup.escape(block)}</p>")
        body.append("</section>")
    body.append(links.html())
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{markup.escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def _linked(text: str, rows: Sequence[Result], links: Links) -> str:
    to = links.to(rows)
    return f'<a href="{to}">{markup.escape(text)}</a>' if to and text else markup.escape(text)


def _html_figure(figure: Figure, links: Links) -> str:
    caption = markup.escape(figure.caption)
    svg = re.sub(
        r'<a href="@(\d+)"', lambda found: f'<a href="{links.to([figure.results[int(found[1])]])}"', figure.svg
    )
    role = "group" if "<a " in svg else "img"  # what stands inside an image cannot be reached
    svg = svg.replace("<svg", f'<svg role="{role}" aria-label="{caption}"', 1)
    drawn = f" ({_linked(f'{len(figure.results):,} rows', figure.results, links)})" if len(figure.results) > 1 else ""
    return f'<figure><div class="wide">{svg}</div><figcaption>{caption}{drawn}</figcaption></figure>'


def _html_table(table: Table, links: Links) -> str:
    def cell(tag: str, cell: Cell) -> str:
        bar = "" if cell.share is None else f'<span class="bar" style="width:{100 * cell.share:.4g}%"></span>'
        dim = f"<small>{_linked(cell.dim, cell.dim_results, links)}</small>" if cell.dim else ""
        return f"<{tag}>{_linked(cell.text, cell.results, links)}{bar}{dim}</{tag}>"

    caption = f"<figcaption>{markup.escape(table.title)}</figcaption>" if table.title else ""
    head = "".join(cell("th", found) for found in table.head)
    head = f"<thead><tr>{head}</tr></thead>" if any(found.text for found in table.head) else ""
    body = "\n".join(f"<tr>{''.join(cell('td', found) for found in line)}</tr>" for line in table.body)
    kind = "numeric" if table.numeric else "words" if len(table.head) == 2 else "list"
    table_ = f'<table class="{kind}">{head}<tbody>\n{body}\n</tbody></table>'
    return f'<figure>{caption}<div class="wide">{table_}</div></figure>'


def markdown(stem: str, title: str, verdict: Sequence[Line], sections: list[Section]) -> str:
    """The page as Markdown without its rows, its figures the files `<stem>-<name>.svg`."""
    blocks = [f"# {_escaped(title)}", *(f"**{_escaped(''.join(cell.text for cell in line))}**" for line in verdict)]
    for section in sections:
        blocks.append(f"## {section.title}")
        for block in section.blocks:
            if isinstance(block, Table):
                blocks += [_escaped(block.title)] if block.title else []
                blocks.append(_markdown_table(block))
            elif isinstance(block, Figure):
                blocks.append(f"![{_escaped(block.caption)}]({quote(f'{stem}-{block.name}.svg')})")
            else:
                blocks.append(_escaped(block))
    return "\n\n".join(blocks) + "\n"


def _markdown_table(table: Table) -> str:
    head = [" ".join(filter(None, (_escaped(cell.text), _escaped(cell.dim)))) for cell in table.head]
    body = [[_escaped(f"{c.text} ({c.dim})" if c.dim else c.text) for c in line] for line in table.body]
    rule = ["---", *("---:" if table.numeric else "---" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *body))


def _escaped(text: str) -> str:
    """Text as Markdown shows it unchanged, on one line."""
    return re.sub(r"([\\`*_\[\]|~#$])", r"\\\1", markup.escape(text.replace("\n", " "), quote=False))
