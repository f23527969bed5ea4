"""Runs side by side, and how far each keeps what it can do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from zebra.report import merge_sources, write_report
from zebra.report.compare import compare
from zebra.report.figures import Figure
from zebra.report.lengths import effective, lengths, measures, score
from zebra.report.page import Table
from zebra.report.series import Series, labels
from zebra.results import Result, read_results, write_results


def result(run: str = "one", layout: str = "full", **columns: Any) -> Result:
    defaults = {"task": "harness-zebra-needle", "metric": "accuracy", "value": 0.5, "length": 1024, "n": 100}
    return Result(run=run, model="m", layout=layout, **defaults | columns)


@pytest.mark.parametrize(
    ("scores", "reached"),
    [
        ({1024: 1.0, 2048: 0.857, 4096: 0.856}, 2048),
        ({1024: 0.8, 2048: 1.0}, None),
        ({4096: 0.9, 1024: 0.9, 2048: 0.2}, 1024),
        ({}, None),
    ],
)
def test_the_effective_length_ends_where_a_score_falls_below(scores: dict[int, float], reached: int | None) -> None:
    assert effective(scores) == reached


def test_a_score_by_length_is_the_mean_over_tasks_and_depths() -> None:
    results = [
        result(task=f"retrieval-generate-{task}", length=length, depth=depth, value=value)
        for length in (1024, 2048)
        for task, values in (("passkey", (1.0, 0.5)), ("needle", (0.25, 0.75)))
        for depth, value in zip((0.0, 1.0), values, strict=True)
    ]
    results += [result(task="retrieval-generate-passkey", length=4096, depth=0.0, value=1.0)]  # another mix of tasks
    results += [result(task="retrieval-likelihood-passkey", depth=0.0)]  # one length alone
    results += [result(value=0.9), result(length=2048, value=0.1), result(metric="acc", length=2048)]
    scores = {
        name: {length: score(here) for length, here in next(iter(by_series.values())).items()}
        for name, by_series in measures(results).items()
    }
    assert scores == {
        "retrieval, by generation, mean of needle, passkey": {1024: 0.625, 2048: 0.625},
        "needle, by generation": {1024: 0.5, 2048: 0.5},
        "passkey, by generation": {1024: 0.75, 2048: 0.75, 4096: 1.0},
        "zebra-needle": {1024: 0.9, 2048: 0.1},
    }
    section = lengths(results)
    tables = [block for block in section.blocks if isinstance(block, Table)]
    assert [[line[1].text for line in table.body] for table in tables] == [["none", "none", "none", "1,024"]]
    assert sum(isinstance(block, Figure) for block in section.blocks) == 1  # of a single model
    another = lengths([*results, *(replace(one, layout="GL:8") for one in results)])
    tables = [block for block in another.blocks if isinstance(block, Table)]
    assert [[line[0].text for line in table.body] for table in tables] == [["full", "GL:8"]] * 4
    assert lengths([result()]).blocks == []


def test_runs_of_one_name_are_told_apart_by_their_source() -> None:
    merged = merge_sources({"a": [result(), result("two")], "b": [result()]})
    assert [one.run for one in merged] == ["one (a)", "two", "one (b)"]
    merged = merge_sources({"runs/lr-0.1": [result()], "other.jsonl": [result()]})
    assert [one.run for one in merged] == ["one (lr-0.1)", "one (other)"]


def test_lines_of_one_name_are_told_apart() -> None:
    def of(*series: tuple[str, str, str]) -> list[str]:
        return list(labels(Series(*one) for one in series).values())

    assert of(("r", "m", "full"), ("r", "m", "GL:8")) == ["full", "GL:8"]
    assert of(("r", "m", "full"), ("r", "n", "full")) == ["m full", "n full"]
    assert of(("r", "runs/r/model", "GL:8"), ("s", "m", "GL:8")) == ["r (trained) GL:8", "s: m GL:8"]
    assert of(("r", "a/m", "full"), ("r", "b/m", "full")) == ["r: a/m full", "r: b/m full"]


def texts(table: Table) -> list[list[str]]:
    return [[f"{cell.text}|{cell.dim}" for cell in line] for line in table.body]


def test_what_two_runs_have_stands_side_by_side_with_its_change() -> None:
    results = [
        result(length=2048, value=0.7, low=0.6, high=0.8),
        result(value=0.9, low=0.85, high=0.95),
        result("two", "GL:8", value=0.5, low=0.4, high=0.6),
        result("two", "GL:8", length=2048, value=0.75, low=0.65, high=0.85),
        result(task="perplexity-disjoint", metric="perplexity", value=8.0, position_from=0, position_to=1024),
        result(task="perplexity-disjoint", metric="perplexity", value=9.0, position_from=0, position_to=256),
        result("two", task="perplexity-disjoint", metric="perplexity", value=6.5, position_from=0, position_to=1024),
        result("two", task="only-here"),
    ]
    _, needle, perplexity = compare(results).blocks
    assert isinstance(needle, Table)
    assert isinstance(perplexity, Table)
    assert needle.title == "zebra-needle"
    assert texts(needle) == [
        ["accuracy|1,024", "90.0\u00a0%|85.0–95.0", "50.0\u00a0%|40.0–60.0", "−40.0\u00a0%|"],
        ["accuracy|2,048", "70.0\u00a0%|60.0–80.0", "75.0\u00a0%|65.0–85.0", "+5.0\u00a0%|overlap"],
    ]
    assert texts(perplexity) == [["perplexity|1,024", "8.00|", "6.50|", "−1.5|"]]
    assert compare(results[:2]).blocks == []
    versioned = [replace(one, model="models/m@v2") for one in results]  # a path, and no step of a training
    assert len(compare(versioned).blocks) == 3


def test_the_page_of_two_runs(tmp_path: Path) -> None:
    for name, value in (("a", 0.9), ("b", 0.6)):
        write_results(tmp_path / name / "results.jsonl", [result(length=length, value=value) for length in (512, 1024)])

    results = merge_sources({name: read_results(tmp_path / name / "results.jsonl") for name in ("a", "b")})
    write_report(results, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    for words in ("Side by side", "By length", "one (a)", "one (b)", "−30.0\u00a0%"):
        assert words in page
    assert (tmp_path / "page-lengths-1.svg").is_file()
    write_report([one for one in results if one.run == "one (a)"], tmp_path / "alone.html")
    assert "Side by side" not in (tmp_path / "alone.html").read_text()
