"""What the verbs print: one JSON document, or tables. Imports stand inside: help is quick."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from zebra.data.instructions import InstructionStats
    from zebra.doctor import Serving
    from zebra.generation import Generated
    from zebra.model.verify import Check
    from zebra.pipeline.recipe import Stage
    from zebra.pipeline.run import Done, Planned
    from zebra.plan.devices import Device
    from zebra.results import Result
    from zebra.study.grid import Reckoned
    from zebra.train.dry_run import DryRun


@contextmanager
def quiet_host() -> Iterator[None]:
    """Keep the host's own bars and notes off the terminal; its warnings stay. The models of the study are known."""
    from transformers.utils import logging

    import zebra.study.model  # noqa: F401  # registers them with transformers

    logging.disable_progress_bar()
    yield


@contextmanager
def warnings_as_notes() -> Iterator[None]:
    """Warnings as one line each on stderr."""

    def told(message: Warning | str, *rest: Any, **more: Any) -> None:
        note(f"zebra: {' '.join(str(message).split())}")

    with warnings.catch_warnings():
        warnings.showwarning = told
        yield


def json(tree: Any) -> None:
    """One JSON document on stdout."""
    from zebra.results import to_json

    print(to_json(tree, indent=2))


def note(message: str) -> None:
    """A line that is no result."""
    print(message, file=sys.stderr)


def rows(found: Sequence[Result], as_json: bool, out: Path | None = None) -> None:
    """Rows of results: a table of each kind that is among them. They are appended to a file where there is one."""
    if as_json:
        json({"results": [row.columns() for row in found]})
    else:
        from zebra.report import terminal_tables

        for table in terminal_tables(found):
            _print(table)
    if out is not None:
        from zebra.results import append_results

        append_results(out, found)


def planned(found: Sequence[Planned], device: Device, as_json: bool) -> None:
    """What a pipeline would do."""
    costs = [one.work.cost(device) for one in found]
    if as_json:
        stages = [
            {"stage": one.stage.name, "kind": one.stage.kind, "from": str(one.stage.source or ""), "why": one.why}
            | {"tokens": one.work.tokens, "flops": flops, "seconds": seconds, "memory": one.work.memory}
            | {"facts": one.work.facts}
            for one, (flops, seconds) in zip(found, costs, strict=True)
        ]
        json({"device": device.name, "stages": stages})
        return
    from zebra.plan.sheet import counted, sized, timed

    table = _table("stage", "from", "tokens", "FLOPs", "least time", "memory", "it is")
    for one, (flops, seconds) in zip(found, costs, strict=True):
        work = one.work
        counts = [f"{work.tokens:,}", counted(flops), timed(seconds)] if work.runs else [""] * 3
        memory = sized(work.memory) if work.memory else ""
        source = one.stage.after or (one.stage.source.name if one.stage.source else "")
        table.add_row(_named(one.stage), source, *counts, memory, one.why or "done already")
    for column in table.columns[2:6]:
        column.justify, column.no_wrap = "right", True
    _print(table)
    note(f"time by the ceilings of {device.name}; of trainings the steps alone, without what is measured on their way")


def done(found: Sequence[Done], made: Sequence[Result], as_json: bool) -> None:
    """What a pipeline did, and the rows of its stages."""
    if as_json:
        stages = [
            {"stage": one.stage.name, "kind": one.stage.kind, "why": one.why, "seconds": one.seconds} for one in found
        ]
        json({"stages": stages, "results": [row.columns() for row in made]})
        return
    rows(made, as_json)
    table = _table("stage", "it was", "seconds", "made")
    table.columns[2].justify = "right"
    for one in found:
        stage = one.stage
        page = stage.folder / "report.html"
        left = [str(path) for path in (stage.made, page) if path is not None and path.exists()]
        table.add_row(_named(stage), one.why or "done already", f"{one.seconds:,.1f}", "\n".join(left))
    _print(table)


def _named(stage: Stage) -> str:
    return stage.name if stage.name == stage.kind else f"{stage.name} ({stage.kind})"


def checks(found: Sequence[Check], as_json: bool) -> None:
    """The comparisons of a verification."""
    if as_json:
        json({"checks": [asdict(check) | {"passed": check.passed} for check in found]})
        return
    table = _table("check", "against", "difference", "allowed", "logits of", "")
    for c in found:
        verdict = "[green]equal[/]" if c.passed else "[red bold]DIFFERENT[/]"
        table.add_row(c.name, c.compared, f"{c.difference:.1e}", f"{c.tolerance:.0e}", f"{c.tokens:,} tokens", verdict)
    _print(table)


def instructions(found: Sequence[InstructionStats], as_json: bool) -> None:
    """What instructions were made, kind by kind."""
    if as_json:
        json({"instructions": [one._asdict() for one in found]})
        return
    table = _table("kind", "instructions", "words of the documents", "words of the answer")
    for column in table.columns[1:]:
        column.justify = "right"
    for one in found:
        table.add_row(one.kind, f"{one.instructions:,}", f"{one.document_words:,}", f"{one.answer_words:,}")
    _print(table)


