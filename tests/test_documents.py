"""Files to documents: which files, what each kind of file holds, and what is refused with its place."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pytest
import zstandard
from pyarrow import parquet

from zebra.data import records
from zebra.data.documents import find_files, read_documents
from zebra.errors import ZebraError

KINDS = ("jsonl", "jsonl.gz", "jsonl.zst", "parquet")


def names(paths: list[Path], folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in paths]


def read(*files: Path, separator: str | None = None, field: str = "text") -> list[str]:
    return [document.text for document in read_documents(files, separator, field)]


def packed(kind: str, raw: bytes) -> bytes:
    return {"jsonl": lambda: raw, "jsonl.gz": lambda: gzip.compress(raw), "jsonl.zst": lambda: zstandard.compress(raw)}[
        kind
    ]()


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    """Records as the kind of file that the name says."""
    kind = path.name.partition(".")[2].lower()
    if kind == "parquet":
        parquet.write_table(arrow.Table.from_pylist(records), path, row_group_size=3)
    else:
        path.write_bytes(packed(kind, b"".join(json.dumps(record).encode() + b"\n" for record in records)))
    return path


# -- finding


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["b.txt"], ["b.txt"]),
        (["b.txt", "a.txt"], ["b.txt", "a.txt"]),
        (["."], ["a.txt", "b.txt", "deep/c.md", "deep/er/d.txt"]),
        (["deep"], ["deep/c.md", "deep/er/d.txt"]),
        (["*.txt"], ["a.txt", "b.txt"]),
        (["**/*.txt"], ["a.txt", "b.txt", "deep/er/d.txt"]),
        (["[bc].txt"], ["b.txt"]),
        (["d*"], ["deep/c.md", "deep/er/d.txt"]),
        (["b.txt", "*.txt", "b.txt"], ["b.txt", "a.txt"]),
        ([".hidden"], [".hidden"]),
    ],
)
def test_files_folders_and_globs(text: Path, patterns: list[str], expected: list[str]) -> None:
    assert names(find_files([str(text / pattern) for pattern in patterns]), text) == expected


def test_a_name_with_brackets_and_the_home_folder(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (text / "part[1].txt").write_text("one")
    assert names(find_files([str(text / "part[1].txt")]), text) == ["part[1].txt"]
    monkeypatch.setenv("HOME", str(text))
    assert names(find_files(["~/b.txt"]), text) == ["b.txt"]


@pytest.mark.parametrize("pattern", ["nothing.txt", "*.pdf", "empty", "deep/*/nothing"])
def test_a_pattern_that_names_nothing_is_refused(text: Path, pattern: str) -> None:
    (text / "empty").mkdir()
    with pytest.raises(ZebraError, match=r"there is no text at .* that exist") as refused:
        find_files([str(text / "b.txt"), str(text / pattern)])
    assert str(text / pattern) in str(refused.value)


# -- reading


def test_documents_are_split_and_stripped(text: Path) -> None:
    files = [text / "a.txt", text / "b.txt"]
    assert read(*files) == ["ay\n--\n ayay \n--", "bee"]
    assert read(*files, separator="--") == ["ay", "ayay", "bee"]
    assert read(*files, separator="\n--\n") == ["ay", "ayay", "bee"]


@pytest.mark.parametrize(
    ("raw", "place"), [(b"ok\xffrest", "byte 2 is 0xff"), ("é".encode("latin-1"), "byte 0 is 0xe9")]
)
def test_bytes_that_are_not_utf8_are_refused_with_their_place(text: Path, raw: bytes, place: str) -> None:
    (text / "bad.txt").write_bytes(raw)
    with pytest.raises(ZebraError, match=f"bad.txt is not UTF-8 text: {place}"):
        read(text / "b.txt", text / "bad.txt")


@pytest.mark.parametrize("content", ["", " \n\t\n", "--\n--"])
def test_files_without_text_are_refused(text: Path, content: str) -> None:
    (text / "blank.txt").write_text(content)
    with pytest.raises(ZebraError, match=r"no text in .*blank\.txt: only blanks"):
        read(text / "blank.txt", separator="--")
    assert read(text / "blank.txt", text / "b.txt", separator="--") == ["bee"]


# -- records

RECORDS = [{"text": f" número {i}\n", "n": i, "body": "b" * i} for i in range(1, 200)]


@pytest.mark.parametrize("kind", KINDS)
def test_records_become_documents(tmp_path: Path, kind: str) -> None:
    file = write(tmp_path / f"r.{kind}", RECORDS)
    assert read(file) == [f"número {i}" for i in range(1, 200)]
    assert read(file, field="body") == ["b" * i for i in range(1, 200)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_suffix_in_capitals_is_the_same(tmp_path: Path, kind: str) -> None:
    assert read(write(tmp_path / f"R.{kind.upper()}", RECORDS[:2])) == ["número 1", "número 2"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_read_are_those_of_the_file(tmp_path: Path, kind: str) -> None:
    """So that a bar over bytes of files ends where the files do."""
    file = write(tmp_path / f"r.{kind}", RECORDS)
    size = file.stat().st_size
    bytes_read = sum(document.bytes_read for document in read_documents([file]))
    assert size - len(RECORDS) <= bytes_read <= size


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 16])
def test_lines_go_over_chunks(tmp_path: Path, kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_CHUNK_BYTES", chunk)
    raw = '{"text": "é one"}\n\n  \n{"text": "two"}\r\n{"text": " "}\n{"text": "last"}'
    (tmp_path / f"r.{kind}").write_bytes(packed(kind, raw.encode()))
    assert read(tmp_path / f"r.{kind}") == ["é one", "two", "last"]


@pytest.mark.parametrize("kind", KINDS[1:3])
def test_a_packed_file_may_be_several(tmp_path: Path, kind: str) -> None:
    parts = [packed(kind, b'{"text": "one"}\n{"te'), packed(kind, b'xt": "two"}\n'), packed(kind, b'{"text": "three"}')]
    (tmp_path / f"r.{kind}").write_bytes(b"".join(parts))
    assert read(tmp_path / f"r.{kind}") == ["one", "two", "three"]


def test_kinds_stand_side_by_side_in_their_order(text: Path) -> None:
    files = [text / "b.txt", *(write(text / f"r.{kind}", [{"text": kind}]) for kind in KINDS)]
    assert read(*files) == ["bee", *KINDS]


def test_columns_of_strings_of_every_kind(tmp_path: Path) -> None:
    for kind in (arrow.string(), arrow.large_string(), arrow.dictionary(arrow.int8(), arrow.string())):
        column = arrow.array(["one", "two", "one"], arrow.string()).cast(kind)
        parquet.write_table(arrow.table({"text": column}), tmp_path / "r.parquet")
        assert read(tmp_path / "r.parquet") == ["one", "two", "one"]


# -- refusals


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', r"line 2 is not JSON: .*or correct the file"),
        (b"bare words", r"line 2 is not JSON"),
        (b'{"text": "\xff"}', r"line 2 is not JSON: .*0xff"),
        (b"[" * 100_000, r"line 2 is not JSON: .*recursion"),
        (b'["text"]', r"line 2 is a JSON list, not an object\. Name the field"),
        (
            b'{"body": "a", "title": "b"}',
            r"line 2 has no field 'text': its fields are body, title\. Name the field",
        ),
        (b'{"text": 5, "title": "b"}', r"line 2 has int instead of a string in the field 'text'"),
        (b'{"text": null}', r"line 2 has NoneType instead of a string in the field 'text'"),
        (b'{"text": "ab\\ud800"}', r"line 2 has half a surrogate pair at character 2 of the field 'text'"),
    ],
)
def test_a_line_that_is_no_record_is_refused_with_its_number(
    tmp_path: Path, kind: str, line: bytes, message: str
) -> None:
    file = tmp_path / f"r.{kind}"
    file.write_bytes(packed(kind, b'{"text": "fine"}\n' + line + b"\n"))
    with pytest.raises(ZebraError, match=message) as refused:
        read(file)
    assert str(file) in str(refused.value)


def test_a_column_without_text_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "r.parquet", [{"body": "a", "n": 1}])
    with pytest.raises(ZebraError, match=r"r\.parquet, row 1 has no field 'text': its fields are body, n\. Name"):
        read(file)
    with pytest.raises(ZebraError, match=r"row 1 has int instead of a string in the field 'n'"):
        read(file, field="n")
    file = write(tmp_path / "r.parquet", [{"text": "a"}, {"text": None}])
    with pytest.raises(ZebraError, match=r"row 2 has NoneType instead of a string"):
        read(file)


@pytest.mark.parametrize("kind", KINDS)
def test_a_separator_for_records_is_refused(tmp_path: Path, kind: str) -> None:
    file = write(tmp_path / f"r.{kind}", RECORDS)
    with pytest.raises(ZebraError, match=r"holds records, a document each; got the separator '--'\. Leave it out"):
        read(file, separator="--")


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("damage", ["cut", "another", "empty", "inside"])
def test_a_damaged_file_is_refused(tmp_path: Path, kind: str, damage: str) -> None:
    file = write(tmp_path / f"r.{kind}", RECORDS)
    raw = file.read_bytes()
    at = 4 if kind == "parquet" else len(raw) // 2  # the header of its first page: pages have no checksum
    inside = raw[:at] + bytes(255 - byte for byte in raw[at : at + 40]) + raw[at + 40 :]
    file.write_bytes({"cut": raw[:-20], "another": b"plain words", "empty": b"", "inside": inside}[damage])
    whole = r"not a complete (gzip|zstandard|parquet) file: .*write it again|is not JSON"
    nothing = "only blanks" if damage == "empty" else whole  # an empty file of no frames is whole
    with pytest.raises(ZebraError, match=f"{whole}|{nothing}"):
        read(file)


@pytest.mark.parametrize("kind", KINDS)
def test_records_without_text_are_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ZebraError, match="only blanks"):
        read(write(tmp_path / f"r.{kind}", [{"text": " "}, {"text": ""}]))


@pytest.mark.parametrize(("kind", "module"), [("jsonl.zst", "zstandard"), ("parquet", "pyarrow")])
def test_a_missing_extra_is_named(tmp_path: Path, kind: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / f"r.{kind}", RECORDS)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ZebraError, match=rf"is read by {module}, which is not installed\. Run pip install 'zebra-llm"):
        read(file)
    assert read(write(tmp_path / "r.jsonl.gz", RECORDS[:1])) == ["número 1"]
