"""Read records from files, by suffix:

    .jsonl  .ndjson    one object per line
    .json              a list of objects, which is read as a whole, or one object per line
    .csv  .tsv         a header row, then one object per row; its values are strings
    .parquet           one object per row

All but parquet may be compressed: `.jsonl.gz`, `.csv.zst`. Records are streamed, and errors in them name the line or
row. zstandard and pyarrow, the extra `data`, are imported when a file needs them.
"""

from __future__ import annotations

import csv
import functools
import gzip
import importlib
import itertools
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from zebra.errors import ZebraError, missing_package

T = TypeVar("T")
_CHUNK_BYTES = 1 << 16  # compressed; zstandard may yield thousands of times as much
_PARQUET_ROWS = 64  # a record may be a whole book
_ERRORS_SHOWN = 5


class RecordError(ZebraError):
    """What is wrong with a record: the end of a sentence that begins with the place of the record."""


@dataclass(frozen=True)
class Record:
    """A line of JSON Lines as bytes, or a parsed row or list item; `number` counts them from 1.

    Attributes:
        bytes_read: bytes of the file that were read up to the end of the record; an estimate for parquet.
    """

    file: Path
    number: int
    content: Any
    bytes_read: int

    @property
    def place(self) -> str:
        """The place in the file, such as `line 3` or `row 3`."""
        return f"{'line' if isinstance(self.content, bytes) else 'row'} {self.number}"

    @property
    def where(self) -> str:
        """The file and the place."""
        return f"{self.file}, {self.place}"

    @functools.cached_property
    def fields(self) -> dict[str, Any]:
        """The fields by name.

        Raises:
            RecordError: the line is not JSON, or not an object.
        """
        try:
            fields = json.loads(self.content) if isinstance(self.content, bytes) else self.content
        except (ValueError, RecursionError) as error:
            raise RecordError(f"is not JSON: {error}") from None
        if not isinstance(fields, dict):
            raise RecordError(f"is a JSON {type(fields).__name__}, not an object")
        return fields


