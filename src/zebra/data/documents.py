"""Files to documents. A file's suffix says how it holds them:

    .jsonl  .jsonl.gz  .jsonl.zst    one JSON object a line; the document is the string in its field
    .parquet                         one record a row; the document is the string in its column
    anything else                    UTF-8 text: one document, or split at each separator

Records are streamed and never held together. pyarrow and zstandard, the extra `data`, are loaded when a file asks for
them.
"""

from __future__ import annotations

import glob
import gzip
import importlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from zebra.errors import ZebraError

_CHUNK_BYTES = 1 << 16  # packed; zstandard may make thousands of times as much of it
_PARQUET_ROWS = 64  # a record may be a whole book


_Reader = Callable[[Path, str], Iterator[tuple[str, int]]]
"""A file and its separator or field to texts, each with the bytes of the file that it took."""
_Unpack = Callable[[Path, BinaryIO], Iterator[bytes]]
"""A file, open, to its bytes unpacked."""


class Document(NamedTuple):
    """A document without the blanks at its ends, and the bytes of its file that were read to get it."""

    text: str
    read: int


def find_files(patterns: Sequence[str]) -> list[Path]:
    """The files that a list of files, folders and globs names, each once, in the order given; folders sorted.

    Raises:
        ZebraError: a pattern that names nothing.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        matches = sorted(glob.glob(os.path.expanduser(pattern), recursive=True)) or [pattern]
        files = [
            file
            for match in map(Path, matches)
            for file in (sorted(match.rglob("*")) if match.is_dir() else [match])
            if file.is_file() and not any(part.startswith(".") for part in file.relative_to(match).parts)
        ]
        if not files:
            raise ZebraError(f"there is no text at {pattern}. Give files, folders or globs that exist.")
        found |= dict.fromkeys(files)
    return list(found)


def reader_of(file: Path, separator: str | None, field: str) -> tuple[str, ...]:
    """How a file becomes documents: `("text", separator)` or `(kind of records, field)`.

    Raises:
        ZebraError: a separator for a file of records.
    """
    kind = next((suffix for suffix in _RECORDS if file.name.lower().endswith(suffix)), None)
    if kind is None:
        return ("text", separator or "")
    if separator:
        raise ZebraError(
            f"a separator splits text, but {file} holds records, a document each; got the separator {separator!r}. "
            "Leave it out, and name the field that has the text."
        )
    return (kind, field)


def read_documents(files: Sequence[Path], separator: str | None = None, field: str = "text") -> Iterator[Document]:
    """The documents of the files in their order, stripped of blanks at both ends; those of blanks alone are left out.

    Args:
        separator: splits a text file into documents; None makes each text file one document.
        field: the field of a record, or the column of a parquet file, that has the text.

    Raises:
        ZebraError: a file that is not what its suffix says, with the place; a record without text in the field; files
            without any text; a separator for a file of records; an extra that is not installed.
    """
    empty = True
    for file in files:
        kind, how = reader_of(file, separator, field)
        for text, read in _RECORDS[kind](file, how) if kind in _RECORDS else _split(file, how):
            if stripped := text.strip():
                empty = False
                yield Document(stripped, read)
    if empty:
        raise ZebraError(f"there is no text in {', '.join(map(str, files))}: only blanks. Give files with text.")


def _split(file: Path, separator: str) -> Iterator[tuple[str, int]]:
    raw = file.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ZebraError(
            f"{file} is not UTF-8 text: byte {error.start} is {raw[error.start]:#04x}. Convert it to UTF-8."
        ) from None
    for document in text.split(separator) if separator else [text]:
        yield document, len(document.encode())


# Records


def read_records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file of JSON Lines (`.jsonl`, `.jsonl.gz`, `.jsonl.zst`), each with its place in words.

    Raises:
        ZebraError: a file of another suffix or a damaged one; a line that is no JSON object, with its number.
    """
    unpack = next((unpack for suffix, unpack in _PACKED.items() if file.name.lower().endswith(suffix)), None)
    if unpack is None:
        raise ZebraError(f"{file} is no file of JSON Lines. Name it {', '.join(_PACKED)}, and give one object a line.")
    with file.open("rb") as raw:
        for number, line in enumerate(_lines(unpack(file, raw)), start=1):
            if line.strip():
                where = f"{file}, line {number}"
                yield where, _object(where, line)


