"""Every number of a page links to its row, or to the rows that it was made of; a row knows where it was read from."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import pytest

from zebra.errors import ZebraError
from zebra.report import merge_sources, write_report
from zebra.report.links import Links
from zebra.results import Result, append_results, read_results

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
DEMO, LAYOUTS, TUNED, SPEED = "demo.jsonl", "retrieval-layouts.jsonl", "tiny-lit.jsonl", "cpu.jsonl"


class Piece(NamedTuple):
    """A text of a page, where it stands and where it links to."""

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
        self.found: list[Piece] = []
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
        self.found.append(Piece(where, self.column, data, to))
        for _, attrs in self.open:
            if name := attrs.get("id"):
                self.ids.setdefault(name, []).append(data)


def pieces(html: Path) -> tuple[list[Piece], dict[str, list[str]]]:
    parser = _Pieces()
    parser.feed(html.read_text())
    return parser.found, parser.ids


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Result]]:
    rows = merge_sources({name: read_results(RESULTS / name) for name in (DEMO, LAYOUTS, TUNED, SPEED)})
    html = tmp_path_factory.mktemp("page") / "report.html"
    write_report(rows, html)
    return html, rows


def of_results(found: list[Piece]) -> list[Piece]:
    """The texts of tables of numbers but for their first columns, which name what a line is of."""
    return [one for one in found if "numeric" in one.where and "tbody" in one.where and one.column > 1]


def test_every_number_of_a_table_is_a_link_to_what_is_there(page: tuple[Path, list[Result]]) -> None:
    found, ids = pieces(page[0])
    numbers = [one for one in of_results(found) if re.fullmatch(r"[+−]?\d[\d,.]*(e\+\d+)?(×|\xa0%)?", one.text)]
    assert len(numbers) > 700
    unlinked = {one.text for one in numbers if not one.to and "small" not in one.where}
    assert unlinked <= {"0", "0.5", "1"}  # depths, and kinds of instructions that no row has
    assert {one.to.removeprefix("#") for one in found if one.to} <= set(ids)


def said_by(row: Result) -> list[float]:
    """What a number may show of a row, in the units that pages use."""
    return [row.n or 0, *(row.value * unit for unit in (1, 100, 2**-20, 2**-30, 1e-9))]


def test_a_number_is_what_its_row_says(page: tuple[Path, list[Result]]) -> None:
    found, _ = pieces(page[0])
    checked = 0
    for one in of_results(found):
        link = re.fullmatch(r"#row-(\d+)", one.to)
        number = re.match(r"[+−]?[\d,]+(\.\d+)?(e\+\d+)?", one.text)
        if link is None or number is None:
            continue
        row = page[1][int(link[1]) - 1]
        shown = float(number[0].replace(",", "").replace("−", "-"))
        decimals = len(number[1] or ".") - 1
        near = [abs(value - shown) <= max(0.5000001 * 10**-decimals, 0.005 * abs(shown)) for value in said_by(row)]
        layers = row.task.startswith("selection-") and shown == int(shown)
        first = row.task.startswith("bench ") and one.text == "1.00"  # times the first
        assert any(near) or layers or first, (one, row)
        checked += 1
    assert checked > 500


def test_a_cell_of_a_heat_map_is_a_link_to_its_row(page: tuple[Path, list[Result]]) -> None:
    html, rows = page
    cells = re.findall(r'<a href="#row-(\d+)"><g><title>(\d+)\s% at ([\d,]+) tokens, depth ([\d.]+)', html.read_text())
    retrieval = [row for row in rows if row.task.startswith("retrieval-")]
    assert len(cells) == len(retrieval)
    for place, share, length, depth in cells:
        row = rows[int(place) - 1]
        assert (f"{100 * row.value:.0f}", f"{row.length:,}", f"{row.depth:g}") == (share, length, depth)
    alone = html.with_name("report-retrieval-1.svg").read_text()
    assert "<a" not in alone
    assert "<title>" in alone


def test_what_was_made_of_several_rows_names_them(page: tuple[Path, list[Result]]) -> None:
    found, ids = pieces(page[0])
    (change,) = {one.to for one in found if one.text == "−97.8\xa0%"}
    assert " ".join(map(str.strip, ids[change.removeprefix("#")])) == "row 5 213.7 , row 97 4.63"
    effective = {one.to for one in of_results(found) if one.text == "2,048" and one.to}
    assert effective
    for to in effective:
        named = [int(text.removeprefix("row ")) for text in ids[to.removeprefix("#")] if text.startswith("row ")]
        rows = [page[1][place - 1] for place in named]
        assert {(row.task, row.length) for row in rows} == {("retrieval-generate-passkey", n) for n in (1024, 2048)}
        assert len({row.layout for row in rows}) == 1
        assert len(rows) == 6


def test_a_row_stands_on_the_page_whole(page: tuple[Path, list[Result]]) -> None:
    _, ids = pieces(page[0])
    rows = page[1]
    assert sum(name.startswith("row-") for name in ids) == len(rows)
    line = ids["row-5"]
    assert line[0] == "5"
    for column in ("213.740858", "perplexity-disjoint", "examples/stories260K", "84486", "b4978d394e98"):
        assert column in line
    assert line[-2].endswith(DEMO)
    assert line[-1] == "5"


def test_what_all_rows_share_is_said_once() -> None:
    rows = [
        Result(run="r", model="m", layout="full", task="t", metric=f"m{i}", value=i, commit="abc", seed=7)
        for i in range(2)
    ]
    html = Links(rows).html()
    assert html.count("abc") == 1
    assert "seed 7" in html
    assert "<th>seed</th>" not in html
    assert "<th>metric</th>" in html
    assert Links([]).html() == ""


def test_links_of_many_rows_are_spans() -> None:
    rows = [Result(run="r", model="m", layout="full", task="t", metric="m", value=i, n=i) for i in range(30)]
    links = Links(rows)
    stranger = Result(run="r", model="m", layout="full", task="t", metric="m", value=1.0)
    assert links.to([]) == links.to([stranger]) == ""
    assert links.to([rows[3], rows[3]]) == "#row-4"
    assert links.to(rows[:13] + rows[20:21]) == links.to(rows[20:21] + rows[:13]) == "#from-1"
    assert re.sub("<[^>]+>", "", re.search(r'<li id="from-1">.*', links.html())[0]) == "row 1–13, row 21"  # type: ignore[index]


def test_a_row_keeps_the_file_and_line_that_it_was_read_from(tmp_path: Path) -> None:
    row = Result(run="r", model="m", layout="full", task="t", metric="m", value=1.0)
    path = tmp_path / "results.jsonl"
    path.write_text(f"{row.json()}\n\n{row.json()}\n")
    read = read_results(path)
    assert [one.origin for one in read] == [f"{path}:1", f"{path}:3"]
    assert read == [row, row]
    assert row.origin is None
    assert [one.origin for one in merge_sources({"a": read[:1], "b": read[1:]})] == [f"{path}:1", f"{path}:3"]
    assert "origin" not in read[0].columns()
    append_results(path, read)
    path.write_text(row.json().replace('"run"', '"origin": "x:1", "run"') + "\n")
    with pytest.raises(ZebraError, match="unknown columns \\['origin'\\]"):
        read_results(path)
