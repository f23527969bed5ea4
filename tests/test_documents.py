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
from zebra.data.documents import check_texts, find_files, read_documents
from zebra.errors import ZebraError

KINDS = ("jsonl", "jsonl.gz", "jsonl.zst", "parquet")


def names(paths: list[Path], folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in paths]


def read(*files: Path, separator: str | None = None, field: str | None = None) -> list[str]:
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


def test_one_path_is_not_its_letters(text: Path) -> None:
    for one in (str(text / "b.txt"), text / "b.txt"):
        assert names(find_files(one), text) == names(find_files([one]), text) == ["b.txt"]
    for neither in (5, [5], None):
        with pytest.raises(ZebraError, match=r"a name must be a string, a path or a list.* got"):
            find_files(neither)  # type: ignore[arg-type]


def test_a_name_with_brackets_and_the_home_folder(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (text / "part[1].txt").write_text("one")
    assert names(find_files([str(text / "part[1].txt")]), text) == ["part[1].txt"]
    monkeypatch.setenv("HOME", str(text))
    assert names(find_files(["~/b.txt"]), text) == ["b.txt"]


@pytest.mark.parametrize("pattern", ["nothing.txt", "*.pdf", "empty", "deep/*/nothing"])
def test_a_pattern_that_names_nothing_is_refused(text: Path, pattern: str) -> None:
    (text / "empty").mkdir()
    with pytest.raises(ZebraError, match=r"no file matches .* that exist") as refused:
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
    separator = "--" if "--" in content else None
    with pytest.raises(ZebraError, match=r"no text in .*blank\.txt, only whitespace"):
        read(text / "blank.txt", separator=separator)
    assert read(text / "blank.txt", text / "b.txt", separator=separator) == ["bee"]


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
    with pytest.raises(ZebraError, match=r"applies only to text files; got the separator '--' for .*\. Leave it out"):
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
    nothing = "only whitespace" if damage == "empty" else whole  # an empty file of no frames is whole
    with pytest.raises(ZebraError, match=f"{whole}|{nothing}"):
        read(file)


@pytest.mark.parametrize("kind", KINDS)
def test_records_without_text_are_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ZebraError, match="only whitespace"):
        read(write(tmp_path / f"r.{kind}", [{"text": " "}, {"text": ""}]))


@pytest.mark.parametrize(("kind", "module"), [("jsonl.zst", "zstandard"), ("parquet", "pyarrow")])
def test_a_missing_extra_is_named(tmp_path: Path, kind: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / f"r.{kind}", RECORDS)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ZebraError, match=rf"needs {module}, not installed here\. Run pip install '\.\[data\]'"):
        read(file)
    assert read(write(tmp_path / "r.jsonl.gz", RECORDS[:1])) == ["número 1"]


# -- other kinds of records, and what would be read as prose


@pytest.mark.parametrize("codec", ["", ".gz", ".zst"])
def test_lists_tables_and_lines_are_read_as_datasets_reads_them(tmp_path: Path, codec: str) -> None:
    from datasets import Dataset

    texts = ["one", 'two, "quoted"', "é\nwith a line break", "tab\tinside", "x" * 200_000]
    columns = {"n": [str(i) for i in range(len(texts))], "text": texts}
    data = Dataset.from_dict(columns)
    data.to_csv(tmp_path / "a.csv", index=False)
    data.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    data.to_json(tmp_path / "a.ndjson")
    data.to_json(tmp_path / "lines.json")
    data.to_json(tmp_path / "list.json", lines=False)
    for file in sorted(tmp_path.glob("*")):
        raw = file.read_bytes()
        compressed = {"": raw, ".gz": gzip.compress(raw), ".zst": zstandard.compress(raw)}[codec]
        (target := file.with_name(file.name + codec)).write_bytes(compressed)
        options: dict[str, Any] = {"sep": "\t"} if file.suffix == ".tsv" else {}
        reader = Dataset.from_csv if file.suffix in (".csv", ".tsv") else Dataset.from_json
        theirs_as_data = reader(str(file), cache_dir=str(tmp_path / "cache"), keep_in_memory=True, **options)
        assert read(target) == list(theirs_as_data["text"]) == texts, file.name


