"""What the commands print: one JSON document, or tables. Imports are lazy: help needs no torch.

Text goes to a terminal as `zebra.progress.printable`. A stdout that is not UTF-8 gets escapes, and JSON in ASCII.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from json import dumps, loads
from typing import TYPE_CHECKING, Any

from zebra.errors import printable
from zebra.progress import TextConsole

if TYPE_CHECKING:
    from pathlib import Path

    from rich.text import Text

    from zebra.data.instructions import InstructionStats
    from zebra.doctor import Serving
    from zebra.evaluate.selection import Selection
    from zebra.exports import Exported
    from zebra.generation import Generated
    from zebra.model.verify import Check
    from zebra.results import Result
    from zebra.study.grid import CellEstimate
    from zebra.train.dry_run import DryRun


@contextmanager
def working() -> Iterator[None]:
    """A command at work: a warning is one line on stderr, and transformers knows the models of the study."""
    import zebra.study.model  # noqa: F401

    def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
        note(f"zebra: {' '.join(str(message).split())}")

    with warnings.catch_warnings():
        warnings.showwarning = show_warning
        yield


def json(tree: Any) -> None:
    """One JSON document on stdout."""
    from zebra.results import to_json

    text = to_json(tree, indent=2)
    if sys.stdout and sys.stdout.encoding.lower() != "utf-8":
        text = dumps(loads(text), indent=2)
    print(text)


def line(text: str) -> None:
    """Text on stdout."""
    print(printable(text))


def note(message: str) -> None:
    """A line on stderr, which is no result."""
    print(printable(message), file=sys.stderr)


def results(results: Sequence[Result], as_json: bool, out: Path | None = None) -> None:
    """A table of each kind of result; `out`: a file that they are appended to, before they are printed."""
    try:
        if out is not None:
            from zebra.results import append_results

            append_results(out, results)
    finally:
        if as_json:
            json({"results": _columns(results)})
        else:
            _result_tables(results)


def _columns(results: Sequence[Result]) -> list[dict[str, Any]]:
    return [result.columns() for result in results]


def _result_tables(results: Sequence[Result]) -> None:
    from zebra.report import terminal_tables

    for table in terminal_tables(results):
        _print(table)


def comparison(results: Sequence[Result], out: Path, as_json: bool) -> None:
    """Methods side by side: their tables, what failed, and the advice."""
    if as_json:
        return json({"results": _columns(results)})
    from zebra.report import terminal_table
    from zebra.report.methods import method_tables

    tables, lines = method_tables(results)
    for table in tables:
        _print(terminal_table(table))
    for words in (*lines, f"page {out / 'report.html'}"):
        line(words)


def conversion(converted: dict[str, str], as_json: bool) -> None:
    """What a conversion wrote: its target, class, layout and layers."""
    if as_json:
        return json(converted)
    line("{target}: {class}, {layout}, layers {layers}".format_map(converted))


def export(exported: Exported, as_json: bool) -> None:
    """What an export wrote, and the command that runs it."""
    if as_json:
        return json(exported._asdict())
    line(f"{exported.target}: {exported.layout}. Run it:")
    line(f"  {exported.command}")


def selection(selection: Selection, converted: dict[str, str] | None, as_json: bool) -> None:
    """The layout that was chosen, the results of the choice, and what was converted to it."""
    if as_json:
        return json({"layout": str(selection.stripes), "converted": converted, "results": _columns(selection.results)})
    _result_tables(selection.results)
    line(f"layout {selection.stripes}")
    if converted is not None:
        conversion(converted, as_json)


def stages(states: Sequence[dict[str, Any]], results: Sequence[Result], as_json: bool) -> None:
    """The stages of a pipeline, and their results."""
    if as_json:
        return json({"stages": states, "results": _columns(results)})
    _result_tables(results)
    rows = [
        (row["stage"], row["kind"], row["from"], row["state"], f"{row['seconds']:,.1f}" if row["seconds"] else "")
        for row in states
    ]
    _table(["stage", "kind", "from", "state", "seconds"], rows, numbers=slice(4, None))


def checks(checks: Sequence[Check], as_json: bool) -> None:
    """The comparisons of a verification."""
    if as_json:
        return json({"checks": [asdict(check) | {"passed": check.passed} for check in checks]})
    verdict = {True: _styled("[green]equal[/]"), False: _styled("[red bold]DIFFERENT[/]")}
    _table(
        ["check", "against", "difference", "allowed", "logits of", ""],
        [
            (c.name, c.compared, f"{c.difference:.1e}", f"{c.tolerance:.0e}", f"{c.tokens:,} tokens", verdict[c.passed])
            for c in checks
        ],
    )


def instructions(stats: Sequence[InstructionStats], as_json: bool) -> None:
    """How many instructions were generated of each kind, and their lengths."""
    if as_json:
        return json({"instructions": [kind._asdict() for kind in stats]})
    head = ["kind", "instructions", "words in documents", "words in answers"]
    rows = [(k.kind, f"{k.instructions:,}", f"{k.document_words:,}", f"{k.answer_words:,}") for k in stats]
    _table(head, rows, numbers=slice(1, None))


def faults(faults: Sequence[tuple[str, str]], of: int, as_json: bool) -> None:
    """The faults of `of` conversations, each with its file and line."""
    if as_json:
        return json({"conversations": of, "faults": [{"fault": name, "where": where} for name, where in faults]})
    lines: dict[str, list[str]] = {}
    for name, where in faults:
        lines.setdefault(name, []).append(where)
    if not lines:
        line(f"{of:,} conversations, no faults")
        return
    _table(["fault", f"of {of:,}", "first at"], [(name, f"{len(at):,}", at[0]) for name, at in lines.items()])


def dry_run(estimate: DryRun, as_json: bool) -> None:
    """What a recipe would do, and the memory that it needs."""
    if as_json:
        return json({"facts": estimate.facts, "memory": estimate.memory | {"total": estimate.total}})
    _table(["recipe", ""], estimate.facts.items())
    size, unit = (2**30, "GiB") if estimate.total >= 2**30 else (2**20, "MiB")
    rows: list[tuple[Any, Any]] = [(part, f"{count / size:,.2f}") for part, count in estimate.memory.items()]
    rows.append((_styled("[bold]total[/]"), _styled(f"[bold]{estimate.total / size:,.2f}[/]")))
    _table(["memory of one device", unit], rows, numbers=slice(1, None))


def cells(cells: Sequence[CellEstimate], as_json: bool) -> None:
    """The cells of a grid."""
    if as_json:
        return json({"cells": [asdict(cell) for cell in cells]})
    from zebra.plan.comparison import COUNT, with_unit

    timed = any(cell.hours is not None for cell in cells)
    rows: list[list[str | Text]] = []
    for cell in cells:
        row = [cell.cell, with_unit(cell.parameters, COUNT), with_unit(cell.tokens, COUNT), f"{cell.attention:.1%}"]
        rows.append([*row, *[_hours(cell.hours or 0)] * timed, _styled("[green]done[/]" if cell.done else "")])
    head = ["cell", "parameters", "tokens", "attention", *["hours"] * timed]
    _table([*head, ""], rows, numbers=slice(1, len(head)))
    todo = [cell for cell in cells if not cell.done]
    hours = f", {_hours(sum(cell.hours or 0 for cell in todo))} hours" if timed else ""
    line(f"{len(cells):,} cells, {len(todo):,} to run, {sum(cell.tokens for cell in todo):,} tokens{hours}")


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.2g}"


def plan(tree: dict[str, Any], as_json: bool) -> None:
    """What layouts cost, side by side."""
    if as_json:
        return json(tree)
    from zebra.plan import comparison

    line(comparison.headline(tree))
    for head, body in comparison.tables(tree):
        _table(head, [[*map(_styled, cells)] for cells in body], numbers=slice(1, None))
    if "suggested_layout" in tree:
        layout = tree["suggested_layout"]
        none = "no layout fits: neither full attention nor one of the paper's, strides 2 to 8, windows 512 to 16,384"
        line(f"the layout that meets the budget and keeps the most pairs: {layout}" if layout else none)


def cluster(tree: dict[str, Any], as_json: bool) -> None:
    """The quickest ways for many devices to share a training, and what that rests on."""
    if as_json:
        return json(tree)
    from zebra.plan.cluster import headline, tables

    line(headline(tree))
    head, bodies = tables(tree)
    for layout, body in bodies.items():
        line(f"\n{layout}")
        _table(head, [[*map(_styled, cells)] for cells in body], numbers=slice(2, 7))
    for assumption in tree["assumptions"]:
        line(f"assumed: {assumption}")


@contextmanager
def writing(enabled: bool) -> Iterator[Callable[[str], None] | None]:
    """Text to stdout as it comes, and nothing else; on a terminal, printable text and a line break at its end."""
    if not enabled:
        yield None
        return

    def write(piece: str) -> None:
        sys.stdout.write(printable(piece) if sys.stdout.isatty() else piece)
        sys.stdout.flush()

    try:
        yield write
    finally:
        if sys.stdout.isatty():
            write("\n")


def generated(generated: Generated, decoding: dict[str, Any], as_json: bool) -> None:
    """What was generated; without JSON only how long it took, as the text was printed already."""
    if as_json:
        from zebra.provenance import git_commit, versions

        counts = {"new_tokens": len(generated.tokens), "tokens_per_second": generated.tokens_per_second}
        json(asdict(generated) | counts | {"decoding": decoding, "versions": versions(), "commit": git_commit()})
        return
    rate = generated.tokens_per_second
    note(
        f"{generated.prompt_tokens:,} tokens of prompt, first token after {generated.seconds_to_first_token:.2f} s; "
        f"{len(generated.tokens):,} new tokens"
        + (f", {rate:,.1f} a second" if rate else "")
        + f", ended by {generated.ended}"
    )


def machine(facts: dict[str, str], servings: Sequence[Serving], as_json: bool) -> None:
    """Versions and devices, the kernel that serves each kind of request, and why the others decline."""
    from zebra.doctor import reasons_by_kernel

    reasons = reasons_by_kernel(servings)
    if as_json:
        served = [{"request": s.request, "dtype": s.dtype, "kernel": s.kernel} for s in servings]
        return json({"machine": facts, "kernels": served, "declines": reasons})
    _table(["machine", ""], facts.items())
    by_request: dict[str, dict[str, str]] = {}
    for serving in servings:
        by_request.setdefault(serving.request, {})[serving.dtype] = serving.kernel
    dtypes = dict.fromkeys(serving.dtype for serving in servings)
    _table(["kernel by request", *dtypes], [(request, *kernels.values()) for request, kernels in by_request.items()])
    declines = [("" if i else kernel, reason) for kernel, why in reasons.items() for i, reason in enumerate(why)]
    _table(["kernel", "why it declines some of these requests"], declines)


def _styled(markup: str) -> Text:
    """Text of ours with its styles; other text is printed as it is."""
    from rich.text import Text

    return Text.from_markup(markup)


def _table(head: Sequence[str], rows: Iterable[Sequence[str | Text]], numbers: slice = slice(0)) -> None:
    """Print a table; the columns `numbers` are right-aligned, and a row whose name has a style ends a section."""
    from rich import box
    from rich.table import Table

    table = Table(*head, box=box.SIMPLE_HEAD)
    for column in table.columns:
        column.overflow = "fold"
    for column in table.columns[numbers]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row, end_section=bool(getattr(row[0], "spans", ())))
    _print(table)


def _print(table: Any) -> None:
    TextConsole().print(table)