def with_line_feeds(text: str) -> str:
    """Text with \\n at all line ends, in place of \\r\\n and \\r."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def string_field(fields: dict[str, Any], name: str) -> str:
    """The string in a field of a record or of an object in it, with \\n at all line ends.

    Raises:
        RecordError: the field is missing, not a string, or has half a surrogate pair.
    """
    if name not in fields:
        raise RecordError(f"has no field {name!r}: its fields are {', '.join(fields) or 'none'}")
    value = fields[name]
    if not isinstance(value, str):
        raise RecordError(f"has {type(value).__name__} instead of a string in the field {name!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can escape half a surrogate pair
        raise RecordError(f"has half a surrogate pair at character {error.start} of the field {name!r}") from None
    return with_line_feeds(value)


def record_suffix(file: Path) -> str | None:
    """The suffix of a file of records; None for other files."""
    return next((suffix for suffix in _SUFFIXES if file.name.lower().endswith(suffix)), None)


def read_records(file: Path, column: str | None = None) -> Iterator[Record]:
    """Stream the records of a file.

    Args:
        column: read only this column of a parquet file, if the file has it.

    Raises:
        ZebraError: no such file, another suffix, a damaged file, an extra that is not installed.
    """
    if not file.is_file():
        raise ZebraError(f"there is no file at {file}. Give a file of records.")
    suffix = record_suffix(file)
    if suffix is None:
        raise ZebraError(f"a file of records must end in {RECORD_FILES}; got {file}. Rename or convert it.")
    with file.open("rb") as raw:
        if suffix == ".parquet":
            yield from _parquet_rows(file, raw, column)
            return
        format, codec = next((format, codec) for format in _FORMATS for codec in _CODECS if suffix == format + codec)
        for number, content in _FORMATS[format](file, _CODECS[codec](file, raw)):
            yield Record(file, number, content, raw.tell())


def parse_records(file: Path, parse: Callable[[Record], Iterable[T]], expected: str) -> list[T]:
    """Parse all records of a file, in order, and report all bad ones in one error.

    Args:
        parse: raises `RecordError` for a record that it cannot use.
        expected: a sentence that says what a record should be.

    Raises:
        ZebraError: as `read_records`; bad records: the error has their number, and place and fault of the first ones.
    """
    results: list[T] = []
    errors: list[str] = []
    for record in read_records(file):
        try:
            results += parse(record)
        except RecordError as error:
            errors.append(f"{record.place} {error}")
    if errors:
        more = f"; and {len(errors) - _ERRORS_SHOWN} more" if len(errors) > _ERRORS_SHOWN else ""
        count = f"{len(errors)} bad record{'s' if len(errors) > 1 else ''}"
        raise ZebraError(f"{file} has {count}: {'; '.join(errors[:_ERRORS_SHOWN])}{more}. {expected}")
    return results


def _parquet_rows(file: Path, raw: BinaryIO, column: str | None) -> Iterator[Record]:
    arrow, parquet = _import_extra("pyarrow", file), _import_extra("pyarrow.parquet", file)
    number = 0
    try:
        with parquet.ParquetFile(raw) as table:
            columns = [column] if column in table.schema_arrow.names else None
            bytes_per_row = file.stat().st_size // max(1, table.metadata.num_rows)
            for batch in table.iter_batches(_PARQUET_ROWS, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield Record(file, number, row, number * bytes_per_row)
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _damaged(file, "parquet", error) from None


def _json_lines(_: Path, lines: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, line.rstrip(b"\n")


def _json(file: Path, lines: Iterable[bytes]) -> Iterator[tuple[int, Any]]:
    """A list of records, or JSON Lines, which many files with this suffix contain."""
    start: list[bytes] = []
    for line in (lines := iter(lines)):
        start.append(line)
        if line.strip():
            break
    beginning = b"".join(start)
    if not beginning.strip():
        return
    is_list = beginning.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    whole = beginning + b"".join(lines) if is_list else beginning
    try:
        records = json.loads(whole)
    except (ValueError, RecursionError) as error:
        raise ZebraError(
            f"{file} is neither a JSON list of records nor JSON Lines: {error}. Write it as one of them."
        ) from None
    yield from enumerate(records, start=1) if is_list else _json_lines(file, itertools.chain(start, lines))


def _table(file: Path, lines: Iterable[bytes], delimiter: str) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows after the header, as dicts; a value in quotes may have line breaks."""
    csv.field_size_limit(sys.maxsize)  # a value may be a whole book
    rows = csv.reader((line.decode() for line in lines), delimiter=delimiter, strict=True)
    try:
        names = [name.removeprefix("\ufeff") for name in next(rows, [])]
        if len(set(names)) < len(names):
            raise ZebraError(f"{file} has two columns with the same name: {', '.join(names)}. Rename one.")
        for number, row in enumerate(rows, start=1):
            if len(row) not in (0, len(names)):
                raise ZebraError(
                    f"{file}, row {number} has {len(row)} values, but the header has {len(names)} columns. "
                    "Fix the row: put values with commas, quotes or line breaks in quotes."
                )
            if row:
                yield number, dict(zip(names, row, strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise _damaged(file, "CSV" if delimiter == "," else "TSV", error) from None


def _gzip_lines(file: Path, raw: BinaryIO) -> Iterator[bytes]:
    try:
        yield from gzip.GzipFile(fileobj=raw)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _damaged(file, "gzip", error) from None


def _zstd_lines(file: Path, raw: BinaryIO) -> Iterator[bytes]:
    pieces: list[bytes] = []  # of a line that continues in the next chunk
    for chunk in _zstd_chunks(file, raw):
        first, *others = chunk.split(b"\n")
        pieces.append(first)
        for other in others:
            yield b"".join(pieces) + b"\n"
            pieces = [other]
    yield b"".join(pieces)


def _zstd_chunks(file: Path, raw: BinaryIO) -> Iterator[bytes]:
    zstandard = _import_extra("zstandard", file)
    frame = None
    try:
        while compressed := raw.read(_CHUNK_BYTES):
            while compressed:  # a file may be several frames
                if frame is None or frame.eof:
                    frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
                yield frame.decompress(compressed)
                compressed = frame.unused_data if frame.eof else b""
    except zstandard.ZstdError as error:
        raise _damaged(file, "zstandard", error) from None
    if frame is not None and not frame.eof:
        raise _damaged(file, "zstandard", "its last frame is incomplete")


def _import_extra(module: str, file: Path) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise missing_package(str(file), module.partition(".")[0], "data") from None


def _damaged(file: Path, format: str, error: object) -> ZebraError:
    message = " ".join(str(error).split()) or type(error).__name__
    return ZebraError(f"{file} is not a complete {format} file: {message}. Copy or write it again.")


_FORMATS: dict[str, Callable[[Path, Iterable[bytes]], Iterator[tuple[int, Any]]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": functools.partial(_table, delimiter=","),
    ".tsv": functools.partial(_table, delimiter="\t"),
}
"""Each suffix, and the function from a file's lines, with their ends, to the number and content of each record."""
_CODECS: dict[str, Callable[[Path, BinaryIO], Iterable[bytes]]] = {
    "": lambda file, raw: raw,
    ".gz": _gzip_lines,
    ".zst": _zstd_lines,
}
_SUFFIXES = (*(format + codec for format in _FORMATS for codec in _CODECS), ".parquet")
RECORD_FILES = f"{', '.join(_FORMATS)} (these also with .gz or .zst) or .parquet"
"""The suffixes, as text for errors."""