def test_values_of_tables_are_text_as_they_stand(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text('\ufefftext,n\r\nNA,1\r\n"12\nof it",2\r\n\r\nnull,\r\n', newline="")
    assert read(tmp_path / "r.csv") == ["NA", "12\nof it", "null"]


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("r.csv", "text,n\na,1\nb\n", r"r\.csv, row 2 has 1 values, but the header has 2 columns"),
        ("r.csv", 'text\na\n"b\n', r"r\.csv is not a complete CSV file: unexpected end of data"),
        ("r.tsv", 'text\n"a" b\n', r"r\.tsv is not a complete TSV file: "),
        ("r.csv", "text,text\na,b\n", r"r\.csv has two columns with the same name: text, text\. Rename one"),
        ("r.csv", "id;text\n1;a\n", r"row 1 has no field 'text': its fields are id;text"),
        ("r.json", '[{"text": "a"}, {"text": 5}]', r"row 2 has int instead of a string in the field 'text'"),
        ("r.json", '[{"text": "a"}, "b"]', r"row 2 is a JSON str, not an object"),
        ("r.json", '[{"text": "a"}, {"te', r"r\.json is neither a JSON list of records nor JSON Lines: Unterminated"),
        ("r.json", '{\n "data": [{"text": "a"}]\n}', r"neither a JSON list of records nor JSON Lines: Expecting"),
        ("r.json", '{"data": [{"text": "a"}]}', r"line 1 has no field 'text': its fields are data"),
        ("r.json", " \n", "only whitespace"),
        ("r.csv", "", "only whitespace"),
    ],
)
def test_broken_lists_and_tables_are_refused(tmp_path: Path, name: str, raw: str, message: str) -> None:
    (tmp_path / name).write_text(raw)
    with pytest.raises(ZebraError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize("separator", ["\n--\n", "\r\n--\r\n"])
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_line_ends_are_those_of_python_and_said(
    tmp_path: Path, ends: str, separator: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("one\nmore\n--\ntwo\n", newline=ends)
    assert read(tmp_path / "a.txt", separator=separator) == ["one\nmore", "two"]
    with (tmp_path / "a.txt").open() as universal:  # as datasets opens it
        assert read(tmp_path / "a.txt") == [universal.read().strip()]
    error = capsys.readouterr().err
    assert error.count("a.txt are read as \\n.\n") == (0 if ends == "\n" else 2)


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.csv"])
def test_line_ends_within_a_record_are_normalised_too(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": "one\r\nmore"}, {"text": "two\rmore"}]
    lines = "\n".join(map(json.dumps, rows))
    raw = {"r.jsonl": lines, "r.json": json.dumps(rows), "r.csv": 'text\r\n"one\r\nmore"\r\n"two\rmore"\r\n'}[name]
    (tmp_path / name).write_bytes(raw.encode())
    assert read(tmp_path / name) == ["one\nmore", "two\nmore"]
    assert capsys.readouterr().err.count(f"{name} are read as \\n.\n") == 1


def test_a_pdf_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\n")
    with pytest.raises(ZebraError, match=r"a\.txt is a PDF, not text\. Extract its text first"):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"separator": "<|end|>"}, r"the separator '<\|end\|>' does not occur in .*a\.txt, .*b\.txt\. Correct it"),
        ({"separator": ""}, "the separator must have at least one character"),
        ({"field": "text"}, r"a field applies only to files of records, .*; got the field 'text' for .*a\.txt"),
    ],
)
def test_options_that_would_do_nothing_are_refused(text: Path, options: dict[str, str], message: str) -> None:
    files = [text / "a.txt", text / "b.txt"]
    with pytest.raises(ZebraError, match=message):
        read(*files, **options)
    with pytest.raises(ZebraError, match=message):
        check_texts(list(map(str, files)), **options)


def test_each_option_has_its_files_in_a_mixed_list(text: Path) -> None:
    (text / "r.csv").write_text("body\nsea\n")
    assert read(text / "a.txt", text / "b.txt", text / "r.csv", separator="--", field="body") == [
        *("ay", "ayay"),
        *("bee", "sea"),
    ]


def test_utf_16_without_its_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("Once".encode("utf-16-le"))
    with pytest.raises(ZebraError, match=r"a\.txt is not UTF-8 text: character 1 is NUL"):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize("name", ["b.txt", "b.jsonl", "b.csv"])
def test_a_check_reads_the_first_document_of_each_file(text: Path, name: str) -> None:
    check_texts([str(text)])
    (text / name).write_bytes(b"\xff")
    with pytest.raises(ZebraError, match=rf"{name}(, line 1)? is not"):
        check_texts([str(text)])
    (text / name).write_bytes(b"")
    check_texts([str(text)])
    with pytest.raises(ZebraError, match="only whitespace"):
        check_texts([str(text / name)])