def faults(found: Sequence[tuple[str, str]], of: int, as_json: bool) -> None:
    """The faults of conversations, each with its place."""
    if as_json:
        json({"conversations": of, "faults": [{"fault": name, "where": where} for name, where in found]})
        return
    table = _table("fault", f"of {of:,}", "first of them")
    for name in dict.fromkeys(name for name, _ in found):
        places = [where for other, where in found if other == name]
        table.add_row(name, f"{len(places):,}", places[0])
    _print(table) if found else print(f"{of:,} conversations, no fault")


def dry_run(found: DryRun, as_json: bool) -> None:
    """A recipe reckoned."""
    if as_json:
        json({"facts": found.facts, "memory": found.memory | {"total": found.total}})
        return
    table = _table("recipe", "")
    for name, fact in found.facts.items():
        table.add_row(name, fact)
    _print(table)
    size, unit = (2**30, "GiB") if found.total >= 2**30 else (2**20, "MiB")
    table = _table("memory of one device", unit)
    table.columns[1].justify = "right"
    for part, held in found.memory.items():
        table.add_row(part, f"{held / size:,.2f}")
    table.add_row("[bold]in all[/]", f"[bold]{found.total / size:,.2f}[/]")
    _print(table)


def cells(found: Sequence[Reckoned], as_json: bool) -> None:
    """The cells of a grid."""
    if as_json:
        json({"cells": [asdict(cell) for cell in found]})
        return
    table = _table("cell", "layout", "parameters", "tokens", "attention", "")
    table.columns[0].overflow = "fold"
    for column in table.columns[2:5]:
        column.justify = "right"
    for cell in found:
        shares = f"{cell.parameters:,}", f"{cell.tokens:,}", f"{cell.attention:.1%}"
        table.add_row(cell.cell, cell.layout, *shares, "[green]done[/]" if cell.done else "")
    _print(table)
    todo = [cell for cell in found if not cell.done]
    print(f"{len(found):,} cells, {len(todo):,} to run, {sum(cell.tokens for cell in todo):,} tokens")


def plan(found: dict[str, Any], as_json: bool) -> None:
    """What layouts cost, side by side."""
    if as_json:
        json(found)
        return
    from zebra.plan import sheet

    print(sheet.headline(found))
    for one in sheet.tables(found):
        table = _table(*one.head)
        for column in table.columns[1:]:
            column.justify = "right"
        for line in one.body:
            table.add_row(*line, end_section=line[0].startswith("[bold]"))
        _print(table)
    if "mildest_layout" in found:
        print(f"the layout that meets the budget and gives up the least: {found['mildest_layout'] or 'none of ours'}")


@contextmanager
def writing(wanted: bool) -> Iterator[Callable[[str], None] | None]:
    """Text to stdout as it comes, and nothing else: only a terminal gets a line break behind it, whatever ends it."""
    if not wanted:
        yield None
        return

    def write(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    try:
        yield write
    finally:
        if sys.stdout.isatty():
            write("\n")


def generated(made: Generated, decoding: dict[str, Any], as_json: bool) -> None:
    """What was generated, or, where the text was written already, how long it took."""
    if as_json:
        from zebra.provenance import git_commit, versions

        counts = {"new_tokens": len(made.tokens), "tokens_per_second": made.tokens_per_second}
        json(asdict(made) | counts | {"decoding": decoding, "versions": versions(), "commit": git_commit()})
        return
    rate = made.tokens_per_second
    note(
        f"{made.prompt_tokens:,} tokens of prompt, first token after {made.seconds_to_first_token:.2f} s; "
        f"{len(made.tokens):,} new tokens" + (f", {rate:,.1f} a second" if rate else "") + f", ended by {made.ended}"
    )


def machine(facts: dict[str, str], servings: Sequence[Serving], as_json: bool) -> None:
    """Versions and devices, the kernel that serves each kind of request, and why the others decline."""
    from zebra.doctor import reasons_by_kernel

    reasons = reasons_by_kernel(servings)
    if as_json:
        served = [{"request": s.request, "dtype": s.dtype, "kernel": s.kernel} for s in servings]
        json({"machine": facts, "kernels": served, "declines": reasons})
        return
    table = _table("machine", "")
    for name, value in facts.items():
        table.add_row(name, value)
    _print(table)
    by_request: dict[str, dict[str, str]] = {}
    for serving in servings:
        by_request.setdefault(serving.request, {})[serving.dtype] = serving.kernel
    table = _table("kernel by request", *dict.fromkeys(serving.dtype for serving in servings))
    for request, kernels in by_request.items():
        table.add_row(request, *kernels.values())
    _print(table)
    table = _table("kernel", "declines because")
    for kernel, why in reasons.items():
        table.add_row(kernel, "; ".join(why) or "it serves every request")
    _print(table)


def _table(*columns: str) -> Any:
    from rich import box
    from rich.table import Table

    return Table(*columns, box=box.SIMPLE_HEAD)


def _print(table: Any) -> None:
    from rich.console import Console

    Console().print(table)
