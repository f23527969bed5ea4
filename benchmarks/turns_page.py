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
SETUP = (
    "SmolLM2-135M-Instruct, trained on 8,192 tokens, answers three questions about a document, greedily, with at most "
    "64 tokens each. At 16,384 tokens zebra adds YaRN or Self-Extend. transformers serve and llama-server run the "
    "model unchanged, which cannot read that length: there compare only their times. Reproduce: python "
    "benchmarks/turns.py."
)
CACHE = (
    "The KV cache, with snapshots, is that after the third answer: planned for its number of tokens, and measured. "
    "Buffers that grow have room for up to a quarter more. Cached tokens are those that were not read again. If the "
    "text of an answer has other tokens than were generated, it is read again, and zebra serve then holds both "
    "versions. llama-server allocates its whole context when it starts; transformers serve keeps no cache."
)
ROUNDING = (
    "In float32 a cached answer equals one after reading the whole conversation again. In bfloat16 it differs by "
    "rounding. The first two columns are mean absolute differences of log-probabilities, over all tokens of three "
    "greedy answers. The third is the share of these tokens that are still the likeliest after reading all again."
)
SPEED_TITLE = "Seconds to the first token, and tokens per second after it"
CACHE_TITLE = "KV cache in MiB, and its tokens"
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
    sections = [Section("What was measured", [SETUP, CACHE])] + [
        Section(f"A document of {length:,} tokens", [_speed(here), _cache(here)]) for length, here in by_length.items()
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
    return table(SPEED_TITLE, [Cell("subject"), Cell("layout")], _lines(results), columns)


def _cache(results: Sequence[Result]) -> Table:
    columns: list[tuple[Cell, Show]] = [
        (Cell("planned cache"), where(_MEBIBYTES, metric="planned_cache_bytes")),
        (Cell("measured cache"), where(_MEBIBYTES, metric="cache_bytes")),
        (Cell("cached tokens, turn 2"), where(_COUNT, metric="cached_tokens", task="turn 2")),
        (Cell("prompt tokens, turn 2"), where(_COUNT, metric="prompt_tokens", task="turn 2")),
    ]
    return table(CACHE_TITLE, [Cell("subject"), Cell("layout")], _lines(results), columns)


def _rounding(results: Sequence[Result]) -> Section:
    here = split((one for one in results if one.run == "rounding"), lambda one: one.length or 0)
    columns: list[tuple[Cell, Show]] = [
        (Cell("cached vs. read again"), where(_SMALL, metric="cached_difference")),
        (Cell("bfloat16 vs. float32"), where(_SMALL, metric="dtype_difference")),
        (Cell("still the likeliest"), where(_PERCENT, metric="likeliest_share")),
        (Cell("tokens"), lambda ones: Cell(f"{ones[0].n:,}")),
    ]
    lines = [([Cell(f"{length:,} tokens")], ones) for length, ones in here.items()]
    return Section("Rounding", [ROUNDING, table("", [Cell("document")], lines, columns)] if lines else [])


def _lines(results: Sequence[Result]) -> Iterator[tuple[list[Cell], list[Result]]]:
    for run, here in split(results, lambda one: one.run).items():
        name = run if run == "llama-server" else NAMES[run.partition("-")[0]]
        yield [Cell(name), Cell(here[0].layout)], here


def _goal(by_length: Mapping[int, Sequence[Result]]) -> Iterator[list[Cell]]:
    """At each length the second turn of the first layout that is served, compared with llama-server's."""
    for length, results in by_length.items():
        seconds = {
            one.run: one.value for one in results if (one.metric, one.task) == ("seconds_to_first_token", "turn 2")
        }
        if {"serve", "llama-server"} <= seconds.keys():
            ratio = seconds["serve"] / seconds["llama-server"]
            verdict = "met" if ratio <= GOAL else "missed"
            yield [
                Cell(
                    f"{length:,} tokens: the second answer begins after {seconds['serve']:.2f} s with zebra serve and "
                    f"{seconds['llama-server']:.2f} s with llama-server. The ratio is {ratio:.2f}; the goal, at most "
                    f"{GOAL}, is {verdict}."
                )
            ]
