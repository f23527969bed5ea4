"""Every number of a page links to its result, or to the list of those behind it; a result knows its origin."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from zebra.errors import ZebraError
from zebra.report import merge_sources, write_report
from zebra.report.page import Cell, Links, html, result_columns
from zebra.results import Result, append_results, read_results

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
DEMO, LAYOUTS, TUNED, SPEED = "demo.jsonl", "retrieval-layouts.jsonl", "tiny-lit.jsonl", "cpu.jsonl"


class Piece(NamedTuple):
    """A text of a page, with its place and its link."""

    where: tuple[str, ...]
    column: int
    text: str
    to: str


class _Pieces(HTMLParser):
    """The texts of a page; an element that ends nothing (`<rect/>`) is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.column = 0
        self.pieces: list[Piece] = []
        self.ids: dict[str, list[str]] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("meta", "br"):
            return
        self.column = 0 if tag == "tr" else self.column + (tag in ("td", "th"))
        self.open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        while self.open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not data.strip():
            return
        to = next((attrs.get("href") for tag, attrs in reversed(self.open) if tag == "a"), None) or ""
        where = tuple(filter(None, (name for tag, attrs in self.open for name in (tag, attrs.get("class")))))
        self.pieces.append(Piece(where, self.column, data, to))
        for _, attrs in self.open:
            if name := attrs.get("id"):
                self.ids.setdefault(name, []).append(data)


def pieces(html: Path) -> tuple[list[Piece], dict[str, list[str]]]:
    parser = _Pieces()
    parser.feed(html.read_text())
    return parser.pieces, parser.ids


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Result]]:
    results = merge_sources({name: read_results(RESULTS / name) for name in (DEMO, LAYOUTS, TUNED, SPEED)})
    html = tmp_path_factory.mktemp("page") / "report.html"
    write_report(results, html)
    return html, results


def values(texts: list[Piece]) -> list[Piece]:
    """The cells of tables of numbers, without the first column, which has the row's name."""
    return [one for one in texts if "numeric" in one.where and "tbody" in one.where and one.column > 1]


def test_every_number_of_a_table_is_a_link_to_what_is_there(page: tuple[Path, list[Result]]) -> None:
    texts, ids = pieces(page[0])
    numbers = [one for one in values(texts) if re.fullmatch(r"[+−]?\d[\d,.]*(e\+\d+)?(×|\xa0%)?", one.text)]
    assert len(numbers) > 700
    unlinked = {one.text for one in numbers if not one.to and "small" not in one.where}
    assert unlinked <= {"0", "0.5", "1"}  # depths, and kinds of instructions that no result has
    assert {one.to.removeprefix("#") for one in texts if one.to} <= set(ids)


def numbers_of(result: Result) -> list[float]:
    """The numbers that a page may show for a result, in the units of pages."""
    return [result.n or 0, *(result.value * unit for unit in (1, 100, 2**-20, 2**-30, 1e-9))]


def test_a_number_is_that_of_its_result(page: tuple[Path, list[Result]]) -> None:
    texts, _ = pieces(page[0])
    checked = 0
    for one in values(texts):
        link = re.fullmatch(r"#result-(\d+)", one.to)
        number = re.match(r"[+−]?[\d,]+(\.\d+)?(e\+\d+)?", one.text)
        if link is None or number is None:
            continue
        result = page[1][int(link[1]) - 1]
        shown = float(number[0].replace(",", "").replace("−", "-"))
        decimals = len(number[1] or ".") - 1
        tolerance = max(0.5000001 * 10**-decimals, 0.005 * abs(shown))
        near = any(abs(value - shown) <= tolerance for value in numbers_of(result))
        layers = result.task.startswith("selection-") and shown == int(shown)
        first = result.task.startswith("bench ") and one.text == "1.00"  # times the first
        assert near or layers or first, (one, result)
        checked += 1
    assert checked > 500


