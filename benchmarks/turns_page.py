"""The page docs/results/turns.md, from the results of benchmarks/turns.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from zebra.errors import ZebraError
from zebra.files import atomic_write
from zebra.report import page
from zebra.report.method import method
from zebra.report.page import Cell, Section, Table
from zebra.report.pivot import Show, split, table, value_cell, where
from zebra.report.series import count, percent
from zebra.results import Result

PAGE = Path(__file__).parent.parent / "docs" / "results" / "turns.md"
NAMES = {"conversation": "zebra.Conversation", "serve": "zebra serve", "transformers": "transformers serve"}
"""Of the subjects that are not named as in the results; what follows a hyphen there is the way of loading."""
SPEED = "Seconds to the first token of three turns, and tokens per second after it."
CACHE = (
    "Keys and values, with snapshots, after the third answer, in MiB: planned for so many tokens, and measured. What "
    "grows has room for up to a quarter more. An answer whose text becomes other tokens than it was generated as is "
    "read again; zebra serve then holds both texts. llama-server takes its cells when it starts, for all its context, "
    "and transformers serve keeps nothing."
)
ROUNDING = (
    "In float32 a cached answer equals one that reads the whole conversation anew. In bfloat16 it differs by rounding: "
    "the mean absolute difference of the log-probabilities of all tokens of three greedy answers, beside what bfloat16 "
    "differs from float32 in any case; and the share of the tokens that are the likeliest where all is read anew."
)
_SHORT = partial(value_cell, text=lambda value: f"{value:,.2f}" if value < 10 else f"{value:,.1f}")
_MEBIBYTES = partial(value_cell, text=lambda value: f"{value / 2**20:,.1f}")
_SMALL = partial(value_cell, text=lambda value: f"{value:.4f}")
_PERCENT = partial(value_cell, text=percent)
_COUNT = partial(value_cell, text=count)
"""What cells show of results."""
GOAL = 1.2
"""The second answer of zebra serve begins after at most so many times llama-server's seconds."""


def write_page(results: Sequence[Result]) -> None:
    """Write the page.

    Raises:
        ZebraError: no results.
    """
    if not results:
        raise ZebraError("there are no results of turns. Measure first: python benchmarks/turns.py")
    atomic_write(PAGE, markdown(results))


def markdown(results: Sequence[Result]) -> str:
    """The page."""
    timed = [one for one in results if one.run != "rounding"]
    by_length = split(sorted(timed, key=_order), lambda one: one.length or 0)
    sections = [
        Section(f"A document of {length:,} tokens", [SPEED, _speed(here), CACHE, _cache(here)])
        for length, here in by_length.items()
    ]
    sections += [one for one in (_rounding(results), method(results)) if one.blocks]
    return page.markdown("", "Turns of a chat about a document", list(_goal(by_length)), sections)


def _order(result: Result) -> tuple[int, int]:
    """By length, and zebra's subjects before the others'."""
    subject = result.run.partition("-")[0]
    return result.length or 0, [*NAMES].index(subject) if subject in NAMES else len(NAMES)


def _speed(results: Sequence[Result]) -> Table:
    columns = [
        (Cell(f"{unit}, turn {turn}"), where(_SHORT, metric=metric, task=f"turn {turn}"))
        for metric, unit in (("seconds_to_first_token", "first token"), ("tokens_per_second", "tokens/s"))
        for turn in (1, 2, 3)
    ]
    return table("", [Cell("subject"), Cell("layout")], _lines(results), columns)


def _cache(results: Sequence[Result]) -> Table:
    columns: list[tuple[Cell, Show]] = [
        (Cell("planned"), where(_MEBIBYTES, metric="planned_cache_bytes")),
        (Cell("measured"), where(_MEBIBYTES, metric="cache_bytes")),
        (Cell("cached tokens of turn 2"), where(_COUNT, metric="cached_tokens", task="turn 2")),
        (Cell("of"), where(_COUNT, metric="prompt_tokens", task="turn 2")),
    ]
    return table("", [Cell("subject"), Cell("layout")], _lines(results), columns)


def _rounding(results: Sequence[Result]) -> Section:
    here = split((one for one in results if one.run == "rounding"), lambda one: one.length or 0)
    columns: list[tuple[Cell, Show]] = [
        (Cell("cached beside read anew"), where(_SMALL, metric="cached_difference")),
        (Cell("bfloat16 beside float32"), where(_SMALL, metric="dtype_difference")),
        (Cell("likeliest when read anew"), where(_PERCENT, metric="likeliest_share")),
        (Cell("tokens"), lambda ones: Cell(f"{ones[0].n:,}")),
    ]
    lines = [([Cell(f"{length:,} tokens")], ones) for length, ones in here.items()]
    return Section("Rounding", [ROUNDING, table("", [Cell("document")], lines, columns)] if lines else [])


def _lines(results: Sequence[Result]) -> Iterator[tuple[list[Cell], list[Result]]]:
    for run, here in split(results, lambda one: one.run).items():
        name = run if run == "llama-server" else NAMES[run.partition("-")[0]]
        yield [Cell(name), Cell(here[0].layout)], here


def _goal(by_length: Mapping[int, Sequence[Result]]) -> Iterator[list[Cell]]:
    """At each length the second turn of the first layout that is served, beside llama-server's."""
    for length, results in by_length.items():
        seconds = {
            one.run: one.value for one in results if (one.metric, one.task) == ("seconds_to_first_token", "turn 2")
        }
        if {"serve", "llama-server"} <= seconds.keys():
            ratio = seconds["serve"] / seconds["llama-server"]
            verdict = "reached" if ratio <= GOAL else "not reached"
            yield [
                Cell(
                    f"{length:,} tokens: the second answer of zebra serve begins after {seconds['serve']:.2f} s, of "
                    f"llama-server after {seconds['llama-server']:.2f} s: {ratio:.2f} times. The goal of {GOAL} is "
                    f"{verdict}."
                )
            ]
