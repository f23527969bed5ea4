"""Results as one page: a self-contained HTML file, and the same page in Markdown with its figures beside it.

A page is a list of sections, and a section is prose, tables and figures; HTML, Markdown and the terminal render them.
Results that no section knows are in a plain table at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rich import table as terminal
from rich.text import Text

from zebra.errors import ZebraError, printable
from zebra.files import atomic_write
from zebra.report import (
    answers,
    benches,
    compare,
    layouts,
    lengths,
    method,
    methods,
    page,
    perplexity,
    retrieval,
    selection,
    tasks,
)
from zebra.report.compare import merge_sources
from zebra.report.page import Cell, Chapter, Section, Table
from zebra.report.series import by_kind
from zebra.results import Result

__all__ = ["SECTIONS", "merge_sources", "terminal_table", "terminal_tables", "write_report"]

SECTIONS: dict[str, Callable[[list[Result]], Section]] = {
    "position": perplexity.positions,
    "retrieval": retrieval.retrieval,
    "task": tasks.tasks,
    "selection": selection.selection,
    "answers": answers.answers,
    "bench": benches.benches,
}
"""The section of each kind of measurement (`zebra.report.series.by_kind`), on the page and in the terminal."""


def write_report(
    results: Sequence[Result], html: Path, *, title: str | None = None, chapters: Sequence[Chapter] = ()
) -> None:
    """Write the page to `html`, and beside it the same page in Markdown, whose figures are the files `<stem>-*.svg`.

    Args:
        chapters: parts that other packages made from some of the results; they come first, and the sections of this
            package show the other results.

    Raises:
        ZebraError: no results, or a page whose name does not end in .html or .htm.
    """
    if not results:
        raise ZebraError("a report requires at least one result; got 0. Give a run that has results.")
    if html.suffix not in (".html", ".htm"):
        raise ZebraError(
            f"a report must be an .html or .htm file; got the name {html.name!r}. Write to {html.with_suffix('.html')}."
        )
    in_chapters = {id(result) for chapter in chapters for result in chapter.results}
    rest = [result for result in results if id(result) not in in_chapters]
    runs = dict.fromkeys(result.run for result in rest)
    title = title or ", ".join([*(chapter.name for chapter in chapters), *runs])
    kinds = by_kind(rest)
    summary = [chapter.summary for chapter in chapters]
    for run in runs:
        line = answers.answer_summary(run, kinds["answers"])
        line += perplexity.position_summary(run, kinds["position"], kinds["cost"])
        summary += [[Cell(f"{run}: " if len(runs) > 1 else ""), *line]] if line else []
    summary = methods.method_summaries(rest) or summary
    summary += selection.selection_summaries(kinds["selection"])
    summary = summary or [[Cell(f"{len(results):,}", results=results), Cell(" results.")]]
    parts = [
        *(section for chapter in chapters for section in chapter.sections),
        methods.methods(rest),
        compare.compare(rest),
        layouts.layouts(kinds["cost"]),
        lengths.lengths([*kinds["retrieval"], *kinds["task"]]),
        *(section(kinds[kind]) for kind, section in SECTIONS.items()),
        answers.composition(kinds["instructions"]),
        perplexity.training(kinds["loss"], kinds["position during training"], kinds["position"]),
        layouts.cost(kinds["cost"], kinds["speed"]),
        method.method(results),
        method.others([*kinds["other"], *selection.incomplete(kinds["selection"])]),
    ]
    parts = [section for section in parts if section.blocks]
    for figure in page.figures_of(parts):
        atomic_write(html.with_name(f"{html.stem}-{figure.name}.svg"), printable(figure.standalone))
    atomic_write(html.with_suffix(".md"), printable(page.markdown(html.stem, title, summary, parts)))
    atomic_write(html, printable(page.html(title, summary, parts, results)))


def terminal_tables(results: Iterable[Result]) -> list[terminal.Table]:
    """The tables of all `SECTIONS` for a terminal."""
    kinds = by_kind(results)
    sections = [section(kinds[kind]) for kind, section in SECTIONS.items()]
    return [terminal_table(block) for section in sections for block in section.blocks if isinstance(block, Table)]


def terminal_table(table: Table) -> terminal.Table:
    """A table for a terminal. In a narrow one, cells wrap to the next line, so that no number is cut."""
    shown = terminal.Table(title=Text(table.title), title_justify="left", title_style="", header_style="bold")
    for i, cell in enumerate(table.head):
        head = Text.assemble(cell.text, ("\n" + cell.dim, "dim"))
        shown.add_column(head, justify="right" if i else "left", overflow="fold")
    for line in table.body:
        shown.add_row(*(Text.assemble(cell.text, (f" {cell.dim}" if cell.dim else "", "dim")) for cell in line))
    return shown
