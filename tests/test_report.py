"""The report shows what the results say, is self-contained, and loses no result."""

from __future__ import annotations

import io
import json
import os
import re
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from zebra import ZebraError
from zebra.errors import printable
from zebra.report import merge_sources, terminal_tables, write_report
from zebra.report.figures import Figure, plot_positions
from zebra.report.method import method
from zebra.report.page import Section, Table
from zebra.report.page import markdown as markdown_of
from zebra.report.perplexity import positions
from zebra.report.retrieval import retrieval
from zebra.report.series import layer_lists, short_layouts
from zebra.results import Result, read_results

COMMON: dict[str, Any] = {
    "seed": 3,
    "device": "cpu, 2 threads",
    "versions": {"torch": "2.13.0"},
    "commit": "abc123",
}
BUCKETS = ((0, 256), (256, 512), (512, 1024), (0, 1024))


def scores(model: str, layout: str, values: tuple[float, ...], run: str = "demo") -> list[Result]:
    return [
        Result(
            run=run,
            model=model,
            layout=layout,
            task="perplexity-disjoint",
            metric="perplexity",
            value=value,
            length=1024,
            position_from=a,
            position_to=b,
            low=value * 0.9,
            high=value * 1.1,
            n=b - a,
            **COMMON,
        )
        for (a, b), value in zip(BUCKETS, values, strict=True)
    ]


def a_run(run: str = "demo") -> list[Result]:
    results = scores("examples/stories", "full", (4.71, 4.36, 214.25, 30.9), run)
    results += scores("examples/stories", "GLLL:129", (4.72, 4.37, 15.49, 8.7), run)
    results += scores(f"runs/{run}@50", "GLLL:129", (5.01, 4.61, 5.52, 5.2), run)
    results += scores(f"runs/{run}/model", "GLLL:129", (4.77, 4.47, 4.88, 4.81), run)
    common: dict[str, Any] = {"run": run, **COMMON}
    for step in (25, 50, 75, 100):
        results.append(
            Result(
                model=f"runs/{run}@{step}",
                layout="GLLL:129",
                task="train",
                metric="loss",
                value=3 - step / 100,
                n=step * 1024,
                **common,
            )
        )
    for layout, pairs, cached in (("full", 2_624_000, 5120), ("GLLL:129", 1_421_000, 2432)):
        cost: dict[str, Any] = {"model": "examples/stories", "layout": layout, "task": "cost", "length": 1024, **common}
        results.append(Result(metric="layers", value=5, **cost))
        results.append(Result(metric="attention_pairs", value=pairs, **cost))
        results.append(Result(metric="cached_tokens", value=cached, **cost))
    return results


def page(results: list[Result], where: Path, **arguments: Any) -> tuple[str, str]:
    write_report(results, where / "report.html", **arguments)
    return (where / "report.html").read_text(), (where / "report.md").read_text()


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.words.append("" if tag == "a" else " ")
        if tag not in ("meta", "path", "use", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self.words.append("" if tag == "a" else " ")
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)