def test_a_cell_of_a_heat_map_is_a_link_to_its_result(page: tuple[Path, list[Result]]) -> None:
    html, results = page
    pattern = r'<a href="#result-(\d+)"><title>metric accuracy, value ([\d.]+), .*?length (\d+), depth ([\d.]+), n \d+<'
    cells = re.findall(pattern, html.read_text())
    assert len(cells) == sum(result.task.startswith("retrieval-") for result in results)
    for place, share, length, depth in cells:
        result = results[int(place) - 1]
        assert (result.value, result.length, result.depth) == (float(share), int(length), float(depth))
    assert "<a" not in html.with_name("report-retrieval-1.svg").read_text()


def test_a_number_of_several_results_names_them(page: tuple[Path, list[Result]]) -> None:
    texts, ids = pieces(page[0])
    (change,) = {one.to for one in texts if one.text == "−97.8\xa0%"}
    assert " ".join(map(str.strip, ids[change.removeprefix("#")])) == "result 5 213.7 , result 97 4.63"
    effective = {one.to for one in values(texts) if one.text == "2,048" and one.to}
    assert effective
    for to in effective:
        named = [int(text.removeprefix("result ")) for text in ids[to.removeprefix("#")] if text.startswith("result ")]
        results = [page[1][place - 1] for place in named]
        assert {(one.task, one.length) for one in results} == {("retrieval-generate-passkey", n) for n in (1024, 2048)}
        assert len({one.layout for one in results}) == 1
        assert len(results) == 6


def test_a_result_stands_on_the_page_whole(page: tuple[Path, list[Result]]) -> None:
    _, ids = pieces(page[0])
    assert sum(name.startswith("result-") for name in ids) == len(page[1])
    line = ids["result-5"]
    assert line[0] == "5"
    for column in ("213.740858", "perplexity-disjoint", "examples/stories260K", "84486", "b4978d394e98"):
        assert column in line
    assert line[-2].endswith(DEMO)
    assert line[-1] == "5"


def result(**columns: Any) -> Result:
    defaults = {"run": "r", "model": "m", "layout": "full", "task": "t", "metric": "m", "value": 1.0}
    return Result(**defaults | columns)


def test_what_all_results_share_is_shown_once() -> None:
    alike, different = result_columns([result(metric=f"m{i}", value=i, commit="abc", seed=7) for i in range(2)])
    assert (alike["commit"], alike["seed"], different["metric"]) == ("abc", "7", ["m0", "m1"])
    assert "seed" not in different
    assert 'id="results"' not in html("t", [], [])


def test_lists_of_many_results_are_spans() -> None:
    results = [result(value=i, n=i) for i in range(30)]
    links = Links(results)
    assert links.to([]) == links.to([result()]) == ""
    assert links.to([results[3], results[3]]) == "#result-4"
    assert links.to(results[:13] + results[20:21]) == links.to(results[20:21] + results[:13]) == "#from-1"
    assert [links.named(places) for places in links.several] == [[(1, 13, ""), (21, 21, "")]]
    page = html("t", [[Cell("x", results=results[:13])]], [], results)
    assert re.sub("<[^>]+>", "", re.search(r'<li id="from-1">.*', page)[0]) == "result 1–13"  # type: ignore[index]


def test_a_result_keeps_the_file_and_line_that_it_was_read_from(tmp_path: Path) -> None:
    one = result()
    path = tmp_path / "results.jsonl"
    path.write_text(f"{one.json()}\n\n{one.json()}\n")
    results = read_results(path)
    assert [read.origin for read in results] == [f"{path}:1", f"{path}:3"]
    assert results == [one, one]
    assert one.origin is None
    merged = merge_sources({"a": results[:1], "b": results[1:]})
    assert [read.origin for read in merged] == [f"{path}:1", f"{path}:3"]
    assert "origin" not in results[0].columns()
    append_results(path, results)
    path.write_text(one.json().replace('"run"', '"origin": "x:1", "run"') + "\n")
    with pytest.raises(ZebraError, match="unknown columns \\['origin'\\]"):
        read_results(path)