def _json_lines(unpack: _Unpack) -> _Reader:
    """A reader of JSON Lines out of the packed or plain bytes of a file."""

    def read(file: Path, field: str) -> Iterator[tuple[str, int]]:
        with file.open("rb") as raw:
            before = 0
            for number, line in enumerate(_lines(unpack(file, raw)), start=1):
                if line.strip():
                    after = raw.tell()
                    where = f"{file}, line {number}"
                    record = _object(where, line)
                    yield _text(where, record.get(field), field, record), after - before
                    before = after

    return read


def json_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """The numbers and the bytes of the lines of a file of JSON Lines, packed where its suffix says so.

    Raises:
        ZebraError: no such file, one of another suffix, a damaged one.
    """
    if not file.is_file():
        raise ZebraError(f"there is no file at {file}. Give a file of JSON Lines.")
    unpack = next((how for suffix, how in _PACKED.items() if file.name.lower().endswith(suffix)), None)
    if unpack is None:
        raise ZebraError(f"a file of JSON Lines ends in {', '.join(_PACKED)}; got {file}. Rename or convert it.")
    with file.open("rb") as raw:
        yield from enumerate(_lines(unpack(file, raw)), start=1)


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    pieces: list[bytes] = []  # of the line that the chunks so far have not ended
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        pieces.append(first)
        for other in others:
            yield b"".join(pieces)
            pieces = [other]
    yield b"".join(pieces)


def _object(where: str, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ZebraError(f"{where} is not JSON: {error}. A .jsonl file has one JSON object a line.") from None
    if not isinstance(record, dict):
        raise ZebraError(
            f"{where} is no record but a {type(record).__name__}. A .jsonl file has one JSON object a line."
        )
    return record


def _text(where: str, value: Any, field: str, fields: Any) -> str:
    if not isinstance(value, str):
        has = "no such field" if field not in fields else f"{type(value).__name__}, no string,"
        raise ZebraError(
            f"the text is a string in the field {field!r}; {where} has {has} among its fields {', '.join(fields)}. "
            "Name the field that has the text."
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a character
        raise ZebraError(
            f"{where} has half a surrogate pair at character {error.start} of {field!r}. Mend it."
        ) from None
    return value


def _plain(file: Path, raw: BinaryIO) -> Iterator[bytes]:
    while chunk := raw.read(_CHUNK_BYTES):
        yield chunk


def _gzip(file: Path, raw: BinaryIO) -> Iterator[bytes]:
    try:
        yield from _plain(file, gzip.GzipFile(fileobj=raw))  # type: ignore[arg-type]
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _damaged(file, "gzip", error) from None


def _zstd(file: Path, raw: BinaryIO) -> Iterator[bytes]:
    zstandard = _extra("zstandard", file)
    frame = None
    try:
        for packed in _plain(file, raw):
            while packed:  # a file may be several frames
                if frame is None or frame.eof:
                    frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
                yield frame.decompress(packed)
                packed = frame.unused_data if frame.eof else b""
    except zstandard.ZstdError as error:
        raise _damaged(file, "zstandard", error) from None
    if frame is not None and not frame.eof:
        raise _damaged(file, "zstandard", "it ends before its last frame does")


def _parquet(file: Path, column: str) -> Iterator[tuple[str, int]]:
    arrow, parquet = _extra("pyarrow", file), _extra("pyarrow.parquet", file)
    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            columns = table.schema_arrow.names
            if column not in columns:
                _text(str(file), None, column, columns)
            each = file.stat().st_size // max(1, table.metadata.num_rows)
            for batch in table.iter_batches(_PARQUET_ROWS, columns=[column]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield _text(f"{file}, row {number}", value, column, columns), each
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _damaged(file, "parquet", error) from None


def _extra(module: str, file: Path) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ZebraError(
            f"{file} is read by {module.partition('.')[0]}, which is not installed. Run pip install 'zebra-llm[data]'."
        ) from None


def _damaged(file: Path, kind: str, error: object) -> ZebraError:
    said = " ".join(str(error).split()) or type(error).__name__
    return ZebraError(f"{file} is no whole {kind} file: {said}. Copy or write it again.")


_PACKED: dict[str, Callable[[Path, BinaryIO], Iterator[bytes]]] = {
    ".jsonl": _plain,
    ".jsonl.gz": _gzip,
    ".jsonl.zst": _zstd,
}
_RECORDS: dict[str, _Reader] = {suffix: _json_lines(unpack) for suffix, unpack in _PACKED.items()}
_RECORDS[".parquet"] = _parquet