def words(html: str) -> str:
    parser = _Text()
    parser.feed(html)
    return re.sub(r"\s+", " ", "".join(parser.words))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the page of `a_run`."""
    directory = tmp_path_factory.mktemp("demo")
    page(a_run(), directory)
    return directory


def test_many_series_are_rows_with_a_column_for_each_span() -> None:
    def table_of(results: list[Result]) -> list[list[str]]:
        (shown,) = [block for block in positions(results).blocks if isinstance(block, Table)]
        return [[cell.text for cell in row] for row in (shown.head, *shown.body)]

    layouts = ("full", "GL:8", "GL:16", "GLLL:8")
    few = [one for layout in layouts for one in scores("m", layout, (1.0, 2.0, 3.0, 4.0))]
    trained = scores("runs/demo/model", "GL:8", (0.5, 1.0, 1.5, 2.0))
    by_position, by_series = table_of(few), table_of([*few, *trained])
    assert [row[0] for row in by_series] == ["model", *["m"] * 4, "demo (trained)", "change", "tokens"]
    assert [row[:5] for row in zip(*by_series[:5], strict=True)][1:] == [tuple(row[:5]) for row in by_position[1:]]
    assert by_series[5] == ["demo (trained)", "0.50", "1.00", "1.50", "2.00"]
    assert set(by_series[6][1:]) == {"−50.0\N{NO-BREAK SPACE}%"}


def test_the_method_says_what_begins_the_windows() -> None:
    common: dict[str, Any] = {"run": "r", "model": "m", "layout": "full", "metric": "perplexity", "value": 2.0}
    for task, begins in (("perplexity-strided", False), ("perplexity-strided-bos-decoded", True)):
        (table,) = method([Result(task=task, **common)]).blocks
        assert isinstance(table, Table)
        (convention,) = [line[1].text for line in table.body if line[0].text == "convention"]
        assert convention.startswith(task.removeprefix("perplexity-") + ": overlapping windows")
        assert ("BOS token" in convention) == begins


def test_the_numbers_of_the_results_stand_on_the_page(demo: Path) -> None:
    html, markdown = (demo / "report.html").read_text(), (demo / "report.md").read_text()
    for text in (words(html), markdown):
        for number in ("214.2", "15.49", "4.88", "4.71", "2,624,000", "1,421,000", "5,120", "2,432"):
            assert number in text
        assert "−97.7" in text  # 4.88 against 214.25
        assert "54" in text  # 1,421,000 of 2,624,000 pairs
        assert "disjoint" in text
        for fact in ("cpu, 2 threads", "torch 2.13.0", "abc123"):
            assert fact in text
    assert "fell from 214.2 to 4.88 at positions 512 to 1,024" in words(html)


def test_the_page_needs_nothing_from_elsewhere(demo: Path) -> None:
    html = (demo / "report.html").read_text()
    assert not re.search(r"https?://", html)
    assert not re.search(r"<(script|link|img|iframe)\b", html)
    assert html.count("<svg") >= 3
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    for reference in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', html):
        assert next(filter(None, reference)) in ids


def test_markdown_names_figures_that_exist(demo: Path) -> None:
    figures = re.findall(r"\]\(([^)]+\.svg)\)", (demo / "report.md").read_text())
    assert figures
    for figure in figures:
        assert (demo / figure).read_text().startswith('<svg xmlns="http://www.w3.org/2000/svg"')


def test_text_is_escaped(tmp_path: Path) -> None:
    html, _ = page(scores("<b>&model", "full", (1, 2, 3, 4)), tmp_path, title="<script>alert(1)</script>")
    assert "<script>" not in html
    assert "<b>" not in html
    assert "&lt;b&gt;&amp;model" in html


def test_sections_without_results_are_left_out(tmp_path: Path) -> None:
    html, _ = page(scores("m", "full", (1.5, 2.5, 3.5, 4.5)), tmp_path)
    assert "Perplexity by position" in html
    for absent in ("Training", "Cost against full attention", "Other results"):
        assert f"<h2>{absent}" not in html


def test_results_that_no_section_understands_are_shown(tmp_path: Path) -> None:
    other = Result(
        run="x", model="m", layout="full", task="passkey", metric="accuracy", value=0.625, depth=0.5, **COMMON
    )
    html, markdown = page([*a_run(), other], tmp_path)
    for text in (html, markdown):
        assert "Other results" in text
        assert "passkey" in text
        assert "0.625" in text


def test_a_second_value_for_one_place_is_not_lost(tmp_path: Path) -> None:
    again = scores("examples/stories", "full", (7.77, 7.78, 7.79, 7.8))
    html, _ = page([*a_run(), *again], tmp_path)
    assert "7.77" in html


def test_several_runs_stand_side_by_side(tmp_path: Path) -> None:
    html, _ = page([*a_run("one"), *a_run("two")], tmp_path)
    text = words(html)
    assert "one: contexts of 1,024 tokens" in text
    assert "two: contexts of 1,024 tokens" in text
    assert "one (trained)" in text
    assert "two (trained)" in text


def test_a_run_without_buckets_stands_beside_one_with_them(tmp_path: Path) -> None:
    whole = [one for one in scores("m", "full", (1.0, 2.0, 3.0, 4.0), "two") if one.position_to == 1024][-1:]
    html, _ = page([*scores("m", "full", (1.0, 2.0, 3.0, 5.0), "one"), *whole], tmp_path)
    assert "two: contexts of 1,024 tokens" in words(html)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e12])
def test_odd_values_make_a_page(tmp_path: Path, value: float) -> None:
    html, _ = page(scores("m", "full", (1.0, value, 3.0, 4.0)), tmp_path)
    assert "</html>" in html


@pytest.mark.parametrize(
    "value", [float("nan"), 1e308, *(pytest.param(v, marks=pytest.mark.full) for v in (float("inf"), -1e308, 0.0))]
)
def test_results_that_are_all_odd_make_a_page(tmp_path: Path, value: float) -> None:
    write_report([replace(result, value=value, low=value, high=value) for result in a_run()], tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size > 1000


HOSTILE = "\x1b[31m\r\x00\udcff <script>alert(1)</script> [x](javascript:alert(1)) 模型"


def test_text_of_results_is_shown_and_does_nothing(tmp_path: Path) -> None:
    """No target of a link, no element, no control character comes from the text of a file."""
    columns = ("run", "model", "device", "commit")
    results = [replace(one, **{name: f"{HOSTILE}{getattr(one, name)}" for name in columns}) for one in a_run()]
    html, markdown = page(merge_sources({"a": results}), tmp_path, title=HOSTILE)
    assert set(re.findall(r'href="(.)', html)) == {"#"}
    assert "<script" not in html + markdown
    assert "](javascript" not in re.sub(r"\\.", "", markdown)
    assert printable(html + markdown) == html + markdown
    assert "模型" in html
    figures = [*tmp_path.glob("*.svg")]
    assert figures
    for figure in figures:
        ElementTree.parse(figure)
    section = Section(HOSTILE, ["text"])
    assert "\\[x\\](javascript" in markdown_of("stem", "title", [], [section])


def measured_selection(**changes: Any) -> list[Result]:
    kinds = ("source-layers", "source-loss", "source-held_out_loss", "candidate-rise", "stride-held_out_rise")
    results = []
    for kind in (*kinds, "once-held_out_rise"):
        part, metric = kind.split("-")
        columns: dict[str, Any] = {"run": "r", "model": "m", "task": f"selection-{part}-text", "metric": metric}
        columns |= {"layout": "full" if part == "source" else "0:8", "length": 64, "seed": 0, "n": 9, "value": 2.0}
        results.append(Result(**columns | changes))
    return results


@pytest.mark.parametrize("value", [0, -1, 1e308, float("nan"), float("inf"), 10**300])
def test_odd_values_of_a_selection_make_a_page(tmp_path: Path, value: float) -> None:
    write_report(measured_selection(value=value, low=value, high=value), tmp_path / "page.html")
    write_report(measured_selection(layout="no layout"), tmp_path / "page.html")


@pytest.mark.parametrize(
    ("column", "value"),
    [("value", 10**400), ("low", -(10**400)), ("length", -1), ("n", 2**63), ("position_from", -1), ("depth", 2)],
)
def test_numbers_that_no_column_can_have_are_refused_with_their_line(tmp_path: Path, column: str, value: int) -> None:
    line = json.loads(a_run()[0].json()) | {column: value}
    (tmp_path / "results.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(ZebraError, match=f"line 1 is not a result: the column {column} cannot be"):
        read_results(tmp_path / "results.jsonl")


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ZebraError, match="at least one result; got 0"):
        write_report([], tmp_path / "report.html")
    with pytest.raises(ZebraError, match=r"report\.html"):
        write_report(a_run(), tmp_path / "report.pdf")
    assert list(tmp_path.iterdir()) == []


def test_a_kill_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = scores("m", "full", (1, 2, 3, 4))
    page(results, tmp_path)
    before = (tmp_path / "report.html").read_text()

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        write_report(results[:2], tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == before


def test_the_table_fits_the_terminal() -> None:
    console = Console(width=100, file=io.StringIO())
    console.print(*terminal_tables(a_run()))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 100
    for part in ("stories", "demo (trained)", "full", "GLLL:129", "214.2", "4.88", "−97.7"):
        assert part in shown
    assert "@50" not in shown


def test_a_narrow_terminal_cuts_no_number() -> None:
    """So does a pipe, which has 80 characters: intervals and counts ended in dots."""
    layouts = ("full", "GLLL:1024", "GL:1024", "LLLG:512")
    console = Console(width=60, file=io.StringIO())
    console.print(*terminal_tables([one for layout in layouts for one in scores("m", layout, (5.0, 6.0, 7.0, 8.0))]))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 60


def retrieved(layout: str, task: str = "retrieval-generate-passkey", **columns: Any) -> Result:
    defaults = {"length": 4096, "depth": 0.5, "value": 0.75, "low": 0.5, "high": 0.9, "n": 20} | columns
    return Result(run="grid", model="models/m", layout=layout, task=task, metric="accuracy", **COMMON | defaults)


def test_retrieval_is_a_heat_map_and_a_table(tmp_path: Path) -> None:
    results = [
        retrieved(layout, length=length, depth=depth, value=value)
        for layout in ("full", "GLLL:512 <&>")
        for length, depth, value in ((4096, 0, 0.25), (4096, 1, 1.0), (16384, 0, float("nan")))
    ]
    results += [
        retrieved("full", "retrieval-likelihood-common-words-in-text", depth=None, length=100 * i) for i in range(1, 31)
    ]
    html, markdown = page(results, tmp_path)
    assert "passkey, by generation: answers found, by length and depth" in html
    assert "common-words in own text, by likelihood" in html
    assert "Wilson" in html
    assert "Other results" not in html
    figure = (tmp_path / "report-retrieval-1.svg").read_text()
    opacity = re.findall(r"fill: #e2571e; fill-opacity: ([\d.]+)", figure)
    assert opacity == ["0.25", "0.25"]  # 1 is opaque, what is no number is not filled
    titles = re.findall(r"<a href=\"#result-\d+\"><title>([^<]+)</title>", html)
    assert titles[0] == "metric accuracy, value 0.25, low 0.5, high 0.9, length 4096, depth 0, n 20"
    assert "GLLL:512 &lt;&amp;&gt;" in figure
    lines = [line for line in markdown.splitlines() if " | 0 | " in line]
    assert lines[0] == "| full | 0 | 25\N{NO-BREAK SPACE}% (50–90) | – |"
    assert lines[1].startswith("| GLLL:512 &lt;&amp;&gt; | 0 |")


def test_a_long_layout_is_shortened_where_no_other_is_shortened_alike() -> None:
    chosen, other = "7,13,14,15,26:1024", "7,12,14,15,26:1024, self-extend 8:2048"
    assert short_layouts([chosen, "0,4:64", "full"]) == {chosen: "7, … 26:1024", "0,4:64": "0,4:64", "full": "full"}
    assert short_layouts([chosen, other])[other] == "7, … 26:1024, self-extend 8:2048"
    alike = chosen.replace("13", "12")
    assert short_layouts([chosen, alike]) == {chosen: chosen, alike: alike}
    assert layer_lists([chosen, f"{chosen}, self-extend 8:2048", "GL:64"]) == ["7, … 26: 7,13,14,15,26"]


def test_the_page_has_the_layers_of_a_layout_that_it_shortens(tmp_path: Path) -> None:
    _, text = page(scores("m", "7,13,14,15,26:64", (2.0, 2.0, 2.0, 2.0)), tmp_path)
    assert "7, … 26:64" in text
    assert "| layers | 7, … 26: 7,13,14,15,26 |" in text


def test_a_logarithmic_axis_says_so_and_has_ticks_within_a_decade() -> None:
    results = scores("m", "full", (24.0, 26.0, 110.0, 30.0))
    svg = Figure("test", [partial(plot_positions, results=results)]).svg
    assert "log scale" in svg
    ticks = {int(text) for text in re.findall(r">(\d+)</text>", svg)}
    assert {25, 30, 40, 60, 100} <= ticks


def test_retrieval_of_one_cell_is_a_table_alone(tmp_path: Path) -> None:
    one = retrieved("full", n=1)
    assert [type(block) for block in retrieval([one]).blocks] == [str, Table]
    assert "1 sample a cell" in page([one], tmp_path)[1]
    assert Figure in [type(block) for block in retrieval([one, replace(one, depth=0.9)]).blocks]


def test_a_second_seed_is_shown_and_not_lost(tmp_path: Path) -> None:
    html, _ = page([retrieved("full"), retrieved("full", seed=9, value=0.125)], tmp_path)
    assert "Other results" in html
    assert "0.125" in html


def test_the_terminal_has_retrieval_by_length_and_depth() -> None:
    results = [retrieved("full", length=length, depth=depth) for length in (4096, 8192) for depth in (0.0, 1.0)]
    out = io.StringIO()
    Console(file=out, width=120).print(*terminal_tables(results))
    shown = out.getvalue()
    assert "8,192" in shown
    assert shown.count("75\N{NO-BREAK SPACE}%") == 4


def test_tuning_is_a_loss_for_each_suite_and_what_it_was_tuned_on(tmp_path: Path) -> None:
    def result(task: str, model: str, value: float, **columns: Any) -> Result:
        columns = {"metric": "answer_loss", "low": value - 0.1, "high": value + 0.1, "n": 1234, "length": 512} | columns
        return Result(run="t", model=model, layout="GLLL:9", task=task, value=value, **columns)

    results = [
        *(result("answers-short", "m", 4.56), result("answers-long", "m", 3.45)),
        *(result("answers-short", "t@5", 4.12), result("answers-long", "t@5", 3.21)),
        *(result("answers-short", "runs/t/model", 4.01), result("answers-long", "runs/t/model", 3.67)),
    ]
    for kind, low, samples, tokens in (("qa", 256, 30, 9_000), ("short", 0, 70, 1_000)):
        at = {"position_from": low, "position_to": 512, "low": None, "high": None, "n": samples}
        for metric, value in (("samples", samples), ("tokens", tokens), ("answer_tokens", tokens / 4)):
            results.append(result(f"instructions-{kind}", "m", value, metric=metric, **at))
    html, markdown = page(results, tmp_path)
    text = words(html)
    assert "The loss on short answers fell from 4.56 to 4.01, on long answers rose from 3.45 to 3.67." in text
    for number in ("4.12", "3.21", "1,234 tokens", "step 5", "9,000", "90 %", "25 %", "70 %"):
        assert number in text, number
    assert "report-answers.svg" in markdown
    assert "report-instructions-1.svg" in markdown
    shown = io.StringIO()
    Console(file=shown, width=80).print(*terminal_tables(results))
    assert "3.67" in shown.getvalue()
